# SPDX-License-Identifier: Apache-2.0
"""`lychee demo`: facts hidden in a long text and asked for."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from lychee.commands.apps import AsJson, Dtype, Model, Ratio, app
from lychee.commands.loading import describe, load_libraries, load_model
from lychee.progress import ProgressDisplay

MOST_DEMO_TOKENS = 16_777_216


@app.command()
def demo(
    tokens: Annotated[
        int, typer.Option(min=1, max=MOST_DEMO_TOKENS, help="Length of the text.")
    ] = 131_072,
    facts: Annotated[int, typer.Option(min=1, max=1000, help="Facts to hide and ask for.")] = 5,
    seed: Annotated[int | None, typer.Option(help="Of facts and places; else drawn.")] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to hide them in; else a novel.")
    ] = None,
    model: Model = None,
    ratio: Ratio = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Hide facts at random places of a long text, then ask for each one."""
    load_libraries()
    import random

    from lychee.demo import ask_for, hide_facts, make_facts, read_book
    from lychee.demo_report import as_dict, print_report

    seed = random.SystemRandom().randrange(1_000_000) if seed is None else seed
    name, book = read_book(text)
    memory_model = load_model(model, ratio, dtype=dtype)
    chosen = make_facts(memory_model, name, book, facts, seed)
    long_text, hidden = hide_facts(memory_model, book, chosen, tokens, seed)
    started = time.perf_counter()
    with ProgressDisplay("Remembering", "tokens") as display:
        bank = memory_model.remember(long_text, progress=display)
    build_seconds = time.perf_counter() - started
    outcomes = []
    for index, (fact, character) in enumerate(hidden):
        with ProgressDisplay(f"Question {index + 1} of {len(hidden)}", "chunks") as display:
            outcomes.append(ask_for(memory_model, bank, fact, character, display))
    setting = describe(memory_model, model) | {"text": name, "seed": seed}
    report = as_dict(setting, bank, build_seconds, outcomes)
    if as_json:
        print(json.dumps(report))
    else:
        print_report(report)
