# SPDX-License-Identifier: Apache-2.0
"""`lychee estimate` and `lychee doctor`: what a bank will take, and what this machine has."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lychee.cli import leaving_at_once
from lychee.commands.apps import AsJson, app
from lychee.quantities import as_size

FAILED = 1
MOST_TOKENS = 10**12


@app.command()
def estimate(
    tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Length of all texts.")],
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Model folder, of which config.json is enough."),
    ] = None,
    ratio: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Repeatable; else 2, 4, 8 and 16.")
    ] = None,
    bank_dtype: Annotated[
        list[str] | None, typer.Option(metavar="DTYPE", help="Repeatable; else all of them.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: float32, float16 or bfloat16.")
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Say how many bytes a bank will have, and what building and asking it take at their peak."""
    with leaving_at_once():
        import torch  # noqa: F401
    from lychee.estimate import PARTS, estimate_bank

    found = estimate_bank(model, tokens, ratio, bank_dtype, dtype)
    if as_json:
        print(json.dumps(asdict(found)))
        return
    print(
        f"{found.tokens:,} tokens, {found.parameters:,} parameters in {found.dtype} on "
        f"{found.device}: {as_size(found.weight_bytes)}; windows of {found.window}, chunks of "
        f"{found.chunk} tokens"
    )
    print(
        f"{'ratio':>5}  {'bank dtype':10}  {'bank':>9}  {'build':>9}  {'ask':>9}  {'from disk':>9}"
    )
    for row in found.rows:
        sizes = (row.bank_bytes, row.build_peak_bytes, row.ask_peak_bytes, row.disk_peak_bytes)
        cells = "  ".join(f"{as_size(size):>9}" for size in sizes)
        print(f"{row.ratio:>5}  {row.bank_dtype:10}  {cells}")
    for name, meaning in PARTS.items():
        print(f"{name}: {meaning}")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine and installation have, and how to mend what is missing.

    Exit code 1 if something is missing that commands cannot do without.
    """
    from lychee.doctor import examine

    with leaving_at_once():
        report = examine()
    if as_json:
        print(json.dumps(report))
    else:
        print_report(report)
    if report["problems"]:
        raise typer.Exit(FAILED)


def print_report(report: dict[str, Any]) -> None:
    machine, torch, kernels = report["machine"], report["torch"], report["kernels"]
    versions = (f"{n} {v or '(none)'}" for n, v in report["versions"].items())
    memory = "" if machine["memory_bytes"] is None else f", {as_size(machine['memory_bytes'])}"
    rows = {
        "versions": ", ".join(versions),
        "python": machine["python"],
        "system": machine["system"],
        "processor": f"{machine['processor']}, {machine['cores_usable']} of {machine['cores']} "
        f"cores{memory}",
    }
    if torch is not None:
        rows["torch"] = f"{torch['threads']} threads, CUDA {torch['cuda'] or '(none)'}"
        rows["torch in"] = torch["folder"]
    rows["kernels"] = f"{kernels['isa'] or '(none)'}, LYCHEE_BACKEND={kernels['requested']}"
    rows["libraries"] = "\n".join(kernels["libraries"]) or "(none)"
    for device, backends in kernels["backends"].items():
        by_backend: dict[str, list[str]] = {}
        for op, backend in backends.items():
            by_backend.setdefault(backend, []).append(op)
        rows[f"ops on {device}"] = "\n".join(
            f"{backend}: {', '.join(ops)}" for backend, ops in by_backend.items()
        )
    gpu = report["gpu"]
    rows["GPU"] = "\n".join(gpu["devices"]) or "(none)"
    if gpu["driver"]:
        rows["driver"] = "\n".join(gpu["driver"])
    rows["nvcc"] = gpu["nvcc"] or "(none)"
    rows["model"] = report["model"]["folder"]
    for name, value in rows.items():
        for index, line in enumerate(value.split("\n")):
            print(f"{'' if index else name:12} {line}")
    for kind in ("problems", "hints"):
        for entry in report[kind]:
            print(f"{kind[:-1]:12} {entry['what']}\n{'':12} mend it with: {entry['fix']}")
    if not report["problems"]:
        print("no problems")
