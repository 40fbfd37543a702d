"""Benchmark JSON to the tables of the documentation: python benchmarks/table.py out.json [...]."""

from __future__ import annotations

import json
import statistics
import sys


def tables(path: str) -> str:
    with open(path) as file:
        run = json.load(file)
    machine = run["machine_info"]
    versions = machine["versions"]
    groups: dict[str, list[dict]] = {}
    for row in run["benchmarks"]:
        groups.setdefault(row["group"], []).append(row)
    copy = next(iter(groups.values()))[0]["extra_info"]["copy_gb_per_s"]
    lines = [
        f"{machine['cpu'].get('brand_raw', machine['machine'])}, {machine['threads']} threads, "
        f"{machine['instruction_set']}, torch {versions['torch']}, Python {versions['python']}, "
        f"{run['datetime'][:10]}; copy {copy:.1f} GB/s",
    ]
    for group, rows in groups.items():
        lines += [
            "",
            f"**{group}** ({rows[0]['extra_info']['elements'] / 1e6:.0f} M elements)",
            "",
            "| | ns per element (quartiles) | GB/s | share of copy | times native, in turns (range) |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for row in rows:
            info, stats = row["extra_info"], row["stats"]
            ns = 1e9 / info["elements"]
            turns = info["times_native"]
            times = f"{statistics.median(turns):.2f} ({min(turns):.2f} to {max(turns):.2f})" if turns else ""
            lines.append(
                f"| {info['name']} | {stats['median'] * ns:.2f} "
                f"({stats['q1'] * ns:.2f} to {stats['q3'] * ns:.2f}) | {info['gb_per_s']:.1f} | "
                f"{info['share_of_copy']:.0%} | {times} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python benchmarks/table.py BENCHMARK.json [...]")
    print("\n\n".join(tables(path) for path in sys.argv[1:]))
