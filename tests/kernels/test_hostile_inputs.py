# SPDX-License-Identifier: Apache-2.0
"""Inputs that would expose a careless kernel: garbage tables, sentinels around every buffer, odd
sizes, repeated runs, other thread counts and instruction sets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import BY_NAME, make_inputs

import lychee_kernels
from lychee_kernels import (
    compress_pack,
    compress_pack_,
    memory_attention,
    rope_tables,
    write_memory_,
)

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
BANK_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]
QUANTISED = (torch.int8, torch.float8_e4m3fn)
each_bank = pytest.mark.parametrize("bank_dtype", BANK_DTYPES, ids=str)


def window(dtype=torch.float32, batch=2, groups=5, ratio=3, heads=3, kv_heads=2, dim=40):
    """Arguments of compress_pack: inputs and options."""
    rows = batch * groups * (ratio + 1)
    q = torch.randn(rows, heads, dim).to(dtype)
    k, v = torch.randn(2, rows, kv_heads, dim).to(dtype)
    tables = rope_tables(64, 100.0 ** -(torch.arange(0, dim, 2) / dim))
    return (q, k, v, *tables), {"batch": batch, "ratio": ratio}


def bank_for(bank_dtype, pages=9, kv_heads=2, page_tokens=4, dim=40):
    shape = (pages, 2, kv_heads, 2, page_tokens, dim)
    scale = torch.full(shape[:5], 7.0) if bank_dtype in QUANTISED else None
    return torch.full(shape, 7.0).to(bank_dtype), scale


def bits(tensor):
    """Something torch.equal compares bit by bit, NaN included."""
    return tensor.contiguous().view(torch.uint8) if tensor.numel() else tensor


@each_bank
def test_page_table_entries_beyond_the_last_slot_are_not_read(bank_dtype):
    inputs, options = window()
    options |= {"layer": 1, "mem_valid": torch.rand(2, 5) > 0.3}
    # five slots from 6 on lie in table entries 1 and 2
    tables = {
        "clean": torch.tensor([[0, 3, 5, 0], [0, 2, 8, 0]]),
        "garbage": torch.tensor([[INT32_MIN, 3, 5, INT32_MAX], [INT32_MAX, 2, 8, INT32_MIN]]),
    }
    slot0 = torch.tensor([6, 6], dtype=torch.int32)
    results = []
    for table in tables.values():
        kv, kv_scale = bank_for(bank_dtype)
        compress_pack_(*inputs, kv, kv_scale, table.int(), slot0, **options)
        memory = (x[-10:] for x in inputs[1:3])
        written, written_scale = bank_for(bank_dtype)
        keep = {name: options[name] for name in ("batch", "layer", "mem_valid")}
        write_memory_(*memory, written, written_scale, table.int(), slot0, **keep)
        assert torch.equal(bits(kv), bits(written))
        results.append((kv, kv_scale))
    assert torch.equal(bits(results[0][0]), bits(results[1][0]))
    if results[0][1] is not None:
        assert torch.equal(results[0][1], results[1][1])


def test_a_row_without_valid_memory_needs_no_pages():
    inputs, options = window()
    kv, _ = bank_for(torch.float32)
    before = kv.clone()
    table = torch.full((2, 1), INT32_MIN, dtype=torch.int32)
    slot0 = torch.full((2,), INT32_MAX, dtype=torch.int32)
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    compress_pack_(*inputs, kv, None, table, slot0, **options, layer=0, mem_valid=nothing)
    assert torch.equal(kv, before)


@pytest.mark.parametrize("garbage", [INT32_MIN, INT32_MAX, -1])
@pytest.mark.parametrize("name", ["pages", "prefix", "int8", "float8", "decode"])
def test_attention_does_not_read_unused_page_table_entries(name, garbage):
    q, k, v, options = make_inputs(BY_NAME[name])
    expected = memory_attention(q, k, v, **options)
    unused = torch.arange(options["page_table"].shape[1]) >= options["num_pages"][:, None]
    assert unused.any()
    for field in ("page_table", "page_len", "page_base"):
        options[field] = options[field].masked_fill(unused, garbage)
    actual = memory_attention(q, k, v, **options)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


def inside(tensor, around=torch.nan):
    """The same values as a slice of a larger buffer of sentinels: (slice, buffer)."""
    if not tensor.is_floating_point() or tensor.dtype == torch.float8_e4m3fn:
        around = 85
    shape = [size + 3 for size in tensor.shape[:-1]]
    buffer = torch.full([*shape, tensor.shape[-1] + 16], float(around)).to(tensor.dtype)
    part = buffer[tuple(slice(1, 1 + size) for size in tensor.shape[:-1])]
    part = part[..., 8 : 8 + tensor.shape[-1]]
    part.copy_(tensor)
    assert part.shape == tensor.shape
    return part, buffer


@each_bank
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nothing_outside_the_slices_is_read_or_written(dtype, bank_dtype):
    inputs, options = window(dtype)
    kv, kv_scale = bank_for(bank_dtype)
    table = torch.tensor([[1, 4, 6], [0, 8, 2]], dtype=torch.int32)
    slot0 = torch.tensor([3, 6], dtype=torch.int32)
    slices, buffers = zip(*(inside(x) for x in inputs[:3]), strict=True)
    before = [x.clone() for x in buffers]
    kv_slice, kv_buffer = inside(kv)
    scale_slice, scale_buffer = (None, None) if kv_scale is None else inside(kv_scale)
    expected = compress_pack_(*inputs, kv, kv_scale, table, slot0, **options, layer=1)
    actual = compress_pack_(
        *slices, *inputs[3:], kv_slice, scale_slice, table, slot0, **options, layer=1
    )
    assert all(map(torch.equal, actual, expected))
    assert not any(x.isnan().any() for x in actual)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(buffers, before, strict=True))
    # the bank's buffer holds what one gets by copying the written bank into sentinels
    assert torch.equal(bits(kv_buffer), bits(inside(kv)[1]))
    if kv_scale is not None:
        assert torch.equal(bits(scale_buffer), bits(inside(kv_scale)[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_slices_are_those_of_tensors(dtype):
    inputs, options = window(dtype)
    leaves = [x.requires_grad_() for x in inputs[:3]]
    outputs = compress_pack(*leaves, *inputs[3:], **options)
    weights = [torch.randn_like(x) for x in outputs]
    expected = torch.autograd.grad(outputs, leaves, weights, retain_graph=True)
    # transposed and offset gradients, as attention hands them back; and broadcast ones
    strided = [inside(x.transpose(1, 2))[0].transpose(1, 2) for x in weights]
    actual = torch.autograd.grad(outputs, leaves, strided, retain_graph=True)
    assert all(map(torch.equal, actual, expected))
    ones = torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs],
                               retain_graph=True)  # fmt: skip
    broadcast = torch.autograd.grad([x.sum() for x in outputs], leaves)
    assert all(map(torch.equal, broadcast, ones))


@pytest.mark.parametrize(
    "sizes",
    [
        {"groups": 0}, {"heads": 0}, {"kv_heads": 0}, {"heads": 0, "kv_heads": 0},
        {"batch": 1, "groups": 1, "ratio": 1, "heads": 1, "kv_heads": 1, "dim": 8},
        {"batch": 7, "groups": 13, "ratio": 1, "heads": 5, "kv_heads": 5, "dim": 248},
        {"batch": 1, "groups": 17, "ratio": 11, "heads": 2, "kv_heads": 1, "dim": 136},
    ],
    ids=str,
)  # fmt: skip
def test_sizes_of_zero_one_and_primes(sizes):
    inputs, options = window(**sizes)
    inputs = (*inputs[:3], *(x.repeat(4, 1) for x in inputs[3:]))
    shape = (inputs[1].shape[1], inputs[1].shape[2])
    rows = inputs[1].shape[0] // options["batch"]
    memory = rows // (options["ratio"] + 1)
    leaves = [x.requires_grad_() for x in inputs[:3]]
    outputs = compress_pack(*leaves, *inputs[3:], **options)
    expected = lychee_kernels.ref.compress_pack(*leaves, *inputs[3:], **options)
    weights = [torch.randn_like(x) for x in outputs]
    for actual, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-6)
    grads = torch.autograd.grad(outputs, leaves, weights)
    for actual, wanted in zip(
        grads, torch.autograd.grad(expected, leaves, weights), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(actual, wanted, rtol=0, atol=2e-6)
    kv = torch.full((options["batch"] * memory, 1, shape[0], 2, 1, shape[1]), torch.nan)
    table = torch.randperm(kv.shape[0]).int().view(options["batch"], memory)
    k, v = (x.detach()[options["batch"] * (rows - memory) :] for x in inputs[1:3])
    slot0 = torch.zeros(options["batch"], dtype=torch.int32)
    write_memory_(k, v, kv, None, table, slot0, batch=options["batch"], layer=0)
    stored = kv[table.flatten().long(), 0, :, :, 0].unbind(2)
    assert torch.equal(stored[0], k) and torch.equal(stored[1], v)


def run_everything():
    """Each op forward and backward on fixed inputs: name -> tensor."""
    torch.manual_seed(0)
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs, options = window(dtype, groups=40, heads=6, dim=64)
        inputs = (*inputs[:3], *(x.repeat(3, 1) for x in inputs[3:]))
        leaves = [x.requires_grad_() for x in inputs[:3]]
        outputs = compress_pack(*leaves, *inputs[3:], **options)
        weights = [torch.randn_like(x) for x in outputs]
        grads = torch.autograd.grad(outputs, leaves, weights)
        names = ("q_rot", "k_rot", "v_out", "mem_k", "mem_v", "dq", "dk", "dv")
        results |= {f"{n} {dtype}": x for n, x in zip(names, (*outputs, *grads), strict=True)}
        for bank_dtype in BANK_DTYPES:
            kv, kv_scale = bank_for(bank_dtype, pages=22, dim=64)
            table = torch.randperm(22)[:20].int().view(2, 10)
            slot0 = torch.zeros(2, dtype=torch.int32)
            with torch.no_grad():
                compress_pack_(*inputs, kv, kv_scale, table, slot0, **options, layer=1)
            results[f"kv {dtype} {bank_dtype}"] = kv
            if kv_scale is not None:
                results[f"kv_scale {dtype} {bank_dtype}"] = kv_scale
    for name in ("primes", "decode", "prefix", "int8", "float8"):
        q, k, v, options = make_inputs(BY_NAME[name])
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, lse = memory_attention(*leaves, **options)
        grads = torch.autograd.grad(out, leaves, torch.randn_like(out))
        names = ("out", "lse", "dq", "dk", "dv")
        results |= {f"attention {name} {n}": x for n, x in zip(names, (out, lse, *grads),
                                                               strict=True)}  # fmt: skip
    return {name: x.detach() for name, x in results.items()}


def test_results_repeat_bit_by_bit_with_one_and_two_threads():
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 1, 2, 2):
            torch.set_num_threads(count)
            runs.append(run_everything())
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert [n for n, x in run.items() if not torch.equal(bits(x), bits(runs[0][n]))] == []


SAVE = (
    "import sys, torch; sys.path.insert(0, {folder!r}); import test_hostile_inputs as t; "
    "torch.set_num_threads(1); torch.save(t.run_everything(), {path!r})"
)


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_instruction_sets_agree(isa, tmp_path):
    order = ["generic", "avx2", "avx512", "amx"]
    if order.index(isa) >= order.index(lychee_kernels.cpu_isa()):
        pytest.skip(f"this processor uses {lychee_kernels.cpu_isa()} already")
    path = tmp_path / "results.pt"
    script = SAVE.format(folder=str(Path(__file__).parent), path=str(path))
    subprocess.run(
        [sys.executable, "-c", script], check=True, timeout=300,
        env=os.environ | {"LYCHEE_CPU_ISA": isa},
    )  # fmt: skip
    theirs, ours = torch.load(path), run_everything()
    assert theirs.keys() == ours.keys()
    for name, x in ours.items():
        if name.startswith(("v_out", "mem_", "kv", "kv_scale")):
            assert torch.equal(bits(x), bits(theirs[name])), name
        else:
            # other orders of sums, fused or not: a unit in the last place of the largest value
            step = torch.finfo(x.dtype).eps * (1 if x.dtype == torch.bfloat16 else 16)
            limit = step * x[x.isfinite()].abs().max().item()
            torch.testing.assert_close(x, theirs[name], rtol=0, atol=limit, msg=name)
