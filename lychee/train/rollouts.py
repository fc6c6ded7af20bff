# SPDX-License-Identifier: Apache-2.0
"""Rollouts of the whole reading loop: sampled turns over compressed chunks, and a final answer.

Rollouts of one question mostly write the same words. What they have in common is computed once: a
prompt that several rows share, and every further token as long as they agree.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lychee.compressor import Compressor, MemoryTensors, TensorSink
from lychee.config import MemoryConfig
from lychee.data.episodes import EpisodeBatch
from lychee.decoder import Decoder
from lychee.generate import PromptBatch
from lychee.prompts import ReadingPrompts

NO_CHUNK = -1


@dataclass(frozen=True)
class Turn:
    """What one turn saw and wrote.

    Attributes:
        chunk: row of the batch's chunks [texts * C] whose memory it read, or NO_CHUNK.
        prompt: token ids in front of what was written.
        written: new token ids; the stop token is the last one where the turn was not cut off.
        log_probs: of each written token, under the policy that wrote it.
    """

    chunk: int
    prompt: tuple[int, ...]
    written: tuple[int, ...]
    log_probs: tuple[float, ...]

    @property
    def identity(self) -> tuple:
        return self.chunk, self.prompt, self.written


@dataclass
class Rollout:
    """One way through an episode: an update turn per chunk, then the final turn."""

    question: int
    turns: list[Turn] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Policy:
    """A decoder as reader, with all that a turn depends on besides its prompt.

    `temperature` 0 takes the likeliest token; log-probabilities are then those at temperature 1.
    """

    decoder: Decoder
    prompts: ReadingPrompts
    memory: MemoryConfig
    temperature: float = 1.0

    def compress(self, chunks: Tensor) -> list[Tensor]:
        """Memory rows of chunks [C, T], per layer [C, Hkv, 2, M, D]; differentiable."""
        sink = TensorSink(self.decoder.config.num_hidden_layers)
        window = min(self.memory.window, chunks.shape[1])
        Compressor(self.decoder).run(
            chunks.to(self.decoder.device), sink, ratio=self.memory.ratio, window=window
        )
        return sink.memory()

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities [N, V] (float32) of the tokens that follow hidden states [N, E]."""
        scores = self.decoder.logits(hidden).float() / (self.temperature or 1.0)
        return scores.log_softmax(dim=-1)


@torch.no_grad()
def roll_out(
    policy: Policy,
    batch: EpisodeBatch,
    rows: list[Tensor],
    group: int,
    generator: torch.Generator,
) -> list[Rollout]:
    """`group` rollouts of every question of a batch, one question after the other.

    Args:
        rows: memory rows of all chunks of the batch, as `Policy.compress` gives them.
        generator: on the decoder's device; draws every token.
    """
    prompts, per_text = policy.prompts, batch.chunks.shape[1]
    rollouts = [Rollout(i) for i in range(len(batch.questions)) for _ in range(group)]
    questions = [batch.questions[rollout.question] for rollout in rollouts]
    notes = [list(prompts.no_memory) for _ in rollouts]
    for place in range(per_text):
        turns = sample_turns(
            policy,
            [
                (question.text * per_text + place, prompts.update.render(question.ids, old))
                for question, old in zip(questions, notes, strict=True)
            ],
            rows,
            policy.memory.size,
            generator,
        )
        for rollout, turn in zip(rollouts, turns, strict=True):
            rollout.turns.append(turn)
        notes = [without_stop(turn, prompts.stop) for turn in turns]
    finals = [
        (NO_CHUNK, prompts.answer.render(question.ids, old))
        for question, old in zip(questions, notes, strict=True)
    ]
    turns = sample_turns(policy, finals, None, policy.memory.answer, generator)
    for rollout, turn in zip(rollouts, turns, strict=True):
        rollout.turns.append(turn)
        rollout.answer = without_stop(turn, prompts.stop)
    return rollouts


def without_stop(turn: Turn, stop: Container[int]) -> list[int]:
    """What a turn wrote, without the token that ended it."""
    ended = turn.written[-1] in stop
    return list(turn.written[:-1] if ended else turn.written)


def sample_turns(
    policy: Policy,
    asked: Sequence[tuple[int, list[int]]],
    rows: list[Tensor] | None,
    limit: int,
    generator: torch.Generator,
) -> list[Turn]:
    """One turn for each (chunk, prompt), of at most `limit` tokens; `rows` None reads no memory.

    `decoder` rows stand for distinct beginnings: `row_of` tells which one a turn goes on from.
    """
    decoder, device = policy.decoder, policy.decoder.device
    keys = [(chunk, tuple(prompt)) for chunk, prompt in asked]
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    row_of = torch.tensor([places[key] for key in keys], device=device)
    chunks = torch.tensor([chunk for chunk, _ in places], device=device)
    first = 0 if rows is None else policy.memory.slots
    batch = PromptBatch.build([prompt for _, prompt in places], first, limit, device)
    count, width = batch.ids.shape
    cache = decoder.new_cache(count, width + limit)
    ids, positions, valid = batch.ids, batch.positions, batch.valid
    live = torch.arange(len(asked), device=device)
    written: list[list[int]] = [[] for _ in asked]
    log_probs: list[list[float]] = [[] for _ in asked]
    for step in range(limit):
        hidden = decoder(
            ids,
            positions=positions,
            max_position=first + width + step,
            cache=cache,
            pages=None if rows is None else MemoryTensors(rows, chunks),
            valid=None if valid is None else valid[:, : width + step],
            select=(torch.arange(len(ids), device=device), torch.tensor(-1, device=device)),
        )
        scores = policy.log_probs(hidden)
        tokens = draw_tokens(scores, row_of, policy.temperature, generator)
        chosen = scores[row_of, tokens]
        for turn, token, value in zip(live.tolist(), tokens.tolist(), chosen.tolist(), strict=True):
            written[turn].append(token)
            log_probs[turn].append(value)
        going = [token not in policy.prompts.stop for token in tokens.tolist()]
        if step + 1 == limit or not any(going):
            break
        live, row_of, tokens = live[going], row_of[going], tokens[going]
        pairs, row_of = torch.stack((row_of, tokens)).unique(dim=1, return_inverse=True)
        parents, ids = pairs[0], pairs[1][:, None]
        cache.k, cache.v = cache.k[:, parents], cache.v[:, parents]
        positions, chunks = positions[parents, -1:] + 1, chunks[parents]
        valid = None if valid is None else valid[parents]
    results = zip(keys, written, log_probs, strict=True)
    return [Turn(*key, tuple(new), tuple(values)) for key, new, values in results]


def draw_tokens(
    scores: Tensor, row_of: Tensor, temperature: float, generator: torch.Generator
) -> Tensor:
    """A token [turns] for every turn from its row of log-probabilities [rows, V]."""
    if not temperature:
        return scores.argmax(dim=-1)[row_of]
    rows, size = scores.shape
    reached = scores.double().exp().cumsum(dim=-1)
    # Row r covers the numbers from r to r + 1, each token as much of them as it is probable.
    reached = reached / reached[:, -1:] + torch.arange(rows, device=scores.device)[:, None]
    drawn = torch.rand(len(row_of), generator=generator, device=scores.device, dtype=torch.float64)
    places = torch.searchsorted(reached.flatten(), row_of + drawn, right=True)
    return (places - row_of * size).clamp_(0, size - 1)


def turn_log_probs(
    policy: Policy, turns: Sequence[Turn], rows: list[Tensor] | None, row_of_chunk: dict[int, int]
) -> Tensor:
    """Log-probabilities [tokens] of what `turns` wrote, turn by turn, in one pass over each kind.

    Args:
        turns: update turns (then `rows` holds the memory they read) or final turns (None).
        row_of_chunk: where in `rows` a turn's chunk stands.
    """
    device = policy.decoder.device
    first = 0 if rows is None else policy.memory.slots
    texts = [turn.prompt + turn.written[:-1] for turn in turns]
    width = max(map(len, texts))
    ids = torch.tensor([text + (0,) * (width - len(text)) for text in texts], device=device)
    places = [
        (row, len(turn.prompt) - 1 + step, token)
        for row, turn in enumerate(turns)
        for step, token in enumerate(turn.written)
    ]
    row, column, token = torch.tensor(places, device=device).unbind(1)
    pages = None
    if rows is not None:
        chunks = torch.tensor([row_of_chunk[turn.chunk] for turn in turns], device=device)
        pages = MemoryTensors(rows, chunks)
    hidden = policy.decoder(
        ids,
        positions=torch.arange(first, first + width, device=device)[None],
        max_position=first + width,
        pages=pages,
        select=(row, column),
    )
    return policy.log_probs(hidden).gather(1, token[:, None])[:, 0]


def describe(rollouts: Sequence[Rollout], stop: Container[int]) -> dict[str, float]:
    """Metrics of rollouts: entropy per token (estimated by the tokens drawn), lengths of turns."""
    updates = [turn for rollout in rollouts for turn in rollout.turns[:-1]]
    finals = [rollout.turns[-1] for rollout in rollouts]
    values = [value for turn in updates + finals for value in turn.log_probs]
    cut_off = sum(turn.written[-1] not in stop for turn in updates + finals)
    return {
        "entropy": -sum(values) / len(values),
        "note_tokens": sum(len(turn.written) for turn in updates) / len(updates),
        "answer_tokens": sum(len(turn.written) for turn in finals) / len(finals),
        "cut_off": cut_off / len(updates + finals),
    }
