# SPDX-License-Identifier: Apache-2.0
"""Several processes: the same losses as one, and checkpoints that any number can go on from."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from small_run import GATE_RECIPE, RECIPE, run_folder, small_run, weights, write_recipe

from lychee.errors import InputError
from lychee.train.gate import GateRecipe, GateTraining
from lychee.train.pretrain import Pretraining
from lychee.train.processes import Processes

# The first stage of two, so that the second can be added when the run goes on.
PLACE = RECIPE.rindex("[[stage]]")
TEXTS = RECIPE[PLACE:] + "language = 0.5\nrecite = 0.5\ncontinuation = 0.5\nspan = 16\n"
WHOLE = RECIPE[:PLACE].replace("log_every = 2", "log_every = 1") + TEXTS
FIRST = WHOLE[:PLACE]


@pytest.fixture(scope="module")
def one(tmp_path_factory, books):
    """A finished run in this process alone."""
    folder = tmp_path_factory.mktemp("one") / "run"
    small_run(folder, books, WHOLE).run()
    return folder


def arguments(recipe, folder, books, stage="pretrain"):
    options = ["--out", str(folder), "--books", str(books), "--resume"]
    return ["-m", "lychee", "train", stage, str(recipe), *options]


def free_port():
    """One below those that systems hand out, which no connection takes before it is listened on."""
    for port in range(20000 + os.getpid() % 10000, 32768):
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port")


def start(command, **environment):
    """A process in a session of its own, so that whatever it started can be ended with it."""
    return subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(*processes):
    """Wait for processes that must succeed; one that fails, or hangs, ends them all."""
    end = time.monotonic() + 300
    while time.monotonic() < end and {process.poll() for process in processes} == {None}:
        time.sleep(0.05)
    # What is left prints its stacks when it is ended: by the others' failure, or as it hangs.
    failed = any(process.returncode for process in processes)
    late = time.monotonic() + (10 if failed else max(10, end - time.monotonic()))
    while time.monotonic() < late and None in {process.poll() for process in processes}:
        time.sleep(0.05)
    hung = [process.pid for process in processes if process.returncode is None]
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGABRT)
    outputs = [process.communicate()[0] for process in processes]
    found = [process.returncode for process in processes]
    assert not hung and set(found) == {0}, "\n".join((f"{hung=} {found=}", *outputs))


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    clock = ("seconds", "eta_s")
    return [{n: v for n, v in json.loads(line).items() if n not in clock} for line in lines]


def assert_same_run(folder, one):
    """Every metric of every step and every weight, within float32's tolerance."""
    got, expected = metrics(folder), metrics(one)
    assert len(got) == len(expected)
    for line, wanted in zip(got, expected, strict=True):
        assert line == pytest.approx(wanted, rel=1e-4, abs=2e-5)
    stored, wanted = weights(folder), weights(one)
    assert stored.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(stored[name], tensor, rtol=1e-3, atol=2e-5)
    assert (folder / "model" / "model.safetensors").is_file()


def run_two(*command):
    """Python with these arguments in two processes that share every batch."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    finish(*(start(command, RANK=rank, LOCAL_RANK=rank, **shared) for rank in "01"))


def test_two_processes_give_the_losses_of_one(tmp_path, books, one):
    """Data parallel; begun in two processes and ended in one."""
    folder = run_folder(tmp_path / "run", books)
    run_two(*arguments(write_recipe(tmp_path, FIRST), folder, books))
    recipe = write_recipe(tmp_path, WHOLE)
    Pretraining.train(recipe, folder, books=books, resume=True)
    assert_same_run(folder, one)


def test_no_thread_outlives_the_group(tmp_path, books):
    """A thread of gloo's that lives until the interpreter ends aborts some of the runs."""
    code = """
import os, sys
from pathlib import Path
from lychee.train.pretrain import Pretraining
recipe, folder, books = map(Path, sys.argv[1:])
Pretraining.train(recipe, folder, books=books)
names = [Path(f"/proc/self/task/{task}/comm").read_text() for task in os.listdir("/proc/self/task")]
left = [name for name in names if "gloo" in name]
sys.exit(f"threads left: {left}" if left else 0)
"""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("lists threads in Linux's /proc")
    folder, recipe = run_folder(tmp_path / "run", books), write_recipe(tmp_path, FIRST)
    run_two("-c", code, str(recipe), str(folder), str(books))


def test_two_processes_train_the_gate_of_one(tmp_path, books):
    """Their shares of a batch differ in the number of turns that the gate is asked for."""
    recipe = write_recipe(tmp_path, GATE_RECIPE)
    alone, shared = (run_folder(tmp_path / name, books) for name in ("alone", "shared"))
    GateTraining(GateRecipe.load(recipe), alone, books=books).run()
    run_two(*arguments(recipe, shared, books, stage="gate"))
    assert_same_run(shared, alone)
    assert (shared / "model" / "gate.safetensors").is_file()


def test_sharded_weights_give_the_losses_of_one(tmp_path, books, one):
    """FSDP2 by `accelerate launch`; begun in one process and ended in two."""
    pytest.importorskip("accelerate")
    folder = run_folder(tmp_path / "run", books)
    Pretraining.train(write_recipe(tmp_path, FIRST), folder, books=books)
    launch = ["-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2"]
    launch += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", str(free_port())]
    command = arguments(write_recipe(tmp_path, WHOLE), folder, books)
    finish(start([*launch, *command]))
    assert_same_run(folder, one)


def test_parts_are_the_batch(tmp_path, books):
    """Whatever the number of processes, every row is in exactly one part."""
    run = small_run(tmp_path / "run", books, WHOLE)
    run.step = 2
    batch = run.sample()
    parts = [batch.part(index, 2) for index in range(2)]
    assert torch.equal(torch.cat([part.chunks for part in parts]), batch.chunks)
    for name in ("recite", "continuation"):
        rows = torch.cat([getattr(part, name).inputs for part in parts])
        assert torch.equal(rows, getattr(batch, name).inputs)
    for name in ("turns", "labels", "final_turns", "final_labels"):
        rows = torch.cat([getattr(part.recall, name) for part in parts])
        assert torch.equal(rows, getattr(batch.recall, name))
    assert sum((part.recall.cases for part in parts), []) == batch.recall.cases
    assert batch.part(0, 3) is None


@pytest.mark.parametrize(
    ("name", "value"), [("ACCELERATE_MIXED_PRECISION", "bf16"), ("FSDP_VERSION", "1")]
)
def test_launchers_requests_that_cannot_be_met_are_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"{name}: expected .*, got {value}"):
        Processes("cpu")


def test_a_single_process_of_several_is_refused(monkeypatch):
    """As `accelerate launch --cpu --num_processes 2` starts it; accelerate with one is fine."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert Processes("cpu").count == 1
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(InputError, match="one of several processes, got started alone; .*torchrun"):
        Processes("cpu")
