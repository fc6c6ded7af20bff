# SPDX-License-Identifier: Apache-2.0
"""Runs tasks by lengths by methods, text by text, and sums up each cell."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby, product
from pathlib import Path
from typing import Any

from lychee.baselines.full_context import FullContext
from lychee.baselines.memagent import SECTION_TOKENS, MemAgent
from lychee.data.task import TaskSample
from lychee.errors import InputError, LycheeError
from lychee.eval.methods import KEEPING_NOTES, OURS, LastBank, Method, PeakMemory, make_method
from lychee.eval.metrics import score
from lychee.eval.records import Record, RecordFile, cell_key
from lychee.eval.report import summarise
from lychee.eval.tasks import TaskCell
from lychee.memory_model import SHIPPED_MODEL, LycheeMemory
from lychee.trace import Answer

Load = Callable[[int | None], LycheeMemory]
Progress = Callable[[int, int], None]
# Bytes at either end of a weight file that tell it from another.
SAMPLED = 1 << 16


@dataclass(frozen=True)
class Setting:
    """How questions are answered; all but `method` and `notes` is ours alone.

    Attributes:
        ratio: None is the model's own.
        bank_dtype, gate, passes, together: see `Ours`.
        notes: tokens of the working memory at most; None is the model's own.
    """

    method: str = OURS
    ratio: int | None = None
    bank_dtype: str = "auto"
    gate: str = "auto"
    passes: int | None = None
    together: int | None = None
    notes: int | None = None

    def options(self) -> dict[str, Any]:
        """Of the method's class."""
        if self.method != OURS:
            return {}
        names = ("bank_dtype", "gate", "passes", "together")
        return {name: getattr(self, name) for name in names}

    def check(self, model: LycheeMemory) -> None:
        """Raise a LycheeError if this model, whatever its ratio, cannot answer so."""
        memory = model.memory
        if self.ratio is not None:
            memory = replace(memory, ratio=self.ratio)
        if self.gate not in ("auto", "off") and model.gate is None:
            raise InputError(f"gate: expected a model that has one, to set {self.gate}, got none")
        positions = model.decoder.config.max_position_embeddings
        taken = memory.slots + len(model.reasoner.prompts.update) + memory.question
        room = (positions - taken) // 2
        if self.notes is not None and self.notes > room:
            raise InputError(
                f"notes: expected at most {room} tokens, twice which leave room for chunk, prompt "
                f"and question in the model's {positions} positions, got {self.notes}"
            )


def settings_of(
    methods: Sequence[str],
    ratios: Sequence[int | None] = (None,),
    bank_dtypes: Sequence[str] = ("auto",),
    gates: Sequence[str] = ("auto",),
    passes: int | None = None,
    together: int | None = None,
    notes: Sequence[int | None] = (None,),
) -> list[Setting]:
    """Ours at every ratio, dtype of the bank, gate and size of notes; each other method once, or
    at every size of notes where it keeps any."""
    found = []
    for method in methods:
        if method == OURS:
            found += [
                Setting(OURS, ratio, dtype, gate, passes, together, size)
                for ratio, dtype, gate, size in product(ratios, bank_dtypes, gates, notes)
            ]
        else:
            sizes = notes if method in KEEPING_NOTES else (None,)
            found += [Setting(method, notes=size) for size in sizes]
    return found


def check_settings(settings: Sequence[Setting], model: LycheeMemory) -> None:
    """Raise a LycheeError for the first setting that the model cannot answer with."""
    for setting in settings:
        setting.check(model)


def check_cells(
    cells: Sequence[TaskCell], settings: Sequence[Setting], model: LycheeMemory
) -> None:
    """Raise an InputError for what would be refused only when others have been answered."""
    for cell in cells:
        for sample in chain(*cell.texts()) if cell.length is None else ():
            try:
                model.encode_question(sample.question)
            except LycheeError as error:
                raise InputError(f"{sample.details.get('place', cell.task)}: {error}") from error
    if any(setting.method == "full_context" for setting in settings):
        longest = max((cell.length or 0 for cell in cells), default=0)
        try:
            FullContext(model).check_length(longest)
        except InputError as error:
            raise InputError(f"{longest} tokens: full_context: {error}") from error


def remarks(settings: Sequence[Setting], model: LycheeMemory) -> list[str]:
    """What a reader of the results should know of methods that this model does not fit well."""
    found = []
    for size in dict.fromkeys(s.notes for s in settings if s.method == "memagent"):
        agent = MemAgent(model if size is None else model.limited(size=size))
        if agent.section < SECTION_TOKENS:
            positions = model.decoder.config.max_position_embeddings
            found.append(
                f"memagent reads sections of {agent.section:,} tokens in the place of "
                f"{SECTION_TOKENS:,}, for which the model's {positions:,} positions leave no room "
                f"beside notes of {agent.model.memory.size:,}"
            )
    return found


def fingerprint(folder: Path | None) -> str:
    """Changes with a model folder's configuration, tokenizer and weights; reads little of them."""
    folder = folder or SHIPPED_MODEL
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            digest.update(file.read(SAMPLED))
            file.seek(max(0, size - SAMPLED))
            digest.update(file.read(SAMPLED))
    return digest.hexdigest()[:16]


def run(
    cells: Sequence[TaskCell],
    settings: Sequence[Setting],
    load: Load,
    records: RecordFile,
    metrics: Sequence[str] = (),
    progress: Progress = lambda done, total: None,
) -> Iterator[dict[str, Any]]:
    """Answer every question that has no record yet; yield each cell's summary as it is complete.

    Settings of ours that follow each other and need the same bank of a text share it.

    Args:
        load: gives the model at a ratio.
        metrics: names, of which the first one ranks; each question's own where none is named.
        progress: called with (questions answered, questions in all).

    Raises:
        InputError: a record that cannot be asked, by name; what was answered before is kept.
    """
    done, total = 0, len(settings) * sum(cell.questions for cell in cells)
    for ratio, group in groupby(settings, key=lambda setting: setting.ratio):
        model, banks, methods = load(ratio), LastBank(), []
        for setting in group:
            options = setting.options() | ({"banks": banks} if setting.method == OURS else {})
            limited = model if setting.notes is None else model.limited(size=setting.notes)
            methods.append((setting, make_method(setting.method, limited, **options)))
        for cell in cells:
            heads = [head_of(cell, setting, model) for setting, _ in methods]
            for index, samples in enumerate(cell.texts()):
                for head, (_, method) in zip(heads, methods, strict=True):
                    if not records.has(cell_key(head), index):
                        progress(done, total)
                        records.add(answer_text(method, model, head, index, samples, metrics))
                    done += len(samples)
            for head in heads:
                yield summarise(records.of(cell_key(head)), cell.breakdown)


def head_of(cell: TaskCell, setting: Setting, model: LycheeMemory) -> Record:
    """What all records of a cell and a setting have in common."""
    ours = setting.method == OURS
    return {
        "task": cell.task,
        "source": cell.source,
        "length": cell.length,
        "method": setting.method,
        "ratio": model.memory.ratio if ours else None,
        "bank_dtype": setting.bank_dtype if ours else None,
        "gate": setting.gate if ours else None,
        "notes": setting.notes,
    }


def answer_text(
    method: Method,
    model: LycheeMemory,
    head: Record,
    index: int,
    samples: Sequence[TaskSample],
    metrics: Sequence[str],
) -> list[Record]:
    """Ask all questions about one text; their records share its times and its memory."""
    place = samples[0].details.get("place") or (
        f"{head['task']}, {head['length']} tokens, text {index + 1}"
    )
    if not samples[0].context.strip():
        raise InputError(f"{place}: context: expected text, got nothing")
    questions = [sample.question for sample in samples]
    with PeakMemory(model.decoder.device) as peak:
        started, used = time.perf_counter(), time.process_time()
        try:
            answers = method.answer(samples[0].context, questions)
        except LycheeError as error:
            raise InputError(f"{place}: {head['method']}: {error}") from error
        seconds, used = time.perf_counter() - started, time.process_time() - used
    build = method.build_seconds
    asked = seconds if method.at_hand else seconds - build
    records = []
    for sample, answer in zip(samples, answers, strict=True):
        names = metrics or (sample.metric,)
        usage = answer.usage
        records.append(
            head
            | {
                "text": index,
                "questions": len(samples),
                "question": sample.question,
                "answers": list(sample.answers),
                "prediction": answer.text,
                "scores": {name: score(name, answer.text, sample.answers) for name in names},
                "details": sample.details,
                "text_tokens": usage.text_tokens,
                "memory_tokens": usage.memory_tokens,
                "memory_bytes": usage.memory_bytes,
                "chunks": usage.chunks,
                "chunks_read": usage.chunks_read,
                **support_read(sample, answer),
                "build_seconds": round(build, 4),
                "ask_seconds": round(asked, 4),
                "processor_seconds": round(used, 4),
                # A bank that was at hand is not in the peak.
                "peak_bytes": None if method.at_hand else peak.bytes,
            }
        )
    return records


def support_read(sample: TaskSample, answer: Answer) -> dict[str, int | None]:
    """How many chunks hold a supporting statement, and how many of those were read.

    None where the sample does not say what supports it, or the method does not cut the text into
    chunks of its characters.
    """
    spans = {step.chunk: (step.start, step.stop) for step in answer.trace}
    if not sample.support or not spans:
        return {"support_chunks": None, "support_read": None}
    order = list(spans)
    places = sample.supporting_chunks([spans[chunk] for chunk in order])
    wanted = {order[place] for found in places for place in found}
    read = {step.chunk for step in answer.trace if step.read}
    return {"support_chunks": len(wanted), "support_read": len(wanted & read)}
