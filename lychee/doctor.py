# SPDX-License-Identifier: Apache-2.0
"""What this machine and installation offer, what is missing, and the command that mends it.

Nothing here may fail for what it reports on: torch and the kernels are imported to be looked at.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path
from typing import Any

BUILD = "pip install --no-build-isolation -e ."
NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "typer", "rich")
OPTIONAL = {
    "triton": (),
    "accelerate": ("train",),
    "peft": ("train",),
    "tensorboard": ("train",),
    "matplotlib": ("plot",),
}
SECONDS = 20


def examine() -> dict[str, Any]:
    """Everything `lychee doctor` says, as plain values.

    Returns:
        versions, machine, torch, kernels, gpu, model; `problems` that keep commands from working
        and `hints` on what else could be had, each with "what" and the command "fix".
    """
    problems: list[dict[str, str]] = []
    hints: list[dict[str, str]] = []
    versions = package_versions(problems, hints)
    torch = import_or_report("torch", problems, "pip install torch") if versions["torch"] else None
    report = {
        "versions": versions,
        "machine": describe_machine(),
        "torch": None if torch is None else describe_torch(torch),
        "kernels": describe_kernels(torch, problems, hints),
        "gpu": describe_gpu(torch, hints),
        "model": describe_model(problems),
    }
    return report | {"problems": problems, "hints": hints}


def report(to: list[dict[str, str]], what: str, fix: str) -> None:
    to.append({"what": " ".join(what.split()), "fix": fix})


def package_versions(
    problems: list[dict[str, str]], hints: list[dict[str, str]]
) -> dict[str, str | None]:
    """Versions of this package, Python and what it needs; None where a package is missing."""
    versions: dict[str, str | None] = {
        "lychee-memory": version_of("lychee-memory"),
        "python": platform.python_version(),
    }
    for name in (*NEEDED, *OPTIONAL):
        versions[name] = version_of(name)
        if versions[name] is not None:
            continue
        if name in NEEDED:
            report(problems, f"{name}: needed, not installed", f"pip install {name}")
    extras = sorted({e for name, es in OPTIONAL.items() if versions[name] is None for e in es})
    for extra in extras:
        missing = [n for n, es in OPTIONAL.items() if extra in es and versions[n] is None]
        report(
            hints,
            f"{', '.join(missing)}: not installed; wanted by the extra {extra!r}",
            f"pip install {' '.join(missing)}",
        )
    if versions["lychee-memory"] is None:
        report(hints, "lychee-memory: used from its source folder, not installed", BUILD)
    return versions


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def import_or_report(name: str, problems: list[dict[str, str]], fix: str):
    """A module, or None with the reason among the problems."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever a broken installation raises
        report(problems, f"{name}: cannot be imported: {error}", fix)
        return None


def describe_machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory and system."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "system": platform.platform(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "cores_usable": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "python": sys.executable,
    }


def processor_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """What the machine has, or less where this process is kept to less."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def describe_torch(torch) -> dict[str, Any]:
    return {
        "folder": str(Path(torch.__file__).parent),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "cuda_available": torch.cuda.is_available(),
    }


def describe_kernels(
    torch, problems: list[dict[str, str]], hints: list[dict[str, str]]
) -> dict[str, Any]:
    """The compiled libraries, the instruction set in use, and the backend of each op."""
    spec = util.find_spec("lychee_kernels")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    libraries = sorted(map(str, folder.glob("_C_*.so"))) if folder else []
    found: dict[str, Any] = {
        "folder": str(folder),
        "libraries": libraries,
        "requested": os.environ.get("LYCHEE_BACKEND", "auto"),
        "isa": None,
        "backends": {},
    }
    if torch is None:
        return found
    fix = BUILD if found["requested"] == "auto" else "unset LYCHEE_BACKEND"
    kernels = import_or_report("lychee_kernels", problems, fix)
    if kernels is None:
        return found
    try:
        found["isa"] = kernels.cpu_isa()
    except RuntimeError as error:
        report(problems, f"LYCHEE_CPU_ISA: {error}".splitlines()[0], "unset LYCHEE_CPU_ISA")
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    found["backends"] = {device: kernels.backends(device) for device in devices}
    if "cuda" in devices and not any("_C_cuda" in name for name in libraries):
        report(hints, "_C_cuda.so: not built, though there is a GPU", f"LYCHEE_CUDA=1 {BUILD}")
    for device, backends in found["backends"].items():
        missing = sorted(op for op, backend in backends.items() if backend == "none")
        if missing:
            forced = found["requested"] != "auto"
            fix = "unset LYCHEE_BACKEND" if forced else f"LYCHEE_CUDA=1 {BUILD}"
            report(problems, f"{', '.join(missing)}: no backend on {device}", fix)
    return found


def describe_gpu(torch, hints: list[dict[str, str]]) -> dict[str, Any]:
    """GPUs as torch and as the driver see them, and the compiler for CUDA kernels."""
    names = []
    if torch is not None and torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    query = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    driver = [line for line in output_of(*query).splitlines() if line.strip()]
    compiler = re.search(r"release ([\d.]+)", output_of("nvcc", "--version"))
    gpu = {
        "devices": names,
        "driver": driver,
        "nvcc": compiler[1] if compiler else None,
    }
    if driver and not names:
        fix = "pip install torch --force-reinstall, in the CUDA build that pytorch.org names"
        report(hints, f"{driver[0]}: there is a GPU, but this torch does not use it", fix)
    return gpu


def output_of(*command: str) -> str:
    """What a program prints, or nothing where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout if result.returncode == 0 else ""


def describe_model(problems: list[dict[str, str]]) -> dict[str, Any]:
    """The small model that comes with the project."""
    folder = Path(__file__).parent / "assets" / "model"
    files = ("config.json", "model.safetensors", "tokenizer.json")
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        what = f"{folder}: expected {', '.join(missing)}, got none"
        report(problems, what, "git checkout -- lychee/assets, or name a model with --model")
    return {"folder": str(folder), "complete": not missing}
