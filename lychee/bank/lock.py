# SPDX-License-Identifier: Apache-2.0
"""The lock that keeps a bank to one writer; the system frees it when its owner dies, however."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from lychee.errors import BankError, BankLockedError

HELD = (errno.EWOULDBLOCK, errno.EACCES)


class WriterLock:
    """Exclusive right to write a bank, from construction until `release`."""

    def __init__(self, path: Path):
        """Raises BankLockedError, naming the owner, if another writer lives."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self.file = os.open(path, flags, 0o666)
        except OSError as error:
            raise BankError(f"{path}: expected a writable lock, got: {error.strerror}") from error
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = describe_owner(self.file)
            os.close(self.file)
            if error.errno in HELD:
                raise BankLockedError(
                    f"{path.parent}: expected no other writer, got {owner}"
                ) from error
            raise BankError(
                f"{path}: expected a file system with locks, got: {error.strerror}"
            ) from error
        self._write(
            {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            }
        )

    def _write(self, owner: dict) -> None:
        # For people only: a full disk is the first real write's matter.
        with suppress(OSError):
            os.ftruncate(self.file, 0)
            os.pwrite(self.file, json.dumps(owner).encode(), 0)

    def release(self) -> None:
        os.ftruncate(self.file, 0)
        os.close(self.file)


def describe_owner(file: int) -> str:
    """Who holds a lock, as far as its file says."""
    try:
        owner = json.loads(os.pread(file, 4096, 0))
        pid, host, since = int(owner["pid"]), str(owner["host"]), str(owner["since"])
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
    return f"process {pid} on {host}, since {since}"
