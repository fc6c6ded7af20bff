# SPDX-License-Identifier: Apache-2.0
"""gather_chunks in plain PyTorch: pages of a bank as contiguous keys and values."""

import torch

from .._check import check, check_bank, check_page_values, check_range
from .._loader import backend
from ..rope import rotate


def gather_chunks(
    kv, kv_scale, page_table, page_len, page_base, num_pages, cos=None, sin=None,
    *, layer_range=None, rope_mode="none", out_dtype=None,
):  # fmt: skip
    """Gather, dequantise and rotate the pages of each row, all layers at once.

    Token j of a row's page i goes to index i * P + j, so that shapes do not depend on the data;
    pages in use come first, and `valid` marks the indices that hold a token. The result can be
    passed to memory_attention as k, v and valid.

    Args:
        kv, kv_scale, page_table, page_len, page_base, num_pages: as in memory_attention.
        cos, sin: [N, D/2], float32; affine only.
        layer_range: (first, last), layers first .. last - 1; or None: all of them.
        rope_mode: "none" or "affine", as in memory_attention.
        out_dtype: floating dtype of k and v; or None: that of a float bank, float32 of a
            quantised one.

    Returns:
        k, v: [layers, B, Hkv, max_pages * P, D], out_dtype; zeros where not valid.
        valid: [B, max_pages * P], bool.

    Raises:
        RuntimeError: shape, dtype, page or position out of range; message names the argument.

    Numerics: dequantisation and rotation in float32 (float64 for float64), rounded once.
    Backward: kv (rows that read one page add up). Devices: any, in plain PyTorch.
    Source: LycheeMemory, selective activation of compressed memory.
    """
    op = "gather_chunks"
    backend(op)
    check(rope_mode in ("none", "affine"), op, "rope_mode", "none or affine", rope_mode)
    check(kv.dim() == 6, op, "kv", "6 dimensions", kv.dim())
    check_bank(op, kv, kv_scale, 0, kv.shape[2], kv.shape[5])
    first, last = (0, kv.shape[1]) if layer_range is None else layer_range
    check_range(op, "layer_range", first, 0, last)
    check_range(op, "layer_range", last, first, kv.shape[1])
    affine = rope_mode == "affine"
    tables = cos is not None and sin is not None and page_base is not None
    expected = "cos, sin and page_base when rope_mode is affine"
    check(tables or not affine, op, "cos", expected, "None")
    positions = cos.shape[0] if affine else None
    check_page_values(op, kv, page_table, page_len, page_base, num_pages, positions)
    if out_dtype is None:
        out_dtype = kv.dtype if kv_scale is None else torch.float32
    return gather_pages(
        kv, kv_scale, page_table, page_len, page_base, num_pages, cos, sin,
        layer_range=(first, last), rope_mode=rope_mode, out_dtype=out_dtype,
    )  # fmt: skip


def gather_pages(
    kv, kv_scale, page_table, page_len, page_base, num_pages, cos=None, sin=None,
    *, layer_range, rope_mode, out_dtype,
):  # fmt: skip
    """gather_chunks without its checks, which read values: this runs under tracing too."""
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
