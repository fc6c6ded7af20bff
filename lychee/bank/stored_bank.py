# SPDX-License-Identifier: Apache-2.0
"""A bank on disk, open for reading and asking; changes go to the disk first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lychee.bank.build import BankBuilder
from lychee.bank.build_progress import BuildReport
from lychee.bank.compaction import compact
from lychee.bank.folder import BankWriter, is_bank, read_state
from lychee.bank.identity import ModelIdentity, check_match
from lychee.bank.manifest import VERSION, ChunkRecord, DocumentRecord
from lychee.bank.memory_bank import Chunk, MemoryBank, OnProgress, check_known
from lychee.bank.pages import check_tier, tier_device
from lychee.bank.pieces import Document, memory_tokens_of, pages_of_chunk
from lychee.bank.segments import ADVICE, Segment, SegmentPages
from lychee.bank.verify import verify_bank
from lychee.errors import BankError

if TYPE_CHECKING:
    from lychee.memory_model import LycheeMemory


class StoredDocument:
    """A document of a bank on disk; its text is read when it is first asked for."""

    def __init__(self, record: DocumentRecord, segment: Segment):
        self.name, self.characters, self.sha256 = record.name, record.characters, record.sha256
        self.place, self.segment = record.text, segment

    @cached_property
    def text(self) -> str:
        return self.segment.read_text(self.place, self.name)


class StoredBank(MemoryBank):
    """What MemoryBank.open returns: the state that the bank's folder had when it was read."""

    def __init__(self, path: Path, model: LycheeMemory | None, tier: str):
        check_tier(tier)
        self.path, self.model, self.tier = path, model, tier
        self.read_before = 0
        self.refresh()

    def refresh(self) -> None:
        """Read the folder's present state, with what other writers have committed."""
        manifest, segments = read_state(self.path)
        reader = torch.device("cpu")
        if self.model is not None:
            check_match(self.path, manifest.memory, manifest.model, self.model)
            reader = self.model.decoder.device
        pages = SegmentPages(manifest.layout, segments, reader)
        first_page, by_name = pages.first_page, {s.record.sha256: s for s in segments}
        if self.model is not None and self.tier in ("gpu", "cpu"):
            pages = pages.loaded(tier_device(self.tier, reader))
        pages.bytes_read = self.bytes_read if hasattr(self, "pages") else 0
        self.manifest, self.memory, self.pages = manifest, manifest.memory, pages
        self.documents = [
            StoredDocument(record, by_name[record.text.segment]) for record in manifest.documents
        ]
        self.chunks = [
            self._chunk(index, chunk, first_page[chunk.segment])
            for index, record in enumerate(manifest.documents)
            for chunk in record.chunks
        ]

    def _chunk(self, document: int, record: ChunkRecord, first_page: int) -> Chunk:
        start, stop, tokens, _, page = record
        memory_tokens = memory_tokens_of(tokens, self.memory)
        first = first_page + page
        pages = range(first, first + pages_of_chunk(tokens, self.memory))
        return Chunk(document, start, stop, tokens, memory_tokens, pages)

    @property
    def identity(self) -> ModelIdentity:
        return self.manifest.model

    def attach(self, model: LycheeMemory) -> StoredBank:
        """Let `model` ask this bank and add to it; BankMismatchError if it cannot."""
        check_match(self.path, self.memory, self.identity, model)
        self.model = model
        self.refresh()
        return self

    def add(self, documents: Iterable[Document], progress: OnProgress | None = None) -> BuildReport:
        """Remember more documents, on the disk; see BankBuilder.add."""
        if self.model is None:
            raise BankError(f"{self.path}: expected a model to compress with, got none")
        self._expect_bank()
        try:
            with BankBuilder(self.model, self.path, resume=True) as builder:
                return builder.add(documents, progress)
        finally:
            self.refresh()

    def remove(self, names: Iterable[str]) -> None:
        """Forget documents, on the disk: no byte of theirs stays in the folder.

        Raises:
            InputError: the bank lacks one of them; nothing is forgotten then.
            BankLockedError: another process is writing the bank.
        """
        self._expect_bank()
        with BankWriter(self.path) as writer:
            manifest = writer.manifest
            known = {record.name for record in manifest.records()}
            gone = set(check_known(names, known))
            kept = tuple(record for record in manifest.documents if record.name not in gone)
            rest = manifest.unfinished
            rest = None if rest is not None and rest.name in gone else rest
            changed = replace(manifest, documents=kept, unfinished=rest)
            writer.commit(compact(writer, changed))
        self.refresh()

    def _expect_bank(self) -> None:
        if not is_bank(self.path):
            raise BankError(f"{self.path}: expected the bank that was opened, got none")

    def verify(self) -> None:
        """Raise BankError if anything on the disk is not as it was written; see verify_bank."""
        problems = verify_bank(self.path)
        if problems:
            others = f" (and {len(problems) - 1} more)" if problems[1:] else ""
            raise BankError(problems[0] + others, ADVICE)

    def describe(self) -> dict[str, Any]:
        manifest = self.manifest
        rest = manifest.unfinished
        return super().describe() | {
            "format_version": VERSION,
            "created_by": manifest.created_by,
            "segments": len(manifest.segments),
            "file_bytes": sum(segment.size for segment in manifest.segments.values()),
            "unfinished": None if rest is None else rest.name,
        }
