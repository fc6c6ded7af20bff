# SPDX-License-Identifier: Apache-2.0
"""Text around statements: spans of books, or generated sentences, never shared between splits."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from lychee.data.task import Span, of_split
from lychee.documents import read_file
from lychee.errors import InputError

# Characters of a piece of a book: the unit that belongs to one split.
PIECE = 1500
LONGEST_SENTENCE = 4000
GENERATED_SENTENCES = 4096
SENTENCES_PER_PIECE = 8
NOISE_SENTENCES = 5

SENTENCE_END = re.compile(r"[.!?][\"')”’]*(?=\s)")

ADJECTIVES = (
    "old quiet small narrow tall grey bright broken heavy empty distant wooden gentle tired warm "
    "cold patient curious careful clever rusty golden muddy windy"
).split()
NOUNS = (
    "baker sailor teacher farmer painter driver gardener doctor clerk miller fisherman tailor "
    "neighbour traveller shepherd carpenter"
).split()
THINGS = (
    "bridge lantern ladder kettle basket window garden barrel wagon blanket mirror fence boat "
    "chimney orchard drawer letter bell candle stove"
).split()
VERBS = "watched mended carried painted passed cleaned found moved measured forgot sold hid".split()
PLACES = (
    "near the river; behind the church; at the edge of the village; in the valley; by the harbour; "
    "on the hill; across the square; beside the mill; under the old trees; along the north road"
).split("; ")
TIMES = (
    "in the morning; before dawn; after the rain; late in autumn; every other day; that evening; "
    "during the fair; once a year; on the way home; long before noon"
).split("; ")
PATTERNS = (
    "The {adjective} {noun} {verb} the {thing} {place}.",
    "{time}, the {noun} {verb} a {adjective} {thing}.",
    "The {thing} {place} was {adjective}, and the {noun} {verb} it {time}.",
    "Nobody saw how the {noun} {verb} the {adjective} {thing} {time}.",
)

Count = Callable[[str], int]


class Filler:
    """Pieces of text that follow each other, measured in tokens.

    Args:
        pieces: non-empty texts; drawing wraps around at the last one.
        count: tokens of a text.
    """

    def __init__(self, pieces: Sequence[str], count: Count, separator: str = " "):
        if not pieces:
            raise InputError(
                "filler: expected text of the split, got none", "give more or longer books"
            )
        self.pieces, self.separator = pieces, separator
        self.count = lru_cache(maxsize=1 << 13)(count)

    @classmethod
    def of_books(cls, texts: Iterable[str], count: Count, split: str | None = None) -> Filler:
        """Spans of books that belong to `split`; None takes the books whole."""
        return cls(of_split([p for text in texts for p in cut_pieces(text)], split), count, "\n")

    @classmethod
    def generated(cls, count: Count, split: str | None = None, seed: int = 0) -> Filler:
        """Sentences about nothing in particular."""
        made = sentences(split, seed, GENERATED_SENTENCES)
        starts = range(0, len(made), SENTENCES_PER_PIECE)
        return cls([" ".join(made[i : i + SENTENCES_PER_PIECE]) for i in starts], count)

    @classmethod
    def noise(cls, count: Count, split: str | None = None, seed: int = 0) -> Filler:
        """A few sentences over and over, as in the simplest tasks of RULER."""
        return cls([" ".join(sentences(split, seed, NOISE_SENTENCES))], count)

    def draw(self, tokens: int, draw: random.Random) -> str:
        """Text from a random piece on: at most `tokens` tokens, ending with a whole sentence."""
        place, room, kept = draw.randrange(len(self.pieces)), tokens, []
        while (size := self.count(self.pieces[place]) + 1) <= room:
            kept.append(self.pieces[place])
            room -= size
            place = (place + 1) % len(self.pieces)
        last = ""
        for sentence in cut_sentences(self.pieces[place]):
            if self.count(last + sentence) > room:
                break
            last += sentence
        return self.separator.join([*kept, last] if last.strip() else kept).strip()


def sentences(split: str | None, seed: int, count: int) -> list[str]:
    """Different generated sentences of a split, always the same for a seed."""
    draw = random.Random(f"sentences/{seed}")
    made: dict[str, None] = {}
    while len(made) < count:
        sentence = draw.choice(PATTERNS).format(
            adjective=draw.choice(ADJECTIVES),
            noun=draw.choice(NOUNS),
            thing=draw.choice(THINGS),
            verb=draw.choice(VERBS),
            place=draw.choice(PLACES),
            time=draw.choice(TIMES),
        )
        sentence = sentence[0].upper() + sentence[1:]
        made |= dict.fromkeys(of_split([sentence], split))
    return list(made)


def cut_sentences(text: str) -> list[str]:
    """Sentences with the white space before them; what has no end is cut at white space."""
    parts, start = [], 0
    for stop in [*(match.end() for match in SENTENCE_END.finditer(text)), len(text)]:
        while stop - start > LONGEST_SENTENCE:
            cut = text.rfind(" ", start + 1, start + LONGEST_SENTENCE)
            cut = cut if cut > start else start + LONGEST_SENTENCE
            parts.append(text[start:cut])
            start = cut
        if stop > start:
            parts.append(text[start:stop])
        start = stop
    return parts


def cut_pieces(text: str) -> list[str]:
    """A book as pieces of whole sentences, each of about PIECE characters."""
    pieces, piece = [], ""
    for sentence in cut_sentences(text):
        piece += sentence
        if len(piece) >= PIECE:
            pieces.append(piece.strip())
            piece = ""
    return [piece for piece in [*pieces, piece.strip()] if piece]


def plant(text: str, statements: Sequence[str], draw: random.Random) -> tuple[str, list[Span]]:
    """`text` with every statement behind a random sentence, in the order given.

    Returns:
        The text, and the [start, stop) characters of every statement.
    """
    ends = [match.end() for match in SENTENCE_END.finditer(text)] or [len(text)]
    places = sorted(draw.choice(ends) for _ in statements)
    out, spans, last, length = [], [], 0, 0
    for place, statement in zip(places, statements, strict=True):
        out += [text[last:place], " ", statement]
        length += place - last + 1
        spans.append((length, length + len(statement)))
        length += len(statement)
        last = place
    return "".join([*out, text[last:]]), spans


def book_files(paths: Iterable[Path]) -> list[Path]:
    """Files as they are, and for each folder its *.txt files in the order of their names."""
    files: list[Path] = []
    for path in paths:
        found = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        if not found:
            raise InputError(f"{path}: expected a folder with *.txt files, got none")
        files += found
    return files


def read_books(paths: Iterable[Path]) -> list[str]:
    """Texts of files, and of all *.txt files of folders."""
    return [read_file(file).text for file in book_files(paths)]
