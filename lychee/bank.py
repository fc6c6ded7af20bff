# SPDX-License-Identifier: Apache-2.0
"""The memory bank: pages of compressed keys and values, and the chunks of text they came from.

One page holds PAGE_TOKENS memory tokens of one chunk over all layers:
kv [num_pages, L, Hkv, 2, P, D], keys before rotation, so chunks can be read in any selection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import lychee_kernels as lk
from lychee.compressor import Window
from lychee.config import MemoryConfig, ModelConfig

PAGE_TOKENS = 64


@dataclass(frozen=True)
class Document:
    """A text that a bank remembers."""

    name: str
    text: str


@dataclass(frozen=True)
class Chunk:
    """A piece of a document and the pages that hold its memory."""

    document: int
    start: int  # characters
    stop: int
    tokens: int
    memory_tokens: int
    pages: tuple[int, ...]


@dataclass(frozen=True)
class PageTable:
    """Pages that each row of a batch reads, as `lychee_kernels.memory_attention` takes them."""

    kv: Tensor
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
            "layer": layer,
            "page_table": self.table,
            "page_len": self.length,
            "page_base": self.base,
            "num_pages": self.count,
            "rope_mode": self.rope_mode,
            "cos": self.cos,
            "sin": self.sin,
        }


class MemoryBank:
    """Compressed memory of any number of documents, independent of any question."""

    def __init__(
        self, config: ModelConfig, memory: MemoryConfig, *, device: torch.device, dtype: torch.dtype
    ):
        self.config, self.memory = config, memory
        self.documents: list[Document] = []
        self.chunks: list[Chunk] = []
        self.kv = torch.zeros(
            0,
            config.num_hidden_layers,
            config.num_key_value_heads,
            2,
            PAGE_TOKENS,
            config.head_dim,
            device=device,
            dtype=dtype,
        )
        self.used_pages = 0

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
    def nbytes(self) -> int:
        """Bytes of the pages in use."""
        return self.used_pages * self.kv[:1].nbytes if len(self.kv) else 0

    def text(self, chunk: int) -> str:
        """The text that a chunk was made from."""
        piece = self.chunks[chunk]
        return self.documents[piece.document].text[piece.start : piece.stop]

    def reserve(self, pages: int) -> None:
        """Make room for `pages` more pages; new pages are zero, so their tails stay finite."""
        missing = self.used_pages + pages - len(self.kv)
        if missing > 0:
            self.kv = torch.cat((self.kv, self.kv.new_zeros(missing, *self.kv.shape[1:])))

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` raw tokens of one chunk need."""
        return -(-self.memory_tokens_for(tokens) // PAGE_TOKENS)

    def memory_tokens_for(self, tokens: int) -> int:
        """Memory tokens of a chunk of `tokens` raw tokens: a last, incomplete group has one too."""
        return -(-tokens // self.memory.ratio)

    def allocate(self, tokens: int) -> tuple[int, ...]:
        """Take pages for one chunk of `tokens` raw tokens."""
        count = self.pages_for(tokens)
        self.reserve(count)
        pages = tuple(range(self.used_pages, self.used_pages + count))
        self.used_pages += count
        return pages

    def page_table(self, rows: Sequence[Sequence[int]]) -> PageTable:
        """The table of a batch whose row b reads the chunks rows[b], in that order."""
        lists = []
        for chunks in rows:
            pages = []
            base = 0
            for chunk in (self.chunks[index] for index in chunks):
                for place, page in enumerate(chunk.pages):
                    used = min(PAGE_TOKENS, chunk.memory_tokens - place * PAGE_TOKENS)
                    pages.append((page, used, base))
                    base += used
            lists.append(pages)
        width = max(1, max(map(len, lists)))
        padded = [pages + [(-1, 0, 0)] * (width - len(pages)) for pages in lists]
        table = torch.tensor(padded, dtype=torch.int32, device=self.kv.device)
        count = torch.tensor([len(p) for p in lists], dtype=torch.int32, device=self.kv.device)
        return PageTable(self.kv, *(t.contiguous() for t in table.unbind(2)), count)

    def sink(self, pages: Sequence[Sequence[int]]) -> BankSink:
        """Where the compressor writes a batch of chunks whose pages are `pages`."""
        return BankSink(self, pages)


class BankSink:
    """Writes a batch of chunks into a bank and shows later windows the earlier ones' memory."""

    def __init__(self, bank: MemoryBank, pages: Sequence[Sequence[int]]):
        width = max(map(len, pages))
        options = {"dtype": torch.int32, "device": bank.kv.device}
        self.kv = bank.kv
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
            None,
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
            None,
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
        table = PageTable(
            self.kv, self.table, length, base, count, "affine", window.cos, window.sin
        )
        return table.attention_arguments(layer)
