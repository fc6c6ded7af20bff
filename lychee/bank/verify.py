# SPDX-License-Identifier: Apache-2.0
"""Checks a bank on disk against its hashes, byte by byte."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from lychee.bank.folder import read_manifest, segment_path
from lychee.bank.manifest import DocumentRecord, Manifest
from lychee.bank.segments import Segment, hash_file
from lychee.errors import BankError


def verify_bank(path: str | Path, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Every damage found, one line each; an empty list for a sound bank.

    Args:
        path: the bank's folder; other processes may be writing it.
        progress: called with (bytes read, bytes in all).

    Raises:
        BankError: there is no bank, or its manifest is damaged or of another version.
    """
    path = Path(path)
    while True:
        manifest = read_manifest(path)
        problems = find_problems(path, manifest, progress or (lambda *_: None))
        # A writer may have replaced segments meanwhile; then what was found means nothing.
        if not problems or read_manifest(path) == manifest:
            return problems


def find_problems(
    path: Path, manifest: Manifest, progress: Callable[[int, int], None]
) -> list[str]:
    total = sum(segment.size for segment in manifest.segments.values())
    done, problems = 0, []
    segments: dict[str, Segment] = {}

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        progress(min(done, total), total)

    for sha256, record in manifest.segments.items():
        file = segment_path(path, sha256)
        try:
            segments[sha256] = Segment.map(file, manifest.layout, record)
            found = hash_file(file, on_bytes)
        except FileNotFoundError:
            problems.append(f"{file}: expected a segment of the bank, got none")
        except OSError as error:
            problems.append(f"{file}: expected a readable file, got: {error.strerror}")
        except BankError as error:
            problems.append(error.args[0])
        else:
            if found != sha256:
                problems.append(f"{file}: expected content of SHA-256 {sha256}, got {found}")
    for record in manifest.records():
        segment = segments.get(record.text.segment)
        if segment is not None:
            problems += text_problems(path, record, segment)
    return problems


def text_problems(path: Path, record: DocumentRecord, segment: Segment) -> list[str]:
    place = record.text
    data = segment.text[place.start : place.start + place.size].numpy().tobytes()
    found = hashlib.sha256(data).hexdigest()
    if found != record.sha256:
        return [f"{path}: {record.name}: expected text of SHA-256 {record.sha256}, got {found}"]
    length = len(data.decode())
    if length != record.characters:
        return [f"{path}: {record.name}: expected {record.characters} characters, got {length}"]
    return []
