# SPDX-License-Identifier: Apache-2.0
"""Writes a whole bank, wherever its pages are, to a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lychee.bank.folder import BankWriter
from lychee.bank.manifest import ChunkRecord, DocumentRecord, Manifest, SegmentRecord, TextPlace
from lychee.errors import BankError
from lychee_kernels import __version__

if TYPE_CHECKING:
    from lychee.bank.memory_bank import MemoryBank

SEGMENT_BYTES = 64 << 20
CREATED_BY = f"lychee-memory {__version__}"


def save_bank(bank: MemoryBank, path: Path, overwrite: bool) -> None:
    """See MemoryBank.save."""
    with BankWriter(path) as writer:
        if writer.manifest is not None and not overwrite:
            raise BankError(
                f"{path}: expected no bank yet, got one",
                "name another folder, or save with overwrite=True",
            )
        texts: dict[int, TextPlace] = {}
        chunks: dict[int, list[ChunkRecord]] = {}
        segments: dict[str, SegmentRecord] = {}
        for group in groups_of_chunks(bank):
            segment = write_group(bank, writer, group, texts, chunks)
            segments[segment.sha256] = segment
        documents = tuple(
            DocumentRecord(d.name, d.sha256, d.characters, texts[index], tuple(chunks[index]))
            for index, d in enumerate(bank.documents)
        )
        layout = bank.pages.layout
        writer.commit(Manifest(bank.identity, bank.memory, layout, CREATED_BY, segments, documents))


def groups_of_chunks(bank: MemoryBank) -> Iterator[list[int]]:
    """Chunks in order, as many together as fill a segment."""
    group, size = [], 0
    for index, chunk in enumerate(bank.chunks):
        group.append(index)
        size += len(chunk.pages) * bank.pages.layout.page_bytes
        if size >= SEGMENT_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def write_group(
    bank: MemoryBank,
    writer: BankWriter,
    group: list[int],
    texts: dict[int, TextPlace],
    chunks: dict[int, list[ChunkRecord]],
) -> SegmentRecord:
    """One segment of a group of chunks and of the texts that begin in it; notes their places."""
    pages, text, starts = [], bytearray(), {}
    for index in group:
        chunk = bank.chunks[index]
        if chunk.document not in texts and chunk.document not in starts:
            encoded = bank.documents[chunk.document].text.encode()
            starts[chunk.document] = (len(text), len(encoded))
            text += encoded
        pages += chunk.pages
    data = bank.pages.bytes_of(pages, torch.device("cpu"))
    segment = writer.write_segment(bank.pages.layout, *data, bytes(text))
    texts |= {document: TextPlace(segment.sha256, *place) for document, place in starts.items()}
    page = 0
    for index in group:
        chunk = bank.chunks[index]
        record = ChunkRecord(chunk.start, chunk.stop, chunk.tokens, segment.sha256, page)
        chunks.setdefault(chunk.document, []).append(record)
        page += len(chunk.pages)
    return segment
