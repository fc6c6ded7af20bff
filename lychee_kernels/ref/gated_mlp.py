# SPDX-License-Identifier: Apache-2.0
"""gated_mlp_ in plain PyTorch: its specification."""

import torch.nn.functional as F


def gated_mlp_(x, norm_weight, gate, up, down, *, eps):
    normed = F.rms_norm(x, norm_weight.shape, norm_weight, eps)
    x += F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), down)
