# SPDX-License-Identifier: Apache-2.0
"""Gradients of memory_attention where a GPU's forward is followed by the backward in matrix
products."""

import dataclasses
import functools

import pytest
import torch
from attention_cases import BY_NAME, gradients, make_inputs, to_double
from test_memory_attention_backends import plain_attention

from lychee_kernels import memory_attention_bwd as backward_module
from lychee_kernels import ref
from lychee_kernels.testing import compare

CASES = {
    "primes": torch.float32,
    "pages": torch.float32,
    "prefix": torch.bfloat16,
    "int8": torch.float32,
    "float8": torch.bfloat16,
}


@pytest.fixture
def differentiable(backend):
    """A backend that uses the backward in matrix products."""
    if backend.name not in ("emulated", "cuda"):
        pytest.skip("has a backward of its own")
    if backend.name == "emulated":
        emulate_backward()
    return backend


@functools.cache
def emulate_backward():
    """The emulator has no kernel for the backward: on a GPU it is this function too."""
    import emulated

    emulated.module().definitions.impl(
        "memory_attention_bwd", backward_module.memory_attention_bwd, "CPU"
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("max_scores", [1 << 25, 1 << 10])
def test_gradients_match_reference(differentiable, monkeypatch, name, max_scores):
    # few scores at once: several blocks of queries
    monkeypatch.setattr(backward_module, "MAX_SCORES", max_scores)
    dtype = CASES[name]
    q, k, v, options = make_inputs(dataclasses.replace(BY_NAME[name], queries=9), dtype)
    grad = torch.randn(q.shape)
    with differentiable.active():
        actual = gradients(differentiable.memory_attention, q, k, v, options, grad)
    exact = gradients(ref.memory_attention, *to_double(q, k, v, options), grad)

    def plain(q, k, v, **options):
        out, lse = plain_attention(q, k, v, options)
        return out, lse.detach()

    function = ref.memory_attention if dtype == torch.float32 else plain
    for result in zip(actual, exact, gradients(function, q, k, v, options, grad), strict=True):
        compare(*result)


def test_queries_without_keys_have_zero_gradients(differentiable):
    q, k, v, options = make_inputs(dataclasses.replace(BY_NAME["pages"], queries=3, keys=2))
    options["num_pages"][0] = 0
    with differentiable.active():
        dq, *others = gradients(
            differentiable.memory_attention, q, k, v, options, torch.ones(()).expand(q.shape)
        )
    assert (dq[0, :, 0] == 0).all() and dq[1].abs().sum() > 0
    assert all(x.isfinite().all() for x in (dq, *others))


@pytest.mark.parametrize("rope_mode", [0, 1])
def test_triton_follows_no_wrong_page(rope_mode):
    """Its backward is PyTorch; the forward on a GPU counts such pages as empty."""
    pytest.importorskip("triton")
    from lychee_kernels.triton.memory_attention import memory_attention_bwd

    case = dataclasses.replace(BY_NAME["pages"], queries=3, keys=2, rope_mode="affine")
    q, k, v, options = make_inputs(case)
    options["kv"].nan_to_num_()
    tables = [options[name] for name in ("page_table", "page_len", "page_base", "num_pages")]
    tables[3].fill_(2)
    tables[0][:, :2], tables[1][:, :2], tables[2][:, :2] = 1, 3, 7
    tables[1][:, 1] = 0
    cos, sin = options["cos"], options["sin"]
    options["rope_mode"] = ("none", "affine")[rope_mode]
    out, lse = ref.memory_attention(q, k, v, **options)
    grad = torch.randn(out.shape)

    def backward():
        return memory_attention_bwd(
            grad, q, k, v, out, lse, options["kv"], None, options["layer"], *tables, None, cos, sin,
            rope_mode, 1, case.dim**-0.5, True,
        )  # fmt: skip

    expected = backward()
    tables[1][:, 1] = 3
    for page in (-1, options["kv"].shape[0], 2**31 - 1):
        tables[0][:, 1] = page
        assert all(map(torch.equal, backward(), expected))
    if rope_mode:
        tables[0][:, 1] = 1
        for base in (-1, cos.shape[0] - 2, 2**31 - 1):
            tables[2][:, 1] = base
            assert all(map(torch.equal, backward(), expected))
