# SPDX-License-Identifier: Apache-2.0
"""compress_pack, compress_pack_ and write_memory_ in plain PyTorch: their specification."""

import torch

from ..rope import rotate

QUANT_LEVEL = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# A row whose largest magnitude is below this is stored as zeros with scale 0.
SMALLEST_AMAX = 1e-30


def compress_pack(q, k, v, cos, sin, *, batch, ratio, positions=None, pos0=0):
    rows = k.shape[0] // batch
    memory = rows // (ratio + 1)
    window = rows - memory
    s = torch.arange(rows, device=k.device)
    b = torch.arange(batch, device=k.device)[:, None]
    group = s // (ratio + 1)
    is_memory = s % (ratio + 1) == ratio
    # [B, n], where the row at interleaved index s lies in segment order
    source = torch.where(is_memory, batch * window + b * memory + group, b * window + s - group)
    if positions is None:
        positions = (pos0 + s).expand(batch, rows)
    q_positions = positions
    q_source = source
    if q.shape[0] != k.shape[0]:
        q_positions = positions[:, is_memory]
        q_source = source[:, is_memory] - batch * window

    q_rot = _rotate_rows(q[q_source], cos[q_positions], sin[q_positions])
    k_rot = _rotate_rows(k[source], cos[positions], sin[positions])
    v_out = v[source].transpose(1, 2).contiguous()
    mem_k, mem_v = (
        x[batch * window :].unflatten(0, (batch, memory)).transpose(1, 2).contiguous()
        for x in (k, v)
    )
    return q_rot, k_rot, v_out, mem_k, mem_v


def compress_pack_(
    q, k, v, cos, sin, kv, kv_scale, page_table, slot0,
    *, batch, ratio, layer, mem_valid=None, positions=None, pos0=0,
):  # fmt: skip
    q_rot, k_rot, v_out, *_ = compress_pack(
        q, k, v, cos, sin, batch=batch, ratio=ratio, positions=positions, pos0=pos0
    )
    memory = k.shape[0] // (ratio + 1)
    write_memory_(
        k[-memory:], v[-memory:], kv, kv_scale, page_table, slot0,
        batch=batch, layer=layer, mem_valid=mem_valid,
    )  # fmt: skip
    return q_rot, k_rot, v_out


def write_memory_(k, v, kv, kv_scale, page_table, slot0, *, batch, layer, mem_valid=None):
    memory = k.shape[0] // batch
    page_tokens = kv.shape[4]
    if mem_valid is None:
        mem_valid = torch.ones(batch, memory, dtype=torch.bool, device=k.device)
    b, j = mem_valid.nonzero(as_tuple=True)
    # the g-th valid row of b goes to slot slot0[b] + g
    slot = slot0[b] + (mem_valid.cumsum(1) - 1)[b, j]
    page = page_table[b, slot // page_tokens].long()
    for part, x in enumerate((k, v)):
        stored, scale = quantise(x.unflatten(0, (batch, memory))[b, j], kv.dtype)
        kv[page, layer, :, part, slot % page_tokens] = stored
        if kv_scale is not None:
            kv_scale[page, layer, :, part, slot % page_tokens] = scale


def quantise(x, dtype):
    """Rows [..., D] in a bank's dtype, and their scales [...] (None for float banks)."""
    if dtype not in QUANT_LEVEL:
        return x.to(dtype), None
    level = QUANT_LEVEL[dtype]
    x = x.float()
    amax = x.abs().amax(-1)
    empty = amax < SMALLEST_AMAX
    # a tensor, since a number over a tensor is a reciprocal and a product, rounded twice
    inverse = torch.where(empty, 0.0, amax.new_tensor(level) / amax)
    x = (x * inverse[..., None]).clamp(-level, level)
    scale = torch.where(empty, 0.0, amax / level)
    return (x.round() if dtype == torch.int8 else x).to(dtype), scale


def _rotate_rows(x, cos, sin):
    """[B, n, H, D] rows and [B, n, D/2] tables -> [B, H, n, D], rounded once."""
    compute = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos[:, None].to(compute), sin[:, None].to(compute)
    return rotate(x.transpose(1, 2).to(compute), cos, sin).to(x.dtype).contiguous()
