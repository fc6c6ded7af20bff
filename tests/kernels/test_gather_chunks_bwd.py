# SPDX-License-Identifier: Apache-2.0
"""Gradients of gather_chunks: against autograd of the reference, gradcheck, registration."""

import dataclasses

import pytest
import torch
from attention_cases import BY_NAME, QUANTISED, Case, make_inputs, to_double

from lychee_kernels import gather_chunks, ref
from lychee_kernels.testing import compare

TABLE = ("page_table", "page_len", "page_base", "num_pages")
CASES = [
    *map(BY_NAME.get, ["pages", "prefix", "decode", "long_page"]),
    Case("one", batch=1, kv_heads=1, pages=1, page_tokens=1, dim=8, rope_mode="affine"),
    Case("primes", batch=3, kv_heads=3, pages=5, page_tokens=3, dim=24, rope_mode="affine"),
]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def bank_of(options):
    return [options[name] for name in ("kv", "kv_scale", *TABLE, "cos", "sin")]


def gradient(function, options, weights, **more):
    kv, *rest = bank_of(options)
    kv = kv.detach().requires_grad_()
    k, v, valid = function(kv, *rest, rope_mode=options["rope_mode"], **more)
    assert not valid.requires_grad
    loss = sum((x * w.to(x.dtype)).sum() for x, w in zip((k, v), weights, strict=True))
    return torch.autograd.grad(loss, kv)[0]


def weights_of(options):
    k, v, _ = gather_chunks(*bank_of(options))
    return torch.randn_like(k), torch.randn_like(v)


def check_gradient(q, k, v, options):
    weights = weights_of(options)
    out_dtype = options["kv"].dtype
    actual = gradient(gather_chunks, options, weights)
    baseline = gradient(ref.gather_chunks, options, weights)
    # the gradient that reaches the op is one of its output's dtype
    weights = [w.to(out_dtype) for w in weights]
    exact = gradient(ref.gather_chunks, to_double(q, k, v, options)[3], weights)
    compare(actual, exact, baseline)
    assert actual.is_contiguous() and actual.abs().sum() > 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gather_chunks_gradients_match_reference(case):
    check_gradient(*make_inputs(case))


@pytest.mark.parametrize("dtype", FLOATS[1:])
@pytest.mark.parametrize("name", ["pages", "prefix"])
def test_gather_chunks_gradients_match_reference_in_16_bits(name, dtype):
    check_gradient(*make_inputs(BY_NAME[name], dtype))


@pytest.mark.parametrize("bank_dtype", FLOATS)
@pytest.mark.parametrize("out_dtype", FLOATS)
def test_gather_chunks_gradient_has_the_dtype_of_the_bank(bank_dtype, out_dtype):
    options = make_inputs(CASES[-1], bank_dtype)[3] | {"rope_mode": "none"}
    weights = [w.to(out_dtype) for w in weights_of(options)]
    actual = gradient(gather_chunks, options, weights, out_dtype=out_dtype)
    # nothing is rotated: sums of at most three numbers, rounded once
    expected = gradient(
        ref.gather_chunks, options | {"kv": options["kv"].float()}, weights, out_dtype=torch.float32
    )
    assert actual.dtype == bank_dtype
    torch.testing.assert_close(actual, expected.to(bank_dtype))


def test_gather_chunks_gradients_of_a_shared_page_add_up():
    options = make_inputs(BY_NAME["prefix"])[3]
    for name in TABLE:
        options[name] = options[name][:1].expand_as(options[name]).contiguous()
    weights = weights_of(options)
    together = gradient(gather_chunks, options, weights)
    apart = 0
    for b in range(2):
        row = {name: options[name][b : b + 1] for name in TABLE}
        own = [w[:, b : b + 1] for w in weights]
        apart = apart + gradient(gather_chunks, options | row, own)
    assert together.abs().sum() > 0
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)


def test_gather_chunks_gradient_of_a_layer_range_is_zero_elsewhere():
    options = make_inputs(BY_NAME["pages"])[3]
    weights = [w[1:2] for w in weights_of(options)]
    actual = gradient(gather_chunks, options, weights, layer_range=(1, 2))
    expected = gradient(ref.gather_chunks, options, weights, layer_range=(1, 2))
    assert actual[:, 1].abs().sum() > 0
    assert not actual[:, 0].any() and not actual[:, 2].any()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_gather_chunks_gradient_of_one_output_alone():
    bank = bank_of(make_inputs(BY_NAME["pages"])[3])
    bank[0].requires_grad_()
    for output in range(2):
        # the gradient of a sum is one number, expanded
        results = [
            torch.autograd.grad(function(*bank, rope_mode="affine")[output].sum(), bank[0])[0]
            for function in (gather_chunks, ref.gather_chunks)
        ]
        assert results[0].abs().sum() > 0
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_gather_chunks_gradient_survives_a_change_of_the_bank():
    bank = bank_of(make_inputs(BY_NAME["pages"])[3])
    leaf = bank[0].nan_to_num().requires_grad_()
    bank[0] = leaf * 1
    k, v, _ = gather_chunks(*bank, rope_mode="affine")
    with torch.no_grad():
        bank[0].zero_()
    (actual,) = torch.autograd.grad((k + v).sum(), leaf)
    assert actual.abs().sum() > 0


def test_gather_chunks_has_no_gradient_of_a_quantised_bank():
    bank = bank_of(make_inputs(dataclasses.replace(BY_NAME["int8"], bank_dtype=QUANTISED[1]))[3])
    bank[0].requires_grad_()
    k, _, _ = gather_chunks(*bank, rope_mode="affine")
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(k.sum(), bank[0])


def test_reference_of_gather_chunks_passes_gradcheck():
    case = dataclasses.replace(BY_NAME["pages"], pages=2, page_tokens=3)
    bank = bank_of(to_double(*make_inputs(case))[3])
    kv = bank[0][..., :2].nan_to_num().requires_grad_()
    tables = [bank[i][:, :1] for i in (6, 7)]

    def gather(kv):
        return ref.gather_chunks(kv, *bank[1:6], *tables, rope_mode="affine")[:2]

    assert torch.autograd.gradcheck(gather, (kv,))


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double precision")
def test_gather_chunks_backward_passes_gradcheck():
    # the kernels have no float64, but the op is linear in kv: a large step is as exact
    case = dataclasses.replace(BY_NAME["pages"], pages=2, page_tokens=3, kv_heads=1, dim=8)
    bank = bank_of(make_inputs(case)[3])
    kv = bank[0].nan_to_num().requires_grad_()

    def gather(kv):
        return gather_chunks(kv, *bank[1:], rope_mode="affine")[:2]

    assert torch.autograd.gradcheck(gather, (kv,), eps=0.5, atol=1e-5, rtol=0)


def test_gather_chunks_passes_opcheck_with_gradients():
    bank = bank_of(make_inputs(BY_NAME["pages"])[3])
    bank[0] = bank[0].nan_to_num().requires_grad_()
    torch.library.opcheck(torch.ops.lychee.gather_chunks.default, (*bank, 1, 3, 1, torch.float32))
    dk, dv = torch.randn(2, 2, 2, 2, 7 * 7, 40)
    sizes = 5, 3, 1, 7, 1, torch.bfloat16
    torch.library.opcheck(torch.ops.lychee.gather_chunks_bwd.default, (dk, dv, *bank[2:], *sizes))


def test_gather_chunks_and_its_gradient_compile_to_one_graph():
    bank = bank_of(make_inputs(BY_NAME["prefix"])[3])
    kv = bank[0].nan_to_num().requires_grad_()

    def loss(kv):
        k, v, _ = gather_chunks(kv, *bank[1:], rope_mode="affine")
        return (k.square() + v).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(kv), kv)
    (actual,) = torch.autograd.grad(compiled(kv), kv)
    assert torch.equal(actual, expected)
