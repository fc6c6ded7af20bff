# SPDX-License-Identifier: Apache-2.0
"""What every task gives: a text, a question, its answers, and where in the text they stand."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

SPLITS = ("train", "validation", "test")

Span = tuple[int, int]


@dataclass(frozen=True)
class TaskSample:
    """One question about one text.

    Attributes:
        task: name of the task, as `lychee eval` takes it.
        context: the text; the question is not part of it.
        question: what is asked.
        answers: what the metric compares with: all strings expected, or the accepted references.
        support: [start, stop) characters of `context` of every supporting statement; in the order
            of the hops where there is one. Empty where unknown.
        metric: name of a metric of `lychee.eval.metrics`.
        details: difficulty, place in a file, answer prefix: plain values for JSON.
    """

    task: str
    context: str
    question: str
    answers: tuple[str, ...]
    support: tuple[Span, ...] = ()
    metric: str = "exact_match"
    details: dict[str, Any] = field(default_factory=dict)

    def supporting_chunks(self, chunks: Sequence[Span]) -> list[list[int]]:
        """Per supporting statement, the indices of the chunks (character spans) it touches."""
        return [
            [index for index, (first, last) in enumerate(chunks) if first < stop and start < last]
            for start, stop in self.support
        ]


def tokens_of(span: Span, offsets: Iterable[Span]) -> Span | None:
    """The tokens [first, last + 1) that a span of characters touches; None if it touches none.

    `offsets` are the characters that each token came from.
    """
    start, stop = span
    touched = [index for index, (a, b) in enumerate(offsets) if a < stop and start < b]
    return (touched[0], touched[-1] + 1) if touched else None


def split_of(name: str) -> str:
    """The split a name, value or piece of text belongs to: always the same, by its hash."""
    place = zlib.crc32(name.encode("utf-8", "surrogatepass")) % 10
    return {0: "validation", 1: "test"}.get(place, "train")


def of_split(names: Iterable[str], split: str | None) -> list[str]:
    """The names that belong to a split, in their order; all of them for None."""
    if split is not None and split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    return [name for name in names if split is None or split_of(name) == split]
