# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark program on the CPU, and what gpu_check.sh makes of parts that pass and fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Stands in for the tools: notes its arguments, and fails where it is told to.
TOOL = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in *"$FAILING"*) exit 3 ;; esac
"""


def clean_environment():
    return {name: value for name, value in os.environ.items() if not name.startswith("LYCHEE_")}


def test_benchmark_program_writes_records_and_a_table(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", str(tmp_path), "--device", "cpu", "--tiny"]
    result = subprocess.run(
        [*command, "--only", "gather_chunks", "--no-compile"], cwd=ROOT, capture_output=True,
        env=clean_environment() | {"PYTHONPATH": str(ROOT)}, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(records) == 2
    for record in records:
        assert record["op"] == "gather_chunks" and record["eager"].keys() == {"ours", "eager"}
        assert record["share"] > 0 and record["ratio"]["eager"] > 0 and not record["graph"]
    lines = (tmp_path / "table.md").read_text().splitlines()
    cells = [line.count("|") for line in lines if line.startswith("|")]
    assert len(cells) == 2 + len(records) and len(set(cells)) == 1


def check(folder, failing="nothing"):
    """Runs the script with stand-ins; returns its exit code, its summary, and Python's calls."""
    tools = folder / "bin"
    tools.mkdir()
    for name in ("python", "nvidia-smi", "nvcc", "compute-sanitizer"):
        (tools / name).write_text(TOOL)
        (tools / name).chmod(0o755)
    environment = clean_environment() | {
        "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": "python", "FAILING": failing,
        "CALLS": str(folder / "calls"),
    }  # fmt: skip
    result = subprocess.run(
        ["bash", str(ROOT / "benchmarks/gpu_check.sh"), str(folder / "out")], env=environment,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    summary = (folder / "out/summary.txt").read_text()
    return result.returncode, summary, (folder / "calls").read_text()


def test_script_runs_every_part(tmp_path):
    code, summary, calls = check(tmp_path)
    assert code == 0, summary
    for part in ("build", "tests", "memcheck", "racecheck", "triton_tests", "benchmarks"):
        assert f"{part}: passed" in summary
        assert (tmp_path / "out" / f"{part}.log").exists()
    assert "build_ext --inplace" in calls and "benchmarks/gpu.py" in calls
    assert "--tool memcheck" in calls and "--tool racecheck" in calls


@pytest.mark.parametrize(
    ("failing", "part"),
    [
        ("-n 8 -k cuda", "tests"),
        ("racecheck", "racecheck"),
        ("triton and", "triton_tests"),
        ("gpu.py", "benchmarks"),
    ],
)
def test_script_goes_on_after_a_failure_and_reports_it(tmp_path, failing, part):
    code, summary, _ = check(tmp_path, failing)
    assert code == 1
    assert f"{part}: failed with status" in summary
    assert summary.count(": passed") == 5


def test_script_says_what_is_missing(tmp_path):
    code, summary, calls = check(tmp_path, "import pytest")
    assert code == 1
    assert "missing: pytest" in summary and "left out, there is no pytest" in summary
    assert "benchmarks: passed" in summary and "memcheck" not in calls
