# SPDX-License-Identifier: Apache-2.0
"""The closing tables of the end-to-end benchmarks, from their extra_info."""

import reading

PEERS = ("memagent", "full_context")


def sections(infos: list[dict]) -> list[tuple[str, list[list[str]], list[str]]]:
    """(title, rows with the headings first, remarks) of each table that has rows."""
    found = [
        ("time to answer", time_rows(infos), [reading.ABOUT, *remarks(infos)]),
        (
            "full context crossover, from nothing",
            crossover_rows(infos, "crossover", "faster", "s"),
            [],
        ),
        (
            "full context crossover, peak memory",
            crossover_rows(infos, "peak_crossover", "smaller", "MiB"),
            [],
        ),
        ("parts of the speed-up", part_rows(infos), part_remarks(infos)),
        ("peak memory", memory_rows(infos), [reading.ABOUT_PEAKS]),
        ("peers on equal shapes, tokens/s", rate_rows(infos), []),
    ]
    return [section for section in found if len(section[1]) > 1]


def time_rows(infos: list[dict]) -> list[list[str]]:
    headings = [
        "tokens", "notes", "read", "turns", "batch", "build s", "ask s",
        *(f"{peer} s" for peer in PEERS),
        *(f"x {peer}" for peer in PEERS),
        *(f"at hand x {peer}" for peer in PEERS),
        *(f"paid after, {peer}" for peer in PEERS),
    ]  # fmt: skip
    rows = [headings]
    for info in infos:
        if "ratio_at_hand" not in info:
            continue
        seconds, together = info["seconds"], info["in_one_turn"]
        turns = -(-info["selected"] // reading.MOST_TOGETHER)
        ways = [(info["selected"], seconds["ours"], info)]
        if turns < info["selected"]:
            ways.append((turns, together["seconds"], together))
        for turns, ours, ratios in ways:
            rows.append(
                [
                    f"{info['length']:,}",
                    str(info["memory_tokens"]),
                    f"{info['selected']} of {info['chunks']}",
                    str(turns),
                    str(info["batch"]),
                    decimal(ours["build"]),
                    decimal(sum(ours.values()) - ours["build"]),
                    *(decimal(sum(seconds[peer].values())) for peer in PEERS),
                    *(f"{ratios['ratio'][peer]:.2f}" for peer in PEERS),
                    *(f"{ratios['ratio_at_hand'][peer]:.2f}" for peer in PEERS),
                    *(str(ratios["questions_until_paid"][peer] or "never") for peer in PEERS),
                ]
            )
    return rows


def remarks(infos: list[dict]) -> list[str]:
    """What to know about the times: threads, and whether other processes shared the cores."""
    lines = []
    for info in infos:
        if "ratio_cpu" not in info:
            continue
        wall = sum(sum(parts.values()) for parts in info["seconds"].values())
        cpu = sum(sum(parts.values()) for parts in info["cpu_seconds"].values())
        if not reading.CUDA and cpu < 0.9 * wall * info["threads"]:
            by_cpu = ", ".join(f"{peer} {info['ratio_cpu'][peer]:.2f}" for peer in PEERS)
            lines.append(
                f"{info['length']:,} tokens, notes of {info['memory_tokens']}: the processors were "
                f"ours for {cpu / wall / info['threads']:.0%} of the time; ratios from "
                f"processors' time: {by_cpu}"
            )
    return lines


def crossover_rows(infos: list[dict], key: str, better: str, unit: str) -> list[list[str]]:
    rows = [["notes", f"ours is {better} from", f"tried: ours {unit}, full context {unit}"]]
    for info in infos:
        if key in info:
            tried = (
                f"{length:,}: {decimal(figures['ours'])}, {decimal(figures['full_context'])}"
                for length, figures in sorted(info["tried"].items())
            )
            found = f"{info[key]:,} tokens" if info[key] else "none tried"
            rows.append([str(info["memory_tokens"]), found, "; ".join(tried)])
    return rows


def part_rows(infos: list[dict]) -> list[list[str]]:
    rows = [["", "s", "x"]]
    for info in infos:
        for name, seconds in info.get("rows", {}).items():
            # together with others a question is compared with MemAgent's together with others
            base = [key for key in info["rows"] if ("together" in key) == ("together" in name)][0]
            rows.append([name, decimal(seconds), f"{info['rows'][base] / seconds:.2f}"])
    return rows


def part_remarks(infos: list[dict]) -> list[str]:
    return [
        f"{info['parts_of']['length']:,} tokens, notes of {info['parts_of']['memory_tokens']}, "
        f"{info['parts_of']['selected']} chunks read; sums of passes that were measured one by one "
        f"(reading_parts.py), not whole runs; x: MemAgent's seconds over the row's"
        for info in infos
        if "parts_of" in info
    ]


def memory_rows(infos: list[dict]) -> list[list[str]]:
    rows = [["method", "tokens", "notes", "batch", "peak MiB", "of it bank", "x memagent"]]
    for info in infos:
        for method, peak in info.get("peak_mib", {}).items():
            ratio = info["peak_mib"].get("memagent", 0) / peak
            rows.append(
                [
                    method, f"{info['length']:,}", str(info["memory_tokens"]), str(info["batch"]),
                    decimal(peak), decimal(info["bank_mib"].get(method, 0)), f"{ratio:.2f}",
                ]
            )  # fmt: skip
    return rows


def rate_rows(infos: list[dict]) -> list[list[str]]:
    rows = [["what", "shape", "ours", *PEERS]]
    for info in infos:
        if shapes := info.get("equal_shapes"):
            rates = (f"{shapes['rates'][name]:,.0f}" for name in ("ours", *PEERS))
            rows.append([shapes["what"], shapes["shape"], *rates])
    return rows


def decimal(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds < 100 else f"{seconds:,.0f}"
