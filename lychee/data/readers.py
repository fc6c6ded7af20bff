# SPDX-License-Identifier: Apache-2.0
"""Reads questions with texts from files: RULER-HQA, HotpotQA, RULER, LongBench, and one's own.

A file is a JSON array of records or has one record a line. Whatever does not fit is an error that
names the file, the line or record, the field and what was expected; nothing is skipped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lychee.data.task import Span, TaskSample
from lychee.documents import read_file
from lychee.errors import InputError
from lychee.eval.metrics import METRICS

# LongBench's data sets in English whose metric is an F1 over words or ROUGE-L.
LONGBENCH_METRICS = dict.fromkeys(
    ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"), "qa_f1"
) | {
    "triviaqa": "qa_f1_first_line",
    "gov_report": "rouge_l",
    "qmsum": "rouge_l",
    "multi_news": "rouge_l",
    "samsum": "rouge_l_first_line",
}
SUMMARISE = "Write a one-page summary of the text."


class Record:
    """One record with its place; its getters raise InputError naming the field."""

    def __init__(self, fields: Any, place: str):
        self.place = place
        if not isinstance(fields, dict):
            raise InputError(f"{place}: expected a JSON object, got {type(fields).__name__}")
        self.fields = fields

    def error(self, field: str, expected: str, got: Any) -> InputError:
        shown = repr(got)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        return InputError(f"{self.place}: {field}: expected {expected}, got {shown}")

    def get(self, *names: str) -> Any:
        """The first of these fields that is there, dots leading into objects; None without any."""
        for name in names:
            value: Any = self.fields
            for part in name.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if value is not None:
                return value
        return None

    def text(self, *names: str) -> str:
        """A field that must be there and hold text."""
        value = self.get(*names)
        if value is None:
            raise InputError(
                f"{self.place}: expected the field {' or '.join(names)}, got only "
                f"{', '.join(sorted(self.fields)) or 'an empty record'}"
            )
        if not isinstance(value, str) or not value.strip():
            raise self.error(names[0], "non-empty text", value)
        return value

    def answers(self, *names: str) -> tuple[str, ...]:
        """A field with one answer or a list of them."""
        value = self.get(*names)
        if value is None:
            self.text(*names)
        found = value if isinstance(value, list) else [value]
        found = [str(a) if isinstance(a, (int, float)) else a for a in found]
        if not found or not all(isinstance(a, str) and a.strip() for a in found):
            raise self.error(names[0], "an answer or a list of answers", value)
        return tuple(found)


def ruler_hqa(record: Record) -> TaskSample:
    """`context`, `prompt` (a chat) or `question`, `reward_model.ground_truth` or `answers`."""
    context = record.text("context")
    question = record.get("extra_info.question", "question")
    if question is None:
        if (prompt := record.get("prompt")) is None:
            record.text("question", "prompt")
        if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
            prompt = prompt[-1].get("content")
        if not isinstance(prompt, str) or not prompt.strip():
            raise record.error("prompt", "a chat whose last message has content", prompt)
        question = prompt
    elif not isinstance(question, str) or not question.strip():
        raise record.error("question", "non-empty text", question)
    answers = record.answers("reward_model.ground_truth", "answers")
    known = {name: record.get(f"extra_info.{name}") for name in ("index", "num_docs")}
    details = {name: value for name, value in known.items() if value is not None}
    return TaskSample("ruler_hqa", context, question, answers, (), "sub_em", details)


def hotpotqa(record: Record) -> TaskSample:
    """`question`, `answer`, `context` and `supporting_facts`, as lists or as columns.

    Documents are laid out as in RULER-HQA. A supporting fact may name a sentence that its document
    does not have, as some of the published ones do: `details` counts those.
    """
    context, facts = record.get("context"), record.get("supporting_facts")
    if isinstance(context, dict):
        context = columns(record, "context", context, "title", "sentences")
    if isinstance(facts, dict):
        facts = columns(record, "supporting_facts", facts, "title", "sent_id")
    if not isinstance(context, list) or not context:
        raise record.error("context", "a list of [title, sentences]", context)
    parts, where, length = [], {}, 0
    for number, entry in enumerate(context, 1):
        title, sentences = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        lines = isinstance(sentences, list) and all(isinstance(s, str) for s in sentences)
        if not isinstance(title, str) or not lines:
            raise record.error(f"context[{number - 1}]", "[title, sentences]", entry)
        head = f"Document {number}:\n{title}\n"
        start, spans = length + len(head), []
        for sentence in sentences:
            spans.append((start, start + len(sentence)))
            start += len(sentence)
        where[title] = spans
        parts.append(head + "".join(sentences))
        length += len(parts[-1]) + 2
    support, missing = [], 0
    for fact in facts or []:
        title, index = fact if isinstance(fact, list) and len(fact) == 2 else (None, None)
        if title not in where or not isinstance(index, int):
            raise record.error("supporting_facts", "[title of the context, number]", fact)
        if 0 <= index < len(where[title]):
            support.append(where[title][index])
        else:
            missing += 1
    details = {"num_docs": len(context)} | ({"missing_facts": missing} if missing else {})
    text, question = "\n\n".join(parts), record.text("question")
    answers = record.answers("answer", "answers")
    return TaskSample("hotpotqa", text, question, answers, tuple(support), "f1", details)


def columns(record: Record, field: str, table: dict, first: str, second: str) -> list[list]:
    left, right = table.get(first), table.get(second)
    if not isinstance(left, list) or not isinstance(right, list) or len(left) != len(right):
        raise record.error(field, f"lists {first} and {second} of one length", table)
    return [list(pair) for pair in zip(left, right, strict=True)]


def ruler(record: Record) -> TaskSample:
    """`input` and `outputs` as RULER writes them; `context` and `question` where they are split.

    In `input` the question is what follows the last "Question:", or the last line.
    """
    prefix = record.get("answer_prefix") or ""
    if record.get("context") is not None:
        context, question = record.text("context"), record.text("question")
    else:
        prompt = record.text("input").rstrip()
        if prefix.strip() and prompt.endswith(prefix.strip()):
            prompt = prompt[: -len(prefix.strip())].rstrip()
        marker = "\nQuestion:" if "\nQuestion:" in prompt else "\n"
        context, _, question = prompt.rpartition(marker)
        context, question = context.strip(), question.strip()
        if not context or not question:
            raise record.error("input", "a text and, on its last line, a question", prompt)
    task = record.get("task") or "ruler"
    if not isinstance(task, str):
        raise record.error("task", "text", task)
    answers = record.answers("outputs", "answers")
    metric = "string_match_part" if task.startswith("qa") else "string_match_all"
    return TaskSample(task, context, question, answers, (), metric, {"answer_prefix": prefix})


def longbench(record: Record) -> TaskSample:
    """`context`, `input`, `answers`, `dataset`; the metric is the data set's."""
    name = record.text("dataset").removesuffix("_e")
    if name not in LONGBENCH_METRICS:
        raise record.error("dataset", f"one of {', '.join(LONGBENCH_METRICS)}", name)
    question = record.get("input")
    if not isinstance(question, str):
        raise record.error("input", "text", question)
    return TaskSample(
        f"longbench_{name}",
        record.text("context"),
        question.strip() or SUMMARISE,
        record.answers("answers"),
        (),
        LONGBENCH_METRICS[name],
    )


def own(record: Record) -> TaskSample:
    """`context`, `question`, `answers` or `answer`; `task`, `metric` and `support` if wanted.

    `support` is a list of [start, stop) characters of the context.
    """
    context = record.text("context")
    metric = record.get("metric") or "sub_em"
    if metric not in METRICS:
        raise record.error("metric", f"one of {', '.join(METRICS)}", metric)
    support: list[Span] = []
    for span in record.get("support") or []:
        whole = isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span)
        if not whole or not 0 <= span[0] < span[1] <= len(context):
            raise record.error("support", f"[start, stop] within 0 to {len(context)}", span)
        support.append((span[0], span[1]))
    task, question = record.get("task") or "own", record.text("question")
    answers = record.answers("answers", "answer")
    return TaskSample(str(task), context, question, answers, tuple(support), metric)


FORMATS: dict[str, Callable[[Record], TaskSample]] = {
    "ruler_hqa": ruler_hqa,
    "hotpotqa": hotpotqa,
    "ruler_file": ruler,
    "longbench": longbench,
    "own": own,
}


def read_samples(path: Path, form: str) -> Iterator[TaskSample]:
    """Samples of a file in one of FORMATS, in its order; each knows its place in `details`."""
    if form not in FORMATS:
        raise InputError(f"format: expected one of {', '.join(FORMATS)}, got {form!r}")
    found = 0
    for fields, place in read_records(path):
        sample = FORMATS[form](Record(fields, place))
        sample.details["place"] = place
        found += 1
        yield sample
    if not found:
        raise InputError(f"{path}: expected at least one record, got none")


def read_records(path: Path) -> Iterator[tuple[Any, str]]:
    """Records of a JSON array or of JSON lines, each with "file: line n" or "file: record n"."""
    text = read_file(path).text
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise broken(f"{path}: line {error.lineno}", error) from error
        for number, fields in enumerate(records, 1):
            yield fields, f"{path}: record {number}"
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line), f"{path}: line {number}"
            except json.JSONDecodeError as error:
                raise broken(f"{path}: line {number}", error) from error


def broken(place: str, error: json.JSONDecodeError) -> InputError:
    return InputError(f"{place}: expected JSON, got: {error.msg} at column {error.colno}")
