# SPDX-License-Identifier: Apache-2.0
"""Supervised training on working-memory traces: needles and chains of facts over several hops."""

from __future__ import annotations

import random
from dataclasses import dataclass

from lychee.bank.pieces import margin_of
from lychee.data.needles import word_list
from lychee.data.traces import TraceMixture, TraceSampler
from lychee.train.checks import check_hops, check_shares
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
    alike: float = TraceMixture.alike
    longer: float = TraceMixture.longer
    sparse: float = TraceMixture.sparse
    bare: float = TraceMixture.bare
    plain: float = TraceMixture.plain

    def __post_init__(self):
        super().__post_init__()
        check_hops(self.hops)
        names = ("worlds", "rare", "comparisons", "surnames", "alike", "longer", "sparse", "bare")
        check_shares(self, (*names, "plain"))
        # A chunk may tell nothing that helps; then there must be other turns to draw.
        if not 0 <= self.progress < 1:
            raise ValueError(f"progress: expected a share below 1, got {self.progress}")

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
    sampler_type = TraceSampler

    def new_sampler(self, books: list[list[int]], draw: random.Random) -> TraceSampler:
        encode = self.tokenizer.encode
        return self.sampler_type(
            self.tokenizer,
            self.model.reasoner.prompts,
            books,
            word_list(self.texts, encode),
            draw,
            margin=margin_of(self.model),
            rare_words=word_list(self.texts, encode, RARE_COUNT, RARE_LENGTHS),
        )
