# SPDX-License-Identifier: Apache-2.0
"""Memory given back to the system: what was freed, and mapped files that can be read again.

The C library keeps freed blocks of up to 32 MiB for later ones of their size, so a process that
compresses, gates and reads in turn would hold what each of them needs at the same time.
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache

from torch import Tensor

# Bytes; what is smaller is worth less than the millisecond or two that giving back takes.
LEAST = 16 << 20


def return_freed_memory(before: int = LEAST) -> None:
    """Give freed memory back, where the C library can, if `before` bytes or more will be filled."""
    trim = c_function("malloc_trim")
    if before >= LEAST and trim is not None:
        trim(0)


def release_mapped(data: Tensor) -> None:
    """Let the system take the memory behind a part of a mapped file that nobody has written to."""
    advise = c_function("madvise")
    if not data.numel() or advise is None or not hasattr(mmap, "MADV_DONTNEED"):
        return
    page = mmap.PAGESIZE
    start = data.data_ptr() // page * page
    size = data.data_ptr() + data.nbytes - start
    advise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


@cache
def c_function(name: str):
    """One of the C library's; None where it has none of that name, as malloc_trim outside glibc."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
