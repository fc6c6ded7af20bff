# SPDX-License-Identifier: Apache-2.0
"""Accuracy checks shared by tests and benchmarks."""

import torch

# Units in the last place of the largest output that a kernel may differ beyond twice the error of
# plain PyTorch: sums in another order, and a base-2 exponential good to 1.5 ulp.
SLACK_ULPS = {torch.float32: 4, torch.bfloat16: 1, torch.float16: 1, torch.float64: 4}


def error_vs(actual, exact):
    """Largest absolute difference to a float64 result; inf if NaN or infinities stand elsewhere.

    Args:
        actual: tensor, any float dtype.
        exact: float64 tensor of the same shape.

    Returns:
        float.
    """
    actual = actual.detach().double()
    for special in (torch.isnan, torch.isposinf, torch.isneginf):
        if not torch.equal(special(actual), special(exact)):
            return float("inf")
    finite = torch.isfinite(exact)
    return (actual - exact)[finite].abs().max().item() if finite.any() else 0.0


def compare(actual, exact, baseline):
    """Asserts that every element is about as accurate as plain PyTorch in the same dtype.

    |actual - exact| <= 2 * max |baseline - exact| + a few ulps of max |exact|, element by element;
    shape and dtype as the baseline; NaN and infinities at the same places as in exact.

    Args:
        actual: tensor under test.
        exact: float64 tensor, the reference computed from the same inputs.
        baseline: tensor, the reference computed in the dtype of actual.

    Raises:
        AssertionError: names the first violation.
    """
    exact = exact.detach()
    assert exact.dtype == torch.float64, f"exact: expected dtype float64, got {exact.dtype}"
    assert actual.dtype == baseline.dtype, f"expected dtype {baseline.dtype}, got {actual.dtype}"
    for tensor in (baseline, actual):
        assert tensor.shape == exact.shape, f"expected shape {exact.shape}, got {tensor.shape}"
    allowed = error_vs(baseline, exact)
    assert allowed != float("inf"), "baseline: NaN or infinities differ from exact"
    finite = exact[torch.isfinite(exact)]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    ulp = torch.finfo(actual.dtype).eps
    limit = 2 * allowed + SLACK_ULPS[actual.dtype] * ulp * largest
    error = error_vs(actual, exact)
    # "not <=" so that a NaN fails
    if not error <= limit:
        difference = (actual.detach().double() - exact).abs().nan_to_num(float("inf"))
        index = torch.unravel_index(difference.argmax(), difference.shape)
        where = [int(i) for i in index]
        raise AssertionError(
            f"error {error:.3e} exceeds {limit:.3e} (baseline {allowed:.3e}); at {where}: "
            f"expected {exact[index].item():.9g}, got {actual[index].item():.9g}"
        )


def poison(tensor):
    """Fills a tensor in place with what must never be read: NaN, or -1 for integers; returns it."""
    return tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
