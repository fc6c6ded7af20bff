# SPDX-License-Identifier: Apache-2.0
"""The loop of every kind of training: resuming to the same bits, checkpoints, metrics, recipes."""

import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from small_run import (
    RECIPE,
    assert_same_weights,
    run_folder,
    small_run,
    steps,
    write_recipe,
)

from lychee import cli
from lychee.errors import CheckpointError, InputError, TrainingError
from lychee.train.metrics import MetricsLog
from lychee.train.pretrain import Pretraining, PretrainRecipe

LONGER = RECIPE.replace("steps = 4", "steps = 16").replace("log_every = 2", "log_every = 1")


def test_a_killed_run_resumes_to_the_same_weights(tmp_path, books):
    whole, killed = (run_folder(tmp_path / name, books) for name in ("whole", "killed"))
    recipe = write_recipe(tmp_path, LONGER)
    Pretraining.train(recipe, whole, books=books)
    last = random.SystemRandom().randrange(1, 13)
    arguments = ["pretrain", str(recipe), "--out", str(killed), "--books", str(books)]
    process = subprocess.Popen(
        [sys.executable, "-m", "lychee", "train", *arguments], stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("{") and json.loads(line)["step"] == last:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    Pretraining.train(recipe, killed, books=books, resume=True)
    assert_same_weights(killed, whole)
    assert logged(killed) == logged(whole)


def logged(folder):
    """What was logged, less what a clock says."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    clock = ("seconds", "eta_s")
    return [{n: v for n, v in json.loads(line).items() if n not in clock} for line in lines]


def saved_run(folder, books):
    run = small_run(folder, books)
    steps(run, 1)
    run.save()


def test_averages_outlive_a_checkpoint_between_reports(tmp_path, books):
    whole = small_run(tmp_path / "whole", books, LONGER.replace("log_every = 1", "log_every = 6"))
    whole.run()
    part = Pretraining(whole.recipe, run_folder(tmp_path / "part", books), books=books)
    for _ in range(4):
        part.averages.add(part.train_step())
        part.step += 1
    part.save()
    resumed = Pretraining(whole.recipe, tmp_path / "part", books=books)
    resumed.resume()
    resumed.run()
    assert logged(tmp_path / "part") == logged(tmp_path / "whole")


def test_metrics_are_logged(tmp_path, books):
    small_run(tmp_path / "run", books).run()
    records = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4, 6]
    assert all(record["loss"] > 0 and record["eta_s"] >= 0 for record in records)


def test_small_numbers_are_not_written_as_zero(tmp_path, books):
    run = small_run(tmp_path / "run", books, RECIPE.replace("[3e-3, 3e-3]", "[1e-6, 1e-6]"))
    run.step = 2
    run.averages.add({"kl": 1.23456789e-7, "reward": 1 / 3})
    run.report(MetricsLog(run.folder, 0))
    (line,) = logged(run.folder)
    assert line == {"step": 2, "lr": 1e-6, "kl": 1.23457e-7, "reward": 0.333333}


def test_metrics_go_to_tensorboard(tmp_path, books):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    small_run(tmp_path / "run", books).run()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6]


def test_a_missing_tensorboard_is_one_line(tmp_path, books, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    small_run(tmp_path / "run", books).run()
    lines = [x for x in capsys.readouterr().out.splitlines() if not x.startswith("{")]
    assert lines == ["TensorBoard is not installed: metrics go to metrics.jsonl only"]


def test_a_folder_with_a_run_is_not_overwritten(tmp_path, books):
    saved_run(tmp_path / "run", books)
    with pytest.raises(InputError, match="expected a folder without a run, .*add --resume"):
        Pretraining.train(tmp_path / "recipe.toml", tmp_path / "run", books=books)


def test_a_folder_with_a_model_is_left_alone(tmp_path, books):
    saved_run(tmp_path / "run", books)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with pytest.raises(InputError, match="expected a folder without a model, got one with config"):
        Pretraining.train(tmp_path / "recipe.toml", model, books=books)
    assert [path.name for path in model.iterdir()] == ["config.json"]


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, books):
    run = small_run(tmp_path / "run", books)
    run.save()
    saved = run.state_path.read_bytes()
    with torch.no_grad():
        run.decoder.model.norm.weight[3] = torch.nan
    before = run.decoder.model.embed_tokens.weight.clone()
    with pytest.raises(TrainingError, match="step 1: expected a finite loss .*failed_batch.pt"):
        run.run()
    assert torch.equal(run.decoder.model.embed_tokens.weight, before)
    assert run.state_path.read_bytes() == saved
    failed = torch.load(tmp_path / "run" / "failed_batch.pt", weights_only=True)
    assert failed["step"] == 0 and failed["batch"]["chunks"].shape == (4, 32)


def test_a_batch_that_cannot_be_saved_hides_no_error(tmp_path, books):
    run = small_run(tmp_path / "run", books)
    batch = run.sample()
    with (
        full_disk(1000),
        pytest.raises(TrainingError, match="got loss nan; the batch could not be saved in .*large"),
    ):
        run.stop_on(batch, {"loss": math.nan})
    assert not list((tmp_path / "run").glob("failed_batch.*"))


@contextmanager
def full_disk(room):
    """No file may grow beyond `room` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, books):
    run = small_run(tmp_path / "run", books)
    run.save()
    saved = run.state_path.read_bytes()
    steps(run, 2)
    with (
        full_disk(len(saved) // 2),
        pytest.raises(TrainingError, match=r"File too large \(the last one is intact\)"),
    ):
        run.save()
    assert run.state_path.read_bytes() == saved
    assert [path.name for path in tmp_path.glob("run/*.tmp")] == []
    run.save()
    assert run.state_path.read_bytes() != saved


@pytest.mark.parametrize("damage", ["cut", "changed", "other"])
def test_a_damaged_checkpoint_is_refused(tmp_path, books, damage):
    run = small_run(tmp_path / "run", books)
    steps(run, 1)
    run.save()
    content = bytearray(run.state_path.read_bytes())
    if damage == "cut":
        run.state_path.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        content[len(content) // 2] ^= 1
        run.state_path.write_bytes(content)
    else:
        torch.save({"weights": {}}, run.state_path)
    with pytest.raises(CheckpointError, match="state.pt: expected a training state"):
        run.resume()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("hidden_size = 32", "hidden_size = 64"), "model: hidden_size: expected 64 .*got 32"),
        (("seed = 0", "seed = 1"), "recipe: seed: expected 1 as in this run, got 0"),
        (("batch = 4", "batch = 5"), r"recipe: stage: .*'batch': 5.*got .*'batch': 4"),
    ],
)
def test_another_runs_checkpoint_is_refused(tmp_path, books, change, message):
    saved_run(tmp_path / "run", books)
    recipe = write_recipe(tmp_path, RECIPE.replace(*change, 1))
    with pytest.raises(CheckpointError, match=message):
        Pretraining.train(recipe, tmp_path / "run", books=books, resume=True)


def test_other_texts_are_refused(tmp_path, books):
    saved_run(tmp_path / "run", books)
    (tmp_path / "book.txt").write_text((books / "book.txt").read_text() + "more")
    with pytest.raises(CheckpointError, match="recipe: texts: expected '.* got '"):
        Pretraining.train(tmp_path / "recipe.toml", tmp_path / "run", books=tmp_path, resume=True)


def test_another_kinds_checkpoint_is_refused(tmp_path, books):
    class OtherTraining(Pretraining):
        kind = "other"

    small_run(tmp_path / "run", books).run()
    with pytest.raises(CheckpointError, match="a checkpoint of other, got one of pretrain"):
        OtherTraining.train(tmp_path / "recipe.toml", tmp_path / "run", books=books, resume=True)


def test_stages_to_come_and_intervals_may_change(tmp_path, books):
    run = small_run(tmp_path / "run", books)
    steps(run, 2)
    run.save()
    later = replace(run.recipe.stages[1], steps=2, batch=3)
    recipe = replace(run.recipe, stages=(run.recipe.stages[0], later), save_every=5, threads=2)
    changed = Pretraining(recipe, tmp_path / "run", books=books)
    changed.resume()
    assert changed.step == 2 and changed.sample().chunks.shape[0] == 3
    torch.set_num_threads(1)


@pytest.mark.parametrize("kind", ["pretrain", "sft", "rl", "gate"])
def test_commands_report_mistakes_in_one_line(tmp_path, books, capsys, monkeypatch, kind):
    recipe = str(write_recipe(tmp_path, RECIPE.replace("seed", "sead")))
    arguments = ["lychee", "train", kind, recipe, "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--books", str(books)])
    assert cli.run() == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lychee: error: {recipe}: sead: expected one of seed, ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_nothing_to_start_from_is_refused(tmp_path, books):
    begin, end = RECIPE.index("[model]"), RECIPE.index("[memory]")
    recipe = write_recipe(tmp_path, RECIPE[:begin] + RECIPE[end:])
    with pytest.raises(InputError, match=r"expected \[model\], start or --start DIR"):
        Pretraining.train(recipe, tmp_path / "run", books=books)


def test_starting_from_a_folder_keeps_its_weights(tmp_path, books):
    small_run(tmp_path / "first", books).run()
    begin, end = RECIPE.index("[model]"), RECIPE.index("[memory]")
    recipe = PretrainRecipe.load(write_recipe(tmp_path, RECIPE[:begin] + RECIPE[end:]))
    start = tmp_path / "first" / "model"
    run = Pretraining(recipe, tmp_path / "second", books=books, start=start)
    stored = torch.load(tmp_path / "first" / "state.pt", weights_only=True)["weights"]
    name = "model.layers.1.self_attn.lychee_memory_k_proj.weight"
    got = dict(run.decoder.named_parameters())[name]
    assert torch.equal(got, stored[f"decoder.{name}"].half().float())
    assert not os.path.exists(tmp_path / "second" / "tokenizer.json")
    steps(run, 1)
