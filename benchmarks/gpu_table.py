# SPDX-License-Identifier: Apache-2.0
"""The table of gpu.py: one line per case, from the records that it writes as it goes."""

from gpu_timing import Measured, Peaks
from table import number

HEADINGS = (
    "op", "shape", "dtype", "bank", "kernels", "us eager", "p20..p80", "us graph", "GB/s",
    "TFLOP/s", "bound", "share",
)  # fmt: skip


def record(entry, case, kernels, methods, notes, peaks: Peaks) -> dict:
    """What is kept of a case: times in seconds, and ratios of peers to ours, graph to graph where
    both have one; `methods` has Measured by name, ours first."""
    ours: Measured = methods["ours"]
    moved, computed = entry.bytes(case) / 1e9, entry.flops(case) / 1e9
    least = {"copy": moved / peaks.copy, "matrix": computed / peaks.matrix}
    bound = max(least, key=least.get)
    ratio = {}
    for name, peer in methods.items():
        base = methods.get("ours_unrotated", ours) if name == "flashinfer" else ours
        if peer.graph and base.graph:
            ratio[name] = peer.graph.median / base.graph.median
        else:
            ratio[name] = peer.eager.median / base.eager.median
    return {
        "op": entry.op,
        "shape": str(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "bank": "" if case.bank_dtype is None else str(case.bank_dtype).removeprefix("torch."),
        "kernels": kernels,
        "eager": {name: m.eager.median for name, m in methods.items()},
        "graph": {name: m.graph.median for name, m in methods.items() if m.graph},
        "spread": (ours.eager.p20, ours.eager.p80),
        "gb_per_second": moved / ours.best,
        "tflops": computed / ours.best / 1e3,
        "bound": bound,
        "share": least[bound] / ours.best,
        "ratio": {name: value for name, value in ratio.items() if name != "ours"},
        "notes": notes,
    }


def microseconds(seconds) -> str:
    return "" if seconds is None else f"{1e6 * seconds:.3g}" if seconds < 1e-3 else (
        f"{1e6 * seconds:.0f}"
    )  # fmt: skip


def row(one: dict, peers: list[str]) -> list[str]:
    return [
        one["op"],
        one["shape"],
        one["dtype"],
        one["bank"],
        one["kernels"],
        microseconds(one["eager"]["ours"]),
        "..".join(map(microseconds, one["spread"])),
        microseconds(one["graph"].get("ours")),
        number(one["gb_per_second"]),
        number(one["tflops"]),
        one["bound"],
        f"{100 * one['share']:.0f}%",
        *(f"{one['ratio'][peer]:.2f}" if peer in one["ratio"] else "" for peer in peers),
    ]


def markdown(records: list[dict], about: list[str]) -> str:
    """The whole file: the machine, the table, and why numbers are missing."""
    peers = list(dict.fromkeys(peer for one in records for peer in one["ratio"]))
    table = [[*HEADINGS, *(f"x {peer}" for peer in peers)]]
    table += [["---"] * len(table[0]), *(row(one, peers) for one in records)]
    reasons = {}
    for one in records:
        for note in one["notes"]:
            reasons.setdefault(note, []).append(f"{one['op']}: {one['shape']}")
    notes = [f"- {note} ({len(cases)} cases, first {cases[0]})" for note, cases in reasons.items()]
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    return "\n".join([*about, "", *lines, "", *notes]) + "\n"
