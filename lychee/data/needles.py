# SPDX-License-Identifier: Apache-2.0
"""Facts with random keys and values ("needles") and the questions that ask for them.

Single- and multi-key retrieval as in RULER (arXiv:2404.06654): a sentence states a number or a
word for a key, and the text around it says nothing about either.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lychee.errors import InputError

KINDS = ("number", "word")

ATTRIBUTES = {
    "number": (
        "magic number",
        "secret code",
        "locker number",
        "phone number",
        "ticket number",
        "account number",
        "lucky number",
        "order number",
    ),
    "word": (
        "magic word",
        "password",
        "codename",
        "nickname",
        "favourite thing",
        "secret word",
        "hiding place",
        "home town",
    ),
}

# The first statement and question follow RULER's wording; any question may ask for any statement.
STATEMENTS = (
    "One of the special {attribute}s for {key} is: {value}.",
    "The special {attribute} for {key} is: {value}.",
    "The {attribute} of {key} is {value}.",
    "Remember that the {attribute} of {key} is {value}.",
    "As everybody knows, the {attribute} for {key} is {value}.",
    "For {key} the {attribute} is {value}.",
)
QUESTIONS = (
    "What is the special {attribute} for {key} mentioned in the provided text?",
    "What is the special {attribute} for {key}?",
    "What is the {attribute} of {key}?",
    "What is the {attribute} for {key}?",
    "Which {attribute} does {key} have?",
    "Tell me the {attribute} of {key}.",
)
SINGLE_WORDING = 2


@dataclass(frozen=True)
class Needle:
    """One fact: `statement` goes into a text, `question` asks for `value`."""

    kind: str
    attribute: str
    key: str
    value: str
    statement: str
    question: str


def word_list(
    texts: Iterable[str],
    encode: Callable[[str], list[int]],
    minimum_count: int = 3,
    lengths: range = range(1, 2),
) -> list[str]:
    """Lower-case words of 4 to 9 letters that occur in `texts`, alphabetically.

    `encode` is the tokenizer's; a word is taken if its number of tokens, as it stands inside a
    sentence behind a space, is one of `lengths`.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(re.findall(r"(?<![A-Za-z'-])[a-z]{4,9}(?![A-Za-z'-])", text))
    words = sorted(word for word, count in counts.items() if count >= minimum_count)
    return [word for word in words if len(encode(" " + word)) in lengths]


class NeedleMaker:
    """Draws needles from a word list; the same seed gives the same needles.

    `single` makes one-word keys and numbers of three digits, all in one wording, to start training
    with.
    """

    def __init__(self, words: list[str], seed: int | random.Random = 0, *, single: bool = False):
        if len(words) < 16:
            raise InputError(
                f"words: expected at least 16 common ones of the books to draw from, "
                f"got {len(words)}",
                "give more or longer books, or a larger vocabulary",
            )
        self.words = words
        self.random = seed if isinstance(seed, random.Random) else random.Random(seed)
        self.single = single
        self.numbers = 0.5  # share among needles whose kind is drawn

    def key(self) -> str:
        """One word, or two."""
        words = self.random.sample(self.words, 2)
        return words[0] if self.single or self.random.random() < 0.5 else " ".join(words)

    def value(self, kind: str) -> str:
        """Seven digits without a leading zero, or a word."""
        if kind == "number":
            low = 100 if self.single else 1_000_000
            return str(self.random.randrange(low, 10 * low))
        return self.random.choice(self.words)

    def make(
        self,
        kind: str | None = None,
        *,
        key: str | None = None,
        attribute: str | None = None,
    ) -> Needle:
        """A needle; whatever is not given is drawn."""
        draw = self.random
        if kind is None:
            kind = "number" if draw.random() < self.numbers else "word"
        fields = {
            "attribute": attribute or draw.choice(ATTRIBUTES[kind]),
            "key": key or self.key(),
            "value": self.value(kind),
        }
        while fields["value"] in fields["key"]:
            fields["value"] = self.value(kind)
        statement = STATEMENTS[SINGLE_WORDING] if self.single else draw.choice(STATEMENTS)
        question = QUESTIONS[SINGLE_WORDING] if self.single else draw.choice(QUESTIONS)
        return Needle(
            kind, **fields, statement=statement.format(**fields), question=question.format(**fields)
        )

    def reword(self, needle: Needle) -> str:
        """Any of the questions that ask for `needle`."""
        question = QUESTIONS[SINGLE_WORDING] if self.single else self.random.choice(QUESTIONS)
        return question.format(attribute=needle.attribute, key=needle.key)

    def unrelated(self, needles: list[Needle], confusable: float) -> Needle:
        """A needle that `needles` do not state; a share of `confusable` has a key like theirs."""
        draw = self.random
        stated = {(needle.attribute, needle.key) for needle in needles}
        while True:
            needle = self.make()
            if needles and draw.random() < confusable:
                near = draw.choice(needles)
                if draw.random() < 0.2:
                    needle = self.make(key=near.key)
                elif " " in near.key:
                    halves = near.key.split(" ")
                    halves[draw.randrange(2)] = draw.choice(self.words)
                    needle = self.make(near.kind, attribute=near.attribute, key=" ".join(halves))
            if (needle.attribute, needle.key) not in stated:
                return needle


def hide_needles(
    text: str, needles: list[Needle], draw: random.Random
) -> tuple[str, list[tuple[Needle, int]]]:
    """`text` with every needle's statement behind a random sentence, and each one's character."""
    ends = [match.end() for match in re.finditer(r"[.!?][\"')”’]*(?=\s)", text)] or [len(text)]
    places = sorted(draw.choice(ends) for _ in needles)
    order = draw.sample(needles, len(needles))
    out, hidden, last, length = [], [], 0, 0
    for place, needle in zip(places, order, strict=True):
        out += [text[last:place], " ", needle.statement]
        length += place - last + 1
        hidden.append((needle, length))
        length += len(needle.statement)
        last = place
    return "".join([*out, text[last:]]), hidden
