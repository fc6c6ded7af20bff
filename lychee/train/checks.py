# SPDX-License-Identifier: Apache-2.0
"""Checks of a recipe's values that several kinds of training share; each raises ValueError."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from lychee.config import TEMPLATES, MemoryConfig
from lychee.weights import COUNT, FIELDS, FITS, TEXTS

PREFIX = "lychee_memory_"
# What config.json's fields hold, where it is more than any value.
HOLDS = {name: expected for expected, names in FIELDS.items() for name in names}
MODEL_FIELDS = (
    *("model_type", "architectures", "hidden_act", "tie_word_embeddings"),
    *("attention_bias", "mlp_bias"),
    *(name for name in HOLDS if not name.startswith(PREFIX)),
)
MEMORY_FIELDS = tuple(item.name for item in fields(MemoryConfig))
HOLDS |= {"architectures": TEXTS, f"{PREFIX}ratio": COUNT}


def check_model(table: dict[str, Any]) -> None:
    """Refuse in [model] what no config.json of a new model has."""
    check_fields("model", table, MODEL_FIELDS, "")
    if "eos_token_id" not in table:
        raise ValueError("model.eos_token_id: expected the token that ends a turn, got none")


def check_memory(table: dict[str, Any]) -> None:
    """Refuse in [memory] what is no setting of the memory."""
    check_fields("memory", table, MEMORY_FIELDS, PREFIX)
    templates = table.get("templates", {})
    check_fields("memory.templates", templates, TEMPLATES, "")
    for name, text in templates.items():
        if not isinstance(text, str):
            raise ValueError(f"memory.templates.{name}: expected a text, got {text!r}")


def check_fields(where: str, table: dict[str, Any], known: Sequence[str], prefix: str) -> None:
    """Names of a table, and what config.json's fields `prefix` + name may hold."""
    for name, value in table.items():
        if name not in known:
            raise ValueError(f"{where}.{name}: expected one of {', '.join(known)}, got this field")
        expected = HOLDS.get(prefix + name)
        if expected is not None and not FITS[expected](value):
            raise ValueError(f"{where}.{name}: expected {expected}, got {value!r}")


def check_shares(settings: Any, names: Iterable[str]) -> None:
    """Refuse attributes that are no shares."""
    for name in names:
        if not 0 <= getattr(settings, name) <= 1:
            raise ValueError(f"{name}: expected a share of 0 to 1, got {getattr(settings, name)}")


def check_hops(weights: Sequence[float]) -> None:
    """Refuse weights that nothing can be drawn by."""
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ValueError(f"hops: expected a weight above 0 and none below, got {list(weights)}")
