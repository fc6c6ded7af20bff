# SPDX-License-Identifier: Apache-2.0
"""What each CUDA kernel may cost and must contain, for sm_80 and sm_90a alike: one table.

A number here is a promise, not a record: raise one only with a measurement that says why.
"""

import dataclasses

# 16-byte accesses, asynchronous copies, matrix loads and tensor-core products, as SASS spells them.
LOAD_16, STORE_16 = r"LDG\.E\.128|LDG\.E\..*\.128", r"STG\.E\.128|STG\.E\..*\.128"
COPY_16 = r"LDGSTS\.E\.BYPASS\..*\.128"
MATRIX, TRANSPOSED, PRODUCT = r"LDSM\.16\.M88\.4", r"LDSM\.16\.MT88\.4", r"HMMA\.16816\.F32"
ATTENTION = (COPY_16, MATRIX, TRANSPOSED, PRODUCT)


@dataclasses.dataclass(frozen=True)
class Limit:
    """One row for all kernels whose name, with template arguments, matches.

    kernel: regular expression over the whole name, such as "gather_kernel<int8_t.*>".
    registers: most per thread. has: opcodes, as regular expressions, that must each occur.
    loop: most instructions in the loop around the tensor-core products, per page or tile.
    """

    kernel: str
    registers: int
    has: tuple[str, ...] = ()
    loop: int | None = None


LIMITS = [
    Limit("compress_pack_kernel<.*>", registers=96, has=(LOAD_16, STORE_16)),
    Limit("write_memory_kernel<.*>", registers=64, has=(LOAD_16,)),
    Limit("compress_pack_bwd_kernel<.*>", registers=64, has=(LOAD_16, STORE_16)),
]
