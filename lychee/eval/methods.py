# SPDX-License-Identifier: Apache-2.0
"""The methods that an evaluation compares, by name, and what one answer of theirs costs."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from lychee.allocator import return_freed_memory
from lychee.bank import MemoryBank
from lychee.errors import InputError
from lychee.memory_model import LycheeMemory
from lychee.reading import ReadingOptions
from lychee.trace import Answer

OURS = "ours"
# name: (module, class); a method is known where its module is.
METHODS = {
    OURS: ("lychee.eval.methods", "Ours"),
    "memagent": ("lychee.baselines.memagent", "MemAgent"),
    "full_context": ("lychee.baselines.full_context", "FullContext"),
}
# Methods whose answer is given from notes.
KEEPING_NOTES = (OURS, "memagent")
STATUS, RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Method(Protocol):
    """Answers questions about a text.

    Attributes:
        build_seconds: what the last text took before any question.
        at_hand: whether it had been read before the last call, which then took none of them.
    """

    build_seconds: float
    at_hand: bool

    def answer(self, context: str, questions: Sequence[str]) -> list[Answer]: ...


class LastBank:
    """The bank of the last text, with its key and the seconds it took."""

    def __init__(self) -> None:
        self.key: tuple[str, str] | None = None
        self.bank: MemoryBank | None = None
        self.seconds = 0.0

    def of(self, model: LycheeMemory, context: str, dtype: str) -> bool:
        """Make it the bank of a text at the model's ratio; whether it was that before."""
        if self.key == (context, dtype):
            return True
        # Two banks of long texts may not fit.
        self.key = self.bank = None
        started = time.perf_counter()
        self.bank = model.remember(context, bank_dtype=dtype)
        if model.decoder.device.type == "cuda":
            torch.cuda.synchronize()  # or its last kernels would count as asking
        self.key, self.seconds = (context, dtype), time.perf_counter() - started
        return False


class Ours:
    """Compress the text into a bank, then ask the bank."""

    def __init__(
        self,
        model: LycheeMemory,
        *,
        bank_dtype: str = "auto",
        gate: str = "auto",
        passes: int | None = None,
        together: int | None = None,
        banks: LastBank | None = None,
    ):
        """`gate`: auto is the model's own, off reads every chunk, a number is the threshold;
        `banks`: shared with others of the same model and ratio; see `ReadingOptions` for the
        others.
        """
        self.model, self.bank_dtype = model, bank_dtype
        threshold = None if gate in ("auto", "off") else float(gate)
        self.reading = ReadingOptions(gate != "off", threshold, passes, together)
        self.banks, self.at_hand = banks or LastBank(), False

    @property
    def build_seconds(self) -> float:
        return self.banks.seconds

    def answer(self, context: str, questions: Sequence[str]) -> list[Answer]:
        for question in questions:
            self.model.encode_question(question)
        self.at_hand = self.banks.of(self.model, context, self.bank_dtype)
        return self.model.ask_many(self.banks.bank, questions, reading=self.reading)


def known_methods() -> list[str]:
    """Names of the methods whose modules are installed."""
    return [name for name, (module, _) in METHODS.items() if exists(module)]


def exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def check_methods(names: Sequence[str]) -> None:
    """InputError for a name that no method has."""
    for name in names:
        if name not in (known := known_methods()):
            raise InputError(f"method: expected one of {', '.join(known)}, got {name!r}")


def make_method(name: str, model: LycheeMemory, **options: Any) -> Method:
    """The method of that name over a model; `options` are those of its class."""
    check_methods([name])
    module, attribute = METHODS[name]
    return getattr(importlib.import_module(module), attribute)(model, **options)


class PeakMemory:
    """Context manager: `bytes` is the most memory in use above what was in use before.

    Allocated bytes on a GPU; resident bytes of this process on Linux, where freed blocks that the
    allocator kept count as in use before; None elsewhere.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before: int | None = torch.cuda.memory_allocated(self.device)
        else:
            return_freed_memory()
            self.before = resident_bytes("VmRSS") if reset_peak() else None
        return self

    def __exit__(self, *_) -> None:
        if self.before is None:
            return
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else resident_bytes("VmHWM")
        self.bytes = max(0, peak - self.before)


def reset_peak() -> bool:
    """Let the kernel measure the peak anew; False where it cannot."""
    try:
        RESET_PEAK.write_text("5")
    except OSError:
        return False
    return True


def resident_bytes(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"{STATUS}: expected {field}, got none")
