# SPDX-License-Identifier: Apache-2.0
"""compress_pack, its gradients, compress_pack_ and write_memory_ on every backend."""

import pytest
import torch
from pack_cases import BANK_DTYPES, FLOATS, POSITIONS, Case, gradients, make_bank, make_inputs

from lychee_kernels import ref
from lychee_kernels.ref.compress_pack import QUANT_LEVEL, SMALLEST_AMAX
from lychee_kernels.testing import compare, poison

CASES = [
    Case("one", batch=1, groups=1, ratio=1, heads=1, kv_heads=1, dim=8),
    # rows of 12 + 12 elements: no 16-byte accesses, three of four lanes
    Case("primes", batch=3, groups=5, ratio=3, heads=3, kv_heads=1, dim=24, scattered=True),
    Case("model", batch=1, groups=9, heads=28, kv_heads=4, dim=128),
    Case("wide", batch=1, groups=3, heads=2, kv_heads=1, dim=256, ratio=2),
    Case("five_of_eight_lanes", groups=2, heads=3, dim=80, scattered=True),
    Case("memory_queries", memory_queries_only=True, dim=40, ratio=2, scattered=True),
    Case("no_rows", groups=0),
]
BY_NAME = {case.name: case for case in CASES}
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def check(actual, inputs, options):
    baseline = ref.compress_pack(*inputs, **options)
    exact = ref.compress_pack(*(x.double() for x in inputs), **options)
    for i in range(2):
        compare(actual[i], exact[i], baseline[i])
    for i in range(2, len(actual)):
        assert torch.equal(actual[i], baseline[i])
    assert all(x.is_contiguous() for x in actual)


@cases
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_compress_pack(backend, case, dtype):
    backend.leave_out(dtype != torch.float32 and case.name != "primes")
    inputs, options = make_inputs(case, dtype)
    check(backend.compress_pack(*inputs, **options), inputs, options)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@cases
def test_gradients(backend, case, dtype):
    backend.leave_out(dtype != torch.float32 and case.name != "primes")
    inputs, options = make_inputs(case, dtype)
    weights = [torch.randn_like(x) for x in ref.compress_pack(*inputs, **options)]
    with backend.active():
        actual = gradients(backend.compress_pack, inputs, options, weights)
    baseline = gradients(ref.compress_pack, inputs, options, weights)
    exact = gradients(ref.compress_pack, [x.double() for x in inputs], options, weights)
    for result in zip(actual, exact, baseline, strict=True):
        compare(*result)


@pytest.mark.parametrize("used", range(5))
def test_gradient_of_one_output_alone(backend, used):
    inputs, options = make_inputs(BY_NAME["memory_queries"])
    leaves = [x.requires_grad_() for x in inputs[:3]]
    results = []
    for function in (backend.compress_pack, ref.compress_pack):
        with backend.active():
            loss = function(*inputs, **options)[used].square().sum()
            results.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    for actual, expected in zip(*results, strict=True):
        if expected is None:
            assert actual is None or not actual.any()
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def assert_stored(actual, expected, rows):
    """Banks (kv, kv_scale) agree; `rows` is a float32 bank with the same rows.

    Quantised values may differ where the scaled row lies next to the middle between two of them:
    PyTorch multiplies by a reciprocal where the kernels divide."""
    (kv, kv_scale), (expected_kv, expected_scale) = actual, expected
    # whatever was not written keeps its poison, in both
    written = ~rows.isnan()
    level = QUANT_LEVEL.get(kv.dtype)
    same = (kv.view(torch.uint8) == expected_kv.view(torch.uint8)).view(*kv.shape, -1).all(-1)
    assert same[~written].all()
    if level is None:
        assert same.all()
        return
    torch.testing.assert_close(kv_scale, expected_scale, rtol=0, atol=0, equal_nan=True)
    amax = rows.double().abs().amax(-1, keepdim=True)
    scaled = torch.where(amax < SMALLEST_AMAX, 0.0, rows.double() * (level / amax))[written]
    error, allowed = ((x[written].double() - scaled).abs() for x in (kv, expected_kv))
    assert (error <= allowed + 1e-6 * scaled.abs()).all()
    assert same.double().mean() > 0.999


def written_banks(functions, arguments, bank, **options):
    """(outputs, kv, kv_scale) that each function leaves in a copy of the bank; and the same of the
    reference in a float32 bank."""
    rows = torch.full(bank[0].shape, torch.nan), None, *bank[2:]
    for function, target in (*((f, bank) for f in functions), (functions[-1], rows)):
        kv, kv_scale, *rest = (None if x is None else x.clone() for x in target)
        outputs = function(*arguments, kv, kv_scale, *rest, **options)
        yield outputs, kv, kv_scale


@pytest.mark.parametrize("bank_dtype", BANK_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ["primes", "wide", "model", "memory_queries"])
def test_bank_is_written_as_by_the_reference(backend, name, dtype, bank_dtype):
    backend.leave_out(name != "primes" and (dtype, bank_dtype) != (torch.bfloat16, torch.int8))
    case = BY_NAME[name]
    inputs, options = make_inputs(case, dtype)
    inputs[1][-1] = 0  # a row of zeros has scale 0
    mem_valid = torch.rand(case.batch, case.groups) > 0.3
    mem_valid[:, -1] = True
    functions = backend.compress_pack_, ref.compress_pack_
    actual, expected, rows = written_banks(
        functions, inputs, make_bank(case, bank_dtype), layer=1, mem_valid=mem_valid, **options
    )
    check(actual[0], inputs, options)
    assert_stored(actual[1:], expected[1:], rows[1])
    if actual[2] is not None:
        assert (actual[2] == 0).any()


@pytest.mark.parametrize("bank_dtype", list(QUANT_LEVEL), ids=str)
def test_halves_round_to_even(backend, bank_dtype):
    if backend.name == "reference":
        pytest.skip("PyTorch divides a number by a tensor by way of its reciprocal")
    level = QUANT_LEVEL[bank_dtype]
    # scale 1; steps of e4m3 are 16 from 128 to 256
    step = 1 if bank_dtype == torch.int8 else 16
    halves = (torch.arange(8, 16) + 0.5) * step * torch.tensor([[1], [-1]])
    k = torch.cat((halves.flatten(), torch.tensor([level] * 16)))[None, None]
    kv, kv_scale = torch.zeros(1, 1, 1, 2, 1, 32).to(bank_dtype), torch.zeros(1, 1, 1, 2, 1)
    table = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    backend.write_memory_(k, k, kv, kv_scale, *table, batch=1, layer=0)
    expected = (halves / step).round().flatten() * step
    assert kv[0, 0, 0, 0, 0, :16].float().tolist() == expected.tolist()
    assert (kv_scale == 1).all()


def test_schedules_change_nothing(backend):
    if len(backend.seeds) == 1:
        pytest.skip("has one schedule")
    case = BY_NAME["primes"]
    inputs, options = make_inputs(case, torch.bfloat16)
    options["mem_valid"] = torch.rand(case.batch, case.groups) > 0.3
    bank = make_bank(case, torch.int8)
    results = []
    for seed in backend.seeds:
        backend.use_seed(seed)
        kv, kv_scale, *rest = (x.clone() for x in bank)
        outputs = backend.compress_pack_(*inputs, kv, kv_scale, *rest, layer=0, **options)
        results.append([*outputs, kv, kv_scale.nan_to_num(-7.0)])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("bank_dtype", BANK_DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_write_memory(backend, bank_dtype, masked):
    backend.leave_out(not masked and bank_dtype != torch.int8)
    # more memory rows than lanes of a warp: those before are counted in several steps
    case = Case("write", groups=70, kv_heads=3, dim=64)
    bank = make_bank(case, bank_dtype)
    k, v = torch.randn(2, 140, 3, 64).bfloat16()
    k[5], v[77] = 0, 1e-38
    mem_valid = torch.rand(2, 70) > 0.4 if masked else None
    functions = backend.write_memory_, ref.write_memory_
    actual, expected, rows = written_banks(
        functions, (k, v), bank, batch=2, layer=2, mem_valid=mem_valid
    )
    assert_stored(actual[1:], expected[1:], rows[1])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("offset", [0, 8, 3])
def test_slices_of_one_projection(backend, dtype, offset):
    backend.leave_out(dtype != torch.bfloat16)
    # rows of one buffer, aligned to 16 bytes or not, between sentinels
    (q, k, v, *tables), options = make_inputs(BY_NAME["model"], dtype)
    heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[2]
    row = (heads + 2 * kv_heads) * dim + 2 * offset
    fused = poison(torch.empty(q.shape[0], row, dtype=dtype))
    slices = []
    at = offset
    for x in (q, k, v):
        part = fused[:, at : at + x.shape[1] * dim].unflatten(1, (-1, dim))
        part.copy_(x)
        slices.append(part)
        at += x.shape[1] * dim
    assert not slices[0].is_contiguous() or not offset
    actual = backend.compress_pack(*slices, *tables, **options)
    check(actual, (q, k, v, *tables), options)


def test_values_out_of_range_are_not_followed(backend):
    if backend.name not in ("emulated", "cuda"):
        pytest.skip("values are checked on the host")
    case = BY_NAME["primes"]
    inputs, options = make_inputs(case)
    options["positions"][0, :4] = torch.tensor([-1, POSITIONS, 2**62, -(2**62)])
    options["positions"][1:] = 5
    kv, kv_scale, table, slot0 = make_bank(case, torch.float32)
    before = kv.clone()
    for bad_table, bad_slot in (
        (torch.full_like(table, kv.shape[0]), slot0),
        (torch.full_like(table, -1), slot0),
        (table[:, :0].contiguous(), slot0),
        (table, torch.full_like(slot0, -1)),
        (table, torch.full_like(slot0, 2**31 - 1)),
    ):
        q_rot, k_rot, v_out = backend.compress_pack_(
            *inputs, kv, kv_scale, bad_table, bad_slot, layer=0, **options
        )
        assert torch.equal(kv.nan_to_num(-7.0), before.nan_to_num(-7.0))
    for rotated in (q_rot, k_rot):
        assert rotated[0, :, :4].isnan().all() and not rotated[0, :, 4:].isnan().any()
        assert not rotated[1:].isnan().any()
    assert not v_out.isnan().any()
