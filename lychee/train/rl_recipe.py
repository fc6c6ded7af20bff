# SPDX-License-Identifier: Apache-2.0
"""Recipe of a run of reinforcement learning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lychee.data.episodes import EpisodeShape
from lychee.train.checks import check_hops, check_shares
from lychee.train.recipe import Recipe, Stage


@dataclass(frozen=True, kw_only=True)
class ReinforcementStage(EpisodeShape, Stage):
    """One [[stage]]: what its episodes are like, and how many a step takes.

    A step draws `texts` texts and answers each of their questions `group` times.
    """

    texts: int
    group: int

    def __post_init__(self):
        super().__post_init__()
        least = {"texts": 1, "questions": 1, "group": 2, "chunks": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name}: expected at least {smallest}, got {getattr(self, name)}")
        if not 1 <= self.facts[0] <= self.facts[1]:
            raise ValueError(f"facts: expected two counts from 1 up, got {list(self.facts)}")
        check_hops(self.hops)
        check_shares(self, ("confusable", "numbers", "worlds"))


@dataclass(frozen=True)
class ReinforcementRecipe(Recipe):
    """A run of reinforcement learning.

    Attributes:
        reward: metric of the final answer, "exact_match" or "sub_em", see `eval.metrics`.
        temperature: of the rollouts.
        updates: steps of the optimiser on one batch of rollouts.
        ratio_clip: how far a token's probability may move before it counts no more.
        kl: weight of the divergence from the starting model.
        freeze_compressor: learn from memory rows that stay as the starting model makes them.
        held_out: share at each book's end that only evaluations read.
        evaluate_every: in steps; `evaluated_texts` held-out texts, answered greedily.
        dump_every: in steps, of rollouts written to rollouts.jsonl; 0 is never.
    """

    reward: Literal["exact_match", "sub_em"] = "exact_match"
    temperature: float = 1.0
    updates: int = 1
    ratio_clip: float = 0.2
    kl: float = 1e-3
    freeze_compressor: bool = False
    held_out: float = 0.1
    evaluate_every: int = 20
    evaluated_texts: int = 32
    dump_every: int = 20
    stages: tuple[ReinforcementStage, ...] = ()

    free: ClassVar[frozenset[str]] = Recipe.free | {"dump_every"}

    def __post_init__(self):
        super().__post_init__()
        if self.precision != "float32":
            raise ValueError(
                f"precision: expected float32, as rollouts are made in it, got {self.precision}"
            )
        for name in ("updates", "evaluate_every", "evaluated_texts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("temperature", "ratio_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        if not self.kl >= 0:
            raise ValueError(f"kl: expected 0 or more, got {self.kl}")
        if self.dump_every < 0:
            raise ValueError(f"dump_every: expected 0 or more, got {self.dump_every}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out: expected a share between 0 and 1, got {self.held_out}")
