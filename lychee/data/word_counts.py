# SPDX-License-Identifier: Apache-2.0
"""RULER's two counting tasks: the most common words of a list, and of a coded text."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lychee.data.filler import Count
from lychee.data.task import Span, of_split
from lychee.errors import InputError

CODED_LETTERS = 6
# Tokens per coded word that differs, and fewest of them.
VOCABULARY_SHARE, FEWEST_CODED = 50, 8
DOTS = "...."


@dataclass(frozen=True)
class Query:
    """One question about a text that is being made."""

    question: str
    answers: Sequence[str]
    support: Sequence[Span]
    prefix: str


def too_short(task: str, tokens: int, needed: int) -> InputError:
    return InputError(
        f"{task}: length: expected at least {needed} tokens, got {tokens}", "ask for a longer text"
    )


def coin_words(count: int, split: str | None, draw: random.Random, taken: set[str]) -> list[str]:
    """Invented words of the split that are not `taken`."""
    made: dict[str, None] = {}
    while len(made) < count:
        letters = [draw.choice("bdfgklmnprstvz" if i % 2 == 0 else "aeiou") for i in range(6)]
        word = "".join(letters)
        if word not in taken and of_split([word], split):
            made[word] = None
    return list(made)


def spans_of(text: str, words: Sequence[str]) -> list[Span]:
    """Where `words` stand in `text` as words of their own."""
    found = re.finditer(rf"\b({'|'.join(map(re.escape, words))})\b", text)
    return [match.span() for match in found]


@dataclass(frozen=True)
class CommonWords:
    """A numbered list in which `common` words stand `often` times, all others `rarely`."""

    common: int = 10
    often: int = 30
    rarely: int = 3

    def make(
        self,
        task: str,
        words: Sequence[str],
        split: str | None,
        count: Count,
        tokens: int,
        draw: random.Random,
    ) -> tuple[str, list[Query]]:
        """A list of at most `tokens` tokens, and its one question."""
        if self.often <= self.rarely:
            raise InputError(
                f"{task}: often: expected more than {self.rarely} (rarely), got {self.often}", ""
            )
        pool = draw.sample(words, len(words))
        width = len(str(tokens // 4))

        def size(word: str) -> int:
            return count(f" {'9' * width}. {word}")

        common = pool[: self.common]
        if len(common) < self.common:
            common += coin_words(self.common - len(common), split, draw, set(pool))
        needed = self.often * sum(map(size, common))
        if needed > tokens:
            raise too_short(task, tokens, needed)
        listed, room, others = common * self.often, tokens - needed, pool[self.common :]
        taken = set(pool) | set(common)
        while room > 0:
            word = others.pop() if others else coin_words(1, split, draw, taken)[0]
            taken.add(word)
            room -= self.rarely * size(word)
            if room >= 0:
                listed += [word] * self.rarely
        draw.shuffle(listed)
        context = " ".join(f"{place}. {word}" for place, word in enumerate(listed, 1))
        query = Query(
            f"What are the {self.common} most common words in the above list?",
            common,
            spans_of(context, common),
            f"Answer: The top {self.common} words that appear most often in the list are:",
        )
        return context, [query]


@dataclass(frozen=True)
class FrequentWords:
    """Coded words whose counts fall as rank ** -alpha; the first rank is dots, to be ignored."""

    alpha: float = 2.0
    asked: int = 3

    def make(
        self,
        task: str,
        words: Sequence[str],
        split: str | None,
        count: Count,
        tokens: int,
        draw: random.Random,
    ) -> tuple[str, list[Query]]:
        """A text of at most `tokens` tokens, and its one question."""
        vocabulary = max(FEWEST_CODED, self.asked + 2, tokens // VOCABULARY_SHARE)
        coded = [DOTS, *coin_words(vocabulary - 1, split, draw, set())]
        weights = [rank**-self.alpha for rank in range(1, vocabulary + 1)]
        sizes = [count(" " + word) for word in coded]
        used = sum(w * s for w, s in zip(weights, sizes, strict=True))
        counts = [int(tokens * weight / used) for weight in weights]
        wanted = counts[: self.asked + 2]
        if any(more <= fewer for more, fewer in zip(wanted, wanted[1:], strict=False)):
            raise InputError(
                f"{task}: length: expected enough tokens for {self.asked} counts that differ, "
                f"got {tokens}",
                "ask for a longer text",
            )
        text = [word for word, times in zip(coded, counts, strict=True) for _ in range(times)]
        draw.shuffle(text)
        context, answers = " ".join(text), coded[1 : self.asked + 1]
        query = Query(
            f"Ignore the dots '{DOTS}'. What are the {self.asked} most frequently appeared words "
            "in the above coded text?",
            answers,
            spans_of(context, answers),
            f"Answer: According to the coded text above, the {self.asked} most frequently appeared "
            "words are:",
        )
        return context, [query]
