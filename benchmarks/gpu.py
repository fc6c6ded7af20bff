# SPDX-License-Identifier: Apache-2.0
"""Times the ops on a GPU against their peers; writes every case as soon as it is measured.

    python benchmarks/gpu.py OUT [--seconds 150] [--only memory_attention]

OUT/results.jsonl has one record per case, OUT/table.md the table. Arguments rotate, so that caches
are cold. Without a GPU, `--device cpu --tiny` runs the same code over small shapes, to test it.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gpu_peers
import gpu_table
import inputs
import machine
import torch
from exact import check
from gpu_timing import measure, measure_peaks, synchronize
from registry import REGISTRY
from shapes import BYTE, HALF, Attention, Gather, Selection, Window, cases

import lychee_kernels as lk
from lychee_kernels import triton

CHUNK = 1024
BATCHES, CHUNKS = (1, 8, 32), (1, 8, 64, 427)
FLOAT8 = torch.float8_e4m3fn
# Bytes that rotate on a GPU at least: several times the second-level cache of any.
COLD_BYTES = 512 << 20
# Ops whose composition in plain PyTorch waits for the device.
BY_MASK = ("select_chunks", "compress_pack")


def planned(tiny: bool) -> list:
    """(entry, case, whether it also meets the peers that take seconds to compile), the cheapest
    cases first."""
    chunk, batches, counts = (64, (1, 2), (1, 2)) if tiny else (CHUNK, BATCHES, CHUNKS)
    heads = {"query_heads": 4, "kv_heads": 2, "head_dim": 64} if tiny else {}
    window, layers = (320, 2) if tiny else (5 * CHUNK, 28)
    windows = [Window(cold=True, rows=window, batch=batch, **heads) for batch in batches]
    gathers = [Gather(cold=True, tokens=chunk * n, layers=layers, **heads) for n in counts]
    selections = [Selection(chunks=427), Selection(chunks=4096)]
    decode = {
        (batch, count): Attention(cold=True, memory=chunk * count, batch=batch, **heads)
        for batch in batches
        for count in counts
    }
    prefill = [Attention(cold=True, queries=chunk, memory=chunk * n, **heads) for n in counts[:2]]
    prefill.append(replace(prefill[0], batch=batches[1]))
    over_8_chunks = [shape for (_, count), shape in decode.items() if count == counts[1]]
    by_op = {
        "compress_pack": cases(windows, (HALF, BYTE)),
        "gather_chunks": cases(gathers, (HALF, BYTE)),
        "select_chunks": cases(selections, (torch.float32, None)),
        "memory_attention": cases(decode.values(), (HALF, HALF), (HALF, BYTE))
        + cases(over_8_chunks, (HALF, FLOAT8))
        + cases(prefill, (HALF, HALF), (HALF, BYTE)),
    }
    compiled = [windows[1], gathers[1], selections[0], decode[batches[1], counts[1]], prefill[0]]
    plan = [
        (entry, case, case.shape in compiled and case.bank_dtype != FLOAT8)
        for entry in REGISTRY
        for case in by_op.get(entry.op, ())
    ]
    return sorted(plan, key=lambda one: one[0].bytes(one[1]))


def peers_of(entry, case, compiled, roles) -> dict:
    """Name -> (function, arguments, whether it returns what our op returns)."""
    found = {"eager": (entry.peers["eager"][0], roles["eager"], False)}
    if entry.op == "memory_attention":
        ready = {"sdpa_flash": gpu_peers.sdpa_flash, "sdpa_cudnn": gpu_peers.sdpa_cudnn}
        found |= {name: (function, roles["ready"], False) for name, function in ready.items()}
        if case.shape.queries == 1 and case.bank_dtype == case.dtype:
            unrotated = [arguments | {"rope_mode": "none"} for arguments in roles["ours"]]
            found["ours_unrotated"] = (entry.ours, unrotated, None)
            found["flashinfer"] = (gpu_peers.flashinfer_decode, "planned", None)
    if torch.cuda.is_available() and triton.is_installed() and kernels_of(entry) != "triton":
        found["triton"] = (gpu_peers.TRITON[entry.op], roles["ours"], True)
    if compiled:
        eager, arguments, _ = found["eager"]
        found["compile"] = (torch.compile(eager, dynamic=False), arguments, False)
        if entry.op == "memory_attention":
            found["flex"] = (gpu_peers.flex, roles["ready"], False)
    return found


def kernels_of(entry) -> str:
    names = lk.backends("cuda" if torch.cuda.is_available() else "cpu")
    return names[entry.op if entry.op in names else f"{entry.op}_"]


def measure_case(entry, case, compiled, device, peaks, expired) -> dict:
    """The record of one case; a peer that fails leaves a note and no time."""
    torch.manual_seed(0)
    torch.compiler.reset()
    with torch.device(device):
        roles = entry.inputs(case)
    methods, notes = {}, []
    try:
        exact = entry.exact(case, **roles["ours"][0])
    except torch.OutOfMemoryError:
        exact = None
        notes.append("not compared with float64: out of memory")
    result = entry.comparable(entry.ours(**roles["ours"][0]))
    methods["ours"] = measure(entry.ours, roles["ours"], device)
    if methods["ours"].reason and device.type == "cuda":
        notes.append(f"ours without graph: {methods['ours'].reason}")
    for name, (function, arguments, same_form) in peers_of(entry, case, compiled, roles).items():
        if expired():
            notes.append(f"{name} left out: no time")
            continue
        try:
            if arguments == "planned":
                arguments = gpu_peers.flashinfer_arguments(roles["ours"])
            theirs = function(**arguments[0])
            if exact is not None and same_form is not None:
                theirs = entry.comparable(theirs) if same_form else theirs
                theirs = theirs if isinstance(theirs, tuple) else (theirs,)
                check(exact, result, theirs, name)
            del theirs
            # rows are chosen by a mask, whose count is copied to the host
            captures = not (entry.op in BY_MASK and name in ("eager", "compile"))
            methods[name] = measure(function, arguments, device, captures=captures)
        except Exception as error:  # Triton's and other packages' errors have no common base
            notes.append(f"{name} left out: {type(error).__name__}: {first_line(error)}")
    return gpu_table.record(entry, case, kernels_of(entry), methods, notes, peaks)


def first_line(error) -> str:
    return str(error).strip().partition("\n")[0][:200]


def describe(device, peaks) -> list[str]:
    """What a reader of the table must know."""
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
            cwd=Path(__file__).parent,
        ).stdout.strip()  # fmt: skip
    name = machine.processor()
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    return [
        f"{name}, torch {torch.__version__}, commit {commit or 'unknown'}; {peaks}; "
        f"kernels {lk.backends(device.type)}"
    ]


def parse(arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder for results.jsonl and table.md")
    parser.add_argument("--seconds", type=float, default=150, help="start no case after this")
    parser.add_argument("--only", help="one op")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to test the program")
    parser.add_argument("--no-compile", action="store_true", help="no peers that are compiled")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a CUDA device for torch to use, got none")
    return options


@torch.no_grad()
def main(arguments=None) -> int:
    options = parse(arguments)
    started = time.monotonic()
    device = torch.device(options.device)
    inputs.cold_bytes = lambda: 1 << 20 if options.tiny else COLD_BYTES
    options.out.mkdir(parents=True, exist_ok=True)
    peaks = measure_peaks(device, tiny=options.tiny)
    about, records, failed = describe(device, peaks), [], 0

    def expired():
        return time.monotonic() - started > options.seconds

    plan = [one for one in planned(options.tiny) if options.only in (None, one[0].op)]
    with (options.out / "results.jsonl").open("w") as file:
        for done, (entry, case, compiled) in enumerate(plan):
            if expired():
                about.append(f"Time was up: {len(plan) - done} of {len(plan)} cases are missing.")
                break
            try:
                compiled = compiled and not options.no_compile
                record = measure_case(entry, case, compiled, device, peaks, expired)
            except Exception as error:  # the other cases are still worth their time
                failed += not isinstance(error, torch.OutOfMemoryError)
                about.append(f"{entry.op}, {case}: {type(error).__name__}: {first_line(error)}")
            else:
                records.append(record)
                print(json.dumps(record), file=file, flush=True)
            (options.out / "table.md").write_text(gpu_table.markdown(records, about))
            if device.type == "cuda":
                synchronize(device)
                torch.cuda.empty_cache()
    (options.out / "table.md").write_text(gpu_table.markdown(records, about))
    wrong = [note for record in records for note in record["notes"] if "AssertionError" in note]
    return 1 if failed or wrong or not records else 0


if __name__ == "__main__":
    sys.exit(main())
