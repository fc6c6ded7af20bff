# SPDX-License-Identifier: Apache-2.0
"""The needle task: facts in spans of books, half of the texts with one fact and half with four."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from lychee.data.needles import KINDS, Needle, NeedleMaker, hide_needles, word_list
from lychee.data.task import TaskSample
from lychee.errors import InputError
from lychee.tokenizer import TextTokenizer

MULTI_KEYS = 4
# Columns of the table: questions whose details equal these.
BREAKDOWN = {
    "single-key": {"keys": 1},
    "multi-key": {"keys": MULTI_KEYS},
    "numbers": {"kind": "number"},
    "words": {"kind": "word"},
}


def key_counts(questions: int) -> list[int]:
    """Needles per text: as many texts of one needle as of MULTI_KEYS, `questions` in all."""
    counts: list[int] = []
    while sum(counts) < questions:
        counts.append(1 if len(counts) % 2 == 0 else MULTI_KEYS)
    if (surplus := sum(counts) - questions) > 0:
        counts[-1] -= surplus
    return counts


class NeedleTexts:
    """Texts made of books, with their questions."""

    # How often all books stand in a text, the text, and its tokens' characters.
    repeated: tuple[int, str, list[tuple[int, int]]] = (0, "", [])

    def __init__(self, tokenizer: TextTokenizer, books: Sequence[str]):
        self.tokenizer = tokenizer
        self.words = word_list(books, tokenizer.encode)
        self.books = [(text, tokenizer.encode_with_offsets(text)[1]) for text in books]
        if len(self.words) < 16:
            raise InputError(
                "books: expected English prose with at least 16 common words of one token each, "
                f"got {len(self.words)}"
            )

    def texts(self, length: int, questions: int, seed: int) -> Iterator[list[TaskSample]]:
        """Samples of one text after the other; always the same for the same arguments."""
        draw = random.Random(seed * 1_000_003 + length)
        maker = NeedleMaker(self.words, draw)
        for keys in key_counts(questions):
            text, hidden = self.make_text(length, keys, maker, draw)
            yield [
                TaskSample(
                    "needles",
                    text,
                    needle.question,
                    (needle.value,),
                    ((place, place + len(needle.statement)),),
                    "exact",
                    {"keys": keys, "kind": needle.kind},
                )
                for needle, place in hidden
            ]

    def all_books(self, tokens: int) -> tuple[str, list[tuple[int, int]]]:
        """All books as often as it takes for more than `tokens`."""
        count = tokens // sum(len(offsets) for _, offsets in self.books) + 1
        if count != self.repeated[0]:
            text = "\n\n".join([text for text, _ in self.books] * count)
            self.repeated = count, text, self.tokenizer.encode_with_offsets(text)[1]
        return self.repeated[1:]

    def make_text(
        self, length: int, keys: int, maker: NeedleMaker, draw: random.Random
    ) -> tuple[str, list[tuple[Needle, int]]]:
        """A span of a random book with `keys` needles, `length` tokens in all.

        Where no book is as long, one is made of all books, over and over.
        """
        needles = [maker.make(KINDS[draw.randrange(2)]) for _ in range(keys)]
        room = length - sum(len(self.tokenizer.encode(" " + n.statement)) for n in needles)
        if room < 1:
            raise InputError(f"length: expected more than {length - room} tokens, got {length}")
        long_enough = [book for book in self.books if len(book[1]) > room]
        text, offsets = draw.choice(long_enough or [self.all_books(room)])
        start = draw.randrange(len(offsets) - room)
        filler = text[offsets[start][0] : offsets[start + room - 1][1]]
        return hide_needles(filler, needles, draw)
