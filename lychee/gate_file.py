# SPDX-License-Identifier: Apache-2.0
"""A model folder's gate: gate.safetensors, and `lychee_memory_gate_*` fields of config.json."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lychee.decoder import Decoder
from lychee.errors import CheckpointError
from lychee.gate import Gate, GateConfig
from lychee.weights import CONFIG, check_finite

GATE = "gate.safetensors"
PREFIX = "lychee_memory_gate_"
# By the annotation of a field: what it may hold, and its name in errors.
FITS = {
    "int": (lambda value: type(value) is int, "a whole number"),
    "float": (lambda value: type(value) in (int, float), "a number"),
    "tuple[str, ...]": (
        lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
        "a list of texts",
    ),
}


def without_gate(raw: dict[str, Any]) -> dict[str, Any]:
    """config.json's fields but for the gate's."""
    return {name: value for name, value in raw.items() if not name.startswith(PREFIX)}


def gate_fields(config: GateConfig) -> dict[str, Any]:
    """The gate's fields for config.json."""
    values = dataclasses.asdict(config) | {"targets": list(config.targets)}
    return {PREFIX + name: value for name, value in values.items()}


def read_gate_config(raw: dict[str, Any], path: Path) -> GateConfig | None:
    """The gate that config.json describes, or None; errors name the field and `path`."""
    given = {n.removeprefix(PREFIX): v for n, v in raw.items() if n.startswith(PREFIX)}
    if not given:
        return None
    known = {item.name: item for item in dataclasses.fields(GateConfig)}
    for name, value in given.items():
        if name not in known:
            raise CheckpointError(f"{path}: {PREFIX}{name}: expected no such field, got {value!r}")
        fits, wanted = FITS[known[name].type]
        if not fits(value):
            raise CheckpointError(f"{path}: {PREFIX}{name}: expected {wanted}, got {value!r}")
    if "layers" not in given:
        raise CheckpointError(f"{path}: {PREFIX}layers: expected a whole number, got none")
    targets = tuple(given.pop("targets", GateConfig.targets))
    return GateConfig(**given, targets=targets)


def load_gate(folder: Path, raw: dict[str, Any], decoder: Decoder) -> Gate | None:
    """The folder's gate over its decoder, or None where it has none.

    Raises:
        CheckpointError: file and fields do not fit each other or the model.
    """
    config, path = read_gate_config(raw, folder / CONFIG), folder / GATE
    if config is None and not path.exists():
        return None
    if config is None:
        raise CheckpointError(f"{folder / CONFIG}: expected fields of the gate, got none")
    if not path.exists():
        raise CheckpointError(f"{folder}: expected a {GATE} as config.json says, got none")
    gate = Gate(decoder, config)
    parameters = dict(gate.named_parameters())
    try:
        with safe_open(path, framework="pt") as file:
            if wrong := sorted(set(file.keys()) ^ set(parameters)):
                expected, got = ("one", "none") if wrong[0] in parameters else ("none", "one")
                raise CheckpointError(f"{path}: {wrong[0]}: expected {expected}, got {got}")
            for name, parameter in parameters.items():
                stored = file.get_tensor(name)
                if stored.shape != parameter.shape:
                    raise CheckpointError(
                        f"{path}: {name}: expected shape {list(parameter.shape)} for this model, "
                        f"got {list(stored.shape)}"
                    )
                parameter.data.copy_(stored)
                check_finite(f"{path}: {name}", parameter.data)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected a gate, got: {error}") from error
    return gate.eval().requires_grad_(False)


def save_gate(folder: Path, gate: Gate | None) -> None:
    """Write the folder's gate.safetensors under a temporary name first; None removes it.

    Raises:
        CheckpointError: a place that cannot be written.
    """
    path, part = folder / GATE, folder / f"{GATE}.part"
    try:
        if gate is None:
            path.unlink(missing_ok=True)
            return
        tensors = {n: p.detach().cpu().contiguous() for n, p in gate.named_parameters()}
        save_file(tensors, part, metadata={"format": "pt"})
        # safetensors makes files that only their owner may read.
        shutil.copymode(folder / CONFIG, part)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected a writable file, got: {error}", "") from error
