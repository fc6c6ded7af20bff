# SPDX-License-Identifier: Apache-2.0
"""memory_attention in Triton, decoding and prefill in one kernel with a fixed split of the keys;
the backward in plain PyTorch."""

import torch
import triton
import triton.language as tl

from .._check import check_page_values, check_range
from ..ops.memory_attention import _fake
from ..ref.memory_attention import all_keys, by_kv_head
from ._arguments import (
    ROPE_MODES,
    check_bank_layout,
    check_rows,
    check_tables,
    half_block,
    readable,
)
from ._elements import INTERPRETED, elements, fresh, load_floats, store_floats
from ._tiles import attend_page, attend_segment
from .gather_chunks import gather_chunks_bwd

LOG2_E = 1.4426950408889634
# Tiles of keys in one split, at least, and splits, at most. Neither looks at the batch, so that a
# row's result does not depend on the others.
SPLIT_TILES, MAX_SPLITS = 8, 64
DOT_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _attention_kernel(
    q, k, v, kv, kv_scale, page_table, page_len, page_base, num_pages, valid, cos, sin, out, lse,
    bank_pages, max_pages, page_tokens, positions, num_kv_heads, group, num_queries, num_keys, dim,
    query_stride, split_tiles, scale, split_out, split_lse,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    kv_page, kv_head, kv_part, kv_token, scale_page, scale_head, scale_part,
    ROTATE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, HALF: tl.constexpr,
    DIM: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A block of a kv head's rows, each a query token and one of the head's query heads, over one
    split of the keys: tiles of pages first, then those of the segment."""
    split = tl.program_id(1)
    batch = (tl.program_id(2) // num_kv_heads).to(tl.int64)
    own_head = (tl.program_id(2) % num_kv_heads).to(tl.int64)
    num_heads = num_kv_heads * group
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < group * num_queries
    t, head = (row // group).to(tl.int64), own_head * group + row % group
    d, wide = tl.arange(0, HALF), tl.arange(0, DIM)
    row_mask = inside[:, None] & (d < dim // 2)[None, :]
    at = q + batch * q_batch + (head * q_head + t * q_token)[:, None] + d[None, :]
    q1 = load_floats(at, row_mask).to(DOT)
    q2 = load_floats(at + dim // 2, row_mask).to(DOT)
    largest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)

    # the last key of the segment that each row sees, and the tiles up to the last of all rows
    last = num_keys - 1 - (num_queries - 1 - t) * query_stride
    seen = tl.max(tl.where(inside, last, -1), 0) + 1
    seen = tl.minimum(tl.maximum(seen, 0), num_keys).to(tl.int32)
    first = split * split_tiles
    page_tiles = first * 0
    if kv is not None:
        tiles_per_page = tl.cdiv(page_tokens, KEYS)
        used = tl.minimum(tl.maximum(tl.load(num_pages + batch), 0), max_pages)
        page_tiles = used * tiles_per_page
    end = tl.minimum(first + split_tiles, page_tiles + tl.cdiv(seen, KEYS))
    if kv is not None:
        for tile in range(first, tl.minimum(end, page_tiles)):
            entry = batch * max_pages + tile // tiles_per_page
            largest, total, acc = attend_page(
                q1, q2, largest, total, acc, kv, kv_scale, page_table, page_len, page_base, cos,
                sin, entry, tile % tiles_per_page * KEYS, own_head, inside, scale, bank_pages,
                page_tokens, positions, dim, kv_page, kv_head, kv_part, kv_token, scale_page,
                scale_head, scale_part, ROTATE, KEYS, HALF, DIM, DOT,
            )  # fmt: skip
    k += batch * k_batch + own_head * k_head
    v += batch * v_batch + own_head * v_head
    if valid is not None:
        valid += batch * num_keys
    for tile in range(tl.maximum(first - page_tiles, 0), end - page_tiles):
        largest, total, acc = attend_segment(
            q1, q2, largest, total, acc, k, v, valid, tile * KEYS, last, inside, scale, num_keys,
            dim, k_token, v_token, KEYS, HALF, DIM, DOT,
        )  # fmt: skip

    # not zero where a score is NaN
    total = tl.where(total == 0.0, 1.0, total)
    at = out + split.to(tl.int64) * split_out
    at += ((batch * num_queries + t) * num_heads + head)[:, None] * dim + wide[None, :]
    store_floats(at, acc / total[:, None], inside[:, None] & (wide < dim)[None, :])
    # natural logarithm
    sums = (largest + tl.log2(total)) * 0.6931471805599453
    rows = (batch * num_heads + head) * num_queries + t
    tl.store(lse + split.to(tl.int64) * split_lse + rows, sums, mask=inside)


@triton.jit
def _merge_kernel(
    partial, partial_lse, out, lse, splits, rows, num_heads, num_queries, dim,
    SPLITS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """One row of all splits, in their order."""
    row = tl.program_id(0).to(tl.int64)
    t, head = row % num_queries, row // num_queries % num_heads
    place = (row // num_queries // num_heads * num_queries + t) * num_heads + head
    split, d = tl.arange(0, SPLITS).to(tl.int64), tl.arange(0, DIM)
    known = split < splits
    sums = tl.load(partial_lse + split * rows + row, mask=known, other=-float("inf"))
    largest = tl.max(sums, 0)
    base = tl.where(largest == -float("inf"), 0.0, largest)
    weights = tl.exp(sums - base)
    total = tl.sum(weights, 0)
    at = partial + (split * rows + place)[:, None] * dim + d[None, :]
    x = tl.load(at, mask=known[:, None] & (d < dim)[None, :], other=0.0)
    safe = tl.where(total == 0.0, 1.0, total)
    store_floats(out + place * dim + d, tl.sum(x * weights[:, None], 0) / safe, d < dim)
    tl.store(lse + row, tl.where(total == 0.0, largest, base + tl.log(safe)))


def memory_attention(
    q, k, v, kv, kv_scale, layer, page_table, page_len, page_base, num_pages, valid, cos, sin,
    rope_mode, query_stride, softmax_scale,
):  # fmt: skip
    out, lse = _fake(
        q, k, v, kv, kv_scale, layer, page_table, page_len, page_base, num_pages, valid, cos, sin,
        rope_mode, query_stride, softmax_scale,
    )  # fmt: skip
    rotated = kv is not None and rope_mode == 1
    pages = page_table, page_len, page_base if rotated else None, num_pages
    tables = (cos, sin) if rotated else (None, None)
    _check_arguments(q, k, v, kv, kv_scale, pages, valid, tables, rope_mode)
    fresh(out, lse)
    if q.numel() == 0:
        return out, lse

    batch, num_heads, num_queries, head_dim = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    group = num_heads // num_kv_heads
    block = _block(group * num_queries, 0 if kv is None else kv.shape[4], head_dim, q.dtype)
    rows, keys = block["ROWS"], block["KEYS"]
    row_blocks = triton.cdiv(group * num_queries, rows)
    bank, bank_strides = _bank_arguments(kv, kv_scale, layer, page_table)
    most_tiles = triton.cdiv(num_keys, keys)
    if kv is not None:
        most_tiles += page_table.shape[1] * triton.cdiv(kv.shape[4], keys)
    split_tiles = max(SPLIT_TILES, triton.cdiv(most_tiles, MAX_SPLITS))
    if row_blocks > 1:
        split_tiles = max(1, most_tiles)
    splits = max(1, triton.cdiv(most_tiles, split_tiles))
    target, target_lse = out.transpose(1, 2), lse
    if splits > 1:
        target = out.new_empty((splits, *target.shape), dtype=torch.float32)
        target_lse = lse.new_empty((splits, *lse.shape))
    _attention_kernel[row_blocks, splits, batch * num_kv_heads](
        *map(elements, (q, k, v, None if kv is None else kv[:, layer])),
        None if kv_scale is None else kv_scale[:, layer], *pages, elements(valid), *tables,
        elements(target), target_lse, *bank, 0 if cos is None else cos.shape[0], num_kv_heads,
        group, num_queries, num_keys, head_dim, query_stride, split_tiles, softmax_scale * LOG2_E,
        out.numel(), lse.numel(), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *bank_strides, ROTATE=rotated, **block,
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[(lse.numel(),)](
            target, target_lse, elements(out.transpose(1, 2)), lse, splits, lse.numel(), num_heads,
            num_queries, head_dim, SPLITS=triton.next_power_of_2(splits), DIM=block["DIM"],
        )  # fmt: skip
    return out, lse


def _check_arguments(q, k, v, kv, kv_scale, pages, valid, tables, rope_mode):
    op = "memory_attention"
    check_range(op, "rope_mode", rope_mode, 0, len(ROPE_MODES) - 1)
    check_rows(op, q=q, k=k, v=v)
    check_tables(op, valid=valid, cos=tables[0], sin=tables[1])
    if kv is None:
        return
    names = ("page_table", "page_len", "page_base", "num_pages")
    check_bank_layout(op, kv, kv_scale)
    check_tables(op, **dict(zip(names, pages, strict=True)))
    if readable(kv):
        positions = None if tables[0] is None else tables[0].shape[0]
        check_page_values(op, kv, *pages, positions)


def _block(rows, page_tokens, head_dim, dtype):
    """Sizes of a program's tiles; they depend on no batch and no length."""
    dot = tl.float32 if INTERPRETED else DOT_TYPES[dtype]
    # wide heads and float32 each take twice the shared memory
    most = 64 >> ((dot == tl.float32) + (head_dim > 128))
    fewest = triton.next_power_of_2(page_tokens) if page_tokens else most
    return {
        "ROWS": min(most, max(16, triton.next_power_of_2(rows))),
        "KEYS": max(16, min(most, fewest)),
        "HALF": half_block(head_dim),
        "DIM": max(16, triton.next_power_of_2(head_dim)),
        "DOT": dot,
        # four would spill registers
        "num_warps": 8,
    }


def _bank_arguments(kv, kv_scale, layer, page_table):
    """Sizes and strides of one layer, or zeros."""
    if kv is None:
        return (0, 0, 1), (0,) * 7
    scale_strides = (0, 0, 0) if kv_scale is None else kv_scale[:, layer].stride()[:3]
    sizes = kv.shape[0], page_table.shape[1], kv.shape[4]
    return sizes, (*kv[:, layer].stride()[:4], *scale_strides)


def memory_attention_bwd(
    dout, q, k, v, out, lse, kv, kv_scale, layer, page_table, page_len, page_base, num_pages,
    valid, cos, sin, rope_mode, query_stride, softmax_scale, bank_wanted,
):  # fmt: skip
    """Gathers the pages, goes through dense scores in float32, and adds up in the pages."""
    if kv is not None:
        # pages and positions that the kernel did not follow held nothing
        outside = (page_table < 0) | (page_table >= kv.shape[0])
        if rope_mode == ROPE_MODES.index("affine"):
            outside |= (page_base < 0) | (page_base.long() + page_len > cos.shape[0])
        page_table, page_len = (x.masked_fill(outside, 0) for x in (page_table, page_len))
    pages = kv, kv_scale, layer, page_table, page_len, page_base, num_pages
    keys, values, visible = all_keys(
        q, k, v, pages, valid, cos, sin, ROPE_MODES[rope_mode], query_stride
    )
    num_kv_heads, num_queries = k.shape[1], q.shape[2]
    # each becomes [B, Hkv, G * T, D]
    q_rows, dout, out = (by_kv_head(x, num_kv_heads).float() for x in (q, dout, out))
    lse = by_kv_head(lse[..., None], num_kv_heads)
    scores = (q_rows @ keys.mT * softmax_scale).unflatten(
        2, (q.shape[1] // num_kv_heads, num_queries)
    )
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf).flatten(2, 3)
    weights = (scores - torch.where(lse == -torch.inf, 0.0, lse)).exp()
    dvalues = weights.mT @ dout
    dscores = weights * (dout @ values.mT - (dout * out).sum(-1, keepdim=True)) * softmax_scale
    dq = (dscores @ keys).view(q.shape).to(q.dtype)
    dkeys = dscores.mT @ q_rows
    memory = keys.shape[2] - k.shape[2]
    dk, dv = (x[:, :, memory:].to(k.dtype).contiguous() for x in (dkeys, dvalues))
    if not bank_wanted:
        return dq, dk, dv, q.new_empty(0)
    dkv = gather_chunks_bwd(
        dkeys[None, :, :, :memory], dvalues[None, :, :, :memory], page_table, page_len, page_base,
        num_pages, cos, sin, kv.shape[0], kv.shape[1], layer, kv.shape[4], rope_mode, kv.dtype,
    )  # fmt: skip
    return dq, dk, dv, dkv
