# SPDX-License-Identifier: Apache-2.0
"""RULER's tasks: answers are what the text says, lengths hold, splits share nothing."""

import random
import re
from collections import Counter

import pytest

from lychee.data.filler import Filler, cut_pieces, plant, read_books
from lychee.data.ruler import TASKS, RulerMaker
from lychee.data.task import SPLITS, TaskSample, of_split, split_of
from lychee.errors import InputError

WORDS = [
    f"{a}{b}{c}" for a in "bdfglmnprstv" for b in ("ar", "el", "on", "uck", "ist") for c in "aeiouy"
]
TOKENS = 1500


def count(text):
    return len(re.findall(r"\w+|[^\w\s]", text))


def make_book(seed, sentences=3000):
    draw = random.Random(seed)
    parts = [" ".join(draw.choices(WORDS, k=12)).capitalize() + "." for _ in range(sentences)]
    return "Chapter one.\n\n" + " ".join(parts)


BOOK = make_book(0)


@pytest.fixture(scope="module")
def makers():
    return {split: RulerMaker(WORDS, count, [BOOK], split) for split in (*SPLITS, None)}


@pytest.mark.parametrize("task", TASKS)
def test_samples_repeat_and_keep_to_the_length(makers, task):
    made = [makers[None].make(task, TOKENS, index, questions=9) for index in (0, 1)]
    again = RulerMaker(WORDS, count, [BOOK], None).make(task, TOKENS, 1, questions=9)
    assert made[1] == again and made[0][0].context != made[1][0].context
    for samples in made:
        assert len({sample.context for sample in samples}) == 1
        assert len({sample.question for sample in samples}) == len(samples)
        assert 0.85 * TOKENS <= count(samples[0].context) <= TOKENS
        assert all(sample.metric == "string_match_all" for sample in samples)


@pytest.mark.parametrize("task", [task for task in TASKS if task.startswith("niah")])
def test_needles_are_answered_by_their_statements(makers, task):
    for index in range(5):
        for sample in makers[None].make(task, TOKENS, index, questions=4):
            said = [sample.context[start:stop] for start, stop in sample.support]
            assert len(said) == len(sample.answers) == len(set(sample.answers))
            for statement, answer in zip(said, sample.answers, strict=True):
                found = re.fullmatch(
                    r"One of the special magic \w+s for (.+) is: (.+)\.", statement
                )
                assert found[2] == answer and found[1] in sample.question
                assert sample.context.count(statement) == 1
            # No other statement is about a key that is asked for.
            others = re.findall(r"special magic \w+s for ([\w -]+) is: ", sample.context)
            asked = [re.search("for (.+) is: ", statement)[1] for statement in said]
            assert sum(key in asked for key in others) == len(said)


def test_counts_of_needles_are_the_settings(makers):
    def asked(task, **difficulty):
        return makers[None].make(task, TOKENS, questions=99, **difficulty)

    assert [len(asked(f"niah_multikey_{n}")) for n in (1, 2)] == [4, 1]
    assert asked("niah_multikey_2")[0].context.count("One of the special") > 50
    assert len(asked("niah_multivalue")[0].answers) == len(asked("niah_multiquery")[0].answers) == 4
    assert len(asked("niah_multikey_1", keys=7)) == 7
    assert len(asked("niah_multiquery", keys=6, queries=3)) == 2
    uuid = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    assert re.fullmatch(uuid, asked("niah_single_3")[0].answers[0])
    assert re.search(f"for {uuid} mentioned", asked("niah_multikey_3")[0].question)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("hops", [2, 3, 4])
def test_variables_are_followed_hop_by_hop(makers, hops, shuffled):
    samples = makers[None].make("vt", TOKENS, questions=3, chains=3, hops=hops, shuffled=shuffled)
    assert len(samples) == 3
    for sample in samples:
        told = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", sample.context))
        value = re.search(r"value (\d+)", sample.question)[1]

        def resolve(name, told=told):
            return resolve(told[name]) if name in told else name

        assert [name for name in told if resolve(name) == value] == sorted(
            sample.answers, key=list(told).index
        )
        assert len(sample.answers) == len(sample.support) == hops + 1
        said = [sample.context[start:stop] for start, stop in sample.support]
        assert [re.match(r"VAR (\w+) ", text)[1] for text in said] == list(sample.answers)
        if not shuffled:
            assert list(sample.support) == sorted(sample.support)


def test_shuffled_variables_stand_in_any_order(makers):
    orders = [
        makers[None].make("vt", TOKENS, index, shuffled=True)[0].support for index in range(6)
    ]
    assert any(list(order) != sorted(order) for order in orders)


def test_common_words_are_the_most_common(makers):
    (sample,) = makers[None].make("cwe", TOKENS, common=4, often=20, rarely=2)
    counts = Counter(re.findall(r"\d+\. (\w+)", sample.context))
    assert {word for word, _ in counts.most_common(4)} == set(sample.answers)
    assert {counts[word] for word in sample.answers} == {20}
    assert {counts[word] for word in counts.keys() - set(sample.answers)} == {2}
    said = Counter(sample.context[start:stop] for start, stop in sample.support)
    assert said == {word: 20 for word in sample.answers}


def test_frequent_words_are_the_three_behind_the_dots(makers):
    (sample,) = makers[None].make("fwe", TOKENS)
    counts = Counter(sample.context.split()).most_common(5)
    assert counts[0][0] == "...."
    assert [word for word, _ in counts[1:4]] == list(sample.answers)
    assert counts[3][1] > counts[4][1]


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_names_values_or_filler(makers, task):
    seen = {}
    for split in SPLITS:
        parts = set()
        for index in range(3):
            for sample in makers[split].make(task, 3000, index, questions=4):
                assert {split_of(answer) for answer in sample.answers} == {split}
                parts |= set(sample.answers)
                stripped = re.sub(r"One of the special[^.]*\.", "", sample.context)
                if task.startswith("niah") and TASKS[task].haystack != "needles":
                    parts |= {s for s in re.split(r"(?<=\.)\s+", stripped) if len(s) > 20}
        seen[split] = parts
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not seen[first] & seen[second]
        assert seen[first] and seen[second]


def test_split_is_a_fixed_share_by_hash():
    names = [f"name {index}" for index in range(4000)]
    shares = Counter(map(split_of, names))
    assert abs(shares["train"] / 4000 - 0.8) < 0.03 and abs(shares["test"] / 4000 - 0.1) < 0.02
    # Never changes: a model was trained on these.
    assert [split_of(name) for name in ("otter", "harbour", "anchor")] == list(SPLITS)
    assert of_split(names, None) == names
    with pytest.raises(ValueError, match="expected one of train, validation, test, got 'dev'"):
        of_split(names, "dev")


def test_supporting_chunks_are_those_a_statement_touches():
    sample = TaskSample("t", "x" * 30, "?", ("x",), ((2, 5), (9, 12)))
    assert sample.supporting_chunks([(0, 5), (5, 10), (10, 30)]) == [[0], [1, 2]]


def test_books_come_in_whole_sentences_and_wrap_around():
    pieces = cut_pieces(BOOK)
    assert "".join(pieces).replace(" ", "") == BOOK.strip().replace(" ", "")
    assert all(piece.endswith(".") for piece in pieces)
    filler, draw = Filler.of_books([BOOK], count), random.Random(0)
    for tokens in (5, 200, 90_000):
        text = filler.draw(tokens, draw)
        assert count(text) <= tokens and (not text or text.endswith("."))
    assert count(text) > 89_000 > count(BOOK)


def test_planted_statements_stand_where_the_spans_say():
    text, spans = plant("One. Two. Three.", ["A.", "B.", "C."], random.Random(1))
    assert [text[start:stop] for start, stop in spans] == ["A.", "B.", "C."]
    assert (
        spans == sorted(spans)
        and text.replace(" A.", "").replace(" B.", "").replace(" C.", "") == "One. Two. Three."
    )


def test_folders_of_books_are_read_by_name(tmp_path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert read_books([tmp_path]) == ["a.txt", "b.txt"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: expected a folder with \*\.txt files, got none"):
        read_books([tmp_path / "empty"])


@pytest.mark.parametrize(
    ("task", "tokens", "difficulty", "message"),
    [
        ("niah_single_9", 900, {}, "task: expected one of niah_single_1, .*, got 'niah_single_9'"),
        ("vt", 900, {"keys": 2}, "vt: expected settings of haystack, chains, .*, got 'keys'"),
        ("vt", 900, {"hops": 0}, "vt: hops: expected a positive integer, got 0"),
        ("vt", 900, {"hops": "two"}, "vt: hops: expected a positive integer, got 'two'"),
        (
            "vt",
            900,
            {"haystack": "needles"},
            "vt: haystack: expected noise or essay, got",
        ),
        ("niah_single_1", 900, {"key": "date"}, "key: expected one of word, number, uuid, got"),
        ("niah_multiquery", 900, {"queries": 5}, "queries: expected at most 4 .keys., got 5"),
        ("niah_multikey_1", 20, {}, "niah_multikey_1: length: expected at least .* got 20"),
        ("cwe", 100, {}, "cwe: length: expected at least .* tokens, got 100"),
        ("cwe", 900, {"often": 3}, "cwe: often: expected more than 3 .rarely., got 3"),
        ("fwe", 10, {}, "fwe: length: expected enough tokens for 3 counts that differ, got 10"),
    ],
)
def test_settings_that_do_not_fit_are_named(makers, task, tokens, difficulty, message):
    with pytest.raises(InputError, match=message):
        makers[None].make(task, tokens, **difficulty)


def test_too_few_words_of_a_split_are_named():
    with pytest.raises(InputError, match="words: expected at least 16 of the test split, got"):
        RulerMaker(WORDS[:20], count)


def test_keys_never_run_out():
    maker = RulerMaker(WORDS, count, [BOOK], "test")
    (sample,) = maker.make("niah_multikey_2", 40_000)
    keys = re.findall(r"numbers for ([a-z ]+) is", sample.context)
    assert len(keys) == len(set(keys)) > len(maker.words) * (len(maker.words) + 1)
