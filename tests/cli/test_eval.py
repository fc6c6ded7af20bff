# SPDX-License-Identifier: Apache-2.0
"""`lychee eval` and `lychee bench reproduce`: tables, files, resuming, and mistakes in one line."""

import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lychee import cli
from lychee.eval import methods

SMALL = ("--length", 256, "--questions", 5)


@pytest.fixture
def run(monkeypatch, capsys):
    """The command in this process: a process of its own would import torch anew for each call."""

    def run_here(*arguments):
        monkeypatch.setattr(sys, "argv", ["lychee", *map(str, arguments)])
        status = cli.run()
        return SimpleNamespace(returncode=status, **capsys.readouterr()._asdict())

    return run_here


@pytest.fixture
def evaluate(run, model_folder):
    return lambda *arguments: run("eval", *arguments, "--model", model_folder)


def test_needles_give_a_table_and_files_and_resume(evaluate, book_file, tmp_path):
    out = tmp_path / "results"
    call = ("needles", book_file, *SMALL, "--ratio", 4, "--ratio", 2, "--out", out)
    first = evaluate(*call)
    assert first.returncode == 0, first.err
    header, _, *rows = first.out.splitlines()
    assert header.startswith("| tokens | ratio | exact | 95% interval | single-key | multi-key |")
    assert [row.split(" | ")[:2] for row in rows] == [["| 256", "4"], ["| 256", "2"]]
    assert all("/5)" in row for row in rows)
    results = json.loads((out / "results.json").read_text())
    assert [cell["questions"] for cell in results["cells"]] == [5, 5]
    assert results["settings"]["files"].keys() == {"book.txt"}
    assert {"threads", "torch", "lychee", "commit"} <= results["machine"].keys()
    table = (out / "table.md").read_text()
    assert first.out in table and table.startswith("    lychee eval needles")
    records = (out / "records.jsonl").read_text()
    assert len(records.splitlines()) == 10
    # The same again asks nothing: not even the times change.
    again = evaluate(*call)
    assert again.out == first.out and (out / "records.jsonl").read_text() == records
    other = evaluate(*call, "--seed", 1)
    assert other.returncode == 2 and other.out.count("\n") == 0
    assert "run.json: seed: expected 0 as in the run that is there, got 1" in other.err


def test_gates_and_sizes_of_notes_beside_each_other(evaluate, book_file):
    done = evaluate(
        "needles", book_file, *SMALL, "--compare-gate", "--notes", 2, "--notes", 20, "--json"
    )
    assert done.returncode == 0, done.err
    cells = json.loads(done.out)["cells"]
    found = [(cell["gate"], cell["notes"]) for cell in cells]
    assert found == [("auto", 2), ("auto", 20), ("off", 2), ("off", 20)]


def test_repeated_values_are_one(evaluate, book_file):
    twice = ("--ratio", 4, "--ratio", 4, "--metric", "f1", "--metric", "f1", "--length", 256)
    done = evaluate("needles", book_file, *SMALL, *twice, "--json")
    assert done.returncode == 0, done.err
    (cell,) = json.loads(done.out)["cells"]
    assert list(cell["metrics"]) == ["f1"]


def test_a_long_question_stops_a_file_before_its_first_record(evaluate, text, tmp_path):
    path, out = tmp_path / "own.jsonl", tmp_path / "out"
    record = {"context": text[:500], "question": "what", "answers": ["nothing"]}
    long = record | {"question": "what " * 3000}
    path.write_text(f"{json.dumps(record)}\n{json.dumps(long)}\n")
    done = evaluate("own", path, "--out", out)
    assert done.returncode == 2 and "line 2: question: expected at most" in done.err
    assert done.out == "" and not out.exists()


def test_texts_beyond_the_positions_are_refused_before_shorter_ones_are_read(evaluate, book_file):
    methods = ("--method", "ours", "--method", "full_context")
    done = evaluate("needles", book_file, *SMALL, *methods, "--length", 65536)
    assert done.returncode == 2 and done.out == ""
    assert "65536 tokens: full_context: text: expected at most " in done.err


def test_dtype_of_the_weights(evaluate, book_file, tmp_path):
    """Results say it, and a folder of records keeps to one."""
    call = ("needles", book_file, *SMALL, "--json", "--out", tmp_path / "results")
    whole, half = (
        json.loads(evaluate(*call, *more).out)
        for more in ((), ("--dtype", "bfloat16", "--out", tmp_path / "half"))
    )
    assert [found["settings"]["dtype"] for found in (whole, half)] == ["float32", "bfloat16"]
    sizes = [found["cells"][0]["memory_bytes"] for found in (whole, half)]
    assert sizes[0] == 2 * sizes[1] > 0
    other = evaluate(*call, "--dtype", "bfloat16")
    assert other.returncode == 2 and 'dtype: expected "float32" as in the run' in other.err


def test_tasks_with_settings_as_json(evaluate, book_file):
    done = evaluate(
        "vt,niah_multikey_1,hops_2",
        book_file,
        *SMALL,
        "--split",
        "train",
        "--json",
        "--metric",
        "f1",
    )
    assert done.returncode == 0, done.err
    report = json.loads(done.out)
    tasks = [(cell["task"], cell["metric"], cell["questions"]) for cell in report["cells"]]
    assert tasks == [(task, "f1", 5) for task in ("vt", "niah_multikey_1", "hops_2")]
    done = evaluate("vt", book_file, *SMALL, "--split", "all", "--set", "hops=2", "--json")
    assert json.loads(done.out)["settings"]["difficulty"] == {"hops": 2}


def test_a_file_of_ones_own(evaluate, text, tmp_path):
    path = tmp_path / "own.jsonl"
    record = {"context": text[:1500], "question": "what is there", "answers": ["nothing"]}
    path.write_text(f"{json.dumps(record)}\n{json.dumps(record | {'metric': 'f1'})}\n")
    done = evaluate("own", path, "--method", "ours", "--method", "memagent")
    assert done.returncode == 0, done.err
    header, _, *rows = done.out.splitlines()
    assert header.startswith("| method | tokens | ratio | score |")
    assert [row.split(" | ")[0] for row in rows] == ["| ours", "| memagent"]
    # RULER's files all have one name, and stand in folders.
    other = tmp_path / "other" / path.name
    other.parent.mkdir()
    other.write_text(json.dumps(record | {"context": text[:500]}))
    done = evaluate("own", path, other, other, "--json")
    report = json.loads(done.out)
    assert [(c["source"], c["questions"]) for c in report["cells"]] == [
        (str(path), 2),
        (str(other), 1),
    ]
    assert len(set(report["settings"]["files"].values())) == 2
    path.write_text(f"{json.dumps(record)}\n{{}}\n")
    done = evaluate("own", path)
    assert done.returncode == 2 and "own.jsonl: line 2: expected the field context" in done.err


def test_a_published_format_runs_with_every_method(evaluate):
    path = Path(__file__).parents[1] / "data" / "ruler_hqa.json"
    methods = ("ours", "memagent", "full_context")
    done = evaluate("ruler_hqa", path, *(f"--method={name}" for name in methods), "--json")
    assert done.returncode == 0, done.err
    cells = json.loads(done.out)["cells"]
    assert [(c["method"], c["questions"], c["metric"]) for c in cells] == [
        (name, 2, "sub_em") for name in methods
    ]


def test_memagents_shorter_sections_are_said(run):
    """The shipped model's positions do not hold its 5,000 tokens."""
    done = run("eval", "needles", *SMALL, "--method", "memagent", "--json")
    (remark,) = json.loads(done.out)["remarks"]
    assert re.match(r"memagent reads sections of 3,\d+ tokens in the place of 5,000", remark)
    assert remark in done.err
    assert json.loads(run("eval", "needles", *SMALL, "--json").out)["remarks"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("niah",), "task: expected one of ruler, multihop, needles, niah_single_1, "),
        (("vt", "--metric", "bleu"), "metric: expected one of exact_match, "),
        (("vt", "--method", "magic"), "method: expected one of ours, "),
        (("vt", "--set", "hops"), "--set: expected NAME=VALUE, got 'hops'"),
        (("vt", "--set", "hops=2", "--set", "hops=3"), "--set: hops: expected one value"),
        (("vt", "--method", "memagent", "--passes", "2"), "--passes: expected with --method ours"),
        (("vt", "--set", "keys=2"), "vt: expected settings of haystack, chains, hops, shuffled"),
        (("needles", "--set", "keyz=3"), "needles: expected no settings, got keyz"),
        (
            ("vt", "--split", "dev"),
            "split: expected one of train, validation, test, all, got",
        ),
        (("hops_2", "--set", "keys=2"), "hops_2: expected settings of distractors, surnames"),
        (("hops_2", "--split", "all"), "hops_2: split: expected one of train, validation, test"),
        (("own", "missing.jsonl"), "missing.jsonl: expected a text file, got: No such file"),
        (("vt", "--plots"), "--plots: expected --out DIR"),
        (("vt", "--bank-dtype", "int4"), "bank-dtype: expected one of float32, float16, "),
        (("vt", "--dtype", "int8"), "dtype: expected one of float32, bfloat16, float16, got"),
        (("vt", "--ratio", 4, "--ratio", 3), "ratio: expected a divisor of the window of 64"),
        (("vt", "--gate-threshold", 0.5), "gate: expected a model that has one, to set 0.5"),
        (("vt", "--notes", 99999), "notes: expected at most "),
        (("hops_2,vt", "--length", 512, "--length", 64, "--set", "x=1"), "expected settings of"),
        (("vt,niah_multivalue", "--length", 512, "--length", 64), "expected "),
        (("vt", "--length", 10), "Invalid value for '--length': "),
    ],
)
def test_mistakes_are_one_line(evaluate, arguments, message):
    done = evaluate(*arguments)
    assert done.returncode == 2 and done.out == ""
    assert message in done.err and len(done.err.splitlines()) == 1


def test_reproduction_at_its_smallest(run, model_folder, book_file, tmp_path):
    curve = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "reward": step / 20} for step in range(20)]
    curve.write_text("".join(json.dumps(line) + "\n" for line in [{"step": 0}, *lines]))
    out = tmp_path / "out"
    call = ("bench", "reproduce", book_file, "--quick", "--task", "needles", "--trained", curve)
    call += ("--no-plots", "--out", out, "--model", model_folder)
    done = run(*call)
    assert done.returncode == 0, done.err
    report = json.loads((out / "reproduce.json").read_text())
    assert report["command"] == shlex.join(["lychee", *map(str, call)])
    ran = {(cell["method"], cell["length"], cell["ratio"]) for cell in report["cells"]}
    ours = {("ours", length, 4) for length in (512, 1024)} | {("ours", 1024, 16)}
    others = {(name, n, None) for name in ("memagent", "full_context") for n in (512, 1024)}
    assert ran == ours | others
    here = {row["what"]: row["here"] for row in report["comparison"]}
    assert here["compressor"] == "reward: trained ends at 0.925 (1 runs)"
    # Which length is best differs from run to run; both were measured.
    assert re.fullmatch(
        r"from nothing [\d.]+x at [\d,]+ tokens.*; with the bank at hand [\d.]+x at .*",
        here["speed"],
    )
    assert here["ratio"].count("%") == 2 and here["bank dtype"].count("%") == 1
    markdown = (out / "report.md").read_text()
    assert f"    {report['command']}\n" in markdown
    assert done.out == markdown and "| speed | up to 6x faster than MemAgent |" in markdown
    assert run(*call).out == markdown


def test_a_reproduction_is_refused_before_anything_runs(run, model_folder, book_file, tmp_path):
    call = ("bench", "reproduce", book_file, "--quick", "--no-plots", "--ratio", 3)
    done = run(*call, "--out", tmp_path / "out", "--model", model_folder)
    assert done.returncode == 2 and done.out == "" and len(done.err.splitlines()) == 1
    assert "ratio: expected a divisor of the window of 64 tokens, got 3" in done.err
    done = run("bench", "reproduce", tmp_path / "none", "--quick", "--out", tmp_path / "out")
    assert done.returncode == 2 and done.err.startswith(f"lychee: error: {tmp_path / 'none'}: ")
    assert not (tmp_path / "out").exists()


def test_other_methods_are_run_beyond_the_positions_of_the_model(
    run, model_folder, book_file, tmp_path
):
    """Their time and memory do not depend on what was trained."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 700}))
    call = ("bench", "reproduce", book_file, "--quick", "--no-plots", "--ratio", 4)
    done = run(*call, "--out", tmp_path / "out", "--model", folder)
    assert done.returncode == 0, done.err
    assert re.search(r"\| full_context \|.* 1,024 \|", done.out)
    assert "use positions beyond the 700 of the model" in done.out


def test_an_interrupted_reproduction_reports_what_is_finished(
    run, model_folder, book_file, tmp_path, monkeypatch
):
    """Ctrl-C at the third text: whole cells are in the report, and no text is asked again."""
    asked = []
    answer = methods.Ours.answer

    def stopping(self, context, questions):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(context)
        return answer(self, context, questions)

    call = ("bench", "reproduce", book_file, "--quick", "--no-plots", "--out", tmp_path / "out")
    call += ("--model", model_folder)
    with monkeypatch.context() as patch:
        patch.setattr(methods.Ours, "answer", stopping)
        assert run(*call).returncode == 130
    report = json.loads((tmp_path / "out" / "reproduce.json").read_text())
    assert [cell["length"] for cell in report["cells"]] == [512] * 3 and len(asked) == 3
    first = (tmp_path / "out" / "records.jsonl").read_text()
    done = run(*call)
    assert done.returncode == 0, done.err
    assert (tmp_path / "out" / "records.jsonl").read_text().startswith(first)
