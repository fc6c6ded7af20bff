# SPDX-License-Identifier: Apache-2.0
"""What was read and what it led to: steps, sources, costs and the answer itself."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Step:
    """One chunk gated or read for one question, and the working memory after it.

    Attributes:
        score: the gate's probability, None where it was not asked.
        read: False where the gate passed the chunk over.
        round: pass over the bank, from 0.
        new_tokens: decoded for it; notes that were found to stay as they are cost none.
        turn: number of the question's reading turn that read it; of the chunks read in one turn,
            the last one has the notes after it.
        seconds: from the start of reading until the chunk was settled.
    """

    chunk: int
    document: str
    start: int  # characters of the document
    stop: int
    memory: str
    changed: bool
    score: float | None = None
    read: bool = True
    round: int = 0
    new_tokens: int = 0
    turn: int | None = None
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Source:
    """A piece of text that was read, or without a gate one that told something.

    `changed`: whether reading it brought into the notes what is still there at the end.
    """

    document: str
    start: int
    stop: int
    quote: str
    chunk: int | None = None
    score: float | None = None
    changed: bool = True


@dataclass(frozen=True)
class Usage:
    """Costs of one answer. Times and bytes are shared by questions asked together.

    Attributes:
        chunks_read: different chunks that were read.
        read_seconds: of gating and reading.
        chunks_gated: verdicts of the gate, those asked again after the notes changed included.
        reads: chunks read, counted again in every pass.
        new_tokens: decoded for notes and answer.
        gate_seconds: part of `read_seconds`.
        threshold: of the gate, None without one.
        bytes_read: pages brought from the CPU's memory or a disk.
        peak_bytes: memory, of these questions on a GPU, of the process so far on a CPU.
    """

    text_tokens: int
    memory_tokens: int
    memory_bytes: int
    chunks: int
    chunks_read: int
    read_seconds: float
    answer_seconds: float
    chunks_gated: int = 0
    reads: int = 0
    new_tokens: int = 0
    gate_seconds: float = 0.0
    threshold: float | None = None
    bytes_read: int = 0
    peak_bytes: int = 0


@dataclass(frozen=True)
class Answer:
    """What `LycheeMemory.ask` returns; `str(answer)` is the text."""

    question: str
    text: str
    sources: list[Source]
    trace: list[Step] = field(repr=False)
    usage: Usage

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def tells(before: str, after: str, known: str, final: str) -> bool:
    """Whether a change of the notes brought a word that neither they nor `known` had, and that is
    still in the final notes."""
    new = words(after) - words(before) - words(known)
    return bool(new & words(final))


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
