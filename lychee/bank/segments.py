# SPDX-License-Identifier: Apache-2.0
"""Segment files: safetensors with pages and texts, mapped into memory and read where they lie."""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from lychee.allocator import release_mapped
from lychee.bank.manifest import SegmentRecord, TextPlace
from lychee.bank.pages import PageLayout, PagePool
from lychee.errors import BankError

# The header is padded to this, so that pages start where the system's pages do.
ALIGNMENT = 4096
BLOCK_BYTES = 8 << 20
SAFETENSORS_NAMES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int8": "I8",
    "e4m3": "F8_E4M3",
}
ADVICE = "the file is damaged: restore it from a copy, or build the bank anew"


def header_of(layout: PageLayout, pages: int, text_bytes: int) -> bytes:
    """The safetensors header of a segment; the same for equal arguments."""
    tensors = {"kv": (SAFETENSORS_NAMES[layout.dtype], [pages, *layout.shape], layout.kv_bytes)}
    if layout.scale_bytes:
        tensors["scale"] = ("F32", [pages, *layout.shape[:-1]], layout.scale_bytes)
    header: dict = {"__metadata__": {"format": "lychee-bank"}}
    start = 0
    for name, (dtype, shape, size) in tensors.items():
        stop = start + pages * size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
        start = stop
    offsets = [start, start + text_bytes]
    header["text"] = {"dtype": "U8", "shape": [text_bytes], "data_offsets": offsets}
    text = json.dumps(header).encode()
    size = -(-(len(text) + 8) // ALIGNMENT) * ALIGNMENT - 8
    return size.to_bytes(8, "little") + text.ljust(size)


def write_segment(
    path: Path, layout: PageLayout, kv: Tensor, scale: Tensor, text: bytes
) -> SegmentRecord:
    """Write a segment to a temporary name and see it onto the disk.

    Args:
        kv, scale: bytes of pages [n, kv_bytes] and [n, scale_bytes], uint8, in the CPU's memory.
        text: UTF-8 bytes of documents.
    """
    header = header_of(layout, len(kv), len(text))
    digest, size = hashlib.sha256(), 0
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o666), "wb", buffering=0) as file:
        for part in (header, kv.flatten().numpy(), scale.flatten().numpy(), text):
            data = memoryview(part)
            for start in range(0, len(data), BLOCK_BYTES):
                block = data[start : start + BLOCK_BYTES]
                digest.update(block)
                while len(block):
                    block = block[file.write(block) :]
            size += len(data)
        os.fsync(file.fileno())
    return SegmentRecord(digest.hexdigest(), size, len(kv), len(text))


@dataclass(frozen=True)
class Segment:
    """A segment file, mapped; its pages and texts are read when they are first touched."""

    record: SegmentRecord
    kv: Tensor  # [pages, kv_bytes] uint8
    scale: Tensor  # [pages, scale_bytes] uint8
    text: Tensor  # [text_bytes] uint8

    @classmethod
    def map(cls, path: Path, layout: PageLayout, record: SegmentRecord) -> Segment:
        """Map a file after checking that it is what the manifest says.

        Raises:
            FileNotFoundError: there is none, as when a writer has just replaced it.
            BankError: its size or its header is another.
        """
        header = header_of(layout, record.pages, record.text_bytes)
        pages = record.pages * layout.page_bytes
        size = len(header) + pages + record.text_bytes
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode):
            raise BankError(f"{path}: expected an ordinary file, got a link or a device", ADVICE)
        if not size == record.size == found.st_size:
            raise BankError(f"{path}: expected {size:,} bytes, got {found.st_size:,}", ADVICE)
        os.close(os.open(path, os.O_RDONLY))  # whose errors say what is wrong
        storage = torch.UntypedStorage.from_file(str(path), False, size)
        data = torch.empty(0, dtype=torch.uint8).set_(storage)
        if bytes(data[: len(header)].numpy()) != header:
            raise BankError(f"{path}: expected the header of its pages, got another", ADVICE)
        kv, scale, text = data[len(header) :].split(
            [record.pages * layout.kv_bytes, record.pages * layout.scale_bytes, record.text_bytes]
        )
        scale = scale.view(record.pages, layout.scale_bytes)
        return cls(record, kv.view(record.pages, layout.kv_bytes), scale, text)

    def let_go(self) -> None:
        """Free the memory of the pages that were touched; touched again, they are read again."""
        for data in (self.kv, self.scale):
            release_mapped(data)

    def read_text(self, place: TextPlace, document: str) -> str:
        """A document's text; BankError if its bytes are none."""
        try:
            data = self.text[place.start : place.start + place.size]
            return data.numpy().tobytes().decode()
        except UnicodeDecodeError as error:
            raise BankError(
                f"{document}: expected UTF-8 text in the bank, got byte "
                f"{error.object[error.start]:#04x} at {error.start}",
                ADVICE,
            ) from error


def announce(path: Path) -> None:
    """Have the system begin to read a segment's header, so that many are read at once."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(file, 0, ALIGNMENT, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)


def hash_file(path: Path, on_bytes: Callable[[int], None]) -> str:
    """SHA-256 of a file; `on_bytes` is called with the bytes of each block read."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            on_bytes(len(block))
    return digest.hexdigest()


class SegmentPages:
    """Pages in mapped files; those that a table needs are brought to the reader, others never.

    Of the files, what the last table reads is in memory, and a block while it is copied.
    """

    def __init__(self, layout: PageLayout, segments: Sequence[Segment], reader: torch.device):
        self.layout, self.segments, self.reader = layout, list(segments), torch.device(reader)
        self.bytes_read = 0
        self.in_place: Segment | None = None  # whose pages the last table reads where they lie
        self.starts: list[int] = []
        total = 0
        for segment in self.segments:
            self.starts.append(total)
            total += len(segment.kv)
        self.first_page = {s.record.sha256: p for s, p in zip(segments, self.starts, strict=True)}

    def home(self, page: int) -> int:
        """The segment that a page is in."""
        return bisect.bisect_right(self.starts, page) - 1

    def _runs(self, pages: Sequence[int]) -> Iterator[tuple[Segment, slice]]:
        """Neighbouring pages of one segment each, in the order of `pages`."""
        for (home, _), run in groupby(enumerate(pages), lambda e: (self.home(e[1]), e[1] - e[0])):
            run = [page - self.starts[home] for _, page in run]
            yield self.segments[home], slice(run[0], run[-1] + 1)

    def bytes_of(self, pages: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        sizes = (self.layout.kv_bytes, self.layout.scale_bytes)
        kv, scale = (
            torch.empty(len(pages), size, dtype=torch.uint8, device=device) for size in sizes
        )
        done = 0
        most = max(1, BLOCK_BYTES // self.layout.page_bytes)
        for segment, run in self._runs(pages):
            for start in range(run.start, run.stop, most):
                block = slice(start, min(start + most, run.stop))
                rows = slice(done, done + block.stop - block.start)
                kv[rows], scale[rows] = segment.kv[block], segment.scale[block]
                segment.let_go()
                done = rows.stop
        return kv, scale

    def bring(self, pages: Sequence[int]) -> tuple[Tensor, Tensor | None, Sequence[int]]:
        self.bytes_read += len(pages) * self.layout.page_bytes
        if self.in_place is not None:
            self.in_place.let_go()
            self.in_place = None
        homes = {self.home(page) for page in pages}
        if self.reader.type == "cpu" and len(homes) == 1:
            [home] = homes
            self.in_place, start = self.segments[home], self.starts[home]
            view = self.layout.view(self.in_place.kv, self.in_place.scale)
            return *view, [page - start for page in pages]
        return *self.layout.view(*self.bytes_of(pages, self.reader)), range(len(pages))

    def loaded(self, device: torch.device) -> PagePool:
        """All pages, under the same numbers, in the memory of a device."""
        pool = PagePool(self.layout, device, self.reader)
        pool.allocate(sum(len(segment.kv) for segment in self.segments))
        for start, segment in zip(self.starts, self.segments, strict=True):
            for target, source in zip(pool.bytes(), (segment.kv, segment.scale), strict=True):
                target[start : start + len(source)] = source
            segment.let_go()
        return pool
