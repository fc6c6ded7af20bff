# SPDX-License-Identifier: Apache-2.0
"""The needle evaluation: lengths, counts and judgements, on a tiny random model."""

import random

import pytest

from lychee.data.needles import NeedleMaker
from lychee.errors import InputError
from lychee.eval.needles import evaluate, judge, key_counts, make_text, wilson_interval
from lychee.eval.report import HEADER, table_row
from lychee.trace import Answer, Usage


def answer(text: str) -> Answer:
    return Answer("q", text, [], [], Usage(0, 0, 0, 0, 0, 0.0, 0.0))


@pytest.mark.parametrize("questions", [1, 3, 5, 7, 100])
def test_key_counts_add_up(questions):
    counts = key_counts(questions)
    assert sum(counts) == questions and set(counts) <= {1, 2, 3, 4}


def test_judge_wants_the_whole_value():
    needle = NeedleMaker([f"word{index}" for index in range(20)]).make("number")
    assert judge(needle, 1, answer(needle.value)).exact
    assert not judge(needle, 1, answer(needle.value[:-1])).exact
    assert not judge(needle, 1, answer(needle.value + "0")).exact


def test_wilson_interval_by_hand():
    low, high = wilson_interval(9, 10)
    assert (round(low, 3), round(high, 3)) == (0.596, 0.982)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_texts_have_the_length_asked_for(tiny_model, prose):
    text = prose(3000)
    book = (text, tiny_model.tokenizer.encode_with_offsets(text)[1])
    maker = NeedleMaker([f"w{index}" for index in range(20)])
    made, hidden = make_text(tiny_model, [book], 600, 3, maker, random.Random(0))
    assert abs(len(tiny_model.tokenizer.encode(made)) - 600) <= 6
    for needle, place in hidden:
        assert made[place:].startswith(needle.statement)


def test_evaluation_is_reproducible_and_counts(tiny_model, prose, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(prose(3000))
    cells = [list(evaluate(tiny_model, [path], [200, 300], 6, seed=1)) for _ in range(2)]
    assert [c.questions for c in cells[0]] == [c.questions for c in cells[1]]
    for cell, length in zip(cells[0], (200, 300), strict=True):
        assert cell.length == length and cell.accuracy()[1] == 6
        assert cell.accuracy(keys=1)[1] + cell.accuracy(keys=4)[1] <= 6
        assert table_row(cell).count("|") == HEADER.splitlines()[0].count("|")


def test_a_book_too_short_is_named(tiny_model, prose, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(prose(300))
    with pytest.raises(InputError, match="books: expected one of more than"):
        next(iter(evaluate(tiny_model, [path], [100_000], 1, seed=1)))
