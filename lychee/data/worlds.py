# SPDX-License-Identifier: Apache-2.0
"""Invented worlds: people, places and works with invented names, facts that relate them, and
questions that need two to four of the facts.

A bridge question follows a chain ("the mayor of the home town of ..."); a comparison asks whether
two entities agree in one relation. Splits share no name.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from lychee.data.task import SPLITS, split_of

# Names are a beginning and one or two endings; the endings of one name are never those of another
# split's, because a split is drawn by the hash of the whole name.
BEGINNINGS = (
    "Al", "Ar", "Bal", "Bar", "Bor", "Bou", "Cha", "Fe", "Ger", "Gu", "Il", "Kar", "La", "Le",
    "Ma", "Mad", "Mar", "Par", "Pe", "Pet", "Pol", "Pro", "Qu", "Su", "Th", "To", "Vas",
)  # fmt: skip
ENDINGS = (
    "akov", "arth", "avel", "bel", "ber", "burg", "cal", "char", "chin", "col", "cor", "del",
    "der", "don", "elia", "elle", "enis", "enne", "gan", "gar", "gel", "hal", "han", "hil", "hor",
    "ian", "ikol", "ille", "ina", "ino", "ison", "itz", "ius", "ken", "kin", "lan", "land", "ler",
    "ley", "lin", "mar", "min", "mol", "mon", "nat", "ney", "non", "olas", "onel", "onya", "osha",
    "ovna", "pan", "pond", "port", "rand", "ray", "rill", "ron", "roy", "rum", "sel", "sen", "sha",
    "son", "tain", "tal", "tern", "ton", "ulf", "usha", "utz", "val", "van", "vel", "ven", "vern",
    "vil", "vol", "wall", "ward", "yond", "zen",
)  # fmt: skip

# What a relation's subjects are, and what it leads to.
RELATIONS = {
    ("person", "person"): (
        "mentor", "rival", "neighbour", "teacher", "partner", "doctor", "master", "servant",
    ),
    ("person", "place"): ("home town", "birthplace", "hiding place"),
    ("person", "work"): ("favourite book", "best-known song"),
    ("place", "person"): ("mayor", "founder", "oldest citizen"),
    ("work", "person"): ("author", "owner", "translator"),
    ("person", "number"): ("magic number", "secret code", "phone number", "account number"),
    ("person", "word"): ("password", "codename", "magic word"),
}  # fmt: skip

STATEMENTS = (
    "The {relation} of {subject} is {object}.",
    "Remember that the {relation} of {subject} is {object}.",
    "As everybody knows, the {relation} of {subject} is {object}.",
    "For {subject} the {relation} is {object}.",
    "In those days the {relation} of {subject} was {object}.",
    "{object} is the {relation} of {subject}.",
)
QUESTIONS = (
    "What is {path}?",
    "Who or what is {path}?",
    "Tell me {path}.",
    "Name {path}.",
)
COMPARISONS = (
    "Do {first} and {second} have the same {relation}?",
    "Is the {relation} of {first} also that of {second}?",
)


@dataclass(frozen=True)
class Fact:
    """`object` is the `relation` of `subject`, as `statement` says it."""

    subject: str
    relation: str
    object: str
    statement: str


@dataclass(frozen=True)
class WorldQuestion:
    """A question and the facts it needs.

    Attributes:
        kind: "bridge" or "comparison".
        facts: for a bridge in the order of its hops, each one's object the next one's subject.
    """

    kind: str
    text: str
    answer: str
    facts: tuple[Fact, ...]


class World:
    """Facts that do not contradict each other; every random choice comes from one generator."""

    def __init__(
        self,
        words: list[str],
        draw: random.Random,
        split: str = "train",
        *,
        surnames: float = 0.2,
        alike: float = 0.0,
        longer: float = 0.15,
        plain: bool = False,
    ):
        """
        Args:
            words: values of relations that lead to a word.
            surnames: share of people with two names.
            alike: share of names that begin as an earlier one of this world does.
            longer: share of names with two endings.
            plain: one wording for all statements and one for all questions, to start training with.
        """
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        self.words, self.random, self.split = words, draw, split
        self.surnames, self.alike, self.longer, self.plain = surnames, alike, longer, plain
        self.beginnings: list[str] = []
        self.objects: dict[tuple[str, str], str] = {}
        self.kinds: dict[str, str] = {}

    def name(self) -> str:
        """One invented word of the split."""
        while True:
            # Without `alike` nothing is drawn for it, so that a seed's worlds stay as they are.
            earlier = self.alike and self.beginnings and self.random.random() < self.alike
            beginning = self.random.choice(self.beginnings if earlier else BEGINNINGS)
            parts = [beginning, self.random.choice(ENDINGS)]
            if self.random.random() < self.longer:
                parts.append(self.random.choice(ENDINGS))
            if split_of(word := "".join(parts)) == self.split:
                self.beginnings.append(beginning)
                return word

    def entity(self, kind: str, like: str | None = None) -> str:
        """A new entity; a person `like` one with two names shares one of them."""
        while True:
            if kind == "number":
                return str(self.random.randrange(1_000_000, 10_000_000))
            if kind == "word":
                return self.random.choice(self.words)
            name = self.name()
            if kind == "person" and like is not None and " " in like:
                pair = [name, self.name()]
                side = self.random.randrange(2)
                pair[side] = like.split(" ")[side]
                name = " ".join(pair)
            elif kind == "person" and self.random.random() < self.surnames:
                name += " " + self.name()
            if name not in self.kinds:
                self.kinds[name] = kind
                return name

    def fact(self, subject: str, relation: str, value: str) -> Fact:
        """State a fact; it holds in this world from now on."""
        self.objects[subject, relation] = value
        wording = STATEMENTS[0] if self.plain else self.random.choice(STATEMENTS)
        statement = wording.format(subject=subject, relation=relation, object=value)
        return Fact(subject, relation, value, statement)

    def free_relations(self, subject: str, ends: tuple[str, ...]) -> list[tuple[str, str]]:
        """Relations of `subject` that lead to the kinds `ends` and are not stated yet, and where
        each one leads."""
        return [
            (relation, end)
            for (start, end), relations in RELATIONS.items()
            if start == self.kinds[subject] and end in ends
            for relation in relations
            if (subject, relation) not in self.objects
        ]

    def bridge(self, hops: int) -> WorldQuestion:
        """A chain of `hops` new facts about new entities."""
        last_kinds = ("person", "place", "work", "number", "word")
        # One relation in three of a person leads on to something that is no person.
        kind = self.random.choices(("person", "place", "work"), (4, 1, 1))[0]
        subject = self.entity(kind)
        path, facts = subject, []
        for hop in range(hops):
            ends = last_kinds if hop == hops - 1 else ("person", "place", "work")
            relation, end = self.random.choice(self.free_relations(subject, ends))
            value = self.entity(end)
            facts.append(self.fact(subject, relation, value))
            path, subject = f"the {relation} of {path}", value
        return WorldQuestion("bridge", self.ask(path), facts[-1].object, tuple(facts))

    def ask(self, path: str) -> str:
        """A question for what `path` leads to."""
        return (QUESTIONS[0] if self.plain else self.random.choice(QUESTIONS)).format(path=path)

    def comparison(self) -> WorldQuestion:
        """Whether two people agree in a relation; they do in half of the questions."""
        first = self.entity("person")
        choices = self.free_relations(first, ("person", "place", "work"))
        relation, end = self.random.choice(choices)
        second = self.entity("person", like=first if self.random.random() < 0.3 else None)
        value = self.entity(end)
        same = self.random.random() < 0.5
        other = value if same else self.entity(end, like=value)
        facts = (self.fact(first, relation, value), self.fact(second, relation, other))
        text = self.random.choice(COMPARISONS).format(first=first, second=second, relation=relation)
        return WorldQuestion("comparison", text, "yes" if same else "no", facts)

    def reword(self, question: WorldQuestion) -> WorldQuestion:
        """The same bridge question in another wording."""
        path = question.facts[0].subject
        for fact in question.facts:
            path = f"the {fact.relation} of {path}"
        return replace(question, text=self.ask(path))

    def other_relation(self, question: WorldQuestion) -> Fact:
        """Another relation of a subject of the question's facts."""
        subject = self.random.choice(question.facts).subject
        choices = self.free_relations(subject, ("person", "place", "work", "number"))
        if not choices:
            return self.distractor(question)
        relation, end = self.random.choice(choices)
        return self.fact(subject, relation, self.entity(end))

    def distractor(self, question: WorldQuestion) -> Fact:
        """A fact that the question does not need: another relation of one of its entities, or its
        relation for somebody else who may share a name."""
        near = self.random.choice(question.facts)
        subject = self.random.choice((near.subject, near.object))
        choices = []
        if subject in self.kinds and self.random.random() < 0.5:
            choices = self.free_relations(subject, ("person", "place", "work", "number"))
        if choices:
            relation, end = self.random.choice(choices)
        else:
            subject = self.entity(self.kinds[near.subject], like=near.subject)
            relation = near.relation
            end = next(end for (_, end), names in RELATIONS.items() if relation in names)
        return self.fact(subject, relation, self.entity(end))
