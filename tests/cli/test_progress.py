# SPDX-License-Identifier: Apache-2.0
"""Progress on a terminal and off it, and Ctrl-C in the middle of work."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lychee import progress
from lychee.progress import ProgressDisplay

ROOT = Path(__file__).resolve().parents[2]


def test_one_line_per_ten_seconds_off_a_terminal(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with ProgressDisplay("Remembering", "tokens") as display:
        for done in range(0, 26):
            display(done * 1000, 25_000)
            now[0] += 1.0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "lychee: Remembering: 10,000 of 25,000 tokens, 40%, 1,000 tokens/s, 15.0 s left",
        "lychee: Remembering: 20,000 of 25,000 tokens, 80%, 1,000 tokens/s, 5.0 s left",
    ]


def test_speed_leaves_out_what_was_done_before(monkeypatch, capsys):
    """By the first call where nothing else is said, and by the caller's word where it is."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with ProgressDisplay("Building", "tokens") as display:
        display(90_000, 100_000)
        now[0] += 10.0
        display(91_000, 100_000)
        now[0] += 10.0
        display(100_000, 100_000, 5.0)
        now[0] += 10.0
        display(100_000, 400_000, 12.5)
    assert [line.partition("%, ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "100 tokens/s, 1 min 30 s left",
        "5.0 tokens/s, 0.0 s left",
        "12 tokens/s, 6 h 40 min left",
    ]


@pytest.fixture
def terminal():
    """A terminal's two ends: what a process writes to the second is read from the first."""
    ends = pty.openpty()
    yield ends
    for end in ends:
        os.close(end)


@pytest.fixture
def long_text_file(text, tmp_path):
    """Far more than can be read in the time that the tests below wait."""
    path = tmp_path / "long.txt"
    path.write_text(" ".join([text] * 60))
    return path


def read_until(end, *patterns, seconds=120):
    """Read from a terminal until every one of `patterns` has been seen."""
    seen, stop = "", time.monotonic() + seconds
    os.set_blocking(end, False)
    while not all(re.search(pattern, seen) for pattern in patterns):
        assert time.monotonic() < stop, seen
        try:
            seen += os.read(end, 65536).decode(errors="replace")
        except BlockingIOError:
            time.sleep(0.02)
    return seen


def test_interrupt_while_the_memory_is_built(start, terminal, long_text_file, model_folder):
    """The bar on a terminal says when to interrupt: some tokens are done, most are not."""
    reading, writing = terminal
    arguments = ("ask", long_text_file, "-q", "What is it?", "--model", model_folder)
    process = start(*arguments, stdout=subprocess.PIPE, stderr=writing, text=True)
    read_until(reading, "Remembering", r"\b[1-9]\d?%")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert process.stdout.read() == ""
    rest = read_until(reading, "interrupted")
    assert "Traceback" not in rest
    assert rest.rstrip().endswith("interrupted")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_interrupt_while_torch_is_loaded(start, long_text_file, model_folder):
    """Torch's own imports can swallow a KeyboardInterrupt."""
    arguments = ("ask", long_text_file, "-q", "What is it?", "--model", model_folder, "--json")
    process = start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch_cpu" not in maps.read_text():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors) == (130, "", "interrupted\n")


def test_terminal_bar_leaves_the_answer_alone(start, terminal, text_file, model_folder):
    reading, writing = terminal
    arguments = ("ask", text_file, "-q", "What is it?", "--model", model_folder)
    process = start(*arguments, stdout=subprocess.PIPE, stderr=writing, text=True)
    seen = read_until(reading, "Remembering", "Reading", "memory tokens")
    assert "100%" in seen
    answer = process.stdout.read()
    assert process.wait(timeout=60) == 0
    assert len(answer.splitlines()) == 1 or "\x1b" not in answer


def test_package_imports_without_torch():
    """What `lychee --help` imports must not pull torch in."""
    code = "import sys, lychee, lychee.commands; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
