# SPDX-License-Identifier: Apache-2.0
"""From documents to pages: checks and cuts texts, and compresses the pieces in batches."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from lychee.bank.pages import PAGE_TOKENS, PagePool
from lychee.chunking import cut_chunks
from lychee.config import MemoryConfig
from lychee.errors import InputError

if TYPE_CHECKING:
    from lychee.memory_model import LycheeMemory

# Raw tokens compressed in one batch of chunks: enough rows for the matrix products to run at full
# rate, few enough that peak memory stays flat.
BATCH_TOKENS = 4096
LONGEST_NAME = 4096
# What stands behind a chunk's text as its margin, over and over.
BLANK = "\n\n"


@dataclass(frozen=True)
class Document:
    """A text that a bank remembers; within a bank its name is its identity."""

    name: str
    text: str

    @property
    def characters(self) -> int:
        return len(self.text)

    @property
    def sha256(self) -> str:
        """Of the text's UTF-8 bytes: tells whether a document has changed."""
        return hashlib.sha256(self.text.encode()).hexdigest()


class Piece(NamedTuple):
    """Tokens of one chunk, and the characters of the document that they came from."""

    ids: array[int]
    start: int
    stop: int


def check_document(document: Document) -> None:
    """Raise InputError for a document that no bank can hold."""
    if not (hasattr(document, "name") and hasattr(document, "text")):
        raise InputError(
            f"documents: expected Document, got {type(document).__name__}",
            "read paths with lychee.documents.read_documents",
        )
    if not 0 < len(document.name) <= LONGEST_NAME:
        raise InputError(
            f"document name: expected 1 to {LONGEST_NAME} characters, got {len(document.name)}"
        )
    if not document.text.strip():
        raise InputError(f"{document.name}: expected text, got an empty document")
    try:
        document.text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{document.name}: expected Unicode text, got half a character at {error.start}"
        ) from error


def check_documents(documents: Iterable[Document]) -> Iterable[Document]:
    """Pass documents on, each checked and with a name of its own; a sequence is checked at once."""

    def check_each() -> Iterable[Document]:
        names = set()
        for document in documents:
            check_document(document)
            if document.name in names:
                raise InputError(
                    f"documents: expected names that differ, got {document.name} twice"
                )
            names.add(document.name)
            yield document

    return list(check_each()) if isinstance(documents, Sequence) else check_each()


def cut_document(model: LycheeMemory, document: Document) -> list[Piece]:
    """The pieces that a document's chunks are made of."""
    ids, spans = model.tokenizer.encode_with_offsets(document.text)
    if not ids:
        raise InputError(f"{document.name}: expected text, got nothing to read")
    ends = model.tokenizer.sentence_ends if model.memory.cut == "sentence" else None
    return [
        Piece(ids[start:stop], spans[start][0], spans[stop - 1][1])
        for start, stop in cut_chunks(ids, model.memory.text, ends)
    ]


def memory_tokens_of(tokens: int, memory: MemoryConfig) -> int:
    """Memory tokens of a chunk of `tokens` raw tokens and the margin behind them: a last,
    incomplete group has one too."""
    return -(-(tokens + memory.margin) // memory.ratio) if tokens else 0


def pages_of_chunk(tokens: int, memory: MemoryConfig) -> int:
    """Pages that one chunk of `tokens` raw tokens takes."""
    return -(-memory_tokens_of(tokens, memory) // PAGE_TOKENS)


def pages_of(tokens: int, memory: MemoryConfig) -> int:
    """Pages that a text of `tokens` raw tokens takes, cut into full chunks."""
    whole, rest = divmod(tokens, memory.text)
    return whole * pages_of_chunk(memory.text, memory) + pages_of_chunk(rest, memory)


def margin_of(model: LycheeMemory) -> list[int]:
    """The tokens behind each chunk's text."""
    if not (count := model.memory.margin):
        return []
    blank = model.tokenizer.encode(BLANK)
    return (blank * count)[:count]


@torch.inference_mode()
def compress(
    model: LycheeMemory,
    pieces: Sequence[Piece],
    pool: PagePool,
    pages: Sequence[Sequence[int]],
    on_batch: Callable[[int], None],
) -> None:
    """Compress pieces into their pages, in batches of similar length with little padding.

    Args:
        pieces: one per chunk.
        pool: where the pages are; may be in the CPU's memory though the model is not.
        pages: of each piece, all zero.
        on_batch: called with the raw tokens of each batch that is done.
    """
    order = sorted(range(len(pieces)), key=lambda index: -len(pieces[index].ids))
    size = max(1, BATCH_TOKENS // model.memory.chunk)
    device, margin = model.decoder.device, margin_of(model)
    for first in range(0, len(order), size):
        batch = order[first : first + size]
        width = memory_tokens_of(len(pieces[batch[0]].ids), model.memory) * model.memory.ratio
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        lengths = torch.tensor([len(pieces[index].ids) + len(margin) for index in batch])
        for row, index in enumerate(batch):
            ids[row, : lengths[row]] = torch.tensor(pieces[index].ids.tolist() + margin)
        mask = torch.arange(width)[None] < lengths[:, None]
        targets = [pages[index] for index in batch]
        target = pool if pool.device == device else PagePool(pool.layout, device)
        rows = targets if target is pool else [target.allocate(len(row)) for row in targets]
        model.compressor.run(
            ids.to(device),
            target.sink(rows),
            ratio=model.memory.ratio,
            window=model.memory.window,
            mask=None if bool(mask.all()) else mask.to(device),
        )
        if target is not pool:
            pool.write([page for row in targets for page in row], target)
        on_batch(int(lengths.sum()) - len(batch) * len(margin))
