# SPDX-License-Identifier: Apache-2.0
"""What was read and what it led to: steps, sources, costs and the answer itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Step:
    """One chunk read for one question, and the working memory after it."""

    chunk: int
    document: str
    start: int  # characters of the document
    stop: int
    memory: str
    changed: bool


@dataclass(frozen=True)
class Source:
    """A piece of text whose reading changed the working memory."""

    document: str
    start: int
    stop: int
    quote: str


@dataclass(frozen=True)
class Usage:
    """Costs of one answer. Reading time is shared by questions asked together."""

    text_tokens: int
    memory_tokens: int
    memory_bytes: int
    chunks: int
    chunks_read: int
    read_seconds: float
    answer_seconds: float


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
