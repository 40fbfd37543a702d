"""The benchmark of published loops: a side that computes something else must be caught, not be timed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import clock
import loops
import peers
import published
import pytest
import torch

import rft_fast as rft


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> peers.Case:
    """Small tensors, and a clock that leaves the caches as they are."""

    def measure(_device: torch.device, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    monkeypatch.setattr(clock, "measure", measure)
    monkeypatch.setattr(peers, "shapes", lambda _name: [(30, 40), (30,), (7, 30)])
    return peers.make_case("small", torch.float32, loops.CPU)


def test_the_whole_script(small: peers.Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads, out = torch.get_num_threads(), tmp_path / "loops.json"
    try:
        loops.main(["--rounds", "1", "--draws", "2", "--threads", "1", "--out", str(out)])
    finally:
        torch.set_num_threads(threads)
    found = json.loads(out.read_text())
    assert {"date", "device", "versions", "threads"} <= set(found["about"])
    assert [len(found[kind]) for kind in ("loops", "operations")] == [5, 7]
    printed = capsys.readouterr().out
    for kind, faster in (("loops", True), ("operations", False)):
        for row in found[kind]:
            assert row["elements"] == small.elements and f"| {row['name']} |" in printed
            ratios = sorted(other / ours if faster else ours / other for ours, other in row["seconds"])
            assert row["ratio"][0] == pytest.approx(ratios[len(ratios) // 2])
            word, goal = row["goal"].rsplit(" ", 1)
            assert word == ("at least" if faster else "at most")
            assert row["reached"] == ((row["ratio"][0] >= float(goal)) is faster)


def wrong_sharpness(right: Callable[..., Any], model: Any, evaluate: Any, rho: float, *others: Any) -> Any:
    return right(model, evaluate, rho * 1.01, *others)


def wrong_call(right: Callable[..., Any], model: Any, scale: float, *others: Any) -> Any:
    return right(model, -scale, *others)


def wrong_step(
    right: Callable[..., Any], model: Any, evaluate: Any, eps: float, lr: float, *others: Any
) -> Any:
    return right(model, evaluate, eps, -lr, *others)


class WrongSam(published.Sam):
    def second_step(self) -> None:
        self.base.step()  # from where the ascent led


@pytest.mark.parametrize(
    "name, wrong, made",
    [
        ("average_sharpness", wrong_sharpness, lambda case: loops.sharpness(case, 1, 2)),
        ("mezo_perturb", wrong_call, lambda case: next(loops.mezo(case, 1))),
        ("mezo_step", wrong_step, lambda case: list(loops.mezo(case, 1))[1]),
        ("Sam", None, lambda case: loops.sam(case, 1, adaptive=False)),
        ("Sam", None, lambda case: loops.sam(case, 1, adaptive=True)),
    ],
    ids=["sharpness", "mezo call", "mezo", "sam", "asam"],
)
def test_a_loop_that_computes_something_else_is_caught(
    name: str, wrong: Any, made: Any, small: peers.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(small).check()
    right = getattr(published, name)
    monkeypatch.setattr(published, name, partial(wrong, right) if wrong else WrongSam)
    with pytest.raises(AssertionError, match=r"evaluation [012], tensor 0"):
        made(small).check()


def test_an_operation_that_computes_something_else_is_caught(
    small: peers.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = rft.add_
    for row in loops.operations(small, 1):
        row.check()
    monkeypatch.setattr(rft, "add_", lambda out, w, b, scale, weight: right(out, w, b, 0.31, weight))
    with pytest.raises(AssertionError, match="not close"):
        next(loops.operations(small, 1)).check()
