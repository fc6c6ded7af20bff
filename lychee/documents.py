# SPDX-License-Identifier: Apache-2.0
"""Reads the texts that a bank remembers, and refuses what is not text.

A path names a file, a folder, a pattern such as "docs/**/*.md", or "-" for standard input. Of a
folder, every text and JSON lines file is read, at any depth. A document's name is its path, or in
JSON lines the field "id"; it is what the document is replaced and removed by.
"""

from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from lychee.bank import Document
from lychee.bank.pieces import check_documents
from lychee.errors import InputError

TEXTS, JSON_LINES = (".txt", ".md"), ".jsonl"
SUFFIXES = (*TEXTS, JSON_LINES)
STANDARD_INPUT = "-"
LONGEST_PATH = 4096


def read_documents(source: str | Path | Sequence[str | Path | Document]) -> list[Document]:
    """Documents of a text, or of one or several paths; each must be non-empty UTF-8 text.

    Args:
        source: a text (a single str), or a path, or a list of paths and documents read already.

    Raises:
        InputError: nothing to read; a text that is only the name of a file; a file that is missing,
            empty, binary or not UTF-8; a line of JSON lines without the texts "id" and "text"; two
            documents of one name.
    """
    if isinstance(source, str):
        refuse_name(source)
        documents = [Document("text", source)]
    else:
        paths = [source] if isinstance(source, Path) else list(source)
        if (count := sum(str(path) == STANDARD_INPUT for path in paths)) > 1:
            raise InputError(f"-: expected standard input once, got it {count} times")
        documents = [document for path in paths for document in read_path(path)]
    if not documents:
        raise InputError("documents: expected at least one, got none")
    for document in documents:
        if not is_text(document.name):
            raise InputError(f"{document.name!r}: expected a name in UTF-8, got other bytes")
    return list(check_documents(documents))


def refuse_name(text: str) -> None:
    """Refuse a text that was meant as a path: the name of a file is nothing to remember."""
    if len(text) > LONGEST_PATH:
        return
    single = len(text.split()) == 1 and text.lower().endswith(SUFFIXES)
    if single or os.path.isfile(text):
        raise InputError(
            f"{text}: expected a text, got the name of a file", "pass pathlib.Path(...) to read it"
        )


def read_path(path: str | Path | Document) -> list[Document]:
    """The documents that a path stands for."""
    if isinstance(path, Document):
        return [path]
    return [document for file in find_files(Path(path)) for document in read_texts(file)]


def is_missing(path: Path) -> bool:
    """Whether a path stands for nothing: no file, folder, standard input or pattern."""
    return (
        str(path) != STANDARD_INPUT and not os.path.exists(path) and not glob.has_magic(str(path))
    )


def find_files(path: Path) -> list[Path]:
    """Files of a path: itself, those of a folder, or those that match it as a pattern; sorted."""
    if path.is_dir():
        files = sorted(Path(folder, name) for folder, name in walk(path))
        if not files:
            raise InputError(f"{path}: expected files of {', '.join(SUFFIXES)}, got none")
        return files
    if str(path) == STANDARD_INPUT or path.exists() or not glob.has_magic(str(path)):
        return [path]
    files = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    files = [file for file in files if not file.is_dir()]
    if not files:
        raise InputError(f"{path}: expected files that match, got none")
    return files


def walk(root: Path) -> Iterator[tuple[str, str]]:
    """Folder and name of every text file under `root`, without hidden ones."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: expected a folder to read, got: {error.strerror}")

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                yield folder, name


def read_texts(path: Path) -> list[Document]:
    """The documents in one file: several in JSON lines, else one."""
    document = read_file(path)
    if path.suffix.lower() != JSON_LINES:
        return [document]
    lines = enumerate(document.text.split("\n"), 1)
    documents = [read_line(f"{path}: line {count}", line) for count, line in lines if line.strip()]
    if not documents:
        raise InputError(f"{path}: expected text, got an empty document")
    return documents


def read_line(where: str, line: str) -> Document:
    """The document in one line of JSON lines."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected a JSON object, got: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, got a {type(value).__name__}")
    for field in ("id", "text"):
        text = value.get(field)
        if not isinstance(text, str):
            got = type(text).__name__ if field in value else "no such field"
            raise InputError(f"{where}: {field}: expected text, got {got}")
        if not text.strip() or not is_text(text):
            raise InputError(f"{where}: {field}: expected text, got {text!r:.40}")
    return Document(value["id"], value["text"])


def is_text(text: str) -> bool:
    """Whether a text can be stored: file names and JSON can hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_file(path: Path) -> Document:
    """One UTF-8 text file; "-" is standard input."""
    standard = str(path) == STANDARD_INPUT
    if standard and sys.stdin is None:
        raise InputError(f"{path}: expected standard input, got none")
    try:
        data = sys.stdin.buffer.read() if standard else Path(path).read_bytes()
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
