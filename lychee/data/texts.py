# SPDX-License-Identifier: Apache-2.0
"""Training samples from any text: passages, and turns that recite or continue one from its memory.

A recited span starts behind a short cue where a passage is longer than the span, so that every part
of a passage is asked for; a continuation starts right behind the passage.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lychee.data.recall import Turn, pad_turns
from lychee.errors import InputError
from lychee.tokenizer import TextTokenizer

# Tokens of the passage that say where a recited span starts.
CUE = 8
# Prompts of the two turns; a checkpoint's own templates of these names win.
TEMPLATES = {"recite": "<|memory|><|answer|>", "continue": "<|memory|><|update|>"}
PLAIN_TEMPLATES = {
    "recite": "Recite the text that you have in memory:\n",
    "continue": "Continue the text that you have in memory:\n",
}


@dataclass(frozen=True)
class Turns:
    """Turns as tensors, the same number for every chunk of a batch."""

    inputs: Tensor  # [rows, S], right-padded
    labels: Tensor  # [rows, S], the next token where a loss is taken, else IGNORED

    def rows(self, first: int, last: int) -> Turns:
        return Turns(self.inputs[first:last], self.labels[first:last])


def long_enough(texts: Sequence[list[int]], least: int, separator: list[int]) -> list[list[int]]:
    """Token lists of at least `least` tokens: short neighbours joined, long ones as they are.

    Raises:
        InputError: all of them together are too short.
    """
    joined: list[list[int]] = []
    for text in texts:
        if joined and min(len(joined[-1]), len(text)) < least:
            joined[-1] = joined[-1] + separator + text
        else:
            joined.append(text)
    if not joined or max(map(len, joined)) < least:
        total = sum(map(len, texts))
        raise InputError(f"books: expected at least {least} tokens of text, got {total}")
    return joined


class TextTurns:
    """Makes passages and their turns; all randomness comes from one seeded generator."""

    def __init__(self, tokenizer: TextTokenizer, templates: dict[str, str], draw: random.Random):
        """`templates`: the checkpoint's; "recite" and "continue" count here."""
        own = {name: templates[name] for name in TEMPLATES if name in templates}
        known = all(tokenizer.id_of(token) is not None for token in ("<|memory|>", "<|answer|>"))
        texts = (TEMPLATES if known else PLAIN_TEMPLATES) | own
        self.recite_prompt = tokenizer.encode(texts["recite"])
        self.continue_prompt = tokenizer.encode(texts["continue"])
        self.random = draw

    def passages(self, books: list[list[int]], size: int, length: int) -> Tensor:
        """[size, length] ids from random places of the books."""
        rows = []
        for _ in range(size):
            book = self.random.choice(books)
            start = self.random.randrange(len(book) - length + 1)
            rows.append(book[start : start + length])
        return torch.tensor(rows)

    def recite(self, chunks: Tensor, span: int) -> Turns:
        """One turn per chunk [B, C]: all of it, or `span` tokens behind a cue."""
        return Turns(*pad_turns([self.recite_turn(ids, span) for ids in chunks.tolist()]))

    def recite_turn(self, ids: list[int], span: int) -> Turn:
        if len(ids) <= span + CUE:
            return Turn(self.recite_prompt, ids[:span], "recite")
        start = self.random.randrange(CUE, len(ids) - span + 1)
        return Turn(self.recite_prompt + ids[start - CUE : start], ids[start:][:span], "recite")

    def continuation(self, following: Tensor) -> Turns:
        """One turn per chunk, from the ids [B, span] that follow it in its text."""
        turns = [Turn(self.continue_prompt, ids, "continue") for ids in following.tolist()]
        return Turns(*pad_turns(turns))
