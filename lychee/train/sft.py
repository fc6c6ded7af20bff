# SPDX-License-Identifier: Apache-2.0
"""Supervised training on working-memory traces: needles and chains of facts over several hops."""

from __future__ import annotations

from dataclasses import dataclass

from lychee.data.needles import word_list
from lychee.data.traces import TraceMixture, TraceSampler
from lychee.train.pretrain import Pretraining, PretrainRecipe, PretrainStage

# Tokens of the longer words that keys and values may have.
RARE_LENGTHS, RARE_COUNT = range(2, 4), 8


@dataclass(frozen=True)
class SupervisedStage(PretrainStage):
    """One step of the curriculum, with the fields of `data.traces.TraceMixture`."""

    worlds: float = TraceMixture.worlds
    rare: float = TraceMixture.rare
    hops: tuple[float, ...] = TraceMixture.hops
    comparisons: float = TraceMixture.comparisons
    progress: float = TraceMixture.progress
    surnames: float = TraceMixture.surnames
    plain: float = TraceMixture.plain

    @property
    def mixture(self) -> TraceMixture:
        names = TraceMixture.__dataclass_fields__
        return TraceMixture(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class SupervisedRecipe(PretrainRecipe):
    """The recipe of a run on traces."""

    stages: tuple[SupervisedStage, ...] = ()


class SupervisedTraining(Pretraining):
    """Losses of the update turn and of the final turn, through the chunks' compressed memory."""

    kind = "sft"
    recipe_type = SupervisedRecipe

    def prepare(self) -> None:
        super().prepare()
        if self.sampler is None:
            return
        words = word_list(self.texts, self.tokenizer.encode)
        self.sampler = TraceSampler(
            self.tokenizer,
            self.model.reasoner.prompts,
            self.books,
            words,
            self.random,
            rare_words=word_list(self.texts, self.tokenizer.encode, RARE_COUNT, RARE_LENGTHS),
        )
