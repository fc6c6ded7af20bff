# SPDX-License-Identifier: Apache-2.0
"""Metrics against values worked out by hand from their published definitions."""

import pytest

from lychee.errors import InputError
from lychee.eval.metrics import METRICS, last_boxed, normalise, score


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Chief of\nProtocol!", "chief of protocol"),
        ("An apple, a day.", "apple day"),
        ("theatre-goer's", "theatregoers"),
        ("U.S.", "us"),
        ("the a an", ""),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


# Metric, prediction, answers, and what is expected.
CASES = [
    ("exact_match", "The Chief of Protocol.", ["chief of protocol"], 1),
    ("exact_match", "a chief of protocol once", ["chief of protocol"], 0),
    ("exact_match", "2", ["1", "two", "2"], 1),
    ("exact", "7", ["7"], 1),
    ("exact", "7.", ["7"], 0),
    ("exact", "Ann", ["ann"], 0),
    ("sub_em", "It was the Chief of Protocol, I think", ["Chief of Protocol"], 1),
    ("sub_em", "Chief Protocol", ["Chief of Protocol"], 0),
    # Of "A" the rules leave nothing, which must not stand in every prediction.
    ("sub_em", "B", ["A"], 0),
    ("sub_em", "a.", ["A"], 1),
    # 2 shared words of 3 predicted and 2 wanted: 2 * 2 / 5.
    ("f1", "chief of protocol", ["chief protocol"], 0.8),
    # "to" counts twice of three times: 2 * 2 / (4 + 2).
    ("f1", "to to to be", ["to to"], 2 / 3),
    ("f1", "Warsaw", ["Paris", "in Warsaw"], 2 / 3),
    ("f1", "yes", ["yes it is"], 0),
    ("f1", "yes it is", ["no"], 0),
    ("f1", "no", ["No."], 1),
    ("f1", "", ["Paris"], 0),
    # LongBench has no rule for yes and no: 2 * 1 / (1 + 3).
    ("qa_f1", "yes", ["yes it is"], 0.5),
    ("qa_f1", "blue sea", ["red sea", "deep blue sea"], 0.8),
    ("qa_f1_first_line", "\nblue sea\nQuestion: next", ["blue sea"], 1),
    ("qa_f1", "\nblue sea\nQuestion: next", ["blue sea"], 2 / 3),
    ("string_match_all", "they are 12, 7 and NINE", ["12", "nine", "8"], 2 / 3),
    ("string_match_all", "112", ["12"], 1),
    ("string_match_part", "they are 12, 7", ["8", "7"], 1),
    ("string_match_part", "they are 12, 7", ["8", "9"], 0),
    ("string_match_part", "two\x01words", ["two words"], 0),
    # Longest common subsequence "the cat ... on mat": 4 of 5 different words and of 6.
    ("rouge_l", "the cat lay on mat", ["the cat sat on a mat"], 2 * 0.8 * (4 / 6) / (0.8 + 4 / 6)),
    # Repeated words count once: "a b" of {a, b} and of {a, b, c}.
    ("rouge_l", "a b a b", ["a b c"], 2 * 1 * (2 / 3) / (1 + 2 / 3)),
    # Sentence by sentence: w1 w2 with the first, w1 w3 w5 with the second; 4 of 5 and of 8.
    ("rouge_l", "w1 w2 w6 w7 w8. w1 w3 w8 w9 w5.", ["w1 w2 w3 w4 w5."], 2 * 0.8 * 0.5 / 1.3),
    # Order counts: only one of the two words can be kept.
    ("rouge_l", "b a", ["a b"], 0.5),
    ("rouge_l", "c d", ["a b", "c d"], 1),
    ("rouge_l", "", ["a b"], 0),
    ("rouge_l", " . ", ["a b"], 0),
    ("rouge_l_first_line", "a b\nc d", ["a b"], 1),
    ("boxed_exact_match", "so \\boxed{3}, no: \\boxed{the 4}.", ["4"], 1),
    ("boxed_exact_match", "4", ["4"], 1),
    ("boxed_sub_em", "Paris, or \\boxed{Rome}", ["Paris"], 0),
    ("boxed_f1", "the \\boxed{red sea} is", ["sea"], 2 / 3),
]


@pytest.mark.parametrize(("metric", "prediction", "answers", "expected"), CASES)
def test_metric_by_hand(metric, prediction, answers, expected):
    assert score(metric, prediction, answers) == pytest.approx(expected, abs=1e-7)


def test_every_metric_has_a_case_and_stays_between_0_and_1():
    assert {case[0] for case in CASES} == METRICS.keys()
    for metric in METRICS:
        for _, prediction, answers, _ in CASES:
            assert 0 <= score(metric, prediction, answers) <= 1
        assert score(metric, "blue sea", ["blue sea"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no box", None),
        ("\\boxed{12}", "12"),
        ("\\boxed{1} and \\boxed{\\frac{1}{2}} end}", "\\frac{1}{2}"),
        ("\\boxed{open {12}", None),
        ("\\boxed{}", ""),
    ],
)
def test_last_boxed(text, expected):
    assert last_boxed(text) == expected


def test_unknown_metrics_and_missing_answers_are_refused():
    with pytest.raises(InputError, match="metric: expected one of exact_match, .*, got 'bleu'"):
        score("bleu", "a", ["a"])
    with pytest.raises(InputError, match="f1: answers: expected at least one, got none"):
        score("f1", "a", [])
