# SPDX-License-Identifier: Apache-2.0
"""`lychee doctor` on a whole installation, and on broken ones with the command that mends them."""

import json
import os
import shutil

import pytest
import torch
from conftest import ROOT

import lychee_kernels


def test_whole_installation(run):
    result = run("doctor")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"torch {torch.__version__}" in result.stdout
    assert str(ROOT / "lychee_kernels/_C_cpu.so") in result.stdout
    assert result.stdout.splitlines()[-1] == "no problems"


def test_report_as_json(run):
    result = run("doctor", "--json")
    assert result.returncode == 0
    report = json.loads(result.stdout)
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
        return json.loads(result.stdout)["problems"], tmp_path

    examine.folder = tmp_path
    return examine


def test_missing_library(broken):
    (broken.folder / "lychee_kernels/_C_cpu.so").unlink()
    problems, _ = broken()
    assert len(problems) == 1
    assert "lychee_kernels" in problems[0]["what"] and "no such file" in problems[0]["what"]
    assert problems[0]["fix"].startswith("pip install --no-build-isolation")


def test_torch_that_cannot_be_loaded(broken):
    (broken.folder / "torch").mkdir()
    message = "libcudart.so.13: cannot open shared object file"
    (broken.folder / "torch/__init__.py").write_text(f"raise ImportError({message!r})")
    problems, _ = broken()
    assert [problem["what"] for problem in problems] == [f"torch: cannot be imported: {message}"]
    assert "pip install" in problems[0]["fix"]


def test_missing_model(broken):
    (broken.folder / "lychee/assets").unlink()
    problems, folder = broken()
    assert problems[0]["what"].startswith(f"{folder}/lychee/assets/model: expected config.json")
    assert "git checkout" in problems[0]["fix"]


def test_settings_that_nothing_satisfies(broken):
    problems, _ = broken(LYCHEE_CPU_ISA="avx1024")
    assert len(problems) == 1
    assert "avx1024" in problems[0]["what"]
    assert problems[0]["fix"] == "unset LYCHEE_CPU_ISA"
    problems, _ = broken(LYCHEE_BACKEND="fast")
    assert problems[0]["fix"] == "unset LYCHEE_BACKEND"
