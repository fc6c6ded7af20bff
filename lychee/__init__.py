# SPDX-License-Identifier: Apache-2.0
"""LycheeMemory: ask questions about texts far longer than a model's window."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lychee.bank import MemoryBank
    from lychee.errors import LycheeError
    from lychee.generate import Sampling
    from lychee.memory_model import LycheeMemory
    from lychee.reading import ReadingOptions
    from lychee.trace import Answer, Source, Step, Usage

__all__ = [
    "Answer",
    "LycheeError",
    "LycheeMemory",
    "MemoryBank",
    "ReadingOptions",
    "Sampling",
    "Source",
    "Step",
    "Usage",
]

HOMES = {
    "LycheeError": "errors",
    "LycheeMemory": "memory_model",
    "MemoryBank": "bank",
    "ReadingOptions": "reading",
    "Sampling": "generate",
}


def __getattr__(name: str):
    """Import a public name on first use: torch takes seconds, and the command's help needs none."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"lychee.{HOMES.get(name, 'trace')}"), name)
