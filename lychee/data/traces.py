# SPDX-License-Identifier: Apache-2.0
"""Working-memory traces: reading turns about needles and about chains of facts in invented worlds.

The working memory after any chunk is known exactly: the chain's relations and the entities found so
far, "none" for the others. Every chunk is asked about many states at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lychee.data.needles import NeedleMaker
from lychee.data.recall import Mixture, RecallBatch, RecallSampler, Turn, make_batch
from lychee.data.worlds import Fact, World, WorldQuestion

# Share of a world's turns that prefer a chunk with something close to what is looked up.
TEMPTED_SHARE = 0.5


@dataclass(frozen=True)
class TraceMixture(Mixture):
    """Shares that make up a batch of traces, next to those of needles.

    Attributes:
        worlds: of chunks about a world; the others hold needles alone.
        rare: of chunks whose needles use words of several tokens, too.
        hops: weights of chains of one, two, three ... facts.
        comparisons: of a world's questions that compare two entities.
        progress: of a world's turns in which the chunk tells the next fact of the chain.
        surnames: of a world's people with two names.
        alike: of a world's names that begin as an earlier one does.
        longer: of a world's names with two endings.
        sparse: of worlds of which the chunk tells one or two facts, half of them distractors.
        bare: of chunks that tell no fact at all.
        plain: of worlds in a single wording.
    """

    worlds: float = 0.65
    rare: float = 0.3
    hops: tuple[float, ...] = (1, 3, 1)
    comparisons: float = 0.0
    progress: float = 0.5
    surnames: float = 0.2
    alike: float = 0.0
    longer: float = 0.15
    sparse: float = 0.0
    bare: float = 0.0
    plain: float = 0.0


@dataclass(frozen=True)
class Chain:
    """A question, which of its facts the chunk tells, and for which ones it tells something close:
    another relation of the subject, or the relation for a namesake."""

    question: WorldQuestion
    told: tuple[bool, ...]
    tempting: tuple[bool, ...]

    @classmethod
    def of(cls, question: WorldQuestion, kept: Sequence[Fact]) -> Chain:
        """`kept`: what the chunk tells of the world."""
        told = tuple(fact in kept for fact in question.facts)
        tempting = tuple(
            any(other != fact and cls.close(other, fact) for other in kept)
            for fact in question.facts
        )
        return cls(question, told, tempting)

    @staticmethod
    def close(other: Fact, fact: Fact) -> bool:
        """Whether they have the subject, or the relation and a part of its name, in common."""
        if other.subject == fact.subject:
            return True
        shared = set(other.subject.split()) & set(fact.subject.split())
        return other.relation == fact.relation and bool(shared)


class TraceSampler(RecallSampler):
    """Draws batches of traces in the form of `RecallSampler`.

    Attributes:
        split: of the worlds' names.
    """

    def __init__(self, *arguments, rare_words: list[str], **options):
        """Arguments of `RecallSampler`, and words of several tokens, see `word_list`."""
        super().__init__(*arguments, **options)
        self.rare_maker = NeedleMaker(self.maker.words + rare_words, self.random)
        self.split = "train"

    def batch(
        self,
        size: int,
        chunk: int,
        questions: int,
        facts: tuple[int, int],
        mixture: TraceMixture,
    ) -> RecallBatch:
        chunks, turns, final = [], [], []
        for _ in range(size):
            rare = self.random.random() < mixture.rare
            self.maker = self.rare_maker if rare else self.makers[False]
            self.maker.numbers = mixture.numbers
            # Nothing is drawn where there are none, so that a seed's batches stay as they are.
            bare = bool(mixture.bare) and self.random.random() < mixture.bare
            about_world = self.random.random() < mixture.worlds
            fill = self.world_chunk if about_world else self.needle_chunk
            asked = replace(mixture, sparse=0.0) if bare else mixture
            ids, new, last = fill(chunk, questions, (0, 0) if bare else facts, asked)
            chunks.append(ids)
            turns += new
            final += last
        return make_batch(chunks, turns, final)

    def needle_chunk(
        self, length: int, questions: int, facts: tuple[int, int], mixture: TraceMixture
    ) -> tuple[list[int], list[Turn], list[Turn]]:
        count = self.random.randint(*facts)
        ids, needles = self.chunk(length, [self.maker.make() for _ in range(count)])
        turns = [self.update_turn(needles, mixture) for _ in range(questions)]
        return ids, turns, [self.final_turn() for _ in range(max(1, questions // 8))]

    def world_chunk(
        self, length: int, questions: int, facts: tuple[int, int], mixture: TraceMixture
    ) -> tuple[list[int], list[Turn], list[Turn]]:
        """A chunk that tells parts of some chains, distractors and some needles."""
        draw = self.random
        plain = draw.random() < mixture.plain
        shares = {name: getattr(mixture, name) for name in ("surnames", "alike", "longer")}
        world = World(self.maker.words, draw, self.split, **shares, plain=plain)
        sparse = bool(mixture.sparse) and draw.random() < mixture.sparse
        room = draw.randint(1, 2) if sparse else draw.randint(*facts)
        asked = [self.world_question(world, mixture) for _ in range(max(2, (room + 1) // 2))]
        told = []
        # The last question is about nothing that the chunk tells, but for its distractors.
        for question in asked[:-1]:
            told += [fact for fact in question.facts if draw.random() < 0.5]
        if sparse:
            told += [world.distractor(asked[0]) for _ in range(max(1, len(told)))]
        while len(told) < room:
            kind = draw.random()
            if kind < 0.4:
                told.append(world.other_relation(draw.choice(asked)))
            elif kind < 0.8:
                told.append(world.distractor(draw.choice(asked)))
            else:
                told.append(self.maker.make())
        draw.shuffle(told)
        ids, kept = self.chunk(length, told[:room])
        needles = [needle for needle in kept if not isinstance(needle, Fact)]
        stated = [fact for fact in kept if isinstance(fact, Fact)]
        chains = [Chain.of(question, stated) for question in asked]
        turns = []
        for _ in range(questions):
            if needles and draw.random() < 0.2:
                turns.append(self.update_turn(needles, mixture))
            else:
                turns.append(self.world_turn(world, chains, mixture))
        final = [self.world_final(world, draw.choice(asked)) for _ in range(max(1, questions // 8))]
        return ids, turns, final

    def world_question(self, world: World, mixture: TraceMixture) -> WorldQuestion:
        if self.random.random() < mixture.comparisons:
            return world.comparison()
        (hops,) = self.random.choices(range(1, len(mixture.hops) + 1), mixture.hops)
        return world.bridge(hops)

    def world_turn(self, world: World, chains: list[Chain], mixture: TraceMixture) -> Turn:
        """One of the questions at a state of its notes, where the chunk helps or does not."""
        draw = self.random
        states: list[tuple[Chain, tuple[bool, ...]]] = []
        while not states:
            helped = draw.random() < mixture.progress
            states = [
                (chain, known)
                for chain in chains
                for known in self.states(chain.question)
                if any(t and not k for t, k in zip(self.usable(chain, known), known, strict=True))
                == helped
            ]
        if draw.random() < TEMPTED_SHARE:
            states = [
                (chain, known) for chain, known in states if self.tempted(chain, known)
            ] or states
        chain, known = draw.choice(states)
        question = chain.question
        if question.kind == "bridge":
            question = world.reword(question)
        usable = self.usable(chain, known)
        after = tuple(k or t for k, t in zip(known, usable, strict=True))
        notes = self.world_notes(question, known)
        if not any(known) and draw.random() < 0.5:
            notes = self.prompts.no_memory
        case = "kept" if all(known) else f"hops{sum(after) - sum(known)}"
        prompt = self.prompts.update.render(self.tokenizer.encode(question.text), notes)
        return Turn(prompt, [*self.world_notes(question, after), self.end], case)

    @staticmethod
    def states(question: WorldQuestion) -> list[tuple[bool, ...]]:
        """The facts that may be known at once: the first ones of a bridge, any of a comparison."""
        count = len(question.facts)
        if question.kind == "bridge":
            return [(True,) * n + (False,) * (count - n) for n in range(count + 1)]
        return [(a, b) for a in (False, True) for b in (False, True)]

    @staticmethod
    def usable(chain: Chain, known: tuple[bool, ...]) -> tuple[bool, ...]:
        """The facts told by the chunk that connect to what is known."""
        if chain.question.kind == "comparison":
            return chain.told
        reached, usable = True, []
        for told, noted in zip(chain.told, known, strict=True):
            usable.append(told and reached)
            reached = reached and (told or noted)
        return tuple(usable)

    @staticmethod
    def tempted(chain: Chain, known: tuple[bool, ...]) -> bool:
        """Whether the chunk tells something close to the next missing fact."""
        return not all(known) and chain.tempting[known.index(False)]

    def world_notes(self, question: WorldQuestion, known: tuple[bool, ...]) -> list[int]:
        """Notes as token ids: subject, relation and object of every fact, "none" where missing.

        In a chain an object is the next fact's subject. The relation stands beside its subject, so
        that a value is looked up where both are at hand.
        """
        encode, ids = self.tokenizer.encode, []
        for index, (fact, noted) in enumerate(zip(question.facts, known, strict=True)):
            if question.kind == "comparison" or index == 0:
                ids += encode(" " + fact.subject)
            ids += [
                *encode(" " + fact.relation),
                *self.encode_value(fact.object if noted else None),
            ]
        return ids

    def world_final(self, world: World, question: WorldQuestion) -> Turn:
        """The answer from complete notes, or "none" from others."""
        states = self.states(question)
        known = states[-1] if self.random.random() < 0.8 else self.random.choice(states[:-1])
        if question.kind == "bridge":
            question = world.reword(question)
        prompt = self.prompts.answer.render(
            self.tokenizer.encode(question.text), self.world_notes(question, known)
        )
        target = self.encode_value(question.answer if all(known) else None)
        return Turn(prompt, [*target, self.end], "final")
