# SPDX-License-Identifier: Apache-2.0
"""Metrics of a training run: averages since the last report, as JSON lines and for TensorBoard."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Value = float | tuple[float, float]
# Of what is written; rounded to places, a learning rate or a small divergence would be 0.
SIGNIFICANT_DIGITS = 6


class Averages:
    """Means by name; a value is a number, or a total with the count that it is over."""

    def __init__(self, sums: dict[str, list[float]] | None = None):
        self.sums: dict[str, list[float]] = sums or {}

    def add(self, values: dict[str, Value]) -> None:
        for name, value in values.items():
            total, count = value if isinstance(value, tuple) else (value, 1)
            entry = self.sums.setdefault(name, [0.0, 0.0])
            entry[0] += total
            entry[1] += count

    def merge(self, others: list[dict[str, list[float]]]) -> None:
        """Take the sums of other processes in."""
        for sums in others:
            self.add({name: tuple(entry) for name, entry in sums.items()})

    def take(self) -> dict[str, float]:
        """The means, and start anew."""
        means = {name: t / n for name, (t, n) in sorted(self.sums.items()) if n}
        self.sums = {}
        return means


class MetricsLog:
    """metrics.jsonl and TensorBoard's folder of a run; a resumed run goes on where it stands."""

    def __init__(self, folder: Path, step: int):
        path = folder / "metrics.jsonl"
        keep_until(path, step)
        self.file = path.open("a", encoding="utf-8")
        self.board = open_board(folder / "tensorboard", step)

    def write(self, line: dict[str, Any]) -> None:
        text = json.dumps(line)
        self.file.write(text + "\n")
        self.file.flush()
        print(text, flush=True)
        if self.board is not None:
            for name, value in line.items():
                if name != "step":
                    self.board.add_scalar(name, value, line["step"])
            self.board.flush()

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def keep_until(path: Path, step: int) -> None:
    """Drop lines behind `step`, which a resumed run writes again, and a line cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    # Renamed, so that a full disk leaves what was there.
    part = path.with_suffix(".part")
    part.write_text("".join(kept), encoding="utf-8")
    os.replace(part, path)


def significant(value: float) -> float:
    """A number without the digits that nobody reads."""
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")


def open_board(folder: Path, step: int):
    """A TensorBoard writer, or None with a line that says so where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("TensorBoard is not installed: metrics go to metrics.jsonl only", flush=True)
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
