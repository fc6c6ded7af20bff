# SPDX-License-Identifier: Apache-2.0
"""The Reasoner: reads chunks through their memory, rewrites its notes, answers from the notes.

Turn by turn it would decode the notes anew for every chunk. Most chunks change nothing, so the
unchanged notes are used as a draft: a batch of chunks is checked in one pass, and only where the
model would write something else need the notes be decoded. `lychee.reading` has the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lychee.config import MemoryConfig
from lychee.decoder import BLOCK_ROWS, Decoder, Pages
from lychee.generate import GREEDY, PromptBatch, Sampling, generate
from lychee.prompts import ReadingPrompts

# Chunks checked in one pass, over all questions; more gains little and costs memory.
MAX_ROWS = 32


class Reasoner:
    """Reading turns and final turns over one decoder."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: ReadingPrompts,
        memory: MemoryConfig,
        *,
        padded_positions: bool = False,
    ):
        """`padded_positions`: count padding in positions, as the released code does in batches."""
        self.decoder, self.prompts, self.memory = decoder, prompts, memory
        self.padded_positions = padded_positions

    def update(
        self,
        questions: Sequence[Sequence[int]],
        notes: Sequence[list[int]],
        pages: Pages,
        sampling: Sampling = GREEDY,
    ) -> list[list[int]]:
        """One reading turn per row: new notes from a question, old notes and memory pages."""
        pairs = zip(questions, notes, strict=True)
        return generate(
            self.decoder,
            [self.prompts.update.render(question, old) for question, old in pairs],
            pages=pages,
            first_position=self.memory.slots,
            max_new_tokens=self.memory.size,
            stop=self.prompts.stop,
            sampling=sampling,
            padded_positions=self.padded_positions,
        )

    def answer(
        self,
        questions: Sequence[Sequence[int]],
        notes: Sequence[list[int]],
        sampling: Sampling = GREEDY,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """The final turn per row: answer ids from a question and its notes, without any text."""
        pairs = zip(questions, notes, strict=True)
        return generate(
            self.decoder,
            [self.prompts.answer.render(question, old) for question, old in pairs],
            max_new_tokens=self.memory.answer,
            stop=self.prompts.stop,
            sampling=sampling,
            padded_positions=self.padded_positions,
            on_token=on_token,
        )

    @torch.inference_mode()
    def leaves_notes(
        self, questions: Sequence[Sequence[int]], notes: Sequence[list[int]], pages: Pages
    ) -> list[bool]:
        """Per row, whether a greedy reading turn would write the same notes again."""
        prompts = [
            self.prompts.update.render(question, old)
            for question, old in zip(questions, notes, strict=True)
        ]
        rows, places, targets = [], [], []
        width = max(len(prompt) + len(old) for prompt, old in zip(prompts, notes, strict=True))
        for row, old in enumerate(notes):
            # The turn ends by a stop token (-1 here), or by reaching the notes' limit.
            draft = [*old, -1][: self.memory.size]
            first = width - len(old) - 1
            rows += [row] * len(draft)
            places += range(first, first + len(draft))
            targets += draft
        batch = PromptBatch.build(
            [prompt + old for prompt, old in zip(prompts, notes, strict=True)],
            self.memory.slots,
            0,
            self.decoder.device,
        )
        select = torch.tensor([rows, places], device=self.decoder.device)
        hidden = self.decoder(
            batch.ids,
            positions=batch.positions,
            max_position=self.memory.slots + batch.ids.shape[1],
            pages=pages,
            valid=batch.valid,
            select=(select[0], select[1]),
        )
        # A block at a time: scores of all notes over the vocabulary would take more than all else.
        blocks = (self.decoder.logits(rows) for rows in hidden.split(BLOCK_ROWS))
        chosen = torch.cat([logits.argmax(dim=-1) for logits in blocks]).tolist()
        same = [True] * len(prompts)
        for row, token, target in zip(rows, chosen, targets, strict=True):
            same[row] &= token in self.prompts.stop if target < 0 else token == target
        return same
