# SPDX-License-Identifier: Apache-2.0
"""Rollouts and their objective: the model's own turns, and every gradient where it belongs."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from small_reader import MEMORY, episode_sampler, small_reader

from lychee.compressor import MemoryTensors
from lychee.errors import InputError
from lychee.train.objective import (
    Signal,
    clipped_objective,
    group_advantages,
    low_variance_kl,
    mixed_groups,
)
from lychee.train.rollouts import Policy, draw_tokens, roll_out, turn_log_probs

GROUP = 6


def make_policy(temperature=1.0):
    model = small_reader()
    return Policy(model.decoder, model.reasoner.prompts, model.memory, temperature), model


def rolled(policy, model, group=GROUP, **shape):
    """A batch, and rollouts of it."""
    batch = episode_sampler(model, **shape).draw(2)
    with torch.no_grad():
        rows = policy.compress(batch.chunks.flatten(0, 1))
    generator = torch.Generator().manual_seed(3)
    return batch, rows, roll_out(policy, batch, rows, group, generator)


def signal_of(rollouts, advantages=None):
    if advantages is None:
        advantages = torch.randn(len(rollouts)).tolist()
    return Signal.collect(rollouts, advantages, "cpu")


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_rollout_and_training_log_probs_agree(temperature):
    """Token by token from a cache and all at once with gradient must be the same policy."""
    policy, model = make_policy(temperature)
    batch, _, rollouts = rolled(policy, model)
    signal = signal_of(rollouts)
    rows = policy.compress(batch.chunks.flatten(0, 1)[signal.chunks])
    assert rows[0].requires_grad
    found = signal.read(policy, rows)
    assert len({turn.identity for turn in signal.turns}) == len(signal.turns) > 20
    assert (found - signal.log_probs).abs().max() < 2e-5
    # The bound means something: another temperature is far off.
    other = signal.read(replace(policy, temperature=1.1 * temperature), rows)
    assert (other - signal.log_probs).abs().max() > 1e-2


def test_greedy_rollouts_are_the_reasoner():
    policy, model = make_policy(0.0)
    batch, rows, rollouts = rolled(policy, model, group=1)
    assert len(rollouts) == len(batch.questions) == 4
    for rollout, question in zip(rollouts, batch.questions, strict=True):
        notes = list(model.reasoner.prompts.no_memory)
        for place in range(3):
            pages = MemoryTensors(rows, torch.tensor([question.text * 3 + place]))
            (notes,) = model.reasoner.update([question.ids], [notes], pages)
            written = [token for token in rollout.turns[place].written if token]
            assert written == notes
        assert rollout.answer == model.reasoner.answer([question.ids], [notes])[0]


def test_turns_see_the_notes_before_them():
    policy, model = make_policy()
    _, _, rollouts = rolled(policy, model)
    stop, update = policy.prompts.stop, policy.prompts.update
    for rollout in rollouts:
        assert [len(turn.written) == len(turn.log_probs) > 0 for turn in rollout.turns] == [
            True
        ] * 4
        for turn, after in zip(rollout.turns[:2], rollout.turns[1:3], strict=True):
            assert all(token not in stop for token in turn.written[:-1])
            ended = turn.written[-1] in stop
            assert ended or len(turn.written) == MEMORY.size
            notes = turn.written[:-1] if ended else turn.written
            size = len(notes)
            before = len(update.sections[0][1])
            assert after.prompt[before : before + size] == notes
    # Rollouts of one question are drawn independently of each other.
    firsts = [rollout.turns[0].written for rollout in rollouts[:GROUP]]
    assert len(set(firsts)) > 1


def test_tokens_are_drawn_by_their_probability():
    expected = torch.tensor([[0.5, 0.0, 0.3, 0.2, 0.0], [0.0, 0.1, 0.0, 0.0, 0.9]])
    turns = 20_000
    row_of = torch.arange(turns) % 2
    tokens = draw_tokens(expected.log(), row_of, 1.0, torch.Generator().manual_seed(0))
    for row in (0, 1):
        found = torch.bincount(tokens[row_of == row], minlength=5) / (turns / 2)
        deviation = (expected[row] * (1 - expected[row]) / (turns / 2)).sqrt()
        assert ((found - expected[row]).abs() <= 4 * deviation).all()
    assert draw_tokens(expected.log(), row_of[:4], 0.0, None).tolist() == [0, 4, 0, 4]


def test_advantages():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert group_advantages(rewards).tolist() == [[0.75, -0.25, -0.25, -0.25], [0.0] * 4, [0.0] * 4]
    assert mixed_groups(rewards).tolist() == [True, False, False]


def test_clipped_objective_by_hand():
    """Advantages 0.75 and -0.25 of two rollouts that wrote the same token, clip 0.2."""
    ratio = torch.tensor([1.0, 1.5, 0.5, 1.1], requires_grad=True)
    gain, loss = torch.full((4,), 0.75), torch.full((4,), -0.25)
    found = clipped_objective(ratio, gain, loss, 0.2)
    expected = [0.75 - 0.25, 0.75 * 1.2 - 0.25 * 1.5, 0.75 * 0.5 - 0.25 * 0.8, 0.5 * 1.1]
    assert found.tolist() == pytest.approx(expected)
    found.sum().backward()
    # Beyond the clip a gain pulls no further, and a loss pushes no further.
    assert ratio.grad.tolist() == pytest.approx([0.5, -0.25, 0.75, 0.5])


def test_kl_estimator():
    value = low_variance_kl(torch.tensor(math.log(0.5)), torch.tensor(math.log(0.25)))
    assert value.item() == pytest.approx(0.5 - math.log(0.5) - 1)
    policy, reference = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    estimates = low_variance_kl(policy, reference)
    assert (estimates >= 0).all()
    exact = (policy.exp() * (policy - reference)).sum()
    assert (policy.exp() * estimates).sum().item() == pytest.approx(exact.item())


def objective(policy, signal, rows):
    ratio = (signal.read(policy, rows) - signal.log_probs).exp()
    return clipped_objective(ratio, signal.gain, signal.loss, 0.2).sum()


def test_merged_turns_count_as_often_as_they_occurred():
    """One pass over distinct turns gives the gradient of all turns of all rollouts, one by one."""
    policy, model = make_policy(0.25)
    batch, _, rollouts = rolled(policy, model)
    advantages = torch.randn(len(rollouts)).tolist()
    signal = signal_of(rollouts, advantages)
    turns = [turn for rollout in rollouts for turn in rollout.turns]
    assert len(signal.turns) < 0.8 * len(turns)
    assert signal.count.sum() == sum(len(turn.written) for turn in turns)
    # Away from the starting weights, where ratios differ and clipping matters.
    moved = copy.deepcopy(policy.decoder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    policy = replace(policy, decoder=moved)
    gradients = []
    for merged in (True, False):
        moved.zero_grad()
        chunks = batch.chunks.flatten(0, 1)
        if merged:
            value = objective(policy, signal, policy.compress(chunks[signal.chunks]))
        else:
            value = one_by_one(policy, rollouts, advantages, policy.compress(chunks))
        value.backward()
        gradients.append(
            {n: p.grad.clone() for n, p in moved.named_parameters() if p.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        scale = gradients[1][name].abs().max()
        assert (gradient - gradients[1][name]).abs().max() <= 2e-4 * scale, name


def one_by_one(policy, rollouts, advantages, rows):
    """The objective as it is defined: a sum over rollouts, turns and tokens."""
    total = 0.0
    for rollout, advantage in zip(rollouts, advantages, strict=True):
        for turn in rollout.turns:
            memory = None if turn.chunk < 0 else rows
            log_probs = turn_log_probs(policy, [turn], memory, {turn.chunk: turn.chunk})
            ratio = (log_probs - torch.tensor(turn.log_probs)).exp()
            clipped = ratio.clamp(0.8, 1.2)
            total = total + torch.minimum(advantage * ratio, advantage * clipped).sum()
    return total


def test_gradient_through_memory_rows():
    """Along the memory embedding, which only the compressor reads, the objective changes as the
    gradient says."""
    policy, model = make_policy()
    batch, _, rollouts = rolled(policy, model)
    signal = signal_of(rollouts)
    chunks = batch.chunks.flatten(0, 1)[signal.chunks]
    row = policy.decoder.model.lychee_memory_embed_tokens.weight
    objective(policy, signal, policy.compress(chunks)).backward()
    slope = row.grad.norm().item()
    direction = row.grad / slope
    values, step = [], 0.01
    with torch.no_grad():
        for sign in (1, -1):
            row += sign * step * direction
            values.append(objective(policy, signal, policy.compress(chunks)).item())
            row -= sign * step * direction
    assert slope > 0
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=0.02)


def test_worlds_ask_for_facts_in_their_order():
    model = small_reader()
    sampler = episode_sampler(model, worlds=1.0, facts=(2, 3), hops=(0.0, 1.0), chunks=4)
    batch = sampler.draw(8)
    assert batch.chunks.shape == (8, 4, MEMORY.chunk)
    asked = {question.text for question in batch.questions}
    assert asked == set(range(8))
    for question in batch.questions:
        chunks = batch.chunks[question.text].tolist()
        assert any(question.answer in model.tokenizer.decode(chunk) for chunk in chunks)


def test_chunks_too_short_for_any_fact_are_refused():
    sampler = episode_sampler(small_reader(), worlds=1.0, hops=(0.0, 0.0, 0.0, 1.0))
    sampler.chunk = 8
    with pytest.raises(InputError, match="chunk: expected room for 2 facts and more, got 8"):
        sampler.draw(1)


def test_parts_of_a_batch_are_whole():
    model = small_reader()
    batch = episode_sampler(model).draw(5)
    parts = [batch.part(index, 2) for index in (0, 1)]
    assert torch.equal(torch.cat([part.chunks for part in parts]), batch.chunks)
    asked = [part.questions[0] for part in parts]
    assert [question.text for question in asked] == [0, 0]
    assert sum(len(part.questions) for part in parts) == len(batch.questions)
    assert batch.part(0, 6) is None
