# SPDX-License-Identifier: Apache-2.0
"""Argument checks shared by fake tensors and the reference backend, in the C++ checks' words."""

import torch

# float64 is for the reference only; the kernels refuse it.
BANK_DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn, torch.float64,
)  # fmt: skip


def check(condition, op, argument, expected, got):
    if not condition:
        raise RuntimeError(f"{op}: {argument}: expected {expected}, got {got}")


def check_shape(op, argument, tensor, sizes):
    """Sizes of None match anything."""
    same = tensor.dim() == len(sizes) and all(
        want is None or want == size for want, size in zip(sizes, tensor.shape, strict=True)
    )
    expected = ", ".join("*" if size is None else str(size) for size in sizes)
    check(same, op, argument, f"shape [{expected}]", list(tensor.shape))


def check_dtype(op, argument, tensor, *dtypes):
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    expected = " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    got = str(tensor.dtype).removeprefix("torch.")
    check(tensor.dtype in dtypes, op, argument, f"dtype {expected}", got)


def check_range(op, argument, value, low, high):
    check(low <= value <= high, op, argument, f"{low} <= value <= {high}", value)


def check_bank(op, kv, kv_scale, layer, num_kv_heads, head_dim):
    check_shape(op, "kv", kv, (None, None, num_kv_heads, 2, None, head_dim))
    check_dtype(op, "kv", kv, *BANK_DTYPES)
    check_range(op, "layer", layer, 0, kv.shape[1] - 1)
    quantised = kv.dtype in (torch.int8, torch.float8_e4m3fn)
    wanted = "a tensor with this bank dtype" if quantised else "None with this bank dtype"
    got = "None" if kv_scale is None else "a tensor"
    check(quantised == (kv_scale is not None), op, "kv_scale", wanted, got)
    if kv_scale is not None:
        check_shape(op, "kv_scale", kv_scale, kv.shape[:5])


def check_page_values(op, kv, page_table, page_len, page_base, num_pages, table_positions):
    """Page numbers, lengths and positions of the pages in use; reads the tensors' values."""
    used = torch.arange(page_table.shape[1], device=page_table.device) < num_pages[:, None]
    check_all(op, "num_pages", num_pages, 0, page_table.shape[1])
    check_all(op, "page_table", page_table[used], 0, kv.shape[0] - 1)
    check_all(op, "page_len", page_len[used], 0, kv.shape[4])
    if table_positions is not None:
        check_all(op, "page_base", page_base[used], 0, table_positions - page_len[used])


def check_slots(op, kv, page_table, slot0, mem_valid, batch, memory):
    """Where memory rows go: enough pages per row, all inside the bank; reads the values."""
    check_shape(op, "page_table", page_table, (batch, None))
    check_shape(op, "slot0", slot0, (batch,))
    for name, tensor in (("page_table", page_table), ("slot0", slot0)):
        check_dtype(op, name, tensor, torch.int32)
    count = torch.full_like(slot0, memory)
    if mem_valid is not None:
        check_shape(op, "mem_valid", mem_valid, (batch, memory))
        check_dtype(op, "mem_valid", mem_valid, torch.bool)
        count = mem_valid.sum(1)
    check_all(op, "slot0", slot0, 0, 2**31 - 1)
    page_tokens, width, slot0 = kv.shape[4], page_table.shape[1], slot0.long()
    first, end = slot0 // page_tokens, (slot0 + count + page_tokens - 1) // page_tokens
    needed = torch.where(count > 0, end, 0).max().item() if batch else 0
    check(needed <= width, op, "page_table", f"at least {needed} pages per row", width)
    page = torch.arange(width, device=kv.device)
    used = (page >= first[:, None]) & (page < end[:, None]) & (count > 0)[:, None]
    check_all(op, "page_table", page_table[used], 0, kv.shape[0] - 1)


def check_all(op, argument, values, low, high):
    """low <= values <= high for each value; high is a number or a tensor like values."""
    high = torch.as_tensor(high, device=values.device).expand_as(values)
    outside = (values < low) | (values > high)
    if outside.any():
        check_range(op, argument, values[outside][0].item(), low, high[outside][0].item())
