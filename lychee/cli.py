# SPDX-License-Identifier: Apache-2.0
"""Entry point of the command `lychee`: runs it and turns every way to end into an exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lychee.errors import InputError, LycheeError

FAILED, MISTAKEN, INTERRUPTED = 1, 2, 130


def main() -> None:
    """Run the command; a user's mistake is one line on standard error and exit code 2."""
    sys.exit(run())


def run() -> int:
    """Exit code of the command in sys.argv."""
    try:
        status = run_command()
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has gone; leave nothing for the interpreter to flush into it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except LycheeError as error:
        return refuse(str(error))
    except FileExistsError as error:
        return refuse(f"{error.filename}: expected a folder, got a file")
    except OSError as error:
        name = error.filename or "input or output"
        return refuse(f"{name}: expected to read or write it, got: {error.strerror or error}")
    except ImportError as error:
        if not str(error).startswith("lychee_kernels"):
            raise
        return refuse(str(error))
    if status == INTERRUPTED:
        # A second Ctrl-C has nothing left to stop.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("interrupted", file=sys.stderr)
    return status


def run_command() -> int:
    """The command itself, imported only now: Ctrl-C must find its handler already there."""
    from lychee import commands

    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by whoever started the command
            setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))
        getattr(sys, stream).reconfigure(errors="backslashreplace")
    refuse_nothing(sys.argv[1:])
    try:
        status = commands.app(prog_name="lychee", standalone_mode=False)
    except commands.Aborted:
        return INTERRUPTED
    except commands.UsageProblem as error:
        command = error.ctx.command_path if error.ctx else "lychee"
        message = " ".join(error.format_message().split()).rstrip(".")
        return refuse(f"{message}{value_of(error)}; see '{command} --help'")
    sys.stdout.flush()
    return status if isinstance(status, int) else 0


def refuse_nothing(arguments: list[str]) -> None:
    """Refuse an empty argument, which as a path would be the folder at hand."""
    for place, (before, argument) in enumerate(zip([""] + arguments, arguments, strict=False), 1):
        if argument == "" and before not in ("-q", "--question"):
            raise InputError(f"argument {place}: expected a value, got nothing")
        if argument.startswith("--") and argument.endswith("=") and argument != "--question=":
            raise InputError(f"{argument[:-1]}: expected a value, got nothing")


def value_of(error: Exception) -> str:
    """What a wrong option was given, where the message of the parser leaves it out."""
    for name in getattr(getattr(error, "param", None), "opts", ()):
        if name in sys.argv[:-1]:
            got = sys.argv[sys.argv.index(name) + 1]
            return "" if repr(got) in str(error) else f", got {got!r}"
    return ""


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Ctrl-C ends the process on the spot: for imports of libraries that would swallow it."""
    previous = signal.getsignal(signal.SIGINT)
    if previous is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def leave(*_) -> None:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def refuse(message: str) -> int:
    print(f"lychee: error: {message}", file=sys.stderr, flush=True)
    return MISTAKEN
