# SPDX-License-Identifier: Apache-2.0
"""Multi-hop samples: the text holds every fact where the sample says, in its split's names."""

import random

import pytest

from lychee.data.multihop import TASKS, MultiHopMaker
from lychee.data.task import split_of
from lychee.data.worlds import STATEMENTS, World
from lychee.errors import InputError

WORDS = [
    f"{first}{second}{last}"
    for first in ("b", "d", "f", "gr", "l", "m", "p", "r", "st", "tr")
    for second in ("ar", "el", "on", "uck")
    for last in ("ing", "y", "er", "ed", "ish", "est")
]


def count(text):
    return len(text.split())


def maker(**options):
    return MultiHopMaker(WORDS, count, **options)


@pytest.mark.parametrize("task", TASKS)
def test_support_states_the_hops(task):
    kind, hops = TASKS[task]
    for index in range(3):
        samples = maker().make(task, 600, index, questions=5)
        assert len(samples) == 5 and len({sample.question for sample in samples}) == 5
        for sample in samples:
            assert sample.context == samples[0].context and count(sample.context) <= 600
            statements = [sample.context[start:stop] for start, stop in sample.support]
            assert len(statements) == hops and all(text.endswith(".") for text in statements)
            if kind == "bridge":
                assert sample.answers[0] in statements[-1]
                assert sample.answers[0] not in sample.question
            else:
                assert sample.answers[0] in ("yes", "no")


def test_facts_stand_in_any_order():
    support = [s.support for i in range(6) for s in maker().make("hops_2", 600, i, questions=4)]
    ordered = sum(first < second for (first, _), (second, _) in support)
    assert 0 < ordered < len(support)


def test_same_arguments_same_samples():
    assert maker().make("hops_3", 500, 1) == maker().make("hops_3", 500, 1)
    assert maker().make("hops_3", 500, 1) != maker(seed=1).make("hops_3", 500, 1)


def test_names_are_of_the_split():
    for split in ("train", "validation"):
        (sample,) = maker(split=split).make("comparison", 600)
        names = [w for w in sample.question.replace("?", "").split() if w[0].isupper()]
        names = [name for name in names if name not in ("Do", "Is")]
        assert len(names) >= 2 and all(split_of(name) == split for name in names)


def test_distractors_make_texts_denser():
    openings = [text.split("{")[0] for text in STATEMENTS if not text.startswith("{")]

    def facts(distractors):
        (sample,) = maker().make("hops_1", 2000, distractors=distractors)
        return sum(sample.context.count(opening) for opening in set(openings))

    assert facts(0) < facts(4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hops_9", 600), "task: expected one of hops_1, .*, got 'hops_9'"),
        (("hops_2", 3), "hops_2: expected a longer text, got 3 tokens"),
    ],
)
def test_bad_tasks_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        maker().make(*arguments)
    with pytest.raises(InputError, match="expected settings of distractors, surnames, got 'keys'"):
        maker().make("hops_2", 600, keys=3)
    with pytest.raises(InputError, match="surnames: expected a share up to 1, got 2"):
        maker().make("hops_2", 600, surnames=2)
    with pytest.raises(InputError, match="distractors: expected a number from 0 on, got 'many'"):
        maker().make("hops_2", 600, distractors="many")
    with pytest.raises(InputError, match="expected at least 16 of the test split, got 0"):
        MultiHopMaker([], count)


def test_comparisons_of_one_world_do_not_clash():
    world = World(WORDS, random.Random(0), "test")
    facts = [fact for _ in range(30) for fact in world.comparison().facts]
    assert len({(fact.subject, fact.relation) for fact in facts}) == len(facts)
