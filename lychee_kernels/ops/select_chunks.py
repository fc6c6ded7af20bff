# SPDX-License-Identifier: Apache-2.0
"""select_chunks: gate scores to the page table of the chunks that pass."""

import torch

from .. import ref
from .._check import check, check_all, check_dtype, check_range, check_shape
from .._loader import backend
from ..ref import ChunkSelection

_OP = "select_chunks"


def select_chunks(scores, threshold, max_chunks, chunk_pages, chunk_tokens, page_tokens):
    """Turn gate scores into the page table of the chunks to read.

    Of the chunks with score >= threshold the max_chunks best are kept (of equal scores the lower
    index), in ascending order of index. Their tokens get consecutive new positions from 0 on.

    Args:
        scores: [B, C], float32|bfloat16|float16, any strides; NaN is never selected, so it marks
            chunks a row does not have.
        threshold: float, rounded to the dtype of scores.
        max_chunks: int >= 1.
        chunk_pages: [C, n] or [B, C, n], int32, any strides, pages of each chunk in order; a chunk
            uses its first ceil(tokens / P), the rest is padding of any value.
        chunk_tokens: [C] or [B, C], int32, any strides, tokens of each chunk, 0 .. n * P; any
            value where the chunk is not selected.
        page_tokens: int >= 1, P.

    Returns:
        ChunkSelection of int32 tensors; K = min(max_chunks, C), so that shapes do not depend on
        the scores:
        page_table: [B, K * n], padded with -1.  page_len: [B, K * n], padded with 0.
        page_base: [B, K * n], new position of each page's first token, padded with 0.
        num_pages, num_tokens, num_chunks: [B], entries in use.
        chunks: [B, K], selected chunks, padded with -1.
        That is all that memory_attention needs: it splits the pages over a GPU by each row's
        num_pages, on the device, so there is no schedule to hand over and no wait for the host.

    Raises:
        RuntimeError: shape, dtype, device, tokens of a selected chunk out of range, or K * n * P
            beyond the positions of int32; message names the argument.

    Numerics: exact. Backward: not defined. Devices: CPU, CUDA. On CUDA token counts are not
        checked but cut to what the chunk's pages hold.
    Source: LycheeMemory, gate between compression and reasoning.
    Reference: lychee_kernels.ref.select_chunks.
    """
    arguments = scores, threshold, max_chunks, chunk_pages, chunk_tokens, page_tokens
    if backend(_OP) != "ref":
        return ChunkSelection(*torch.ops.lychee.select_chunks(*arguments))
    _check_inputs(scores, max_chunks, chunk_pages, chunk_tokens, page_tokens)
    selection = ref.select_chunks(*arguments)
    row, slot = (selection.chunks >= 0).nonzero(as_tuple=True)
    tokens = chunk_tokens.expand(scores.shape)[row, selection.chunks[row, slot].long()]
    check_all(_OP, "chunk_tokens", tokens, 0, chunk_pages.shape[-1] * page_tokens)
    return selection


def _check_inputs(scores, max_chunks, chunk_pages, chunk_tokens, page_tokens):
    """Returns (B, K, n)."""
    check_shape(_OP, "scores", scores, (None, None))
    got = str(scores.dtype).removeprefix("torch.")
    expected = "dtype float32, bfloat16 or float16"
    # float64 is for the reference only; the kernel refuses it
    check(scores.is_floating_point(), _OP, "scores", expected, got)
    check(max_chunks >= 1, _OP, "max_chunks", ">= 1", max_chunks)
    check_range(_OP, "page_tokens", page_tokens, 1, 2**31 - 1)
    batch, num_chunks = scores.shape
    for name, tensor, tail in (
        ("chunk_pages", chunk_pages, (num_chunks, None)),
        ("chunk_tokens", chunk_tokens, (num_chunks,)),
    ):
        sizes = (batch, *tail) if tensor.dim() > len(tail) else tail
        check_shape(_OP, name, tensor, sizes)
        check_dtype(_OP, name, tensor, torch.int32)
    slots, pages_per_chunk = min(max_chunks, num_chunks), chunk_pages.shape[-1]
    # positions of tokens are int32
    check(
        slots * pages_per_chunk * page_tokens < 2**31, _OP, "chunk_pages",
        "at most 2147483647 tokens a row",
        f"{slots * pages_per_chunk} pages of {page_tokens}",
    )  # fmt: skip
    return batch, slots, pages_per_chunk


@torch.library.register_fake(f"lychee::{_OP}")
def _fake(scores, threshold, max_chunks, chunk_pages, chunk_tokens, page_tokens):
    batch, slots, pages_per_chunk = _check_inputs(
        scores, max_chunks, chunk_pages, chunk_tokens, page_tokens
    )
    width = slots * pages_per_chunk
    shapes = [(batch, width)] * 3 + [(batch,)] * 2 + [(batch, slots), (batch,)]
    return tuple(scores.new_empty(shape, dtype=torch.int32) for shape in shapes)
