# SPDX-License-Identifier: Apache-2.0
"""Pretraining of compressor and reader together: dense recall of facts through compressed memory.

The stage list of the TOML file is a curriculum over chunk length, density of facts and ratio.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee.compressor import MemoryTensors, TensorSink
from lychee.data.needles import word_list
from lychee.data.recall import IGNORED, Mixture, RecallBatch, RecallSampler
from lychee.train.metrics import Value
from lychee.train.recipe import Recipe, Stage
from lychee.train.run import TrainingRun

FINAL_TURN_WEIGHT = 0.3
# More groups pad less, fewer run larger products; three were fastest on one core.
LENGTH_GROUPS = 3


@dataclass(frozen=True)
class PretrainStage(Stage):
    """One step of the curriculum.

    `ratios` are drawn from evenly. `short` is the share of batches whose chunks are cut to a random
    length from an eighth of `chunk` on. The fields behind it are those of `data.recall.Mixture`.
    """

    chunk: int
    batch: int
    questions: int
    facts: tuple[int, int]
    ratios: tuple[int, ...] = (4,)
    short: float = 0.0
    single: float = Mixture.single
    numbers: float = Mixture.numbers
    noted: float = Mixture.noted
    confusable: float = Mixture.confusable

    def draw_chunk(self, draw: random.Random) -> int:
        """Tokens of one batch's chunks, a multiple of every ratio."""
        if not self.short or draw.random() >= self.short:
            return self.chunk
        step = math.lcm(*self.ratios)
        return step * draw.randint(max(1, self.chunk // 8 // step), self.chunk // step)

    @property
    def mixture(self) -> Mixture:
        return Mixture(self.single, self.numbers, self.noted, self.confusable)


@dataclass(frozen=True)
class PretrainRecipe(Recipe):
    """The recipe of a pretraining run."""

    stages: tuple[PretrainStage, ...] = ()


@dataclass(frozen=True)
class PretrainBatch:
    """Chunks with turns about them, and the ratio to compress them by."""

    ratio: int
    recall: RecallBatch

    def part(self, index: int, count: int) -> Self | None:
        recall = self.recall.part(index, count)
        return None if recall is None else replace(self, recall=recall)


class Pretraining(TrainingRun):
    """Compressor and reader learn together."""

    kind = "pretrain"
    recipe_type = PretrainRecipe

    def prepare(self) -> None:
        self.compressor = self.model.compressor
        self.sampler = RecallSampler(
            self.tokenizer,
            self.model.reasoner.prompts,
            [self.tokenizer.encode(text) for text in self.texts],
            word_list(self.texts, self.tokenizer.encode),
            self.random,
        )

    def sample(self) -> PretrainBatch:
        stage, _ = self.recipe.stage_at(self.step)
        ratio = self.random.choice(stage.ratios)
        chunk = stage.draw_chunk(self.random)
        recall = self.sampler.batch(stage.batch, chunk, stage.questions, stage.facts, stage.mixture)
        return PretrainBatch(ratio, recall)

    def loss(self, batch: PretrainBatch) -> tuple[Tensor, dict[str, Value]]:
        """Cross-entropy of update turns over the chunks' memory, and of final turns without it."""
        recall, ratio = batch.recall, batch.ratio
        sink = TensorSink(self.decoder.config.num_hidden_layers)
        window = min(self.model.memory.window, recall.chunks.shape[1])
        self.compressor.run(recall.chunks, sink, ratio=ratio, window=window)
        offset = recall.chunks.shape[1] // ratio
        update, exact = self.turn_loss(recall.turns, recall.labels, offset, sink.memory())
        final, final_exact = self.turn_loss(recall.final_turns, recall.final_labels, 0, None)
        metrics: dict[str, Value] = {
            "update_loss": update.item(),
            "final": (final_exact.sum().item(), len(final_exact)),
        }
        for case, results in itertools.groupby(
            sorted(zip(recall.cases, exact.tolist(), strict=True)), key=lambda pair: pair[0]
        ):
            values = [result for _, result in results]
            metrics[f"{case}_r{ratio}"] = (sum(values), len(values))
        return update + FINAL_TURN_WEIGHT * final, metrics

    def turn_loss(
        self, inputs: Tensor, labels: Tensor, offset: int, memory: list[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Mean loss over target tokens, and per row whether every target token was the argmax.

        Rows are read in groups of similar length, so that little of a group is padding.
        """
        places = torch.arange(labels.shape[1], device=labels.device)
        last = torch.where(labels != IGNORED, places, 0).amax(1)
        order = last.argsort(stable=True)
        total = torch.zeros((), device=inputs.device)
        exact = torch.empty(len(inputs), dtype=torch.bool, device=inputs.device)
        for rows in order.tensor_split(min(LENGTH_GROUPS, len(order))):
            width = int(last[rows[-1]]) + 1
            pages = None
            if memory is not None:
                pages = MemoryTensors(memory, rows * len(memory[0]) // len(inputs))
            loss, exact[rows] = self.group_loss(
                inputs[rows, :width], labels[rows, :width], offset, pages
            )
            total = total + loss
        return self.processes.mean(total, int((labels != IGNORED).sum())), exact

    def group_loss(
        self, inputs: Tensor, labels: Tensor, offset: int, pages: MemoryTensors | None
    ) -> tuple[Tensor, Tensor]:
        """Summed loss over target tokens, and per row whether every one was the argmax."""
        positions = torch.arange(offset, offset + inputs.shape[1], device=inputs.device)[None]
        rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
        hidden = self.decoder(
            inputs,
            positions=positions,
            max_position=offset + inputs.shape[1],
            pages=pages,
            select=(rows, columns),
        )
        logits = self.decoder.logits(hidden)
        targets = labels[rows, columns]
        wrong = torch.zeros(len(inputs), device=inputs.device)
        wrong.index_add_(0, rows, (logits.argmax(-1) != targets).float())
        return F.cross_entropy(logits, targets, reduction="sum"), wrong == 0
