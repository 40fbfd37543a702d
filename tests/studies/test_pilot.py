"""The search of ``--rhos auto``, against curves whose crossing is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from support.wording import refused

from rft_fast import studies
from rft_fast.studies import pilot


def run(curve: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """The result for a curve of medians, and what was measured for it."""
    medians = {rho: curve(rho) for rho in pilot.GRID}
    for _ in range(20):
        state = pilot.search(medians)
        if state.found:
            return state.rho, medians
        assert state.rho not in medians
        medians[state.rho] = curve(state.rho)
    raise AssertionError("the search does not end")


@pytest.mark.parametrize("truth", [0.0123, 0.05, 0.1, 0.2, 0.63, 1.0, 4.4, 9.5])
@pytest.mark.parametrize("power", [1, 2, 3])
def test_the_crossing_of_a_power_is_found(truth: float, power: int) -> None:
    rho, medians = run(lambda rho: 0.1 * (rho / truth) ** power)
    assert rho == pytest.approx(truth, rel=0.02) and rho in medians
    assert len(medians) <= 7 + 6
    assert all(float(f"{rho:.3g}") == rho for rho in medians)


def test_the_lowest_crossing_counts() -> None:
    rho, _ = run(lambda rho: 0.2 if 0.2 < rho < 2 else 0.01 if rho < 5 else 1.0)
    assert rho == pytest.approx(0.2, rel=0.02)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_lies_above(bad: float) -> None:
    rho, _ = run(lambda rho: rho**2 if rho < 2 else bad)
    assert rho == pytest.approx(math.sqrt(0.1), rel=0.02)
    rho, _ = run(lambda rho: 0.01 if rho < 0.5 else bad)
    assert rho == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("scale", [1e-4, 1e5])
def test_no_crossing_is_refused(scale: float) -> None:
    with pytest.raises(pilot.NoCrossing):
        run(lambda rho: scale * rho**2)


def rows(slopes: dict[str, float], rhos: tuple[float, ...] = pilot.GRID) -> pd.DataFrame:
    """Rows of a pilot on two data sets, whose mean sharpness is slope times rho squared."""
    return studies.frame(
        {"study": "pilot", "model": name, "dataset": dataset, "alpha": 1.0, "rho": rho, "loss": 1.0,
         "sharpness": share * slope * rho**2, "draws": 4}
        for name, slope in slopes.items()
        for rho in rhos
        for dataset, share in (("near", 0.5), ("far", 1.5))
    )  # fmt: skip


def test_the_median_model_decides() -> None:
    slopes = {"a": 1e-3, "b": 2.0, "c": 500.0, "d": 3.0, "e": 40.0}
    table, models = rows(slopes), list(slopes)
    for _ in range(pilot.STEPS):
        state = pilot.progress(table, models)
        assert not state.found
        table = pd.concat([table, rows(slopes, (state.rho,))])
    state = pilot.progress(table, models)
    assert state.found and state.rho == pytest.approx(
        math.sqrt(0.1 / np.median(list(slopes.values()))), rel=0.02
    )
    assert pilot.by_model(table)[state.rho].to_dict() == pytest.approx(
        {name: slope * state.rho**2 for name, slope in slopes.items()}
    )


def test_a_rho_counts_once_all_models_have_it() -> None:
    slopes = {"a": 2.0, "b": 3.0}
    whole = rows(slopes)
    assert pilot.progress(whole.iloc[:0], ["a", "b"]).rho == pilot.GRID[0]
    assert pilot.progress(whole[whole["model"] == "a"], ["a", "b"]).rho == pilot.GRID[0]
    first = pilot.progress(whole, ["a", "b"])
    half = pd.concat([whole, rows({"a": 2.0}, (first.rho,))])
    assert pilot.progress(half, ["a", "b"]) == first  # stopped between two models
    assert pilot.progress(pd.concat([half, rows({"b": 3.0}, (first.rho,))]), ["a", "b"]) != first


def test_the_refusal_says_what_was_found() -> None:
    with refused(pilot.NoCrossing, "--rhos", 2, 0.01, 10, "near"):
        pilot.progress(rows({"a": 1e-5, "b": 3e-5}), ["a", "b"])
