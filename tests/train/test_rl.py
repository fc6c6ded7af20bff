# SPDX-License-Identifier: Apache-2.0
"""Reinforcement learning: what moves, what stays, what is logged, and resuming to the same bits."""

import json
import shutil

import pytest
import torch
from small_reader import MEMORY, book, small_reader
from typer.testing import CliRunner

from lychee.commands import app
from lychee.compressor import Compressor
from lychee.errors import CheckpointError, InputError, TrainingError
from lychee.eval.metrics import exact_match
from lychee.memory_model import LycheeMemory
from lychee.train.pretrain import Pretraining, PretrainRecipe, PretrainStage
from lychee.train.rl import Reinforcement
from lychee.train.rl_recipe import ReinforcementRecipe

RECIPE = """
seed = 0
threads = 1
updates = 2
save_every = 2
log_every = 1
evaluate_every = 2
evaluated_texts = 3
dump_every = 2
books = ["book.txt"]

[[stage]]
steps = 4
learning_rate = [3e-3, 1e-3]
texts = 3
questions = 4
group = 6
chunks = 2
facts = [2, 3]
single = true
numbers = 0.0
"""
MEMORY_PARAMETERS = ("lychee_memory_embed_tokens", "lychee_memory_k_proj", "lychee_memory_v_proj")


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    folder = tmp_path_factory.mktemp("books")
    (folder / "book.txt").write_text(book())
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory, books):
    """A model folder after some pretraining: sometimes right, so that groups are mixed."""
    folder = tmp_path_factory.mktemp("start")
    small_reader().save_pretrained(folder / "fresh", torch.float32)
    stage = PretrainStage(
        50, (1e-2, 1e-2), chunk=64, batch=4, questions=6, facts=(2, 3), single=1.0, numbers=0.0
    )
    recipe = PretrainRecipe(export="float32", log_every=100, stages=(stage,))
    Pretraining(recipe, folder / "run", books=books, start=folder / "fresh").run()
    return folder / "run" / "model"


def write_recipe(folder, text=RECIPE):
    path = folder / "rl.toml"
    path.write_text(text)
    return path


def new_run(tmp_path, books, start, text=RECIPE, folder="run"):
    recipe = ReinforcementRecipe.load(write_recipe(tmp_path, text))
    return Reinforcement(recipe, tmp_path / folder, books=books, start=start)


def signalling(run):
    """An experience with groups of mixed rewards."""
    for _ in range(20):
        experience, metrics = run.experience()
        if experience.mixed:
            return experience, metrics
    raise AssertionError("expected mixed groups, got none in 20 steps")


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rollouts_and_training_agree_before_the_first_update(tmp_path, books, start):
    run = new_run(tmp_path, books, start)
    experience, metrics = signalling(run)
    assert 0 < metrics["reward"] < 1 and metrics["equal_groups"] < 1
    _, first = run.loss(experience)
    assert first["rollout_gap_max"] < 2e-5
    run.update(experience)
    _, second = run.loss(experience)
    assert second["rollout_gap_max"] > 1e-3


def test_a_step_makes_better_answers_likelier(tmp_path, books, start):
    run = new_run(tmp_path, books, start, RECIPE.replace("seed = 0", "seed = 0\nkl = 0.0"))
    experience, _ = signalling(run)
    before = run.loss(experience)[0].item()
    for _ in range(3):
        run.update(experience)
    assert run.loss(experience)[0].item() < before - 1e-3


def test_reward_reaches_the_compressor(tmp_path, books, start):
    run = new_run(tmp_path, books, start)
    experience, _ = signalling(run)
    run.loss(experience)[0].backward()
    for name, parameter in run.decoder.named_parameters():
        if any(part in name for part in MEMORY_PARAMETERS):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_a_frozen_compressor_stays_as_it_was(tmp_path, books, start):
    text = RECIPE.replace("seed = 0", "seed = 0\nfreeze_compressor = true")
    run = new_run(tmp_path, books, start, text)
    experience, _ = signalling(run)
    assert not any(rows.requires_grad for rows in experience.frozen)
    run.run()
    began = LycheeMemory.from_pretrained(start).decoder.state_dict()
    moved = run.decoder.state_dict()
    kept = {name for name, value in moved.items() if torch.equal(value, began[name])}
    assert {name for name in moved if "lychee_memory_" in name} == kept
    # The folder beside the model makes the rows that the reader learned to read.
    compressor = LycheeMemory.from_pretrained(tmp_path / "run" / "compressor").decoder
    for name, value in compressor.state_dict().items():
        assert torch.equal(value, began[name].half().float()), name
    assert isinstance(run.model.compressor, Compressor)


def test_adapters_alone_learn(tmp_path, books, start):
    """Low-rank training of the reader and the memory's own parameters; the base stays."""
    text = RECIPE.replace("[[stage]]", '[lora]\nrank = 2\ntargets = ["q_proj"]\n\n[[stage]]')
    run = new_run(tmp_path, books, start, text)
    experience, _ = signalling(run)
    before = {name: value.clone() for name, value in run.decoder.state_dict().items()}
    run.update(experience)
    moved = {n for n, v in run.decoder.state_dict().items() if not torch.equal(v, before[n])}
    assert moved and all("lychee_memory_" in name or ".adapter." in name for name in moved)
    assert {"adapter" in name for name in moved} == {True, False}


def test_groups_of_equal_reward_move_nothing(tmp_path, books):
    """A model that is never right learns nothing, and says so."""
    small_reader().save_pretrained(tmp_path / "fresh", torch.float32)
    run = new_run(tmp_path, books, tmp_path / "fresh")
    before = {name: value.clone() for name, value in run.decoder.state_dict().items()}
    metrics = run.train_step()
    assert metrics["reward"] == 0 and metrics["equal_groups"] == 1
    assert "loss" not in metrics and "entropy" in metrics
    for name, value in run.decoder.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_policy_that_is_no_number_stops_the_run(tmp_path, books):
    """All its rewards are equal, so no loss would tell."""
    small_reader().save_pretrained(tmp_path / "fresh", torch.float32)
    run = new_run(tmp_path, books, tmp_path / "fresh")
    with torch.no_grad():
        run.decoder.model.norm.weight[3] = torch.nan
    with pytest.raises(TrainingError, match="step 1: expected a finite .* got entropy nan"):
        run.train_step()
    failed = torch.load(run.folder / "failed_batch.pt", weights_only=True)
    assert failed["step"] == 0 and failed["batch"]["signal"]["turns"][0]["prompt"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, books, start):
    """A finished run."""
    folder = tmp_path_factory.mktemp("whole")
    new_run(folder, books, start).run()
    return folder / "run"


def test_resuming_gives_the_same_weights(tmp_path, books, start, whole):
    part = new_run(tmp_path, books, start)
    for _ in range(3):
        part.averages.add(part.train_step())
        part.step += 1
        if part.step == 2:
            part.save()
    del part
    Reinforcement.train(
        tmp_path / "rl.toml", tmp_path / "run", books=books, start=start, resume=True
    )
    states = [
        torch.load(folder / "state.pt", weights_only=True) for folder in (whole, tmp_path / "run")
    ]
    for name, value in states[0]["weights"].items():
        assert torch.equal(states[1]["weights"][name], value), name
    for name in ("evaluations.jsonl", "rollouts.jsonl"):
        lines = [records(folder / name) for folder in (whole, tmp_path / "run")]
        without_time = [[{k: v for k, v in x.items() if k != "seconds"} for x in y] for y in lines]
        assert without_time[0] == without_time[1]


def test_resuming_refuses_another_start(tmp_path, books, whole):
    small_reader(seed=2).save_pretrained(tmp_path / "other", torch.float32)
    run = new_run(tmp_path, books, tmp_path / "other")
    shutil.copy(whole / "state.pt", tmp_path / "run")
    with pytest.raises(CheckpointError, match="start: weights: expected"):
        run.resume()


def test_what_is_written_down(tmp_path, books, start, whole):
    evaluations = records(whole / "evaluations.jsonl")
    assert [line["step"] for line in evaluations] == [0, 2, 4]
    assert all(line["questions"] == 12 for line in evaluations)
    rollouts = records(whole / "rollouts.jsonl")
    assert [line["step"] for line in rollouts] == [2] * 12 + [4] * 12
    for line in rollouts:
        assert len(line["rollouts"]) == 6
        for rollout in line["rollouts"]:
            assert len(rollout["turns"]) == 3
            assert rollout["reward"] == exact_match(rollout["turns"][-1], [line["expected"]])
    for line in records(whole / "metrics.jsonl"):
        assert 0 < line["entropy"] and 1 <= line["note_tokens"] <= MEMORY.size
        assert 1 <= line["answer_tokens"] <= MEMORY.answer and 0 <= line["cut_off"] <= 1
    # The first evaluation is of the starting model, greedy: the same whatever the seed.
    other = new_run(tmp_path, books, start, RECIPE.replace("seed = 0", "seed = 7"), "other")
    assert other.evaluate(0) == evaluations[0]["accuracy"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("group = 6", "group = 1"), r"stage\[1\].group: expected at least 2, got 1"),
        (("facts = [2, 3]", "facts = [0, 3]"), "facts: expected two counts from 1 up"),
        (("updates = 2", "updates = 0"), "updates: expected at least 1, got 0"),
        (("updates = 2", 'precision = "bfloat16"'), "precision: expected float32, as rollouts"),
        (("updates = 2", "temperature = 0.0"), "temperature: expected more than 0"),
        (("updates = 2", 'reward = "luck"'), "reward: expected one of exact_match, sub_em"),
        (("updates = 2", "held_out = 1.0"), "held_out: expected a share between 0 and 1"),
        (("chunks = 2\n", ""), "chunks: expected a value, got none"),
        (("numbers = 0.0", "numbers = 2.0"), "numbers: expected a share of 0 to 1, got 2.0"),
        (("numbers = 0.0", "hops = [0, 0]"), "hops: expected a weight above 0"),
    ],
)
def test_bad_recipes(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        ReinforcementRecipe.load(write_recipe(tmp_path, RECIPE.replace(*change)))


def test_books_too_short_to_hold_a_part_out(tmp_path, start):
    (tmp_path / "book.txt").write_text(book()[:1500])
    with pytest.raises(InputError, match="books: expected 65 tokens or more of one on each side"):
        new_run(tmp_path, tmp_path, start)


def test_command(tmp_path, books, start):
    recipe = str(write_recipe(tmp_path, RECIPE.replace("steps = 4", "steps = 1")))
    command = ["train", "rl", recipe, "--out", str(tmp_path / "run"), "--books", str(books)]
    found = CliRunner().invoke(app, [*command, "--start", str(start), "--freeze-compressor"])
    assert found.exit_code == 0, found.output
    assert (tmp_path / "run" / "compressor" / "config.json").is_file()
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["recipe"]["freeze_compressor"] is True
