# SPDX-License-Identifier: Apache-2.0
"""memory_attention: gradients of queries, keys, values and float banks."""

import dataclasses

import pytest
import torch
from attention_cases import (
    BY_NAME,
    CASES,
    Case,
    check_gradients,
    gradients,
    make_inputs,
    op_arguments,
    strided_views,
    to_double,
)
from error_cases import check_message

from lychee_kernels import memory_attention, memory_attention_bwd, ref

PAGE_NAMES = ("page_table", "page_len", "page_base", "num_pages")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_match_reference(case):
    q, k, v, options = make_inputs(case)
    check_gradients(q, k, v, options, torch.randn_like(q))


def test_gradients_match_reference_at_another_scale():
    q, k, v, options = make_inputs(BY_NAME["prefix"])
    check_gradients(q, k, v, options | {"softmax_scale": 0.03}, torch.randn_like(q))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["primes", "prefix"])
def test_gradients_match_reference_in_16_bits(name, dtype):
    q, k, v, options = make_inputs(BY_NAME[name], dtype)
    check_gradients(q, k, v, options, torch.randn_like(q))


def test_gradients_of_a_16_bit_bank_match_reference():
    case = dataclasses.replace(BY_NAME["prefix"], bank_dtype=torch.bfloat16)
    q, k, v, options = make_inputs(case)
    check_gradients(q, k, v, options, torch.randn_like(q))


def test_gradients_of_pages_that_many_rows_share_match_reference():
    # more rows than chunks of the batch; each page is read at two places of several chunks
    case = Case("shared", batch=37, queries=5, keys=5, heads=3, kv_heads=3, dim=32, pages=4,
                page_tokens=20, rope_mode="affine")  # fmt: skip
    q, k, v, options = make_inputs(case)
    options["kv"] = torch.randn_like(options["kv"])
    check_gradients(q, k, v, options, torch.randn_like(q))


def test_gradients_of_many_query_rows_match_reference():
    # every key sums over 300 queries of 14 heads
    case = Case("many", batch=1, queries=300, keys=300, heads=14, kv_heads=1, dim=16, pages=2,
                page_tokens=30, rope_mode="affine")  # fmt: skip
    q, k, v, options = make_inputs(case)
    check_gradients(q, k, v, options, torch.randn_like(q))


def test_gradients_of_a_shared_page_add_up():
    q, k, v, options = make_inputs(BY_NAME["prefix"])
    options["kv"] = torch.randn_like(options["kv"])
    for name in PAGE_NAMES:
        options[name] = options[name][:1].expand_as(options[name]).contiguous()
    grad = torch.randn_like(q)
    together = gradients(memory_attention, q, k, v, options, grad)[3]
    apart = 0
    for b in range(2):
        row = {name: options[name][b : b + 1] for name in PAGE_NAMES}
        parts = [x[b : b + 1] for x in (q, k, v)]
        apart = apart + gradients(memory_attention, *parts, options | row, grad[b : b + 1])[3]
    assert together.abs().sum() > 0
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)


def test_gradients_are_bitwise_repeatable_on_any_number_of_threads():
    q, k, v, options = make_inputs(dataclasses.replace(BY_NAME["prefix"], batch=5))
    grad = torch.randn_like(q)
    expected = gradients(memory_attention, q, k, v, options, grad)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            again = gradients(memory_attention, q, k, v, options, grad)
            assert all(torch.equal(*pair) for pair in zip(again, expected, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_gradients_of_rows_and_keys_that_meet_nothing_are_zero():
    q, k, v, options = make_inputs(dataclasses.replace(BY_NAME["pages"], keys=0))
    options["num_pages"][0] = 0
    options["kv"] = options["kv"].nan_to_num()
    dq, _, _, dkv = gradients(memory_attention, q, k, v, options, torch.randn_like(q))
    assert (dq[0] == 0).all() and dq[1].abs().sum() > 0
    assert dkv.isfinite().all() and (dkv[:, 0] == 0).all() and dkv[:, 1].abs().sum() > 0
    # more queries than keys: the first ones see nothing
    q, k, v, options = make_inputs(Case("few", queries=5, keys=2, dim=32))
    options["valid"] = torch.tensor([[True, True], [True, False]])
    dq, dk, dv = gradients(memory_attention, q, k, v, options, torch.randn_like(q))
    assert (dq[:, :, :3] == 0).all() and dq.isfinite().all()
    assert (dk[1, :, 1] == 0).all() and (dv[1, :, 1] == 0).all() and dv[0].abs().min() > 0


def test_gradients_of_no_queries_are_zero():
    q, k, v, options = make_inputs(dataclasses.replace(BY_NAME["causal"], queries=0))
    dq, dk, dv = gradients(memory_attention, q, k, v, options, torch.randn_like(q))
    assert dq.shape == q.shape and (dk == 0).all() and (dv == 0).all()


@pytest.mark.parametrize("name", ["int8", "prefix"])
def test_a_bank_without_gradient_costs_none(name):
    q, k, v, options = make_inputs(BY_NAME[name])
    q.requires_grad_()
    out, _ = memory_attention(q, k, v, **options)
    out.sum().backward()
    assert q.grad.abs().sum() > 0 and options["kv"].grad is None


def test_gradients_of_strided_inputs():
    q, k, v, options = make_inputs(BY_NAME["prefix"])
    grad = torch.randn_like(q)
    expected = gradients(memory_attention, q, k, v, options, grad)
    *strided, options = strided_views(q, k, v, options)
    # the gradient's own last dimension may be strided too
    for dout in (grad.transpose(1, 2).contiguous().transpose(1, 2), grad.mT.contiguous().mT):
        actual = gradients(memory_attention, *strided, options, dout)
        assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", ["primes", "pages"])
def test_reference_passes_gradcheck(name):
    case = dataclasses.replace(BY_NAME[name], batch=2, queries=2, dim=4, pages=2, page_tokens=2)
    if name == "primes":
        case = dataclasses.replace(case, pages=0, keys=3)
    q, k, v, options = to_double(*make_inputs(case))
    kv = options.pop("kv", None)
    inputs = [x.nan_to_num().requires_grad_() for x in (q, k, v)]
    inputs.append(None if kv is None else kv.nan_to_num().requires_grad_())

    def out(q, k, v, kv):
        return ref.memory_attention(q, k, v, kv=kv, **options)[0]

    assert torch.autograd.gradcheck(out, inputs)


@pytest.mark.parametrize("name", ["primes", "pages"])
def test_backward_passes_opcheck(name):
    q, k, v, options = make_inputs(dataclasses.replace(BY_NAME[name], queries=2, keys=3))
    arguments = op_arguments(q, k, v, options)
    out, lse = torch.ops.lychee.memory_attention(*arguments)
    dout = torch.randn_like(out)
    torch.library.opcheck(
        torch.ops.lychee.memory_attention_bwd.default,
        (dout, *arguments[:3], out, lse, *arguments[3:], name == "pages"),
    )


@pytest.mark.parametrize(
    "op",
    [torch.ops.lychee.memory_attention_bwd, memory_attention_bwd.memory_attention_bwd],
    ids=["compiled", "composed"],
)
def test_backward_names_the_wrong_argument(op):
    q, k, v, options = make_inputs(BY_NAME["int8"])
    arguments = op_arguments(q, k, v, options)
    out, lse = torch.ops.lychee.memory_attention(*arguments)
    wrong = {
        "dout: expected shape [2, 4, 5, 72], got [2, 4, 4, 72]": (out[:, :, 1:], out, lse, False),
        "out: expected dtype float32, got bfloat16": (out, out.bfloat16(), lse, False),
        "lse: expected shape [2, 4, 5], got [2, 4, 4]": (out, out, lse[..., 1:], False),
        "kv: expected a float bank, got a quantised one": (out, out, lse, True),
    }
    for message, (dout, output, sums, bank_wanted) in wrong.items():
        check_message(
            message, op, dout, *arguments[:3], output, sums, *arguments[3:], bank_wanted,
        )  # fmt: skip


def test_gradients_compile_to_one_graph():
    q, k, v, options = make_inputs(BY_NAME["prefix"])
    options["kv"] = options["kv"].nan_to_num()

    def loss(q, kv):
        return memory_attention(q, k, v, **options | {"kv": kv})[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = [q.requires_grad_(), options["kv"].requires_grad_()]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    actual = torch.autograd.grad(compiled(*leaves), leaves)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
