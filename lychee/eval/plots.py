# SPDX-License-Identifier: Apache-2.0
"""Plots of results: accuracy, time and memory by length, with the place where one overtakes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from lychee.errors import InputError
from lychee.eval.methods import OURS
from lychee.eval.report import Cell

# What tells the lines of a plot by length apart.
NO_GATE = "no gate"
LINE = ("method", "ratio", "bank_dtype", "gate", "notes")

Points = list[tuple[float, float]]


def load_matplotlib() -> ModuleType:
    """pyplot, drawing into files; InputError that names the extra where it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise InputError(
            "plots: expected the package matplotlib, got none",
            'install it: pip install "lychee-memory[plot]", or draw none (reproduce: --no-plots)',
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_all(cells: Sequence[Cell], folder: Path, names: Sequence[str] | None = None) -> list[Path]:
    """Every plot, or those named, that the cells have at least two points for; their files."""
    pyplot = load_matplotlib()
    drawn = []
    for task in dict.fromkeys(cell["task"] for cell in cells):
        chosen = [cell for cell in cells if cell["task"] == task]
        for name in names or PLOTS:
            figure = PLOTS[name](pyplot, chosen)
            if figure is None:
                continue
            figure.axes[0].set_title(task)
            drawn.append(folder / f"{name}-{task}.png")
            figure.savefig(drawn[-1], dpi=150, bbox_inches="tight")
            pyplot.close(figure)
    return drawn


def series(cells: Sequence[Cell], x: str, y: str, *fixed: str) -> dict[str, Points]:
    """Points of y over x for each combination of `fixed`, those with two points or more."""
    found: dict[str, dict[Any, float]] = {}
    for cell in cells:
        if cell[x] is not None and cell[y] is not None:
            parts = [cell[name] for name in fixed]
            words = [describe(name, part) for name, part in zip(fixed, parts, strict=True)]
            found.setdefault(", ".join(filter(None, words)), {})[cell[x]] = cell[y]
    return {name: sorted(points.items()) for name, points in found.items() if len(points) > 1}


def describe(name: str, value: Any) -> str:
    if value is None or value == "auto":
        return ""
    if name == "gate":
        return NO_GATE if value == "off" else f"gate {value}"
    return f"{name} {value}" if name in ("ratio", "notes") else str(value)


def crossover(first: Points, second: Points) -> float | None:
    """The x from which `first` stays below `second`, on straight lines between logarithms.

    None if it never does at their common x, or does from the first of them on.
    """
    other = dict(second)
    both = [(x, y, other[x]) for x, y in first if x in other]
    gaps = [(math.log(x), math.log(max(a, 1e-9) / max(b, 1e-9))) for x, a, b in both]
    place = None
    for (x, gap), (next_x, next_gap) in zip(gaps, gaps[1:], strict=False):
        if gap >= 0 > next_gap:
            place = math.exp(x + (next_x - x) * gap / (gap - next_gap))
    return place if gaps and gaps[-1][1] < 0 else None


def start(pyplot: ModuleType, x: str, y: str, places: Sequence[float] | None = None):
    """Figure and axes; with `places`, x is logarithmic and labelled there."""
    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if places is not None:
        axes.set_xscale("log", base=2)
        places = sorted(set(places))
        axes.set_xticks(places, [short(place) for place in places])
        axes.minorticks_off()
    return figure, axes


def short(number: float) -> str:
    """1,024 as 1K."""
    if number < 1024:
        return f"{number:.0f}"
    thousands = number / 1024
    return f"{thousands:.2g}K" if thousands < 10 else f"{thousands:,.0f}K"


def places_of(lines: dict[str, Points]) -> list[float]:
    return [x for points in lines.values() for x, _ in points]


def use_log_scale(axes) -> None:
    """Logarithmic y with plain numbers, few enough not to overlap."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def without_gate(name: str) -> bool:
    """Whether a line's name says that every chunk was read."""
    return NO_GATE in name.split(", ")


def style(index: int, name: str) -> dict[str, Any]:
    """Of a line, so that one which lies over another leaves it to be seen."""
    line = ":" if without_gate(name) else "-"
    return {"marker": "osD^v"[index % 5], "fillstyle": "none", "linestyle": line, "label": name}


def show_legend(axes, title: str | None = None) -> None:
    """Beside the plot, where it hides no line."""
    axes.legend(title=title, loc="upper left", bbox_to_anchor=(1.02, 1.0))


def accuracy_by_length(pyplot: ModuleType, cells: Sequence[Cell]):
    """Scores with their 95% intervals."""
    lines = series(cells, "tokens", "score", *LINE)
    if not lines:
        return None
    figure, axes = start(pyplot, "tokens of text", cells[0]["metric"], places_of(lines))
    intervals = {(cell["tokens"], cell["score"]): cell["interval_95"] for cell in cells}
    for index, (name, points) in enumerate(lines.items()):
        x, y = zip(*points, strict=True)
        below = [score - intervals[point][0] for point, score in zip(points, y, strict=True)]
        above = [intervals[point][1] - score for point, score in zip(points, y, strict=True)]
        # A score of 0 or 1 lies on the edge of its interval, up to rounding.
        errors = [[max(0.0, error) for error in side] for side in (below, above)]
        axes.errorbar(x, y, yerr=errors, capsize=3 + 2 * index, **style(index, name))
    axes.set_ylim(-0.02, 1.02)
    show_legend(axes)
    return figure


def cost_by_length(field: str, label: str, scale: float) -> Callable:
    """A cost of each method, and where ours becomes the smaller one."""

    def draw(pyplot: ModuleType, cells: Sequence[Cell]):
        lines = series(cells, "tokens", field, *LINE)
        if not lines:
            return None
        figure, axes = start(pyplot, "tokens of text", label, places_of(lines))
        use_log_scale(axes)
        every = {name: points for name, points in lines.items() if name.startswith(OURS)}
        gated = {name: points for name, points in every.items() if not without_gate(name)}
        ours = list((gated or every).values())
        for index, (name, points) in enumerate(lines.items()):
            scaled = [(x, y * scale) for x, y in points]
            axes.plot(*zip(*scaled, strict=True), **style(index, name))
            if name.startswith(OURS) or len(ours) != 1:
                continue
            if (place := crossover(ours[0], points)) is not None:
                text = f"below {name} from {place:,.0f} tokens"
                axes.axvline(place, linestyle="--", color="grey", label=text)
        show_legend(axes)
        return figure

    return draw


def score_by(field: str, label: str) -> Callable:
    """Scores of ours over a setting, one line per length."""

    def draw(pyplot: ModuleType, cells: Sequence[Cell]):
        ours = [cell for cell in cells if cell["method"] == OURS]
        others = [name for name in LINE if name not in ("method", field)]
        lines = series(ours, field, "score", "length", *others)
        if not lines:
            return None
        places = places_of(lines) if field in ("ratio", "notes") else None
        figure, axes = start(pyplot, label, cells[0]["metric"], places)
        for index, (name, points) in enumerate(lines.items()):
            axes.plot(*zip(*points, strict=True), **style(index, name))
        axes.set_ylim(-0.02, 1.02)
        show_legend(axes, "tokens of text")
        return figure

    return draw


def chunks_by_length(pyplot: ModuleType, cells: Sequence[Cell]):
    """Chunks read per question, beside all chunks there are."""
    ours = [cell for cell in cells if cell["method"] == OURS]
    lines = series(ours, "tokens", "chunks_read", *LINE)
    if not lines:
        return None
    figure, axes = start(pyplot, "tokens of text", "chunks", places_of(lines))
    use_log_scale(axes)
    for index, (name, points) in enumerate(lines.items()):
        axes.plot(*zip(*points, strict=True), **style(index, f"read by {name}"))
    every = sorted({cell["tokens"]: cell["chunks"] for cell in ours}.items())
    axes.plot(*zip(*every, strict=True), "--", color="grey", label="in the bank")
    show_legend(axes)
    return figure


def draw_curves(curves: dict[str, list[Points]], x: str, y: str, path: Path) -> None:
    """Each kind's runs in one colour, for instance rewards by training step, into one file."""
    pyplot = load_matplotlib()
    figure, axes = start(pyplot, x, y)
    for index, (name, runs) in enumerate(curves.items()):
        for number, points in enumerate(runs):
            label = f"{name}, {len(runs)} runs" if not number else None
            axes.plot(*zip(*points, strict=True), color=f"C{index}", alpha=0.7, label=label)
    show_legend(axes)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


PLOTS: dict[str, Callable] = {
    "accuracy": accuracy_by_length,
    "time_from_nothing": cost_by_length("answer_seconds", "seconds, text read for it", 1.0),
    "time_to_answer": cost_by_length("ask_seconds", "seconds, text read before", 1.0),
    "peak_memory": cost_by_length("peak_bytes", "peak MiB above idle", 2.0**-20),
    "accuracy_by_ratio": score_by("ratio", "raw tokens per memory token"),
    "accuracy_by_notes": score_by("notes", "tokens of working memory"),
    "accuracy_by_bank": score_by("bank_dtype", "type of the bank's numbers"),
    "chunks_read": chunks_by_length,
}
