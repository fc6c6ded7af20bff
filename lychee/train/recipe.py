# SPDX-License-Identifier: Apache-2.0
"""The TOML file of a training run as frozen dataclasses; what does not fit is an error by name."""

from __future__ import annotations

import dataclasses
import math
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from lychee.errors import InputError
from lychee.train.checks import check_memory, check_model

# A list of tables is written as several tables of one name.
NAMES_IN_FILE = {"stages": "stage"}
TYPE_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


@dataclass(frozen=True)
class Stage:
    """One [[stage]] of a curriculum; the learning rate goes linearly from the first to the second.

    Kinds of training add their own fields.
    """

    steps: int
    learning_rate: tuple[float, float]

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")
        if not all(0 <= rate < math.inf for rate in self.learning_rate):
            rates = list(self.learning_rate)
            raise ValueError(f"learning_rate: expected numbers of at least 0, got {rates}")


@dataclass(frozen=True)
class LoraSettings:
    """[lora]: the base is frozen; adapters and the memory's own parameters are trained.

    `targets` are projections by the last part of their names, such as q_proj.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank: expected at least 1, got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha: expected a number above 0, got {self.alpha}")
        if not self.targets:
            raise ValueError("targets: expected names of projections, got none")


@dataclass(frozen=True)
class DataSettings:
    """[data]: files of questions with their texts, as `lychee.data.readers` reads them.

    `files` are names or patterns in the folder of books, `format` one of the readers' formats, and
    `share` is that of batches made from them; rl takes them alone. All but rl need records whose
    supporting sentences are known, as HotpotQA's are.
    """

    files: tuple[str, ...]
    format: str
    share: float = 1.0

    def __post_init__(self):
        if not self.files:
            raise ValueError("files: expected names of files, got none")
        if not 0 < self.share <= 1:
            raise ValueError(f"share: expected above 0 and at most 1, got {self.share}")


@dataclass(frozen=True)
class Recipe:
    """What every kind of training reads from its TOML file; each adds fields and its stages.

    Attributes:
        seed: of the new weights and of everything drawn.
        threads: of torch, per process.
        warmup_steps: over which the learning rate rises from 0.
        clip: largest norm of the gradient over all parameters.
        optimizer: adamw, or muon for the projections and adamw for the rest.
        betas: of AdamW.
        weight_decay: of either optimiser.
        save_every, log_every: in steps.
        books: names or patterns of texts in the folder of books; none is every *.txt there, or with
            `data` the texts of its questions.
        data: questions from files.
        start: model folder to start from, or "shipped"; not together with `model`.
        model: config.json's fields of a model that starts from nothing.
        memory: fields of `MemoryConfig`; with `start` only those that differ from the folder's.
        precision: of the losses' matrix products; bfloat16 where the machine is fast in it.
            Weights and their updates stay float32, and so does all of rl.
        lora: train adapters instead of the decoder's own weights.
        export: dtype of the model folder that a finished run writes.
    """

    seed: int = 0
    threads: int = 1
    warmup_steps: int = 0
    clip: float = 1.0
    optimizer: typing.Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    save_every: int = 200
    log_every: int = 20
    books: tuple[str, ...] = ()
    data: DataSettings | None = None
    start: str | None = None
    model: dict[str, Any] | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    precision: typing.Literal["float32", "bfloat16"] = "float32"
    lora: LoraSettings | None = None
    export: typing.Literal["float16", "bfloat16", "float32"] = "float16"
    stages: tuple[Stage, ...] = ()

    # Fields that a resumed run may change: they move no weight.
    free: ClassVar[frozenset[str]] = frozenset({"threads", "save_every", "log_every", "export"})

    def __post_init__(self):
        if not self.stages:
            raise ValueError("stage: expected at least one [[stage]], got none")
        if self.start is not None and self.model is not None:
            raise ValueError(
                f"start: expected none beside [model], or no [model], got start = {self.start!r}"
            )
        if self.lora is not None and self.model is not None:
            raise ValueError("lora: expected a model folder to start from, got [model]")
        if self.model is not None:
            check_model(self.model)
        check_memory(self.memory)
        self.check_optimizer()
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected 0 or more and less than 2 ** 63, got {self.seed}")
        for name in ("threads", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    def check_optimizer(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps: expected 0 or more, got {self.warmup_steps}")
        if not self.clip > 0:
            raise ValueError(f"clip: expected a norm above 0, got {self.clip}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected 0 or more and less than 1, got {list(self.betas)}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: expected 0 or more, got {self.weight_decay}")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file; InputError names an unknown, missing, mistyped or contradictory field."""
        return load_file(cls, path, "a training recipe")

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[Any, int]:
        """The stage of a step, and the step within it."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, step
            step -= stage.steps
        return self.stages[-1], self.stages[-1].steps

    def learning_rate_at(self, step: int) -> float:
        """Linear within each stage, after a linear warm-up."""
        stage, inside = self.stage_at(step)
        first, last = stage.learning_rate
        rate = first + (last - first) * inside / stage.steps
        return rate * min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else rate

    def begun(self, step: int) -> dict[str, Any]:
        """Settings that shaped the weights up to `step`: later stages may still change."""
        values = dataclasses.asdict(self)
        started, first = [], 0
        for stage in values.pop("stages"):
            if first < step:
                started.append(stage)
            first += stage["steps"]
        return {n: v for n, v in values.items() if n not in self.free} | {"stage": started}


def load_file(cls: type, path: Path, what: str) -> Any:
    """An instance of a dataclass from a TOML file, which errors call `what`."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: expected {what}, got: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: expected {what}, got: {error}") from error
    return read_fields(cls, raw, f"{path}: ")


def read_fields(cls: type, raw: dict[str, Any], where: str) -> Any:
    """An instance of a dataclass from a TOML table; `where` opens every error's message."""
    hints = typing.get_type_hints(cls)
    # Fields by the names that they have in the file.
    known = {NAMES_IN_FILE.get(item.name, item.name): item for item in dataclasses.fields(cls)}
    for name in raw:
        if name not in known:
            raise InputError(f"{where}{name}: expected one of {', '.join(known)}, got this field")
    for name, item in known.items():
        defaults = (item.default, item.default_factory)
        if name not in raw and all(value is dataclasses.MISSING for value in defaults):
            raise InputError(f"{where}{name}: expected a value, got none")
    fields = {known[name].name: (name, value) for name, value in raw.items()}
    values = {
        field: convert(value, hints[field], f"{where}{name}")
        for field, (name, value) in fields.items()
    }
    try:
        return cls(**values)
    except ValueError as error:
        raise InputError(f"{where}{error}") from error


def convert(value: Any, hint: Any, where: str) -> Any:
    """A TOML value as the type that a field is annotated with."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        (hint,) = (argument for argument in arguments if argument is not types.NoneType)
        return convert(value, hint, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise InputError(f"{where}: expected one of {', '.join(arguments)}, got {value!r}")
        return value
    if origin is tuple:
        return convert_list(value, arguments, where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise InputError(f"{where}: expected a table, got {value!r}")
        return read_fields(hint, value, f"{where}.")
    if origin is dict:
        if not isinstance(value, dict):
            raise InputError(f"{where}: expected a table, got {value!r}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise InputError(f"{where}: expected {TYPE_NAMES[hint]}, got {value!r}")
    return value


def convert_list(value: Any, arguments: tuple, where: str) -> tuple:
    """A TOML list as a tuple, of one type at any length or of one type per place."""
    if not isinstance(value, list):
        raise InputError(f"{where}: expected a list, got {value!r}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise InputError(f"{where}: expected {len(arguments)} values, got {value!r}")
    pairs = enumerate(zip(value, arguments, strict=True), start=1)
    return tuple(convert(item, hint, f"{where}[{index}]") for index, (item, hint) in pairs)
