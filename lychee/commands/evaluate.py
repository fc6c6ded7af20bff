# SPDX-License-Identifier: Apache-2.0
"""`lychee eval TASK`: tasks by lengths by methods, with results that an interrupted run keeps."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import typer

from lychee.commands.apps import AsJson, Dtype, Model, app
from lychee.commands.loading import check_bank_dtype, dtype_name, load_libraries, load_model
from lychee.errors import InputError
from lychee.progress import ProgressDisplay

MOST_TOKENS = 16_777_216
WHOLE = "all"
OPTIONS_OF_OURS = ("ratio", "bank-dtype", "gate-threshold", "no-gate", "compare-gate")
OPTIONS_OF_OURS += ("passes", "together")


def once_each(values: list | None) -> list | None:
    """A repeated value would only repeat rows."""
    return values and list(dict.fromkeys(values))


Lengths = Annotated[
    list[int] | None,
    typer.Option(
        "--length",
        min=64,
        max=MOST_TOKENS,
        metavar="N",
        callback=once_each,
        help="Tokens per text; repeatable.",
    ),
]
Ratios = Annotated[
    list[int] | None,
    typer.Option("--ratio", metavar="N", callback=once_each, help="Of ours; repeatable."),
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        metavar="NAME",
        callback=once_each,
        help="ours, memagent, full_context; repeatable.",
    ),
]


@app.command("eval")
def evaluate(
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK",
            help="needles; ruler or one of its tasks (niah_single_1, vt, ...); multihop or one of "
            "its tasks (hops_2, ...); or a format of files: ruler_hqa, hotpotqa, ruler_file, "
            "longbench, own. Several with commas.",
        ),
    ],
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILE",
            help="Books to hide facts in (else a novel), or the data files of a format.",
        ),
    ] = None,
    length: Lengths = None,
    questions: Annotated[
        int | None, typer.Option(min=1, help="Per length, 100 if not given; or per file, all.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of texts, facts and places.")] = 0,
    split: Annotated[
        str,
        typer.Option(help="Of names and texts: train, validation, test, or all; not of needles."),
    ] = "test",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Difficulty of a task: keys=8."),
    ] = None,
    method: Methods = None,
    ratio: Ratios = None,
    bank_dtype: Annotated[
        list[str] | None,
        typer.Option(metavar="TYPE", callback=once_each, help="Of the bank: int8; repeatable."),
    ] = None,
    gate_threshold: Annotated[
        list[float] | None,
        typer.Option(
            min=0, max=1, metavar="P", callback=once_each, help="Else the model's; repeatable."
        ),
    ] = None,
    no_gate: Annotated[
        bool, typer.Option("--no-gate", help="Read every chunk; beside thresholds, as well.")
    ] = False,
    compare_gate: Annotated[
        bool, typer.Option("--compare-gate", help="With the gate, and without it as well.")
    ] = False,
    notes: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            metavar="N",
            callback=once_each,
            help="Tokens of working memory at most; repeatable.",
        ),
    ] = None,
    passes: Annotated[int | None, typer.Option(min=1, help="Times to go over a bank.")] = None,
    together: Annotated[
        int | None, typer.Option(min=1, help="Chunks that one reading turn takes at most.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", callback=once_each, help="Else the task's; repeatable."),
    ] = None,
    model: Model = None,
    dtype: Dtype = "auto",
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="For records, JSON and table; the same call resumes."),
    ] = None,
    plots: Annotated[bool, typer.Option("--plots", help="Draw them into DIR, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Ask questions whose answers are known, and count the right ones."""
    load_libraries()
    from lychee.data.task import SPLITS
    from lychee.eval import harness, metrics, tasks
    from lychee.eval import plots as drawing
    from lychee.eval.methods import check_methods
    from lychee.eval.records import RecordFile
    from lychee.eval.report import write_results

    if plots and out is None:
        raise InputError("--plots: expected --out DIR to draw into, got none")
    if plots:
        drawing.load_matplotlib()
    if split not in (splits := (*SPLITS, WHOLE)):
        raise InputError(f"split: expected one of {', '.join(splits)}, got {split!r}")
    names, methods = tasks.task_names(task), method or ["ours"]
    check_methods(methods)
    check_used(methods, ratio, bank_dtype, gate_threshold, no_gate, compare_gate, passes, together)
    metrics.check_metrics(metric or [])
    files, difficulty = tuple(dict.fromkeys(files or ())), parse_settings(settings or [])
    request = tasks.Request(files, questions, seed, None if split == WHOLE else split, difficulty)
    load = lru_cache(maxsize=1)(lambda at: load_model(model, at, dtype=dtype))
    gates = gates_of(gate_threshold or [], no_gate, compare_gate)
    for name in (dtypes := bank_dtype or ["auto"]):
        check_bank_dtype(name)
    runs = harness.settings_of(
        methods, ratio or [None], dtypes, gates, passes, together, notes or [None]
    )
    loaded = load(runs[0].ratio)
    harness.check_settings(runs, loaded)
    cells = tasks.task_cells(names, length, request, loaded.tokenizer)
    harness.check_cells(cells, runs, loaded)
    shared = {
        "model": harness.fingerprint(model),
        "dtype": dtype_name(loaded),
        "files": {name: digest_of(file) for file, name in tasks.names_of(files).items()},
        "questions": questions,
        "seed": seed,
        "split": split,
        "difficulty": difficulty,
        "metrics": metric,
        "passes": passes,
        "together": together,
    }
    records = RecordFile(out, shared)
    table = table_of(cells, runs, metric)
    about, found = describe(shared, harness.remarks(runs, loaded)), []
    if not as_json:
        print(table.header, flush=True)
    with ProgressDisplay("Evaluating", "questions") as display:
        for cell in harness.run(cells, runs, load, records, metric or [], display):
            found.append(cell)
            if not as_json:
                print(table.row(cell), flush=True)
            if out is not None:
                write_results(out, about, table, found)
    if plots and not drawing.draw_all(found, out):
        print("no plots: they need two lengths, or two ratios, at least", file=sys.stderr)
    if as_json:
        print(json.dumps(about | {"cells": found}))


def check_used(methods: list[str], *values: Any) -> None:
    """Raise InputError for an option of ours that has a value where ours is not asked."""
    for name, value in zip(OPTIONS_OF_OURS, values, strict=True):
        if value and "ours" not in methods:
            raise InputError(
                f"--{name}: expected with --method ours, got it with {', '.join(methods)}"
            )


def describe(settings: dict[str, Any], remarks: list[str]) -> dict[str, Any]:
    """What results say of their run; the remarks are said at once, too."""
    for remark in remarks:
        print(remark, file=sys.stderr)
    command = shlex.join(["lychee", *sys.argv[1:]])
    return {"command": command, "settings": settings, "remarks": remarks}


def gates_of(thresholds: list[float], no_gate: bool, compare: bool) -> list[str]:
    """As `Setting` names them: the model's own where nothing else is asked for."""
    gates = [str(threshold) for threshold in thresholds]
    if compare or not no_gate:
        gates = gates or ["auto"]
    return gates + ["off"] * (no_gate or compare)


def table_of(cells: list, runs: list, metric: list[str] | None) -> Any:
    """A table with a column for each field that differs between rows."""
    from lychee.eval.records import CELL
    from lychee.eval.report import Table

    return Table(
        [name for name in CELL if varies(name, cells, runs)],
        dict.fromkeys(name for cell in cells for name in cell.breakdown),
        metric or [cells[0].metric if len({cell.metric for cell in cells}) == 1 else "score"],
    )


def varies(name: str, cells: list, runs: list) -> bool:
    """Whether a field of cells or settings has several values."""
    owners = cells if hasattr(cells[0], name) else runs
    return len({getattr(owner, name) for owner in owners}) > 1


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs, each value a number, true, false or text."""
    found: dict[str, Any] = {}
    for pair in settings:
        name, equals, value = pair.partition("=")
        if not equals or not name or not value:
            raise InputError(f"--set: expected NAME=VALUE, got {pair!r}")
        if name in found:
            raise InputError(f"--set: {name}: expected one value, got several")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def digest_of(path: Path) -> str:
    """Changes with what a file, or a folder's books, hold."""
    from lychee.data.filler import book_files

    digest = hashlib.sha256()
    for file in book_files([path]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
