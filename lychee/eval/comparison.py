# SPDX-License-Identifier: Apache-2.0
"""The paper's statements, and beside each what a reproduction at a small scale measured."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lychee.eval import plots
from lychee.eval.methods import OURS
from lychee.eval.report import Cell

if TYPE_CHECKING:
    from lychee.eval.reproduce import Plan

# Share of a training run, at its end, whose mean counts as its result.
LAST_SHARE = 0.1
PAPER = {
    "model": "Qwen2.5-7B",
    "lengths": "7K to 1.75M tokens",
    "speed": "up to 6x faster than MemAgent",
    "memory": "up to 2x less peak GPU memory than MemAgent",
    "ratio": "best ratio 4: matches 2, far better than 16",
    "gate": "reads only what it lets through",
    "bank dtype": "-",
    "notes": "best working memory 1,024 tokens",
    "samples": "latency of 128 samples",
    "compressor": "frozen: converges sooner and lower; end to end: noisier, ends higher",
    "crossover": "-",
}


def by_length(
    cells: Sequence[Cell], plan: Plan, method: str, own: int, gate: str = "auto"
) -> dict[int, Cell]:
    """Cells of a method by length; ours at the model's own ratio and bank dtype."""
    wanted = (own, "auto", gate) if method == OURS else (None, None, None)
    return {
        cell["length"]: cell
        for cell in cells
        if cell["method"] == method
        and (cell["ratio"], cell["bank_dtype"], cell["gate"]) == wanted
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
    own, cells = report["own_ratio"], report["cells"]
    ours, every = (by_length(cells, plan, OURS, own, gate) for gate in ("auto", "off"))
    agent, full = (by_length(cells, plan, name, own) for name in ("memagent", "full_context"))
    here = {
        "model": f"{report['parameters'] / 1e6:.1f}M parameters",
        "lengths": ", ".join(f"{n:,}: {percent(cell)}" for n, cell in sorted(ours.items())),
        "speed": f"from nothing {best(factors(ours, agent, 'answer_seconds'))}; with the bank at "
        f"hand {best(factors(ours, agent, 'ask_seconds'))}; processors' time, all questions of a "
        f"text together, {best(factors(ours, agent, 'processor_seconds'))}",
        "memory": best(factors(ours, agent, "peak_bytes")),
        "ratio": compare_settings(cells, plan, "ratio", plan.ratios),
        "gate": compare_gates(ours, every),
        "bank dtype": compare_settings(cells, plan, "bank_dtype", plan.bank_dtypes),
        "notes": f"notes of at most {report['notes']} tokens; not varied",
        "samples": f"{plan.questions} questions at each length, {plan.peer_questions} of other "
        "methods",
        "compressor": compare_curves(report["curves"], report["curves_of"]),
        "crossover": f"faster than full context {since(ours, full, 'answer_seconds')}, smaller "
        f"{since(ours, full, 'peak_bytes')}",
    }
    return [{"what": name, "paper": PAPER[name], "here": here[name]} for name in PAPER]


def compare_settings(
    cells: Sequence[Cell], plan: Plan, field: str, values: Sequence[str | int]
) -> str:
    """Scores of ours by a setting, with the gate and without it."""
    parts = []
    for gate, title in (("auto", ""), ("off", "; without the gate ")):
        found = [
            f"{cell[field]}: {percent(cell)}"
            for cell in sorted(cells, key=lambda cell: cell["ratio"] or 0)
            if cell["length"] == plan.setting_length
            and cell["gate"] == gate
            and cell[field] in values
            and (field == "bank_dtype" or cell["bank_dtype"] == "auto")
        ]
        if found:
            parts.append(title + ", ".join(found))
    return f"at {plan.setting_length:,} tokens {''.join(parts)}" if parts else "not run"


def compare_gates(ours: dict[int, Cell], every: dict[int, Cell]) -> str:
    """What the gate reads and saves on the longest text."""
    if not (lengths := ours.keys() & every.keys()):
        return "not run"
    length = max(lengths)
    gated, whole = ours[length], every[length]
    slower = whole["ask_seconds"] / gated["ask_seconds"] if gated["ask_seconds"] else 1.0
    return (
        f"at {length:,} tokens {gated['chunks_read']:.1f} of {gated['chunks']:.1f} chunks read, "
        f"{percent(gated)}; all of them: {percent(whole)}, {slower:.2f}x the time"
    )


def percent(cell: Cell) -> str:
    low, high = cell["interval_95"]
    return f"{100 * cell['score']:.0f}% ({100 * low:.0f} to {100 * high:.0f})"


def share_of_processors(cells: Sequence[Cell], threads: int) -> float:
    """How much of the time the threads had processors to run on."""
    used = sum(cell["processor_seconds"] * cell["texts"] for cell in cells)
    taken = sum(
        cell["build_seconds"] * cell["texts"] + cell["ask_seconds"] * cell["questions"]
        for cell in cells
    )
    return used / (taken * threads) if taken else 1.0


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


def compare_curves(curves: dict[str, list[plots.Points]], label: str) -> str:
    """The mean over runs of each one's last values, frozen and trained."""
    ends = {}
    for name, runs in curves.items():
        tails = [points[-max(1, int(len(points) * LAST_SHARE)) :] for points in runs]
        if tails:
            ends[name] = [fmean(value for _, value in tail) for tail in tails]
    if not ends:
        return "no training runs given"
    return f"{label}: " + "; ".join(
        f"{name} ends at {fmean(values):.3f} ({len(values)} runs)" for name, values in ends.items()
    )
