# SPDX-License-Identifier: Apache-2.0
"""select_chunks in plain PyTorch, without a host sync: its specification."""

from typing import NamedTuple

import torch


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
    batch, num_chunks = scores.shape
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
