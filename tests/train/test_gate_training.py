# SPDX-License-Identifier: Apache-2.0
"""Training the gate: labels, threshold, learning, resuming, and what a finished run writes."""

import json

import pytest
import torch
from small_run import GATE_RECIPE, write_recipe

from lychee import LycheeMemory
from lychee.errors import InputError, MemoryConfigError
from lychee.prompts import PromptTemplate
from lychee.train.gate import GateRecipe, GateTraining, calibrate, score_turns


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path, GATE_RECIPE)


def new_run(recipe, folder, books):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes((books / "tokenizer.json").read_bytes())
    return GateTraining(GateRecipe.load(recipe), folder, books=books)


def test_a_finished_run_writes_a_gate_that_loads(recipe, tmp_path, books):
    run = new_run(recipe, tmp_path / "run", books)
    before = {name: value.clone() for name, value in run.decoder.state_dict().items()}
    run.run()
    for name, value in run.decoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    model = LycheeMemory.from_pretrained(tmp_path / "run" / "model")
    measured = json.loads((tmp_path / "run" / "validation.json").read_text())
    assert model.gate.config.threshold == measured["threshold"]
    assert measured["recall"] >= 0.9 and measured["examples"] >= 40
    for name, parameter in run.gate.named_parameters():
        assert torch.equal(parameter, dict(model.gate.named_parameters())[name])
    answer = model.ask(model.remember("Some text to read. " * 40), "what is the code of abcde")
    assert answer.trace[0].score is None and answer.usage.chunks_gated > 0


def test_resuming_gives_the_same_gate(recipe, tmp_path, books):
    whole = new_run(recipe, tmp_path / "whole", books)
    whole.run()
    part = new_run(recipe, tmp_path / "part", books)
    for _ in range(2):
        part.train_step()
        part.step += 1
    part.save()
    again = new_run(recipe, tmp_path / "part", books)
    again.resume()
    again.run()
    for name, value in again.gate.state_dict().items():
        assert torch.equal(value, whole.gate.state_dict()[name]), name
    assert again.gate.head.weight.abs().sum() > 0


def test_learns_one_batch(recipe, tmp_path, books):
    run = new_run(recipe, tmp_path / "run", books)
    batch = run.sample()
    first = run.loss(batch)[0].item()
    for _ in range(60):
        run.update(batch)
    loss, metrics = run.loss(batch)
    assert loss.item() < 0.7 * first
    hits, count = metrics["true_positives"]
    misses, others = metrics["false_positives"]
    assert hits / count > misses / others


def test_labels_follow_the_cases(recipe, tmp_path, books):
    run = new_run(recipe, tmp_path / "run", books)
    assert (run.sampler.split, run.validation.split) == ("train", "validation")
    seen = {}
    for _ in range(12):
        batch = run.sample()
        _, wanted, cases = score_turns(
            run.gate, run.compressor, run.model, batch.recall, batch.ratio
        )
        assert len(cases) <= len(batch.recall.cases)
        for label, case in zip(wanted.tolist(), cases, strict=True):
            assert seen.setdefault(case, label) == label
    expected = {"found": 1, "replaced": 1, "hops1": 1, "hops2": 1, "hops3": 1}
    expected |= {"absent": 0, "kept": 0, "known": 0, "hops0": 0}
    assert {"known", "kept", "hops0", "hops1", "found"} <= seen.keys()
    assert seen == {case: expected[case] for case in seen}


def test_the_threshold_keeps_the_stated_recall():
    draw = torch.Generator().manual_seed(1)
    logits = torch.cat((torch.randn(300, generator=draw) + 1, torch.randn(500, generator=draw)))
    cases = ["found"] * 200 + ["hops1"] * 100 + ["absent"] * 400 + ["known"] * 100
    for recall in (0.5, 0.9, 0.98):
        measured = calibrate(logits.tolist(), cases, recall)
        passed = logits.double().sigmoid() >= measured["threshold"]
        assert recall <= passed[:300].double().mean() < recall + 0.02
        assert measured["recall"] == pytest.approx(passed[:300].double().mean().item())
        assert measured["false_positives"] == pytest.approx(passed[300:].double().mean().item())
        assert measured["cases"]["known"][1] == 100
    above = (logits[:300, None] > logits[None, 300:]).double().mean().item()
    assert measured["auc"] == pytest.approx(above, abs=1e-6)


def test_split_takes_a_rendered_prompt_apart():
    def encode(text):
        return [ord(letter) for letter in text]

    for text in ("<m>{memory}<q>{question}<u>", "{question}--{memory}", "a{memory} b {question}"):
        template = PromptTemplate.from_text(text, encode)
        ids = template.render(encode("what is it"), encode("notes so far"))
        assert template.split(ids) == (encode("what is it"), encode("notes so far"))
    adjacent = PromptTemplate.from_text("{question}{memory}", encode)
    with pytest.raises(MemoryConfigError, match="expected text between"):
        adjacent.split([1, 2, 3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("least_recall = 0.9", "least_recall = 1.0"), "least_recall: expected a share, got 1.0"),
        (("validation = 40", "validation = 0"), "validation: expected at least 1, got 0"),
        (("tail = 4", "tail = 0"), "gate: tail: expected at least 1, got 0"),
        (("layers = 3\ntail", "tail"), "gate.layers: expected a value, got none"),
        (("rank = 4", "ranks = 4"), "gate.ranks: expected one of"),
        (("held_out = 0.3", "positive_weight = 0.0"), "positive_weight: expected above 0"),
        (
            ("questions = 8", "questions = 8\nrecite = 1"),
            r"stage\[1\].recite: expected 0, as a gate",
        ),
    ],
)
def test_bad_recipes(tmp_path, change, message):
    path = write_recipe(tmp_path, GATE_RECIPE.replace(*change))
    with pytest.raises((InputError, MemoryConfigError), match=message):
        GateRecipe.load(path)
