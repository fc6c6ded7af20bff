# SPDX-License-Identifier: Apache-2.0
"""Needles and training samples: reproducible, and their answers are what the text says."""

import random
from dataclasses import replace

import pytest
from small_sampler import TEXT, WORDS, small_sampler

from lychee.data.needles import KINDS, NeedleMaker, hide_needles, word_list
from lychee.data.recall import IGNORED, Mixture, RecallSampler
from lychee.errors import InputError, MemoryConfigError


def test_word_list_takes_plain_common_words_of_one_token():
    def encode(text):
        return [0] if text in (" tree", " rare", " Paris", " well", " abc") else [0, 1]

    texts = ["Paris don't well-known abc tree tree", "tree house house house rare"]
    assert word_list(texts, encode) == ["tree"]
    assert word_list(texts, encode, minimum_count=1) == ["rare", "tree"]


@pytest.mark.parametrize("kind", KINDS)
def test_statement_and_question_fit(kind):
    maker = NeedleMaker(WORDS, 3)
    for _ in range(50):
        needle = maker.make(kind)
        assert needle.key in needle.statement and needle.key in needle.question
        assert needle.attribute in needle.statement and needle.attribute in needle.question
        assert needle.value in needle.statement and needle.value not in needle.key
        assert kind == "word" or (len(needle.value) == 7 and needle.value.isdigit())


def test_same_seed_same_needles():
    first, second = NeedleMaker(WORDS, 5), NeedleMaker(WORDS, 5)
    assert [first.make() for _ in range(9)] == [second.make() for _ in range(9)]


def test_unrelated_needles_are_not_stated():
    maker = NeedleMaker(WORDS, 1)
    needles = [maker.make() for _ in range(6)]
    stated = {(needle.attribute, needle.key) for needle in needles}
    asked = [maker.unrelated(needles, 0.5) for _ in range(300)]
    assert not stated & {(needle.attribute, needle.key) for needle in asked}
    # Hard cases occur: keys that share a half, and known keys with another attribute.
    halves = {half for needle in needles for half in needle.key.split()}
    assert any(halves & set(needle.key.split()) for needle in asked)


def test_hide_needles_keeps_the_text():
    maker = NeedleMaker(WORDS, 2)
    needles = [maker.make() for _ in range(7)]
    text, hidden = hide_needles(TEXT, needles, random.Random(4))
    assert sorted(n.statement for n, _ in hidden) == sorted(n.statement for n in needles)
    for needle, place in hidden:
        assert text[place : place + len(needle.statement)] == needle.statement
        assert place < 2 or text[place - 2] in ".!?"
    for needle, _ in hidden:
        text = text.replace(" " + needle.statement, "", 1)
    assert text == TEXT


def test_too_few_words_are_refused():
    with pytest.raises(InputError, match="words: expected at least 16 .* got 3; give more"):
        NeedleMaker(["one"] * 3)


@pytest.fixture(scope="module")
def sampler():
    return small_sampler(RecallSampler)


def test_a_turn_ends_with_one_of_several_stops(sampler):
    """Llama 3 has three; which one training writes must not depend on chance."""
    stops = {5, sampler.end, 9}
    prompts = replace(sampler.prompts, stop=frozenset(stops))
    several = RecallSampler(sampler.tokenizer, prompts, sampler.books, WORDS, 0)
    assert several.end == min(stops)
    with pytest.raises(MemoryConfigError, match="eos_token_id: expected a token that ends a turn"):
        RecallSampler(
            sampler.tokenizer, replace(prompts, stop=frozenset()), sampler.books, WORDS, 0
        )


def test_chunks_hold_their_needles(sampler):
    for _ in range(20):
        needles = [sampler.maker.make() for _ in range(3)]
        ids, kept = sampler.chunk(160, needles)
        assert len(ids) == 160
        text = sampler.tokenizer.decode(ids)
        assert kept and all(needle.statement in text for needle in kept)


def test_targets_are_what_the_case_says(sampler):
    seen = set()
    none = sampler.tokenizer.decode(sampler.prompts.no_memory).strip()
    for _ in range(200):
        needles = [sampler.maker.make() for _ in range(3)]
        turn = sampler.update_turn(needles, Mixture())
        target = sampler.tokenizer.decode(turn.target).strip()
        key, value = target.rsplit(" ", 1)
        stated = [n.value for n in needles if n.key == key]
        prompt = sampler.tokenizer.decode(turn.prompt)
        assert key in prompt
        assert turn.target[-1] == sampler.end
        if turn.case in ("found", "replaced"):
            assert value in stated
        elif turn.case == "kept":
            assert f"{key} {value}" in prompt and value != none
        else:
            assert value == none
        seen.add(turn.case)
    assert seen == {"found", "absent", "kept", "replaced"}


def test_labels_line_up(sampler):
    batch = sampler.batch(2, 120, 4, (1, 3), Mixture())
    assert batch.chunks.shape == (2, 120) and len(batch.turns) == len(batch.labels) == 8
    for inputs, labels in zip(batch.turns, batch.labels, strict=True):
        places = (labels != IGNORED).nonzero()[:, 0].tolist()
        assert places == list(range(places[0], places[-1] + 1))
        # What is predicted at one place is fed at the next.
        assert inputs[places[1:]].tolist() == labels[places[:-1]].tolist()
        assert labels[places[-1]] == sampler.end
