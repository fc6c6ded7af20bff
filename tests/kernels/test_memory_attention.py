# SPDX-License-Identifier: Apache-2.0
"""memory_attention: accuracy, gradients, registration, strides, edges. Errors: the file beside."""

import dataclasses

import pytest
import torch
from attention_cases import BY_NAME, CASES, QUANTISED, make_inputs, to_double

from lychee_kernels import memory_attention, ref
from lychee_kernels.testing import compare, poison

named = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def check_forward(q, k, v, options):
    actual = memory_attention(q, k, v, **options)
    exact_q, exact_k, exact_v, exact_options = to_double(q, k, v, options)
    exact, exact_lse = ref.memory_attention(exact_q, exact_k, exact_v, **exact_options)
    baseline, baseline_lse = ref.memory_attention(q, k, v, **options)
    compare(actual[0], exact, baseline)
    compare(actual[1], exact_lse, baseline_lse)


@named
def test_memory_attention_matches_reference(case):
    check_forward(*make_inputs(case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["primes", "cache", "pages", "prefix", "int8"])
def test_memory_attention_matches_reference_in_16_bits(name, dtype):
    check_forward(*make_inputs(BY_NAME[name], dtype))


@pytest.mark.parametrize("bank_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_memory_attention_matches_reference_over_other_float_banks(bank_dtype):
    case = dataclasses.replace(BY_NAME["prefix"], bank_dtype=bank_dtype)
    check_forward(*make_inputs(case, torch.bfloat16))


def gradients(function, q, k, v, options, grad):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    options = dict(options)
    bank = options.get("kv")
    if bank is not None and bank.dtype not in QUANTISED:
        options["kv"] = bank.detach().requires_grad_()
        leaves.append(options["kv"])
    out, lse = function(*leaves[:3], **options)
    assert not lse.requires_grad
    return torch.autograd.grad(out, leaves, grad.to(out.dtype))


@named
def test_memory_attention_gradients_match_reference(case):
    q, k, v, options = make_inputs(case)
    grad = torch.randn_like(q)
    actual = gradients(memory_attention, q, k, v, options, grad)
    exact = gradients(ref.memory_attention, *to_double(q, k, v, options), grad)
    baseline = gradients(ref.memory_attention, q, k, v, options, grad)
    for result in zip(actual, exact, baseline, strict=True):
        compare(*result)


def test_memory_attention_gradients_of_a_shared_page_add_up():
    q, k, v, options = make_inputs(BY_NAME["prefix"])
    options["kv"] = torch.randn_like(options["kv"])
    for name in ("page_table", "page_len", "page_base", "num_pages"):
        options[name] = options[name][:1].expand_as(options[name]).contiguous()
    grad = torch.randn_like(q)
    together = gradients(memory_attention, q, k, v, options, grad)[3]
    apart = 0
    for b in range(2):
        row = {name: options[name][b : b + 1] for name in
               ("page_table", "page_len", "page_base", "num_pages")}  # fmt: skip
        parts = [x[b : b + 1] for x in (q, k, v)]
        apart = apart + gradients(memory_attention, *parts, options | row, grad[b : b + 1])[3]
    assert together.abs().sum() > 0
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)


class _Explicit(torch.autograd.Function):
    """The reference with the backward that the op registers, in any dtype."""

    @staticmethod
    def forward(ctx, q, k, v, kv, options):
        out, lse = ref.memory_attention(q, k, v, kv=kv, **options)
        ctx.save_for_backward(q, k, v, kv, out, lse)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, kv, out, lse = ctx.saved_tensors
        results = ref.memory_attention_backward(grad, q, k, v, out, lse, kv=kv, **ctx.options)
        return *results, None


@pytest.mark.parametrize("name", ["primes", "pages"])
def test_memory_attention_backward_passes_gradcheck(name):
    case = dataclasses.replace(BY_NAME[name], batch=2, queries=2, dim=4, pages=2, page_tokens=2)
    if name == "primes":
        case = dataclasses.replace(case, pages=0, keys=3)
    q, k, v, options = to_double(*make_inputs(case))
    k, v = k.nan_to_num(), v.nan_to_num()
    kv = options.pop("kv", None)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    inputs.append(None if kv is None else kv.nan_to_num().requires_grad_())
    assert torch.autograd.gradcheck(lambda *x: _Explicit.apply(*x, options), inputs)


def op_arguments(q, k, v, options):
    names = ("kv", "kv_scale", "layer", "page_table", "page_len", "page_base", "num_pages", "valid",
             "cos", "sin")  # fmt: skip
    rest = [options.get(name, 0 if name == "layer" else None) for name in names]
    mode = 1 if options.get("rope_mode") == "affine" else 0
    return q, k, v, *rest, mode, options["query_stride"], q.shape[-1] ** -0.5


@pytest.mark.parametrize("name", ["primes", "pages"])
def test_memory_attention_passes_opcheck(name):
    q, k, v, options = make_inputs(dataclasses.replace(BY_NAME[name], queries=2, keys=3))
    if options.get("kv") is not None and options["kv"].is_floating_point():
        options["kv"] = options["kv"].nan_to_num()
    arguments = op_arguments(q.requires_grad_(), k.nan_to_num(), v.nan_to_num(), options)
    torch.library.opcheck(torch.ops.lychee.memory_attention.default, arguments)


def test_memory_attention_compiles_to_one_graph():
    q, k, v, options = make_inputs(BY_NAME["prefix"])
    q.requires_grad_()

    def loss(q):
        return memory_attention(q, k, v, **options)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(q), q)
    (actual,) = torch.autograd.grad(compiled(q), q)
    assert torch.equal(actual, expected)


def test_memory_attention_reads_strided_inputs():
    q, k, v, options = make_inputs(BY_NAME["prefix"])
    expected = memory_attention(q, k, v, **options)
    # q from a [B, T, Hq, D] projection, k and v from the front of a larger cache
    wide = poison(torch.empty(2, 70, 8, 80))
    wide[..., 8:72] = q.transpose(1, 2)
    caches = [poison(torch.empty(2, 2, 100, 64)) for _ in range(2)]
    for cache, x in zip(caches, (k, v), strict=True):
        cache[:, :, :70] = x
    bank = poison(torch.empty(4, 3, 2, 2, 64, 72))
    bank[..., :64] = options["kv"]
    actual = memory_attention(
        wide[..., 8:72].transpose(1, 2), caches[0][:, :, :70], caches[1][:, :, :70],
        **options | {"kv": bank[..., :64]},
    )  # fmt: skip
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


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
    (gradient,) = gradients(memory_attention, q, k, v, {}, torch.ones_like(q))[:1]
    assert gradient.isfinite().all()


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


def test_memory_attention_keeps_large_scores_apart():
    # scores of +-3000 overflow a softmax without its maximum; the largest key wins outright
    q = torch.full((1, 1, 1, 8), 100.0)
    k = torch.linspace(-10, 10, 200)[None, None, :, None].expand(1, 1, 200, 8).contiguous()
    v = torch.arange(200.0)[None, None, :, None].expand(1, 1, 200, 8).contiguous()
    out, lse = memory_attention(q, k, v)
    assert torch.equal(out, torch.full_like(q, 199.0))
    assert lse.item() == pytest.approx(8 * 1000 * 8**-0.5, rel=1e-6)
