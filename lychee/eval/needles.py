# SPDX-License-Identifier: Apache-2.0
"""Needles in real books: exact match by length of text, single-key and multi-key."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lychee.data.needles import KINDS, NeedleMaker, hide_needles, word_list
from lychee.documents import read_file
from lychee.errors import InputError
from lychee.memory_model import LycheeMemory
from lychee.trace import Answer

MULTI_KEYS = 4


@dataclass(frozen=True)
class Question:
    """One question of an evaluation, and what came of it."""

    keys: int
    kind: str
    question: str
    expected: str
    answered: str
    exact: bool


@dataclass(frozen=True)
class Cell:
    """Results at one length."""

    length: int
    ratio: int
    texts: int
    questions: list[Question]
    build_seconds: float
    ask_seconds: float

    def accuracy(self, **where) -> tuple[int, int]:
        """(exact, asked) among the questions whose fields equal `where`."""
        chosen = [q for q in self.questions if all(getattr(q, k) == v for k, v in where.items())]
        return sum(question.exact for question in chosen), len(chosen)

    def to_dict(self) -> dict:
        right, asked = self.accuracy()
        low, high = wilson_interval(right, asked)
        return asdict(self) | {"exact": right, "asked": asked, "interval_95": [low, high]}


def wilson_interval(right: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """95% score interval of a proportion."""
    if not asked:
        return 0.0, 1.0
    share, scale = right / asked, 1 + z * z / asked
    middle = (share + z * z / (2 * asked)) / scale
    spread = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked)) / scale
    return max(0.0, middle - spread), min(1.0, middle + spread)


def key_counts(questions: int) -> list[int]:
    """Needles per text: as many texts of one needle as of MULTI_KEYS, `questions` in all."""
    counts: list[int] = []
    while sum(counts) < questions:
        counts.append(1 if len(counts) % 2 == 0 else MULTI_KEYS)
    if (surplus := sum(counts) - questions) > 0:
        counts[-1] -= surplus
    return counts


def make_text(
    model: LycheeMemory,
    books: Sequence[tuple[str, list[tuple[int, int]]]],
    length: int,
    keys: int,
    maker: NeedleMaker,
    draw: random.Random,
):
    """A span of a random book with `keys` needles, `length` tokens in all."""
    needles = [maker.make(KINDS[draw.randrange(2)]) for _ in range(keys)]
    room = length - sum(len(model.tokenizer.encode(" " + n.statement)) for n in needles)
    long_enough = [book for book in books if len(book[1]) > room]
    if not long_enough:
        raise InputError(f"books: expected one of more than {room} tokens, got none")
    text, offsets = draw.choice(long_enough)
    start = draw.randrange(len(offsets) - room)
    filler = text[offsets[start][0] : offsets[start + room - 1][1]]
    return hide_needles(filler, needles, draw)


def evaluate(
    model: LycheeMemory, books: Iterable[Path], lengths: Sequence[int], questions: int, seed: int
) -> Iterable[Cell]:
    """Yield one Cell per length: `questions` about needles in `books`."""
    texts = [read_file(path).text for path in books]
    words = word_list(texts, model.tokenizer.encode)
    encoded = [(text, model.tokenizer.encode_with_offsets(text)[1]) for text in texts]
    for length in lengths:
        draw = random.Random(seed * 1_000_003 + length)
        maker = NeedleMaker(words, draw)
        results, build, ask = [], 0.0, 0.0
        counts = key_counts(questions)
        for keys in counts:
            text, hidden = make_text(model, encoded, length, keys, maker, draw)
            started = time.perf_counter()
            bank = model.remember(text)
            built = time.perf_counter()
            answers = model.ask_many(bank, [needle.question for needle, _ in hidden])
            build, ask = build + built - started, ask + time.perf_counter() - built
            results += [judge(n, keys, a) for (n, _), a in zip(hidden, answers, strict=True)]
        yield Cell(length, model.memory.ratio, len(counts), results, build, ask)


def judge(needle, keys: int, answer: Answer) -> Question:
    exact = answer.text == needle.value
    return Question(keys, needle.kind, needle.question, needle.value, answer.text, exact)
