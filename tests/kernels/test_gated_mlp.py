# SPDX-License-Identifier: Apache-2.0
"""gated_mlp_: accuracy, rows left alone, slices of wide layers, every documented error."""

import pytest
import torch
from error_cases import check_message

import lychee_kernels
from lychee_kernels import gated_mlp_, ref
from lychee_kernels.testing import compare

# rows, hidden, inner: one of each, primes, the item size and its neighbours, a model's own.
SHAPES = [(1, 1, 1), (7, 13, 5), (119, 40, 67), (121, 64, 128), (240, 96, 200), (500, 512, 1408)]
# Large enough that leaving it out shows.
EPS = 1e-2


def make_weights(hidden, inner, dtype=torch.float32):
    gate, up = torch.randn(2, inner, hidden).mul_(hidden**-0.5).to(dtype)
    down = torch.randn(hidden, inner).mul_(inner**-0.5).to(dtype)
    return torch.rand(hidden).add_(0.5).to(dtype), gate, up, down


def in_double(x, weights):
    exact = x.double()
    ref.gated_mlp_(exact, *(weight.double() for weight in weights), eps=EPS)
    return exact


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape):
    rows, hidden, inner = shape
    x, weights = torch.randn(rows, hidden) * 3, make_weights(hidden, inner)
    exact, baseline = in_double(x, weights), x.clone()
    ref.gated_mlp_(baseline, *weights, eps=EPS)
    gated_mlp_(x, *weights, eps=EPS)
    compare(x, exact, baseline)


def test_large_activations_saturate():
    """silu of gates far beyond the range of exp is the gate or 0, never NaN."""
    x = torch.randn(6, 8)
    weights = [torch.ones(8), *(torch.randn(16, 8) * 1e4 for _ in "gu"), torch.randn(8, 16)]
    exact, baseline = in_double(x, weights), x.clone()
    ref.gated_mlp_(baseline, *weights, eps=EPS)
    gated_mlp_(x, *weights, eps=EPS)
    compare(x, exact, baseline)


def test_wide_layer_runs_in_slices():
    """4 * 192 * 16384 bytes of packed weights per matrix exceed what is packed at a time."""
    x, weights = torch.randn(3, 192), make_weights(192, 16384)
    exact, baseline = in_double(x, weights), x.clone()
    ref.gated_mlp_(baseline, *weights, eps=EPS)
    gated_mlp_(x, *weights, eps=EPS)
    compare(x, exact, baseline)


def test_strided_rows_and_weights_leave_their_neighbours_alone():
    wide, weights = torch.randn(131, 50), make_weights(24, 40)
    strided = [torch.full((w.shape[0], w.shape[1] + 7), torch.nan) for w in weights[1:]]
    for view, weight in zip(strided, weights[1:], strict=True):
        view[:, 3:-4] = weight
    x, before = wide[:, 5:29], wide.clone()
    expected = x.clone(memory_format=torch.contiguous_format)
    gated_mlp_(expected, *weights, eps=EPS)
    gated_mlp_(x, weights[0], *(view[:, 3:-4] for view in strided), eps=EPS)
    assert torch.equal(x, expected)
    assert torch.equal(wide[:, :5], before[:, :5]) and torch.equal(wide[:, 29:], before[:, 29:])


def test_rows_do_not_depend_on_each_other_or_on_threads():
    x, weights = torch.randn(250, 32), make_weights(32, 64)
    alone, before = x[:7].clone(), torch.get_num_threads()
    poisoned = torch.cat((x[:7], torch.full((1, 32), torch.nan), x[8:]))
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for rows in (alone.clone(), x.clone(), poisoned.clone()):
                gated_mlp_(rows, *weights, eps=EPS)
                if threads == 1 and len(rows) == 7:
                    expected = rows
                assert torch.equal(rows[:7], expected)
    finally:
        torch.set_num_threads(before)


def test_no_rows():
    gated_mlp_(torch.empty(0, 8), *make_weights(8, 4), eps=EPS)


def arguments():
    return dict(zip(("x", "norm_weight", "gate", "up", "down"), (
        torch.zeros(4, 8), torch.zeros(8), torch.zeros(6, 8), torch.zeros(6, 8), torch.zeros(8, 6),
    ), strict=True))  # fmt: skip


ERRORS = {
    "x: expected shape [*, *], got [8]": {"x": torch.zeros(8)},
    "x: expected dtype float32, got float64": {"x": torch.zeros(4, 8).double()},
    "norm_weight: expected shape [8], got [7]": {"norm_weight": torch.zeros(7)},
    "gate: expected shape [*, 8], got [6, 9]": {"gate": torch.zeros(6, 9)},
    "up: expected shape [6, 8], got [5, 8]": {"up": torch.zeros(5, 8)},
    "down: expected shape [8, 6], got [6, 8]": {"down": torch.zeros(6, 8)},
    "down: expected dtype float32, got bfloat16": {"down": torch.zeros(8, 6).bfloat16()},
    "x: expected a tensor without gradient": {"x": torch.zeros(4, 8, requires_grad=True)},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    check_message(message, gated_mlp_, **arguments() | ERRORS[message], eps=EPS)


@pytest.mark.skipif(
    lychee_kernels.backends()["gated_mlp_"] != "cpp", reason="the reference takes any stride"
)
def test_strided_last_dim_is_refused():
    with pytest.raises(RuntimeError, match="gated_mlp_: up: expected a contiguous last dimension"):
        gated_mlp_(**arguments() | {"up": torch.zeros(6, 16)[:, ::2]}, eps=EPS)


def test_opcheck():
    x, weights = torch.randn(5, 8), make_weights(8, 6)
    torch.library.opcheck(
        torch.ops.lychee.gated_mlp_.default, (x, weights[0], EPS, *weights[1:]), {}
    )


def test_compiles_whole():
    x, weights = torch.randn(5, 8), make_weights(8, 6)
    expected = x.clone()
    gated_mlp_(expected, *weights, eps=EPS)
    torch.compile(lambda x: gated_mlp_(x, *weights, eps=EPS), fullgraph=True, backend="aot_eager")(
        x
    )
    assert torch.equal(x, expected)
