# SPDX-License-Identifier: Apache-2.0
"""Builds or extends a bank on disk, so that a kill at any moment costs a few seconds of work.

Documents are compressed in runs of about COMMIT_SECONDS. A run is one segment; its commit makes
the documents that it completes visible, and notes how far a longer one has come. A run is written
while the next is compressed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lychee.bank.build_progress import BuildProgress, BuildReport, Clock
from lychee.bank.compaction import compact
from lychee.bank.folder import BankWriter, read_state
from lychee.bank.identity import GEOMETRY, check_match
from lychee.bank.manifest import ChunkRecord, DocumentRecord, Manifest, TextPlace
from lychee.bank.pages import DTYPES, PageLayout, PagePool
from lychee.bank.pieces import (
    BATCH_TOKENS,
    Document,
    Piece,
    check_documents,
    compress,
    cut_document,
    pages_of_chunk,
)
from lychee.bank.save import CREATED_BY, SEGMENT_BYTES
from lychee.config import MemoryConfig
from lychee.errors import BankError

if TYPE_CHECKING:
    from lychee.memory_model import LycheeMemory

COMMIT_SECONDS = 5.0


class Part(NamedTuple):
    """Pieces of one document that go into one run."""

    document: Document
    sha256: str
    pieces: Sequence[Piece]
    begins: bool
    ends: bool


@dataclass
class Run:
    """What one segment will hold."""

    parts: list[Part] = field(default_factory=list)
    tokens: int = 0
    pages: int = 0


class BankBuilder:
    """The writer of one bank; use it in a `with` statement, which lets the next writer in."""

    def __init__(
        self,
        model: LycheeMemory,
        path: str | Path,
        *,
        bank_dtype: str = "auto",
        resume: bool = False,
    ):
        """Take the bank at `path`, or make one.

        Args:
            model: compresses the documents.
            bank_dtype: float32, float16, bfloat16, int8 or e4m3; "auto" is that of the bank that
                is there, or else the one that the model's weights are stored as.
            resume: go on with a bank that is there; without, there must be none.

        Raises:
            BankError: a bank is there but should not, has another dtype, or is damaged.
            BankMismatchError: it is of another model or geometry.
            BankLockedError: another process is writing it.
        """
        self.model, self.writer = model, BankWriter(Path(path))
        try:
            manifest = self.writer.manifest
            if manifest is None:
                manifest = self._empty(bank_dtype)
            elif not resume:
                raise BankError(
                    f"{path}: expected no bank yet, got one of {len(manifest.documents)} documents",
                    "--resume goes on with it, 'lychee add' extends it",
                )
            else:
                read_state(self.writer.path)  # nothing is added to a damaged bank
            check_match(path, manifest.memory, manifest.model, model)
            if bank_dtype not in ("auto", manifest.layout.dtype):
                raise BankError(
                    f"{path}: bank dtype: expected {manifest.layout.dtype} as the bank's, "
                    f"got {bank_dtype}"
                )
        except BaseException:
            self.writer.close()
            raise
        self.base = manifest
        self.segments = dict(manifest.segments)
        self.documents = {record.name: record for record in manifest.documents}
        rest = manifest.unfinished
        self.partial = {} if rest is None else {rest.name: rest}
        self.unfinished = rest
        self.run_tokens, self.write_seconds = BATCH_TOKENS, 0.0
        self.worker = ThreadPoolExecutor(max_workers=1)
        self.pending: Future | None = None

    def _empty(self, bank_dtype: str) -> Manifest:
        model = self.model
        stored = model.raw_config.get("dtype") or model.raw_config.get("torch_dtype")
        own = stored if stored in DTYPES else model.decoder.dtype
        dtype = own if bank_dtype == "auto" else bank_dtype
        memory = MemoryConfig(**{name: getattr(model.memory, name) for name in GEOMETRY})
        layout = PageLayout.of(model.decoder.config, dtype)
        return Manifest(model.identity, memory, layout, CREATED_BY)

    def __enter__(self) -> BankBuilder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        try:
            with suppress(BankError) if kind else nullcontext():
                self._wait()
        finally:
            self.worker.shutdown()
            self.writer.close()

    def add(
        self,
        documents: Iterable[Document],
        progress: Callable[[BuildProgress], None] | None = None,
    ) -> BuildReport:
        """Compress documents into the bank; what it has already, by name and text, is skipped.

        Args:
            documents: with names that differ; a name that the bank has replaces that document.
            progress: called after every batch of a few thousand tokens.

        Raises:
            InputError: a document without text or name; of a sequence before anything is done.
            BankError: no space is left, or the bank cannot be written. What was committed stays.
        """
        documents = check_documents(documents)
        self.clock = Clock(documents, progress)
        written = self.write_seconds
        before = dict(self.documents)
        names = {"added": [], "replaced": [], "skipped": []}
        for run in self._runs(documents, before, names):
            started = time.perf_counter()
            pool = self._compress(run)
            rate = run.tokens / (time.perf_counter() - started)
            self.run_tokens = max(BATCH_TOKENS, int(rate * COMMIT_SECONDS))
            self._wait()
            self.pending = self.worker.submit(self._store, run, pool)
        self._wait()
        self._finish()
        return BuildReport(
            **{kind: tuple(found) for kind, found in names.items()},
            tokens=self.clock.compressed,
            seconds=self.clock.seconds,
            write_seconds=self.write_seconds - written,
        )

    def _wait(self) -> None:
        """See the last run on the disk, or raise why it is not."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def _runs(
        self,
        documents: Iterable[Document],
        before: dict[str, DocumentRecord],
        names: dict[str, list[str]],
    ) -> Iterator[Run]:
        run = Run()
        for document in documents:
            sha256, known = document.sha256, before.get(document.name)
            if known is not None and known.sha256 == sha256:
                names["skipped"].append(document.name)
                self.clock.see(document, known.tokens, known.tokens)
                continue
            names["added" if known is None else "replaced"].append(document.name)
            pieces = cut_document(self.model, document)
            done = self._done_before(document, sha256, pieces)
            self.clock.see(document, count_tokens(pieces), count_tokens(pieces[:done]))
            while done < len(pieces):
                stop = self._fill(run, pieces, done)
                ends = stop == len(pieces)
                run.parts.append(Part(document, sha256, pieces[done:stop], done == 0, ends))
                done = stop
                if self._is_full(run):
                    yield run
                    run = Run()
        if run.parts:
            yield run

    def _done_before(self, document: Document, sha256: str, pieces: list[Piece]) -> int:
        """Pieces of a document that an interrupted build has compressed."""
        rest = self.partial.get(document.name)
        if rest is None or rest.sha256 != sha256 or len(rest.chunks) >= len(pieces):
            return 0
        same = all(
            (chunk.start, chunk.stop, chunk.tokens) == (piece.start, piece.stop, len(piece.ids))
            for chunk, piece in zip(rest.chunks, pieces, strict=False)
        )
        return len(rest.chunks) if same else 0

    def _is_full(self, run: Run) -> bool:
        large = run.pages * self.base.layout.page_bytes >= SEGMENT_BYTES
        return large or run.tokens >= self.run_tokens

    def _fill(self, run: Run, pieces: list[Piece], stop: int) -> int:
        """Take pieces from `stop` on until the run is full; return where it stopped."""
        while stop < len(pieces) and not self._is_full(run):
            run.tokens += len(pieces[stop].ids)
            run.pages += pages_of_chunk(len(pieces[stop].ids), self.base.memory)
            stop += 1
        return stop

    def _compress(self, run: Run) -> PagePool:
        pool = PagePool(self.base.layout, self.model.decoder.device)
        pieces = [piece for part in run.parts for piece in part.pieces]
        pool.reserve(run.pages)
        pages = [
            pool.allocate(pages_of_chunk(len(piece.ids), self.base.memory)) for piece in pieces
        ]
        compress(self.model, pieces, pool, pages, self.clock.batch)
        self.clock.complete(sum(part.ends for part in run.parts))
        return pool

    def _store(self, run: Run, pool: PagePool) -> None:
        """Write a run's segment and commit what it completes."""
        started = time.perf_counter()
        texts = [part.document.text.encode() if part.begins else b"" for part in run.parts]
        kv, scale = (piece.cpu() for piece in pool.bytes())
        segment = self.writer.write_segment(self.base.layout, kv, scale, b"".join(texts))
        self.segments[segment.sha256] = segment
        place = page = 0
        for part, text in zip(run.parts, texts, strict=True):
            name, whole = part.document.name, len(part.document.text)
            if part.begins:
                where = TextPlace(segment.sha256, place, len(text))
                record = DocumentRecord(name, part.sha256, whole, where, ())
            else:
                record = self.partial.pop(name)
            place += len(text)
            chunks = []
            for piece in part.pieces:
                tokens = len(piece.ids)
                chunks.append(ChunkRecord(piece.start, piece.stop, tokens, segment.sha256, page))
                page += pages_of_chunk(tokens, self.base.memory)
            self._keep(replace(record, chunks=(*record.chunks, *chunks)), part.ends)
        self.writer.commit(self._manifest())
        self.write_seconds += time.perf_counter() - started

    def _keep(self, record: DocumentRecord, whole: bool) -> None:
        if whole:
            self.documents[record.name] = record
            if self.unfinished is not None and self.unfinished.name == record.name:
                self.unfinished = None
        else:
            self.partial[record.name] = self.unfinished = record

    def _manifest(self) -> Manifest:
        documents = tuple(self.documents.values())
        return replace(
            self.base, segments=dict(self.segments), documents=documents, unfinished=self.unfinished
        )

    def _finish(self) -> None:
        """Drop what replaced documents have left in segments."""
        manifest = compact(self.writer, self._manifest())
        if manifest != self.writer.manifest:
            self.writer.commit(manifest)
        self.segments = dict(manifest.segments)
        self.documents = {record.name: record for record in manifest.documents}
        self.unfinished = manifest.unfinished
        self.partial = {r.name: r for r in manifest.records() if r is manifest.unfinished}


def count_tokens(pieces: Sequence[Piece]) -> int:
    return sum(len(piece.ids) for piece in pieces)
