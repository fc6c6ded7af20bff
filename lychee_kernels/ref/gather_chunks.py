# SPDX-License-Identifier: Apache-2.0
"""gather_chunks in plain PyTorch: its specification, and through autograd that of its backward."""

import torch

from ..rope import rotate


def gather_chunks(
    kv, kv_scale, page_table, page_len, page_base, num_pages, cos=None, sin=None,
    *, layer_range=None, rope_mode="none", out_dtype=None,
):  # fmt: skip
    if out_dtype is None:
        out_dtype = kv.dtype if kv_scale is None else torch.float32
    return gather_pages(
        kv, kv_scale, page_table, page_len, page_base, num_pages, cos, sin,
        layer_range=layer_range or (0, kv.shape[1]), rope_mode=rope_mode, out_dtype=out_dtype,
    )  # fmt: skip


def gather_chunks_(
    k, v, kv, kv_scale, page_table, page_len, page_base, num_pages, cos=None, sin=None,
    *, layer_range=None, rope_mode="none",
):  # fmt: skip
    gathered_k, gathered_v, valid = gather_chunks(
        kv, kv_scale, page_table, page_len, page_base, num_pages, cos, sin,
        layer_range=layer_range, rope_mode=rope_mode, out_dtype=k.dtype,
    )  # fmt: skip
    tokens = valid.shape[1]
    k[:, :, :, :tokens] = gathered_k
    v[:, :, :, :tokens] = gathered_v
    return valid


def gather_pages(
    kv, kv_scale, page_table, page_len, page_base, num_pages, cos=None, sin=None,
    *, layer_range, rope_mode, out_dtype,
):  # fmt: skip
    """gather_chunks with every option given; memory_attention reads its pages through this."""
    first, last = layer_range
    num_bank_pages, _, num_kv_heads, _, page_tokens, head_dim = kv.shape
    batch, max_pages = page_table.shape
    compute = torch.promote_types(out_dtype, torch.float32)

    offset = torch.arange(page_tokens, device=kv.device)
    # [B, max_pages, P]; entries at or beyond num_pages are never looked up
    used = torch.arange(max_pages, device=kv.device) < num_pages[:, None]
    valid = used[..., None] & (offset < page_len[..., None])
    if num_bank_pages == 0:
        kv = kv.new_zeros((1, *kv.shape[1:]))
        kv_scale = None if kv_scale is None else kv_scale.new_zeros((1, *kv_scale.shape[1:]))
    page = torch.where(used, page_table, 0).long()

    # x becomes [layers, B, Hkv, 2, max_pages, P, D]
    order = (2, 0, 3, 4, 1, 5)
    x = kv[:, first:last][page].permute(*order, 6).to(compute)
    if kv_scale is not None:
        x = x * kv_scale[:, first:last][page].permute(*order)[..., None].to(compute)
    # a slot that holds no token may hold anything, NaN included
    x = torch.where(valid[:, None, None, ..., None], x, 0.0)
    k, v = x.unbind(3)
    if rope_mode == "affine":
        position = torch.where(valid, page_base[..., None] + offset, 0).long()
        k = rotate(k, cos[position][:, None].to(compute), sin[position][:, None].to(compute))
    shape = (last - first, batch, num_kv_heads, max_pages * page_tokens, head_dim)
    return k.reshape(shape).to(out_dtype), v.reshape(shape).to(out_dtype), valid.flatten(1)
