"""What a run of gpu.sh proved: python benchmarks/gpu_report.py RAW OUT

RAW: what the steps left: steps.jsonl, a .out for each, .xml of tests and .json of benchmarks.
"""

from __future__ import annotations

import json
import statistics
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import sweep_report
import table

# Least share of the copy bandwidth, on the tensor of 64 M elements.
SHARES = {("float32", "both"): 0.90, ("bfloat16", "both"): 0.75, ("float32", "interpolate"): 0.92}
# Least time of a peer, as a multiple of native's, in float32.
RATIOS = {
    ("both", "torch._foreach_*"): 5.0,
    ("both", "torch._foreach_* folded"): 5.0,
    ("both", "torch.func._random"): 1.0,
    ("both", "torch.compile"): 1.0,
    ("interpolate", "torch.compile"): 1.0,
}
HOST_US = 25.0

Finding = tuple[str, str]  # "proven", "failed" or "not tried", and what


def of_step(step: dict, raw: Path) -> Iterator[Finding]:
    name, code = step["step"], step["code"]
    cases = tests(raw / f"{name}.xml")
    if cases["passed"]:
        yield "proven", f"{name}: {len(cases['passed'])} tests passed"
    elif code == 0 and not cases["skipped"]:
        yield "proven", f"{name}: done in {step['seconds']} s"
    if code == -1:
        yield "not tried", f"{name}: the time was up"
    elif code in (126, 127):
        yield "not tried", f"{name}: {last_line(raw, name)}"
    elif code in (124, 137):
        yield "failed", f"{name}: not done after {step['limit']} s; {last_line(raw, name)}"
    elif code != 0 and not cases["failed"]:
        yield "failed", f"{name}: exit status {code}; {last_line(raw, name)}"
    for case, why in cases["failed"]:
        yield "failed", f"{name}: {case}: {why}"
    for case, why in cases["skipped"]:
        yield "not tried", f"{name}: {case}: {why}"


def last_line(raw: Path, name: str) -> str:
    path = raw / f"{name}.out"
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def tests(path: Path) -> dict[str, list[tuple[str, str]]]:
    """(test, message) by outcome, from a JUnit file; nothing where a step left none."""
    found: dict[str, list[tuple[str, str]]] = {"passed": [], "failed": [], "skipped": []}
    try:
        root = ElementTree.parse(path).getroot()
    except (FileNotFoundError, ElementTree.ParseError):
        return found
    for case in root.iter("testcase"):
        outcome, message = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                message = (child.get("message") or "").split("\n")[0][:200]
        found[outcome].append((case.get("name", ""), message))
    return found


def of_goals(rows: list[dict]) -> Iterator[Finding]:
    """The goals of the measured rows; those without a row were not tried."""

    def info(**wanted: str) -> dict | None:
        found = (row["extra_info"] for row in rows)
        return next((i for i in found if all(i.get(k) == v for k, v in wanted.items())), None)

    def finding(what: str, got: float | None, goal: float, unit: str, most: bool = False) -> Finding:
        if got is None:
            return "not tried", f"goal: {what}: not measured"
        met = got <= goal if most else got >= goal
        return "proven" if met else "failed", f"goal: {what}: {got:.3g}{unit}, goal {goal:.3g}{unit}"

    for (dtype, operation), goal in SHARES.items():
        for impl in ("native", "triton"):
            row = info(shape="64M", dtype=dtype, operation=operation, name=impl)
            share = None if row is None else 100 * row["share_of_copy"]
            yield finding(f"{impl}, {dtype}, {operation}: share of copy", share, 100 * goal, " %")
    for (operation, peer), goal in RATIOS.items():
        row = info(shape="64M", dtype="float32", operation=operation, name=peer)
        ratio = None if row is None else statistics.median(row["times_native"])
        yield finding(f"{operation}, float32: time of {peer} over native's", ratio, goal, "")
    for row in rows:
        if "host_us" in row["extra_info"]:
            what = f"{row['extra_info']['name']}, {row['group']}"
            yield finding(what, row["extra_info"]["host_us"], HOST_US, " us", most=True)


def main(raw: Path, out: Path) -> None:
    steps = [json.loads(line) for line in (raw / "steps.jsonl").read_text().splitlines()]
    measured = {
        path.stem: json.loads(path.read_text()) for path in sorted(raw.glob("*.json")) if path.stat().st_size
    }
    runs = {name: run for name, run in measured.items() if "benchmarks" in run}
    sweeps = {name: run for name, run in measured.items() if "goals" in run}
    rows = [row for run in runs.values() for row in table.measured(run)]
    findings = [finding for step in steps for finding in of_step(step, raw)]
    if rows and next(iter(runs.values()))["machine_info"].get("cuda"):
        findings += of_goals(rows)
    for goal in (goal for run in sweeps.values() for goal in run["goals"]):
        told = f"goal: {goal['what']}: {goal['got']:.3g}, goal {goal['goal']:g}"
        findings.append(("proven" if goal["met"] else "failed", told))
    machine = next((run["machine_info"] for run in runs.values()), {})
    machine = machine or next((run["about"] for run in sweeps.values()), {})
    nvidia = (raw / "machine.out").read_text() if (raw / "machine.out").exists() else ""
    listed = {kind: [what for k, what in findings if k == kind] for kind in ("proven", "failed", "not tried")}
    summary = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": machine.get("device"),
        "nvidia_smi": nvidia.splitlines(),
        "versions": machine.get("versions"),
        "cuda": machine.get("cuda"),
        "steps": steps,
        **listed,
    }
    text = [
        f"{kind}:\n" + "\n".join(f"  - {what}" for what in whats or ["nothing"])
        for kind, whats in listed.items()
    ]
    tables = [sweep_report.text(run) for run in sweeps.values()]
    tables += [table.tables(str(raw / f"{name}.json")) for name, run in runs.items() if run["benchmarks"]]
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    (out / "rows.json").write_text(json.dumps(measured))
    (out / "table.md").write_text("\n\n".join([f"```\n{nvidia}```"] * bool(nvidia) + tables + text) + "\n")
    print("\n" + "\n".join(text) + f"\n\n{out}: summary.json, rows.json, table.md, log.txt")
    sys.exit(bool(listed["failed"]))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python benchmarks/gpu_report.py RAW OUT")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
