# SPDX-License-Identifier: Apache-2.0
"""Evaluation results as a Markdown table and as JSON with what produced them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from lychee.eval.needles import MULTI_KEYS, Cell, wilson_interval

HEADER = (
    "| tokens | ratio | exact | 95% interval | single-key | multi-key | numbers | words "
    "| compress s/text | read s/question |\n|---|---|---|---|---|---|---|---|---|---|"
)


def share(counts: tuple[int, int]) -> str:
    right, asked = counts
    return f"{right}/{asked}"


def table_row(cell: Cell) -> str:
    """One line of the table for one length."""
    right, asked = cell.accuracy()
    low, high = wilson_interval(right, asked)
    values = (
        f"{cell.length:,}",
        str(cell.ratio),
        f"{100 * right / asked:.0f}% ({right}/{asked})",
        f"{100 * low:.0f} to {100 * high:.0f}%",
        share(cell.accuracy(keys=1)),
        share(cell.accuracy(keys=MULTI_KEYS)),
        share(cell.accuracy(kind="number")),
        share(cell.accuracy(kind="word")),
        f"{cell.build_seconds / cell.texts:.2f}",
        f"{cell.ask_seconds / asked:.2f}",
    )
    return "| " + " | ".join(values) + " |"


def machine() -> dict[str, str | int]:
    """What timings depend on."""
    return {
        "platform": platform.platform(),
        "processors": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def write_json(path: Path, command: str, cells: Sequence[Cell]) -> None:
    """Every question with its answer, so that any other table can be made of it."""
    report = {"command": command, "machine": machine(), "cells": [c.to_dict() for c in cells]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
