# SPDX-License-Identifier: Apache-2.0
"""Muon beside AdamW: every parameter has one optimiser, and resuming changes no bit."""

import pytest
import torch
from small_run import RECIPE, assert_same_weights, run_folder, small_run, steps
from torch import nn

from lychee.errors import InputError
from lychee.train.optimizers import is_projection, make_optimizers
from lychee.train.pretrain import Pretraining, PretrainRecipe, PretrainStage

MUON = 'optimizer = "muon"\n' + RECIPE


def test_every_parameter_has_one_optimiser(tmp_path, books):
    run = small_run(tmp_path / "run", books, MUON)
    held = [p for optimizer in run.optimizers for g in optimizer.param_groups for p in g["params"]]
    assert len(held) == len({id(p) for p in held}) == len(run.trained_parameters())
    muon = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    names = {name for name, p in run.trained_parameters().items() if id(p) in muon}
    assert names == {n for n, p in run.trained_parameters().items() if is_projection(n, p)}
    assert any("q_proj" in name for name in names) and not any("embed" in name for name in names)


def test_learns(tmp_path, books):
    losses = steps(small_run(tmp_path / "run", books, MUON), 6)
    assert losses[-1] < losses[0]
    assert losses != steps(small_run(tmp_path / "adamw", books), 6)


def test_resuming_gives_the_same_weights(tmp_path, books):
    whole = small_run(tmp_path / "whole", books, MUON)
    whole.run()
    part = Pretraining(whole.recipe, run_folder(tmp_path / "part", books), books=books)
    for _ in range(2):
        part.averages.add(part.train_step())
        part.step += 1
    part.save()
    resumed = Pretraining(whole.recipe, tmp_path / "part", books=books)
    resumed.resume()
    resumed.run()
    assert_same_weights(tmp_path / "part", tmp_path / "whole")


def test_adapters_alone_need_no_adamw():
    recipe = PretrainRecipe(optimizer="muon", stages=(PretrainStage(1, (0, 0), 8, 1, 1),))
    (muon,) = make_optimizers(recipe, {"q_proj.adapter.down": nn.Parameter(torch.ones(2, 3))})
    assert isinstance(muon, torch.optim.Muon)


def test_spread_weights_are_refused(tmp_path, books):
    with pytest.raises(InputError, match="expected adamw for spread weights, got muon"):
        recipe = small_run(tmp_path / "run", books, MUON).recipe
        Pretraining(recipe, tmp_path / "run", books=books, shard=True)
