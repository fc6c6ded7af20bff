# SPDX-License-Identifier: Apache-2.0
"""The memory bank: documents, their chunks, and the pages that hold the chunks' memory."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lychee.bank.build_progress import BuildProgress, BuildReport, Clock
from lychee.bank.identity import ModelIdentity, check_match
from lychee.bank.pages import (
    PageLayout,
    PagePool,
    PageStore,
    PageTable,
    check_tier,
    tier_device,
)
from lychee.bank.pieces import (
    Document,
    check_documents,
    compress,
    cut_document,
    memory_tokens_of,
    pages_of_chunk,
)
from lychee.bank.save import save_bank
from lychee.bank.tables import group_rows, make_table
from lychee.config import MemoryConfig
from lychee.errors import InputError

if TYPE_CHECKING:
    from lychee.memory_model import LycheeMemory

OnProgress = Callable[[BuildProgress], None]


class Chunk(NamedTuple):
    """A piece of a document and the pages that hold its memory."""

    document: int
    start: int  # characters
    stop: int
    tokens: int
    memory_tokens: int
    pages: Sequence[int]


class MemoryBank:
    """Compressed memory of any number of documents, independent of any question.

    Attributes:
        documents: each with a name, which is its own in this bank, and its text.
        chunks: in reading order.
        memory: the ratio, window and chunk that it was made with.
        model: the model that adds documents and reads, or None.
        path: the bank's folder, or None for one in memory.
        pages: the pages and where they are.
    """

    path: Path | None = None

    def __init__(self, model: LycheeMemory, bank_dtype: str = "auto", tier: str = "auto"):
        """An empty bank in memory.

        Args:
            model: compresses documents and reads them.
            bank_dtype: float32, float16, bfloat16, int8 or e4m3; "auto" is the model's.
            tier: "auto" keeps pages where the model is; "cpu" in the CPU's memory.
        """
        device = model.decoder.device
        layout = PageLayout.of(
            model.decoder.config, model.decoder.dtype if bank_dtype == "auto" else bank_dtype
        )
        check_tier(tier)
        home = device if tier == "auto" else tier_device(tier, device)
        self.model: LycheeMemory | None = model
        self.memory: MemoryConfig = model.memory
        self.documents: list[Document] = []
        self.chunks: list[Chunk] = []
        self.pages: PageStore = PagePool(layout, home, device)

    @staticmethod
    def open(
        path: str | Path, *, model: LycheeMemory | None = None, tier: str = "auto"
    ) -> MemoryBank:
        """A bank on disk; nothing is read but its manifest until pages or texts are asked for.

        Args:
            path: the bank's folder.
            model: what will ask; None if nothing will, as for a list of the documents.
            tier: "disk", also "auto", brings pages from the files as they are needed; "cpu" and
                "gpu" read all pages into that memory now.

        Raises:
            BankError: there is no bank, or it is damaged or of another format.
            BankMismatchError: it is of another model or geometry.
        """
        from lychee.bank.stored_bank import StoredBank

        return StoredBank(Path(path), model, tier)

    def __len__(self) -> int:
        return len(self.chunks)

    @property
    def tokens(self) -> int:
        """Raw tokens remembered."""
        return sum(chunk.tokens for chunk in self.chunks)

    @property
    def memory_tokens(self) -> int:
        return sum(chunk.memory_tokens for chunk in self.chunks)

    @property
    def dtype(self) -> str:
        """Of the pages: float32, float16, bfloat16, int8 or e4m3."""
        return self.pages.layout.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use."""
        return sum(len(chunk.pages) for chunk in self.chunks) * self.pages.layout.page_bytes

    @property
    def bytes_read(self) -> int:
        """Bytes of pages brought to the reader from disk or the CPU's memory so far."""
        return self.pages.bytes_read

    @property
    def identity(self) -> ModelIdentity:
        """The model that made it."""
        return self.model.identity

    def text(self, chunk: int) -> str:
        """The text that a chunk was made from."""
        piece = self.chunks[chunk]
        return self.documents[piece.document].text[piece.start : piece.stop]

    def check_model(self, model: LycheeMemory) -> None:
        """Raise BankMismatchError unless `model` can read this bank."""
        same = self.model is not None and self.model.decoder is model.decoder
        identity = model.identity if same else self.identity
        check_match(self.path or "bank", self.memory, identity, model)

    def page_table(self, rows: Sequence[Sequence[int]], *, in_place: bool = False) -> PageTable:
        """The table of a batch whose row b reads the chunks rows[b], in that order.

        Their memory tokens have consecutive positions, or with `in_place` each chunk's those that
        it has where it is read alone. The table holds its pages for as long as it lives, whatever
        is asked for later; only removing or replacing documents of a bank in memory gives their
        pages to others.
        """
        chunks = [[self.chunks[index] for index in row] for row in rows]
        return make_table(self.pages, chunks, in_place)

    def chunk_tables(self, chunks: Sequence[int]) -> Iterator[tuple[list[int], PageTable]]:
        """Tables that together hold one row per chunk, each with the places of its rows.

        They are split so that pages on disk are read where they lie, not copied, where possible.
        """
        for places in group_rows(self.pages, [self.chunks[index] for index in chunks]):
            yield places, self.page_table([[chunks[place]] for place in places])

    def add(self, documents: Iterable[Document], progress: OnProgress | None = None) -> BuildReport:
        """Remember more documents; one whose name is there is replaced, or skipped if it is equal.

        Raises:
            InputError: a document without text or name, or two of one name; nothing is added.
        """
        documents = list(check_documents(documents))
        clock = Clock(documents, progress)
        present = {document.name: document for document in self.documents}
        equal = {d.name for d in documents if d.name in present and present[d.name] == d}
        fresh = [document for document in documents if document.name not in equal]
        cut = [cut_document(self.model, document) for document in fresh]
        tokens = [sum(len(piece.ids) for piece in pieces) for pieces in cut]
        for document, count in zip(fresh, tokens, strict=True):
            clock.see(document, count, 0)
        pool, memory = self.pages, self.memory
        pieces = [piece for pieces in cut for piece in pieces]
        counts = [pages_of_chunk(len(piece.ids), memory) for piece in pieces]
        pool.reserve(sum(counts))
        pages = [pool.allocate(count) for count in counts]
        try:
            compress(self.model, pieces, pool, pages, clock.batch)
        except BaseException:
            pool.release([page for taken in pages for page in taken])
            raise
        chunks = iter(
            Chunk(0, p.start, p.stop, len(p.ids), memory_tokens_of(len(p.ids), memory), taken)
            for p, taken in zip(pieces, pages, strict=True)
        )
        new = {
            document.name: (document, [next(chunks) for _ in pieces])
            for document, pieces in zip(fresh, cut, strict=True)
        }
        self._release([name for name in new if name in present])
        self._arrange(self._entries() | new)
        return BuildReport(
            added=tuple(name for name in new if name not in present),
            replaced=tuple(name for name in new if name in present),
            skipped=tuple(document.name for document in documents if document.name in equal),
            tokens=sum(tokens),
            seconds=clock.seconds,
            write_seconds=0.0,
        )

    def remove(self, names: Iterable[str]) -> None:
        """Forget documents; InputError, and nothing forgotten, if the bank lacks one of them."""
        names = check_known(names, [document.name for document in self.documents])
        self._release(names)
        self._arrange({k: entry for k, entry in self._entries().items() if k not in names})

    def _entries(self) -> dict[str, tuple[Document, list[Chunk]]]:
        entries = {document.name: (document, []) for document in self.documents}
        for chunk in self.chunks:
            entries[self.documents[chunk.document].name][1].append(chunk)
        return entries

    def _arrange(self, entries: dict[str, tuple[Document, list[Chunk]]]) -> None:
        self.documents = [document for document, _ in entries.values()]
        self.chunks = [
            chunk._replace(document=index)
            for index, (_, chunks) in enumerate(entries.values())
            for chunk in chunks
        ]

    def _release(self, names: Sequence[str]) -> None:
        entries = self._entries()
        for name in names:
            self.pages.release([page for chunk in entries[name][1] for page in chunk.pages])

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the bank to a folder, which holds all of it or what was there before.

        Args:
            path: a folder that does not exist, is empty, or, with `overwrite`, holds a bank.

        Raises:
            BankError: something else is there, or the folder cannot be written.
        """
        save_bank(self, Path(path), overwrite)

    def describe(self) -> dict[str, Any]:
        """What the bank holds and takes, as plain values for JSON; reads no pages."""
        counts = [[0, 0] for _ in self.documents]
        for chunk in self.chunks:
            counts[chunk.document][0] += chunk.tokens
            counts[chunk.document][1] += 1
        return {
            "path": None if self.path is None else str(self.path),
            "model": {"name": self.identity.name, "fingerprint": self.identity.fingerprint},
            "ratio": self.memory.ratio,
            "window": self.memory.window,
            "chunk": self.memory.chunk,
            "cut": self.memory.cut,
            "margin": self.memory.margin,
            "dtype": self.dtype,
            "tokens": self.tokens,
            "memory_tokens": self.memory_tokens,
            "chunks": len(self),
            "pages": sum(len(chunk.pages) for chunk in self.chunks),
            "page_bytes": self.pages.layout.page_bytes,
            "memory_bytes": self.nbytes,
            "documents": [
                {
                    "name": document.name,
                    "characters": document.characters,
                    "tokens": tokens,
                    "chunks": chunks,
                    "sha256": document.sha256,
                }
                for document, (tokens, chunks) in zip(self.documents, counts, strict=True)
            ],
        }


def check_known(names: Iterable[str], known: Container[str]) -> list[str]:
    """`names` as a list, each once; InputError if one is not in `known`."""
    names = list(dict.fromkeys([names] if isinstance(names, str) else names))
    for name in names:
        if name not in known:
            raise InputError(
                f"{name}: expected a document of the bank, got none of that name",
                "'lychee info' lists them",
            )
    return names
