# SPDX-License-Identifier: Apache-2.0
"""kill -9 at random moments of whatever writes a bank: what is left is the old or the new state.

LYCHEE_KILLS=200 in the environment tries as many moments; a dozen are tried without.
"""

import os
import random
import shutil
import signal
import sys
import threading
import time

import pytest
import torch
from bank_contents import build_bank, documents_of, litter, many_commits, read_back

from lychee.bank import BankBuilder, Document, MemoryBank, is_bank, verify_bank

KILLS = int(os.environ.get("LYCHEE_KILLS", 12))
# Files whose lines write: a moment is one of these lines, or a time.
WRITING = tuple(f"bank/{name}.py" for name in ("folder", "segments", "compaction", "save", "lock"))


class LineCounter:
    """Counts executed lines of the writing files, over all threads; may die at one of them."""

    def __init__(self, die_at):
        self.count, self.die_at = 0, die_at

    def start(self):
        threading.settrace(self.on_call)
        sys.settrace(self.on_call)

    def on_call(self, frame, event, argument):
        return self.on_line if frame.f_code.co_filename.endswith(WRITING) else None

    def on_line(self, frame, event, argument):
        if event == "line":
            self.count += 1
            if self.count == self.die_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.on_line


def run_in_child(work, *, seconds=None, line=None):
    """Run `work` in a process of its own, killed after so long or at that line.

    Returns (lines executed, seconds taken), or None if it was killed.
    """
    receiver, sender = os.pipe()
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            counter = LineCounter(line)
            if seconds is None:
                counter.start()
            work()
            os.write(sender, str(counter.count).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(sender)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    taken = time.perf_counter() - started
    with os.fdopen(receiver) as file:
        count = file.read()
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return None if os.WIFSIGNALED(status) else (int(count), taken)


class Scenario:
    """A change to a bank, the states that it passes through, and how to make it again."""

    def __init__(self, model, before, work, states):
        self.model, self.before, self.work, self.states = model, before, work, states
        self.memory = {}

    def check(self, path):
        """The bank holds one of the states, whole; where none was before, maybe none."""
        if not is_bank(path):
            assert self.before is None
            return
        assert verify_bank(path) == []
        bank = MemoryBank.open(path)
        assert [(d.name, d.text) for d in bank.documents] in self.states
        for index, chunk in enumerate(bank.chunks):
            got = read_back(bank, index)
            torch.testing.assert_close(got, self.memory_of(bank, chunk), atol=2e-5, rtol=0)

    def memory_of(self, bank, chunk):
        """What the chunk's memory must be: its document alone, remembered in memory."""
        text = bank.documents[chunk.document].text
        if text not in self.memory:
            alone = self.model.remember(text)
            self.memory[text] = {c.start: read_back(alone, i) for i, c in enumerate(alone.chunks)}
        return self.memory[text][chunk.start]


@pytest.fixture(scope="module")
def scenarios(tiny_model, prose, tmp_path_factory):
    model = tiny_model
    a, b, c, d = documents_of(prose, 0, 1, 2, 3, words=40)
    long = Document("long", prose(200, seed=4))
    changed = Document(b.name, prose(50, seed=5))
    folder = tmp_path_factory.mktemp("banks")
    build_bank(model, folder / "three", [a, b, c])

    def stop(progress):
        if progress.tokens > 150:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), BankBuilder(model, folder / "stopped") as builder:
        builder.add([a, long, b], stop)
    assert MemoryBank.open(folder / "stopped").describe()["unfinished"] == "long"

    def adding(*documents):
        return lambda path: build_bank(model, path, documents, resume=True)

    def removing(*names):
        def remove(path):
            bank = MemoryBank.open(path)
            present = {document.name for document in bank.documents}
            bank.remove(present & set(names))

        return remove

    def saving(path):
        model.remember([d, changed]).save(path, overwrite=True)

    def states(*lists):
        return [[(x.name, x.text) for x in documents] for documents in lists]

    return {
        "build": Scenario(
            model, None, adding(a, long, b), states([], [a], [a, long], [a, long, b])
        ),
        "resume": Scenario(
            model,
            folder / "stopped",
            adding(a, long, b),
            states([a], [a, long], [a, long, b]),
        ),
        "add": Scenario(
            model,
            folder / "three",
            adding(changed, d, a),
            states([a, b, c], [a, changed, c], [a, changed, c, d]),
        ),
        "remove": Scenario(
            model, folder / "three", removing(a.name, c.name), states([a, b, c], [b])
        ),
        "save": Scenario(model, folder / "three", saving, states([a, b, c], [d, changed])),
    }


@pytest.fixture(scope="module", autouse=True)
def short_runs():
    with many_commits(40):
        yield


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", ["build", "resume", "add", "remove", "save"])
def test_killed_writers_leave_a_whole_state(scenarios, name, tmp_path):
    scenario = scenarios[name]
    draw = random.Random(name)

    def fresh(path):
        if scenario.before is not None:
            shutil.copytree(scenario.before, path)
        return path

    lines, seconds = run_in_child(lambda: scenario.work(fresh(tmp_path / "whole")))
    assert lines > 30
    deaths = 0
    for turn in range(-(-KILLS // 5)):
        path = fresh(tmp_path / str(turn))
        moment = {"line": draw.randint(1, lines)}
        if turn % 3 == 2:
            moment = {"seconds": draw.uniform(0, seconds)}
        deaths += run_in_child(lambda path=path: scenario.work(path), **moment) is None
        scenario.check(path)
        scenario.work(path)
        scenario.check(path)
        bank = MemoryBank.open(path)
        assert [(d.name, d.text) for d in bank.documents] == scenario.states[-1]
        assert bank.describe()["unfinished"] is None and litter(path) == set()
        shutil.rmtree(path)
    assert deaths > 0
