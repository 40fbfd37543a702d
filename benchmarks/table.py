"""Benchmark JSON to the tables of the documentation: python benchmarks/table.py out.json [...]."""

from __future__ import annotations

import json
import statistics
import sys

HEAD = (
    "| | ns per element (quartiles) | GB/s | share of copy | share of triad | times native (range) |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: |"
)


def write_row(row: dict) -> str:
    info, stats = row["extra_info"], row["stats"]
    ns = 1e9 / info["elements"]
    turns = info["times_native"]
    times = f"{statistics.median(turns):.2f} ({min(turns):.2f} to {max(turns):.2f})" if turns else ""
    triad = f"{info['share_of_triad']:.0%}" if "share_of_triad" in info else ""  # absent from older rows
    return (
        f"| {info['name']} | {stats['median'] * ns:.4g} ({stats['q1'] * ns:.4g} to {stats['q3'] * ns:.4g}) | "
        f"{info['gb_per_s']:.4g} | {info['share_of_copy']:.0%} | {triad} | {times} |"
    )


def measured(run: dict) -> list[dict]:
    """Return the complete rows: one that failed after it was timed lacks figures."""
    return [row for row in run["benchmarks"] if "elements" in row["extra_info"]]


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
    return "\n".join([*lines, *grouped(measured(run))])


def grouped(rows: list[dict]) -> list[str]:
    """Return a table per group of comparable rows, with the bandwidths for its number of bytes."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    lines = []
    for group, members in groups.items():
        info = members[0]["extra_info"]
        reached = [
            f"{name} {info[f'{name}_gb_per_s']:.1f} GB/s"
            for name in ("copy", "triad")
            if f"{name}_gb_per_s" in info
        ]
        lines += [
            "",
            f"**{group}** ({info['elements'] / 1e6:.1f} M elements; {', '.join(reached)})",
            "",
            HEAD,
        ]
        lines += [write_row(row) for row in members]
    return lines


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python benchmarks/table.py BENCHMARK.json [...]")
    print("\n\n".join(tables(path) for path in sys.argv[1:]))
