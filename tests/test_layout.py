# SPDX-License-Identifier: Apache-2.0
"""Structural rules that a reader relies on; each test's docstring gives the reason for its rule."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import lychee_kernels

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("lychee", "lychee_kernels")
PYTHON = sorted(p for d in (*PACKAGES, "tests", "benchmarks") for p in (ROOT / d).rglob("*.py"))
PYTHON.append(ROOT / "setup.py")
CPP = sorted(
    path
    for folder in ("csrc", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".h", ".cpp", ".inl", ".cuh", ".cu")
)

# Schemas that are queries, not ops, and schemas that live in another op's files.
QUERIES = {"cpu_isa"}
VARIANTS = {"write_memory": "compress_pack"}
# On a GPU the libraries that torch calls do as well.
CPU_ONLY = {"gated_mlp", "linear"}

# At most three entries, each with its reason: {"path": "why this file or function is longer"}.
LONGER_THAN_ALLOWED = {}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_by(path):
    """Dotted names of the modules that a file imports, wherever in the file."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ([module] if node.module else [f"{module}.{a.name}" for a in node.names])


def functions_of(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def schema_ops():
    """Op stems of the schemas in ops.cpp: in-place and backward variants count as their op."""
    names = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc/ops.cpp").read_text())
    stems = {re.sub(r"(_bwd|_)$", "", name) for name in names if name not in QUERIES}
    return {VARIANTS.get(stem, stem) for stem in stems}


def stems(folder, pattern="*.py"):
    found = {path.stem.removeprefix("test_") for path in (ROOT / folder).glob(pattern)}
    return found - {"__init__"}


def test_kernels_import_nothing_above_them():
    """lychee_kernels must stay usable, and testable, without the model layer."""
    above = {"lychee", "transformers", "tokenizers"}
    for path in (ROOT / "lychee_kernels").rglob("*.py"):
        assert not {name.partition(".")[0] for name in imported_by(path)} & above, name_of(path)


def test_references_import_only_torch():
    """A reference is the specification: it may not lean on the code it specifies."""
    allowed = re.compile(
        r"(torch|math|__future__|collections|typing|lychee_kernels\.(ref|rope))(\.|$)"
    )
    for path in (ROOT / "lychee_kernels/ref").glob("*.py"):
        assert [name for name in imported_by(path) if not allowed.match(name)] == [], name_of(path)


def includes_of(path, seen):
    """System headers a file includes, following the project's own headers."""
    if path in seen:
        return
    seen.add(path)
    for system, own in re.findall(r'^\s*#include\s+(?:<(.+)>|"(.+)")', path.read_text(), re.M):
        if system:
            yield system
        elif (path.parent / own).exists():
            yield from includes_of((path.parent / own).resolve(), seen)
        else:
            yield from includes_of((ROOT / "csrc" / own).resolve(), seen)


def test_kernel_files_are_free_of_torch():
    """Device code without Torch headers compiles fast, and in the emulator."""
    kernel = re.compile(r".*\.(inl|cuh)|vec_\w+\.h|\w+_(generic|avx2|avx512)\.cpp")
    files = [path for path in CPP if kernel.fullmatch(path.name)]
    assert files
    for path in files:
        torch = [h for h in includes_of(path, set()) if h.startswith(("torch/", "ATen/", "c10/"))]
        assert not torch, name_of(path)


def test_only_the_stable_abi_is_used():
    """One classic include would tie the binary to one torch version."""
    classic = re.compile(r"#include\s+<(torch/extension\.h|ATen/|c10/|pybind11/)")
    product = [path for path in CPP if path.is_relative_to(ROOT / "csrc")]
    assert [name_of(path) for path in product if classic.search(path.read_text())] == []


def test_one_file_holds_all_ptx():
    """Device code runs in the emulator only where each primitive has a body for it too."""
    ptx = re.compile(r"\basm\b|<cuda_runtime")
    device = [path for path in CPP if path.is_relative_to(ROOT / "csrc/cuda")]
    assert {name_of(p) for p in device if ptx.search(p.read_text())} == {"csrc/cuda/device.cuh"}


def test_every_op_has_its_places():
    """An op without a reference, kernel, public function or test is not finished."""
    compiled = schema_ops()
    assert compiled
    assert stems("csrc/cpu", "*.cpp") >= compiled
    assert stems("csrc/cuda", "*.cu") >= compiled - CPU_ONLY
    assert stems("lychee_kernels/ops") == compiled
    assert stems("lychee_kernels/ref") == compiled
    triton = {stem for stem in stems("lychee_kernels/triton") if not stem.startswith("_")}
    assert triton == compiled - CPU_ONLY
    assert stems("tests/kernels", "test_*.py") >= compiled


def test_every_op_is_benchmarked():
    """A claim about speed needs an entry that anybody can run."""
    entries = [
        keyword.value.value
        for node in ast.walk(tree_of(ROOT / "benchmarks/registry.py"))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Entry"
        for keyword in node.keywords
        if keyword.arg == "op"
    ]
    assert len(entries) == len(set(entries))
    assert {re.sub(r"_bwd$", "", op) for op in entries} == schema_ops()


def documented_arguments(docstring):
    """Names in the Args section, in order; `a, b: text` documents both a and b."""
    section = re.search(r"^( *)Args:\n((?:\1 +.*\n|\s*\n)+)", docstring + "\n", re.M)
    if not section:
        return []
    lines = [line for line in section.group(2).splitlines() if line.strip()]
    indent = min(len(line) - len(line.lstrip()) for line in lines)
    heads = (re.match(rf" {{{indent}}}(\w+(?:, *\w+)*) *:", line) for line in lines)
    return [name for head in heads if head for name in re.split(", *", head.group(1))]


def test_documented_arguments_are_the_signature():
    """A docstring that names other arguments than the function misleads its caller."""
    functions = [getattr(lychee_kernels, name) for name in lychee_kernels.__all__]
    functions = [function for function in functions if inspect.isfunction(function)]
    assert functions
    for function in functions:
        documented = documented_arguments(inspect.getdoc(function) or "")
        assert documented == list(inspect.signature(function).parameters), function.__name__


def test_files_and_functions_stay_short():
    """What fits on a few screens is read before it is changed."""
    assert len(LONGER_THAN_ALLOWED) <= 3
    long = set()
    for path in PYTHON + CPP:
        limit = 300 if path.suffix == ".py" else 400
        if len(path.read_text().splitlines()) > limit:
            long.add(name_of(path))
    for path in PYTHON:
        for node in functions_of(path):
            start = node.body[1 if ast.get_docstring(node) and node.body[1:] else 0].lineno
            if node.end_lineno - start + 1 > 60:
                long.add(f"{name_of(path)}: {node.name}")
    assert long == set(LONGER_THAN_ALLOWED)


def test_names_say_what_things_are():
    """Version suffixes keep dead code alive; catch-all modules hide what they hold."""
    suffix = re.compile(r"_(v\d+|new|old|wip|tmp|unstable)(_|$)")
    catch_all = {"utils", "util", "helpers", "helper", "common", "misc"}
    names = [(name_of(path), path.stem) for path in PYTHON + CPP]
    names += [(f"{name_of(p)}: {node.name}", node.name) for p in PYTHON for node in functions_of(p)]
    assert [where for where, name in names if suffix.search(name) or name in catch_all] == []


def test_files_open_with_licence_and_purpose():
    """The first two lines tell a reader the terms and what the file is for."""
    for path in PYTHON + CPP:
        mark, purpose = ("#", '"""') if path.suffix == ".py" else ("//", "// ")
        licence, _, rest = path.read_text(encoding="utf-8").partition("\n")
        assert licence == f"{mark} SPDX-License-Identifier: Apache-2.0", name_of(path)
        assert rest.startswith(purpose), name_of(path)


def test_no_unfinished_marks_or_dead_cpp():
    """Unfinished work belongs in an issue; dead code in history (ruff's ERA covers Python)."""
    marks = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    dead = re.compile(r"^\s*//\s*(#include|return\b.*;|[\w:.>-]+\s*(\(.*\)|=\s.*);)\s*$", re.M)
    assert [name_of(path) for path in PYTHON + CPP if marks.search(path.read_text())] == []
    assert [name_of(path) for path in CPP if dead.search(path.read_text())] == []


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documents_name_real_paths(document):
    """A guide that points at nothing is worse than none."""
    text = (ROOT / document).read_text()
    folders = r"(?:csrc|lychee|lychee_kernels|tests|benchmarks|\.ci)/"
    named = re.findall(rf"`({folders}[\w./<>*-]*)`", text)
    named += [link for link in re.findall(r"\]\(([^)#]+)\)", text) if ":" not in link]
    assert named
    real = {path: [*ROOT.glob(path.replace("<op>", "compress_pack"))] for path in named}
    assert [path for path, found in real.items() if not found] == []


def test_version_has_one_source():
    """Two version numbers would one day differ."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert 'attr = "lychee_kernels.__version__"' in pyproject
    assert 'dynamic = ["version"]' in pyproject
    sources = [p for p in PYTHON if re.search(r'^__version__\s*=\s*"', p.read_text(), re.M)]
    assert [name_of(path) for path in sources] == ["lychee_kernels/__init__.py"]


def test_no_two_test_modules_share_a_name():
    """Pytest imports them by their names alone, so one would hide the other."""
    names = [path.name for path in ROOT.glob("tests/**/*.py") if path.name != "conftest.py"]
    assert len(names) == len(set(names))
