# SPDX-License-Identifier: Apache-2.0
"""Training state on disk: written whole or not at all, and checked before it is used."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lychee.errors import CheckpointError, TrainingError
from lychee.train.metrics import Averages

if TYPE_CHECKING:
    from lychee.train.run import TrainingRun

# Whatever a state may hold must be here: a newer layout gets a new number.
FORMAT = 1


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint.

    Raises:
        TrainingError: it could not be written, as on a full disk; the earlier file stays.
    """
    try:
        write_whole(path, {"format": FORMAT} | state)
    except (OSError, RuntimeError) as error:
        kept = "the last one is intact" if path.exists() else "there is none yet"
        raise TrainingError(
            f"{path}: expected to save a checkpoint, got: {reason(error)} ({kept})"
        ) from error


def write_whole(path: Path, content: dict[str, Any]) -> None:
    """Write `content` so that `path` is at every moment the earlier file or this one, whole.

    Raises:
        OSError, RuntimeError: it could not be written; `reason` says why.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except (OSError, RuntimeError):
        temporary.unlink(missing_ok=True)
        raise


def reason(error: BaseException) -> str:
    """The operating system's words, which torch hides behind its own."""
    while error.__context__ is not None and not isinstance(error, OSError):
        error = error.__context__
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote; CheckpointError if any byte of it was changed."""
    try:
        with zipfile.ZipFile(path) as archive:
            if (broken := archive.testzip()) is not None:
                raise ValueError(f"a wrong checksum of {broken}")
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise CheckpointError(
            f"{path}: expected a training state, got: {error}", "start the run in another folder"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: expected a training state of format {FORMAT}, got another file",
            "start the run in another folder",
        )
    return state


def check_state(path: Path, state: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuse a state of another kind of training, model or recipe, naming both sides.

    Both hold "kind" (a name), and dicts of settings: "model", "recipe" and "start".
    """
    advice = "resume with what the run was started with, or train into another folder"
    if state["kind"] != expected["kind"]:
        raise CheckpointError(
            f"{path}: expected a checkpoint of {expected['kind']}, got one of {state['kind']}",
            advice,
        )
    for part in ("model", "recipe", "start"):
        found, wanted = state[part], expected[part]
        for name in wanted | found:
            if found.get(name) != wanted.get(name):
                raise CheckpointError(
                    f"{path}: {part}: {name}: expected {wanted.get(name)!r} as in this run, "
                    f"got {found.get(name)!r} in the checkpoint",
                    advice,
                )


def capture(run: TrainingRun) -> dict[str, Any]:
    """All that moves in a run: weights, optimiser, generators, averages.

    Tensors are as in one process, however many there are; only the first process has them all.
    """
    whole = run.processes.whole
    optimizers = [optimizer.state_dict() for optimizer in run.optimizers]
    for optimizer in optimizers:
        optimizer["state"] = {
            index: {name: whole(value) for name, value in entry.items()}
            for index, entry in optimizer["state"].items()
        }
    version, internal, gauss = run.random.getstate()
    averages = Averages()
    averages.merge(run.processes.gather(run.averages.sums))
    return {
        "step": run.step,
        "seconds": run.seconds,
        "weights": {name: whole(value) for name, value in run.trained_parameters().items()},
        "optimizers": optimizers,
        "random": [version, list(internal), gauss],
        "torch_random": torch.get_rng_state(),
        "averages": averages.sums,
    }


def restore(run: TrainingRun, state: dict[str, Any]) -> None:
    """Bring a run to what `capture` saw, in any number of processes."""
    like, named = run.processes.like, run.trained_parameters()
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(like(state["weights"][name], parameter))
    for optimizer, saved in zip(run.optimizers, state["optimizers"], strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, entry in saved["state"].items():
            for name, value in entry.items():
                entry[name] = like(value, parameters[index])
        optimizer.load_state_dict(saved)
    version, internal, gauss = state["random"]
    run.random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch_random"])
    run.step, run.seconds = state["step"], state["seconds"]
    run.averages = Averages(state["averages"] if run.processes.first else None)
    run.resumed()
