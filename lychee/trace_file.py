# SPDX-License-Identifier: Apache-2.0
"""Traces on disk: what `lychee ask --trace` writes, and `lychee trace` reads field by field.

A trace is a JSON object: "format", "version", "made_with" (model, ratio, seconds) and "answers",
each as `Answer.to_dict` gives it, but with a step's notes only where they changed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lychee.errors import InputError
from lychee.trace import Answer

FORMAT, VERSION = "lychee-trace", 1
TRACE_MARK, PAGE_MARK = f'{{"format": "{FORMAT}"', '<meta name="generator" content="lychee trace">'
# Marks of both kinds stand in the first bytes.
MARKED_BYTES = 512
# Far above any text that was ever read; it bounds what a broken file can ask for.
MOST_CHUNKS = 100_000_000

INDEX, NUMBER, TEXT, FLAG = "a whole number from 0 on", "a finite number", "text", "true or false"
OBJECT, LIST = "an object", "a list"
FITS: dict[str, Callable[[Any], bool]] = {
    INDEX: lambda value: type(value) is int and 0 <= value,
    NUMBER: lambda value: type(value) in (int, float) and math.isfinite(value),
    TEXT: lambda value: isinstance(value, str),
    FLAG: lambda value: isinstance(value, bool),
    OBJECT: lambda value: isinstance(value, dict),
    LIST: lambda value: isinstance(value, list),
}
SPAN = {"document": TEXT, "start": INDEX, "stop": INDEX}
ANSWER = {"question": TEXT, "text": TEXT, "sources": LIST, "trace": LIST, "usage": OBJECT}
STEP = SPAN | {"chunk": INDEX, "changed": FLAG}
STEP_DEFAULTS = {"memory": (TEXT, None), "score": (NUMBER, None), "read": (FLAG, True)}
SOURCE = SPAN | {"quote": TEXT}
SOURCE_DEFAULTS = {"chunk": (INDEX, None), "score": (NUMBER, None), "changed": (FLAG, True)}


def trace_of(answers: Sequence[Answer], made_with: dict[str, Any]) -> dict[str, Any]:
    """The trace of questions asked together; `made_with` says by which model and how fast."""
    plain = [answer.to_dict() for answer in answers]
    for answer in plain:
        for step in answer["trace"]:
            if not step["changed"]:
                del step["memory"]
    return {"format": FORMAT, "version": VERSION, "made_with": made_with, "answers": plain}


def check_writable(path: Path, mark: str, kind: str) -> None:
    """Refuse, before any work, a place where no file can be written, or one that holds another.

    Only a file that has `mark` near its start is replaced: one of the same `kind`, made before.
    """
    if path.is_dir():
        raise InputError(f"{path}: expected a file to write, got a folder")
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: expected an ordinary file to write, got another")
    folder = path.resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"{path}: expected a file in a folder that can be written to")
    try:
        with open(path, "rb") as file:
            start = file.read(MARKED_BYTES)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{path}: expected a writable file, got: {error.strerror}") from error
    if start and mark.encode() not in start:
        raise InputError(f"{path}: expected a new file or {kind}, got another", "name a new file")


def write_text(path: Path, text: str) -> None:
    """Write a whole file or leave the one that is there; a link's target is written."""
    path = path.resolve()
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(text.encode("utf-8", errors="replace"))
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(f"{path}: expected a writable file, got: {error.strerror}") from error


def read_trace(path: Path) -> dict[str, Any]:
    """The trace in a file, absent fields of steps and sources filled in.

    Raises:
        InputError: no such file, another format or version, or a field that is not as it should be.
    """
    try:
        trace = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: expected a trace, got: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a trace, which is JSON, got: {error}") from error
    if not isinstance(trace, dict) or trace.get("format") != FORMAT:
        raise InputError(
            f"{path}: expected a trace, got other JSON", "make one with 'lychee ask --trace FILE'"
        )
    if trace.get("version") != VERSION:
        raise InputError(f"{path}: version: expected {VERSION}, got {trace.get('version')!r}")
    check(str(path), trace, {"made_with": OBJECT, "answers": LIST})
    for index, answer in enumerate(trace["answers"]):
        check_answer(f"{path}: answers[{index}]", answer)
    return trace


def check_answer(where: str, answer: Any) -> None:
    check(where, answer, ANSWER)
    check(f"{where}: usage", answer["usage"], {"chunks": INDEX})
    chunks = answer["usage"]["chunks"]
    if chunks > MOST_CHUNKS:
        raise InputError(f"{where}: usage: chunks: expected at most {MOST_CHUNKS}, got {chunks}")
    for index, step in enumerate(answer["trace"]):
        place = f"{where}: trace[{index}]"
        check(place, step, STEP, STEP_DEFAULTS)
        if step["chunk"] >= chunks:
            raise InputError(f"{place}: chunk: expected one of {chunks}, got {step['chunk']}")
    for index, source in enumerate(answer["sources"]):
        check(f"{where}: sources[{index}]", source, SOURCE, SOURCE_DEFAULTS)


def check(
    where: str,
    value: Any,
    needed: dict[str, str],
    defaults: dict[str, tuple[str, Any]] | None = None,
) -> None:
    """Raise InputError unless `value` is an object with these fields; add those with a default."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object, got {value!r:.60}")
    for name, expected in needed.items():
        if name not in value:
            raise InputError(f"{where}: expected a field {name}, got none")
        if not FITS[expected](value[name]):
            raise InputError(f"{where}: {name}: expected {expected}, got {value[name]!r:.60}")
    for name, (expected, default) in (defaults or {}).items():
        if value.get(name) is None:
            value[name] = default
        elif not FITS[expected](value[name]):
            raise InputError(f"{where}: {name}: expected {expected}, got {value[name]!r:.60}")
