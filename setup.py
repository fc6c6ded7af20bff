# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled library; metadata lives in pyproject.toml and needs no torch to be read."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# The libtorch stable ABI as of torch 2.10: one binary for every later torch and every Python.
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
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]


class BuildLibrary(build_ext):
    """Compiles each extension with ninja into a plain shared library, not a Python module."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext):
        try:
            from torch.utils.cpp_extension import load
        except ImportError as error:
            raise SystemExit(
                "setup.py: torch: expected torch >= 2.10 to compile the kernels, got none; "
                "install torch, then: pip install --no-build-isolation ."
            ) from error
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
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(build / f"{name}.so"), str(target))


def sources(*folders):
    found = (path for folder in folders for path in (ROOT / folder).glob("*.cpp"))
    return sorted(str(path.relative_to(ROOT)) for path in found)


setup(
    ext_modules=[Extension("lychee_kernels._C_cpu", sources=sources("csrc", "csrc/cpu"))],
    cmdclass={"build_ext": BuildLibrary},
)
