# SPDX-License-Identifier: Apache-2.0
"""The paper's figures at a small scale: what is run, drawn and reported."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lychee.documents import read_file
from lychee.errors import InputError
from lychee.eval import plots
from lychee.eval.comparison import compare, share_of_processors
from lychee.eval.harness import Load, Progress, Setting, check_settings, run
from lychee.eval.methods import OURS, known_methods
from lychee.eval.records import CellKey, RecordFile, cell_key, replace_file
from lychee.eval.report import Cell, Table, machine
from lychee.eval.tasks import TaskCell
from lychee.memory_model import LycheeMemory

FULL_CONTEXT = "full_context"
# Of a question, its answer and what stands around them, beside the longest text.
SPARE_POSITIONS = 16384
# Share of the processors below which times are those of a busy machine.
BUSY = 0.8
# Kinds of runs in benchmarks/results/rl-curves.json.
KINDS = {"frozen": "frozen", "end-to-end": "trained"}

# Cells of lengths, each with so many questions.
MakeCells = Callable[[Sequence[int], int], list[TaskCell]]
Run = tuple[Setting, TaskCell]


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        lengths: tokens, for accuracy, latency and memory of all methods.
        ratios, bank_dtypes: for accuracy at `setting_length`.
        questions: at each length; other methods are asked `peer_questions`.
        longest_full_context: tokens beyond which full context is not run.
        frozen, trained: metric files of training runs (JSON lines with `step` and `field`), one
            per seed, with the compressor frozen and trained.
        curves: file of both kinds of runs, as benchmarks/reinforcement.py writes it; where neither
            `frozen` nor `trained` are given.
    """

    task: str
    lengths: tuple[int, ...]
    ratios: tuple[int, ...]
    bank_dtypes: tuple[str, ...]
    setting_length: int
    questions: int
    peer_questions: int
    longest_full_context: int
    seed: int = 0
    frozen: tuple[Path, ...] = ()
    trained: tuple[Path, ...] = ()
    field: str = "reward"
    curves: Path | None = None


def reproduce(
    plan: Plan,
    make_cells: MakeCells,
    load: Load,
    out: Path,
    shared: dict[str, Any],
    progress: Progress,
    *,
    command: str,
    draw: bool = True,
) -> dict[str, Any]:
    """Run what has no record in `out` yet, and write reproduce.json, report.md and plots there.

    `command` is what was called, for both reports.

    Short texts come first. The report is written after every cell, so that it is there, of what is
    finished, when a run is interrupted; the plots are drawn then as well.
    """
    if draw:
        plots.load_matplotlib()
    curves, label = read_curves(plan)
    model = load(None)
    runs = runs_of(plan, make_cells, model.gate is not None)
    check_settings([setting for setting, _ in runs], model)
    records = RecordFile(out, shared)
    peer = with_positions(model, max(plan.lengths) + SPARE_POSITIONS)
    report = {
        "command": command,
        "settings": shared | json.loads(json.dumps(asdict(plan), default=str)),
        "machine": machine(),
        "parameters": sum(weight.numel() for weight in model.decoder.parameters()),
        "positions": model.decoder.config.max_position_embeddings,
        "notes": model.memory.size,
        "own_ratio": model.memory.ratio,
        "curves": curves,
        "curves_of": label,
    }
    found: dict[CellKey, Cell] = {}
    total, done = sum(cell.questions for _, cell in runs), 0
    try:
        for setting, cell in runs:

            def report_progress(asked: int, _: int, before: int = done) -> None:
                progress(before + asked, total)

            chosen = load if setting.method == OURS else lambda _: peer
            for result in run([cell], [setting], chosen, records, progress=report_progress):
                found[cell_key(result)] = result
            done += cell.questions
            write(report, plan, found, f"{done:,} of {total:,}", [], out)
    finally:
        drawn = draw_figures(report, plan, out) if draw and found else []
        if found:
            write(report, plan, found, f"{done:,} of {total:,}", drawn, out)
    return report


def runs_of(plan: Plan, make_cells: MakeCells, gated: bool) -> list[Run]:
    """Every method at every length, then ours by ratio and bank dtype, the shortest texts first.

    With a gate, ours is run without it as well.
    """
    lengths = sorted({*plan.lengths, plan.setting_length})
    ours = {cell.length: cell for cell in make_cells(lengths, plan.questions)}
    others = make_cells(sorted(plan.lengths), plan.peer_questions)
    gates = ["auto", "off"] if gated else ["auto"]
    runs = [(Setting(gate=gate), ours[n]) for n in plan.lengths for gate in gates]
    for name in known_methods():
        for cell in others:
            if name != OURS and (name != FULL_CONTEXT or cell.length <= plan.longest_full_context):
                runs.append((Setting(name), cell))
    settings = [Setting(ratio=ratio, gate=gate) for ratio in plan.ratios for gate in gates]
    settings += [Setting(bank_dtype=dtype) for dtype in plan.bank_dtypes]
    runs += [(setting, ours[plan.setting_length]) for setting in settings]
    return sorted(runs, key=lambda pair: pair[1].length)


def with_positions(model: LycheeMemory, positions: int) -> LycheeMemory:
    """The same weights, allowed longer prompts: time and memory do not ask what was trained."""
    decoder = copy.copy(model.decoder)
    if decoder.config.max_position_embeddings < positions:
        decoder.config = replace(decoder.config, max_position_embeddings=positions)
    return LycheeMemory(decoder, model.tokenizer, model.raw_config, model.memory)


def read_curves(plan: Plan) -> tuple[dict[str, list[plots.Points]], str]:
    """Curves of training with the compressor frozen and trained, and what they show."""
    if plan.frozen or plan.trained or plan.curves is None:
        given = {"frozen": plan.frozen, "trained": plan.trained}
        return {n: [read_curve(p, plan.field) for p in paths] for n, paths in given.items()}, (
            plan.field
        )
    curves: dict[str, list[plots.Points]] = {name: [] for name in KINDS.values()}
    try:
        for found in json.loads(read_file(plan.curves).text)["runs"]:
            if found["kind"] in KINDS:
                points = [(line["step"], line["accuracy"]) for line in found["evaluations"]]
                curves[KINDS[found["kind"]]].append(points)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{plan.curves}: expected runs with evaluations, as benchmarks/reinforcement.py writes "
            f"them, got: {error!r}"
        ) from error
    return curves, "accuracy on held-out texts"


def read_curve(path: Path, field: str) -> plots.Points:
    """(step, value) of a training run's metrics; lines without the field are passed."""
    points = []
    for number, line in enumerate(read_file(path).text.splitlines(), 1):
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


def draw_figures(report: dict[str, Any], plan: Plan, out: Path) -> list[Path]:
    """Everything by length, accuracy by ratio and bank dtype, and training curves if there are."""
    cells, own = report["cells"], report["own_ratio"]
    by_length = [
        cell
        for cell in cells
        if cell["ratio"] in (None, own)
        and cell["bank_dtype"] in (None, "auto")
        and cell["length"] in plan.lengths
    ]
    here = [c for c in cells if c["method"] == OURS and c["length"] == plan.setting_length]
    ratios = [c for c in here if c["bank_dtype"] == "auto" and c["ratio"] in plan.ratios]
    banks = [c for c in here if c["bank_dtype"] in plan.bank_dtypes]
    drawn = plots.draw_all(by_length, out)
    drawn += plots.draw_all(ratios, out, ["accuracy_by_ratio"])
    drawn += plots.draw_all(banks, out, ["accuracy_by_bank"])
    if any(report["curves"].values()):
        drawn.append(out / "training.png")
        plots.draw_curves(report["curves"], "step", report["curves_of"], drawn[-1])
    return drawn


def write(
    report: dict[str, Any],
    plan: Plan,
    found: dict[CellKey, Cell],
    asked: str,
    drawn: Sequence[Path],
    out: Path,
) -> None:
    """reproduce.json and report.md of the cells found so far."""
    report["cells"], report["asked"] = list(found.values()), asked
    report["comparison"] = compare(report, plan)
    replace_file(out / "reproduce.json", json.dumps(report, indent=1) + "\n")
    replace_file(out / "report.md", write_report(report, plan, drawn))


def write_report(report: dict[str, Any], plan: Plan, drawn: Sequence[Path]) -> str:
    """Markdown: the comparison, what differs from the paper, all cells, and the plots."""
    share = share_of_processors(report["cells"], report["machine"]["threads"])
    table = Table(["method", "bank_dtype", "gate"], [], ["score"])
    baselines = ", ".join(name for name in known_methods() if name != OURS) or "no other method"
    books = ", ".join(report["settings"]["files"]) or "the novel that comes with the project"
    lines = [
        "# The paper's figures at a small scale",
        "",
        f"    {report['command']}",
        "",
        "| | paper | here |\n|---|---|---|",
        *(f"| {row['what']} | {row['paper']} | {row['here']} |" for row in report["comparison"]),
        "",
        f"What differs: the model ({report['parameters'] / 1e6:.1f}M parameters, not 7B), the data "
        f"(generated questions of the task {plan.task} in {books}, instead of RULER-HQA), the "
        f"hardware ({report['machine']['device']}, {report['machine']['threads']} threads, torch "
        f"{report['machine']['torch']}, commit {report['machine']['commit']}), and the lengths.",
        "",
        f"Compared with ours: {baselines}, on the same weights. These were trained to read "
        "compressed memory and not raw text, and other methods may use positions beyond the "
        f"{report['positions']:,} of the model: their accuracy says nothing about them, only their "
        f"time and memory do. Full context is run up to {plan.longest_full_context:,} tokens. "
        "Questions about one text are asked together, and share its time. Peak memory is what was "
        "in use above what was before.",
        "",
        f"The processors were this run's for {share:.0%} of its time"
        f"{'; other processes had the rest, and the seconds tell little' if share < BUSY else ''}.",
        "",
        f"Asked so far: {report['asked']} questions. The same call goes on where one was stopped.",
        "",
        table.header,
        *map(table.row, report["cells"]),
        "",
        *(f"![{path.stem}]({path.name})" for path in drawn),
    ]
    return "\n".join(lines).rstrip() + "\n"
