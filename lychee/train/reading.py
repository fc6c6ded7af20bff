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
        self,
        inputs: Tensor,
        labels: Tensor,
        offset: int,
        memory: list[Tensor] | None,
        least: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy of turns [rows, S] at their labels.

        Args:
            inputs, labels: int64, right-padded; labels are IGNORED where no loss is taken.
            offset: position of the first token, behind the memory's.
            memory: per layer [C, Hkv, 2, M, D]; rows read the C chunks in order, rows / C each.
                None where turns see no chunk.
            least: rows whose loss over all their tokens (nats) is below this, by a pass without
                gradients, count as 0: little is lost with them, and most of the work saved.

        Returns:
            Mean loss; per row whether every target was the argmax; that per target, in any order.
        """
        count = int((labels != IGNORED).sum())
        rows = torch.arange(len(inputs), device=inputs.device)
        chunks = None if memory is None else rows * len(memory[0]) // len(inputs)
        with torch.set_grad_enabled(not least):
            losses, exact, hits = self.row_losses(inputs, labels, offset, memory, chunks)
        if least and len(rows):
            # The hardest is always read: the weights of every process need a gradient.
            hard = losses >= losses.max().clamp(max=least)
            chunks = None if chunks is None else chunks[hard]
            losses, _, _ = self.row_losses(inputs[hard], labels[hard], offset, memory, chunks)
        return self.processes.mean(losses.sum(), count), exact, hits

    def row_losses(
        self,
        inputs: Tensor,
        labels: Tensor,
        offset: int,
        memory: list[Tensor] | None,
        chunks: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `turn_loss`, but the losses [rows]; `chunks` [rows]: which one each row reads.

        Rows are read in groups of similar length, so that little of a group is padding.
        """
        places = torch.arange(labels.shape[1], device=labels.device)
        last = torch.where(labels != IGNORED, places, 0).amax(1)
        order = last.argsort(stable=True)
        losses = torch.zeros(len(inputs), device=inputs.device)
        exact = torch.ones(len(inputs), dtype=torch.bool, device=inputs.device)
        hits = [exact[:0]]
        for rows in order.tensor_split(max(1, min(LENGTH_GROUPS, len(order)))):
            if not len(rows):
                continue
            width = int(last[rows[-1]]) + 1
            pages = None if memory is None else MemoryTensors(memory, chunks[rows])
            new, exact[rows], hit = self.group_losses(
                inputs[rows, :width], labels[rows, :width], offset, pages
            )
            losses = losses.index_put((rows,), new)
            hits.append(hit)
        return losses, exact, torch.cat(hits)

    def group_losses(
        self, inputs: Tensor, labels: Tensor, offset: int, pages: MemoryTensors | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `row_losses`, in one pass of the decoder."""
        positions = torch.arange(offset, offset + inputs.shape[1], device=inputs.device)[None]
        rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
        hidden = self.decoder(
            inputs,
            positions=positions,
            max_position=offset + inputs.shape[1],
            pages=pages,
            select=(rows, columns),
        )
        tokens, hits = self.token_losses(hidden, labels[rows, columns])
        none = torch.zeros(len(inputs), device=inputs.device)
        wrong = none.index_add(0, rows, 1 - hits.float())
        return none.index_add(0, rows, tokens), wrong == 0, hits

    def token_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of final states [N, E] at targets [N]."""
        losses, _ = self.token_losses(hidden, targets)
        return self.processes.mean(losses.sum(), len(targets))

    def token_losses(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropies [N] of final states [N, E], and which targets were the argmax [N]."""
        if len(targets) <= LOGIT_ROWS:
            return self.block_losses(hidden, targets)
        blocks = [
            checkpoint(self.block_losses, *block, use_reentrant=False)
            for block in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
        ]
        losses, hits = zip(*blocks, strict=True)
        return torch.cat(losses), torch.cat(hits)

    def block_losses(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.decoder.logits(hidden)
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        return losses, logits.argmax(-1) == targets
