"""Bounds and modes of paths in rows, with and without results of single images, and alpha by accuracy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from support.wording import refused

from rft_fast import studies
from rft_fast.studies.bands import held_out, simultaneous
from rft_fast.studies.images import ImageResults

ALPHAS = [0.0, 0.2, 0.6, 1.0]


def path_rows(hits: np.ndarray, model: str = "m", dataset: str = "far", ood: bool = True) -> pd.DataFrame:
    """Rows of a path of these hits, [positions, n]."""
    differences = hits.astype(float) - hits[0]
    error = (
        differences.std(axis=1, ddof=1) / math.sqrt(hits.shape[1]) if hits.shape[1] > 1 else [math.nan] * 4
    )
    return studies.frame(
        {"study": "interpolation", "model": model, "dataset": dataset, "ood": ood, "alpha": alpha,
         "samples": hits.shape[1], "accuracy": own.mean(), "loss": 1.0, "gain": change.mean(), "gain_se": se,
         "rise": 0.0, "rise_se": 0.0, "bump": 0.0, "bump_se": 0.0}
        for alpha, own, change, se in zip(ALPHAS, hits, differences, error, strict=True)
    )  # fmt: skip


def counted(*right: int, images: int = 1000, seed: int | None = None) -> np.ndarray:
    """Hits of so many images at the positions; each has the first ones, or random ones."""
    found = np.arange(images) < np.array(right)[:, None]
    return found if seed is None else np.random.default_rng(seed).permuted(found, axis=1)


class Kept:
    """Results of single images, in another order of positions than the rows."""

    def __init__(self, hits: dict[tuple[str, str], np.ndarray], alphas: list[float] = ALPHAS) -> None:
        self.hits, self.alphas = hits, alphas

    def of(self, study: str, model: str, dataset: str) -> Any:
        assert study == "interpolation"
        if (model, dataset) not in self.hits:
            return None
        hits = self.hits[model, dataset][::-1]
        rows = pd.DataFrame({"alpha": self.alphas[::-1]})
        return ImageResults(rows, hits, np.zeros(hits.shape, dtype=np.float16), None)


def test_bounds_of_rows_and_of_single_images() -> None:
    first, second = counted(500, 510, 530, 490, seed=1), counted(500, 480, 470, 460, seed=2)
    rows = pd.concat([path_rows(first, "a"), path_rows(second, "b")]).sample(frac=1, random_state=0)
    found = studies.gain_bounds(rows, Kept({("a", "far"): first})).set_index(["model", "alpha"])
    assert set(found.loc["a", "method"]) == {"max-t"} and set(found.loc["b", "method"]) == {"bonferroni"}
    truth = simultaneous(first)
    np.testing.assert_allclose(found.loc["a", "gain_low"], truth.low)
    np.testing.assert_allclose(found.loc["a", "gain_high"], truth.high)
    assert list(found.loc["a"].index) == ALPHAS and found.loc[("a", 0.6), "critical"] == truth.critical
    differences = second[1:].astype(float) - second[0]
    t = stats.t.ppf(1 - 0.05 / 3, 999)
    half = t * np.sqrt(differences.var(axis=1, ddof=1) / 1000 + 1 / (1000 * 999))
    np.testing.assert_allclose(found.loc["b", "gain_low"], [0, *(differences.mean(axis=1) - half)])
    np.testing.assert_allclose(found.loc["b", "gain_high"], [0, *(differences.mean(axis=1) + half)])
    assert studies.gain_bounds(rows.iloc[:0]).empty


@pytest.mark.parametrize(
    ("right", "mode", "observed"),
    [
        ((500, 520, 560, 540), "high gain", "high gain"),
        ((500, 507, 510, 505), "gain", "gain"),
        ((500, 500, 502, 490), "failure", "gain"),
        ((500, 490, 480, 470), "failure", "failure"),
        ((500, 500, 500, 500), "failure", "failure"),
    ],
)
def test_a_mode_of_images_that_change_one_way(right: tuple[int, ...], mode: str, observed: str) -> None:
    """Each change is of whole images in one direction, so that ten of a thousand are no chance."""
    hits = counted(*right)
    (fact,) = studies.summarize(path_rows(hits), images=Kept({("m", "far"): hits})).to_dict("records")
    assert (fact["mode"], fact["mode_observed"]) == (mode, observed)
    truth = simultaneous(hits)
    assert fact["gain_low"] == truth.low[1:].max() and fact["gain_high"] == truth.high[1:].max()
    assert fact["gain_shown"] == max([0, *truth.gain[truth.low > 0]])
    assert (fact["gain_held_out"], fact["gain_held_out_se"]) == held_out(hits)


def test_a_large_gain_that_may_be_chance_is_undecided() -> None:
    hits = counted(100, 100, 107, 90, images=200, seed=0)  # 3.5 points, as many flips as images allow
    (fact,) = studies.summarize(path_rows(hits), images=Kept({("m", "far"): hits})).to_dict("records")
    assert (fact["mode"], fact["mode_observed"]) == ("undecided", "high gain")
    assert fact["gain_low"] < 0 < 0.02 < fact["gain_high"]


def test_few_images_are_not_held_out_and_one_is_undecided() -> None:
    for images, known in ((5, True), (4, False), (1, False)):
        hits = counted(0, 1, 1, 0, images=images)
        (fact,) = studies.summarize(path_rows(hits), images=Kept({("m", "far"): hits})).to_dict("records")
        assert math.isnan(fact["gain_held_out"]) == (not known)
        assert fact["mode"] == "undecided"
        assert math.isnan(fact["gain_low"]) == (images == 1)


def test_alpha_is_chosen_in_distribution() -> None:
    far = counted(500, 510, 530, 490)
    near = [counted(*right, images=100) for right in ((50, 60, 60, 55), (50, 50, 60, 70), (10, 20, 30, 30))]
    rows = pd.concat(
        [path_rows(far), path_rows(near[0], "m", "x", False), path_rows(near[1], "m", "y", False),
         path_rows(far, "other"), path_rows(near[2], "other", "x", False), path_rows(far, "alone")]
    )  # fmt: skip
    # Means of both sets: .50, .55, .60, .625; the other model's best are .6 and 1: the smaller one counts.
    assert studies.id_alphas(rows).to_dict() == {"m": 1.0, "other": 0.6}
    facts = studies.summarize(rows).set_index(["model", "dataset"])
    columns = ["id_alpha", "gain_id_alpha", "gain_id_alpha_se"]
    expected = rows[(rows["model"] == "m") & (rows["dataset"] == "far") & (rows["alpha"] == 1)].iloc[0]
    assert list(facts.loc[("m", "far"), columns]) == [1.0, expected["gain"], expected["gain_se"]]
    assert facts.loc[("other", "far"), "gain_id_alpha"] == pytest.approx(0.03)
    assert facts.loc[("alone", "far"), columns].isna().all() and facts.loc[("m", "x"), columns].isna().all()
    with refused(ValueError):
        studies.id_alphas(path_rows(far))


def test_images_of_other_rows_are_refused() -> None:
    hits = counted(5, 6, 7, 8, images=20)
    rows = path_rows(hits)
    for kept in (Kept({("m", "far"): hits[:, :19]}), Kept({("m", "far"): hits}, [0.0, 0.3, 0.6, 1.0])):
        with refused(ValueError, "m", "far", 20):
            studies.gain_bounds(rows, kept)
    with refused(ValueError, "m", "far", "1.0"):
        studies.gain_bounds(rows.iloc[:-1])  # a run that was stopped


@pytest.mark.parametrize("caller", [studies.summarize, studies.gain_bounds])
def test_what_gives_no_image_results_is_refused(caller: Any) -> None:
    with refused(TypeError, caller.__name__, "int"):
        caller(path_rows(counted(500, 510, 520, 500)), images=3)
