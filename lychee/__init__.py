# SPDX-License-Identifier: Apache-2.0
"""LycheeMemory: ask questions about texts far longer than a model's window."""

from lychee.bank import MemoryBank
from lychee.errors import LycheeError
from lychee.generate import Sampling
from lychee.memory_model import LycheeMemory
from lychee.trace import Answer, Source, Step, Usage

__all__ = [
    "Answer",
    "LycheeError",
    "LycheeMemory",
    "MemoryBank",
    "Sampling",
    "Source",
    "Step",
    "Usage",
]
