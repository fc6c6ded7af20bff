# SPDX-License-Identifier: Apache-2.0
"""Pretraining of compressor and reader together, on any texts.

Four losses with a weight each: next tokens of the text as the compressor reads it; reciting a span
of a chunk, and continuing behind it, from its memory; and dense recall of facts hidden in it. The
stage list of the TOML file is a curriculum over weights, chunk length, density of facts and ratio.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from lychee.bank.pieces import margin_of
from lychee.compressor import TensorSink
from lychee.data.file_traces import FileTraces
from lychee.data.needles import word_list
from lychee.data.recall import INITIAL_SHARE, Mixture, RecallBatch, RecallSampler
from lychee.data.texts import TextTurns, Turns, long_enough
from lychee.errors import InputError
from lychee.train.checks import check_shares
from lychee.train.metrics import Value
from lychee.train.reading import Reader
from lychee.train.recipe import Recipe, Stage
from lychee.train.run import TrainingRun

FINAL_TURN_WEIGHT = 0.3
WEIGHTS = ("recall", "language", "recite", "continuation")


@dataclass(frozen=True)
class PretrainStage(Stage):
    """One step of the curriculum.

    Attributes:
        chunk: tokens of a chunk.
        batch: chunks of a batch.
        questions: recall turns about each chunk.
        facts: fewest and most needles hidden in a chunk.
        ratios: raw tokens per memory token, drawn from evenly.
        short: share of batches whose chunks are cut to a random length from an eighth of `chunk`.
        recall: weight of the loss on recalled needles.
        least_loss: recall turns with a loss below this (nats, over all tokens of a turn) move no
            weight, which saves most of the work late in training.
        language: weight of the loss on the chunk's own next tokens.
        recite, continuation: weights of the losses on turns that repeat a span of the chunk, or
            continue behind it, from its memory alone.
        span: most tokens of such a turn.

    The fields behind them are those of `data.recall.Mixture`.
    """

    chunk: int
    batch: int
    questions: int = 0
    facts: tuple[int, int] = (0, 0)
    ratios: tuple[int, ...] = (4,)
    short: float = 0.0
    recall: float = 1.0
    least_loss: float = 0.0
    language: float = 0.0
    recite: float = 0.0
    continuation: float = 0.0
    span: int = 128
    single: float = Mixture.single
    numbers: float = Mixture.numbers
    noted: float = Mixture.noted
    confusable: float = Mixture.confusable

    def __post_init__(self):
        super().__post_init__()
        weights = {name: getattr(self, name) for name in WEIGHTS}
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name}: expected a weight of at least 0, got {weight}")
        if not any(weights.values()):
            raise ValueError(f"recall: expected one of {', '.join(WEIGHTS)} above 0, got none")
        if self.questions < 0 or bool(self.recall) != bool(self.questions):
            wanted = "at least 1 where recall is trained" if self.recall else "0 where recall is 0"
            raise ValueError(f"questions: expected {wanted}, got {self.questions}")
        if not 0 <= self.facts[0] <= self.facts[1]:
            raise ValueError(f"facts: expected two counts from 0 up, got {list(self.facts)}")
        if not 0 <= self.least_loss < math.inf:
            raise ValueError(f"least_loss: expected at least 0, got {self.least_loss}")
        check_shares(self, ("short", "single", "numbers", "confusable"))
        if not 0 <= self.noted <= 1 - INITIAL_SHARE:
            most = 1 - INITIAL_SHARE
            raise ValueError(f"noted: expected a share of 0 to {most}, got {self.noted}")
        for name in ("chunk", "batch", "span"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.ratios:
            raise ValueError("ratios: expected at least one, got none")
        for ratio in self.ratios:
            if ratio < 1 or self.chunk % ratio:
                raise ValueError(
                    f"ratios: expected divisors of the chunk of {self.chunk} tokens, got {ratio}"
                )

    def draw_chunk(self, draw: random.Random) -> int:
        """Tokens of one batch's chunks, a multiple of every ratio."""
        if not self.short or draw.random() >= self.short:
            return self.chunk
        step = math.lcm(*self.ratios)
        return step * draw.randint(self.shortest // step, self.chunk // step)

    @property
    def shortest(self) -> int:
        """The fewest tokens that `draw_chunk` draws."""
        if not self.short:
            return self.chunk
        step = math.lcm(*self.ratios)
        return step * max(1, self.chunk // 8 // step)

    @property
    def mixture(self) -> Mixture:
        return Mixture(self.single, self.numbers, self.noted, self.confusable)

    @property
    def following(self) -> int:
        """Tokens behind a chunk that its turns need."""
        return self.span if self.continuation else 0


@dataclass(frozen=True)
class PretrainRecipe(Recipe):
    """The recipe of a pretraining run."""

    stages: tuple[PretrainStage, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        for index, stage in enumerate(self.stages, start=1):
            if self.data is not None and (stage.continuation or not stage.recall):
                raise ValueError(
                    f"stage[{index}]: expected recall and no continuation beside [data], "
                    f"got recall {stage.recall} and continuation {stage.continuation}"
                )


@dataclass(frozen=True)
class PretrainBatch:
    """Chunks to compress by a ratio, and turns about them for every loss with a weight."""

    ratio: int
    chunks: Tensor  # [B, C]
    recall: RecallBatch | None = None
    recite: Turns | None = None
    continuation: Turns | None = None

    def part(self, index: int, count: int) -> Self | None:
        """The chunks of process `index` of `count` with their turns; None if it has none."""
        if len(self.chunks) < count:
            return None
        first, last = (len(self.chunks) * i // count for i in (index, index + 1))
        return replace(
            self,
            chunks=self.chunks[first:last],
            recall=self.recall and self.recall.part(index, count),
            recite=self.recite and self.recite.rows(first, last),
            continuation=self.continuation and self.continuation.rows(first, last),
        )


class Pretraining(TrainingRun):
    """Compressor and reader learn together."""

    kind = "pretrain"
    recipe_type = PretrainRecipe

    def prepare(self) -> None:
        self.compressor, self.reader = self.model.compressor, Reader(self.decoder, self.processes)
        stages, margin = self.recipe.stages, self.model.memory.margin
        for stage in stages:
            if stage.recall and stage.shortest <= margin:
                raise InputError(
                    f"chunk: expected more than the model's margin of {margin} tokens in the "
                    f"shortest chunks, got {stage.shortest}"
                )
            window = min(self.model.memory.window, stage.chunk)
            for ratio in stage.ratios:
                if window % ratio:
                    raise InputError(
                        f"ratios: expected divisors of the window of {window} tokens, got {ratio}"
                    )
        # One more than is read, so that there is always a place to draw.
        longest = max(stage.chunk + stage.following for stage in stages) + 1
        encoded = [self.tokenizer.encode(text) for text in self.texts]
        self.books = long_enough(encoded, longest, self.tokenizer.encode("\n\n"))
        self.text_turns = TextTurns(self.tokenizer, self.model.memory.templates, self.random)
        self.file_traces = self.sampler = None
        if self.samples:
            prompts, memory = self.model.reasoner.prompts, self.model.memory
            self.file_traces = FileTraces(
                self.samples, self.tokenizer, prompts, memory, self.random, margin_of(self.model)
            )
        share = self.recipe.data.share if self.recipe.data else 0
        if share < 1 and any(stage.recall for stage in stages):
            self.sampler = self.new_sampler(self.books, self.random)

    def new_sampler(self, books: list[list[int]], draw: random.Random) -> RecallSampler:
        """What generates chunks with facts, in books as token ids."""
        words = word_list(self.texts, self.tokenizer.encode)
        prompts, margin = self.model.reasoner.prompts, margin_of(self.model)
        return RecallSampler(self.tokenizer, prompts, books, words, draw, margin)

    @property
    def stage(self) -> PretrainStage:
        return self.recipe.stage_at(self.step)[0]

    def sample(self) -> PretrainBatch:
        stage, turns = self.stage, self.text_turns
        ratio = self.random.choice(stage.ratios)
        length = stage.draw_chunk(self.random)
        recall = None
        data = self.recipe.data
        if data is not None and (data.share == 1 or self.random.random() < data.share):
            recall = self.file_traces.batch(stage.batch, length, stage.questions)
            chunks = behind = recall.chunks
        elif stage.recall:
            self.sampler.following, self.sampler.behind = stage.following, []
            recall = self.sampler.batch(
                stage.batch, length, stage.questions, stage.facts, stage.mixture
            )
            chunks, behind = recall.chunks, torch.tensor(self.sampler.behind)
        else:
            passages = turns.passages(self.books, stage.batch, length + stage.following)
            chunks, behind = passages[:, :length], passages[:, length:]
        recite = turns.recite(chunks, stage.span) if stage.recite else None
        continuation = turns.continuation(behind) if stage.continuation else None
        return PretrainBatch(ratio, chunks, recall, recite, continuation)

    def loss(self, batch: PretrainBatch) -> tuple[Tensor, dict[str, Value]]:
        """Weighted sum of the stage's losses, all from one pass of the compressor."""
        stage, chunks = self.stage, batch.chunks
        sink = TensorSink(self.decoder.config.num_hidden_layers)
        hidden = self.compressor.run(
            chunks,
            sink,
            ratio=batch.ratio,
            window=min(self.model.memory.window, chunks.shape[1]),
            hidden=stage.language > 0,
        )
        memory, losses = sink.memory(), {}
        metrics: dict[str, Value] = {}
        if batch.recall is not None:
            losses["recall"] = self.recall_loss(batch.recall, memory, batch.ratio, metrics)
        if hidden is not None:
            targets = chunks[:, 1:].flatten()
            losses["language"] = self.reader.token_loss(hidden[:, :-1].flatten(0, 1), targets)
        for name in ("recite", "continuation"):
            turns = getattr(batch, name)
            if turns is not None:
                offset = chunks.shape[1] // batch.ratio
                losses[name], _, hits = self.reader.turn_loss(
                    turns.inputs, turns.labels, offset, memory
                )
                metrics[f"{name}_tokens_r{batch.ratio}"] = (hits.sum().item(), len(hits))
        for name, value in losses.items():
            if name != "recall":
                metrics[f"{name}_loss"] = value.item()
        total = sum(getattr(stage, name) * value for name, value in losses.items())
        return total, metrics

    def recall_loss(
        self, recall: RecallBatch, memory: list[Tensor], ratio: int, metrics: dict[str, Value]
    ) -> Tensor:
        """Loss of update turns over the chunks' memory, and of final turns without it."""
        offset, read = recall.chunks.shape[1] // ratio, self.reader.turn_loss
        least = self.stage.least_loss
        update, exact, _ = read(recall.turns, recall.labels, offset, memory, least)
        final, final_exact, _ = read(recall.final_turns, recall.final_labels, 0, None)
        metrics["update_loss"] = update.item()
        metrics["final"] = (final_exact.sum().item(), len(final_exact))
        for case, right in zip(recall.cases, exact.tolist(), strict=True):
            hits, count = metrics.get(f"{case}_r{ratio}", (0, 0))
            metrics[f"{case}_r{ratio}"] = (hits + right, count + 1)
        return update + FINAL_TURN_WEIGHT * final
