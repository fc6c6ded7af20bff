# SPDX-License-Identifier: Apache-2.0
"""Sums up records, and writes cells as a Markdown table and as JSON with what produced them."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from lychee.eval.records import CELL, Record, replace_file
from lychee_kernels import __version__

Cell = dict[str, Any]


def wilson_interval(right: float, asked: int, z: float = 1.96) -> tuple[float, float]:
    """95% score interval of a proportion.

    For scores between 0 and 1 `right` is their sum; the interval is then on the wide side, since
    no such score varies more than one that is always 0 or 1.
    """
    if not asked:
        return 0.0, 1.0
    share, scale = right / asked, 1 + z * z / asked
    middle = (share + z * z / (2 * asked)) / scale
    spread = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked)) / scale
    return max(0.0, middle - spread), min(1.0, middle + spread)


def summarise(records: Sequence[Record], breakdown: dict[str, dict[str, Any]]) -> Cell:
    """One cell of results, from all its records; each one's first metric is its score.

    Seconds are means: `build_seconds` per text, `ask_seconds` per question about a bank at hand,
    `answer_seconds` per question from nothing, were it the only one about its text;
    `processor_seconds` per text with all its questions, of all threads.
    """
    metrics = [next(iter(record["scores"])) for record in records]
    scores = [record["scores"][name] for name, record in zip(metrics, records, strict=True)]
    low, high = wilson_interval(sum(scores), len(scores))
    firsts = {record["text"]: record for record in records}.values()
    peaks = [record["peak_bytes"] for record in firsts if record["peak_bytes"] is not None]
    build = fmean(record["build_seconds"] for record in firsts)
    ask = sum(record["ask_seconds"] for record in firsts) / len(records)
    parts = {}
    for name, wanted in breakdown.items():
        chosen = [
            score
            for score, record in zip(scores, records, strict=True)
            if wanted.items() <= record["details"].items()
        ]
        parts[name] = [sum(chosen), len(chosen)]
    return {name: records[0][name] for name in CELL} | {
        "tokens": int(median(record["text_tokens"] for record in firsts)),
        "texts": len(firsts),
        "questions": len(records),
        "metric": metrics[0] if len(set(metrics)) == 1 else "score",
        "score": fmean(scores),
        "interval_95": [low, high],
        "metrics": {
            name: fmean(r["scores"][name] for r in records if name in r["scores"])
            for name in dict.fromkeys(name for record in records for name in record["scores"])
        },
        "breakdown": parts,
        "build_seconds": build,
        "ask_seconds": ask,
        "answer_seconds": build + ask,
        "processor_seconds": fmean(record["processor_seconds"] for record in firsts),
        "chunks": fmean(record["chunks"] for record in records),
        "chunks_read": fmean(record["chunks_read"] for record in records),
        **support_of(records),
        "memory_bytes": int(fmean(record["memory_bytes"] for record in firsts)),
        "peak_bytes": max(peaks, default=None),
    }


def support_of(records: Sequence[Record]) -> dict[str, float | None]:
    """Shares of the supporting chunks that were read, and of the chunks read that support."""
    known = [record for record in records if record["support_chunks"]]
    found = sum(record["support_read"] for record in known)
    wanted = sum(record["support_chunks"] for record in known)
    read = sum(record["chunks_read"] for record in known)
    return {
        "support_recall": found / wanted if wanted else None,
        "support_precision": found / read if read else None,
    }


class Table:
    """A Markdown table; columns that would say the same in every row are left out.

    Args:
        varying: names of CELL that differ between the cells to come.
        breakdown: names of further columns.
        metrics: the first one heads the score; those behind it have a column of their own.
    """

    def __init__(self, varying: Sequence[str], breakdown: Sequence[str], metrics: Sequence[str]):
        self.varying = [
            name for name in CELL if name in varying and name not in ("length", "ratio")
        ]
        self.breakdown, self.metrics = list(breakdown), list(metrics[1:])
        titles = [*self.varying, "tokens", "ratio", metrics[0], "95% interval", *self.metrics]
        titles += [*self.breakdown, "compress s/text", "read s/question", "chunks read"]
        titles += ["support read", "peak MiB"]
        self.header = f"{line(titles)}\n|{'---|' * len(titles)}"

    def row(self, cell: Cell) -> str:
        low, high = cell["interval_95"]
        asked, peak = cell["questions"], cell["peak_bytes"]
        right = f"{cell['score'] * asked:.4g}/{asked}"
        values = ["-" if cell[name] is None else str(cell[name]) for name in self.varying]
        values += [f"{cell['length'] or cell['tokens']:,}", str(cell["ratio"] or "-")]
        values += [f"{100 * cell['score']:.0f}% ({right})", f"{100 * low:.0f} to {100 * high:.0f}%"]
        values += [f"{100 * cell['metrics'][name]:.0f}%" for name in self.metrics]
        for name in self.breakdown:
            part, of = cell["breakdown"].get(name, (0, 0))
            values.append(f"{part:.4g}/{of}" if of else "-")
        values += [f"{cell['build_seconds']:.2f}", f"{cell['ask_seconds']:.2f}"]
        values += [f"{cell['chunks_read']:.1f} of {cell['chunks']:.1f}"]
        recall = cell["support_recall"]
        values += ["-" if recall is None else f"{100 * recall:.1f}%"]
        values += ["-" if peak is None else f"{peak / 2**20:.0f}"]
        return line(values)


def line(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"


def source_commit() -> str | None:
    """The commit of the checkout this code lies in, "-dirty" where files have changed."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def machine() -> dict[str, str | int | None]:
    """What timings depend on, and the code that was run."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "platform": platform.platform(),
        "device": device,
        "processors": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "lychee": __version__,
        "commit": source_commit(),
    }


def write_results(folder: Path, about: dict[str, Any], table: Table, cells: Sequence[Cell]) -> None:
    """results.json and table.md in `folder`, beside the records they were made of.

    `about`: the run's command, settings and remarks.
    """
    results = about | {"machine": machine(), "cells": list(cells)}
    replace_file(folder / "results.json", json.dumps(results, indent=1) + "\n")
    rows = "\n".join([table.header, *map(table.row, cells)])
    parts = [f"    {about['command']}", rows, *about["remarks"]]
    replace_file(folder / "table.md", "\n\n".join(parts) + "\n")
