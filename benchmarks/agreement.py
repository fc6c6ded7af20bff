# SPDX-License-Identifier: Apache-2.0
"""Whether a peer computed the same: no time is taken of a wrong result."""

import torch

# Largest difference to a peer, as a share of the largest value: what rounding at every step costs
# a composition in this dtype, and one level of a quantised row. Other integers are equal.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.int8: 1.001 / 127}
# Elements compared at once, in float64.
BLOCK = 1 << 24


def check(entry, ours, theirs, name):
    """Compares the tensors that both return, in order."""
    for mine, other in zip(entry.comparable(ours), theirs, strict=False):
        other = other.reshape(mine.shape)
        blocks = zip(*(x.reshape(-1).split(BLOCK) for x in (mine, other)), strict=True)
        # NaN stays NaN through the maxima, and fails below
        extremes = [_error_and_largest(a.double(), b.double()) for a, b in blocks]
        error, largest = torch.stack(extremes).amax(0).tolist()
        allowed = TOLERANCE.get(mine.dtype, 0) * largest
        assert error <= allowed, f"{entry.op} against {name}: differs by {error}, not {allowed}"


def _error_and_largest(mine, other):
    return torch.stack(((mine - other).abs().max(), other.abs().max()))
