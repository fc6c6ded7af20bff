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
# At 4.3 TB/s, a multiprocessor of an H200 has 1765 cycles for a page of one head in bf16 and 910 to
# 1030 in int8; each of its schedulers issues the instructions of one warp meanwhile.
LIMITS = [
    decode(FLOAT, 64, "false", 128, (370, 370)),
    decode(FLOAT, 64, "true", 168, (700, 700)),
    decode(FLOAT, 128, "false", 168, (490, 490)),
    decode("BFloat16, BFloat16", 128, "true", 255, (1050, 1050)),
    decode("Float16, Float16", 128, "true", 255, (810, 810)),
    decode(INT8, 64, "false", 128, (480, 480)),
    decode(INT8, 64, "true", 168, (730, 730)),
    decode(INT8, 128, "false", 168, (650, 650)),
    decode(INT8, 128, "true", 255, (1000, 1000)),
    # sm_80 has no instruction that converts e4m3
    decode(FLOAT8, 64, "false", 128, (720, 430)),
    decode(FLOAT8, 64, "true", 168, (890, 680)),
    decode(FLOAT8, 128, "false", 168, (1130, 560)),
    decode(FLOAT8, 128, "true", 255, (1460, 910)),
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
