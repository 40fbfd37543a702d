"""The benchmarks' own parts: a row that measures the wrong thing must fail, not be published."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import bench_kernels
import clock
import open_clip
import peers
import pytest
import table
import torch
from support.wording import refused

ROOT = Path(__file__).parents[2]
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


@pytest.mark.slow(but="^interpolate-dtype0$")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", peers.OPERATIONS)
def test_wrong_numbers_are_found(operation: str, dtype: torch.dtype) -> None:
    op = peers.OPERATIONS[operation]
    case, contender = made(op, dtype=dtype)
    bench_kernels.check_numbers(case, op, contender.drawn)
    case.out[0].view(-1)[77] *= 1.1
    with refused(AssertionError, 1, 1048576):
        bench_kernels.check_numbers(case, op, contender.drawn)
    case.out[1].view(-1)[5] = torch.nan
    with refused(AssertionError):
        bench_kernels.check_numbers(case, op, contender.drawn)


def test_wrong_distributions_are_found() -> None:
    case, _ = made(peers.OPERATIONS["all"])
    bench_kernels.check_numbers(case, peers.OPERATIONS["all"], None)
    for wrong in (
        peers.Operation(rho=peers.RHO, keep=0.51),
        peers.Operation(rho=peers.RHO * 1.01, keep=peers.KEEP),
        peers.Operation(rho=peers.RHO),
    ):
        with refused(AssertionError):
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
    shapes = set(bench_kernels.SHAPES) - set(bench_kernels.GPU_ONLY)
    assert len(ours) == len(shapes) * len(bench_kernels.DTYPES) * len(peers.OPERATIONS)
    assert {row[0] for row in ours} == shapes
    on_gpu = peers.contenders(peers.OPERATIONS["both"], torch.device("cuda"))
    assert {"native", "triton", "reference", "torch._foreach_*", "torch.compile"} <= set(on_gpu)


@pytest.mark.slow
def test_measured_rows_become_a_table(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/bench_kernels.py",
         "-k", "layer-bfloat16-both and (native or folded)",
         f"--benchmark-json={out}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    rows = {row["extra_info"]["name"]: row for row in json.loads(out.read_text())["benchmarks"]}
    folded = rows["torch._foreach_* folded"]["extra_info"]
    assert folded["elements"] == 4096 * 1024 + 4096 and len(folded["times_native"]) == 15
    seconds = rows["torch._foreach_* folded"]["stats"]["median"]
    assert folded["gb_per_s"] == pytest.approx(3 * 2 * folded["elements"] / seconds / 1e9)
    for yardstick in ("copy", "triad"):
        share = folded["gb_per_s"] / folded[f"{yardstick}_gb_per_s"]
        assert folded[f"share_of_{yardstick}"] == pytest.approx(share)
    text = table.tables(str(out))
    assert (
        "**layer, bfloat16, both** (4.2 M elements; copy " in text and "| torch._foreach_* folded |" in text
    )
    # A row that failed after it was timed costs no other row.
    run = json.loads(out.read_text())
    run["benchmarks"][0]["extra_info"] = {}
    out.write_text(json.dumps(run))
    assert len(table.tables(str(out)).splitlines()) == len(text.splitlines()) - 1


def bench(out: Path, *arguments: str) -> list[str]:
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    return [*pytest_command, *arguments, f"--benchmark-json={out}"]


@pytest.mark.slow
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
