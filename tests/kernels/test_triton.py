# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels: what the suites over all backends leave out, in shapes that an interpreter
can run; and that they compile for GPUs that are not there."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import Case, gradients, make_inputs, to_double
from test_backends import run

from lychee_kernels import ref, rope_tables
from lychee_kernels.testing import compare

triton = pytest.mark.parametrize("backend", ["triton"], indirect=True)
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
BANKS = [*FLOATS, torch.int8, torch.float8_e4m3fn]
TABLE = ("page_table", "page_len", "page_base", "num_pages")
BUILDS = Path(__file__).with_name("triton_builds.py")

ATTENTION = [
    Case("one", batch=1, queries=1, keys=1, heads=1, kv_heads=1, dim=8),
    Case("primes", batch=1, queries=7, keys=13, heads=3, kv_heads=1, dim=24, holes=True),
    Case("pages", queries=9, keys=0, dim=40, pages=3, page_tokens=7, rope_mode="affine"),
    Case("two_blocks", batch=1, queries=19, keys=37, heads=2, kv_heads=1, query_stride=2),
    Case("wide", batch=1, queries=1, keys=3, heads=2, kv_heads=1, dim=256, pages=1),
    # ten tiles of pages and one of the segment: two splits and their merge
    Case("splits", batch=1, queries=1, keys=3, pages=3, page_tokens=150, dim=72,
         rope_mode="affine", bank_dtype=torch.int8),
    Case("float8", batch=1, queries=2, keys=5, pages=2, bank_dtype=torch.float8_e4m3fn),
]  # fmt: skip
BY_NAME = {case.name: case for case in ATTENTION}


def check_attention(backend, case, dtype):
    q, k, v, options = make_inputs(case, dtype)
    actual = backend.memory_attention(q, k, v, **options)
    exact_q, exact_k, exact_v, exact_options = to_double(q, k, v, options)
    exact = ref.memory_attention(exact_q, exact_k, exact_v, **exact_options)
    baseline = ref.memory_attention(q, k, v, **options)
    compare(actual[0], exact[0], baseline[0])
    if dtype == torch.float32:
        # in 16 bits the reference rounds less than tensor cores do
        compare(actual[1], exact[1], baseline[1])
    assert actual[0].transpose(1, 2).is_contiguous()


@triton
@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
def test_attention_matches_reference(backend, case):
    check_attention(backend, case, torch.float32)


@triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["pages", "splits"])
def test_attention_matches_reference_in_16_bits(backend, name, dtype):
    check_attention(backend, BY_NAME[name], dtype)


@triton
def test_attention_does_not_depend_on_the_batch(backend):
    case = dataclasses.replace(BY_NAME["splits"], batch=2)
    q, k, v, options = make_inputs(case)
    expected = backend.memory_attention(q, k, v, **options)
    row = {name: options[name][1:] for name in TABLE}
    actual = backend.memory_attention(q[1:], k[1:], v[1:], **options | row)
    assert all(torch.equal(a, e[1:]) for a, e in zip(actual, expected, strict=True))


@triton
def test_attention_of_nothing_and_of_nan(backend):
    q, k, v, options = make_inputs(dataclasses.replace(BY_NAME["splits"], batch=2, keys=0))
    options["num_pages"][0] = 0
    q[1, 0] = torch.nan
    out, lse = backend.memory_attention(q, k, v, **options)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    assert out[1, 0].isnan().all() and lse[1, 0].isnan().all()
    assert out[1, 1:].isfinite().all() and lse[1, 1:].isfinite().all()


@triton
@pytest.mark.parametrize("name", ["primes", "pages"])
def test_attention_gradients_match_reference(backend, name):
    q, k, v, options = make_inputs(dataclasses.replace(BY_NAME[name], batch=2))
    grad = torch.randn_like(q)
    with backend.active():
        actual = gradients(backend.memory_attention, q, k, v, options, grad)
    exact = gradients(ref.memory_attention, *to_double(q, k, v, options), grad)
    baseline = gradients(ref.memory_attention, q, k, v, options, grad)
    for result in zip(actual, exact, baseline, strict=True):
        compare(*result)


@triton
def test_pages_beyond_two_billion_elements_are_read(backend, tmp_path):
    if backend.device != "cpu":
        pytest.skip("needs a sparse file as memory")
    pages, shape = 2**31 // (2 * 64 * 64) + 2, (1, 1, 2, 64, 64)
    # only the page that is written takes room on disk
    kv = torch.from_file(str(tmp_path / "bank"), True, pages * 2 * 64 * 64, dtype=torch.float16)
    kv = kv.view(pages, *shape)
    kv[-1] = torch.randn(shape)
    table = torch.tensor([[pages - 1]]).int(), torch.tensor([[64]]).int(), None
    k, v, valid = backend.gather_chunks(kv, None, *table, torch.tensor([1]).int())
    assert torch.equal(k[0, 0, 0], kv[-1, 0, 0, 0]) and torch.equal(v[0, 0, 0], kv[-1, 0, 0, 1])
    assert valid.all()
    names = ("page_table", "page_len", "num_pages")
    options = dict(zip(names, (*table[:2], torch.tensor([1]).int()), strict=True))
    q, empty = torch.randn(1, 1, 1, 64).half(), torch.empty(1, 1, 0, 64).half()
    far = backend.memory_attention(q, empty, empty, kv=kv, **options)
    options["page_table"] = options["page_table"] * 0
    near = backend.memory_attention(q, empty, empty, kv=kv[-1:], **options)
    assert torch.equal(far[0], near[0]) and far[0].any()


@triton
@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bank_dtype", BANKS, ids=str)
def test_gather_matches_reference(backend, bank_dtype, out_dtype):
    case = Case("odd", kv_heads=1, pages=2, page_tokens=3, dim=24, bank_dtype=bank_dtype)
    inputs = make_inputs(case)[3]
    bank = [inputs[name] for name in ("kv", "kv_scale", *TABLE, "cos", "sin")]
    options = {"rope_mode": "affine", "layer_range": (1, 3), "out_dtype": out_dtype}
    actual = backend.gather_chunks(*bank, **options)
    baseline = ref.gather_chunks(*bank, **options)
    exact = ref.gather_chunks(*bank, **options | {"out_dtype": torch.float64})
    for result in zip(actual[:2], exact[:2], baseline[:2], strict=True):
        compare(*result)
    assert torch.equal(actual[2], baseline[2])
    unrotated = options | {"rope_mode": "none"}
    wanted = ref.gather_chunks(*bank, **unrotated)
    # room in a token-major cache whose other slots must stay
    shape = (2, 2, 3 + case.pages * 3 + 6, 1, 24)
    k, v = torch.full((2, *shape), 7.0, dtype=out_dtype).transpose(3, 4)
    del unrotated["out_dtype"]
    valid = backend.gather_chunks_(k, v, *bank, **unrotated)
    tokens = wanted[0].shape[3]
    assert torch.equal(k[:, :, :, :tokens], wanted[0]) and torch.equal(valid, wanted[2])
    assert torch.equal(v[:, :, :, :tokens], wanted[1]) and (k[:, :, :, tokens:] == 7).all()


@triton
def test_every_float8_code_is_read(backend):
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    kv = codes.view(1, 1, 1, 2, 1, 128)
    one = torch.ones(1, 1).int()
    scale = torch.ones(1, 1, 1, 2, 1)
    k, v, _ = backend.gather_chunks(kv, scale, one * 0, one, None, one[0])
    expected = codes.float().view(2, 128)
    actual = torch.stack((k.flatten(), v.flatten()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bank_dtype", BANKS, ids=str)
def test_the_bank_is_written_as_by_the_reference(backend, bank_dtype, dtype):
    k, v = torch.randn(2, 8, 3, 40).to(dtype)
    k[1] = 0  # scale 0
    # ties, at a scale of 1
    k[2] = 0.5
    k[2, :, 0] = 127.0 if bank_dtype == torch.int8 else 448.0
    k[2, :, 1:6] = torch.tensor([1.5, 2.5, -0.5, 0.0009765625, 17.0]).to(dtype)
    shape = (5, 2, 3, 2, 3, 40)
    valid = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1]]).bool()
    table, slot0 = torch.tensor([[4, 0], [1, 3]]).int(), torch.tensor([1, 2]).int()
    results = []
    for library in (backend, ref):
        kv = torch.full(shape, 7.0).to(bank_dtype)
        kv_scale = torch.full(shape[:5], 7.0) if bank_dtype in BANKS[3:] else None
        library.write_memory_(k, v, kv, kv_scale, table, slot0, batch=2, layer=1, mem_valid=valid)
        results.append((kv.float(), kv_scale))
    (actual, scale), (expected, expected_scale) = results
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert not (expected[:, 1] == 7).all()
    if scale is not None:
        assert torch.equal(scale, expected_scale) and (scale == 0).any()


def pack_inputs(dtype, memory_only, scattered):
    """B = 2 windows of 6 raw rows, ratio 3."""
    q = torch.randn(4 if memory_only else 16, 3, 24).to(dtype)
    k, v = torch.randn(2, 16, 1, 24).to(dtype)
    cos, sin = rope_tables(100, 10000.0 ** -(torch.arange(0, 24, 2) / 24))
    options = {"batch": 2, "ratio": 3, "pos0": 11}
    if scattered:
        options["positions"] = torch.randint(0, 100, (2, 8))
    return (q, k, v, cos, sin), options


@triton
@pytest.mark.parametrize("scattered", [False, True], ids=["pos0", "positions"])
@pytest.mark.parametrize("memory_only", [False, True], ids=["all_rows", "memory_rows"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pack_matches_reference(backend, dtype, memory_only, scattered):
    inputs, options = pack_inputs(dtype, memory_only, scattered)

    def outputs_and_gradients(library, inputs):
        leaves = [x.detach().requires_grad_() for x in inputs[:3]]
        outputs = library.compress_pack(*leaves, *inputs[3:], **options)
        loss = sum((x.square() * (i + 1)).sum() for i, x in enumerate(outputs))
        return *outputs, *torch.autograd.grad(loss, leaves)

    with backend.active():
        actual = outputs_and_gradients(backend, inputs)
    baseline = outputs_and_gradients(ref, inputs)
    exact = outputs_and_gradients(ref, [x.double() for x in inputs])
    for result in zip(actual, exact, baseline, strict=True):
        compare(*result)
    assert all(map(torch.equal, actual[2:5], baseline[2:5]))


@triton
def test_pack_writes_the_bank(backend):
    inputs, options = pack_inputs(torch.float32, False, True)
    table, slot0 = torch.tensor([[0], [1]]).int(), torch.zeros(2).int()
    results = []
    for library in (backend, ref):
        kv, kv_scale = torch.zeros(2, 1, 1, 2, 4, 24, dtype=torch.int8), torch.zeros(2, 1, 1, 2, 4)
        outputs = library.compress_pack_(
            *inputs, kv, kv_scale, table, slot0, **options, layer=0, mem_valid=None
        )
        results.append((*outputs, kv, kv_scale))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(results[0][3], results[1][3]) and results[0][3].any()


@triton
@pytest.mark.parametrize("seed", range(4))
def test_selection_equals_reference(backend, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-3, 4, (2, 1100 if seed == 0 else 7), generator=generator) / 2
    scores = scores.to(FLOATS[seed % 3])
    scores[:, ::5], scores[0, 1], scores[1, 2] = torch.nan, -torch.inf, torch.inf
    chunks = scores.shape[1]
    pages = torch.arange(chunks * 3).view(chunks, 3).int()
    tokens = torch.randint(0, 13, (chunks,), generator=generator).int()
    threshold = [0.3, -torch.inf, 1.5, torch.nan][seed]
    for max_chunks in (2, 2000):
        arguments = scores, threshold, max_chunks, pages, tokens, 4
        actual, expected = backend.select_chunks(*arguments), ref.select_chunks(*arguments)
        assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
        assert expected.num_chunks.any() or threshold != threshold


@triton
def test_selection_of_no_chunks(backend):
    pages = torch.zeros(0, 3).int()
    selection = backend.select_chunks(torch.zeros(2, 0), 0.5, 3, pages, pages[:, 0], 4)
    assert selection.page_table.shape == (2, 0) and not selection.num_pages.any()


CALL = (
    "import torch, lychee_kernels as lk; print(lk.backends(), lk.backends('cuda')); "
    "x = torch.ones(1, 1, 1, 8); print(lk.memory_attention(x, x, x)[0].sum().item())"
)


@triton
def test_triton_is_used_when_asked_for(backend):
    if backend.device == "cpu":
        # beside a GPU the interpreter may be one that cannot run
        code, output = run("-c", CALL, LYCHEE_BACKEND="triton", TRITON_INTERPRET="1")
        assert code == 0 and output.strip().endswith("8.0"), output
        assert output.count("'memory_attention': 'triton'") == 2 and "'cpp'" not in output
    code, output = run("-c", CALL, LYCHEE_BACKEND="triton", TRITON_INTERPRET="0")
    expected = "memory_attention: q: expected a CUDA tensor for the Triton kernels, got one on cpu"
    assert code != 0 and expected in output


def test_a_missing_package_is_named():
    without = "import sys; sys.modules['triton'] = None; "
    code, output = run("-c", without + CALL, LYCHEE_BACKEND="triton")
    assert code != 0 and "install it with: pip install triton" in output
    code, output = run("-c", without + CALL)
    assert code == 0 and "'memory_attention': 'triton'" not in output, output


@triton
def test_kernels_compile_for_absent_gpus(backend, tmp_path):
    command = [sys.executable, str(BUILDS), "80"]
    root = Path(ref.__file__).resolve().parents[2]
    environment = {"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    builds = [json.loads(line) for line in result.stdout.splitlines()]
    assert {build["kernel"] for build in builds} == {
        "_attention_kernel", "_merge_kernel", "_pack_kernel", "_write_kernel", "_gather_kernel",
        "_select_kernel",
    }  # fmt: skip
    for build in builds:
        # what a program may have on every GPU since sm_80
        assert build["shared"] <= 99 << 10, build
        assert build["spilled"] <= 32, build
