# SPDX-License-Identifier: Apache-2.0
"""gather_chunks, gather_chunks_ and gather_chunks_bwd in Triton; the backward in plain PyTorch."""

import torch
import triton
import triton.language as tl

from .._check import check_page_values, check_range
from ..ops.gather_chunks import _fake, _write_fake
from ..rope import rotate
from ._arguments import check_bank_layout, check_rows, check_tables, half_block, readable
from ._elements import elements, fresh, load_floats, store_floats

# Tokens of one program, at most.
TOKENS = 32


@triton.jit
def _gather_kernel(
    kv, kv_scale, page_table, page_len, page_base, num_pages, cos, sin, k_out, v_out, valid_out,
    bank_pages, max_pages, page_tokens, positions, num_layers, num_kv_heads, half,
    kv_page, kv_layer, kv_head, kv_part, kv_token, scale_page, scale_layer, scale_head, scale_part,
    k_layer, k_batch, k_head, k_token, v_layer, v_batch, v_head, v_token,
    ROTATE: tl.constexpr, TOKENS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One tile of a page in one layer and kv head, K and V."""
    tiles_per_page = tl.cdiv(page_tokens, TOKENS)
    slot = tl.program_id(0) // tiles_per_page
    token = tl.program_id(0) % tiles_per_page * TOKENS + tl.arange(0, TOKENS)
    batch = (tl.program_id(1) // num_kv_heads).to(tl.int64)
    head = (tl.program_id(1) % num_kv_heads).to(tl.int64)
    layer = tl.program_id(2).to(tl.int64)
    in_page = token < page_tokens
    index = slot.to(tl.int64) * page_tokens + token

    entry = batch * max_pages + slot
    used = slot < tl.load(num_pages + batch)
    page = tl.load(page_table + entry, mask=used, other=0).to(tl.int64)
    used = used & (page >= 0) & (page < bank_pages)
    length = tl.load(page_len + entry, mask=used, other=0)
    valid = used & in_page & (token < length)
    if (layer == 0) & (head == 0):
        flags = valid_out + batch * max_pages * page_tokens + index
        tl.store(flags, valid.to(tl.uint8), mask=in_page)

    if layer < num_layers:
        d = tl.arange(0, HALF)
        mask = valid[:, None] & (d < half)[None, :]
        row = kv + page * kv_page + layer * kv_layer + head * kv_head
        row += token[:, None].to(tl.int64) * kv_token + d[None, :]
        k1, k2 = load_floats(row, mask), load_floats(row + half, mask)
        v1, v2 = load_floats(row + kv_part, mask), load_floats(row + kv_part + half, mask)
        if kv_scale is not None:
            scales = kv_scale + page * scale_page + layer * scale_layer + head * scale_head + token
            k_scale = tl.load(scales, mask=valid, other=0.0)[:, None]
            v_scale = tl.load(scales + scale_part, mask=valid, other=0.0)[:, None]
            k1, k2, v1, v2 = k1 * k_scale, k2 * k_scale, v1 * v_scale, v2 * v_scale
        if ROTATE:
            position = tl.load(page_base + entry, mask=used, other=0) + token
            mask = mask & ((position >= 0) & (position < positions))[:, None]
            table = position[:, None].to(tl.int64) * half + d[None, :]
            c = tl.load(cos + table, mask=mask, other=0.0)
            s = tl.load(sin + table, mask=mask, other=0.0)
            k1, k2 = k1 * c - k2 * s, k2 * c + k1 * s
        stored = in_page[:, None] & (d < half)[None, :]
        out = k_out + layer * k_layer + batch * k_batch + head * k_head
        out += index[:, None] * k_token + d[None, :]
        store_floats(out, k1, stored)
        store_floats(out + half, k2, stored)
        out = v_out + layer * v_layer + batch * v_batch + head * v_head
        out += index[:, None] * v_token + d[None, :]
        store_floats(out, v1, stored)
        store_floats(out + half, v2, stored)


def gather_chunks(
    kv, kv_scale, page_table, page_len, page_base, num_pages, cos, sin, first_layer, last_layer,
    rope_mode, out_dtype,
):  # fmt: skip
    bank = kv, kv_scale, page_table, page_len, page_base, num_pages, cos, sin
    k, v, valid = _fake(*bank, first_layer, last_layer, rope_mode, out_dtype)
    check_bank_layout("gather_chunks", kv, kv_scale)
    check_rows("gather_chunks", out_dtype=k)
    _gather("gather_chunks", *fresh(k, v), valid, *bank, first_layer, last_layer, rope_mode)
    return k, v, valid


def gather_chunks_(
    k, v, kv, kv_scale, page_table, page_len, page_base, num_pages, cos, sin, first_layer,
    last_layer, rope_mode,
):  # fmt: skip
    bank = kv, kv_scale, page_table, page_len, page_base, num_pages, cos, sin
    valid = _write_fake(k, v, *bank, first_layer, last_layer, rope_mode)
    check_bank_layout("gather_chunks_", kv, kv_scale)
    check_rows("gather_chunks_", k=k, v=v)
    _gather("gather_chunks_", k, v, valid, *bank, first_layer, last_layer, rope_mode)
    return valid


def _gather(
    op, k, v, valid, kv, kv_scale, page_table, page_len, page_base, num_pages, cos, sin, first,
    last, rope_mode,
):  # fmt: skip
    rotated = rope_mode == 1
    check_range(op, "rope_mode", rope_mode, 0, 1)
    check_tables(op, page_table=page_table, page_len=page_len, num_pages=num_pages)
    if rotated:
        check_tables(op, page_base=page_base, cos=cos, sin=sin)
    positions = cos.shape[0] if rotated else 0
    if readable(kv):
        used = positions if rotated else None
        check_page_values(op, kv, page_table, page_len, page_base, num_pages, used)
    (batch, max_pages), (_, _, num_kv_heads, _, page_tokens, head_dim) = page_table.shape, kv.shape
    if valid.numel() == 0:
        return
    tokens = min(TOKENS, triton.next_power_of_2(page_tokens))
    tiles = max_pages * triton.cdiv(page_tokens, tokens)
    kv = kv[:, first:last]
    scale_strides = (0,) * 4 if kv_scale is None else kv_scale.stride()[:4]
    if kv_scale is not None:
        kv_scale = kv_scale[:, first:last]
    _gather_kernel[tiles, batch * num_kv_heads, max(1, last - first)](
        elements(kv), kv_scale, page_table, page_len, page_base if rotated else None, num_pages,
        cos if rotated else None, sin if rotated else None, elements(k), elements(v),
        elements(valid), kv.shape[0], max_pages, page_tokens, positions, last - first,
        num_kv_heads, head_dim // 2, *kv.stride()[:5], *scale_strides, *k.stride()[:4],
        *v.stride()[:4], ROTATE=rotated, TOKENS=tokens, HALF=half_block(head_dim),
    )  # fmt: skip


def gather_chunks_bwd(
    dk, dv, page_table, page_len, page_base, num_pages, cos, sin, bank_pages, bank_layers,
    first_layer, page_tokens, rope_mode, bank_dtype,
):  # fmt: skip
    """Rotates back and adds rows up in their pages, in float32 and in a fixed order."""
    layers, batch, num_kv_heads, _, head_dim = dk.shape
    offset = torch.arange(page_tokens, device=dk.device)
    used = torch.arange(page_table.shape[1], device=dk.device) < num_pages[:, None]
    used &= (page_table >= 0) & (page_table < bank_pages)
    # valid has a flag of every slot: [B, max_pages, P]
    valid = used[..., None] & (offset < page_len[..., None])
    # both become [B, max_pages, layers, Hkv, P, D]
    dk, dv = (x.float().unflatten(3, (-1, page_tokens)).permute(1, 3, 0, 2, 4, 5) for x in (dk, dv))
    if rope_mode == 1:
        position = torch.where(valid, page_base[..., None] + offset, 0).long()
        position = position.clamp(0, max(len(cos) - 1, 0))
        dk = rotate(dk, *(x[position][:, :, None, None] for x in (cos, -sin)))
    rows = torch.stack((dk, dv), dim=4)
    rows = torch.where(valid[:, :, None, None, None, :, None], rows, 0.0)
    total = rows.new_zeros(max(bank_pages, 1), layers, num_kv_heads, 2, page_tokens, head_dim)
    page = torch.where(used, page_table, 0).long()
    total.index_put_((page.flatten(),), rows.flatten(0, 1), accumulate=True)
    dkv = dk.new_zeros(
        bank_pages, bank_layers, num_kv_heads, 2, page_tokens, head_dim, dtype=bank_dtype
    )
    dkv[:, first_layer : first_layer + layers] = total[:bank_pages]
    return dkv
