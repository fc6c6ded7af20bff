# SPDX-License-Identifier: Apache-2.0
"""select_chunks in Triton: one program per row, and nothing that waits for the host."""

import torch
import triton
import triton.language as tl

from .._check import check, check_all
from ..ops.select_chunks import _fake
from ._arguments import FLOATS, check_tables, readable
from ._elements import elements, fresh, load_floats

# Chunks looked at together.
BLOCK = 1024


@triton.jit
def _keys(scores, chunk, num_chunks, stride, threshold):
    """Integers in the order of the scores; 0 of a chunk that does not pass."""
    inside = chunk < num_chunks
    score = load_floats(scores + chunk.to(tl.int64) * stride, inside)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    key = tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(inside & (score >= threshold), key, 0)


@triton.jit
def _count(scores, level, num_chunks, stride, threshold, BLOCK: tl.constexpr):
    """How many keys are at least `level`."""
    count = tl.full((), 0, tl.int32)
    for start in range(0, num_chunks, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        key = _keys(scores, chunk, num_chunks, stride, threshold)
        count += tl.sum((key >= level).to(tl.int32), 0)
    return count


@triton.jit
def _pad(lists, first, count, value, BLOCK: tl.constexpr):
    """lists[first .. count - 1] = value."""
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(lists + i, value, mask=(i >= first) & (i < count))


@triton.jit
def _store_pages(
    chunk_pages, page_table, page_len, page_base, selected, tokens, pages, first, base,
    pages_per_chunk, page_tokens, pages_page,
):  # fmt: skip
    """The pages of a block of chunks, those of each chunk at first .. first + pages - 1."""
    for i in range(pages_per_chunk):
        used = selected & (i < pages)
        page = tl.load(chunk_pages + i * pages_page, mask=used, other=0)
        before = page_tokens.to(tl.int64) * i
        tl.store(page_table + first + i, page, mask=used)
        length = tl.minimum(tokens - before, page_tokens)
        tl.store(page_len + first + i, length.to(tl.int32), mask=used)
        tl.store(page_base + first + i, (base + before).to(tl.int32), mask=used)


@triton.jit(do_not_specialize=["page_tokens", "pages_per_chunk", "slots", "num_chunks"])
def _select_kernel(
    scores, chunk_pages, chunk_tokens, page_table, page_len, page_base, num_pages, num_tokens,
    chunks, num_selected, threshold, num_chunks, slots, pages_per_chunk, page_tokens,
    scores_batch, scores_chunk, pages_batch, pages_chunk, pages_page, tokens_batch, tokens_chunk,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * scores_batch
    # the largest key that `slots` chunks reach, bit by bit; 0 where fewer pass
    level, bit = tl.full((), 0, tl.uint32), tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        reached = _count(scores, level | bit, num_chunks, scores_chunk, threshold, BLOCK)
        level = tl.where(reached >= slots, level | bit, level)
        bit = bit >> 1
    above = _count(scores, level + 1, num_chunks, scores_chunk, threshold, BLOCK)

    width = slots.to(tl.int64) * pages_per_chunk
    most_tokens = page_tokens.to(tl.int64) * pages_per_chunk
    chunks += row * slots
    page_table, page_len, page_base = (
        page_table + row * width, page_len + row * width, page_base + row * width,
    )  # fmt: skip
    ties, selected_before = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    tokens_before, pages_before = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    for start in range(0, num_chunks, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        key = _keys(scores, chunk, num_chunks, scores_chunk, threshold)
        # of equal scores the lower index
        tie = ((key == level) & (key > 0)).to(tl.int32)
        rank = ties + tl.cumsum(tie, 0) - tie
        selected = (key > level) | ((tie == 1) & (rank < slots - above))
        ties += tl.sum(tie, 0)
        place = selected_before + tl.cumsum(selected.to(tl.int32), 0) - 1
        selected_before += tl.sum(selected.to(tl.int32), 0)
        tl.store(chunks + place, chunk, mask=selected)

        own = chunk_tokens + row * tokens_batch + chunk.to(tl.int64) * tokens_chunk
        tokens = tl.load(own, mask=selected, other=0).to(tl.int64)
        tokens = tl.minimum(tl.maximum(tokens, 0), most_tokens)
        pages = (tokens + page_tokens - 1) // page_tokens
        first = pages_before + tl.cumsum(pages, 0) - pages
        base = tokens_before + tl.cumsum(tokens, 0) - tokens
        _store_pages(
            chunk_pages + row * pages_batch + chunk.to(tl.int64) * pages_chunk, page_table,
            page_len, page_base, selected, tokens, pages, first, base, pages_per_chunk,
            page_tokens, pages_page,
        )  # fmt: skip
        tokens_before += tl.sum(tokens, 0)
        pages_before += tl.sum(pages, 0)

    tl.store(num_pages + row, pages_before.to(tl.int32))
    tl.store(num_tokens + row, tokens_before.to(tl.int32))
    tl.store(num_selected + row, selected_before)
    _pad(chunks, selected_before, slots, -1, BLOCK)
    _pad(page_table, pages_before, width, -1, BLOCK)
    _pad(page_len, pages_before, width, 0, BLOCK)
    _pad(page_base, pages_before, width, 0, BLOCK)


def select_chunks(scores, threshold, max_chunks, chunk_pages, chunk_tokens, page_tokens):
    op = "select_chunks"
    selection = fresh(*_fake(scores, threshold, max_chunks, chunk_pages, chunk_tokens, page_tokens))
    got = str(scores.dtype).removeprefix("torch.")
    check(scores.dtype in FLOATS, op, "scores", "dtype float32, bfloat16 or float16", got)
    for name, tensor in (("chunk_pages", chunk_pages), ("chunk_tokens", chunk_tokens)):
        same = tensor.device == scores.device
        check(same, op, name, f"a tensor on the device of scores, {scores.device}", tensor.device)
    check_tables(op, scores=scores[:0])
    (batch, num_chunks), pages_per_chunk = scores.shape, chunk_pages.shape[-1]
    if batch == 0:
        return selection
    pages = chunk_pages.expand(batch, num_chunks, pages_per_chunk)
    tokens = chunk_tokens.expand(batch, num_chunks)
    rounded = torch.tensor(threshold, dtype=torch.float64, device="cpu").to(scores.dtype).item()
    chunks = selection[5]
    page_table, page_len, page_base, num_pages, num_tokens, _, num_selected = selection
    _select_kernel[(batch,)](
        elements(scores), pages, tokens, page_table, page_len, page_base, num_pages, num_tokens,
        chunks, num_selected, rounded, num_chunks, chunks.shape[1], pages_per_chunk, page_tokens,
        *scores.stride(), *pages.stride(), *tokens.stride(), BLOCK=BLOCK,
        num_warps=8,
    )  # fmt: skip
    if readable(scores):
        row, slot = (chunks >= 0).nonzero(as_tuple=True)
        used = tokens[row, chunks[row, slot].long()]
        check_all(op, "chunk_tokens", used, 0, pages_per_chunk * page_tokens)
    return selection
