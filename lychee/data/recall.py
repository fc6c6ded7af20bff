# SPDX-License-Identifier: Apache-2.0
"""Training samples: chunks of real prose full of needles, and reading turns about every one.

Dense recall: each chunk is asked many times at once, for needles it holds, for needles it does not
hold (the working memory must stay as it was), and with notes already taken.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lychee.data.needles import Needle, NeedleMaker
from lychee.prompts import ReadingPrompts
from lychee.tokenizer import TextTokenizer

IGNORED = -100
# Share of questions about needles that the chunk holds: at the start, and then.
FOUND_SHARE = {True: 0.8, False: 0.55}
# Share of turns that are a text's first.
INITIAL_SHARE = 0.2


@dataclass(frozen=True)
class Mixture:
    """Shares that make up a batch.

    Attributes:
        single: of batches in the simplest form, see `NeedleMaker`.
        numbers: of needles whose value is a number.
        noted: of turns whose notes hold a value already.
        confusable: of questions about absent needles that share a key's word with a present one.
    """

    single: float = 0.0
    numbers: float = 0.5
    noted: float = 0.3
    confusable: float = 0.5


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

    def part(self, index: int, count: int) -> RecallBatch | None:
        """The chunks of process `index` of `count` with their turns; None if it has no chunk."""
        if len(self.chunks) < count:
            return None
        first, last = (len(self.chunks) * i // count for i in (index, index + 1))
        turns = slice(*(place * len(self.turns) // len(self.chunks) for place in (first, last)))
        final = slice(*(len(self.final_turns) * i // count for i in (index, index + 1)))
        return RecallBatch(
            self.chunks[first:last],
            self.turns[turns],
            self.labels[turns],
            self.cases[turns],
            self.final_turns[final],
            self.final_labels[final],
        )


class RecallSampler:
    """Draws batches; all randomness comes from one seeded generator, so runs can resume.

    Attributes:
        following: how many tokens of its book `behind` keeps for each chunk made.
        behind: lists of them, until somebody takes them.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        prompts: ReadingPrompts,
        books: list[list[int]],
        words: list[str],
        seed: int | random.Random,
        margin: Sequence[int] = (),
    ):
        """`margin`: what a bank compresses behind a chunk's text, as a part of the chunk."""
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.end = prompts.end
        self.books = books
        self.random = seed if isinstance(seed, random.Random) else random.Random(seed)
        self.makers = {
            single: NeedleMaker(words, self.random, single=single) for single in (False, True)
        }
        self.maker = self.makers[False]
        self.margin = list(margin)
        self.following = 0
        self.behind: list[list[int]] = []

    def batch(
        self,
        size: int,
        chunk: int,
        questions: int,
        facts: tuple[int, int],
        mixture: Mixture,
    ) -> RecallBatch:
        """`size` chunks of `chunk` tokens with facts[0] to facts[1] needles, `questions` each."""
        self.maker = self.makers[self.random.random() < mixture.single]
        self.maker.numbers = mixture.numbers
        chunks, turns, final = [], [], []
        for _ in range(size):
            count = self.random.randint(*facts)
            ids, needles = self.chunk(chunk, [self.maker.make() for _ in range(count)])
            chunks.append(ids)
            turns += [self.update_turn(needles, mixture) for _ in range(questions)]
        for _ in range(max(1, len(turns) // 8)):
            final.append(self.final_turn())
        return make_batch(chunks, turns, final)

    def chunk(self, length: int, needles: list[Needle]) -> tuple[list[int], list[Needle]]:
        """Prose with `needles` at random sentence ends and the margin, `length` tokens; and the
        needles that fitted."""
        encoded = self.tokenizer.encode_batch([" " + needle.statement for needle in needles])
        kept, room = [], length - len(self.margin)
        for needle, ids in zip(needles, encoded, strict=True):
            if len(ids) <= room:
                kept.append((needle, ids))
                room -= len(ids)
        book = self.random.choice(self.books)
        start = self.random.randrange(len(book) - length - self.following)
        prose = book[start : start + room]
        if self.following:
            self.behind.append(book[start + room : start + room + self.following])
        ends = self.tokenizer.sentence_ends
        places = [place + 1 for place, token in enumerate(prose) if token in ends] or [0, room]
        cuts = sorted(self.random.choice(places) for _ in kept)
        out, last = [], 0
        for cut, (_, ids) in zip(cuts, kept, strict=True):
            out += prose[last:cut] + ids
            last = cut
        return out + prose[last:] + self.margin, [needle for needle, _ in kept]

    def update_turn(self, needles: list[Needle], mixture: Mixture) -> Turn:
        """A question about a chunk that holds `needles`, at some state of the notes."""
        shares = (INITIAL_SHARE, 1 - INITIAL_SHARE - mixture.noted, mixture.noted)
        state = self.random.choices(("initial", "unknown", "known"), shares)[0]
        noted = self.maker.make().value if state == "known" else None
        found = bool(needles) and self.random.random() < FOUND_SHARE[self.maker.single]
        asked = (
            self.random.choice(needles)
            if found
            else self.maker.unrelated(needles, mixture.confusable)
        )
        # Two needles of a chunk may share key and attribute; the later one counts.
        told = [n.value for n in needles if (n.key, n.attribute) == (asked.key, asked.attribute)]
        notes = self.prompts.no_memory
        if state != "initial":
            notes = self.encode_notes(asked.key, noted)
        target = self.encode_notes(asked.key, told[-1] if found else noted)
        question = self.tokenizer.encode(self.maker.reword(asked))
        case = ("replaced" if noted else "found") if found else ("kept" if noted else "absent")
        prompt = self.prompts.update.render(question, notes)
        return Turn(prompt, [*target, self.end], case)

    def final_turn(self) -> Turn:
        """The answer from the notes: the value noted, or that nothing was found."""
        asked = self.maker.make()
        value = asked.value if self.random.random() < 0.8 else None
        question = self.tokenizer.encode(asked.question)
        prompt = self.prompts.answer.render(question, self.encode_notes(asked.key, value))
        return Turn(prompt, [*self.encode_value(value), self.end], "final")

    def encode_notes(self, key: str, value: str | None) -> list[int]:
        """Notes name the key right before the value, so that the value is looked up at the key's
        own last token, where the query already is what must be found."""
        return [*self.tokenizer.encode(" " + key), *self.encode_value(value)]

    def encode_value(self, value: str | None) -> list[int]:
        return self.prompts.no_memory if value is None else self.tokenizer.encode(" " + value)


def make_batch(chunks: list[list[int]], turns: list[Turn], final: list[Turn]) -> RecallBatch:
    """A batch of equally long chunks, as many turns about each, and final turns."""
    inputs, labels = pad_turns(turns)
    final_inputs, final_labels = pad_turns(final)
    cases = [turn.case for turn in turns]
    return RecallBatch(torch.tensor(chunks), inputs, labels, cases, final_inputs, final_labels)


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
