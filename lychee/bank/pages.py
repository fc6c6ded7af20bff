# SPDX-License-Identifier: Apache-2.0
"""Pages of compressed keys and values in memory, and the tables by which attention reads them.

One page holds PAGE_TOKENS memory tokens of one chunk over all layers:
kv [num_pages, L, Hkv, 2, P, D], keys before rotation, so chunks can be read in any selection.
Quantised pages have a scale [num_pages, L, Hkv, 2, P] per token and head, applied inside attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

import lychee_kernels as lk
from lychee.allocator import return_freed_memory
from lychee.compressor import Window
from lychee.config import ModelConfig
from lychee.errors import BankError

PAGE_TOKENS = 64
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "e4m3": torch.float8_e4m3fn,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
QUANTISED = ("int8", "e4m3")
TIERS = ("gpu", "cpu", "disk")


@dataclass(frozen=True)
class PageLayout:
    """Shape and dtype of a bank's pages."""

    layers: int
    heads: int
    head_dim: int
    dtype: str

    @classmethod
    def of(cls, config: ModelConfig, dtype: str | torch.dtype) -> PageLayout:
        """The layout of a model's pages; `dtype` by one of the names in DTYPES, or by its own."""
        name = NAMES.get(dtype, str(dtype))
        if name not in DTYPES:
            raise BankError(f"bank dtype: expected one of {', '.join(DTYPES)}, got {name!r}", "")
        return cls(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, name)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one page."""
        return (self.layers, self.heads, 2, PAGE_TOKENS, self.head_dim)

    @property
    def kv_bytes(self) -> int:
        """Of one page's keys and values."""
        return self.scale_numbers * self.head_dim * DTYPES[self.dtype].itemsize

    @property
    def scale_numbers(self) -> int:
        return self.layers * self.heads * 2 * PAGE_TOKENS

    @property
    def scale_bytes(self) -> int:
        return 4 * self.scale_numbers if self.dtype in QUANTISED else 0

    @property
    def page_bytes(self) -> int:
        return self.kv_bytes + self.scale_bytes

    def view(self, kv: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Pages from their bytes [n, kv_bytes] and [n, scale_bytes], uint8."""
        kv = kv.view(DTYPES[self.dtype]).view(len(kv), *self.shape)
        if not self.scale_bytes:
            return kv, None
        return kv, scale.view(torch.float32).view(len(kv), *self.shape[:-1])


def page_bytes(config: ModelConfig, dtype: str | torch.dtype) -> int:
    """Bytes of one page, scales included, of a model's bank."""
    return PageLayout.of(config, dtype).page_bytes


def check_tier(tier: str) -> None:
    """Raise BankError for a tier that does not exist."""
    if tier not in ("auto", *TIERS):
        raise BankError(f"tier: expected one of auto, {', '.join(TIERS)}, got {tier!r}")


def tier_device(tier: str, reader: torch.device) -> torch.device:
    """Where a tier in memory keeps pages that a model on `reader` reads."""
    if tier == "gpu" and reader.type == "cpu":
        raise BankError("tier: expected cpu or disk for a model on a CPU, got gpu")
    if tier == "disk":
        raise BankError("tier: expected gpu or cpu for a bank in memory, got disk")
    return torch.device("cpu") if tier == "cpu" else reader


@dataclass(frozen=True)
class PageTable:
    """Pages that each row of a batch reads, as `lychee_kernels.memory_attention` takes them."""

    kv: Tensor
    scale: Tensor | None
    table: Tensor  # [B, max_pages] int32, -1 padded
    length: Tensor  # [B, max_pages] int32
    base: Tensor  # [B, max_pages] int32
    count: Tensor  # [B] int32
    rope_mode: str = "none"
    cos: Tensor | None = None
    sin: Tensor | None = None

    def attention_arguments(self, layer: int) -> dict:
        return {
            "kv": self.kv,
            "kv_scale": self.scale,
            "layer": layer,
            "page_table": self.table,
            "page_len": self.length,
            "page_base": self.base,
            "num_pages": self.count,
            "rope_mode": self.rope_mode,
            "cos": self.cos,
            "sin": self.sin,
        }


class PageStore(Protocol):
    """Where a bank's pages are."""

    layout: PageLayout
    reader: torch.device
    bytes_read: int

    def home(self, page: int) -> int:
        """A number that pages share which `bring` returns together without copying them."""

    def bring(self, pages: Sequence[int]) -> tuple[Tensor, Tensor | None, Sequence[int]]:
        """kv and scale on the reader's device that hold `pages`, and the place of each in them."""

    def bytes_of(self, pages: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Copied bytes of pages: [n, kv_bytes] and [n, scale_bytes], uint8."""


class PagePool:
    """Pages in one tensor that grows, in the reader's memory or, to spare that, in the CPU's."""

    def __init__(
        self, layout: PageLayout, device: torch.device, reader: torch.device | None = None
    ):
        self.layout, self.device = layout, torch.device(device)
        self.reader = self.device if reader is None else torch.device(reader)
        self.bytes_read = 0
        self.free: list[int] = []
        self.kv, self.scale = layout.view(*self._zeros(0))

    def _zeros(self, pages: int) -> tuple[Tensor, Tensor]:
        """Bytes of empty pages: zeros, so that what a page's tail holds stays finite."""
        sizes = (self.layout.kv_bytes, self.layout.scale_bytes)
        kv, scale = (
            torch.zeros(pages, size, dtype=torch.uint8, device=self.device) for size in sizes
        )
        return kv, scale

    def __len__(self) -> int:
        return len(self.kv)

    @property
    def used(self) -> int:
        return len(self.kv) - len(self.free)

    def reserve(self, pages: int) -> None:
        """Make room for `pages` more pages at once, which spares copies."""
        missing = pages - len(self.free)
        if missing <= 0:
            return
        return_freed_memory()
        before, kept = len(self.kv), self.bytes()
        grown = self._zeros(before + missing)
        for old, new in zip(kept, grown, strict=True):
            new[:before] = old
        self.kv, self.scale = self.layout.view(*grown)
        self.free = [*range(before + missing - 1, before - 1, -1), *self.free]

    def allocate(self, pages: int) -> tuple[int, ...]:
        """Take so many pages, all zero."""
        self.reserve(pages)
        return tuple(self.free.pop() for _ in range(pages))

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back."""
        if len(pages) == 0:
            return
        index = torch.tensor(list(pages), device=self.device)
        for piece in self.bytes():
            piece[index] = 0
        self.free += sorted(pages, reverse=True)

    def bytes(self) -> tuple[Tensor, Tensor]:
        """Views [n, kv_bytes] and [n, scale_bytes], uint8."""
        kv = self.kv.flatten().view(torch.uint8).view(len(self.kv), self.layout.kv_bytes)
        if self.scale is None:
            return kv, kv.new_empty(len(kv), 0)
        return kv, self.scale.flatten().view(torch.uint8).view(len(kv), self.layout.scale_bytes)

    def write(self, pages: Sequence[int], source: PagePool) -> None:
        """Copy all pages of another pool, in their order, to `pages` of this one."""
        index = torch.tensor(list(pages), device=self.device)
        for target, new in zip(self.bytes(), source.bytes(), strict=True):
            target[index] = new.to(self.device)

    def home(self, page: int) -> int:
        return 0

    def bring(self, pages: Sequence[int]) -> tuple[Tensor, Tensor | None, Sequence[int]]:
        if self.device == self.reader:
            return self.kv, self.scale, pages
        self.bytes_read += len(pages) * self.layout.page_bytes
        return *self.layout.view(*self.bytes_of(pages, self.reader)), range(len(pages))

    def bytes_of(self, pages: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        index = torch.tensor(list(pages), dtype=torch.int64, device=self.device)
        kv, scale = (piece[index].to(device) for piece in self.bytes())
        return kv, scale

    def sink(self, pages: Sequence[Sequence[int]]) -> BankSink:
        """Where the compressor writes a batch of chunks whose pages are `pages`."""
        return BankSink(self, pages)


class BankSink:
    """Writes a batch of chunks into pages and shows later windows the earlier ones' memory."""

    def __init__(self, pool: PagePool, pages: Sequence[Sequence[int]]):
        width = max(map(len, pages))
        options = {"dtype": torch.int32, "device": pool.device}
        self.kv, self.scale = pool.kv, pool.scale
        self.table = torch.tensor([[*p] + [-1] * (width - len(p)) for p in pages], **options)
        self.written = torch.zeros(len(pages), **options)

    def pack(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: Window):
        return lk.compress_pack_(
            q,
            k,
            v,
            window.cos,
            window.sin,
            self.kv,
            self.scale,
            self.table,
            self.written,
            batch=window.batch,
            ratio=window.ratio,
            layer=layer,
            mem_valid=window.mem_valid,
            positions=window.positions,
            pos0=window.offset,
        )

    def write(self, layer: int, k: Tensor, v: Tensor, window: Window) -> None:
        lk.write_memory_(
            k,
            v,
            self.kv,
            self.scale,
            self.table,
            self.written,
            batch=window.batch,
            layer=layer,
            mem_valid=window.mem_valid,
        )
        new = window.memory if window.mem_valid is None else window.mem_valid.sum(1)
        self.written = (self.written + new).to(torch.int32)

    def prefix(self, layer: int, window: Window) -> dict:
        if not window.offset:
            return {}
        starts = torch.arange(self.table.shape[1], device=self.table.device) * PAGE_TOKENS
        length = (self.written[:, None] - starts).clamp(0, PAGE_TOKENS).to(torch.int32)
        base = starts.to(torch.int32).expand_as(length).contiguous()
        count = (length > 0).sum(1).to(torch.int32)
        tables = (self.table, length, base, count)
        table = PageTable(self.kv, self.scale, *tables, "affine", window.cos, window.sin)
        return table.attention_arguments(layer)
