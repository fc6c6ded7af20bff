# SPDX-License-Identifier: Apache-2.0
"""`lychee doctor` on a whole installation, and on broken ones with the command that mends them."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import lychee_kernels

ROOT = Path(__file__).resolve().parents[2]


def test_whole_installation(invoke):
    result = invoke("doctor")
    assert (result.status, result.errors) == (0, "")
    assert f"torch {torch.__version__}" in result.out
    assert str(ROOT / "lychee_kernels/_C_cpu.so") in result.out
    assert result.out.splitlines()[-1] == "no problems"


def test_report_as_json(answer_of):
    report = answer_of("doctor")
    assert report["versions"]["torch"] == torch.__version__
    assert report["kernels"]["isa"] == lychee_kernels.cpu_isa()
    assert report["kernels"]["backends"]["cpu"] == lychee_kernels.backends()
    assert report["torch"]["cuda_available"] == torch.cuda.is_available()
    assert report["machine"]["memory_bytes"] > 0
    assert report["problems"] == []


@pytest.fixture
def broken(run, tmp_path):
    """Run doctor in a copy of the packages that `change` has broken; its report."""
    for name in ("lychee", "lychee_kernels"):
        left_out = shutil.ignore_patterns("assets", "*.so", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=left_out)
    (tmp_path / "lychee/assets").symlink_to(ROOT / "lychee/assets")
    for library in (ROOT / "lychee_kernels").glob("*.so"):
        (tmp_path / "lychee_kernels" / library.name).symlink_to(library)

    def examine(**environment):
        environment = os.environ | {"PYTHONPATH": str(tmp_path)} | environment
        result = run("doctor", "--json", cwd=tmp_path, env=environment)
        assert result.returncode == 1, result.stderr
        return json.loads(result.stdout)["problems"]

    examine.folder = tmp_path
    return examine


def test_missing_files(broken):
    (broken.folder / "lychee_kernels/_C_cpu.so").unlink()
    (broken.folder / "lychee/assets").unlink()
    library, model = broken()
    assert "lychee_kernels" in library["what"] and "no such file" in library["what"]
    assert library["fix"].startswith("pip install --no-build-isolation")
    missing = f"{broken.folder}/lychee/assets/model: expected config.json"
    assert model["what"].startswith(missing)
    assert "git checkout" in model["fix"]


def test_torch_that_cannot_be_loaded(broken):
    (broken.folder / "torch").mkdir()
    message = "libcudart.so.13: cannot open shared object file"
    (broken.folder / "torch/__init__.py").write_text(f"raise ImportError({message!r})")
    problems = broken()
    assert [problem["what"] for problem in problems] == [f"torch: cannot be imported: {message}"]
    assert "pip install" in problems[0]["fix"]


@pytest.mark.parametrize("name, value", [("LYCHEE_CPU_ISA", "avx1024"), ("LYCHEE_BACKEND", "fast")])
def test_setting_that_nothing_satisfies(broken, name, value):
    problems = broken(**{name: value})
    assert len(problems) == 1
    assert value in problems[0]["what"]
    assert problems[0]["fix"] == f"unset {name}"
