"""The benchmarks' own parts: a row that measures the wrong thing must fail, not be published."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import bench_kernels
import clock
import gpu_program
import gpu_report
import open_clip
import peers
import pytest
import table
import torch

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def not_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the processes started here: pytest-benchmark measures nothing in a worker of xdist."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14"])
def test_shapes_are_those_of_the_image_towers(name: str) -> None:
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config(name))
    tower = [tuple(p.shape) for p in model.visual.parameters()]
    assert sorted(peers.shapes(name)) == sorted([*tower, (1000, model.visual.output_dim), (1000,)])


def made(op: peers.Operation, name: str = "native", dtype: torch.dtype = torch.float32):
    case = peers.make_case("layer", dtype, CPU)
    contender = peers.contenders(op, CPU)[name](case, op)
    contender.run()
    return case, contender


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", peers.OPERATIONS)
def test_wrong_numbers_are_found(operation: str, dtype: torch.dtype) -> None:
    op = peers.OPERATIONS[operation]
    case, contender = made(op, dtype=dtype)
    bench_kernels.check_numbers(case, op, contender.drawn)
    case.out[0].view(-1)[77] *= 1.1
    with pytest.raises(AssertionError, match="1 of 1048576 numbers are off"):
        bench_kernels.check_numbers(case, op, contender.drawn)
    case.out[1].view(-1)[5] = torch.nan
    with pytest.raises(AssertionError, match="not everything was written"):
        bench_kernels.check_numbers(case, op, contender.drawn)


def test_wrong_distributions_are_found() -> None:
    case, _ = made(peers.OPERATIONS["all"])
    bench_kernels.check_numbers(case, peers.OPERATIONS["all"], None)
    for wrong, message in (
        (peers.Operation(rho=peers.RHO, keep=0.51), "of the weights were kept"),
        (peers.Operation(rho=peers.RHO * 1.01, keep=peers.KEEP), "variance 0.9"),
        (peers.Operation(rho=peers.RHO), "noise of mean"),
    ):
        with pytest.raises(AssertionError, match=message):
            bench_kernels.check_numbers(case, wrong, None)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets so many seconds pass on a clock that stands still otherwise: a real one runs on as it likes."""
    now = [1000.0]
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def passes(seconds: float) -> None:
        now[0] += seconds

    return passes


def test_the_clock_times_what_lies_between_two_calls(passes: Callable[[float], None]) -> None:
    timer = clock.clock(CPU)
    for _ in range(2):
        passes(3)
        start = timer()
        passes(0.02)
        assert timer() - start == pytest.approx(0.02)
    assert clock.measure(CPU, lambda: passes(0.02)) == pytest.approx(0.02)
    assert clock.in_turns(CPU, lambda: passes(0.005), lambda: passes(0.1), 3) == pytest.approx([20] * 3)


def test_the_clock_is_a_real_one() -> None:
    assert clock.measure(CPU, lambda: time.sleep(0.02)) >= 0.02


def test_a_round_that_failed_does_not_swap_start_and_end(passes: Callable[[float], None]) -> None:
    timer = clock.clock(CPU)
    with pytest.raises(ZeroDivisionError):
        clock.measure(CPU, lambda: 1 // 0)
    timer.reset()
    assert clock.measure(CPU, lambda: passes(0.02)) == pytest.approx(0.02)


def test_rows_cover_every_combination_and_run_on_one_device() -> None:
    rows = [row.values for row in bench_kernels.rows(CPU)]
    assert len(set(rows)) == len(rows)
    ours = {row[:3] for row in rows if row[3] == "native"}
    assert len(ours) == len(bench_kernels.SHAPES) * len(bench_kernels.DTYPES) * len(peers.OPERATIONS)
    on_gpu = peers.contenders(peers.OPERATIONS["both"], torch.device("cuda"))
    assert {"native", "triton", "reference", "torch._foreach_*", "torch.compile"} <= set(on_gpu)


def test_measured_rows_become_a_table(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/bench_kernels.py",
         "-k", "(layer-bfloat16-both and (native or folded)) or (host and native)",
         f"--benchmark-json={out}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    rows = {row["extra_info"]["name"]: row for row in json.loads(out.read_text())["benchmarks"]}
    folded = rows["torch._foreach_* folded"]["extra_info"]
    assert folded["elements"] == 4096 * 1024 + 4096 and len(folded["times_native"]) == 15
    seconds = rows["torch._foreach_* folded"]["stats"]["median"]
    assert folded["gb_per_s"] == pytest.approx(3 * 2 * folded["elements"] / seconds / 1e9)
    assert folded["share_of_copy"] == pytest.approx(folded["gb_per_s"] / folded["copy_gb_per_s"])
    text = table.tables(str(out))
    assert "**layer, bfloat16, both** (4.2 M elements)" in text and "| torch._foreach_* folded |" in text
    assert "**host time of Plan.write, 296 tensors, whole model**" in text
    # A row that failed after it was timed costs no other row.
    run = json.loads(out.read_text())
    run["benchmarks"][0]["extra_info"] = {}
    out.write_text(json.dumps(run))
    assert len(table.tables(str(out)).splitlines()) == len(text.splitlines()) - 1


def bench(out: Path, *arguments: str) -> list[str]:
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    return [*pytest_command, *arguments, f"--benchmark-json={out}"]


def test_rows_that_come_too_late_are_left_out(tmp_path: Path) -> None:
    done = subprocess.run(
        bench(tmp_path / "out.json", "benchmarks/bench_kernels.py", "-k", "host and native"),
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"STOP_AT": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and "[2] benchmarks/conftest.py" in done.stdout, done.stdout
    assert "the time was up" in done.stdout


def test_an_interrupted_run_keeps_the_rows_that_it_has(tmp_path: Path) -> None:
    test = ROOT / "benchmarks" / "bench_interrupted_for_a_test.py"
    test.write_text(
        "import os, signal\n"
        "def test_first(benchmark): benchmark.pedantic(lambda: None, rounds=3)\n"
        "def test_second(benchmark):\n"
        "    benchmark.pedantic(lambda: os.kill(os.getpid(), signal.SIGINT), rounds=3)\n"
    )
    try:
        done = subprocess.run(
            bench(tmp_path / "out.json", str(test), f"--junitxml={tmp_path / 'out.xml'}"),
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
    finally:
        test.unlink()
    assert done.returncode == 2, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert row["name"] == "test_first" and (tmp_path / "out.xml").exists()


# ---------------------------------------------------------------- benchmarks/gpu.sh and its report


def gpu_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    # The script runs the first python3 that it finds: this one.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "benchmarks/gpu.sh", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_the_script_lists_its_steps() -> None:
    done = gpu_script("--list")
    steps = [line.split()[0] for line in done.stdout.splitlines()]
    assert done.returncode == 0 and steps[:3] == ["machine", "build", "backends"]
    assert {"kernels", "triton", "torch_library", "path", "memcheck", "racecheck", "host", "large"} <= set(
        steps
    )


def test_the_script_on_a_cpu(tmp_path: Path) -> None:
    done = gpu_script("--device", "cpu", "--only", "backends,program,host", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"summary.json", "rows.json", "table.md", "log.txt"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [step["step"] for step in summary["steps"]] == ["backends", "program", "host"]
    assert not summary["failed"] and any("program: done" in what for what in summary["proven"])
    assert any("on the CPU Triton is interpreted" in what for what in summary["not tried"])
    assert "native on cpu: 22 forms of 68 rows are right" in (tmp_path / "log.txt").read_text()
    done = gpu_script("--device", "cpu", "--only", "nosuch", str(tmp_path))
    assert done.returncode == 2 and "no step nosuch" in done.stderr


def test_the_program_finds_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_program.written

    def wrong(impl: str, device: torch.device, form: dict) -> list[torch.Tensor]:
        out = right(impl, device, form)
        if impl == "native":
            out[-1][-1] += 1
        return out

    monkeypatch.setattr(gpu_program, "written", wrong)
    with pytest.raises(AssertionError, match="Mismatched elements: 1"):
        gpu_program.check("native", CPU)


def measured(name: str, dtype: str, operation: str, **more: object) -> dict:
    info = {"name": name, "shape": "64M", "dtype": dtype, "operation": operation, "elements": 1, **more}
    info = {"gb_per_s": 1.0, "share_of_copy": 0.5, "copy_gb_per_s": 2.0, "times_native": [], **info}
    return {"group": "g", "extra_info": info, "stats": {"median": 1.0, "q1": 1.0, "q3": 1.0}}


def test_the_report_tells_proven_failed_and_not_tried_apart(tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir(), out.mkdir()
    steps = {"build": 0, "kernels": 1, "triton": 124, "memcheck": 127, "large": 0, "vit_l": -1, "program": 3}
    lines = [json.dumps({"step": s, "code": c, "seconds": 2, "limit": 9}) for s, c in steps.items()]
    (raw / "steps.jsonl").write_text("\n".join(lines))
    (raw / "memcheck.out").write_text("env: 'compute-sanitizer': No such file or directory\n")
    (raw / "program.out").write_text("Traceback\nAssertionError: 1 differs\n\n")
    (raw / "kernels.xml").write_text(
        '<testsuites><testcase name="a"/><testcase name="b"><failure message="7 != 8&#10;more"/></testcase>'
        '<testcase name="c"><skipped message="there is no second GPU"/></testcase></testsuites>'
    )
    rows = [
        measured("native", "float32", "both", share_of_copy=0.93),
        measured("native", "bfloat16", "both", share_of_copy=0.60),
        measured("torch._foreach_*", "float32", "both", times_native=[4.0, 6.5, 7.0]),
        {**measured("native", "", ""), "group": "host", "extra_info": {"name": "native", "host_us": 31.0}},
    ]
    machine = {"device": "GPU", "cuda": "13.0", "versions": {"torch": "2", "triton": "3", "python": "3"}}
    (raw / "large.json").write_text(
        json.dumps({"machine_info": machine, "datetime": "2026-01-01T", "benchmarks": rows})
    )
    with pytest.raises(SystemExit) as status:
        gpu_report.main(raw, out)
    assert status.value.code == 1
    summary = json.loads((out / "summary.json").read_text())
    for kind, expected in {
        "proven": [
            "build: done in 2 s", "kernels: 1 tests passed", "large: done in 2 s",
            "goal: native, float32, both: share of copy: 93 %, goal 90 %",
            "goal: both, float32: time of torch._foreach_* over native's: 6.5, goal 5",
        ],
        "failed": [
            "kernels: b: 7 != 8", "triton: not done after 9 s; it printed nothing",
            "program: exit status 3; AssertionError: 1 differs",
            "goal: native, bfloat16, both: share of copy: 60 %, goal 75 %",
            "goal: native, host: 31 us, goal 25 us",
        ],
        "not tried": [
            "kernels: c: there is no second GPU", "vit_l: the time was up",
            "memcheck: env: 'compute-sanitizer': No such file or directory",
            "goal: triton, float32, both: share of copy: not measured",
        ],
    }.items():  # fmt: skip
        assert set(expected) <= set(summary[kind]), summary[kind]
    assert len(summary["failed"]) == 5
    assert "| torch._foreach_* |" in (out / "table.md").read_text()
