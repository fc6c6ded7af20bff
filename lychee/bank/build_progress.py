# SPDX-License-Identifier: Apache-2.0
"""How far a build is, how fast it goes, and what it did."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lychee.bank.pieces import Document


class BuildProgress(NamedTuple):
    """How far a build is; documents that were there already count as done."""

    documents: int
    documents_total: int | None
    tokens: int
    tokens_total: int  # an estimate while texts are left that no tokenizer has seen
    tokens_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class BuildReport:
    """What a build did."""

    added: tuple[str, ...]
    replaced: tuple[str, ...]
    skipped: tuple[str, ...]
    tokens: int
    seconds: float
    write_seconds: float


class Clock:
    """Counts what is done and estimates what is left."""

    def __init__(
        self, documents: Iterable[Document], progress: Callable[[BuildProgress], None] | None
    ):
        known = isinstance(documents, Sequence)
        self.documents, self.documents_total = 0, len(documents) if known else None
        self.unseen = sum(len(document.text) for document in documents) if known else 0
        self.seen = self.cut = self.tokens = self.compressed = 0
        self.started = time.perf_counter()
        self.progress = progress or (lambda _: None)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def see(self, document: Document, tokens: int, done: int) -> None:
        """A document was cut into `tokens` tokens, of which `done` are compressed already."""
        self.unseen = max(0, self.unseen - len(document.text))
        self.seen += len(document.text)
        self.cut += tokens
        self.tokens += done
        self.documents += done == tokens
        self.report()

    def batch(self, tokens: int) -> None:
        self.tokens += tokens
        self.compressed += tokens
        self.report()

    def complete(self, documents: int) -> None:
        self.documents += documents
        self.report()

    def report(self) -> None:
        total = self.cut + self.unseen * self.cut // max(1, self.seen)
        rate = self.compressed / max(1e-9, self.seconds)
        left = (total - self.tokens) / rate if rate else float("inf")
        self.progress(
            BuildProgress(self.documents, self.documents_total, self.tokens, total, rate, left)
        )
