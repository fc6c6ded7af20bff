# SPDX-License-Identifier: Apache-2.0
"""Group-relative policy gradient over turns: advantages, clipped objective, KL penalty.

A rollout's reward is shared by all its turns (multi-conversation group-relative policy
optimisation, arXiv:2507.02259). The objective is a mean over all tokens of all rollouts; rollouts
that wrote the same turn are computed once and counted as often as they occurred.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lychee.train.rollouts import NO_CHUNK, Policy, Rollout, Turn, turn_log_probs


def group_advantages(rewards: Tensor) -> Tensor:
    """Rewards [questions, G] minus their group's mean; not divided by the deviation."""
    return rewards - rewards.mean(dim=1, keepdim=True)


def mixed_groups(rewards: Tensor) -> Tensor:
    """Per question of rewards [questions, G], whether its rollouts differ: else no gradient."""
    return (rewards != rewards[:, :1]).any(dim=1)


def clipped_objective(ratio: Tensor, gain: Tensor, loss: Tensor, clip: float) -> Tensor:
    """Sum of min(A r, A clip(r)) over the rollouts of each token [tokens], to be maximised.

    Args:
        ratio: new over old probability of the token.
        gain, loss: sums of the rollouts' positive and of their negative advantages A.
    """
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return gain * torch.minimum(ratio, clipped) + loss * torch.maximum(ratio, clipped)


def low_variance_kl(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) per sampled token: never negative, low variance."""
    difference = reference - log_probs
    return difference.exp() - difference - 1


@dataclass(frozen=True)
class Signal:
    """The distinct turns of rollouts that carry gradient, update turns before final turns.

    Attributes:
        turns: in the order of every per-token tensor below.
        gain, loss: [tokens], see `clipped_objective`.
        count: [tokens], rollouts that wrote the token in this turn.
        log_probs: [tokens], of the policy that wrote them.
        chunks: rows of the batch's chunks that the turns read, ascending.
    """

    turns: list[Turn]
    gain: Tensor
    loss: Tensor
    count: Tensor
    log_probs: Tensor
    chunks: list[int]

    @classmethod
    def collect(cls, rollouts: Sequence[Rollout], advantages: Sequence[float], device) -> Signal:
        """Merge the turns of `rollouts`, which have one advantage each."""
        found: dict[tuple, tuple[Turn, list[float]]] = {}
        for rollout, advantage in zip(rollouts, advantages, strict=True):
            for turn in rollout.turns:
                _, sums = found.setdefault(turn.identity, (turn, [0.0, 0.0, 0.0]))
                sums[0 if advantage > 0 else 1] += advantage
                sums[2] += 1
        merged = sorted(found.values(), key=lambda pair: pair[0].chunk == NO_CHUNK)
        turns = [turn for turn, _ in merged]
        lengths = torch.tensor([len(turn.written) for turn in turns])
        sums = torch.tensor([values for _, values in merged]).repeat_interleave(lengths, dim=0)
        log_probs = torch.tensor([value for turn in turns for value in turn.log_probs])
        chunks = sorted({turn.chunk for turn in turns} - {NO_CHUNK})
        return cls(turns, *sums.to(device).unbind(1), log_probs.to(device), chunks)

    def read(self, policy: Policy, rows: list[Tensor]) -> Tensor:
        """Log-probabilities [tokens] under `policy`; `rows`: memory of `self.chunks`."""
        border = sum(turn.chunk != NO_CHUNK for turn in self.turns)
        places = {chunk: place for place, chunk in enumerate(self.chunks)}
        return torch.cat(
            (
                turn_log_probs(policy, self.turns[:border], rows, places),
                turn_log_probs(policy, self.turns[border:], None, {}),
            )
        )
