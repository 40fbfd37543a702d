"""What intervals allow one to conclude, against intervals that are computed here."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from rft_fast.report import tables
from rft_fast.studies import frame
from rft_fast.studies.facts import Facts
from rft_fast.studies.verdicts import Sign, half_width, layer_shape, mode, sign, straggling


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.1, 0.3, "above"), (-0.3, -0.1, "below"), (-0.1, 0.3, "unclear"), (0, 0.3, "unclear"),
     (-0.3, 0, "unclear"), (math.nan, math.nan, "unknown")],
)  # fmt: skip
def test_a_sign_is_that_of_the_whole_interval(low: float, high: float, expected: Sign) -> None:
    assert sign(low, high) == expected


def test_an_interval_over_masks_needs_an_error() -> None:
    assert half_width(0.01, 4) == pytest.approx(0.01 * stats.t.ppf(0.975, 4))
    assert all(math.isnan(half_width(*given)) for given in [(0.0, 4), (math.nan, 4), (0.01, 0)])


@pytest.mark.parametrize(
    ("shown", "high", "expected"),
    [(0.03, 0.05, "high gain"), (0.02, 0.05, "high gain"), (0.01, 0.05, "gain"), (0.0, 0.05, "undecided"),
     (0.0, 0.02, "undecided"), (0.0, 0.019, "failure"), (0.0, -0.1, "failure"), (0.01, 0.015, "gain"),
     (0.0, math.nan, "undecided")],
)  # fmt: skip
def test_a_mode_by_bounds(shown: float, high: float, expected: str) -> None:
    assert mode({"gain_shown": shown, "gain_high": high, "xi": 0.02}) == expected


@pytest.mark.parametrize(
    ("instability", "rise", "expected"),
    [(0.09, 0.1, "unclear"), (0.07, 0.1, "stable"), (0.09, -0.1, "stable")],
)
def test_a_layer_whose_interval_reaches_above_the_margin(
    instability: float, rise: float, expected: str
) -> None:
    fact = {"straggler": False, "unchanged": False, "margin": 0.1, "rise": rise, "rise_se": 0.01,
            "instability": instability, "instability_se": 0.01}  # fmt: skip
    assert straggling(fact) == expected
    assert straggling(fact | {"straggler": True}) == "straggler"
    assert straggling(fact | {"unchanged": True}) == "unchanged"


def test_a_straggler_by_a_bump_or_a_slope() -> None:
    fact = {"straggler": True, "bump": 0.3, "bump_low": 0.1}
    assert layer_shape(fact) == "bump"
    assert layer_shape(fact | {"bump_low": -0.1}) == "slope"
    assert layer_shape(fact | {"bump": math.nan, "bump_low": math.nan}) == "unknown"
    assert layer_shape(fact | {"straggler": False}) == "no rise"


def test_a_layer_is_near_zero_by_one_estimator_and_not_by_another() -> None:
    rows = frame(
        {"study": "layer-sharpness", "model": "m", "dataset": "d", "layer": "a", "alpha": 1.0, "rho": 0.1,
         "on": "finetuned", "estimator": estimator, "draws": 10, "samples": 5, "sharpness": sharpness,
         "sharpness_se": 0.0001}
        for estimator, sharpness in (("plain", 0.001), ("gradient", 1.0))
    )  # fmt: skip
    shown = [row[4].text for row in tables.sharpness(Facts(rows), "layer-sharpness").rows]
    assert shown == ["flat layer", "above 0"]
