# SPDX-License-Identifier: Apache-2.0
"""Losses of turns that a reader writes over chunks' memory, and of tokens in general."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lychee.compressor import MemoryTensors
from lychee.data.recall import IGNORED
from lychee.decoder import Decoder
from lychee.train.processes import Processes

# More groups pad less, fewer run larger products; three were fastest on one core.
LENGTH_GROUPS = 3
# Rows whose vocabulary scores are held at once; beyond it they are computed again for gradients.
LOGIT_ROWS = 8192


class Reader:
    """Means are over the rows and tokens of every process."""

    def __init__(self, decoder: Decoder, processes: Processes):
        self.decoder, self.processes = decoder, processes

    def turn_loss(
        self, inputs: Tensor, labels: Tensor, offset: int, memory: list[Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy of turns [rows, S] at their labels.

        Args:
            inputs, labels: int64, right-padded; labels are IGNORED where no loss is taken.
            offset: position of the first token, behind the memory's.
            memory: per layer [C, Hkv, 2, M, D]; rows read the C chunks in order, rows / C each.
                None where turns see no chunk.

        Returns:
            Mean loss; per row whether every target was the argmax; that per target, in any order.

        Rows are read in groups of similar length, so that little of a group is padding.
        """
        places = torch.arange(labels.shape[1], device=labels.device)
        last = torch.where(labels != IGNORED, places, 0).amax(1)
        order = last.argsort(stable=True)
        total = torch.zeros((), device=inputs.device)
        exact = torch.ones(len(inputs), dtype=torch.bool, device=inputs.device)
        hits = [exact[:0]]
        for rows in order.tensor_split(max(1, min(LENGTH_GROUPS, len(order)))):
            if not len(rows):
                continue
            width = int(last[rows[-1]]) + 1
            pages = None
            if memory is not None:
                pages = MemoryTensors(memory, rows * len(memory[0]) // len(inputs))
            loss, exact[rows], hit = self.group_loss(
                inputs[rows, :width], labels[rows, :width], offset, pages
            )
            total = total + loss
            hits.append(hit)
        loss = self.processes.mean(total, int((labels != IGNORED).sum()))
        return loss, exact, torch.cat(hits)

    def group_loss(
        self, inputs: Tensor, labels: Tensor, offset: int, pages: MemoryTensors | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `turn_loss`, but the sum over this process's tokens, in one pass of the decoder."""
        positions = torch.arange(offset, offset + inputs.shape[1], device=inputs.device)[None]
        rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
        hidden = self.decoder(
            inputs,
            positions=positions,
            max_position=offset + inputs.shape[1],
            pages=pages,
            select=(rows, columns),
        )
        total, hits = self.token_sum(hidden, labels[rows, columns])
        wrong = torch.zeros(len(inputs), device=inputs.device)
        wrong.index_add_(0, rows, 1 - hits.float())
        return total, wrong == 0, hits

    def token_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of final states [N, E] at targets [N]."""
        total, _ = self.token_sum(hidden, targets)
        return self.processes.mean(total, len(targets))

    def token_sum(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy of final states [N, E], and which targets were the argmax [N]."""
        if len(targets) <= LOGIT_ROWS:
            return self.block_sum(hidden, targets)
        blocks = [
            checkpoint(self.block_sum, *block, use_reentrant=False)
            for block in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
        ]
        return sum(total for total, _ in blocks), torch.cat([hits for _, hits in blocks])

    def block_sum(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.decoder.logits(hidden)
        return F.cross_entropy(logits, targets, reduction="sum"), logits.argmax(-1) == targets
