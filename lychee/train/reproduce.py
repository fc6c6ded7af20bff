# SPDX-License-Identifier: Apache-2.0
"""The whole recipe of a model from nothing: several trainings, each from the result of the last."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from lychee.errors import InputError
from lychee.train.checkpoint import load_state
from lychee.train.recipe import load_file
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
class PlannedRun:
    """One [[stage]] of a plan: a run in a folder of its `name`, from a recipe beside the plan."""

    name: str
    kind: str
    config: str

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")


@dataclass(frozen=True)
class Plan:
    """The stages in their order."""

    stages: tuple[PlannedRun, ...]

    def __post_init__(self):
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"stage: expected stages of different names, got {names}")

    @classmethod
    def load(cls, path: Path) -> Plan:
        return load_file(cls, path, "a plan of training")


def training_class(kind: str) -> type[TrainingRun]:
    """The class behind `lychee train <kind>`."""
    module, name = KINDS[kind].split(".")
    return getattr(import_module(f"lychee.train.{module}"), name)


def reproduce(
    plan_path: Path, out: Path, books: Path | None, only: str | None = None, device: str = "auto"
) -> Path:
    """Run a plan's stages, each from the model of the one before; returns the last one's model.

    Stages go on from their checkpoints, so that the same call continues what was interrupted.

    Args:
        plan_path: TOML file of [[stage]] tables.
        out: gets a folder per stage.
        books: as for every kind of training.
        only: run one stage alone; the one before must be finished.
        device: "auto", "cpu" or "cuda".
    """
    plan, previous = Plan.load(plan_path), None
    names = [stage.name for stage in plan.stages]
    if only is not None and only not in names:
        raise InputError(f"only: expected one of {', '.join(names)}, got {only}")
    for stage in plan.stages:
        folder, config = out / stage.name, plan_path.parent / stage.config
        if only in (None, stage.name):
            run = training_class(stage.kind)
            new = run.recipe_type.load(config).model is not None
            if not new and previous is not None and not previous.is_dir():
                raise InputError(f"{previous}: expected the stage before to be finished, got none")
            start = None if new else previous
            run.train(config, folder, books=books, start=start, resume=True, device=device)
            hours = load_state(folder / "state.pt")["seconds"] / 3600
            print(f"{stage.name}: finished after {hours:.2f} hours", flush=True)
        previous = folder / "model"
    return previous
