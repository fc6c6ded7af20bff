# SPDX-License-Identifier: Apache-2.0
"""The whole recipe of a model from nothing: kinds of training in a row, each from the one before."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from lychee.errors import InputError
from lychee.train.checkpoint import load_state
from lychee.train.recipe import read_fields
from lychee.train.run import TrainingRun

SHIPPED_RECIPE = Path(__file__).parent.parent / "assets" / "recipe.toml"
# The class of each kind, in lychee.train.
KINDS = {
    "pretrain": "pretrain.Pretraining",
    "sft": "sft.SupervisedTraining",
    "rl": "rl.Reinforcement",
    "gate": "gate.GateTraining",
}


@dataclass(frozen=True)
class Step:
    """One [[step]] of a plan: a run in a folder of its `name`, from a recipe beside the plan."""

    name: str
    kind: str
    config: str

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")


@dataclass(frozen=True)
class Plan:
    """The steps in their order."""

    steps: tuple[Step, ...]

    def __post_init__(self):
        names = [step.name for step in self.steps]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"step: expected steps of different names, got {names}")

    @classmethod
    def load(cls, path: Path) -> Plan:
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: expected a plan of training, got: {error}") from error
        if "step" in raw:
            raw["steps"] = raw.pop("step")
        return read_fields(cls, raw, f"{path}: ")


def training_class(kind: str) -> type[TrainingRun]:
    """The class behind `lychee train <kind>`."""
    module, name = KINDS[kind].split(".")
    return getattr(import_module(f"lychee.train.{module}"), name)


def reproduce(
    plan_path: Path, out: Path, books: Path | None, only: str | None = None, device: str = "auto"
) -> Path:
    """Run a plan's steps, each from the model of the step before; returns the last one's model.

    Steps go on from their checkpoints, so that the same call continues what was interrupted.

    Args:
        plan_path: TOML file of [[step]] tables.
        out: gets a folder per step.
        books: as for every kind of training.
        only: run one step alone; the one before must be finished.
        device: "auto", "cpu" or "cuda".
    """
    plan, previous = Plan.load(plan_path), None
    names = [step.name for step in plan.steps]
    if only is not None and only not in names:
        raise InputError(f"only: expected one of {', '.join(names)}, got {only}")
    for step in plan.steps:
        folder, config = out / step.name, plan_path.parent / step.config
        if only in (None, step.name):
            run = training_class(step.kind)
            new = run.recipe_type.load(config).model is not None
            if not new and previous is not None and not previous.is_dir():
                raise InputError(f"{previous}: expected the step before to be finished, got none")
            start = None if new else previous
            run.train(config, folder, books=books, start=start, resume=True, device=device)
            hours = load_state(folder / "state.pt")["seconds"] / 3600
            print(f"{step.name}: finished after {hours:.2f} hours", flush=True)
        previous = folder / "model"
    return previous
