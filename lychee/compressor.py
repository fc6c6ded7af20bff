# SPDX-License-Identifier: Apache-2.0
"""The Compressor: turns windows of text into memory tokens' keys (before rotation) and values.

Rows stay in segment order, all raw rows first and all memory rows behind them, so that each
projection runs once on one contiguous slice. Nothing is computed that nobody reads: no vocabulary
projection, nothing after K/V in the last layer, only memory queries in the layer before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

import lychee_kernels as lk
from lychee.decoder import Decoder, Layer
from lychee.projection import linear_into


class Sink(Protocol):
    """Receives each layer's memory rows of a window and offers those of earlier windows."""

    def pack(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: Window): ...

    def write(self, layer: int, k: Tensor, v: Tensor, window: Window) -> None: ...

    def prefix(self, layer: int, window: Window) -> dict: ...


@dataclass(frozen=True)
class Window:
    """One window of a batch of chunks, in the terms of `lychee_kernels.compress_pack`."""

    batch: int
    raw: int
    ratio: int
    offset: int  # memory tokens of earlier windows, where this window's positions start
    cos: Tensor
    sin: Tensor
    valid: Tensor | None  # [B, n] interleaved slots; padded raw tokens are False
    mem_valid: Tensor | None  # [B, m]; False where a whole group is padding

    @property
    def memory(self) -> int:
        return self.raw // self.ratio

    @property
    def rows(self) -> int:
        return self.raw + self.memory

    @property
    def positions(self) -> Tensor | None:
        """[B, n]: count of valid slots before each slot; None where that is its index."""
        if self.valid is None:
            return None
        return (self.valid.cumsum(1) - 1).clamp_(min=0) + self.offset


def interleave_mask(raw_valid: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
    """Masks [B, n] and [B, m] of a window from its raw mask [B, W] (bool)."""
    groups = raw_valid.unflatten(1, (-1, ratio))
    slots = torch.cat((groups, torch.ones_like(groups[..., :1])), dim=2).flatten(1)
    return slots, groups.any(dim=2)


class Compressor:
    """Runs the decoder over interleaved windows; parameters belong to the decoder."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder

    def run(
        self,
        ids: Tensor,
        sink: Sink,
        *,
        ratio: int,
        window: int,
        mask: Tensor | None = None,
        hidden: bool = False,
    ) -> Tensor | None:
        """Compress a batch of chunks, window by window, into `sink`.

        Args:
            ids: [B, C] int64 chunk tokens, padded on the right to a common multiple of `ratio`.
            sink: where memory rows go: a bank (inference) or a list of tensors (training).
            ratio: raw tokens per memory token; divides C and `window`.
            window: raw tokens seen together; later windows see earlier windows' memory.
            mask: [B, C] bool, False for padding; None when every token is valid.
            hidden: compute raw tokens to the end of the last layer, which compression never reads:
                for a language model's loss, with gradients on.

        Returns:
            With `hidden`, raw tokens' states after the final norm [B, C, E]; else None.
        """
        states = []
        cos, sin = self.decoder.rope_tables((ids.shape[1] // ratio) + window)
        for start in range(0, ids.shape[1], window):
            piece = ids[:, start : start + window]
            valid = mem_valid = None
            if mask is not None:
                valid, mem_valid = interleave_mask(mask[:, start : start + window], ratio)
            frame = Window(*piece.shape, ratio, start // ratio, cos, sin, valid, mem_valid)
            states.append(self._window(piece, sink, frame, hidden))
        return torch.cat(states, dim=1) if hidden else None

    def _window(self, ids: Tensor, sink: Sink, window: Window, hidden: bool) -> Tensor | None:
        backbone = self.decoder.model
        memory_row = backbone.lychee_memory_embed_tokens.weight
        raw_rows = window.batch * window.raw
        x = torch.cat(
            (
                backbone.embed_tokens(ids.reshape(-1)),
                memory_row.expand(window.batch * window.memory, -1),
            )
        )
        widths = ((letter, backbone.layers[0].self_attn.width(letter)) for letter in "qkv")
        # Every layer's projections in the same memory: fresh memory costs page faults.
        buffers = {letter: x.new_empty(len(x), width) for letter, width in widths}
        last = len(backbone.layers) - 1
        for index, layer in enumerate(backbone.layers):
            if index == last and not hidden:
                h = layer.input_layernorm(x[-window.batch * window.memory :])
                k, v = (layer.self_attn.project(letter, h, memory=True) for letter in "kv")
                sink.write(index, k, v, window)
                return None
            memory_queries_only = index == last - 1 and not hidden
            q, k, v = self._project(layer, x, raw_rows, memory_queries_only, buffers)
            q, k, v = sink.pack(index, q, k, v, window)
            out, _ = lk.memory_attention(
                q,
                k,
                v,
                valid=window.valid,
                query_stride=window.ratio + 1 if memory_queries_only else 1,
                **sink.prefix(index, window),
            )
            if memory_queries_only:
                x = x[raw_rows:]
            x = self._close_layer(layer, x, out, window)
        return backbone.norm(x[:raw_rows]).unflatten(0, (window.batch, window.raw))

    def _project(
        self,
        layer: Layer,
        x: Tensor,
        raw_rows: int,
        memory_queries_only: bool,
        buffers: dict[str, Tensor],
    ) -> list[Tensor]:
        """q, k, v [rows, H, D] in segment order; each row goes through one projection.

        `buffers`: [rows, H * D] per letter, which hold the results where gradients are off.
        """
        attention, norm = layer.self_attn, layer.input_layernorm
        recorded = torch.is_grad_enabled()
        hidden = norm(x) if recorded else x
        both = [(hidden[:raw_rows], False), (hidden[raw_rows:], True)]
        results = []
        for letter in "qkv":
            segments = both[1:] if letter == "q" and memory_queries_only else both
            if recorded:
                rows = torch.cat([attention.linear(letter, own)(h) for h, own in segments])
            else:
                rows = buffers[letter][-sum(len(h) for h, _ in segments) :]
                start = 0
                for h, own in segments:
                    target = rows[start : start + len(h)]
                    linear_into(attention.linear(letter, own), h, target, norm=norm)
                    start += len(h)
            results.append(attention.split_heads(letter, rows))
        return results

    def _close_layer(self, layer: Layer, x: Tensor, out: Tensor, window: Window) -> Tensor:
        """Output projection, residual and MLP; without gradients in place.

        x: [rows, E], all rows or the memory rows; out: attention output [B, Hq, T, D] for them.
        """
        segments = [
            (layer.self_attn.linear("o", own), rows) for rows, own in split_segments(out, window)
        ]
        if torch.is_grad_enabled():
            x = x + torch.cat([linear(rows.flatten(0, -2)) for linear, rows in segments])
            return x + layer.mlp(layer.post_attention_layernorm(x))
        start = 0
        for linear, rows in segments:
            stop = start + rows.shape[:-1].numel()
            linear_into(linear, rows, x[start:stop], add=True)
            start = stop
        layer.add_mlp(x)
        return x


def split_segments(out: Tensor, window: Window) -> list[tuple[Tensor, bool]]:
    """Views of an attention output [B, Hq, T, D] in segment order, each with "is memory".

    Raw rows are [groups, ratio, Hq * D], one group per memory row; memory rows [groups, Hq * D].
    """
    rows = out.transpose(1, 2).flatten(2)
    if rows.shape[1] == window.memory:
        return [(rows.flatten(0, 1), True)]
    groups = rows.unflatten(1, (window.memory, window.ratio + 1)).flatten(0, 1)
    return [(groups[:, :-1], False), (groups[:, -1], True)]


class TensorSink:
    """Keeps memory rows as differentiable tensors, one page per chunk: training's sink."""

    def __init__(self, layers: int):
        self.windows: list[list[Tensor]] = [[] for _ in range(layers)]

    def pack(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: Window):
        q, k, v, mem_k, mem_v = lk.compress_pack(
            q,
            k,
            v,
            window.cos,
            window.sin,
            batch=window.batch,
            ratio=window.ratio,
            positions=window.positions,
            pos0=window.offset,
        )
        self.windows[layer].append(torch.stack((mem_k, mem_v), dim=2))
        return q, k, v

    def write(self, layer: int, k: Tensor, v: Tensor, window: Window) -> None:
        rows = (t.unflatten(0, (window.batch, window.memory)).transpose(1, 2) for t in (k, v))
        self.windows[layer].append(torch.stack(tuple(rows), dim=2))

    def prefix(self, layer: int, window: Window) -> dict:
        if not window.offset:
            return {}
        earlier = MemoryTensors(
            [torch.cat(self.windows[layer][:-1], dim=3)], torch.arange(window.batch)
        )
        arguments = earlier.attention_arguments(0)
        return arguments | {"rope_mode": "affine", "cos": window.cos, "sin": window.sin}

    def memory(self) -> list[Tensor]:
        """Per layer [B, Hkv, 2, M, D]: keys before rotation and values of whole chunks."""
        return [torch.cat(windows, dim=3) for windows in self.windows]


class MemoryTensors:
    """Pages over per-layer tensors [C, Hkv, 2, M, D]: one page of M tokens per chunk."""

    def __init__(self, layers: list[Tensor], chunks: Tensor):
        """`chunks` [rows]: which of the C chunks each row reads."""
        self.layers = layers
        self.table = chunks.to(layers[0].device, torch.int32)[:, None]
        self.length = torch.full_like(self.table, layers[0].shape[3])
        self.base = torch.zeros_like(self.table)
        self.count = torch.ones_like(self.table[:, 0])

    def attention_arguments(self, layer: int) -> dict:
        return {
            "kv": self.layers[layer][:, None],
            "page_table": self.table,
            "page_len": self.length,
            "page_base": self.base,
            "num_pages": self.count,
        }
