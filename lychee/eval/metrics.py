# SPDX-License-Identifier: Apache-2.0
"""Metrics as published, each a function of one prediction and its answers, from 0 to 1.

SQuAD and HotpotQA: exact match and F1 on normalised text; MemAgent: sub-EM, and the last \\boxed{};
RULER: share of the strings found; LongBench: F1 and ROUGE-L, the best over the references.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from lychee.errors import InputError

Answers = Sequence[str]
Metric = Callable[[str, Answers], float]

PUNCTUATION = str.maketrans("", "", string.punctuation)
CLOSED_ANSWERS = ("yes", "no", "noanswer")


def normalise(text: str) -> str:
    """Lower case without punctuation and articles, white space folded."""
    text = text.lower().translate(PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answers: Answers) -> float:
    """1 if the normalised prediction is one of the normalised answers."""
    return float(normalise(prediction) in {normalise(answer) for answer in answers})


def sub_em(prediction: str, answers: Answers) -> float:
    """1 if one of the normalised answers stands in the normalised prediction.

    An answer of which nothing is left, as of "A", stands in empty ones alone, not in all.
    """
    found = normalise(prediction)
    wanted = map(normalise, answers)
    return float(any(answer in found if answer else not found for answer in wanted))


def f1(prediction: str, answers: Answers) -> float:
    """Best F1 over words, as HotpotQA has it: a wrong "yes", "no" or "noanswer" counts nothing."""

    def score(found: str, wanted: str) -> float:
        if found != wanted and (found in CLOSED_ANSWERS or wanted in CLOSED_ANSWERS):
            return 0.0
        return word_f1(found.split(), wanted.split())

    return max(score(normalise(prediction), normalise(answer)) for answer in answers)


def qa_f1(prediction: str, answers: Answers) -> float:
    """Best F1 over words, as LongBench has it."""
    found = normalise(prediction).split()
    return max(word_f1(found, normalise(answer).split()) for answer in answers)


def word_f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0


def string_match_all(prediction: str, answers: Answers) -> float:
    """RULER: share of the strings that stand in the prediction, in any case."""
    found = printable(prediction).lower()
    return sum(answer.lower() in found for answer in answers) / len(answers)


def string_match_part(prediction: str, answers: Answers) -> float:
    """RULER's QA: 1 if any of the strings stands in the prediction, in any case."""
    found = printable(prediction).lower()
    return float(any(answer.lower() in found for answer in answers))


def printable(text: str) -> str:
    """Control characters become line breaks, as in RULER."""
    return re.sub(r"[\x00-\x1f]", "\n", text.strip()).strip()


def rouge_l(prediction: str, answers: Answers) -> float:
    """Best ROUGE-L F over the references, as LongBench computes it with the package `rouge`.

    Texts are cut into sentences at full stops. Precision and recall count different words: those
    of the union of the longest common subsequences of all pairs of sentences.
    """
    return max(rouge_l_pair(prediction, answer) for answer in answers)


def rouge_l_pair(prediction: str, reference: str) -> float:
    found, wanted = split_sentences(prediction), split_sentences(reference)
    if not found or not wanted:
        return 0.0
    shared: set[str] = set()
    for left in wanted:
        for right in found:
            shared |= common_subsequence(left, right)
    recall = len(shared) / len({word for sentence in wanted for word in sentence})
    precision = len(shared) / len({word for sentence in found for word in sentence})
    # The package's own guard against a division by 0.
    return 2 * precision * recall / (precision + recall + 1e-8)


def split_sentences(text: str) -> list[list[str]]:
    return [words for sentence in text.split(".") if (words := sentence.split())]


def common_subsequence(left: Sequence[str], right: Sequence[str]) -> set[str]:
    """Words of a longest common subsequence; among equally long ones, the package's choice."""
    lengths = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, first in enumerate(left):
        for j, second in enumerate(right):
            longest = max(lengths[i][j + 1], lengths[i + 1][j])
            lengths[i + 1][j + 1] = lengths[i][j] + 1 if first == second else longest
    words, i, j = set(), len(left), len(right)
    while i and j:
        if left[i - 1] == right[j - 1]:
            words.add(left[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...} of a text, braces inside included; None without one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return None


def boxed(metric: Metric) -> Metric:
    """`metric` of the last boxed answer; of the whole prediction where nothing is boxed."""

    def score(prediction: str, answers: Answers) -> float:
        found = last_boxed(prediction)
        return metric(prediction if found is None else found, answers)

    return score


def first_line(metric: Metric) -> Metric:
    """`metric` of the prediction's first line, as LongBench judges its few-shot data sets."""
    return lambda prediction, answers: metric(prediction.lstrip("\n").split("\n")[0], answers)


def exact(prediction: str, answers: Answers) -> float:
    """1 if the prediction is one of the answers, character for character."""
    return float(prediction in answers)


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "f1": f1,
    "sub_em": sub_em,
    "boxed_exact_match": boxed(exact_match),
    "boxed_f1": boxed(f1),
    "boxed_sub_em": boxed(sub_em),
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
    "qa_f1": qa_f1,
    "qa_f1_first_line": first_line(qa_f1),
    "rouge_l": rouge_l,
    "rouge_l_first_line": first_line(rouge_l),
    "exact": exact,
}


def check_metrics(names: Sequence[str]) -> None:
    """InputError, which lists the known ones, for a name that no metric has."""
    for name in names:
        if name not in METRICS:
            raise InputError(f"metric: expected one of {', '.join(METRICS)}, got {name!r}")


def score(metric: str, prediction: str, answers: Answers) -> float:
    """The metric of that name, from 0 to 1."""
    check_metrics([metric])
    if not answers:
        raise InputError(f"{metric}: answers: expected at least one, got none")
    return METRICS[metric](prediction, answers)
