"""The summary of a run of gpu.sh, from its rows alone: python benchmarks/gpu_report.py OUT/rows.jsonl

Prints Markdown: the machine, what was proven, what failed, what was not tried, the steps, and all figures.
"""

from __future__ import annotations

import pathlib
import statistics
import sys
from collections import Counter
from collections.abc import Iterator

import record
import table

# Goal: least share of the triad's bandwidth, on the tensor of 256 M elements.
SHARES = {("float32", "both"): 0.90, ("bfloat16", "both"): 0.75, ("float32", "interpolate"): 0.92}
# Goal: least time of a peer as a multiple of native's, in float32 on 64 M elements.
RATIOS = {
    ("both", "torch._foreach_*"): 5.0,
    ("both", "torch._foreach_* folded"): 5.0,
    ("both", "torch.func._random"): 1.0,
    ("both", "torch.compile"): 1.0,
    ("interpolate", "torch.compile"): 1.0,
}
HOST_US = 25.0

Row = dict
Finding = tuple[str, str]  # "proven", "failed" or "not tried", and what
KINDS = ("proven", "failed", "not tried")
RESULT = ("step", "arch", "part", "precision", "name")  # the key of a result


def findings(rows: list[Row]) -> Iterator[Finding]:
    yield from of_steps(rows)
    yield from of_checks(rows)
    if any(row["kind"] == "machine" and row["device"] != "cpu" for row in rows):
        yield from of_goals(rows)
    for row in rows:
        if row["kind"] == "goal":
            told = f"goal: {row['what']}: {row['got']:.3g}, goal {row['goal']:g}"
            yield ("proven" if row["met"] else "failed"), told
        elif row["kind"] == "left out":
            yield "not tried", f"{row['step']}: {row['what']}: the time was up"
        elif row["kind"] in ("not measured", "failed"):
            kind = "failed" if row["kind"] == "failed" else "not tried"
            yield kind, f"{row['step']}: {row['part']} of {row['arch']}: {row['why']}"


def of_steps(rows: list[Row]) -> Iterator[Finding]:
    for row in rows:
        if row["kind"] == "step" and row["outcome"] != "done":
            kind = "not tried" if row["outcome"] == "not begun" else "failed"
            yield kind, f"{row['step']}: {row['outcome']}: {row['why']}"


def of_checks(rows: list[Row]) -> Iterator[Finding]:
    """Yield backends, forms of the write, and tests: how many passed, and each that did not."""
    passed: Counter[str] = Counter()
    for row in rows:
        if row["kind"] == "backend":
            works = "works" if row["works"] else row["why"]
            yield (
                ("proven" if row["works"] else "failed"),
                f"backend {row['impl']} on {row['device']}: {works}",
            )
        elif row["kind"] == "form" and row["right"]:
            passed[f"{row['step']}: forms of {row['impl']}'s write that are right"] += 1
        elif row["kind"] == "form":
            yield "failed", f"{row['step']}: {row['impl']}, {row['form']}: {row['why']}"
        elif row["kind"] == "test" and row["outcome"] == "passed":
            passed[f"{row['step']}: tests of {row['test'].partition('::')[0]} that passed"] += 1
        elif row["kind"] == "test":
            kind = "failed" if row["outcome"] == "failed" else "not tried"
            yield kind, f"{row['step']}: {row['test'].partition('::')[2]}: {row['why']}"
    for what, count in passed.items():
        yield "proven", f"{what}: {count}"


def of_goals(rows: list[Row]) -> Iterator[Finding]:
    """Yield the goals of the kernels; those without a row were not tried."""

    def info(**wanted: str) -> dict | None:
        found = (row["extra_info"] for row in rows if row["kind"] == "write")
        return next((i for i in found if all(i.get(k) == v for k, v in wanted.items())), None)

    def finding(what: str, got: float | None, goal: float, unit: str, most: bool = False) -> Finding:
        if got is None:
            return "not tried", f"goal: {what}: not measured"
        met = got <= goal if most else got >= goal
        return "proven" if met else "failed", f"goal: {what}: {got:.3g}{unit}, goal {goal:.3g}{unit}"

    for (dtype, operation), goal in SHARES.items():
        for impl in ("native", "triton"):
            row = info(shape="256M", dtype=dtype, operation=operation, name=impl)
            share = None if row is None else 100 * row["share_of_triad"]
            yield finding(f"{impl}, {dtype}, {operation}, 256M: share of triad", share, 100 * goal, " %")
    for (operation, peer), goal in RATIOS.items():
        row = info(shape="64M", dtype="float32", operation=operation, name=peer)
        ratio = None if row is None else statistics.median(row["times_native"])
        yield finding(f"{operation}, float32: time of {peer} over native's", ratio, goal, "")
    hosts = {row["impl"]: row["us"] for row in rows if row["kind"] == "host" and row["what"] == "whole model"}
    for impl in ("native", "triton"):
        what = f"{impl}: host time of Plan.write, 296 tensors"
        yield finding(what, hosts.get(impl), HOST_US, " us", most=True)


def summary(rows: list[Row]) -> str:
    """Return the whole report. Sections without rows are left out."""
    return "\n".join([*machine(rows), *verdicts(rows), *steps(rows), *kernels(rows), *sweeps(rows)]) + "\n"


def machine(rows: list[Row]) -> Iterator[str]:
    yield "# What this run proved\n"
    for row in rows:
        if row["kind"] in ("machine", "about"):
            facts = (
                f"{name} {value}" for name, value in row.items() if name not in ("kind", "step") and value
            )
            yield "- " + ", ".join(facts)


def verdicts(rows: list[Row]) -> Iterator[str]:
    listed = list(findings(rows))
    for kind in KINDS:
        whats = [what for k, what in listed if k == kind]
        yield f"\n## {kind.capitalize()}\n"
        yield from [f"- {what}" for what in whats] or ["- nothing"]


def steps(rows: list[Row]) -> Iterator[str]:
    yield "\n## Steps\n\n| step | outcome | seconds | limit |\n| --- | --- | ---: | ---: |"
    for row in rows:
        if row["kind"] == "step":
            yield f"| {row['step']} | {row['outcome']}: {row['why']} | {row['seconds']} | {row['limit']} |"


def kernels(rows: list[Row]) -> Iterator[str]:
    if writes := [row for row in rows if row["kind"] == "write"]:
        yield "\n## Kernels"
        yield from table.grouped(writes)
    if hosts := [row for row in rows if row["kind"] == "host"]:
        yield "\n**host time of Plan.write, 296 tensors**\n\n| | microseconds (quartiles) |\n| --- | ---: |"
        for row in hosts:
            yield f"| {row['impl']}, {row['what']} | {row['us']:.1f} ({row['q1']:.1f} to {row['q3']:.1f}) |"


def sweeps(rows: list[Row]) -> Iterator[str]:
    """Yield results and timings of whole sweeps, a table each, with the columns that its rows have.

    Results are written again after each round; the last one of a name counts.
    """
    last = {tuple(row.get(k) for k in RESULT): row for row in rows if row["kind"] == "result"}
    timings = [row for row in rows if row["kind"] == "timing"]
    for title, found in (("Results of sweeps", last.values()), ("Timings of sweeps", timings)):
        members = [{k: v for k, v in row.items() if k != "kind"} for row in found]
        columns = list(dict.fromkeys(column for row in members for column in row))
        if members:
            yield f"\n## {title}\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}"
        for row in members:
            yield "| " + " | ".join(short(row.get(column)) for column in columns) + " |"


def short(value: object) -> str:
    """Format a value: numbers with four digits, lists in brackets, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, list):
        return "[" + ", ".join(map(short, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not pathlib.Path(sys.argv[1]).is_file():
        sys.exit("usage: python benchmarks/gpu_report.py OUT/rows.jsonl")
    print(summary(record.read(pathlib.Path(sys.argv[1]))), end="")
