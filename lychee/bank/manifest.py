# SPDX-License-Identifier: Apache-2.0
"""The manifest of a bank on disk: what it holds and where, written as JSON, read with distrust.

Every number that later addresses memory or a file is checked here, so that a damaged or hostile
manifest ends in a BankError and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lychee.bank.identity import GEOMETRY, ModelIdentity
from lychee.bank.pages import DTYPES, PAGE_TOKENS, PageLayout
from lychee.bank.pieces import LONGEST_NAME, pages_of_chunk
from lychee.config import MemoryConfig
from lychee.errors import BankError, MemoryConfigError

FORMAT, VERSION = "lychee-bank", 1
SHA256 = re.compile(r"[0-9a-f]{64}")
MOST_PAGES = 2**31 - 1  # page numbers are int32 in the kernels
LARGEST = 2**53
LARGEST_WINDOW = 2**24


class ChunkRecord(NamedTuple):
    """One chunk: its characters, raw tokens, and first page in a segment."""

    start: int
    stop: int
    tokens: int
    segment: str
    page: int


class TextPlace(NamedTuple):
    """Where in a segment a document's UTF-8 bytes are."""

    segment: str
    start: int
    size: int


@dataclass(frozen=True)
class DocumentRecord:
    """A document, whole, or as far as an interrupted build came."""

    name: str
    sha256: str
    characters: int
    text: TextPlace
    chunks: tuple[ChunkRecord, ...]

    @property
    def tokens(self) -> int:
        return sum(chunk.tokens for chunk in self.chunks)


@dataclass(frozen=True)
class SegmentRecord:
    """A segment file, named by its hash."""

    sha256: str
    size: int
    pages: int
    text_bytes: int


@dataclass(frozen=True)
class Manifest:
    """The state of a bank on disk."""

    model: ModelIdentity
    memory: MemoryConfig
    layout: PageLayout
    created_by: str
    segments: dict[str, SegmentRecord] = field(default_factory=dict)
    documents: tuple[DocumentRecord, ...] = ()
    unfinished: DocumentRecord | None = None

    def records(self) -> Iterator[DocumentRecord]:
        """All documents, the unfinished one too."""
        yield from self.documents
        if self.unfinished is not None:
            yield self.unfinished

    def to_bytes(self) -> bytes:
        """The file's content, with a checksum over its body."""
        order = {name: index for index, name in enumerate(self.segments)}

        def record(document: DocumentRecord | None) -> dict | None:
            if document is None:
                return None
            chunks = [[*c[:3], order[c.segment], c.page] for c in document.chunks]
            text = [order[document.text.segment], *document.text[1:]]
            return {
                "name": document.name,
                "sha256": document.sha256,
                "characters": document.characters,
                "text": text,
                "chunks": chunks,
            }

        body = {
            "model": asdict(self.model),
            "memory": {name: getattr(self.memory, name) for name in GEOMETRY},
            "layout": asdict(self.layout) | {"page_tokens": PAGE_TOKENS},
            "created_by": self.created_by,
            "segments": [asdict(segment) for segment in self.segments.values()],
            "documents": [record(document) for document in self.documents],
            "unfinished": record(self.unfinished),
        }
        whole = {"format": FORMAT, "version": VERSION, "checksum": checksum(body), "body": body}
        return json.dumps(whole, separators=(",", ":")).encode() + b"\n"


def checksum(body: Any) -> str:
    text = json.dumps(body, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def parse_manifest(data: bytes, path: Path) -> Manifest:
    """The manifest in a file's bytes; BankError naming `path` if anything is wrong with it."""
    try:
        whole = json.loads(data)
        expect(isinstance(whole, dict) and whole.get("format") == FORMAT, f"format: {FORMAT!r}")
        version = whole.get("version")
        if version != VERSION:
            raise BankError(
                f"{path}: expected format version {VERSION}, got {version!r}",
                "read it with the release that wrote it, or build the bank anew",
            )
        body = whole.get("body")
        expect(whole.get("checksum") == checksum(body), "checksum: that of the body")
        return read_body(body)
    except BankError:
        raise
    except Unfit as error:
        raise BankError(f"{path}: expected {error}, got another", ADVICE) from error
    except MemoryConfigError as error:
        raise BankError(f"{path}: memory: {error.args[0]}", ADVICE) from error
    except (ValueError, RecursionError) as error:
        got = str(error) or type(error).__name__
        raise BankError(f"{path}: expected a bank's manifest, got: {got}", ADVICE) from error


ADVICE = "the manifest is damaged: restore it from a copy, or build the bank anew"


class Unfit(Exception):
    """Something in a manifest that is not as it must be; the text says how it must be."""


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise Unfit(what)


def whole_number(value: Any, what: str, low: int = 0, high: int = LARGEST) -> int:
    expect(type(value) is int and low <= value <= high, f"{what}: {low} to {high}")
    return value


def fields(value: Any, what: str, *names: str) -> list[Any]:
    expect(isinstance(value, dict) and set(value) == set(names), f"{what}: {', '.join(names)}")
    return [value[name] for name in names]


def text_of(value: Any, what: str, longest: int = LONGEST_NAME) -> str:
    expect(isinstance(value, str) and 0 < len(value) <= longest, f"{what}: a text")
    return value


def hash_of(value: Any, what: str) -> str:
    expect(isinstance(value, str) and SHA256.fullmatch(value) is not None, f"{what}: a SHA-256")
    return value


def items(value: Any, what: str) -> list[Any]:
    expect(isinstance(value, list), f"{what}: a list")
    return value


def read_body(body: Any) -> Manifest:
    model, memory, layout, created_by, segments, documents, unfinished = fields(
        body,
        "body",
        *("model", "memory", "layout", "created_by", "segments", "documents", "unfinished"),
    )
    name, fingerprint = fields(model, "model", "name", "fingerprint")
    identity = ModelIdentity(text_of(name, "model name"), hash_of(fingerprint, "fingerprint"))
    memory, layout = read_memory(memory), read_layout(layout)
    records = [read_segment(segment) for segment in items(segments, "segments")]
    by_name = {record.sha256: record for record in records}
    expect(len(by_name) == len(records), "segments: each once")
    whole_number(sum(record.pages for record in records), "pages", 0, MOST_PAGES)
    whole = [read_document(d, records, memory) for d in items(documents, "documents")]
    expect(len({document.name for document in whole}) == len(whole), "documents: each name once")
    rest = None if unfinished is None else read_document(unfinished, records, memory)
    return Manifest(
        identity, memory, layout, text_of(created_by, "created_by"), by_name, tuple(whole), rest
    )


def read_memory(value: Any) -> MemoryConfig:
    # Banks from before there was a margin do not name it.
    value = {"margin": 0} | value if isinstance(value, dict) else value
    window, chunk, ratio, param, cut, margin = fields(value, "memory", *GEOMETRY)
    for name, number in (("window", window), ("chunk", chunk), ("ratio", ratio)):
        whole_number(number, name, 1, LARGEST_WINDOW)
    whole_number(margin, "margin", 0, chunk - 1)
    letters = items(param, "param")
    expect(all(isinstance(letter, str) for letter in letters), "param: a list of letters")
    return MemoryConfig(
        window=window,
        chunk=chunk,
        ratio=ratio,
        param=tuple(letters),
        cut=text_of(cut, "cut"),
        margin=margin,
    )


def read_layout(value: Any) -> PageLayout:
    names = ("layers", "heads", "head_dim", "dtype", "page_tokens")
    layers, heads, head_dim, dtype, page_tokens = fields(value, "layout", *names)
    for name, number in (("layers", layers), ("heads", heads), ("head_dim", head_dim)):
        whole_number(number, name, 1, 2**16)
    expect(isinstance(dtype, str) and dtype in DTYPES, f"dtype: one of {', '.join(DTYPES)}")
    expect(page_tokens == PAGE_TOKENS, f"page_tokens: {PAGE_TOKENS}")
    return PageLayout(layers, heads, head_dim, dtype)


def read_segment(value: Any) -> SegmentRecord:
    sha256, size, pages, text_bytes = fields(
        value, "segment", *("sha256", "size", "pages", "text_bytes")
    )
    return SegmentRecord(
        # The name of a file: a hash can name nothing outside the bank's folder.
        hash_of(sha256, "segment"),
        whole_number(size, "segment size"),
        whole_number(pages, "segment pages", 0, MOST_PAGES),
        whole_number(text_bytes, "segment text_bytes"),
    )


def read_document(value: Any, segments: list[SegmentRecord], memory: MemoryConfig):
    """A DocumentRecord whose every place lies inside its segment."""
    name, sha256, characters, text, chunks = fields(
        value, "document", *("name", "sha256", "characters", "text", "chunks")
    )
    text_of(name, "document name")
    whole_number(characters, "characters", 1)
    expect(isinstance(text, list) and len(text) == 3, "document text: segment, start, size")
    holder = segments[whole_number(text[0], "text segment", 0, len(segments) - 1)]
    size = whole_number(text[2], "text size", characters, holder.text_bytes)
    start = whole_number(text[1], "text start", 0, holder.text_bytes - size)
    records, previous = [], 0
    for chunk in items(chunks, "chunks"):
        expect(isinstance(chunk, list) and len(chunk) == 5, "chunk: five numbers")
        first, last, tokens, number, page = chunk
        whole_number(last, "chunk stop", 0, characters)
        # Bytes of one character may belong to two chunks: their spans may overlap, not go back.
        previous = whole_number(first, "chunk start", previous, last)
        whole_number(tokens, "chunk tokens", 1, memory.text)
        segment = segments[whole_number(number, "chunk segment", 0, len(segments) - 1)]
        room = segment.pages - pages_of_chunk(tokens, memory)
        whole_number(page, "chunk page", 0, room)
        records.append(ChunkRecord(first, last, tokens, segment.sha256, page))
    expect(bool(records), "chunks: at least one")
    place = TextPlace(holder.sha256, start, size)
    return DocumentRecord(name, hash_of(sha256, "document"), characters, place, tuple(records))
