# SPDX-License-Identifier: Apache-2.0
"""Episodes for reinforcement learning: texts of several chunks and questions about them.

A question about a needle needs one of the chunks, a question about an invented world one for every
hop; all others hold facts that share a name, a key or a relation with what is asked, so a reader
must tell them apart and keep its notes past them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lychee.data.needles import Needle
from lychee.data.recall import RecallSampler
from lychee.data.worlds import Fact, World, WorldQuestion
from lychee.errors import InputError

# Texts whose facts do not fit; more of them than this in one batch are no accident.
MOST_FAILURES = 50


@dataclass(frozen=True, kw_only=True)
class EpisodeShape:
    """What texts and questions are like.

    Attributes:
        chunks: per text.
        facts: least and most facts per chunk; a world's texts may have more, where hops meet.
        questions: most per text, each about other facts.
        confusable: share of needles with a key or an attribute like an earlier one's.
        single: needles in their simplest form, see `NeedleMaker`.
        numbers: share of needles whose value is a number.
        worlds: share of texts about a world; the others hold needles.
        hops: weights of questions of one, two, three ... hops in a world.
    """

    chunks: int
    facts: tuple[int, int]
    questions: int
    confusable: float = 0.5
    single: bool = False
    numbers: float = 0.5
    worlds: float = 0.0
    hops: tuple[float, ...] = (0.0, 1.0)


@dataclass(frozen=True)
class Question:
    """One question: the text of its batch that it is about, its token ids, the right answer."""

    text: int
    ids: list[int]
    answer: str


@dataclass(frozen=True)
class EpisodeBatch:
    """`chunks` [texts, C, T], the token ids of every text's chunks, and the questions."""

    chunks: Tensor
    questions: list[Question]

    def part(self, index: int, count: int) -> Self | None:
        """The texts of process `index` of `count` with their questions; None if it has no text."""
        first, last = (len(self.chunks) * i // count for i in (index, index + 1))
        asked = [
            Question(question.text - first, question.ids, question.answer)
            for question in self.questions
            if first <= question.text < last
        ]
        return type(self)(self.chunks[first:last], asked) if asked else None


class EpisodeSampler:
    """Draws batches of episodes; the generator of `sampler` decides everything."""

    def __init__(self, sampler: RecallSampler, shape: EpisodeShape, chunk: int, split: str):
        """`chunk`: tokens of a chunk; `split`: of the worlds' names, see `data.task.SPLITS`."""
        self.sampler, self.random, self.shape = sampler, sampler.random, shape
        self.chunk, self.split, self.maker = chunk, split, sampler.makers[shape.single]

    def draw(self, texts: int) -> EpisodeBatch:
        """`texts` texts, each with at least one question; InputError if chunks are too short."""
        self.maker.numbers = self.shape.numbers
        chunks, questions = [], []
        for _ in range(texts + MOST_FAILURES):
            if len(chunks) == texts:
                break
            about_world = self.random.random() < self.shape.worlds
            pieces, asked = self.world_text() if about_world else self.needle_text()
            encode = self.sampler.tokenizer.encode
            questions += [Question(len(chunks), encode(text), answer) for text, answer in asked]
            # A text whose facts did not fit into its chunks asks nothing and is drawn again.
            chunks += [pieces] if asked else []
        if len(chunks) < texts:
            raise InputError(
                f"chunk: expected room for {self.shape.facts[0]} facts and more, "
                f"got {self.chunk} tokens"
            )
        return EpisodeBatch(torch.tensor(chunks), questions)

    def needle_text(self) -> tuple[list[list[int]], list[tuple[str, str]]]:
        """Chunks of needles that do not contradict each other; questions and answers."""
        pieces, stated = [], []
        for _ in range(self.shape.chunks):
            fresh: list[Needle] = []
            for _ in range(self.random.randint(*self.shape.facts)):
                fresh.append(self.maker.unrelated(stated + fresh, self.shape.confusable))
            ids, kept = self.sampler.chunk(self.chunk, fresh)
            pieces.append(ids)
            stated += kept
        asked = self.random.sample(stated, min(self.shape.questions, len(stated)))
        return pieces, [(self.maker.reword(needle), needle.value) for needle in asked]

    def world_text(self) -> tuple[list[list[int]], list[tuple[str, str]]]:
        """Chunks that tell chains of facts, each chain's in the order of its hops."""
        shape, world = self.shape, World(self.maker.words, self.random, self.split)
        hops = self.random.choices(range(1, len(shape.hops) + 1), shape.hops, k=shape.questions)
        asked = [world.bridge(count) for count in hops]
        told: list[list[Fact]] = [[] for _ in range(shape.chunks)]
        for question in asked:
            places = sorted(self.random.choices(range(shape.chunks), k=len(question.facts)))
            for place, fact in zip(places, question.facts, strict=True):
                told[place].append(fact)
        pieces, kept = [], []
        for facts in told:
            room = self.random.randint(*shape.facts)
            while len(facts) < room:
                facts.append(world.distractor(self.random.choice(asked)))
            ids, fitting = self.sampler.chunk(self.chunk, facts)
            pieces.append(ids)
            kept += fitting
        return pieces, [(q.text, q.answer) for q in asked if answerable(q, kept)]


def answerable(question: WorldQuestion, told: list[Fact]) -> bool:
    """Whether all facts of a question are told."""
    return all(fact in told for fact in question.facts)


def split_book(book: list[int], held_out: float) -> tuple[list[int], list[int]]:
    """A book's ids cut in two: the front for training, the last share `held_out` for tests."""
    cut = round(len(book) * (1 - held_out))
    return book[:cut], book[cut:]
