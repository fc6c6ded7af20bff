# SPDX-License-Identifier: Apache-2.0
"""The paper's figures at a small scale: what is run, and its place beside the paper's numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lychee.errors import InputError
from lychee.eval import plots
from lychee.eval.harness import Load, Progress, Setting, run
from lychee.eval.methods import OURS, known_methods
from lychee.eval.records import CellKey, RecordFile, cell_key, replace_file
from lychee.eval.report import Cell, Table, machine
from lychee.eval.tasks import TaskCell

# Share of a training run, at its end, whose mean counts as its result.
LAST_SHARE = 0.1
PAPER = {
    "model": "Qwen2.5-7B",
    "lengths": "7K to 1.75M tokens",
    "speed": "up to 6x faster than MemAgent",
    "memory": "up to 2x less peak GPU memory than MemAgent",
    "ratio": "best ratio 4: matches 2, far better than 16",
    "notes": "best working memory 1,024 tokens",
    "samples": "latency of 128 samples",
    "compressor": "frozen: converges sooner and lower; end to end: noisier, ends higher",
    "crossover": "-",
}


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        lengths: tokens, for accuracy, latency and memory of all methods.
        ratios: for accuracy at `ratio_length`.
        frozen, trained: metric files of training runs (JSON lines with `step` and `field`), one
            per seed, with the compressor frozen and trained.
    """

    task: str
    lengths: tuple[int, ...]
    ratios: tuple[int, ...]
    ratio_length: int
    questions: int
    seed: int = 0
    frozen: tuple[Path, ...] = ()
    trained: tuple[Path, ...] = ()
    field: str = "reward"


def reproduce(
    plan: Plan,
    make_cells: Callable[[Sequence[int]], list[TaskCell]],
    load: Load,
    out: Path,
    shared: dict[str, Any],
    progress: Progress,
    *,
    draw: bool = True,
) -> dict[str, Any]:
    """Run what has no record in `out` yet, and write reproduce.json, report.md and plots there.

    A length that a method refuses, being beyond its model, is reported with the method's reason.
    """
    if draw:
        plots.load_matplotlib()
    curves = {
        name: [read_curve(path, plan.field) for path in paths]
        for name, paths in (("frozen", plan.frozen), ("trained", plan.trained))
    }
    records = RecordFile(out, shared)
    gated = load(None).gate is not None
    found: dict[CellKey, Cell] = {}
    refused = []
    runs = list(runs_of(plan, make_cells, gated))
    for index, (setting, cell) in enumerate(runs):

        def report_progress(done: int, questions: int, index: int = index) -> None:
            progress(index * questions + done, len(runs) * questions)

        try:
            for result in run([cell], [setting], load, records, progress=report_progress):
                found[cell_key(result)] = result
        except InputError as error:
            if setting.method == OURS:
                raise
            refused.append({"method": setting.method, "length": cell.length, "why": str(error)})
    model = load(None)
    report = {
        "settings": shared | json.loads(json.dumps(asdict(plan), default=str)),
        "machine": machine(),
        "parameters": sum(weight.numel() for weight in model.decoder.parameters()),
        "notes": model.memory.size,
        "own_ratio": model.memory.ratio,
        "cells": list(found.values()),
        "refused": refused,
        "curves": curves,
    }
    report["comparison"] = compare(report, plan)
    replace_file(out / "reproduce.json", json.dumps(report, indent=1) + "\n")
    drawn = draw_figures(report, plan, out) if draw else []
    replace_file(out / "report.md", write_report(report, plan, drawn))
    return report


def runs_of(
    plan: Plan, make_cells: Callable[[Sequence[int]], list[TaskCell]], gated: bool
) -> Iterator[tuple[Setting, TaskCell]]:
    """Every method at every length, ours without its gate as well, then ours at the ratios."""
    by_length = make_cells(sorted(plan.lengths))
    settings = [Setting(method) for method in known_methods()]
    if gated:
        settings.append(Setting(OURS, gate="off"))
    for setting in settings:
        for cell in by_length:
            yield setting, cell
    (at_ratios,) = make_cells([plan.ratio_length])
    for ratio in plan.ratios:
        yield Setting(OURS, ratio), at_ratios


def read_curve(path: Path, field: str) -> plots.Points:
    """(step, value) of a training run's metrics; lines without the field are passed."""
    points = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found = json.loads(line)
            if field in found:
                points.append((float(found["step"]), float(found[field])))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: line {number}: expected JSON with step and {field}, got {line[:60]!r}"
            ) from error
    if not points:
        raise InputError(f"{path}: expected lines with the field {field}, got none")
    return points


def by_method(cells: Sequence[Cell], plan: Plan, method: str, ratio: int | None) -> dict[int, Cell]:
    """Cells of a method by length; ours at one ratio."""
    wanted = ratio if method == OURS else None
    return {
        cell["length"]: cell
        for cell in cells
        if cell["method"] == method
        and cell["ratio"] == wanted
        and cell["gate"] != "off"
        and cell["length"] in plan.lengths
    }


def factors(ours: dict[int, Cell], other: dict[int, Cell], field: str) -> dict[int, float]:
    """By length, how many times more than ours another method takes."""
    return {
        length: other[length][field] / ours[length][field]
        for length in sorted(ours.keys() & other.keys())
        if ours[length][field] and other[length][field]
    }


def compare(report: dict[str, Any], plan: Plan) -> list[dict[str, str]]:
    """The paper's statements with what came out here: rows of what, paper, here."""
    own = report["own_ratio"]
    ours = by_method(report["cells"], plan, OURS, own)
    agent = by_method(report["cells"], plan, "memagent", own)
    full = by_method(report["cells"], plan, "full_context", own)
    here = {
        "model": f"{report['parameters'] / 1e6:.1f}M parameters",
        "lengths": ", ".join(f"{n:,}: {percent(cell)}" for n, cell in sorted(ours.items())),
        "speed": f"from nothing {best(factors(ours, agent, 'answer_seconds'))}; with the bank at "
        f"hand {best(factors(ours, agent, 'ask_seconds'))}",
        "memory": best(factors(ours, agent, "peak_bytes")),
        "ratio": ", ".join(
            f"{cell['ratio']}: {percent(cell)}"
            for cell in report["cells"]
            if cell["length"] == plan.ratio_length
            and cell["ratio"] in plan.ratios
            and cell["gate"] == "auto"
        )
        or "not run",
        "notes": f"notes of at most {report['notes']} tokens; not varied",
        "samples": f"latency of {plan.questions} questions at each length",
        "compressor": compare_curves(report["curves"]),
        "crossover": f"faster than full context {since(ours, full, 'answer_seconds')}, smaller "
        f"{since(ours, full, 'peak_bytes')}",
    }
    return [{"what": name, "paper": PAPER[name], "here": here[name]} for name in PAPER]


def percent(cell: Cell) -> str:
    low, high = cell["interval_95"]
    return f"{100 * cell['score']:.0f}% ({100 * low:.0f} to {100 * high:.0f})"


def best(found: dict[int, float]) -> str:
    """The largest factor with its length, and the one at the longest text."""
    if not found:
        return "not run"
    length, last = max(found, key=found.__getitem__), max(found)
    text = f"{found[length]:.2f}x at {length:,} tokens"
    return text if last == length else f"{text}, {found[last]:.2f}x at {last:,}"


def since(ours: dict[int, Cell], other: dict[int, Cell], field: str) -> str:
    """From which length on ours takes less, among the lengths that both were run at."""
    found = factors(ours, other, field)
    if not found:
        return "not run"
    if min(found.values()) > 1:
        return f"from {min(found):,} tokens on, the shortest run"
    shared = [[(n, float(cells[n][field])) for n in found] for cells in (ours, other)]
    place = plots.crossover(*shared)
    return (
        f"up to {max(found):,} tokens nowhere" if place is None else f"from {place:,.0f} tokens on"
    )


def compare_curves(curves: dict[str, list[plots.Points]]) -> str:
    """The mean over runs of each one's last values, frozen and trained."""
    ends = {}
    for name, runs in curves.items():
        tails = [points[-max(1, int(len(points) * LAST_SHARE)) :] for points in runs]
        if tails:
            ends[name] = [fmean(value for _, value in tail) for tail in tails]
    if not ends:
        return "no training runs given"
    return "; ".join(
        f"{name}: ends at {fmean(values):.3f} ({len(values)} runs)" for name, values in ends.items()
    )


def draw_figures(report: dict[str, Any], plan: Plan, out: Path) -> list[Path]:
    """Accuracy, times and memory by length, accuracy by ratio, and reward curves if there are."""
    at_ratios = [
        cell
        for cell in report["cells"]
        if cell["length"] == plan.ratio_length and cell["gate"] == "auto"
    ]
    by_length = [c for c in report["cells"] if c["ratio"] in (None, report["own_ratio"])]
    drawn = plots.draw_all(by_length, out)
    drawn += plots.draw_all(at_ratios, out, ["accuracy_by_ratio"])
    named = {
        f"{name}, run {index + 1}": points
        for name, runs in report["curves"].items()
        for index, points in enumerate(runs)
    }
    if named:
        drawn.append(out / "reward.png")
        plots.draw_curves(named, "step", plan.field, drawn[-1])
    return drawn


def write_report(report: dict[str, Any], plan: Plan, drawn: Sequence[Path]) -> str:
    """Markdown: the comparison, what differs from the paper, all cells, and the plots."""
    table = Table(["method", "gate"], [], ["score"])
    baselines = ", ".join(name for name in known_methods() if name != OURS) or "no other method"
    lines = [
        "# The paper's figures at a small scale",
        "",
        "| | paper | here |\n|---|---|---|",
        *(f"| {row['what']} | {row['paper']} | {row['here']} |" for row in report["comparison"]),
        "",
        f"What differs: the model ({report['parameters'] / 1e6:.1f}M parameters, not 7B), the data "
        f"(generated questions of the task {plan.task} instead of RULER-HQA), the hardware "
        f"({report['machine']['device']}, {report['machine']['threads']} threads, torch "
        f"{report['machine']['torch']}), and the lengths. Compared with ours: {baselines}, on the "
        "same weights; these were trained to read compressed memory and not raw text, so the "
        "accuracy of other methods says nothing about them, only their time and memory do. "
        "Questions about one text are asked together, and share its time. Peak memory is what was "
        "in use above what was before.",
        "",
        table.header,
        *map(table.row, report["cells"]),
        "",
        *(f"{r['method']} at {r['length']:,} tokens: {r['why']}" for r in report["refused"]),
        "",
        *(f"![{path.stem}]({path.name})" for path in drawn),
    ]
    return "\n".join(lines).rstrip() + "\n"
