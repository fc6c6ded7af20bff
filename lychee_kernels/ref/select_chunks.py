# SPDX-License-Identifier: Apache-2.0
"""select_chunks in plain PyTorch: gate scores to the page table of the chunks that pass."""

from typing import NamedTuple

import torch

from .._check import check, check_dtype, check_shape
from .._loader import backend


class ChunkSelection(NamedTuple):
    """Pages of the selected chunks, ready for memory_attention, and which chunks they are."""

    page_table: torch.Tensor
    page_len: torch.Tensor
    page_base: torch.Tensor
    num_pages: torch.Tensor
    num_tokens: torch.Tensor
    chunks: torch.Tensor
    num_chunks: torch.Tensor


def select_chunks(scores, threshold, max_chunks, chunk_pages, chunk_tokens, page_tokens):
    """Turn gate scores into the page table of the chunks to read.

    Of the chunks with score >= threshold the max_chunks best are kept (of equal scores the lower
    index), in ascending order of index. Their tokens get consecutive new positions from 0 on.

    Args:
        scores: [B, C], float; NaN is never selected, so it marks chunks a row does not have.
        threshold: float.
        max_chunks: int >= 1.
        chunk_pages: [C, n] or [B, C, n], int32, pages of each chunk in order; a chunk uses its
            first ceil(tokens / P), the rest is padding of any value.
        chunk_tokens: [C] or [B, C], int32, tokens of each chunk, at most n * P.
        page_tokens: int, P.

    Returns:
        ChunkSelection of int32 tensors; K = min(max_chunks, C):
        page_table: [B, K * n], padded with -1.  page_len: [B, K * n], padded with 0.
        page_base: [B, K * n], new position of each page's first token, padded with 0.
        num_pages, num_tokens, num_chunks: [B], entries in use.
        chunks: [B, K], selected chunks, padded with -1.

    Raises:
        RuntimeError: shape or dtype; message names the argument.

    Numerics: exact. Backward: not defined. Devices: any, in plain PyTorch, without a host sync.
    Source: LycheeMemory, gate between compression and reasoning.
    """
    op = "select_chunks"
    backend(op)
    check_shape(op, "scores", scores, (None, None))
    check(scores.is_floating_point(), op, "scores", "a float tensor", scores.dtype)
    check(max_chunks >= 1, op, "max_chunks", ">= 1", max_chunks)
    check(page_tokens >= 1, op, "page_tokens", ">= 1", page_tokens)
    batch, num_chunks = scores.shape
    for name, tensor, tail in (
        ("chunk_pages", chunk_pages, (num_chunks, None)),
        ("chunk_tokens", chunk_tokens, (num_chunks,)),
    ):
        batched = (batch, *tail) if tensor.dim() > len(tail) else tail
        check_shape(op, name, tensor, batched)
    check_dtype(op, "chunk_pages", chunk_pages, torch.int32)
    check_dtype(op, "chunk_tokens", chunk_tokens, torch.int32)
    pages_per_chunk = chunk_pages.shape[-1]
    slots = min(max_chunks, num_chunks)
    chunk_pages = chunk_pages.expand(batch, num_chunks, pages_per_chunk)
    chunk_tokens = chunk_tokens.expand(batch, num_chunks).long()

    # a NaN compares false; stable sorts keep the lower index among equal scores
    passes = scores >= threshold
    ranked = (
        torch.where(passes, scores, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    )
    ranked = ranked.gather(1, _true_first(passes.gather(1, ranked)))
    selected = torch.zeros_like(passes).scatter_(1, ranked[:, :slots], True) & passes
    # [B, slots]: selected chunks in ascending order, then chunks that are not
    chunks = _true_first(selected)[:, :slots]
    taken = selected.gather(1, chunks)
    tokens = torch.where(taken, chunk_tokens.gather(1, chunks), 0)
    base = tokens.cumsum(1) - tokens

    # pages and lengths are [B, slots, pages_per_chunk]
    offset = torch.arange(pages_per_chunk, device=scores.device) * page_tokens
    length = (tokens[..., None] - offset).clamp(0, page_tokens)
    pages = chunk_pages.gather(1, chunks[..., None].expand(-1, -1, pages_per_chunk))
    in_use = (length > 0).flatten(1)
    # pages in use move to the front, in order
    order = _true_first(in_use)
    in_use = in_use.gather(1, order)

    def compact(x, padding):
        return torch.where(in_use, x.flatten(1).gather(1, order), padding).int()

    return ChunkSelection(
        page_table=compact(pages, -1),
        page_len=compact(length, 0),
        page_base=compact(base[..., None] + offset, 0),
        num_pages=in_use.sum(1).int(),
        num_tokens=tokens.sum(1).int(),
        chunks=torch.where(taken, chunks, -1).int(),
        num_chunks=taken.sum(1).int(),
    )


def _true_first(mask):
    """Indices [B, N] of the true entries of each row, in order, then of the false ones."""
    return mask.byte().sort(dim=1, descending=True, stable=True).indices
