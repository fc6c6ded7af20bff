# SPDX-License-Identifier: Apache-2.0
"""The gate: same score however it is asked, and a loop that gives what gating one by one gives."""

import json
import random

import pytest
import torch

from lychee import LycheeMemory, reading
from lychee.compressor import MemoryTensors
from lychee.errors import CheckpointError, InputError, MemoryConfigError
from lychee.gate import Gate, GateConfig
from lychee.generate import Sampling
from lychee.reading import ReadingLoop, ReadingOptions


def random_gate(model, seed=0, **fields):
    """A gate whose scores differ from chunk to chunk."""
    config = GateConfig(**{"layers": 3, "tail": 2, "rank": 4} | fields)
    gate = Gate(model.decoder, config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        # Probabilities away from 0 and 1, where they would be equal, and that depend on the chunk
        # more than on the notes.
        gate.head.weight.mul_(0.1)
        gate.head.weight[:, -1] *= 0.02
    return gate.eval()


def prompt_of(model, question, notes):
    return model.reasoner.prompts.update.render(question, notes)


def score_alone(model, gate, bank, question, notes, chunk):
    prompts = gate.prepare([prompt_of(model, question, notes)], [notes], model.memory.slots)
    with torch.inference_mode():
        [logit] = gate.score(prompts, None, bank.page_table([[chunk]])).tolist()
    return 1 / (1 + torch.tensor(-logit).exp().item())


def one_by_one(model, gate, bank, question, threshold, passes, together=1):
    """The loop as the paper states it: ask the gate about a chunk, read it or not, go on.

    A turn reads the next `together` chunks that the gate wants under the notes as they stand, or
    all of them if there are fewer; the gate then goes on behind the last one read.
    """
    notes = list(model.reasoner.prompts.no_memory)
    seen = []
    for number in range(passes):
        changed, chunk = False, 0
        while chunk < len(bank):
            asked, wanted = [], []
            while chunk < len(bank) and len(wanted) < together:
                score = None
                if number or chunk >= gate.config.opening:
                    score = score_alone(model, gate, bank, question, notes, chunk)
                if score is None or score >= threshold:
                    wanted.append(chunk)
                asked.append((number, chunk, chunk in wanted, notes, score))
                chunk += 1
            if wanted:
                pages = bank.page_table([wanted], in_place=True)
                [new] = model.reasoner.update([question], [notes], pages)
                changed |= new != notes
                notes = new
                # What was asked behind them is asked again under the new notes.
                chunk = wanted[-1] + 1
                asked = [step for step in asked if step[1] < chunk]
                asked[-1] = (*asked[-1][:3], notes, asked[-1][4])
            seen += asked
        if not changed:
            break
    return seen


def read(model, gate, bank, questions, threshold, passes, **options):
    events = []
    loop = ReadingLoop(
        model.reasoner, bank, gate=gate, threshold=threshold, passes=passes, **options
    )
    notes = loop.run(questions, events.append)
    return notes, events, loop


@pytest.fixture(scope="module")
def bank(tiny_model, prose):
    return tiny_model.remember(prose(500, seed=2))


@pytest.mark.parametrize("seed", range(12))
def test_gating_ahead_equals_gating_one_by_one(tiny_model, bank, prose, seed, monkeypatch):
    draw = random.Random(seed)
    monkeypatch.setattr(reading, "FIRST_WINDOW", draw.choice([1, 4, 64]))
    gate = random_gate(
        tiny_model,
        seed,
        layers=draw.choice([2, 3]),
        tail=draw.choice([1, 2, 5, 200]),
        opening=draw.choice([0, 1, 3]),
    )
    passes = draw.choice([1, 2, 3])
    together = draw.choice([1, 2, 3, 7])
    questions = [
        tiny_model.tokenizer.encode(prose(draw.randint(2, 8), seed=10 * seed + index))
        for index in range(draw.choice([1, 2, 5]))
    ]
    start = list(tiny_model.reasoner.prompts.no_memory)
    scores = sorted(
        score_alone(tiny_model, gate, bank, questions[0], start, chunk)
        for chunk in range(len(bank))
    )
    # Between two scores, so that rounding decides nothing.
    place = draw.randrange(1, len(scores))
    assert scores[place] - scores[place - 1] > 1e-6
    threshold = (scores[place - 1] + scores[place]) / 2
    notes, events, _ = read(tiny_model, gate, bank, questions, threshold, passes, together=together)
    for index, question in enumerate(questions):
        expected = one_by_one(tiny_model, gate, bank, question, threshold, passes, together)
        mine = [event for event in events if event.question == index]
        assert notes[index] == expected[-1][3]
        # A last round stops where it would repeat itself: from there on nothing changes.
        assert len(mine) <= len(expected)
        for event, (number, chunk, was_read, after, score) in zip(mine, expected, strict=False):
            assert (event.round, event.chunk, event.read) == (number, chunk, was_read)
            assert event.notes == after
            assert event.score == (None if score is None else pytest.approx(score, abs=1e-5))
        assert all(after == notes[index] for _, _, _, after, _ in expected[len(mine) :])
        first = [event for event in mine if event.round == 0]
        assert [event.chunk for event in first] == list(range(len(bank)))


def test_the_gates_of_the_test_above_select(tiny_model, bank, prose):
    """Guards it: there are thresholds at which some chunks are read, some not, and notes change."""
    gate = random_gate(tiny_model)
    question = tiny_model.tokenizer.encode(prose(5, seed=3))
    everything = one_by_one(tiny_model, gate, bank, question, 0.0, 1)
    scores = sorted(score for _, _, _, _, score in everything)
    assert scores[-1] - scores[0] > 0.01
    mixed = []
    for place in range(2, len(scores), 4):
        seen = one_by_one(tiny_model, gate, bank, question, scores[place], 1)
        notes = {tuple(after) for _, _, _, after, _ in seen}
        read = sum(was_read for _, _, was_read, _, _ in seen)
        mixed.append(2 < read < len(bank) - 2 and len(notes) > 2)
    assert any(mixed)


def test_without_a_gate_passes_read_again_until_nothing_changes(tiny_model, bank, prose):
    question = tiny_model.tokenizer.encode(prose(5, seed=10))
    notes, events, loop = read(tiny_model, None, bank, [question], None, 9)
    assert all(event.read and event.score is None for event in events)
    last_change = max(i for i, event in enumerate(events) if event.changed)
    done = len(events) == 9 * len(bank) or len(events) - 1 - last_change == len(bank)
    assert done and len(events) > len(bank)
    assert loop.chunks_gated == [0]
    again = list(tiny_model.reasoner.prompts.no_memory)
    for event in events:
        pages = bank.page_table([[event.chunk]])
        [again] = tiny_model.reasoner.update([question], [again], pages)
        assert event.notes == again


def test_drawn_notes_are_gated_too(tiny_model, bank, prose):
    gate = random_gate(tiny_model)
    question = tiny_model.tokenizer.encode(prose(5, seed=3))
    hot = Sampling(temperature=1.5, seed=3)
    runs = [read(tiny_model, gate, bank, [question], 0.5, 2, sampling=hot)[1] for _ in range(2)]
    assert runs[0] == runs[1]
    assert {event.round for event in runs[0]} == {0, 1}


def test_scores_that_are_not_finite_stop_the_reading(tiny_model, bank, monkeypatch):
    """No chunk would pass, and none be read."""
    gate = random_gate(tiny_model)
    score = gate.score
    monkeypatch.setattr(gate, "score", lambda *given: score(*given) * float("nan"))
    with pytest.raises(CheckpointError, match="gate: expected finite scores, got others"):
        read(tiny_model, gate, bank, [[5, 6, 7]], 0.5, 1)


def test_merged_weights_and_shared_prompts_change_nothing(tiny_model, prose):
    """Training scores pairs one to one with adapters beside the weights; reading does neither."""
    model = tiny_model
    gate = random_gate(model, tail=3, targets=("q", "k", "v", "o"))
    questions = [model.tokenizer.encode(prose(n, seed=n)) for n in (3, 7)]
    notes = [questions[0][:3], questions[1][:1]]
    prompts = [prompt_of(model, *pair) for pair in zip(questions, notes, strict=True)]
    layers = [torch.randn(5, 2, 2, 8, 8) for _ in range(3)]
    rows = torch.tensor([0, 0, 1, 1, 1])
    with torch.no_grad():
        merged = gate.score(
            gate.prepare(prompts, notes, 8), rows, MemoryTensors(layers, torch.arange(5))
        )
        alone = gate.score(
            gate.prepare([prompts[row] for row in rows], [notes[row] for row in rows], 8),
            None,
            MemoryTensors(layers, torch.arange(5)),
        )
    gate.train()
    trained = gate.score(
        gate.prepare(prompts, notes, 8), rows, MemoryTensors(layers, torch.arange(5))
    )
    torch.testing.assert_close(merged, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(merged, trained.detach(), rtol=0, atol=1e-5)
    trained.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in gate.parameters())
    assert not any(name.startswith("decoder") for name, _ in gate.named_parameters())


def test_mistakes_are_named(tiny_model):
    with pytest.raises(MemoryConfigError, match="layers: expected at most 3, .* got 4"):
        Gate(tiny_model.decoder, GateConfig(layers=4))
    for fields, message in (
        ({"layers": 1}, "layers: expected at least 2, got 1"),
        ({"tail": 0}, "tail: expected at least 1, got 0"),
        ({"targets": ("x",)}, "targets: expected letters of q, k, v, o"),
        ({"threshold": float("nan")}, "threshold: expected a probability, got nan"),
    ):
        with pytest.raises(MemoryConfigError, match=message):
            GateConfig(**{"layers": 2} | fields)
    with pytest.raises(InputError, match="passes: expected at least 1, got 0"):
        ReadingOptions(passes=0)
    with pytest.raises(InputError, match="together: expected at least 1, got 0"):
        ReadingOptions(together=0)
    with pytest.raises(InputError, match="threshold: expected 0 to 1, got nan"):
        ReadingOptions(threshold=float("nan"))
    with pytest.raises(InputError, match="threshold: expected none without the gate, got 0.5"):
        ReadingOptions(gate=False, threshold=0.5)
    bank = tiny_model.remember("The sea ran high.")
    with pytest.raises(InputError, match="threshold: expected a model with a gate"):
        tiny_model.ask(bank, "what", reading=ReadingOptions(threshold=0.5))


def test_a_folder_keeps_its_gate(tiny_model, prose, tmp_path):
    gate = random_gate(tiny_model, opening=2, threshold=0.25)
    gated = LycheeMemory(
        tiny_model.decoder, tiny_model.tokenizer, tiny_model.raw_config, tiny_model.memory, gate
    )
    gated.save_pretrained(tmp_path)
    again = LycheeMemory.from_pretrained(tmp_path)
    assert again.gate.config == gate.config
    text = prose(300, seed=2)
    answers = [model.ask(model.remember(text), "who came again") for model in (gated, again)]
    assert answers[0].trace == answers[1].trace and answers[0].text == answers[1].text
    trace, usage = answers[1].trace, answers[1].usage
    assert [step.score is None for step in trace] == [True] * 2 + [False] * (len(trace) - 2)
    assert all(step.read == (step.score is None or step.score >= 0.25) for step in trace)
    assert usage.threshold == 0.25 and usage.chunks_gated >= len(trace) - 2
    assert usage.chunks_read == sum(step.read for step in trace)
    # A folder that is saved over without a gate has none.
    tiny_model.save_pretrained(tmp_path)
    assert LycheeMemory.from_pretrained(tmp_path).gate is None


def test_reading_options_reach_the_loop(tiny_model, prose):
    gate = random_gate(tiny_model)
    model = LycheeMemory(
        tiny_model.decoder, tiny_model.tokenizer, tiny_model.raw_config, tiny_model.memory, gate
    )
    bank = model.remember(prose(200, seed=2))
    none = model.ask(bank, "who came", reading=ReadingOptions(threshold=1.0))
    assert none.usage.chunks_read == 0 and none.sources == []
    every = model.ask(bank, "who came", reading=ReadingOptions(threshold=0.0))
    assert [source.chunk for source in every.sources] == list(range(len(bank)))
    assert [source.score for source in every.sources] == [step.score for step in every.trace]
    ungated = model.ask(bank, "who came", reading=ReadingOptions(gate=False, passes=2))
    assert {step.round for step in ungated.trace} == {0, 1}
    assert [s.memory for s in ungated.trace][: len(bank)] == [s.memory for s in every.trace]


def test_a_folder_whose_gate_does_not_fit(tiny_model, tmp_path):
    gate = random_gate(tiny_model)
    LycheeMemory(
        tiny_model.decoder, tiny_model.tokenizer, tiny_model.raw_config, tiny_model.memory, gate
    ).save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "gate.safetensors"
    fields, stored = json.loads(config.read_text()), weights.read_bytes()

    def refused(message, **changes):
        changed = {n: v for n, v in (fields | changes).items() if v is not None}
        config.write_text(json.dumps(changed))
        with pytest.raises((CheckpointError, MemoryConfigError), match=message):
            LycheeMemory.from_pretrained(tmp_path)

    refused("layers: expected a whole number, got 2.5", lychee_memory_gate_layers=2.5)
    refused("layers: expected a whole number, got none", lychee_memory_gate_layers=None)
    refused("layers: expected at most 3, as the model has, got 9", lychee_memory_gate_layers=9)
    refused("gate_depth: expected no such field, got 3", lychee_memory_gate_depth=3)
    refused("layers.1.q.a: expected none, got one", lychee_memory_gate_layers=2)
    refused(r"expected shape \[2, 32\] for this model, got \[4, 32\]", lychee_memory_gate_rank=2)
    refused("expected fields of the gate", **{n: None for n in fields if "_gate_" in n})
    weights.write_bytes(stored[:-7])
    refused("gate.safetensors: expected a gate, got")
    weights.unlink()
    refused("expected a gate.safetensors as config.json says, got none")
