# SPDX-License-Identifier: Apache-2.0
"""gather_chunks, gather_chunks_ and the gradient on every backend: ragged and hostile tables,
strided banks and outputs, schedules."""

import dataclasses

import pytest
import torch
from attention_cases import BY_NAME, QUANTISED, Case, make_inputs, to_double

from lychee_kernels import ref
from lychee_kernels.testing import compare, poison

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
BANK_DTYPES = [*FLOATS, *QUANTISED]
TABLE = ("page_table", "page_len", "page_base", "num_pages")
CASES = [
    *map(BY_NAME.get, ["pages", "prefix", "int8", "float8"]),
    # one token, a prime head count, pages shorter than a block, rows of 12 + 12 elements
    Case("one", batch=1, kv_heads=1, pages=1, page_tokens=1, dim=8, rope_mode="affine"),
    Case("primes", batch=3, kv_heads=3, pages=5, page_tokens=3, dim=24, rope_mode="affine"),
    Case("model", batch=1, kv_heads=4, pages=3, dim=128, rope_mode="affine"),
    Case("wide", batch=1, kv_heads=1, pages=2, page_tokens=19, dim=256, rope_mode="affine"),
]
BY_NAME = BY_NAME | {case.name: case for case in CASES}
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def bank_of(options):
    return [options[name] for name in ("kv", "kv_scale", *TABLE, "cos", "sin")]


def options_of(case, dtype=torch.float32, double=False):
    inputs = make_inputs(case, dtype)
    return (to_double(*inputs) if double else inputs)[3]


def check(actual, options, out_dtype, **more):
    """k, v and valid of a gather, against the reference."""
    more |= {"rope_mode": options["rope_mode"]}
    baseline = ref.gather_chunks(*bank_of(options), out_dtype=out_dtype, **more)
    exact_options = to_double(*[torch.zeros(0)] * 3, options)[3]
    exact = ref.gather_chunks(*bank_of(exact_options), out_dtype=torch.float64, **more)
    for i in range(2):
        if actual[i].numel():
            compare(actual[i], exact[i], baseline[i])
        assert actual[i].shape == baseline[i].shape
    assert torch.equal(actual[2], baseline[2])
    return baseline


@cases
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gather_chunks(backend, case, dtype):
    backend.leave_out(dtype != torch.float32 and case.name != "primes")
    options = options_of(case, dtype)
    actual = backend.gather_chunks(
        *bank_of(options), rope_mode=options["rope_mode"], out_dtype=dtype
    )
    expected = check(actual, options, dtype)
    assert backend.name == "reference" or all(x.is_contiguous() for x in actual)
    # values are copied, or dequantised in the only way there is
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("bank_dtype", BANK_DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ["primes", "model"])
def test_every_pair_of_dtypes(backend, name, out_dtype, bank_dtype):
    backend.leave_out(name != "primes")
    options = options_of(dataclasses.replace(BY_NAME[name], bank_dtype=bank_dtype))
    for rope_mode in ("none", "affine"):
        options["rope_mode"] = rope_mode
        actual = backend.gather_chunks(*bank_of(options), rope_mode=rope_mode, out_dtype=out_dtype)
        check(actual, options, out_dtype)


@pytest.mark.parametrize("layer_range", [(0, 1), (1, 3), (2, 2)])
def test_layers(backend, layer_range):
    options = options_of(BY_NAME["primes"])
    actual = backend.gather_chunks(
        *bank_of(options), rope_mode="affine", layer_range=layer_range, out_dtype=torch.float32
    )
    check(actual, options, torch.float32, layer_range=layer_range)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_copies_are_exact_bit_for_bit(backend, dtype):
    # every bit pattern of 16 bits, NaN payloads and subnormals included
    bits = torch.arange(-(2**15), 2**15).short()
    kv = (bits.view(dtype) if dtype.itemsize == 2 else bits.int().mul(65537).view(dtype)).view(
        4, 2, 2, 2, 64, 32
    )
    table, length = torch.tensor([[3, 1], [0, 2]]).int(), torch.full((2, 2), 64).int()
    k, v, _ = backend.gather_chunks(
        kv, None, table, length, None, torch.tensor([2, 2]).int(), out_dtype=dtype
    )
    for part, x in enumerate((k, v)):
        expected = kv[table.long(), :, :, part].permute(2, 0, 3, 1, 4, 5).flatten(3, 4)
        # the others convert to float32 and back
        exact = backend.name in ("cpu", "emulated", "cuda")
        keep = torch.ones_like(expected, dtype=torch.bool) if exact else ~expected.isnan()
        assert torch.equal(*(y[keep].view(torch.int16) for y in (x, expected)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("spare", [8, 3])
def test_strided_banks_and_outputs(backend, dtype, spare):
    backend.leave_out(dtype != torch.bfloat16)
    # `spare` elements behind each row: 8 keeps it aligned for runs of 16 bytes, 3 does not
    options = options_of(BY_NAME["model"], dtype)
    kv = options["kv"]
    wide = torch.full((*kv.shape[:4], kv.shape[4] + 1, kv.shape[5] + spare), torch.nan).to(dtype)
    wide[..., :-1, :-spare] = kv
    layers, batch, heads, tokens, dim = 3, 1, 4, 5 * 64, 128
    outputs = [poison(torch.empty(layers, tokens + 9, batch, heads, dim + spare, dtype=dtype))
               for _ in range(2)]  # fmt: skip
    k, v = (x.permute(0, 2, 3, 1, 4)[..., :-spare] for x in outputs)
    valid = backend.gather_chunks_(
        k, v, wide[..., :-1, :-spare], *bank_of(options)[1:], rope_mode="affine"
    )
    check((k[:, :, :, :tokens], v[:, :, :, :tokens], valid), options, dtype)
    for x in outputs:
        assert x[:, tokens:].isnan().all() and x[..., -spare:].isnan().all()


@pytest.mark.parametrize("bank_dtype", [torch.bfloat16, torch.int8], ids=str)
def test_schedules_change_nothing(backend, bank_dtype):
    options = options_of(dataclasses.replace(BY_NAME["primes"], bank_dtype=bank_dtype))
    results = []
    for seed in backend.seeds:
        backend.use_seed(seed)
        results.append(backend.gather_chunks(*bank_of(options), rope_mode="affine"))
    check(results[0], options, results[0][0].dtype)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_nothing_in_use(backend):
    options = options_of(BY_NAME["primes"])
    options["num_pages"] = torch.zeros(3, dtype=torch.int32)
    k, v, valid = backend.gather_chunks(*bank_of(options), rope_mode="affine")
    assert not k.any() and not v.any() and not valid.any()
    options["page_len"] = torch.zeros_like(options["page_len"])
    options["num_pages"], options["page_table"] = torch.tensor([7, 0, 2]).int(), torch.zeros(3, 7)
    options["page_table"] = options["page_table"].int()
    options["page_base"] = torch.zeros(3, 7, dtype=torch.int32)
    k, v, valid = backend.gather_chunks(*bank_of(options), rope_mode="affine")
    assert not k.any() and not v.any() and not valid.any()


def test_values_out_of_range_are_not_followed(backend):
    if backend.name not in ("emulated", "cuda"):
        pytest.skip("values are checked on the host")
    kv = torch.randn(2, 1, 1, 2, 4, 8)
    cos, sin = torch.rand(2, 10, 4)
    table = torch.tensor([[0, 2, -1, 1, 0]]).int()
    length = torch.tensor([[4, 4, 2, 9, -3]]).int()
    base = torch.tensor([[8, 0, 0, -(2**31), 2**31 - 1]]).int()
    count = torch.tensor([2**31 - 1]).int()
    k, v, valid = backend.gather_chunks(
        kv, None, table, length, base, count, cos, sin, rope_mode="affine"
    )
    assert valid[0].tolist() == [True] * 8 + [True] * 2 + [False] * 2 + [True] * 4 + [False] * 4
    k, v = k[0, 0, 0], v[0, 0, 0]
    # two keys stand behind the tables, two pages outside of the bank
    assert k.isnan().any(1).nonzero()[:, 0].tolist() == [2, 3, *range(4, 10), *range(12, 16)]
    assert v.isnan().any(1).nonzero()[:, 0].tolist() == list(range(4, 10))
    assert torch.equal(v[:4], kv[0, 0, 0, 1]) and torch.equal(v[12:16], kv[1, 0, 0, 1])


def gradient(function, options, weights, **more):
    kv, *rest = bank_of(options)
    kv = kv.detach().requires_grad_()
    k, v, _ = function(kv, *rest, rope_mode=options["rope_mode"], **more)
    loss = sum((x * w.to(x.dtype)).sum() for x, w in zip((k, v), weights, strict=True))
    return torch.autograd.grad(loss, kv)[0]


def check_gradient(backend, options, out_dtype, **more):
    k, v, _ = ref.gather_chunks(*bank_of(options), **more)
    # the gradient that reaches the op is one of its output's dtype
    weights = [torch.randn_like(x).to(out_dtype) for x in (k, v)]
    more["out_dtype"] = out_dtype
    with backend.active():
        actual = gradient(backend.gather_chunks, options, weights, **more)
    baseline = gradient(ref.gather_chunks, options, weights, **more)
    exact_options = to_double(*[torch.zeros(0)] * 3, options)[3]
    exact = gradient(ref.gather_chunks, exact_options, weights, **more | {"out_dtype": None})
    compare(actual, exact, baseline)
    return actual


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ["pages", "primes", "one", "wide"])
def test_gradients(backend, name, dtype):
    backend.leave_out(dtype != torch.float32 and name != "primes")
    assert check_gradient(backend, options_of(BY_NAME[name], dtype), dtype).any()


@pytest.mark.parametrize("bank_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
def test_gradients_of_every_pair_of_dtypes(backend, out_dtype, bank_dtype):
    options = options_of(BY_NAME["primes"], bank_dtype) | {"rope_mode": "none"}
    check_gradient(backend, options, out_dtype, layer_range=(1, 3))


def test_more_readers_than_fit_the_list(backend):
    # 1300 entries read two pages; each sum is taken in the order of the table
    options = options_of(Case("many", kv_heads=1, pages=2, page_tokens=2, rope_mode="affine"))
    shape = (13, 100)
    options["page_table"] = torch.randint(0, 2, shape).int()
    options["page_len"] = torch.randint(0, 3, shape).int()
    options["page_base"] = torch.randint(0, 4000, shape).int()
    options["num_pages"] = torch.randint(90, 101, (13,)).int()
    options["page_table"][torch.arange(100) >= options["num_pages"][:, None]] = -(2**31)
    results = []
    for seed in backend.seeds[:3]:
        backend.use_seed(seed)
        torch.manual_seed(3)
        results.append(check_gradient(backend, options, torch.float32))
    assert all(torch.equal(result, results[0]) for result in results)
