"""benchmarks/gpu.sh: what it measured is on disk whatever ends it, and nothing reads as done that was not."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import gpu
import gpu_program
import gpu_report
import pytest
import record
import torch
from support import PATIENCE
from support.wording import said

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
# The script runs the first python3 that it finds: this one.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTEST_XDIST_WORKER"} | {"PATH": PATH}


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "benchmarks/gpu.sh", *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict]]:
    """Rows of this process go to a file, and are read back from it."""
    file = tmp_path / "rows.jsonl"
    monkeypatch.setenv("ROWS", str(file))
    monkeypatch.setenv("STEP", "here")
    return lambda: record.read(file)


def stepped(out: Path, *steps: gpu.Step, seconds: float = 600) -> list[dict]:
    """The rows of a run of these steps."""
    run = gpu.Run(out, "cpu", seconds)
    for step in steps:
        run.step(step)
    return record.read(run.rows)


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", textwrap.dedent(code))


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_limits_of_a_quick_run_fit_into_its_time(device: str) -> None:
    done = script("--quick", "--list", "--device", device)
    assert done.returncode == 0, done.stderr
    *steps, total = [line.split() for line in done.stdout.splitlines()]
    limits = [int(words[1]) for words in steps]
    assert sum(limits) + gpu.KEPT == int(total[2]) <= gpu.QUICK <= 570
    names = [words[0] for words in steps]
    assert len(set(names)) == len(names)
    if device == "cuda":
        expected = ["program", "device", "kernels", "sweep_l", "tests", "memcheck", "sweep_b"]
        assert names == expected and "racecheck" not in done.stdout


def test_what_a_step_runs_exists() -> None:
    for device in ("cuda", "cpu"):
        for quick in (True, False):
            for step in gpu.steps(device, quick):
                files = [word for word in step.command if word.endswith(".py")]
                assert files and all((ROOT / file).is_file() for file in files), step


@pytest.mark.parametrize("limit, margin", [(1000, 20), (100, 20), (40, 8), (5, 1), (-3, 0)])
def test_the_margin_is_a_fifth_of_what_is_left_and_twenty_seconds_at_most(
    limit: float, margin: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted from the end of the imports: a step of 40 s that imports for 30 has 8 s left, not none."""
    now = [5000.0]
    monkeypatch.setattr(record.time, "time", lambda: now[0])
    monkeypatch.setenv("DEADLINE", str(now[0] + limit))
    record.start()
    try:
        now[0] += limit - margin - 0.01
        assert limit < 0 or not record.time_is_up()
        now[0] += 0.02
        assert record.time_is_up()
    finally:
        monkeypatch.delenv("DEADLINE")
        record.start()
    assert not record.time_is_up()


# ---------------------------------------------------------------- rows are on disk at once


def test_rows_survive_a_kill_at_any_moment(tmp_path: Path) -> None:
    """A step prints what it measured after it wrote the row: there is a row for all that was printed."""
    code = """
        import record
        for number in range(10**9):
            record.row("timing", number=number, padding="x" * 3000)
            print("measured", number)
    """
    driver = f"""
        import sys; sys.path.insert(0, {str(ROOT / "benchmarks")!r})
        import gpu, pathlib
        run = gpu.Run(pathlib.Path(sys.argv[1]), "cpu", 60)
        run.step(gpu.Step("a step", 50, {python(code)!r}))
    """
    moments = random.Random(7)
    for number in range(4):
        out = tmp_path / str(number)
        out.mkdir()
        process = subprocess.Popen([*python(driver), str(out)], start_new_session=True)
        try:
            until = time.monotonic() + PATIENCE
            while len(record.read(out / "rows.jsonl")) < 5 and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.4))
        finally:
            step = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
            os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(step), signal.SIGKILL)
            process.wait()
        said = len(re.findall(r"^measured \d+$", (out / "log.txt").read_text(), re.M))
        kept = record.read(out / "rows.jsonl")
        assert [row["number"] for row in kept] == list(range(len(kept)))
        assert 4 <= said <= len(kept) <= said + 1


def test_the_cpu_version_keeps_what_it_measured_when_it_is_killed(tmp_path: Path) -> None:
    command = ["bash", "benchmarks/gpu.sh", "--quick", "--device", "cpu", "--only", "program", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, start_new_session=True)
    rows = tmp_path / "rows.jsonl"
    until = time.monotonic() + PATIENCE
    while len(record.read(rows)) < 8 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    step = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
    os.killpg(process.pid, signal.SIGKILL)
    os.killpg(int(step), signal.SIGKILL)
    process.wait()
    kept = record.read(rows)
    assert [row["kind"] for row in kept[:4]] == ["machine", "about", "backend", "host"]
    assert len(kept) >= 8 and all(row["right"] for row in kept if row["kind"] == "form")
    # Begun anew elsewhere: the same folder is refused, and its rows stay.
    assert script("--quick", "--device", "cpu", str(tmp_path)).returncode == 2
    assert record.read(rows) == kept


def test_a_line_that_was_cut_off_is_left_out_and_a_broken_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    record.append(file, {"step": "a", "n": 1})
    whole = file.read_text()
    file.write_text(whole + '{"step": "b", "n"')
    assert record.read(file) == [{"step": "a", "n": 1}]
    file.write_text('{"step": "b", "n"\n' + whole)
    with pytest.raises(json.JSONDecodeError):
        record.read(file)


@pytest.mark.slow
def test_each_form_is_a_row_before_the_next_one_runs(
    rows: Callable[[], list[dict]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a form that is wrong is told from those that are right, by all their values."""
    right, seen = gpu_program.written, []

    def written(impl: str, device: torch.device, form: dict) -> list[torch.Tensor]:
        out = right(impl, device, form)
        if impl == "native":
            seen.append(len(rows()))
            if len(seen) == 3:
                out[-1][-1] += 1
        return out

    monkeypatch.setattr(gpu_program, "written", written)
    assert gpu_program.check("native", CPU) == 1
    forms = rows()
    assert seen == list(range(len(forms))) and len(forms) == 42
    assert [row["right"] for row in forms].count(False) == 1 and not forms[2]["right"]
    assert "Mismatched elements: 1" in forms[2]["why"] and forms[3]["rows"] == 68


def test_outcomes_of_tests_are_rows_and_what_comes_too_late_is_left_out(tmp_path: Path) -> None:
    test = tmp_path / "test_outcomes.py"
    test.write_text(
        "import os, pytest, record, pathlib\n"
        "found = lambda: record.read(pathlib.Path(os.environ['ROWS']))\n"
        "def test_a(): assert not found()\n"
        "def test_b(): assert [r['outcome'] for r in found()] == ['passed'] and 7 == 8, 'seven'\n"
        "def test_c(): pytest.skip('there is no second GPU')\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError('no fixture')\n"
        "def test_d(broken): pass\n"
        "def test_e(): record._stop = 0\n"
        "def test_f(): pass\n"
    )
    rows = tmp_path / "rows.jsonl"
    paths = os.pathsep.join([str(ROOT / "benchmarks"), ENVIRONMENT.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "gpu_rows", "-p", "no:cacheprovider", str(test)],
        cwd=tmp_path, env=ENVIRONMENT | {"PYTHONPATH": paths, "ROWS": str(rows), "STEP": "tests"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    found = {row.get("test", row.get("what")).partition("::")[2]: row for row in record.read(rows)}
    outcomes = {name: row.get("outcome", row["kind"]) for name, row in found.items()}
    assert outcomes == {
        "test_a": "passed",
        "test_b": "failed",
        "test_c": "skipped",
        "test_d": "failed",
        "test_e": "passed",
        "test_f": "left out",
    }
    assert "seven" in found["test_b"]["why"] and "second GPU" in found["test_c"]["why"]
    assert "no fixture" in found["test_d"]["why"]


# ---------------------------------------------------------------- what a step comes to

STEPS = {
    "done": ("import record; record.row('timing', seconds=1.0)", "1 measurements"),
    "measured nothing": ("print('fine')", "it measured nothing"),
    "all skipped": (
        "import record; record.row('test', outcome='skipped', test='a::b', why='')",
        "measured nothing",
    ),
    "all left out": ("import record; record.left_out('it')", "measured nothing"),
    "failed": (
        "import record; record.row('timing'); raise ValueError('the reason')",
        "ValueError: the reason",
    ),
    "killed": ("import os; os.kill(os.getpid(), 9)", "exit status -9"),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_done_only_if_it_measured_and_ended_well(name: str, tmp_path: Path) -> None:
    code, why = STEPS[name]
    step = stepped(tmp_path, gpu.Step("x", 400, python(code)))[-1]
    assert step["kind"] == "step" and step["outcome"] == ("done" if name == "done" else "failed")
    assert why in step["why"] and why in (tmp_path / "summary.md").read_text()


@pytest.mark.slow
def test_a_step_ends_at_its_limit_with_all_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is interrupted, then killed; what it measured stays, and so does the time of the next step."""
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    monkeypatch.setattr(gpu, "LEAST", 0)
    stubborn = """
        import record, signal, subprocess, sys, time
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        record.row("timing", child=child.pid)
        time.sleep(600)
    """
    found = stepped(
        tmp_path, gpu.Step("x", 10, python(stubborn)), gpu.Step("y", 300, python(STEPS["done"][0]))
    )
    assert [row.get("outcome") for row in found] == [None, "cut off", None, "done"]
    assert "after 1 measurements" in found[1]["why"]
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(found[0]["child"])], capture_output=True, text=True
    )
    assert state.stdout.strip()[:1] in ("", "Z")


def test_what_does_not_fit_or_cannot_run_is_said(tmp_path: Path) -> None:
    missing = gpu.Step("tool", 30, ("nosuch",), tool="no-such-sanitizer")
    late = gpu.Step("late", 30, python("raise SystemExit"))
    found = stepped(tmp_path, missing, late, seconds=3)
    assert [row["outcome"] for row in found] == ["not begun", "not begun"]
    said("\n".join(row["why"] for row in found), "no-such-sanitizer", "3 s")
    summary = (tmp_path / "summary.md").read_text()
    assert "tool: not begun: no-such-sanitizer" in summary.split("## Not tried")[1]


# ---------------------------------------------------------------- requests that cannot be met


def test_a_request_that_cannot_be_met_is_refused_at_once(tmp_path: Path) -> None:
    """With all reasons together, and before anything is written."""
    (tmp_path / "rows.jsonl").write_text("precious")
    done = script("--quick", "--only", "nosuch", "--seconds", "3", str(tmp_path))
    assert done.returncode == 2 and not done.stdout
    said(done.stderr, "nosuch", 3, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
    assert (tmp_path / "rows.jsonl").read_text() == "precious"
    said(script("--quick").stderr, "OUT")
    (tmp_path / "rows.jsonl").rename(tmp_path / "summary.md")
    said(script("--quick", "--device", "cpu", str(tmp_path)).stderr, "summary.md")
    done = script("--quick", "--device", "cpu", "/proc/nowhere")
    assert done.returncode == 2
    said(done.stderr, "/proc/nowhere")


def test_missing_packages_are_named_without_importing_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PACKAGES", ["json", "no_such_package", "nor_this"])
    monkeypatch.setattr(gpu.sysconfig, "get_config_var", lambda name: ".no-such-suffix")
    options = gpu.arguments(["--quick", "--device", "cpu", "somewhere"])
    options.seconds = 100
    packages, module = gpu.problems(options, [])
    said(packages, "no_such_package, nor_this", "gpu_carry.sh")
    said(module, "_native.no-such-suffix", "build_ext --inplace")
    light = python("import gpu, sys; print([m for m in ('torch', 'numpy') if m in sys.modules])")
    done = subprocess.run(light, cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# ---------------------------------------------------------------- the report


def write(name: str, dtype: str, operation: str, shape: str = "256M", **more: object) -> dict:
    info = {"name": name, "shape": shape, "dtype": dtype, "operation": operation, "elements": 1, **more}
    info = {"gb_per_s": 1.0, "share_of_copy": 0.5, "share_of_triad": 0.5, "times_native": [], **info}
    stats = {"median": 1.0, "q1": 1.0, "q3": 1.0}
    return {"step": "kernels", "kind": "write", "group": "g", "extra_info": info, "stats": stats}


def test_the_report_tells_proven_failed_and_not_tried_apart() -> None:
    rows = [
        {"step": "machine", "kind": "machine", "device": "cuda", "gpu": "H200, 580"},
        {
            "step": "p",
            "kind": "backend",
            "impl": "triton",
            "device": "cuda",
            "works": False,
            "why": "no ptxas",
        },
        *(
            {"step": "p", "kind": "form", "impl": "native", "form": "a", "right": True, "why": ""}
            for _ in "123"
        ),
        {"step": "p", "kind": "form", "impl": "native", "form": "rho 1", "right": False, "why": "1 differs"},
        {"step": "t", "kind": "test", "test": "t.py::b", "outcome": "failed", "why": "7 != 8"},
        {"step": "t", "kind": "test", "test": "t.py::a", "outcome": "passed", "why": ""},
        {"step": "t", "kind": "left out", "what": "t.py::c"},
        write("native", "float32", "both", share_of_triad=0.93),
        write("native", "bfloat16", "both", share_of_triad=0.60),
        write("torch._foreach_*", "float32", "both", shape="64M", times_native=[4.0, 6.5, 7.0]),
        {
            "step": "p",
            "kind": "host",
            "impl": "native",
            "what": "whole model",
            "us": 31.0,
            "q1": 30,
            "q3": 33,
        },
        {"step": "s", "kind": "goal", "what": "GPU busy", "got": 0.8, "goal": 0.9, "met": False},
        {"step": "s", "kind": "not measured", "part": "busy", "arch": "tiny", "why": "there is no GPU"},
        {"step": "s", "kind": "failed", "part": "layers", "arch": "tiny", "why": "losses differ"},
        {"step": "s", "kind": "result", "part": "stages", "value": 50.0},
        {"step": "s", "kind": "result", "part": "stages", "value": 51.123456},
        {"step": "t", "kind": "step", "outcome": "failed", "why": "exit 1", "seconds": 3, "limit": 9},
    ]
    found = list(gpu_report.findings(rows))
    for kind, expected in {
        "proven": [
            "p: forms of native's write that are right: 3",
            "t: tests of t.py that passed: 1",
            "goal: native, float32, both, 256M: share of triad: 93 %, goal 90 %",
            "goal: both, float32: time of torch._foreach_* over native's: 6.5, goal 5",
        ],
        "failed": [
            "backend triton on cuda: no ptxas",
            "p: native, rho 1: 1 differs",
            "t: b: 7 != 8",
            "goal: native, bfloat16, both, 256M: share of triad: 60 %, goal 75 %",
            "goal: native: host time of Plan.write, 296 tensors: 31 us, goal 25 us",
            "goal: GPU busy: 0.8, goal 0.9",
            "t: failed: exit 1",
            "s: layers of tiny: losses differ",
        ],
        "not tried": [
            "t: t.py::c: the time was up",
            "s: busy of tiny: there is no GPU",
            "goal: triton, float32, both, 256M: share of triad: not measured",
        ],
    }.items():
        whats = [what for k, what in found if k == kind]
        assert set(expected) <= set(whats), whats
        assert kind != "failed" or len(whats) == len(expected)
    text = gpu_report.summary(rows)
    assert (
        "| torch._foreach_* |" in text
        and "| s | stages | 51.12 |" in text
        and "| 50 |" not in text
        and "gpu H200, 580" in text
    )
    # On a CPU nothing was promised of a GPU's kernels.
    rows[0]["device"] = "cpu"
    assert not any("share of triad" in what for _, what in gpu_report.findings(rows))
