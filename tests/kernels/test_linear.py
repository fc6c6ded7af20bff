# SPDX-License-Identifier: Apache-2.0
"""linear_: accuracy with and without norm, bias and residual, strided groups, documented errors."""

import itertools

import pytest
import torch
from error_cases import check_message

import lychee_kernels
from lychee_kernels import linear_, ref
from lychee_kernels.testing import compare

# rows, inputs, outputs: one of each, none, primes, the item size and its neighbours, a long sum.
SHAPES = [
    (1, 1, 1),
    (5, 0, 40),
    (7, 13, 5),
    (83, 40, 67),
    (85, 64, 128),
    (170, 96, 33),
    (30, 1100, 40),
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Large enough that leaving it out shows.
EPS = 1e-2


def options(inputs, outputs, norm, bias, add, dtype=torch.float32):
    return {
        "bias": torch.randn(outputs).to(dtype) if bias else None,
        "norm_weight": (torch.rand(inputs) + 0.5).to(dtype) if norm else None,
        "eps": EPS,
        "add": add,
    }


def apply_in_double(out, x, weight, given):
    exact = out.double()
    doubles = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    ref.linear_(exact, x.double(), weight.double(), **doubles)
    return exact


def apply_reference(out, x, weight, given):
    baseline = out.clone()
    ref.linear_(baseline, x, weight, **given)
    return baseline


@pytest.mark.parametrize("flags", list(itertools.product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(dtype, shape, flags):
    rows, inputs, outputs = shape
    dtype = DTYPES[dtype]
    x, weight = (torch.randn(rows, inputs) * 3).to(dtype), torch.randn(outputs, inputs).to(dtype)
    out, given = torch.randn(rows, outputs).to(dtype), options(inputs, outputs, *flags, dtype)
    exact, baseline = (f(out, x, weight, given) for f in (apply_in_double, apply_reference))
    linear_(out, x, weight, **given)
    compare(out, exact, baseline)


def test_out_is_overwritten_where_nothing_is_added():
    out = torch.full((5, 3), torch.nan)
    linear_(out, torch.ones(5, 4), torch.ones(3, 4))
    assert torch.equal(out, torch.full((5, 3), 4.0))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_strided_groups_leave_their_neighbours_alone(dtype):
    """Raw rows among interleaved ones, into columns of a wider result."""
    interleaved, weight = torch.randn(50, 5, 24).to(dtype), torch.randn(17, 24).to(dtype)
    wide, ones = torch.randn(200, 40).to(dtype), torch.ones(24, dtype=dtype)
    out, before = wide[:, 9:26], wide.clone()
    groups = interleaved[:, :-1]
    poisoned = interleaved.clone()
    poisoned[:, -1] = torch.nan
    expected = torch.empty(200, 17, dtype=dtype)
    linear_(expected, groups.reshape(200, 24), weight, norm_weight=ones, eps=EPS)
    linear_(out, poisoned[:, :-1], weight, norm_weight=ones, eps=EPS)
    assert torch.equal(out, expected)
    assert torch.equal(wide[:, :9], before[:, :9]) and torch.equal(wide[:, 26:], before[:, 26:])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_strided_weight(dtype):
    wide, x = torch.full((6, 20), torch.nan, dtype=dtype), torch.randn(9, 8).to(dtype)
    wide[:, 5:13], out = torch.randn(6, 8), torch.empty(2, 9, 6, dtype=dtype)
    linear_(out[0], x, wide[:, 5:13])
    linear_(out[1], x, wide[:, 5:13].contiguous())
    assert torch.equal(out[0], out[1])


@pytest.mark.skipif(
    lychee_kernels.backends()["linear_"] != "cpp", reason="torch's sums depend on the row count"
)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rows_do_not_depend_on_each_other_or_on_threads(dtype):
    # So many weights that two threads have a part of them each.
    x, weight = torch.randn(250, 320).to(dtype), torch.randn(500, 320).to(dtype)
    before = torch.get_num_threads()
    poisoned = torch.cat((x[:7], torch.full((1, 320), torch.nan, dtype=dtype), x[8:]))
    expected = torch.empty(7, 500, dtype=dtype)
    linear_(expected, x[:7], weight)
    try:
        for threads, rows in itertools.product((1, 2), (x, poisoned)):
            torch.set_num_threads(threads)
            out = torch.empty(250, 500, dtype=dtype)
            linear_(out, rows, weight)
            assert torch.equal(out[:7], expected)
            assert out[7].isnan().all() == (rows is poisoned) and not out[8:].isnan().any()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(0, 8, 4), (3, 8, 0)], ids=str)
def test_nothing_to_do(shape):
    rows, inputs, outputs = shape
    linear_(torch.empty(rows, outputs), torch.ones(rows, inputs), torch.ones(outputs, inputs))


def arguments():
    return {"out": torch.zeros(4, 6), "x": torch.zeros(4, 8), "weight": torch.zeros(6, 8)}


ERRORS = {
    "x: expected shape [*, *], got [8]": {"x": torch.zeros(8)},
    "x: expected dtype float32, got float64": {"x": torch.zeros(4, 8).double()},
    "out: expected shape [4, 6], got [4, 5]": {"out": torch.zeros(4, 5)},
    "out: expected shape [6, 6], got [4, 6]": {"x": torch.zeros(2, 3, 8)},
    "out: expected dtype float32, got bfloat16": {"out": torch.zeros(4, 6).bfloat16()},
    "x: expected dtype bfloat16, got float32": {"weight": torch.zeros(6, 8).bfloat16()},
    "weight: expected dtype float32, bfloat16 or float16, got int8": {
        "weight": torch.zeros(6, 8).char()
    },
    "weight: expected shape [*, 8], got [6, 9]": {"weight": torch.zeros(6, 9)},
    "bias: expected shape [6], got [8]": {"bias": torch.zeros(8)},
    "norm_weight: expected shape [8], got [6]": {"norm_weight": torch.zeros(6)},
    "norm_weight: expected dtype float32, got float16": {"norm_weight": torch.zeros(8).half()},
    "weight: expected a tensor without gradient": {"weight": torch.zeros(6, 8, requires_grad=True)},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    check_message(message, linear_, **arguments() | ERRORS[message])


@pytest.mark.skipif(
    lychee_kernels.backends()["linear_"] != "cpp", reason="the reference takes any stride"
)
def test_strided_last_dim_is_refused():
    with pytest.raises(RuntimeError, match="linear_: weight: expected a contiguous last dimension"):
        linear_(**arguments() | {"weight": torch.zeros(6, 16)[:, ::2]})


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_opcheck(dtype):
    shapes = (4, 6), (2, 2, 8), (8,), (6, 8)
    out, x, norm, weight = (torch.randn(shape).to(dtype) for shape in shapes)
    torch.library.opcheck(
        torch.ops.lychee.linear_.default, (out, x, norm, EPS, weight, None, True), {}
    )


def test_compiles_whole():
    x, weight, expected, out = torch.randn(5, 8), torch.randn(6, 8), torch.zeros(5, 6), None
    linear_(expected, x, weight)
    compiled = torch.compile(linear_, fullgraph=True, backend="aot_eager")
    out = torch.zeros(5, 6)
    compiled(out, x, weight)
    assert torch.equal(out, expected)
