# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled libraries; metadata lives in pyproject.toml and needs no torch to be read.

LYCHEE_CUDA=1 requires the CUDA library, 0 leaves it out; otherwise it is built where nvcc is found,
also beside a torch without CUDA. MAX_JOBS limits the compilers that run at once.
"""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# The libtorch stable ABI as of torch 2.10: one binary for every later torch and every Python.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# -march is never raised: files for wider instruction sets raise it for themselves.
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
    TORCH_TARGET,
]
# Machine code for A100 and H100, and PTX that newer GPUs compile for themselves. ptxas reports
# registers and spills into a log beside each object; tests/kernels/test_cuda_static.py reads them.
NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "--expt-relaxed-constexpr",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_90,code=compute_90",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-psabi,-Wno-unknown-pragmas",
    "-Xptxas=-v",
    TORCH_TARGET,
]
# The same folder for every kind of install, so that only changed sources are compiled again.
CUDA_BUILD = ROOT / "build" / "cuda"
CUDA_EXTENSION = "lychee_kernels._C_cuda"

NINJA_FILE = """\
ninja_required_version = 1.8
rule compile
  command = {nvcc} {flags} {includes} -MD -MF $out.d -c $in -o $out > $out.log 2>&1 $
      || {{ cat $out.log; exit 1; }}
  depfile = $out.d
  deps = gcc
  description = nvcc $in
rule link
  command = {nvcc} -shared {flags} $in -o $out {libraries}
  description = link $out
{objects}
build _C_cuda.so: link {names}
"""


def find_nvcc():
    """The path of nvcc, or None where there is none or LYCHEE_CUDA=0."""
    wanted = os.environ.get("LYCHEE_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"setup.py: LYCHEE_CUDA: expected 0 or 1, got {wanted}")
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    folders = [str(Path(home) / "bin") for home in homes if home]
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders))
    if wanted == "1" and nvcc is None:
        raise SystemExit(
            "setup.py: LYCHEE_CUDA=1: expected nvcc on PATH or under CUDA_HOME, got none"
        )
    return None if wanted == "0" else nvcc


def write_ninja_file(nvcc, sources):
    """Describes the CUDA library; ninja compiles again what a change of source or command needs."""
    from torch.utils.cpp_extension import include_paths, library_paths

    def join(arguments):
        return shlex.join(map(str, arguments)).replace("$", "$$")

    def escape(path):
        return re.sub(r"([$ :])", r"$\1", str(path))

    objects = [f"{Path(source).stem}.o" for source in sources]
    lines = [
        f"build {target}: compile {escape(ROOT / source)}"
        for target, source in zip(objects, sources, strict=True)
    ]
    libraries = [f"-L{path}" for path in library_paths()]
    # libtorch.so must stay needed: with CUDA it brings the symbols that CPU builds lack.
    libraries += ["-Xlinker=--no-as-needed,-s", "-ltorch", "-ltorch_cpu", "-lc10"]
    CUDA_BUILD.mkdir(parents=True, exist_ok=True)
    (CUDA_BUILD / "build.ninja").write_text(
        NINJA_FILE.format(
            nvcc=join([nvcc]),
            flags=join(NVCC_FLAGS),
            includes=join([f"-I{ROOT / 'csrc'}", *(f"-isystem={p}" for p in include_paths())]),
            libraries=join(libraries),
            objects="\n".join(lines),
            names=" ".join(objects),
        )
    )


class BuildLibrary(build_ext):
    """Compiles each extension with ninja into a plain shared library, not a Python module."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"

    def run(self):
        super().run()
        if all(ext.name != CUDA_EXTENSION for ext in self.extensions):
            # one of an earlier build would no longer match its schemas
            Path(self.get_ext_fullpath(CUDA_EXTENSION)).unlink(missing_ok=True)

    def build_extension(self, ext):
        try:
            from torch.utils.cpp_extension import load
        except ImportError as error:
            raise SystemExit(
                "setup.py: torch: expected torch >= 2.10 to compile the kernels, got none; "
                "install torch, then: pip install --no-build-isolation ."
            ) from error
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        if ext.name == CUDA_EXTENSION:
            self.build_cuda(ext, target)
            return
        name = ext.name.rsplit(".", 1)[-1]
        build = Path(self.build_temp).resolve() / name
        build.mkdir(parents=True, exist_ok=True)
        # Left behind by a killed build, this file would make load() wait for ever.
        (build / "lock").unlink(missing_ok=True)
        load(
            name=name,
            sources=[str(ROOT / source) for source in ext.sources],
            extra_cflags=CXX_FLAGS,
            extra_include_paths=[str(ROOT / "csrc")],
            extra_ldflags=["-Wl,-s"],
            build_directory=str(build),
            is_python_module=False,
            with_cuda=False,
        )
        self.copy_file(str(build / f"{name}.so"), str(target))

    def build_cuda(self, ext, target):
        """torch's own CUDA builds refuse beside a torch without CUDA: nvcc is driven from here."""
        write_ninja_file(find_nvcc(), ext.sources)
        jobs = os.environ.get("MAX_JOBS")
        command = ["ninja", "-C", str(CUDA_BUILD), *(["-j", jobs] if jobs else [])]
        if subprocess.run([*command, "--quiet"]).returncode:
            raise SystemExit(
                "setup.py: nvcc: expected the CUDA kernels to compile, got the errors above; "
                "LYCHEE_CUDA=0 builds without them"
            )
        self.copy_file(str(CUDA_BUILD / "_C_cuda.so"), str(target))


def sources(pattern, *folders):
    found = (path for folder in folders for path in (ROOT / folder).glob(pattern))
    return sorted(str(path.relative_to(ROOT)) for path in found)


def extensions():
    cpu = Extension("lychee_kernels._C_cpu", sources=sources("*.cpp", "csrc", "csrc/cpu"))
    cuda = Extension(CUDA_EXTENSION, sources=sources("*.cu", "csrc/cuda"))
    return [cpu, cuda] if cuda.sources and find_nvcc() else [cpu]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildLibrary})
