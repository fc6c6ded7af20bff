# SPDX-License-Identifier: Apache-2.0
"""Reads questions with texts from files: RULER-HQA, HotpotQA, RULER, LongBench, and one's own.

A file is a JSON array of records or has one record a line. Whatever does not fit is an error that
names the file, the line or record, the field and what was expected; nothing is skipped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from lychee.data.hotpotqa import hotpotqa
from lychee.data.json_records import Record, read_records
from lychee.data.task import Span, TaskSample
from lychee.documents import is_text
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
RULER_TASK = re.compile(r"niah_\w+|vt|cwe|fwe|qa(_\d+)?")
SUMMARISE = "Write a one-page summary of the text."


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
        question = record.checked("prompt", prompt)
    else:
        question = record.checked("question", question)
    answers = record.answers("reward_model.ground_truth", "answers")
    known = {name: record.get(f"extra_info.{name}") for name in ("index", "num_docs")}
    details = {name: value for name, value in known.items() if value is not None}
    return TaskSample("ruler_hqa", context, question, answers, (), "sub_em", details)


def ruler(record: Record) -> TaskSample:
    """`input` and `outputs` as RULER writes them; `context` and `question` where they are split.

    In `input` the question is what follows the last "Question:", or the last line. The task is the
    record's, or what the file or its folder is called, as in qa_1/validation.jsonl; questions of QA
    want any of their answers, all others want all.
    """
    if not isinstance(prefix := record.get("answer_prefix") or "", str):
        raise record.error("answer_prefix", "text", prefix)
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
    names = (record.get("task"), record.path.stem, record.path.parent.name)
    known = [name for name in names if isinstance(name, str) and RULER_TASK.fullmatch(name)]
    task = known[0] if known else "ruler"
    answers = record.answers("outputs", "answers")
    metric = "string_match_part" if task.startswith("qa") else "string_match_all"
    return TaskSample(task, context, question, answers, (), metric, {"answer_prefix": prefix})


def longbench(record: Record) -> TaskSample:
    """`context`, `input`, `answers`, `dataset`; the metric is the data set's."""
    name = record.text("dataset").removesuffix("_e")
    if name not in LONGBENCH_METRICS:
        raise record.error("dataset", f"one of {', '.join(LONGBENCH_METRICS)}", name)
    question = record.get("input")
    if not isinstance(question, str) or not is_text(question):
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
    if not isinstance(metric, str) or metric not in METRICS:
        raise record.error("metric", f"one of {', '.join(METRICS)}", metric)
    support: list[Span] = []
    for span in record.list_of("support"):
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
        sample = FORMATS[form](Record(fields, place, path))
        sample.details["place"] = place
        found += 1
        yield sample
    if not found:
        raise InputError(f"{path}: expected at least one record, got none")
