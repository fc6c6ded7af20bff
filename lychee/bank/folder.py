# SPDX-License-Identifier: Apache-2.0
"""A bank's folder: reading a consistent state of it, and replacing that state in one step.

Segments are written to a temporary name, seen onto the disk and renamed to their hash; then the
manifest is replaced by a rename. Whatever moment a writer dies at, the manifest is the previous or
the next one and what it names is there; the rest is litter, which the next writer clears away.
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from lychee.bank.lock import WriterLock
from lychee.bank.manifest import FORMAT, Manifest, SegmentRecord, parse_manifest
from lychee.bank.pages import PageLayout
from lychee.bank.segments import Segment, announce, write_segment
from lychee.errors import BankError

MANIFEST, SEGMENTS, LOCK = "manifest.json", "segments", "lock"
PART = ".part"
OURS = re.compile(r"[0-9a-f]{64}\.safetensors|segment\.part")
# A reader that meets a writer tries again; each try costs milliseconds.
TRIES = 50
MOST_MANIFEST_BYTES = 1 << 30


def is_bank(path: str | Path) -> bool:
    """Whether a path is a bank's folder, damaged or not; other folders have manifests, too."""
    manifest = Path(path) / MANIFEST
    if not manifest.is_file() or (Path(path) / SEGMENTS).is_dir():
        return manifest.is_file()
    with suppress(OSError), open(manifest, "rb") as file:
        return FORMAT.encode() in file.read(256)
    return False


def read_manifest(path: Path) -> Manifest:
    """The present state of a bank; BankError if there is none or it is damaged."""
    file = path / MANIFEST
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_MANIFEST_BYTES:
            limit = f"an ordinary file of at most {MOST_MANIFEST_BYTES:,} bytes"
            raise BankError(f"{file}: expected {limit}, got another")
        return parse_manifest(file.read_bytes(), file)
    except FileNotFoundError as error:
        got = "a folder without a manifest" if path.is_dir() else "no such folder"
        raise BankError(
            f"{path}: expected a bank, got {got}", "make one with 'lychee build'"
        ) from error
    except OSError as error:
        raise BankError(f"{file}: expected a bank's manifest, got: {error.strerror}") from error


def segment_path(path: Path, sha256: str) -> Path:
    return path / SEGMENTS / f"{sha256}.safetensors"


def read_state(path: Path) -> tuple[Manifest, list[Segment]]:
    """A bank's manifest and its segments, mapped: what writers do later changes neither."""
    for _ in range(TRIES):
        manifest = read_manifest(path)
        for sha256 in manifest.segments:
            announce(segment_path(path, sha256))
        try:
            return manifest, [
                Segment.map(segment_path(path, sha256), manifest.layout, record)
                for sha256, record in manifest.segments.items()
            ]
        except FileNotFoundError as error:
            missing = error.filename
        except OSError as error:
            raise BankError(
                f"{error.filename}: expected a readable file, got: {error.strerror}"
            ) from error
        if read_manifest(path) == manifest:
            break
    raise BankError(
        f"{missing}: expected a segment of the bank, got none",
        "restore the file from a copy, or build the bank anew",
    )


class BankWriter:
    """The one writer of a bank's folder, from construction until `close`."""

    def __init__(self, path: Path):
        """Take the lock, make the folders where there are none, and clear litter away.

        Raises:
            BankLockedError: another writer is at work.
            BankError: the path is a file, a folder of something else, or not writable.
        """
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            foreign = {entry.name for entry in os.scandir(path)} - {MANIFEST, SEGMENTS, LOCK}
            if foreign - {MANIFEST + PART} and not is_bank(path):
                raise BankError(
                    f"{path}: expected a bank or an empty folder, got one with {min(foreign)}",
                    "name another folder",
                )
            self.lock = WriterLock(path / LOCK)
        except OSError as error:
            got = " a file" if path.is_file() else f": {error.strerror}"
            raise BankError(f"{path}: expected a writable folder, got{got}") from error
        try:
            (path / SEGMENTS).mkdir(exist_ok=True)
            if not stat.S_ISDIR(os.lstat(path / SEGMENTS).st_mode):
                raise BankError(f"{path / SEGMENTS}: expected a folder, got a link", "remove it")
            self.manifest = read_manifest(path) if is_bank(path) else None
            self._clear()
        except BaseException as error:
            self.lock.release()
            if isinstance(error, OSError):
                raise self._failure(error) from error
            raise

    def write_segment(
        self, layout: PageLayout, kv: Tensor, scale: Tensor, text: bytes
    ) -> SegmentRecord:
        """Add a segment that no manifest names yet; see segments.write_segment."""
        part = self.path / SEGMENTS / ("segment" + PART)
        try:
            record = write_segment(part, layout, kv, scale, text)
            os.replace(part, segment_path(self.path, record.sha256))
        except OSError as error:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise self._failure(error) from error
        return record

    def commit(self, manifest: Manifest) -> None:
        """Make `manifest` the bank's state, then remove segments that it does not name."""
        part = self.path / (MANIFEST + PART)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            flush_folder(self.path / SEGMENTS)
            with open(os.open(part, flags, 0o666), "wb") as file:
                file.write(manifest.to_bytes())
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path / MANIFEST)
            flush_folder(self.path)
            gone = self.manifest is not None and self.manifest.segments.keys() - manifest.segments
            self.manifest = manifest
            if gone:
                self._clear()
        except OSError as error:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise self._failure(error) from error

    def _clear(self) -> None:
        """Remove files of ours that the manifest does not name."""
        (self.path / (MANIFEST + PART)).unlink(missing_ok=True)
        named = self.manifest.segments if self.manifest is not None else ()
        kept = {f"{sha256}.safetensors" for sha256 in named}
        for entry in os.scandir(self.path / SEGMENTS):
            if OURS.fullmatch(entry.name) and entry.name not in kept:
                os.unlink(entry.path)

    def _failure(self, error: OSError) -> BankError:
        return BankError(
            f"{self.path}: expected to write to it, got: {error.strerror}",
            "what was committed before is whole; make room or choose another place, and go on",
        )

    def close(self) -> None:
        """Clear litter of this writer away and let the next one in."""
        with suppress(OSError):
            self._clear()
        self.lock.release()

    def __enter__(self) -> BankWriter:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def flush_folder(path: Path) -> None:
    """See renames in a folder onto the disk."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
