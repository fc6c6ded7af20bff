# SPDX-License-Identifier: Apache-2.0
"""Reads the texts that a bank remembers, and refuses what is not text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lychee.bank import Document
from lychee.errors import InputError


def read_documents(source: str | Path | Sequence[Path | Document]) -> list[Document]:
    """Documents of a text, or of one or several paths; each must be non-empty UTF-8 text.

    Documents that are read already pass as they are.
    """
    if isinstance(source, str):
        documents = [Document("text", source)]
    else:
        paths = [source] if isinstance(source, Path) else list(source)
        documents = [p if isinstance(p, Document) else read_file(p) for p in paths]
    if not documents:
        raise InputError("documents: expected at least one, got none")
    for document in documents:
        if not document.text.strip():
            raise InputError(f"{document.name}: expected text, got an empty document")
    return documents


def read_file(path: Path) -> Document:
    """One UTF-8 text file; "-" is standard input."""
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: expected a text file, got: {error.strerror}") from error
    if b"\0" in data:
        raise InputError(f"{path}: expected a text file, got binary data")
    try:
        return Document(str(path), data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: expected UTF-8 text, got byte {data[error.start]:#04x} at {error.start}"
        ) from error
