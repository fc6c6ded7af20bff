# SPDX-License-Identifier: Apache-2.0
"""Optimisers of a training run: AdamW, or Muon for the projections and AdamW for the rest."""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from lychee.train.recipe import Recipe


def make_optimizers(recipe: Recipe, named: dict[str, nn.Parameter]) -> list[Optimizer]:
    """Optimisers that together hold every parameter once.

    Muon (orthogonalised momentum) takes the projections; embeddings, biases and norms stay with
    AdamW. Its updates are scaled to AdamW's usual size, so one learning rate serves both.
    """
    settings = {"betas": recipe.betas, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "adamw":
        return [AdamW(list(named.values()), **settings)]
    matrices = [p for name, p in named.items() if is_projection(name, p)]
    others = [p for name, p in named.items() if not is_projection(name, p)]
    muon = Muon(matrices, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
    # Adapters alone are all projections.
    return [muon, *([AdamW(others, **settings)] if others else [])]


def is_projection(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter maps activations to activations."""
    inside = "embed" not in name and "lm_head" not in name
    return inside and parameter.ndim == 2 and min(parameter.shape) > 1
