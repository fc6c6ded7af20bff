# SPDX-License-Identifier: Apache-2.0
"""Choice of backend and instruction set, the missing library, and rotation tables."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lychee_kernels
from lychee_kernels import rope_tables

ROOT = Path(lychee_kernels.__file__).resolve().parent.parent
TESTS = Path(__file__).resolve().parent
OPS = {
    "compress_pack", "compress_pack_", "write_memory_", "select_chunks", "gather_chunks",
    "gather_chunks_", "memory_attention", "gated_mlp_", "linear_",
}  # fmt: skip
TESTED = (
    "memory_attention", "compress_pack", "gated_mlp", "gather_chunks", "linear", "select_chunks",
)  # fmt: skip
CALL = (
    "import torch, lychee_kernels as lk; x = torch.ones(1, 1, 1, 8, dtype={dtype}); "
    "print(lk.memory_attention(x, x, x)[0].sum().item(), lk.backends(), lk.cpu_isa())"
)


def run(*command, **environment):
    """Runs Python in a fresh process with these variables; returns (exit code, output)."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LYCHEE_")}
    result = subprocess.run(
        [sys.executable, *command], env=clean | environment, capture_output=True, text=True,
        cwd=ROOT, timeout=300,
    )  # fmt: skip
    return result.returncode, result.stdout + result.stderr


def test_backends_name_every_op():
    assert lychee_kernels.backends() == dict.fromkeys(OPS, "cpp")


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "amx"])
def test_every_instruction_set_passes_the_accuracy_tests(isa):
    order = ["generic", "avx2", "avx512", "amx"]
    if order.index(isa) > order.index(lychee_kernels.cpu_isa()):
        pytest.skip(f"this processor has no {isa}")
    if isa == lychee_kernels.cpu_isa():
        pytest.skip(f"{isa} is what the other tests use")
    # those of all backends would run emulator and interpreter once more
    files = [
        str(path)
        for op in TESTED
        for path in TESTS.glob(f"test_{op}*.py")
        if not path.stem.endswith("_backends")
    ]
    # cacheprovider off: the two pytest processes would share one cache folder
    chosen = "reference or rounds or batch or scores or special or equals"
    options = ["-q", "-p", "no:cacheprovider", "-k", chosen]
    code, output = run("-m", "pytest", *options, *files, LYCHEE_CPU_ISA=isa)
    assert code == 0 and " passed" in output, output


def test_forced_instruction_set_is_used_and_checked():
    code, output = run("-c", CALL.format(dtype="torch.float32"), LYCHEE_CPU_ISA="generic")
    assert code == 0 and "generic" in output
    code, output = run("-c", CALL.format(dtype="torch.float32"), LYCHEE_CPU_ISA="mmx")
    assert code != 0
    assert "cpu_isa: LYCHEE_CPU_ISA: expected generic, avx2, avx512 or amx, got mmx" in output


def test_reference_backend_is_used_when_asked_for():
    # only the reference takes float64
    code, output = run("-c", CALL.format(dtype="torch.float64"), LYCHEE_BACKEND="ref")
    assert code == 0 and output.startswith("8.0") and "'cpp'" not in output
    x = torch.ones(1, 1, 1, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="q: expected dtype float32, bfloat16 or float16"):
        lychee_kernels.memory_attention(x, x, x)


def test_reference_backend_names_the_same_wrong_arguments():
    # the reference also takes float64 and any strides
    files = [str(path) for path in TESTS.glob("test_*_errors.py")]
    options = ["-q", "-p", "no:cacheprovider", "-k", "names and not float64 and not contiguous"]
    code, output = run("-m", "pytest", *options, *files, LYCHEE_BACKEND="ref")
    assert code == 0 and " passed" in output, output


def test_backend_refuses_an_op_without_it(monkeypatch):
    from lychee_kernels import _loader

    monkeypatch.setitem(_loader.IMPLEMENTATIONS, "select_chunks", ("ref",))
    monkeypatch.setattr(_loader, "_REQUESTED", "cpp")
    assert lychee_kernels.backends()["select_chunks"] == "none"
    i = torch.zeros(1, 1).int()
    with pytest.raises(RuntimeError) as caught:
        lychee_kernels.select_chunks(torch.zeros(1, 1), 0.0, 1, i, i[0], 4)
    expected = "select_chunks: LYCHEE_BACKEND: expected auto or ref, got cpp"
    assert expected in str(caught.value)


def test_unknown_backend_is_refused():
    code, output = run("-c", "import lychee_kernels", LYCHEE_BACKEND="metal")
    assert code != 0
    assert "LYCHEE_BACKEND: expected auto, cpp, triton or ref, got metal" in output


def test_missing_library_names_the_build_command(monkeypatch, tmp_path):
    from lychee_kernels import _loader

    monkeypatch.setattr(_loader, "LIBRARY", tmp_path / "_C_cpu.so")
    with pytest.raises(ImportError, match="pip install --no-build-isolation -e ."):
        _loader.load_library()
    (tmp_path / "_C_cpu.so").write_bytes(b"not a library")
    with pytest.raises(ImportError, match="rebuild it with"):
        _loader.load_library()


def test_rope_tables_are_exact_at_large_positions():
    inv_freq = 1e6 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    cos, sin = rope_tables(437_001, inv_freq, scaling=1.25)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (437_001, 64)
    angle = 437_000 * inv_freq
    assert ((cos[-1] - 1.25 * angle.cos()).abs() < 1e-7).all()
    assert ((sin[-1] - 1.25 * angle.sin()).abs() < 1e-7).all()
    assert (cos[0] == 1.25).all() and (sin[0] == 0).all()


def test_rope_tables_errors():
    with pytest.raises(RuntimeError, match="rope_tables: inv_freq: expected a one-dimensional"):
        rope_tables(4, torch.ones(2, 2))
    with pytest.raises(RuntimeError, match="rope_tables: num_positions: expected >= 0, got -1"):
        rope_tables(-1, torch.ones(2))
