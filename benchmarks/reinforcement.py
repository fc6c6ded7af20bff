# SPDX-License-Identifier: Apache-2.0
"""End-to-end reinforcement learning against a frozen compressor and against more supervision.

    python benchmarks/reinforcement.py base OUT
    python benchmarks/reinforcement.py end-to-end OUT --seed 0     also: frozen, supervised
    python benchmarks/reinforcement.py exam OUT
    python benchmarks/reinforcement.py report OUT

Every part goes on from its last checkpoint in OUT. `exam` asks every run's last weights more
held-out questions than the evaluations on the way do. `report` writes results/rl-curves.json, and
rl-curves.png where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import subprocess
import time
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
# Evaluations at the end of a run whose mean counts as its accuracy.
AVERAGED = 3
# Held-out texts of the exam, four questions each.
EXAM_TEXTS = 128


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


def supervise(out: Path, seed: int) -> None:
    """The base's training goes on, with the evaluations of reinforcement learning."""
    folder = out / f"supervised-{seed}"
    recipe = replace(PretrainRecipe.load(RECIPES / "sft.toml"), seed=seed + 1)
    start = out / "base" / "model"
    run = Pretraining(recipe, folder, books=out / "books", start=start)
    rules = ReinforcementRecipe.load(RECIPES / "rl.toml")
    judge = Reinforcement(rules, folder, books=out / "books", start=start)
    judge.decoder = run.decoder
    if run.state_path.exists():
        run.resume()
    while run.step <= recipe.total_steps:
        if run.step % SUPERVISED_STEPS == 0:
            judge.seconds = run.seconds
            judge.evaluate(run.step)
            run.save()
        if run.step == recipe.total_steps:
            return
        started = time.monotonic()
        run.train_step()
        run.step, run.seconds = run.step + 1, run.seconds + time.monotonic() - started


def exam(out: Path) -> None:
    """Greedy accuracy of every run, written to exam.json in its folder."""
    rules = ReinforcementRecipe.load(RECIPES / "rl.toml")
    for folder in [out / "base", *sorted(path.parent for path in out.glob("*-*/state.pt"))]:
        frozen = folder.name.startswith("frozen")
        changes = {"evaluated_texts": EXAM_TEXTS, "freeze_compressor": frozen}
        run = Reinforcement(
            replace(rules, **changes),
            out / "exam",
            books=out / "books",
            start=out / "base" / "model",
        )
        state = torch.load(folder / "state.pt", weights_only=True)
        with torch.no_grad():
            for name, parameter in run.modules.named_parameters():
                if name in state["weights"]:
                    parameter.copy_(state["weights"][name])
        result = {"step": state["step"], "accuracy": run.evaluate(state["step"])}
        result["questions"] = sum(len(batch.questions) for batch in run.exam)
        (folder / "exam.json").write_text(json.dumps(result))
        print(folder.name, json.dumps(result), flush=True)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def report(out: Path) -> None:
    """Write the curves of every run in `out`, those of reinforcement cut to equal steps."""
    runs = []
    for folder in sorted(path.parent for path in out.glob("*-*/state.pt")):
        kind, _, seed = folder.name.rpartition("-")
        lines = {line["step"]: line for line in read_lines(folder / "evaluations.jsonl")}
        metrics, exam_path = folder / "metrics.jsonl", folder / "exam.json"
        run = {"kind": kind, "seed": int(seed), "evaluations": list(lines.values())}
        run["exam"] = json.loads(exam_path.read_text()) if exam_path.exists() else None
        runs.append(run | {"metrics": read_lines(metrics) if metrics.exists() else []})
    reinforced = [run for run in runs if run["kind"] != "supervised"]
    last = min(run["evaluations"][-1]["step"] for run in reinforced)
    for run in reinforced:
        for name in ("evaluations", "metrics"):
            run[name] = [line for line in run[name] if line["step"] <= last]
    for run in runs:
        ends = [line["accuracy"] for line in run["evaluations"][-AVERAGED:]]
        run["last_accuracy"] = statistics.mean(ends)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True
    )
    result = {
        "command": "python benchmarks/reinforcement.py report OUT",
        "commit": commit.stdout.strip(),
        "machine": machine() | {"note": "one core, shared with other work: times are upper bounds"},
        "steps": last,
        "last_accuracy": f"mean of a run's last {AVERAGED} evaluations",
        "summary": summary(runs),
        "runs": runs,
    }
    (RESULTS / "rl-curves.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"steps": last} | result["summary"], indent=1))
    draw(result, RESULTS / "rl-curves.png")


def summary(runs: list[dict]) -> dict:
    """Mean and range over seeds by kind: the last accuracies, and the reward of late rollouts."""
    found = {}
    for kind in KINDS:
        chosen = [run for run in runs if run["kind"] == kind]
        ends = [run["last_accuracy"] for run in chosen]
        if not ends:
            continue
        found[kind] = {"mean": statistics.mean(ends), "least": min(ends), "most": max(ends)}
        late = [line["reward"] for run in chosen for line in run["metrics"][-AVERAGED:]]
        exams = [run["exam"]["accuracy"] for run in chosen if run["exam"]]
        if exams:
            found[kind]["exam"] = statistics.mean(exams)
        if late:
            found[kind]["rollout_reward"] = statistics.mean(late)
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
    supervised = [run for run in result["runs"] if run["kind"] == "supervised"]
    if supervised:
        steps = min(run["evaluations"][-1]["step"] for run in supervised)
        mean = result["summary"]["supervised"]["mean"]
        label = f"{steps} steps of supervised training"
        axis.axhline(mean, color="tab:gray", linestyle="--", label=label)
    axis.set_xlabel("steps of reinforcement learning")
    axis.set_ylabel("greedy accuracy on held-out texts")
    axis.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["base", *KINDS, "exam", "report"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.part == "base":
        make_base(options.out)
    elif options.part == "supervised":
        supervise(options.out, options.seed)
    elif options.part == "exam":
        exam(options.out)
    elif options.part == "report":
        report(options.out)
    else:
        reinforce(options.out, options.part, options.seed)


if __name__ == "__main__":
    main()
