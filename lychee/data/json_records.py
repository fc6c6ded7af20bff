# SPDX-License-Identifier: Apache-2.0
"""Records of JSON files, whose errors name file, line or record, and field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lychee.documents import is_text, read_file
from lychee.errors import InputError


class Record:
    """One record with its place; its getters raise InputError naming the field."""

    def __init__(self, fields: Any, place: str, path: Path):
        self.place, self.path = place, path
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
        return self.checked(names[0], value)

    def checked(self, field: str, value: Any) -> str:
        """A value that must be text, as halves of surrogate pairs are not."""
        if not isinstance(value, str) or not value.strip() or not is_text(value):
            raise self.error(field, "non-empty text", value)
        return value

    def list_of(self, name: str) -> list[Any]:
        """A field that holds a list where it is there."""
        if not isinstance(found := self.get(name) or [], list):
            raise self.error(name, "a list", found)
        return found

    def answers(self, *names: str) -> tuple[str, ...]:
        """A field with one answer or a list of them."""
        value = self.get(*names)
        if value is None:
            self.text(*names)
        found = value if isinstance(value, list) else [value]
        found = [str(a) if isinstance(a, (int, float)) else a for a in found]
        if not found or not all(isinstance(a, str) and a.strip() and is_text(a) for a in found):
            raise self.error(names[0], "an answer or a list of answers", value)
        return tuple(found)


def read_records(path: Path) -> Iterator[tuple[Any, str]]:
    """Records of a JSON array or of JSON lines, each with "file: line n" or "file: record n"."""
    text = read_file(path).text
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except (ValueError, RecursionError) as error:
            line = f": line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise broken(f"{path}{line}", error) from error
        for number, fields in enumerate(records, 1):
            yield fields, f"{path}: record {number}"
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line), f"{path}: line {number}"
            except (ValueError, RecursionError) as error:
                raise broken(f"{path}: line {number}", error) from error


def broken(place: str, error: ValueError | RecursionError) -> InputError:
    """Of JSON that is none, is nested too deep, or has a number of thousands of digits."""
    what = error
    if isinstance(error, json.JSONDecodeError):
        what = f"{error.msg} at column {error.colno}"
    return InputError(f"{place}: expected JSON, got: {what}")
