# SPDX-License-Identifier: Apache-2.0
"""linear_ in plain PyTorch: its specification."""

import torch.nn.functional as F


def linear_(out, x, weight, *, bias=None, norm_weight=None, eps=0.0, add=False):
    if norm_weight is not None:
        x = F.rms_norm(x, norm_weight.shape, norm_weight, eps)
    y = F.linear(x.flatten(0, -2), weight, bias)
    if add:
        out += y
    else:
        out.copy_(y)
