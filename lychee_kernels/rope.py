# SPDX-License-Identifier: Apache-2.0
"""Tables of rotary position embedding, and the rotation itself."""

import torch


def rope_tables(num_positions, inv_freq, scaling=1.0):
    """Cosines and sines of rotary position embedding for positions 0 .. num_positions - 1.

    Computed in float64 and rounded once: an angle computed in float32 is off by 0.03 rad at
    position 437,000.

    Args:
        num_positions: int >= 0, rows of the tables.
        inv_freq: [D/2], any float dtype, radians per position.
        scaling: float, multiplies both tables (YaRN's attention factor).

    Returns:
        cos, sin: [num_positions, D/2], float32, on the device of inv_freq.

    Raises:
        RuntimeError: inv_freq is not one-dimensional, or num_positions is negative.

    Source: Su et al., RoFormer, equation 34.
    """
    if inv_freq.dim() != 1 or not inv_freq.is_floating_point():
        raise RuntimeError(
            "rope_tables: inv_freq: expected a one-dimensional float tensor, "
            f"got {inv_freq.dtype} of shape {list(inv_freq.shape)}"
        )
    if num_positions < 0:
        raise RuntimeError(f"rope_tables: num_positions: expected >= 0, got {num_positions}")
    positions = torch.arange(num_positions, dtype=torch.float64, device=inv_freq.device)
    angles = torch.outer(positions, inv_freq.double())
    return (angles.cos() * scaling).float(), (angles.sin() * scaling).float()


def rotate(x, cos, sin):
    """Half-split rotation: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin); broadcasts."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
