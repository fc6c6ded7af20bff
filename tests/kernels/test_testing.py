# SPDX-License-Identifier: Apache-2.0
"""The accuracy checks themselves: each kind of wrong result must fail."""

import pytest
import torch

from lychee_kernels.testing import compare, error_vs, poison


@pytest.fixture
def exact():
    return torch.randn(4096, 8, dtype=torch.float64)


def test_compare_accepts_the_baseline_and_slightly_worse(exact):
    baseline = exact.float()
    compare(baseline, exact, baseline)
    compare(baseline * (1 + 2e-7), exact, baseline)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_compare_rejects_one_special_value(exact, value):
    actual = exact.float()
    actual[17, 3] = value
    with pytest.raises(AssertionError, match=r"at \[17, 3\]"):
        compare(actual, exact, exact.float())


def test_compare_rejects_one_bad_element(exact):
    actual = exact.float()
    actual[4000, 7] += 1e-4
    with pytest.raises(AssertionError, match=r"at \[4000, 7\]"):
        compare(actual, exact, exact.float())


def test_compare_rejects_one_zero_row_of_4096(exact):
    actual = exact.float()
    actual[1234] = 0
    with pytest.raises(AssertionError, match=r"at \[1234, "):
        compare(actual, exact, exact.float())


def test_compare_rejects_a_wrong_dtype(exact):
    with pytest.raises(AssertionError, match="expected dtype torch.float32, got torch.bfloat16"):
        compare(exact.bfloat16(), exact, exact.float())


def test_compare_rejects_a_broadcastable_shape(exact):
    exact = exact[:1].expand(4096, 8).clone()
    with pytest.raises(AssertionError, match="expected shape"):
        compare(exact[:1].float(), exact, exact.float())


def test_compare_wants_a_missing_special_value_too(exact):
    exact[5, 5] = -float("inf")
    baseline = exact.float()
    actual = baseline.clone()
    compare(actual, exact, baseline)
    actual[5, 5] = -1e30
    with pytest.raises(AssertionError):
        compare(actual, exact, baseline)


def test_error_vs_is_the_largest_difference(exact):
    assert error_vs(exact, exact) == 0
    actual = exact.clone()
    actual[3, 3] -= 0.5
    assert error_vs(actual, exact) == pytest.approx(0.5)


def test_poison_fills_floats_and_integers():
    assert poison(torch.zeros(3)).isnan().all()
    assert (poison(torch.zeros(3, dtype=torch.int32)) == -1).all()
