# SPDX-License-Identifier: Apache-2.0
"""select_chunks: gate scores to the page table of the chunks that pass, without a host sync."""

import torch

from .. import ref
from .._check import check, check_dtype, check_shape
from .._loader import backend


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
    Reference: lychee_kernels.ref.select_chunks.
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
    return ref.select_chunks(scores, threshold, max_chunks, chunk_pages, chunk_tokens, page_tokens)
