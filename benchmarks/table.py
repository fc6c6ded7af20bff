# SPDX-License-Identifier: Apache-2.0
"""The table at the end of a benchmark run: one line per op, shape, dtypes and threads."""

PEERS = ("eager", "compile", "sdpa_ready", "grouped_matmul_ready", "released_route")
HEADINGS = (
    "op", "shape", "dtype", "bank", "threads", "ms", "p20..p80", "GB/s", "GFLOP/s", "bound",
    "share", *(f"x {peer}" for peer in PEERS),
)  # fmt: skip


def row(info: dict) -> list[str]:
    """The cells of one benchmark's extra_info; empty where it does not apply."""
    ratio = info["ratio"]
    return [
        info["op"],
        info["shape"],
        info["dtype"],
        info.get("bank_dtype") or "",
        str(info["threads"]),
        milliseconds(info["seconds"]["ours"]),
        "..".join(milliseconds(x) for x in info["spread"]),
        number(info.get("gb_per_second")),
        number(info.get("gflops")),
        info.get("bound", ""),
        f"{100 * info['share']:.0f}%" if "share" in info else "",
        *(f"{ratio[peer]:.2f}" if peer in ratio else "" for peer in PEERS),
    ]


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def number(value: float | None) -> str:
    return "" if not value else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def lines(infos: list[dict], *, markdown: bool = False) -> list[str]:
    """The table, in columns for a terminal or as markdown."""
    rows = [row(info) for info in infos]
    columns = [i for i, _ in enumerate(HEADINGS) if any(cells[i] for cells in rows)]
    table = [[cells[i] for i in columns] for cells in [HEADINGS, *rows]]
    return aligned(table, markdown=markdown)


def aligned(table: list[list[str]], *, markdown: bool = False) -> list[str]:
    """Rows of cells, the headings first, in columns for a terminal or as markdown."""
    if markdown:
        table = list(table)
        table.insert(1, ["---"] * len(table[0]))
        return [f"| {' | '.join(cells)} |" for cells in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in table
    ]


def notes(infos: list[dict]) -> list[str]:
    """Peak memory where it was measured, and why a peer is missing, each reason once."""
    memory = [
        f"compressing one chunk adds {info['peak_extra_mib']:.0f} MiB at its peak, "
        f"threads {info['threads']}"
        for info in infos
        if "peak_extra_mib" in info
    ]
    reasons = {}
    for info in infos:
        for peer, reason in info.get("skipped", {}).items():
            reasons.setdefault(f"{peer} left out: {reason}", []).append(info["op"])
    return memory + [f"{reason} ({', '.join(sorted(set(ops)))})" for reason, ops in reasons.items()]
