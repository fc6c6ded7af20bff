# SPDX-License-Identifier: Apache-2.0
"""Training samples: chunks of real prose full of needles, and reading turns about every one.

Dense recall: each chunk is asked many times at once, for needles it holds, for needles it does not
hold (the working memory must stay as it was), and with notes already taken.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from lychee.data.needles import Needle, NeedleMaker
from lychee.prompts import PromptTemplate
from lychee.tokenizer import TextTokenizer

CASES = ("found", "absent", "kept", "replaced")
IGNORED = -100


@dataclass(frozen=True)
class Turn:
    """One reading turn: prompt ids, the ids to write, and which case it exercises."""

    prompt: list[int]
    target: list[int]
    case: str


@dataclass(frozen=True)
class RecallBatch:
    """B chunks, B * Q update turns over them, and final turns that see no chunk."""

    chunks: Tensor  # [B, C]
    turns: Tensor  # [B * Q, S], right-padded
    labels: Tensor  # [B * Q, S], the next token where a loss is taken, else IGNORED
    cases: list[str]
    final_turns: Tensor
    final_labels: Tensor


@dataclass(frozen=True)
class Templates:
    """The two prompts and the initial working memory, as ids, and the id that ends a turn."""

    update: PromptTemplate
    answer: PromptTemplate
    no_memory: list[int]
    end: int


class RecallSampler:
    """Draws batches; all randomness comes from one seeded generator, so runs can resume."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        templates: Templates,
        books: list[list[int]],
        words: list[str],
        seed: int,
    ):
        self.tokenizer = tokenizer
        self.templates = templates
        self.books = books
        self.random = random.Random(seed)
        short = [word for word in words if len(tokenizer.encode(" " + word)) == 1]
        self.makers = {
            False: NeedleMaker(words, self.random),
            True: NeedleMaker(short, self.random, single=True),
        }
        self.maker = self.makers[False]

    def batch(
        self,
        size: int,
        chunk: int,
        questions: int,
        facts: tuple[int, int],
        single: bool = False,
    ) -> RecallBatch:
        """`size` chunks of `chunk` tokens with facts[0] to facts[1] needles, `questions` each.

        `single`: one-token words and two-digit numbers only.
        """
        self.maker = self.makers[single]
        chunks, turns, final = [], [], []
        for _ in range(size):
            count = self.random.randint(*facts)
            ids, needles = self.chunk(chunk, [self.maker.make() for _ in range(count)])
            chunks.append(ids)
            turns += [self.update_turn(needles) for _ in range(questions)]
        for _ in range(max(1, len(turns) // 8)):
            final.append(self.final_turn())
        inputs, labels = pad_turns(turns)
        final_inputs, final_labels = pad_turns(final)
        cases = [turn.case for turn in turns]
        return RecallBatch(torch.tensor(chunks), inputs, labels, cases, final_inputs, final_labels)

    def chunk(self, length: int, needles: list[Needle]) -> tuple[list[int], list[Needle]]:
        """Prose with `needles` at random sentence ends, `length` tokens; and those that fitted."""
        encoded = self.tokenizer.encode_batch([" " + needle.statement for needle in needles])
        kept, room = [], length
        for needle, ids in zip(needles, encoded, strict=True):
            if len(ids) <= room:
                kept.append((needle, ids))
                room -= len(ids)
        book = self.random.choice(self.books)
        start = self.random.randrange(len(book) - length)
        prose = book[start : start + room]
        ends = self.tokenizer.sentence_ends
        places = [place + 1 for place, token in enumerate(prose) if token in ends] or [0, room]
        cuts = sorted(self.random.choice(places) for _ in kept)
        out, last = [], 0
        for cut, (_, ids) in zip(cuts, kept, strict=True):
            out += prose[last:cut] + ids
            last = cut
        return out + prose[last:], [needle for needle, _ in kept]

    def update_turn(self, needles: list[Needle]) -> Turn:
        """A question about a chunk that holds `needles`, at some state of the notes."""
        draw = self.random.random()
        has_notes = self.random.random() < 0.3
        notes = self.encode_value(self.maker.make().value) if has_notes else None
        if needles and draw < 0.55:
            asked = self.random.choice(needles)
            # Two needles of a chunk may draw the same key and attribute; the later one counts.
            same = [n for n in needles if (n.key, n.attribute) == (asked.key, asked.attribute)]
            target = self.encode_value(same[-1].value)
            case = "replaced" if has_notes else "found"
        else:
            asked = self.maker.unrelated(needles)
            target = notes or self.templates.no_memory
            case = "kept" if has_notes else "absent"
        question = self.tokenizer.encode(self.maker.reword(asked))
        prompt = self.templates.update.render(question, notes or self.templates.no_memory)
        return Turn(prompt, [*target, self.templates.end], case)

    def final_turn(self) -> Turn:
        """The answer from the notes: the value noted, or that nothing was found."""
        asked = self.maker.make()
        found = self.random.random() < 0.8
        notes = self.encode_value(asked.value) if found else self.templates.no_memory
        prompt = self.templates.answer.render(self.tokenizer.encode(asked.question), notes)
        return Turn(prompt, [*notes, self.templates.end], "final")

    def encode_value(self, value: str) -> list[int]:
        return self.tokenizer.encode(" " + value)


def pad_turns(turns: list[Turn]) -> tuple[Tensor, Tensor]:
    """Inputs and labels [rows, S]; the last target token is predicted, not fed."""
    rows = [turn.prompt + turn.target for turn in turns]
    width = max(len(row) for row in rows) - 1
    inputs = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORED)
    for index, (turn, row) in enumerate(zip(turns, rows, strict=True)):
        inputs[index, : len(row) - 1] = torch.tensor(row[:-1])
        labels[index, len(turn.prompt) - 1 : len(row) - 1] = torch.tensor(turn.target)
    return inputs, labels
