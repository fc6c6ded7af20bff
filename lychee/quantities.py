# SPDX-License-Identifier: Apache-2.0
"""Numbers as people read them."""

from __future__ import annotations

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def as_size(size: float) -> str:
    """Bytes in the largest unit that leaves at least one before the point: 1536 is "1.5 KiB"."""
    index = 0
    while size >= 1024 and index < len(UNITS) - 1:
        size /= 1024
        index += 1
    return f"{size:,.{0 if index == 0 or size >= 100 else 1}f} {UNITS[index]}"


def counted(count: int, thing: str) -> str:
    """A count and what it counts: "1 chunk", "2,000 chunks"."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def as_duration(seconds: float) -> str:
    """Seconds in the units that matter: "4.2 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
