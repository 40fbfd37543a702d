"""Benchmark JSON to the tables of the documentation: python benchmarks/table.py out.json [...]."""

from __future__ import annotations

import json
import statistics
import sys

HEAD = (
    "| | ns per element (quartiles) | GB/s | share of copy | times native, in turns (range) |\n"
    "| --- | ---: | ---: | ---: | ---: |"
)
HOST_HEAD = "| | microseconds (quartiles) |\n| --- | ---: |"


def write_row(row: dict) -> str:
    info, stats = row["extra_info"], row["stats"]
    ns = 1e9 / info["elements"]
    turns = info["times_native"]
    times = f"{statistics.median(turns):.2f} ({min(turns):.2f} to {max(turns):.2f})" if turns else ""
    return (
        f"| {info['name']} | {stats['median'] * ns:.4g} ({stats['q1'] * ns:.4g} to {stats['q3'] * ns:.4g}) | "
        f"{info['gb_per_s']:.4g} | {info['share_of_copy']:.0%} | {times} |"
    )


def host_row(row: dict) -> str:
    q1, median, q3 = (row["stats"][name] * 1e6 for name in ("q1", "median", "q3"))
    return f"| {row['extra_info']['name']} | {median:.1f} ({q1:.1f} to {q3:.1f}) |"


def measured(run: dict) -> list[dict]:
    """The rows that are complete: one that failed after it was timed has no figures of its own."""
    return [row for row in run["benchmarks"] if row["extra_info"]]


def tables(path: str) -> str:
    with open(path) as file:
        run = json.load(file)
    machine = run["machine_info"]
    versions = machine["versions"]
    cuda = f", CUDA {machine['cuda']}" if "cuda" in machine else ""
    lines = [
        f"{machine['device']}, torch {versions['torch']}{cuda}, Triton {versions['triton']}, "
        f"Python {versions['python']}, {run['datetime'][:10]}"
    ]
    if copies := [c for row in measured(run) if (c := row["extra_info"].get("copy_gb_per_s"))]:
        lines[0] += f"; copy {copies[0]:.1f} GB/s"
    groups: dict[str, list[dict]] = {}
    for row in measured(run):
        groups.setdefault(row["group"], []).append(row)
    for group, rows in groups.items():
        host = "host_us" in rows[0]["extra_info"]
        size = "" if host else f" ({rows[0]['extra_info']['elements'] / 1e6:.1f} M elements)"
        lines += ["", f"**{group}**{size}", "", HOST_HEAD if host else HEAD]
        lines += [host_row(row) if host else write_row(row) for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python benchmarks/table.py BENCHMARK.json [...]")
    print("\n\n".join(tables(path) for path in sys.argv[1:]))
