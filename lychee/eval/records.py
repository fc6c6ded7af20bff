# SPDX-License-Identifier: Apache-2.0
"""Results question by question in a folder, from which an interrupted run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lychee.errors import InputError

RUN, RECORDS = "run.json", "records.jsonl"
# What a record belongs to.
CELL = ("task", "source", "length", "method", "ratio", "bank_dtype", "gate", "notes")
NEEDED = {*CELL, "text", "questions"}

Record = dict[str, Any]
CellKey = tuple[Any, ...]


def cell_key(record: Record) -> CellKey:
    return tuple(record[name] for name in CELL)


class RecordFile:
    """Records by cell and text, kept in `folder` where there is one.

    Args:
        folder: made if it is missing; None keeps everything in memory. One that holds anything
            but a run is refused.
        settings: what all records have in common; a folder of a run with others is refused.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any]):
        self.folder = folder
        self.texts: dict[CellKey, dict[int, list[Record]]] = {}
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._check_settings(folder / RUN, settings)
        if (folder / RECORDS).exists():
            self._load(folder / RECORDS)

    def _check_settings(self, path: Path, settings: dict[str, Any]) -> None:
        if not path.exists():
            if found := sorted(entry.name for entry in os.scandir(path.parent)):
                raise InputError(
                    f"{path.parent}: expected a new or empty folder, or one with {RUN}, got one "
                    f"with {found[0]}",
                    "name another folder for the results",
                )
            replace_file(path, json.dumps(settings, indent=1) + "\n")
            return
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: expected the settings of a run, got: {error}") from error
        if not isinstance(stored, dict):
            raise InputError(
                f"{path}: expected the settings of a run, got a {type(stored).__name__}"
            )
        for name in settings:
            if stored.get(name) != settings[name]:
                raise InputError(
                    f"{path}: {name}: expected {json.dumps(stored.get(name))} as in the run that "
                    f"is there, got {json.dumps(settings[name])}",
                    "name another folder for the results",
                )

    def _load(self, path: Path) -> None:
        """Take complete texts; what an interruption tore off goes, from the file as well."""
        # What is not UTF-8 is no record either, and its line is named.
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        torn = lines.pop()
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if isinstance(record, dict) and (lacking := NEEDED - record.keys()):
                    raise ValueError(f"one without {min(lacking)}")
                self._keep([record])
            except (ValueError, TypeError) as error:
                raise InputError(
                    f"{path}: line {number}: expected a record, got: {error}"
                ) from error
        dropped = bool(torn)
        for texts in self.texts.values():
            for index, records in list(texts.items()):
                if len(records) != records[0]["questions"]:
                    del texts[index]
                    dropped = True
        if dropped:
            kept = [
                r for texts in self.texts.values() for records in texts.values() for r in records
            ]
            replace_file(path, "".join(json.dumps(record) + "\n" for record in kept))

    def _keep(self, records: Sequence[Record]) -> None:
        for record in records:
            texts = self.texts.setdefault(cell_key(record), {})
            texts.setdefault(record["text"], []).append(record)

    def has(self, key: CellKey, text: int) -> bool:
        """Whether all questions about a text are answered."""
        return text in self.texts.get(key, {})

    def of(self, key: CellKey) -> list[Record]:
        """All records of a cell, in the order of their texts."""
        return [record for _, found in sorted(self.texts.get(key, {}).items()) for record in found]

    def add(self, records: Sequence[Record]) -> None:
        """All records of one text, at once."""
        if self.folder is not None:
            lines = "".join(json.dumps(record) + "\n" for record in records)
            with open(self.folder / RECORDS, "a", encoding="utf-8") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        self._keep(records)


def replace_file(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
