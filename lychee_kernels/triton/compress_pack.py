# SPDX-License-Identifier: Apache-2.0
"""compress_pack, its backward, compress_pack_ and write_memory_ in Triton."""

import triton
import triton.language as tl

from .._check import check, check_all, check_dtype, check_range, check_shape, check_slots
from ..ops.compress_pack import (
    _compress_pack_bwd_fake,
    _compress_pack_fake,
    _compress_pack_write_fake,
    _write_memory_fake,
)
from ..ref.compress_pack import QUANT_LEVEL, SMALLEST_AMAX
from ._arguments import FLOATS, check_bank_layout, check_rows, check_tables, half_block, readable
from ._elements import elements, fresh, load_floats, store_floats

# Rows of one head that one program moves.
PAIRS = 32


@triton.jit
def _pack_kernel(
    rows, packed, memory, cos, sin, positions,
    batch_size, count, heads, half, ratio, num_positions, pos0,
    rows_row, rows_head, packed_batch, packed_head, packed_row, memory_batch, memory_head,
    memory_row,
    MEMORY_ONLY: tl.constexpr, BACKWARD: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Rows in segment order to their interleaved places and rotated, or back and rotated back."""
    batch = tl.program_id(1).to(tl.int64)
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    i, head = pair // heads, (pair % heads).to(tl.int64)
    d = tl.arange(0, HALF)
    mask = (i < count)[:, None] & (d < half)[None, :]
    if MEMORY_ONLY:
        s, group, is_memory = i * (ratio + 1) + ratio, i, i >= 0
        row = batch * count + i
    else:
        s, group, is_memory = i, i // (ratio + 1), i % (ratio + 1) == ratio
        num_memory = count // (ratio + 1)
        window = count - num_memory
        raw_row = batch * window + i - group
        row = tl.where(is_memory, batch_size * window + batch * num_memory + group, raw_row)
    at_rows = rows + (row.to(tl.int64) * rows_row + head * rows_head)[:, None] + d[None, :]
    if BACKWARD and packed is None:
        x1 = tl.zeros((PAIRS, HALF), tl.float32)
        x2 = x1
    else:
        at_packed = packed + batch * packed_batch + d[None, :]
        at_packed += (head * packed_head + i.to(tl.int64) * packed_row)[:, None]
        source = at_packed if BACKWARD else at_rows
        x1, x2 = load_floats(source, mask), load_floats(source + half, mask)
    if cos is not None:
        if positions is None:
            position = s.to(tl.int64) + pos0
        else:
            places = positions + batch * (count * (ratio + 1) if MEMORY_ONLY else count) + s
            position = tl.load(places, mask=i < count, other=0)
        known = mask & ((position >= 0) & (position < num_positions))[:, None]
        table = position[:, None] * half + d[None, :]
        c = tl.load(cos + table, mask=known, other=0.0)
        sine = tl.load(sin + table, mask=known, other=0.0)
        if BACKWARD:
            sine = -sine
        x1, x2 = x1 * c - x2 * sine, x2 * c + x1 * sine
    if BACKWARD:
        if memory is not None:
            at = memory + batch * memory_batch + d[None, :]
            at += (head * memory_head + group.to(tl.int64) * memory_row)[:, None]
            kept = mask & is_memory[:, None]
            x1, x2 = x1 + load_floats(at, kept), x2 + load_floats(at + half, kept)
        store_floats(at_rows, x1, mask)
        store_floats(at_rows + half, x2, mask)
    else:
        store_floats(at_packed, x1, mask)
        store_floats(at_packed + half, x2, mask)


@triton.jit
def _write_kernel(
    k, v, kv, kv_scale, page_table, slot0, mem_valid,
    num_memory, heads, dim, max_pages, page_tokens, bank_pages, level, smallest,
    k_row, k_head, v_row, v_head, kv_page, kv_head, kv_part, kv_token, scale_page, scale_head,
    scale_part, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One memory row, all heads, its key or its value, into its slot."""
    j, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    written, before = j >= 0, j
    if mem_valid is not None:
        flags = mem_valid + batch * num_memory
        written = tl.load(flags + j) != 0
        before = j * 0
        for start in range(0, j, BLOCK):
            index = start + tl.arange(0, BLOCK)
            before += tl.sum(tl.load(flags + index, mask=index < j, other=0).to(tl.int32), 0)
    slot = tl.load(slot0 + batch).to(tl.int64) + before
    place, token = slot // page_tokens, slot % page_tokens
    written = written & (slot >= 0) & (place < max_pages)
    page = tl.load(page_table + batch * max_pages + place, mask=written, other=0).to(tl.int64)
    written = written & (page >= 0) & (page < bank_pages)

    head, d = tl.arange(0, HEADS).to(tl.int64), tl.arange(0, DIM)
    mask = written & (head < heads)[:, None] & (d < dim)[None, :]
    row = batch * num_memory + j
    if part == 0:
        x = load_floats(k + row * k_row + head[:, None] * k_head + d[None, :], mask)
    else:
        x = load_floats(v + row * v_row + head[:, None] * v_head + d[None, :], mask)
    if kv_scale is not None:
        amax = tl.max(tl.abs(x), 1)
        empty = amax < smallest
        inverse = tl.where(empty, 0.0, tl.div_rn(level, tl.where(empty, 1.0, amax)))
        x = tl.minimum(tl.maximum(x * inverse[:, None], -level), level)
        at = kv_scale + page * scale_page + head * scale_head + part * scale_part + token
        scale = tl.where(empty, 0.0, tl.div_rn(amax, level))
        tl.store(at, scale, mask=written & (head < heads))
    at = kv + page * kv_page + part * kv_part + token * kv_token
    store_floats(at + head[:, None] * kv_head + d[None, :], x, mask)


def compress_pack(q, k, v, cos, sin, batch, ratio, positions, pos0):
    check_dtype("compress_pack", "k", k, *FLOATS)
    outputs = _compress_pack_fake(q, k, v, cos, sin, batch, ratio, positions, pos0)
    q_rot, k_rot, v_out, mem_k, mem_v = fresh(*outputs)
    _check_inputs("compress_pack", q, k, v, cos, sin, batch, positions, pos0)
    _pack_all((q, k, v), (q_rot, k_rot, v_out), cos, sin, batch, ratio, positions, pos0)
    for x, memory in ((k, mem_k), (v, mem_v)):
        rows = x[x.shape[0] - batch * memory.shape[2] :]
        memory.copy_(rows.unflatten(0, (batch, memory.shape[2])).transpose(1, 2))
    return q_rot, k_rot, v_out, mem_k, mem_v


def compress_pack_(
    q, k, v, cos, sin, kv, kv_scale, page_table, slot0, batch, ratio, layer, mem_valid, positions,
    pos0,
):  # fmt: skip
    op = "compress_pack_"
    check_dtype(op, "k", k, *FLOATS)
    outputs = fresh(
        *_compress_pack_write_fake(
            q, k, v, cos, sin, kv, kv_scale, page_table, slot0, batch, ratio, layer, mem_valid,
            positions, pos0,
        )
    )  # fmt: skip
    _check_inputs(op, q, k, v, cos, sin, batch, positions, pos0)
    memory = k.shape[0] // (ratio + 1)
    rows = k[k.shape[0] - memory :], v[k.shape[0] - memory :]
    _check_slots(op, kv, kv_scale, page_table, slot0, mem_valid, batch, memory // batch)
    _pack_all((q, k, v), outputs, cos, sin, batch, ratio, positions, pos0)
    _write(*rows, kv, kv_scale, page_table, slot0, batch, layer, mem_valid)
    return outputs


def write_memory_(k, v, kv, kv_scale, page_table, slot0, batch, layer, mem_valid):
    op = "write_memory_"
    _write_memory_fake(k, v, kv, kv_scale, page_table, slot0, batch, layer, mem_valid)
    check_rows(op, k=k, v=v)
    _check_slots(op, kv, kv_scale, page_table, slot0, mem_valid, batch, k.shape[0] // batch)
    _write(k, v, kv, kv_scale, page_table, slot0, batch, layer, mem_valid)


def compress_pack_bwd(grad, mem_grad, cos, sin, batch, ratio, positions, pos0, memory_only):
    order = batch, ratio, positions, pos0
    _check_gradients(grad, mem_grad, cos, sin, *order, memory_only)
    outputs = _compress_pack_bwd_fake(grad, mem_grad, cos, sin, *order, memory_only)
    (out,) = fresh(outputs)
    _pack(out, grad, mem_grad, cos, sin, *order, memory_only=memory_only, backward=True)
    return out


def _check_gradients(grad, mem_grad, cos, sin, batch, ratio, positions, pos0, memory_only):
    op = "compress_pack_bwd"
    check_range(op, "batch", batch, 1, 2**31 - 1)
    check_range(op, "ratio", ratio, 1, 2**31 - 1)
    name, like = ("mem_grad", mem_grad) if grad is None else ("grad", grad)
    check(like is not None, op, "grad", "a tensor, or one as mem_grad", "None")
    check((cos is None) == (sin is None), op, "sin", "a tensor where cos is one", "None")
    check_shape(op, name, like, (batch, None, None, None))
    check_rows(op, grad=grad, mem_grad=mem_grad)
    _, heads, memory, head_dim = like.shape
    if grad is not None and not memory_only:
        memory //= ratio + 1
        check_shape(op, "grad", grad, (batch, heads, memory * (ratio + 1), head_dim))
    if cos is not None:
        check_tables(op, cos=cos, sin=sin, positions=positions)
        _check_positions(op, memory * (ratio + 1), cos, positions, pos0)
    if mem_grad is not None:
        check_shape(op, "mem_grad", mem_grad, (batch, heads, memory, head_dim))
        check_dtype(op, "mem_grad", mem_grad, like.dtype)


def _check_inputs(op, q, k, v, cos, sin, batch, positions, pos0):
    check_rows(op, k=k, q=q, v=v)
    check_tables(op, cos=cos, sin=sin, positions=positions)
    _check_positions(op, k.shape[0] // batch, cos, positions, pos0)


def _check_positions(op, rows, cos, positions, pos0):
    if positions is None:
        check_range(op, "pos0", pos0, 0, cos.shape[0] - rows)
    elif readable(positions):
        check_all(op, "positions", positions, 0, cos.shape[0] - 1)


def _check_slots(op, kv, kv_scale, page_table, slot0, mem_valid, batch, memory):
    check_bank_layout(op, kv, kv_scale)
    check_tables(op, page_table=page_table, slot0=slot0, mem_valid=mem_valid)
    if readable(slot0):
        check_slots(op, kv, page_table, slot0, mem_valid, batch, memory)


def _pack_all(inputs, outputs, cos, sin, batch, ratio, positions, pos0):
    q, k, _ = inputs
    order = (batch, ratio, positions, pos0)
    _pack(q, outputs[0], None, cos, sin, *order, memory_only=q.shape[0] != k.shape[0])
    _pack(k, outputs[1], None, cos, sin, *order)
    _pack(inputs[2], outputs[2], None, None, None, *order)


def _pack(
    rows, packed, memory, cos, sin, batch, ratio, positions, pos0, *, memory_only=False,
    backward=False,
):  # fmt: skip
    """rows [B * n, H, D] to or from packed [B, H, n, D], with memory [B, H, m, D] added."""
    total, heads, head_dim = rows.shape
    if rows.numel() == 0:
        return
    count = total // batch
    packed_strides, memory_strides = (
        (0, 0, 0) if x is None else x.stride()[:3] for x in (packed, memory)
    )
    _pack_kernel[triton.cdiv(count * heads, PAIRS), batch](
        elements(rows), elements(packed), elements(memory), cos, sin, positions,
        batch, count, heads, head_dim // 2, ratio, 0 if cos is None else cos.shape[0], pos0,
        *rows.stride()[:2], *packed_strides, *memory_strides,
        MEMORY_ONLY=memory_only, BACKWARD=backward, PAIRS=PAIRS, HALF=half_block(head_dim),
    )  # fmt: skip


def _write(k, v, kv, kv_scale, page_table, slot0, batch, layer, mem_valid):
    total, heads, head_dim = k.shape
    if k.numel() == 0:
        return
    kv = kv[:, layer]
    scale_strides = (0, 0, 0)
    if kv_scale is not None:
        kv_scale = kv_scale[:, layer]
        scale_strides = kv_scale.stride()[:3]
    _write_kernel[total // batch, batch, 2](
        elements(k), elements(v), elements(kv), kv_scale, page_table, slot0, elements(mem_valid),
        total // batch, heads, head_dim, page_table.shape[1], kv.shape[3], kv.shape[0],
        QUANT_LEVEL.get(kv.dtype, 1.0), SMALLEST_AMAX, *k.stride()[:2], *v.stride()[:2],
        *kv.stride()[:4], *scale_strides, HEADS=triton.next_power_of_2(heads),
        DIM=triton.next_power_of_2(head_dim), BLOCK=1024,
    )  # fmt: skip
