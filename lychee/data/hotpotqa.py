# SPDX-License-Identifier: Apache-2.0
"""HotpotQA: questions on several documents with their supporting sentences, at any length.

Documents are laid out as in RULER-HQA, and a text is made longer as it is made there: by documents
of other questions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lychee.data.json_records import Record, read_records
from lychee.data.task import Span, TaskSample
from lychee.documents import is_text
from lychee.errors import InputError

Document = tuple[str, tuple[str, ...]]  # title and sentences


@dataclass(frozen=True)
class HotpotQuestion:
    """One record; `facts` are (title, number of a sentence)."""

    question: str
    answers: tuple[str, ...]
    documents: tuple[Document, ...]
    facts: tuple[tuple[str, int], ...]
    place: str

    def sample(self, documents: Sequence[Document]) -> TaskSample:
        """The question about these documents, in their order."""
        parts, where, length = [], {}, 0
        for number, (title, sentences) in enumerate(documents, 1):
            head = f"Document {number}:\n{title}\n"
            start, spans = length + len(head), []
            for sentence in sentences:
                spans.append((start, start + len(sentence)))
                start += len(sentence)
            where[title] = spans
            parts.append(head + "".join(sentences))
            length += len(parts[-1]) + 2
        support: list[Span] = []
        for title, index in self.facts:
            support += where[title][index : index + 1]
        details: dict[str, Any] = {"num_docs": len(documents), "place": self.place}
        if len(support) < len(self.facts):
            details["missing_facts"] = len(self.facts) - len(support)
        context = "\n\n".join(parts)
        return TaskSample(
            "hotpotqa", context, self.question, self.answers, tuple(support), "f1", details
        )


def hotpotqa(record: Record) -> TaskSample:
    """`question`, `answer`, `context` and `supporting_facts`, as lists or as columns.

    A supporting fact may name a sentence that its document does not have, as some of the published
    ones do: `details` counts those.
    """
    question = parse(record)
    return question.sample(question.documents)


def parse(record: Record) -> HotpotQuestion:
    context, facts = record.get("context"), record.get("supporting_facts") or []
    if isinstance(context, dict):
        context = columns(record, "context", context, "title", "sentences")
    if isinstance(facts, dict):
        facts = columns(record, "supporting_facts", facts, "title", "sent_id")
    if not isinstance(context, list) or not context:
        raise record.error("context", "a list of [title, sentences]", context)
    documents: dict[str, tuple[str, ...]] = {}
    for number, entry in enumerate(context):
        title, sentences = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        lines = isinstance(sentences, list) and all(isinstance(s, str) for s in sentences)
        if not isinstance(title, str) or not lines or not is_text("".join((title, *sentences))):
            raise record.error(f"context[{number}]", "[title, sentences]", entry)
        documents[title] = tuple(sentences)
    if not isinstance(facts, list):
        raise record.error("supporting_facts", "a list", facts)
    for fact in facts:
        title, index = fact if isinstance(fact, list) and len(fact) == 2 else (None, None)
        known = isinstance(title, str) and title in documents
        if not known or type(index) is not int or index < 0:
            raise record.error("supporting_facts", "[title of the context, number]", fact)
    return HotpotQuestion(
        record.text("question"),
        record.answers("answer", "answers"),
        tuple(documents.items()),
        tuple((title, index) for title, index in facts),
        record.place,
    )


def columns(record: Record, field: str, table: dict, first: str, second: str) -> list[list]:
    left, right = table.get(first), table.get(second)
    if not isinstance(left, list) or not isinstance(right, list) or len(left) != len(right):
        raise record.error(field, f"lists {first} and {second} of one length", table)
    return [list(pair) for pair in zip(left, right, strict=True)]


def lengthened(
    path: Path, tokens: int, count: Callable[[str], int], questions: int | None, seed: int
) -> Iterator[TaskSample]:
    """Questions of a file about texts of at most `tokens` tokens.

    Documents of other questions are added, and all shuffled, as long as they fit; where those a
    question comes with are too many already, the ones that support it are kept first.
    """
    records = [parse(Record(fields, place, path)) for fields, place in read_records(path)]
    pool = list({d: None for record in records for d in record.documents})
    sizes = {d: count(f"Document 9999:\n{d[0]}\n{''.join(d[1])}\n\n") for d in pool}
    for record in records[:questions]:
        draw = random.Random(f"{seed}/{tokens}/{record.question}")
        needed = {title for title, _ in record.facts}
        own = sorted(record.documents, key=lambda d: d[0] not in needed)
        chosen: dict[str, Document] = {}
        room = tokens
        # A title stands once: a supporting fact must not point at two documents.
        for document in [*own, *draw.sample(pool, len(pool))]:
            if document[0] not in chosen and sizes[document] <= room:
                chosen[document[0]] = document
                room -= sizes[document]
        if not chosen or not needed <= chosen.keys():
            wanted = sum(sizes[d] for d in own if d[0] in needed)
            raise InputError(
                f"{record.place}: context: expected at least {wanted} tokens, which the supporting "
                f"documents take, got {tokens}",
                "ask for longer texts",
            )
        yield record.sample(draw.sample(list(chosen.values()), len(chosen)))
