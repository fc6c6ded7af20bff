# SPDX-License-Identifier: Apache-2.0
"""End-to-end reinforcement learning against a frozen compressor and against more supervision.

    python benchmarks/reinforcement.py base OUT
    python benchmarks/reinforcement.py end-to-end OUT --seed 0     also: frozen, supervised
    python benchmarks/reinforcement.py report OUT

Every part goes on from its last checkpoint in OUT. `report` answers more held-out questions with
each run's last weights and writes results/rl-curves.json, and rl-curves.png where matplotlib is.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from lychee.eval.report import machine
from lychee.tokenizer import TextTokenizer
from lychee.train.pretrain import Pretraining, PretrainRecipe
from lychee.train.rl import Reinforcement
from lychee.train.rl_recipe import ReinforcementRecipe

HERE = Path(__file__).parent
BOOK = HERE.parent / "lychee" / "assets" / "pride-and-prejudice.txt.gz"
RECIPES, RESULTS = HERE / "rl", HERE / "results"
KINDS = ("supervised", "frozen", "end-to-end")
VOCABULARY = 1536
# Steps of supervised training between two evaluations.
SUPERVISED_STEPS = 50
# Held-out texts of the last evaluation, with four questions each.
FINAL_TEXTS = 256


def make_base(out: Path) -> None:
    """The book, a tokenizer without numbers, and the weak start."""
    books, base = out / "books", out / "base"
    books.mkdir(parents=True, exist_ok=True)
    base.mkdir(exist_ok=True)
    text = gzip.decompress(BOOK.read_bytes()).decode()
    (books / "book.txt").write_text(text, encoding="utf-8")
    if not (base / "tokenizer.json").exists():
        TextTokenizer.train([text], VOCABULARY, number_repeats=0).save(base)
    Pretraining.train(RECIPES / "base.toml", base, books=books, resume=True)


def reinforce(out: Path, kind: str, seed: int) -> None:
    Reinforcement.train(
        RECIPES / "rl.toml",
        out / f"{kind}-{seed}",
        books=out / "books",
        start=out / "base" / "model",
        resume=True,
        seed=seed,
        freeze_compressor=kind == "frozen",
    )


def examiner(out: Path, folder: Path, **changes) -> Reinforcement:
    """A run that only evaluates, into `folder`; its weights are the start's so far."""
    recipe = replace(ReinforcementRecipe.load(RECIPES / "rl.toml"), **changes)
    return Reinforcement(recipe, folder, books=out / "books", start=out / "base" / "model")


def supervise(out: Path, seed: int) -> None:
    """The base's training goes on, with the evaluations of reinforcement learning."""
    folder = out / f"supervised-{seed}"
    recipe = replace(PretrainRecipe.load(RECIPES / "sft.toml"), seed=seed + 1)
    start = out / "base" / "model"
    run = Pretraining(recipe, folder, books=out / "books", start=start)
    exam = examiner(out, folder)
    exam.decoder = run.decoder
    if run.state_path.exists():
        run.resume()
    while run.step <= recipe.total_steps:
        if run.step % SUPERVISED_STEPS == 0:
            exam.seconds = run.seconds
            exam.evaluate(run.step)
            run.save()
        if run.step == recipe.total_steps:
            return
        run.train_step()
        run.step += 1


def final_accuracy(out: Path, folder: Path | None) -> float:
    """Greedy accuracy with the last weights of a run, or the start's, on a larger held-out set."""
    frozen = folder is not None and folder.name.startswith("frozen")
    changes = {"evaluated_texts": FINAL_TEXTS, "freeze_compressor": frozen}
    exam = examiner(out, out / "exam", **changes)
    if folder is not None:
        weights = torch.load(folder / "state.pt", weights_only=True)["weights"]
        with torch.no_grad():
            for name, parameter in exam.modules.named_parameters():
                if name in weights:
                    parameter.copy_(weights[name])
    return exam.evaluate(0)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def report(out: Path) -> None:
    """Write the curves and last accuracies of every run in `out`."""
    runs = []
    for folder in sorted(path.parent for path in out.glob("*-*/state.pt")):
        kind, _, seed = folder.name.rpartition("-")
        curve = {line["step"]: line for line in read_lines(folder / "evaluations.jsonl")}
        metrics = folder / "metrics.jsonl"
        run = {"kind": kind, "seed": int(seed), "final_accuracy": final_accuracy(out, folder)}
        run["evaluations"] = list(curve.values())
        run["metrics"] = read_lines(metrics) if metrics.exists() else []
        runs.append(run)
        print(f"{folder.name}: step {max(curve)}, accuracy {run['final_accuracy']:.3f}", flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True
    )
    result = {
        "command": " ".join(["python benchmarks/reinforcement.py", *sys.argv[1:]]),
        "commit": commit.stdout.strip(),
        "machine": machine() | {"note": "one core, shared with other work: times are upper bounds"},
        "final_questions": 4 * FINAL_TEXTS,
        "start_accuracy": final_accuracy(out, None),
        "runs": runs,
    }
    result["summary"] = summary(runs)
    (RESULTS / "rl-curves.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"start": result["start_accuracy"]} | result["summary"], indent=1))
    draw(result, RESULTS / "rl-curves.png")


def summary(runs: list[dict]) -> dict:
    """Mean and range of the last accuracies by kind."""
    found = {}
    for kind in KINDS:
        values = [run["final_accuracy"] for run in runs if run["kind"] == kind]
        if values:
            mean = statistics.mean(values)
            found[kind] = {"mean": mean, "least": min(values), "most": max(values)}
    return found


def draw(result: dict, path: Path) -> None:
    """Held-out accuracy by step: each seed thin, the mean of the seeds thick."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("matplotlib is not installed: no plot")
        return
    figure, axis = pyplot.subplots(figsize=(6, 4))
    for kind, colour in (("frozen", "tab:orange"), ("end-to-end", "tab:blue")):
        curves = [
            {line["step"]: line["accuracy"] for line in run["evaluations"]}
            for run in result["runs"]
            if run["kind"] == kind
        ]
        for curve in curves:
            axis.plot(list(curve), list(curve.values()), color=colour, alpha=0.3, linewidth=1)
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        means = [statistics.mean(curve[step] for curve in curves) for step in steps]
        axis.plot(steps, means, color=colour, linewidth=2.5, label=kind)
    supervised = result["summary"].get("supervised")
    if supervised:
        label = "supervised for the same time"
        axis.axhline(supervised["mean"], color="tab:gray", linestyle="--", label=label)
    axis.set_xlabel("steps of reinforcement learning")
    axis.set_ylabel("greedy accuracy on held-out texts")
    axis.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["base", *KINDS, "report"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.part == "base":
        make_base(options.out)
    elif options.part == "supervised":
        supervise(options.out, options.seed)
    elif options.part == "report":
        report(options.out)
    else:
        reinforce(options.out, options.part, options.seed)


if __name__ == "__main__":
    main()
