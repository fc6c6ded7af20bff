# SPDX-License-Identifier: Apache-2.0
"""What each CUDA kernel may cost and must contain: one table.

A number is a promise, not a record: raise one only with a measurement that says why. Registers
decide how many blocks of 128 threads share a multiprocessor: 128 of them four, 168 three, 255 two.
"""

import dataclasses

# 16-byte accesses, asynchronous copies, matrix loads and tensor-core products, as SASS spells them.
LOAD_16, STORE_16 = r"LDG\.E\.(.*\.)?128", r"STG\.E\.(.*\.)?128"
COPY_16 = r"LDGSTS\.E\.BYPASS\.(.*\.)?128"
MATRIX, TRANSPOSED, PRODUCT = r"LDSM\.16\.M88\.4", r"LDSM\.16\.MT88\.4", r"HMMA\.16816\.F32"
TENSOR_CORES = (COPY_16, MATRIX, TRANSPOSED, PRODUCT)
VECTORS = (LOAD_16, STORE_16)


@dataclasses.dataclass(frozen=True)
class Limit:
    """A row for all kernels whose name with template arguments matches.

    kernel: regular expression over the whole name.
    registers: most per thread, on every architecture.
    has: opcodes, as regular expressions, that must each occur.
    loop: (sm_80, sm_90a), most instructions in a loop around tensor-core products: what a warp
        issues per page or tile of 64 tokens.
    """

    kernel: str
    registers: int
    has: tuple[str, ...] = ()
    loop: tuple[int, int] | None = None


def decode(types, dim, rotate, registers, loop):
    """memory_attention_decode<types of queries and bank, head dimension, whether it rotates>."""
    name = f"memory_attention_decode<{types}, {dim}, {rotate}>"
    return Limit(name, registers, TENSOR_CORES, loop)


FLOAT, INT8, FLOAT8 = r"(\w+), \1", r"\w+, signed char", r"\w+, Float8E4M3"
# Cycles that a multiprocessor has for a page of one head of dimension 128, while each of its
# schedulers issues the instructions of one warp:
#   H200, 4.3 TB/s, 132 multiprocessors at 1.755 to 1.98 GHz: 1765 to 1990 in bf16, 910 to 1030 in
#   8 bits with their scales.
#   A100, 2.0 TB/s, 108 multiprocessors at 1.41 GHz: 2495 and 1290.
# On sm_80 shared memory holds two blocks of the 8-bit kernels that rotate, on sm_90a three.
LIMITS = [
    decode(FLOAT, 64, "false", 128, (360, 355)),
    decode(FLOAT, 64, "true", 168, (645, 650)),
    decode(FLOAT, 128, "false", 168, (480, 475)),
    decode("BFloat16, BFloat16", 128, "true", 255, (1025, 1035)),
    decode("Float16, Float16", 128, "true", 255, (770, 780)),
    decode(INT8, 64, "false", 128, (460, 450)),
    decode(INT8, 64, "true", 168, (590, 590)),
    decode(INT8, 128, "false", 168, (620, 620)),
    decode(INT8, 128, "true", 210, (785, 830)),
    # sm_80 has no instruction that converts e4m3
    decode(FLOAT8, 64, "false", 128, (530, 410)),
    decode(FLOAT8, 64, "true", 168, (660, 545)),
    decode(FLOAT8, 128, "false", 168, (745, 540)),
    decode(FLOAT8, 128, "true", 210, (910, 745)),
    Limit("memory_attention_prefill<.*, 64>", 168, TENSOR_CORES, (1020, 1180)),
    Limit("memory_attention_prefill<.*, 128>", 255, TENSOR_CORES, (1220, 1380)),
    Limit("memory_attention_simple", 128, (LOAD_16,)),
    Limit("compress_pack_kernel<.*, true>", 96, VECTORS),
    Limit("compress_pack_kernel<.*, false>", 96),
    Limit("write_memory_kernel<.*, true>", 64, VECTORS),
    Limit("write_memory_kernel<.*, false>", 64),
    Limit("compress_pack_bwd_kernel<.*, true>", 64, VECTORS),
    Limit("compress_pack_bwd_kernel<.*, false>", 64),
    Limit("gather_chunks_kernel<.*, true>", 80, VECTORS),
    Limit("gather_chunks_kernel<.*, false>", 80),
    Limit("gather_chunks_bwd_kernel<.*, true>", 80, (LOAD_16,)),
    Limit("gather_chunks_bwd_kernel<.*, false>", 80),
    Limit("select_chunks_kernel<.*>", 32),
]
