# SPDX-License-Identifier: Apache-2.0
"""Memory that was freed, given back to the system before much is asked for again.

The C library keeps freed blocks of up to 32 MiB for later ones of their size, so a process that
compresses, gates and reads in turn would hold what each of them needs at the same time.
"""

from __future__ import annotations

import ctypes
from functools import cache

# Bytes; what is smaller is worth less than the millisecond or two that giving back takes.
LEAST = 16 << 20


def return_freed_memory(before: int = LEAST) -> None:
    """Give freed memory back, where the C library can, if `before` bytes or more will be filled."""
    trim = malloc_trim()
    if before >= LEAST and trim is not None:
        trim(0)


@cache
def malloc_trim():
    """glibc's; None where there is another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
