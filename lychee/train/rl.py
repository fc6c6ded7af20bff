# SPDX-License-Identifier: Apache-2.0
"""Reinforcement learning of the whole reading loop, compressor included.

Each step draws texts of several chunks with questions, lets the model read and answer every one of
them a group of times, and follows the group-relative policy gradient (see `objective`). Every
update computes the memory rows again with gradient: an answer's reward reaches the compressor.

With `freeze_compressor` the memory rows come from the starting weights, for good. Everything that
the reader runs through still learns, also the weights that it shared with the compressor until
then: from there on they are two models, and a finished run writes both folders.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lychee.bank.pieces import margin_of
from lychee.data.episodes import EpisodeBatch, EpisodeSampler, split_book
from lychee.data.file_episodes import FileEpisodes, encode_samples
from lychee.data.needles import word_list
from lychee.data.recall import RecallSampler
from lychee.decoder import Decoder
from lychee.errors import InputError
from lychee.eval.metrics import score
from lychee.lora import merge
from lychee.memory_model import LycheeMemory
from lychee.train.metrics import Value, keep_until
from lychee.train.objective import (
    Signal,
    clipped_objective,
    group_advantages,
    low_variance_kl,
    mixed_groups,
)
from lychee.train.rl_recipe import ReinforcementRecipe, ReinforcementStage
from lychee.train.rollouts import Policy, Rollout, describe, roll_out
from lychee.train.run import TrainingRun
from lychee.train.start import frozen_fingerprint

# Texts rolled out at once in an evaluation.
EVALUATED_TEXTS = 16
# Held-out texts are the same in runs of any seed, so that their accuracies compare.
EXAM_SEED = 20_250_914


@dataclass(frozen=True)
class Experience:
    """One process's rollouts of a step.

    Attributes:
        chunks: [C, T], the chunks that `signal`'s turns read.
        signal: turns of the groups whose rewards differ; where none do, one rollout's, which counts
            nothing: several processes must all compute the same.
        mixed: number of those groups.
        reference: [tokens] of `signal`, log-probabilities under the starting model.
        frozen: memory rows of `chunks` from the starting model, where the compressor is frozen.
    """

    chunks: Tensor
    signal: Signal
    mixed: int
    reference: Tensor
    frozen: list[Tensor] | None

    def part(self, index: int, count: int) -> Experience:
        """Itself: every process has rolled out its own texts."""
        return self


class Reinforcement(TrainingRun):
    """A run of reinforcement learning: `lychee train rl`."""

    kind = "rl"
    recipe_type = ReinforcementRecipe

    def prepare(self) -> None:
        recipe = self.recipe
        self.reference = copy.deepcopy(self.decoder).to(self.device).requires_grad_(False).eval()
        self.records = encode_samples(self.samples, self.tokenizer, self.model.memory.question)
        self.sampler = exam = None
        if not self.records:
            encoded = [self.tokenizer.encode(text) for text in self.texts]
            books = [split_book(book, recipe.held_out) for book in encoded]
            self.sampler = self.new_sampler([front for front, _ in books], self.random)
            exam = self.new_sampler([end for _, end in books], random.Random(EXAM_SEED))
        drawn = self.episodes(recipe.stages[-1], exam, "test")
        sizes = batch_sizes(recipe.evaluated_texts, EVALUATED_TEXTS)
        self.exam = [drawn.draw(size) for size in sizes]
        self.generator = torch.Generator(self.device)

    def new_sampler(self, books: list[list[int]], draw: random.Random) -> RecallSampler:
        """A sampler over those parts of books that are longer than a chunk."""
        size = self.model.memory.chunk
        long_enough = [book for book in books if len(book) > size]
        if not long_enough:
            longest = max(map(len, books), default=0)
            raise InputError(
                f"books: expected {size + 1} tokens or more of one on each side of held_out, "
                f"got {longest}"
            )
        words = word_list(self.texts, self.tokenizer.encode)
        prompts, margin = self.model.reasoner.prompts, margin_of(self.model)
        return RecallSampler(self.tokenizer, prompts, long_enough, words, draw, margin)

    def episodes(
        self, stage: ReinforcementStage, sampler: RecallSampler | None, split: str
    ) -> EpisodeSampler | FileEpisodes:
        """Episodes of a split of the recipe's files, or where it has none generated ones."""
        chunk = self.model.memory.chunk
        if not self.records:
            return EpisodeSampler(sampler, stage, chunk, split)
        draw = self.random if split == "train" else random.Random(EXAM_SEED)
        margin = margin_of(self.model)
        return FileEpisodes(self.records, stage.chunks, chunk, split, draw, margin)

    def trains(self, name: str) -> bool:
        return not (self.recipe.freeze_compressor and "lychee_memory_" in name)

    def policy(self, decoder: Decoder, temperature: float | None = None) -> Policy:
        heat = self.recipe.temperature if temperature is None else temperature
        return Policy(decoder, self.model.reasoner.prompts, self.model.memory, heat)

    @property
    def compressing(self) -> Policy:
        """The policy that makes memory rows."""
        frozen = self.recipe.freeze_compressor
        return self.policy(self.reference if frozen else self.decoder)

    def train_step(self) -> dict[str, Value]:
        """Rollouts, and `updates` steps of the optimiser on them."""
        if self.step == 0:
            self.evaluate(0)
        experience, metrics = self.experience()
        # Without mixed groups there is no loss that would tell.
        entropy = self.processes.sum(torch.tensor(metrics["entropy"], device=self.device)).item()
        if not math.isfinite(entropy):
            self.stop_on(experience, {"entropy": entropy})
        mixed = self.processes.sum(torch.tensor(experience.mixed, device=self.device))
        for index in range(self.recipe.updates if mixed else 0):
            found = self.update(experience)
            gaps = {name for name in found if name.startswith("rollout_gap")}
            metrics |= {n: v for n, v in found.items() if not index or n not in gaps}
        if (self.step + 1) % self.recipe.evaluate_every == 0:
            metrics["accuracy"] = self.evaluate(self.step + 1)
        return metrics

    @torch.no_grad()
    def experience(self) -> tuple[Experience, dict[str, Value]]:
        """Draw episodes, roll this process's share of them out, and judge the answers."""
        stage, _ = self.recipe.stage_at(self.step)
        # Anew in every step, so that nothing but the step must be saved.
        seeds = (self.recipe.seed, self.step, self.processes.rank)
        self.generator.manual_seed(random.Random(repr(seeds)).getrandbits(63))
        batch = self.processes.part(self.episodes(stage, self.sampler, "train").draw(stage.texts))
        chunks = batch.chunks.flatten(0, 1).to(self.device)
        with self.processes.unsharded(self.wrapped):
            rows = self.compressing.compress(chunks)
            rollouts = roll_out(self.policy(self.decoder), batch, rows, stage.group, self.generator)
        rewards = self.rewards(batch, rollouts).view(-1, stage.group)
        mixed = mixed_groups(rewards)
        metrics = describe(rollouts, self.model.reasoner.prompts.stop)
        metrics |= {
            "reward": rewards.mean().item(),
            "equal_groups": 1 - mixed.float().mean().item(),
        }
        if self.recipe.dump_every and (self.step + 1) % self.recipe.dump_every == 0:
            self.dump(batch, rollouts, rewards.flatten().tolist())
        advantages = group_advantages(rewards).flatten().tolist()
        kept = mixed.repeat_interleave(stage.group).nonzero()[:, 0].tolist()
        signal = Signal.collect(
            [rollouts[i] for i in kept or [0]], [advantages[i] for i in kept or [0]], self.device
        )
        if not kept:
            signal = replace(signal, count=torch.zeros_like(signal.count))
        chunks, reference = chunks[signal.chunks], self.policy(self.reference)
        first = reference.compress(chunks)
        frozen = first if self.recipe.freeze_compressor else None
        expected = signal.read(reference, first)
        return Experience(chunks, signal, int(mixed.sum()), expected, frozen), metrics

    def loss(self, batch: Experience) -> tuple[Tensor, dict[str, Value]]:
        """Negative objective with its penalty, a mean over the tokens of every process."""
        signal = batch.signal
        policy = self.policy(self.decoder)
        rows = policy.compress(batch.chunks) if batch.frozen is None else batch.frozen
        log_probs = signal.read(policy, rows)
        ratio = (log_probs - signal.log_probs).exp()
        gained = clipped_objective(ratio, signal.gain, signal.loss, self.recipe.ratio_clip)
        divergence = signal.count * low_variance_kl(log_probs, batch.reference)
        total = self.recipe.kl * divergence.sum() - gained.sum()
        tokens = int(signal.count.sum())
        outside = (ratio.detach() - 1).abs() > self.recipe.ratio_clip
        gap = (log_probs.detach() - signal.log_probs).abs()
        return self.processes.mean(total, tokens), {
            "kl": (divergence.sum().item(), tokens),
            "clipped": ((signal.count * outside).sum().item(), tokens),
            "rollout_gap_max": gap.max().item(),
            "rollout_gap_mean": ((signal.count * gap).sum().item(), tokens),
        }

    def rewards(self, batch: EpisodeBatch, rollouts: Sequence[Rollout]) -> Tensor:
        """Reward [rollouts] of each final answer."""
        return torch.tensor(
            [
                score(
                    self.recipe.reward,
                    self.tokenizer.decode(rollout.answer),
                    [batch.questions[rollout.question].answer],
                )
                for rollout in rollouts
            ]
        )

    @torch.no_grad()
    def evaluate(self, step: int) -> float:
        """Mean reward of greedy answers about the held-out texts; one line in evaluations.jsonl."""
        right, asked = 0.0, 0
        with self.processes.unsharded(self.wrapped):
            for batch in self.exam:
                rows = self.compressing.compress(batch.chunks.flatten(0, 1).to(self.device))
                rollouts = roll_out(self.policy(self.decoder, 0.0), batch, rows, 1, self.generator)
                right += self.rewards(batch, rollouts).sum().item()
                asked += len(rollouts)
        line = {"step": step, "accuracy": right / asked, "questions": asked}
        self.append("evaluations.jsonl", line | {"seconds": round(self.seconds, 1)})
        return right / asked

    def dump(self, batch: EpisodeBatch, rollouts: Sequence[Rollout], rewards: list[float]) -> None:
        """One line per question in rollouts.jsonl: what each rollout noted, answered and earned.

        Of several processes, the first one's questions.
        """
        decode, stage = self.tokenizer.decode, self.recipe.stage_at(self.step)[0]
        for index, question in enumerate(batch.questions):
            span = range(index * stage.group, (index + 1) * stage.group)
            lines = [
                {
                    "turns": [decode(turn.written).strip() for turn in rollouts[i].turns],
                    "reward": rewards[i],
                }
                for i in span
            ]
            text = {"question": decode(question.ids).strip(), "expected": question.answer}
            self.append("rollouts.jsonl", {"step": self.step + 1} | text | {"rollouts": lines})

    def append(self, name: str, line: dict[str, Any]) -> None:
        """Add a line to a file of the run's folder, from one process."""
        if self.processes.first:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def description(self, step: int) -> dict[str, Any]:
        """As for every training; also which weights it began with, from which it is held back."""
        found = super().description(step)
        return found | {"start": found["start"] | {"weights": frozen_fingerprint(self.reference)}}

    def resumed(self) -> None:
        if self.processes.first:
            for name in ("evaluations.jsonl", "rollouts.jsonl"):
                keep_until(self.folder / name, self.step)

    def export(self) -> None:
        """Write the model folder, and the frozen compressor's beside it where there is one."""
        super().export()
        if self.recipe.freeze_compressor and self.processes.first:
            start = copy.deepcopy(self.reference).cpu()
            if self.recipe.lora is not None:
                merge(start)
            model = LycheeMemory(start, self.tokenizer, self.model.raw_config, self.model.memory)
            model.save_pretrained(self.folder / "compressor", getattr(torch, self.recipe.export))


def batch_sizes(total: int, most: int) -> list[int]:
    """`total` in parts of at most `most`."""
    return [min(most, total - start) for start in range(0, total, most)]
