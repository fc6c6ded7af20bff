# SPDX-License-Identifier: Apache-2.0
"""Attention of a block of query rows to one tile of keys: of a page, or of the segment.

The rows carry their largest score, the sum of their weights and their weighted values from tile to
tile; scores are in base 2.
"""

import triton
import triton.language as tl

from ._elements import load_floats


@triton.jit
def _attend(
    q1, q2, k1, k2, values, k_scale, v_scale, visible, scale, largest, total, acc, DOT: tl.constexpr
):
    """One tile of keys: k1, k2 [D/2, keys] and values [keys, D] before their scales."""
    scores = tl.dot(q1, k1.to(DOT), input_precision="ieee")
    scores = tl.dot(q2, k2.to(DOT), scores, input_precision="ieee") * scale
    if k_scale is not None:
        scores *= k_scale[None, :]
    scores = tl.where(visible, scores, -float("inf"))
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    # a row that sees no key yet has no largest score to subtract
    base = tl.where(new_largest == -float("inf"), 0.0, new_largest)
    weights = tl.exp2(scores - base[:, None])
    correction = tl.exp2(largest - base)
    total = total * correction + tl.sum(weights, 1)
    if v_scale is not None:
        weights *= v_scale[None, :]
    acc = tl.dot(weights.to(DOT), values.to(DOT), acc * correction[:, None], input_precision="ieee")
    return new_largest, total, acc


@triton.jit
def attend_page(
    q1, q2, largest, total, acc, kv, kv_scale, page_table, page_len, page_base, cos, sin, entry,
    first_token, own_head, inside, scale, bank_pages, page_tokens, positions, dim,
    kv_page, kv_head, kv_part, kv_token, scale_page, scale_head, scale_part,
    ROTATE: tl.constexpr, KEYS: tl.constexpr, HALF: tl.constexpr, DIM: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """KEYS tokens of one page, from first_token on."""
    half = dim // 2
    d, wide = tl.arange(0, HALF), tl.arange(0, DIM)
    token = first_token + tl.arange(0, KEYS)
    page = tl.load(page_table + entry).to(tl.int64)
    length = tl.minimum(tl.load(page_len + entry), page_tokens)
    stored = (token < length) & (page >= 0) & (page < bank_pages)
    mask = stored[None, :] & (d < half)[:, None]
    base = kv + page * kv_page + own_head * kv_head
    offset = token.to(tl.int64) * kv_token
    key = base + offset[None, :] + d[:, None]
    k1, k2 = load_floats(key, mask), load_floats(key + half, mask)
    value_mask = stored[:, None] & (wide < dim)[None, :]
    values = load_floats(base + kv_part + offset[:, None] + wide[None, :], value_mask)
    if ROTATE:
        position = tl.load(page_base + entry) + token
        mask = mask & ((position >= 0) & (position < positions))[None, :]
        table = position[None, :].to(tl.int64) * half + d[:, None]
        c = tl.load(cos + table, mask=mask, other=0.0)
        s = tl.load(sin + table, mask=mask, other=0.0)
        k1, k2 = k1 * c - k2 * s, k2 * c + k1 * s
    if kv_scale is None:
        k_scale = None
        v_scale = None
    else:
        scales = kv_scale + page * scale_page + own_head * scale_head + token
        k_scale = tl.load(scales, mask=stored, other=0.0)
        v_scale = tl.load(scales + scale_part, mask=stored, other=0.0)
    visible = stored[None, :] & inside[:, None]
    return _attend(
        q1, q2, k1, k2, values, k_scale, v_scale, visible, scale, largest, total, acc, DOT
    )


@triton.jit
def attend_segment(
    q1, q2, largest, total, acc, k, v, valid, first_token, last, inside, scale, num_keys, dim,
    k_token, v_token,
    KEYS: tl.constexpr, HALF: tl.constexpr, DIM: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """KEYS keys of the segment, of which row r sees those up to last[r]; k, v, valid are those of
    the batch entry and the kv head."""
    half = dim // 2
    d, wide = tl.arange(0, HALF), tl.arange(0, DIM)
    token = first_token + tl.arange(0, KEYS)
    stored = token < num_keys
    if valid is not None:
        stored = tl.load(valid + token, mask=stored, other=0) != 0
    key = k + token[None, :].to(tl.int64) * k_token + d[:, None]
    mask = stored[None, :] & (d < half)[:, None]
    k1, k2 = load_floats(key, mask), load_floats(key + half, mask)
    value = v + token[:, None].to(tl.int64) * v_token + wide[None, :]
    values = load_floats(value, stored[:, None] & (wide < dim)[None, :])
    visible = stored[None, :] & inside[:, None] & (token[None, :] <= last[:, None])
    return _attend(q1, q2, k1, k2, values, None, None, visible, scale, largest, total, acc, DOT)
