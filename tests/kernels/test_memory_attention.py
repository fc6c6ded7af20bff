# SPDX-License-Identifier: Apache-2.0
"""memory_attention: accuracy, registration, strides, edges. The files beside: one query token,
gradients, errors."""

import dataclasses

import pytest
import torch
from attention_cases import (
    BY_NAME,
    CASES,
    check_forward,
    make_inputs,
    op_arguments,
    strided_views,
)

from lychee_kernels import memory_attention

named = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@named
def test_memory_attention_matches_reference(case):
    check_forward(*make_inputs(case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["primes", "cache", "pages", "prefix", "tiles", "long_page", "int8", "float8"]
)
def test_memory_attention_matches_reference_in_16_bits(name, dtype):
    check_forward(*make_inputs(BY_NAME[name], dtype))


@pytest.mark.parametrize("bank_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_memory_attention_matches_reference_over_other_float_banks(bank_dtype):
    case = dataclasses.replace(BY_NAME["prefix"], bank_dtype=bank_dtype)
    check_forward(*make_inputs(case, torch.bfloat16))


@pytest.mark.parametrize("name", ["primes", "pages"])
def test_memory_attention_passes_opcheck(name):
    q, k, v, options = make_inputs(dataclasses.replace(BY_NAME[name], queries=2, keys=3))
    if options.get("kv") is not None and options["kv"].is_floating_point():
        options["kv"] = options["kv"].nan_to_num()
    arguments = op_arguments(q.requires_grad_(), k.nan_to_num(), v.nan_to_num(), options)
    torch.library.opcheck(torch.ops.lychee.memory_attention.default, arguments)


def test_memory_attention_reads_strided_inputs():
    q, k, v, options = make_inputs(BY_NAME["prefix"])
    expected = memory_attention(q, k, v, **options)
    q, k, v, options = strided_views(q, k, v, options)
    actual = memory_attention(q, k, v, **options)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("name", ["decode", "prefix"])
def test_memory_attention_matches_reference_at_another_scale(name):
    q, k, v, options = make_inputs(BY_NAME[name])
    check_forward(q, k, v, options | {"softmax_scale": 0.03})
    assert not torch.equal(
        memory_attention(q, k, v, **options)[0],
        memory_attention(q, k, v, **options, softmax_scale=0.03)[0],
    )


def test_memory_attention_output_is_token_major():
    q, k, v, options = make_inputs(BY_NAME["causal"])
    out, lse = memory_attention(q, k, v, **options)
    assert out.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous() and lse.dtype == torch.float32


def test_memory_attention_without_keys_is_zero_and_minus_infinity():
    q, k, v, options = make_inputs(dataclasses.replace(BY_NAME["pages"], keys=0))
    options["num_pages"][0] = 0
    out, lse = memory_attention(q, k, v, **options)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    assert out[1].abs().sum() > 0 and lse[1].isfinite().all()
    # more queries than keys: the first ones see nothing
    q, k, v, _ = make_inputs(dataclasses.replace(BY_NAME["causal"], queries=5, keys=2))
    out, lse = memory_attention(q, k, v)
    assert (out[:, :, :3] == 0).all() and (lse[:, :, :3] == -torch.inf).all()
    assert lse[:, :, 3:].isfinite().all()


def test_memory_attention_of_no_queries_is_empty():
    q, k, v, _ = make_inputs(dataclasses.replace(BY_NAME["causal"], queries=0))
    out, lse = memory_attention(q, k, v)
    assert out.shape == q.shape and lse.shape == q.shape[:3]


def test_memory_attention_does_not_depend_on_batch_or_threads():
    q, k, v, options = make_inputs(BY_NAME["cache"])
    expected = memory_attention(q, k, v, **options)[0]
    alone = memory_attention(q[1:], k[1:], v[1:], valid=options["valid"][1:])[0]
    assert torch.equal(alone, expected[1:])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        assert torch.equal(memory_attention(q, k, v, **options)[0], expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dim", [8, 64])
def test_memory_attention_keeps_large_scores_apart(dim):
    # scores of thousands overflow a softmax without its maximum; the largest key wins outright
    q = torch.full((1, 1, 1, dim), 100.0)
    k = torch.linspace(-10, 10, 200)[None, None, :, None].expand(1, 1, 200, dim).contiguous()
    v = torch.arange(200.0)[None, None, :, None].expand(1, 1, 200, dim).contiguous()
    out, lse = memory_attention(q, k, v)
    assert torch.equal(out, torch.full_like(q, 199.0))
    assert lse.item() == pytest.approx(dim * 1000 * dim**-0.5, rel=1e-6)


@pytest.mark.parametrize("queries", [1, 5])
def test_memory_attention_passes_nan_scores_on(queries):
    q, k, v, _ = make_inputs(dataclasses.replace(BY_NAME["causal"], queries=queries, keys=70))
    expected, expected_lse = memory_attention(q, k, v)
    q[0, 1, -1] = torch.nan
    out, lse = memory_attention(q, k, v)
    assert out[0, 1, -1].isnan().all() and lse[0, 1, -1].isnan()
    out[0, 1, -1], lse[0, 1, -1] = expected[0, 1, -1], expected_lse[0, 1, -1]
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
