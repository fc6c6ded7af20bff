# SPDX-License-Identifier: Apache-2.0
"""Worlds and working-memory traces: consistent, disjoint between splits, and right by the text."""

import random

import pytest
from small_sampler import WORDS, small_sampler

from lychee.data.needles import word_list
from lychee.data.task import SPLITS, split_of
from lychee.data.traces import Chain, TraceMixture, TraceSampler
from lychee.data.worlds import RELATIONS, World

RARE = ["thoroughbred", "winter", "silver", "quartz"]


def world(split="train", seed=0):
    return World(WORDS, random.Random(seed), split)


@pytest.mark.parametrize("hops", [1, 2, 3, 4])
def test_bridge_follows_its_facts(hops):
    invented = world()
    for _ in range(40):
        question = invented.bridge(hops)
        assert len(question.facts) == hops and question.answer == question.facts[-1].object
        for fact in question.facts:
            parts = (fact.subject, fact.relation, fact.object)
            assert all(part in fact.statement for part in parts)
        for first, second in zip(question.facts, question.facts[1:], strict=False):
            assert second.subject == first.object
        # The path names the relations from the last one to the first, then where it starts.
        relations = [f"the {fact.relation} of " for fact in question.facts[::-1]]
        assert "".join(relations) + question.facts[0].subject in question.text
        assert question.answer not in question.text


def test_comparison_is_answered_by_its_facts():
    invented = world()
    answers = set()
    for _ in range(60):
        question = invented.comparison()
        first, second = question.facts
        assert first.relation == second.relation and first.subject != second.subject
        assert question.answer == ("yes" if first.object == second.object else "no")
        answers.add(question.answer)
    assert answers == {"yes", "no"}


def test_a_world_never_contradicts_itself():
    invented = world()
    facts = []
    for _ in range(60):
        question = invented.bridge(2)
        facts += [*question.facts, *(invented.distractor(question) for _ in range(4))]
    stated = {}
    for fact in facts:
        assert stated.setdefault((fact.subject, fact.relation), fact.object) == fact.object
    assert len(stated) == len(facts)
    shared = [f.subject.split(" ")[1] for f in facts if " " in f.subject]
    assert len(set(shared)) < len(shared)


def test_splits_share_no_name():
    names = {split: {world(split, seed).name() for seed in range(300)} for split in SPLITS}
    assert all(split_of(name) == split for split in names for name in names[split])
    assert not names["train"] & (names["validation"] | names["test"])
    assert not names["validation"] & names["test"]
    with pytest.raises(ValueError, match="split: expected one of train, validation, test, got 'x'"):
        world("x")


def test_names_that_begin_alike():
    beginnings = []
    for alike in (0.0, 0.9):
        invented = World(WORDS, random.Random(5), alike=alike)
        for _ in range(40):
            invented.name()
        beginnings.append(len(set(invented.beginnings)))
    assert beginnings[0] > 2 * beginnings[1] > 2


def test_names_with_two_endings():
    lengths = []
    for longer in (0.0, 1.0):
        invented = World(WORDS, random.Random(5), longer=longer)
        lengths.append(sum(len(invented.name()) for _ in range(100)) / 100)
    assert lengths[1] > lengths[0] + 3


def test_same_seed_same_world():
    assert world(seed=3).bridge(2) == world(seed=3).bridge(2)
    assert world(seed=3).bridge(2) != world(seed=4).bridge(2)


def test_word_list_by_number_of_tokens():
    texts = ["tree house silver " * 4]
    encode = {" tree": [0], " house": [0, 1], " silver": [0, 1, 2]}.__getitem__
    assert word_list(texts, encode, lengths=range(2, 4)) == ["house", "silver"]


@pytest.fixture(scope="module")
def sampler():
    return small_sampler(TraceSampler, rare_words=RARE)


def parts(sampler, turn):
    """Notes, question and target of a world's turn as text."""
    decode = sampler.tokenizer.backend.decode
    notes, rest = decode(turn.prompt, skip_special_tokens=False).split("<|question|>")
    question = rest.split("<|update|>")[0]
    return notes.removeprefix("<|memory|>").strip(), question, decode(turn.target).strip()


def test_world_turns_advance_by_what_the_chunk_tells(sampler):
    """Recompute every target from the statements in the chunk's text alone."""
    cases = set()
    for _ in range(60):
        invented = World(WORDS, sampler.random)
        asked = [invented.bridge(hops) for hops in (1, 2, 3)]
        told = [
            fact for question in asked for fact in question.facts if sampler.random.random() < 0.6
        ]
        told += [invented.distractor(asked[1]) for _ in range(2)]
        ids, kept = sampler.chunk(700, told)
        text = sampler.tokenizer.decode(ids)
        chains = [Chain.of(q, kept) for q in asked]
        for _ in range(8):
            turn = sampler.world_turn(invented, chains, TraceMixture())
            notes, question, target = parts(sampler, turn)
            chain = next(q for q in asked if q.facts[0].subject in question)
            expected, known = chain.facts[0].subject, True
            for fact in chain.facts:
                noted = f"{fact.relation} {fact.object}" in notes
                known = known and (noted or fact.statement in text)
                expected += f" {fact.relation} {fact.object if known else 'none'}"
            assert target == expected
            cases.add(turn.case)
    assert {"kept", "hops0", "hops1", "hops2"} <= cases


def test_sparse_worlds_tell_chains_and_distractors_alone(sampler):
    mixture = TraceMixture(sparse=1.0, progress=0.5, alike=0.5)
    told, cases = set(), set()
    for _ in range(60):
        ids, turns, _ = sampler.world_chunk(300, 12, (5, 7), mixture)
        text = sampler.tokenizer.decode(ids)
        relations = [name for names in RELATIONS.values() for name in names]
        told.add(sum(text.count(f" {name} ") for name in relations))
        cases.add(frozenset(turn.case for turn in turns) & {"hops1", "hops2"} != frozenset())
    assert told == {1, 2} and cases == {False, True}


def test_bare_chunks_tell_nothing(sampler):
    for bare, cases in ((1.0, {"kept", "hops0", "absent"}), (0.0, {"hops1", "found"})):
        mixture = TraceMixture(bare=bare, sparse=0.5)
        found = set(sampler.batch(20, 300, 6, (2, 4), mixture).cases)
        assert found == cases if bare else found > cases


def test_a_margin_ends_the_chunk():
    blank = [7, 8, 7]
    sampler = small_sampler(TraceSampler, rare_words=RARE, margin=blank)
    for fill in (sampler.world_chunk, sampler.needle_chunk):
        ids, _, _ = fill(300, 4, (3, 6), TraceMixture())
        assert len(ids) == 300 and ids[-3:] == blank and ids[-6:-3] != blank


def test_batches_hold_worlds_and_needles(sampler):
    mixture = TraceMixture(worlds=0.5, rare=0.5, comparisons=0.2)
    batch = sampler.batch(12, 300, 6, (1, 6), mixture)
    assert batch.chunks.shape == (12, 300) and len(batch.turns) == len(batch.cases) == 72
    assert {"found", "absent"} & set(batch.cases) and {"hops0", "hops1"} <= set(batch.cases)


def test_names_are_of_the_samplers_split():
    sampler = small_sampler(TraceSampler, rare_words=RARE)
    sampler.split = "validation"
    _, turns, _ = sampler.world_chunk(300, 20, (4, 6), TraceMixture(surnames=0))
    turns = [turn for turn in turns if turn.case.startswith("hops")]
    names = {parts(sampler, turn)[2].split()[0] for turn in turns}
    assert names and {split_of(name) for name in names} == {"validation"}


def test_comparison_notes_fill_in_any_order(sampler):
    question = World(WORDS, random.Random(1)).comparison()
    first, second = question.facts
    states = {
        sampler.tokenizer.decode(sampler.world_notes(question, known)).strip()
        for known in sampler.states(question)
    }
    by = first.relation
    assert f"{first.subject} {by} none {second.subject} {by} {second.object}" in states
    assert f"{first.subject} {by} {first.object} {second.subject} {by} none" in states
    assert len(states) == 4
