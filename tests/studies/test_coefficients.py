"""Coefficients of layers: rows against plain torch in float64, and effects by numbers worked out by hand."""

from __future__ import annotations

import copy
import itertools
import math
import re
from pathlib import Path as File
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text
from scipy.stats import t as student
from scipy.stats import ttest_rel
from support.tiny_models import State, Told, counted, normalised, pictures, random_state
from support.tiny_zoo import make, own_models, sweep_refused
from support.wording import refused, said, warned
from torch import nn

from rft_fast import catalogue, figures, report, results, studies, sweep
from rft_fast.catalogue.coefficients import Tables
from rft_fast.common.fields import Tree
from rft_fast.datasets import Dataset
from rft_fast.evaluate import Evaluator
from rft_fast.names import FigureWidth
from rft_fast.path import Path
from rft_fast.report import coefficients as words
from rft_fast.report import glossary, phrases
from rft_fast.run import trackers
from rft_fast.studies.effects import coefficient_effects
from rft_fast.studies.facts import Facts
from rft_fast.studies.images import ImageResults, ImageScores
from rft_fast.studies.verdicts import two_way_error

pytestmark = pytest.mark.usefixtures("one_thread")

ALPHAS = [0.0, 0.4, 1.0]
TABLE = {"0": 0.5, "re:[13]": 0.25, None: 2.0}
BY_HAND = {"0": 0.5, "1": 0.25, "3": 0.25, "5": 2.0, "7": 2.0}


class Setting:
    """A net with batch statistics, which are beside the layer "1"."""

    def __init__(self) -> None:
        self.model = nn.Sequential(
            nn.Conv2d(3, 5, 2), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6),
            nn.Tanh(), nn.Linear(6, 4),
        )  # fmt: skip
        self.zero, self.one = random_state(self.model, 1), random_state(self.model, 2)
        self.path = Path(self.model, self.zero, self.one)
        self.sets = [pictures("far", 61, True), pictures("near", 23, False)]
        self.evaluator = Evaluator(self.model, self.sets, batch_size=16)
        self.double = copy.deepcopy(self.model).double().eval()

    def brute(self, alpha: float, table: dict[str, float], data: Dataset) -> tuple[np.ndarray, np.ndarray]:
        weights: State = {}
        for name, w0 in self.zero.items():
            if w0.is_floating_point():
                a = alpha * table.get(name.partition(".")[0], 1.0)
                weights[name] = (1 - a) * w0.double() + a * self.one[name].double()
        with torch.no_grad():
            logits = torch.func.functional_call(self.double, weights, (normalised(data),))
        losses = logits.logsumexp(1) - logits[torch.arange(len(logits)), data.labels]
        return losses.numpy(), (logits.argmax(1) == data.labels).numpy().astype(float)


def paired(values: np.ndarray) -> tuple[float, float]:
    return values.mean(), values.std(ddof=1) / math.sqrt(len(values))


# --- the study ------------------------------------------------------------------------------------


def test_rows_equal_brute_force() -> None:
    """Of a table, of layers that are held, and of their controls."""
    s, told = Setting(), Told()
    before = s.path.checksum()
    rows = studies.coefficients(
        s.path, s.evaluator, [1, 0, 0.4], {"mine": TABLE}, {"three held": ["3", "re:7"]}, seeds=[0, 5],
        model="m", sink=told,
    )  # fmt: skip
    assert s.path.checksum() == before
    pd.testing.assert_frame_equal(rows, studies.frame(told.rows))
    assert told.numbers == list(range(15)) and len(rows) == 30  # alphas, tables; data sets
    assert rows["alpha"].tolist() == [alpha for alpha in ALPHAS for _ in range(10)]
    assert set(rows["study"]) == {"coefficients"} and set(rows["model"]) == {"m"}
    for row in rows.to_dict("records"):
        table = {} if pd.isna(row["coefficients"]) else BY_HAND
        if row["coefficients"] == "three held":
            held = row["layer"].split(", ")
            assert (held == ["3", "7"]) != row["control"] and len(held) == 2
            assert not row["control"] or {*held} <= {"0", "1", "5"}
            table = dict.fromkeys(held, 0.0)
        else:
            assert pd.isna(row["layer"]) and pd.isna(row["control"]) and pd.isna(row["seed"])
        data = next(data for data in s.sets if data.name == row["dataset"])
        losses, hits = s.brute(row["alpha"], table, data)
        zero, plain = s.brute(0.0, {}, data), s.brute(row["alpha"], {}, data)
        truth = {
            "loss": paired(losses),
            "accuracy": paired(hits),
            "gain": paired(hits - zero[1]),
            "rise": paired(losses - zero[0]),
            "change": paired(hits - plain[1]),
            "change_loss": paired(losses - plain[0]),
        }
        for name, (value, error) in truth.items():
            assert row[name] == pytest.approx(value, abs=1e-5), (name, row)
            assert row[f"{name}_se"] == pytest.approx(error, abs=1e-5), (name, row)


def test_coefficients_of_one_are_the_path_to_the_bit() -> None:
    s = Setting()
    along = studies.interpolation(s.path, s.evaluator, ALPHAS)
    rows = studies.coefficients(s.path, s.evaluator, ALPHAS, {"ones": {"re:.*": 1.0}})
    for table in rows["coefficients"].unique():
        own = rows[rows["coefficients"].fillna("") == ("" if pd.isna(table) else table)]
        for name in ("loss", "loss_se", "accuracy", "gain", "rise", "rise_se"):
            assert own[name].tolist() == along[name].tolist(), name
    assert not rows[["change", "change_se", "change_loss", "change_loss_se"]].any(axis=None)


def test_a_closed_form() -> None:
    """Two layers of one weight, a and b, from 0 to 1: loss ln(1 + exp(-x)) with x = alpha**2 c_a c_b."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            one = images.flatten(1)[:, :1] * 0 + 1
            logit = self.b(self.a(one))
            return torch.cat([logit, torch.zeros_like(logit)], 1)

    model = Product()
    names = ["a.weight", "b.weight"]
    path = Path(model, *({name: torch.full((1, 1), value) for name in names} for value in (0.0, 1.0)))
    images = torch.zeros(7, 3, 1, 1, dtype=torch.uint8)
    evaluator = Evaluator(model, [Dataset("d", images, torch.zeros(7).long(), (0.5,) * 3, (0.5,) * 3)])
    tables: dict[str, Any] = {
        "x": {"a": 0.5, "b": 2.0},
        "y": {"a": 0.5, None: 1.0},
        "z": {"a": 3.0, "b": -1.0},
    }
    rows = studies.coefficients(path, evaluator, [0, 0.5, 1], tables, {"held": ["b"]}, seeds=[])
    products = {"x": 1.0, "y": 0.5, "z": -3.0, "held": 0.0}
    for row in rows.to_dict("records"):
        c = 1.0 if pd.isna(row["coefficients"]) else products[row["coefficients"]]
        loss, plain = (math.log1p(math.exp(-(row["alpha"] ** 2) * x)) for x in (c, 1.0))
        assert row["loss"] == pytest.approx(loss, abs=1e-6)
        assert row["change_loss"] == pytest.approx(loss - plain, abs=1e-6)


def test_measurements_one_by_one_and_their_passes() -> None:
    """At most one pass of the images for each, and none at alpha = 0 beyond that of zero-shot."""
    s = Setting()
    how: dict[str, Any] = {"tables": {"mine": TABLE}, "hold": {"held": ["5"]}, "seeds": [1]}
    with counted(s.model[0]) as (sizes,):
        whole = studies.coefficients(s.path, s.evaluator, ALPHAS, **how)
    images = sum(len(data.labels) for data in s.sets)
    assert sum(sizes) == images * (1 + 2 * 4)  # alphas above 0, and four curves there
    found: dict[int, Any] = {}
    for number in reversed(range(12)):
        studies.coefficients(s.path, s.evaluator, ALPHAS, only=[number], sink=found.__setitem__, **how)
    rows = studies.frame(row for number in sorted(found) for row in found[number])
    pd.testing.assert_frame_equal(rows.drop(columns="seconds"), whole.drop(columns="seconds"))
    known: dict[Any, Any] = {}
    studies.coefficients(s.path, s.evaluator, ALPHAS, plain=known, **how)
    assert set(known) == {(data.name, alpha) for data in s.sets for alpha in ALPHAS}
    with counted(s.model[0]) as (sizes,):
        studies.coefficients(s.path, s.evaluator, ALPHAS, plain=known, **how)
    assert sum(sizes) == images * 2 * 3


@pytest.mark.parametrize(
    ("tables", "hold", "facts"),
    [
        pytest.param({"mine": {"9": 0.5, None: 1.0}}, {}, ["mine", "9"], id="unknown"),
        pytest.param({"mine": {"3": 0.5, "re:3|5": 0.1, None: 1}}, {}, ["mine", "3", "re:3|5"], id="twice"),
        pytest.param({"mine": {"3": 0.5}}, {}, ["mine", 4], id="missing"),
        pytest.param({}, {"held": ["9"]}, ["9"], id="held"),
    ],
)
def test_refused_before_anything_is_scored(tables: Any, hold: Any, facts: list[object]) -> None:
    s = Setting()
    with counted(s.model[0]) as (sizes,), refused(ValueError, *facts):
        studies.coefficients(s.path, s.evaluator, ALPHAS, tables, hold)
    assert not sizes


def test_few_others_to_hold_are_all_of_them() -> None:
    s = Setting()
    with warned(UserWarning, 3, 2):
        rows = studies.coefficients(s.path, s.evaluator, [0, 1], {}, {"held": ["0", "1", "3"]}, seeds=[0])
    assert set(rows["layer"].dropna()) == {"0, 1, 3", "5, 7"}


def test_controls_are_drawn_from_layers_that_move() -> None:
    s = Setting()
    one = {name: s.zero[name] if name[0] in "57" else tensor for name, tensor in s.one.items()}
    path = Path(s.model, s.zero, one)
    hold = {"held": ["0", "7"], "still": ["5"]}
    rows = studies.coefficients(path, s.evaluator, [0, 1], {}, hold, seeds=range(4))
    controls = rows[rows["control"].fillna(False).astype(bool)]
    assert set(controls["layer"]) == {"1", "3"} and set(controls["coefficients"]) == {"held"}


# --- effects --------------------------------------------------------------------------------------

N = 50
# Hits of 50 images, in distribution and out of it, at alpha = 0, 0.5 and 1.
CURVES = {
    ("", None): ([40, 44, 46], [30, 33, 28]),
    ("LiNeS", None): ([40, 43, 43], [30, 36, 39]),  # best at 0.5, the first of equals
    ("held", None): ([40, 41, 45], [30, 31, 32]),
    ("held", 0): ([40, 39, 38], [30, 29, 28]),  # best at 0
    ("held", 1): ([40, 46, 45], [30, 35, 32]),
}


class Stored:
    """Results of single images: the first ones are hits."""

    def __init__(self, rows: pd.DataFrame) -> None:
        self.rows = rows

    def of(self, study: str, model: str, dataset: str) -> ImageResults | None:
        assert study == "coefficients"
        same = (self.rows[["study", "model", "dataset"]] == [study, model, dataset]).all(axis=1)
        own = self.rows[same]
        hits = [np.arange(N) < round(N * accuracy) for accuracy in own["accuracy"]]
        return ImageResults.stack(own, [ImageScores(h, np.zeros(N, np.float16), None) for h in hits])


def by_hand(model: str = "m") -> pd.DataFrame:
    rows = []
    for at, alpha in enumerate([0.0, 0.5, 1.0]):
        for (name, seed), curves in CURVES.items():
            for dataset, curve in zip(("near", "far"), curves, strict=True):
                accuracy, plain = curve[at] / N, CURVES["", None][dataset == "far"][at] / N
                row: dict[str, object] = {
                    "study": "coefficients", "model": model, "dataset": dataset, "ood": dataset == "far",
                    "alpha": alpha, "samples": N, "accuracy": accuracy, "gain": accuracy - curve[0] / N,
                    "coefficients": name or None, "loss": 1.0, "change": accuracy - plain,
                }  # fmt: skip
                if name == "held":
                    held = "a, b" if seed is None else f"c, {'de'[seed]}"
                    row |= {"layer": held, "control": seed is not None, "seed": seed}
                rows.append(row)
    return studies.frame(rows)


def test_effects_by_hand() -> None:
    rows = by_hand()
    facts = coefficient_effects(rows, Stored(rows))
    assert facts["coefficients"].tolist() == ["LiNeS", "held", "held"] and set(facts["dataset"]) == {"far"}
    far = facts.set_index(["coefficients", "control"])
    # Each at its own best alpha in distribution; the plain path at 1, with 46 hits there and 28 elsewhere.
    expected = {
        ("LiNeS", False): (0.5, 43, 36 - 28),
        ("held", False): (1.0, 45, 32 - 28),
        ("held", True): (0.0, (40 + 46) / 2, ((30 - 28) + (35 - 28)) / 2),
    }
    for key, (alpha, near, difference) in expected.items():
        fact = far.loc[key]
        assert (fact["alpha"], fact["plain_alpha"]) == (alpha, 1.0)
        assert fact["near"] == pytest.approx(near / N) and fact["plain_near"] == pytest.approx(46 / N)
        assert fact["difference"] == pytest.approx(difference / N)
    # Eight of 50 images differ, all in one direction; two tables are judged.
    value = np.array([1.0] * 8 + [0.0] * 42)
    error = value.std(ddof=1) / math.sqrt(N)
    half = student.ppf(1 - 0.025 / 2, N - 1) * error
    lines = far.loc["LiNeS", False]
    assert lines["difference_se"] == pytest.approx(error)
    assert lines["difference_low"] == pytest.approx(0.16 - half)
    assert lines["difference_high"] == pytest.approx(0.16 + half)
    assert lines["verdict"] == "above" and lines["layers"] == [] and lines["draws"] == 1
    # In distribution three of 50 differ: not shown, and not from the 40 and 44 hits of the other positions.
    value = np.array([-1.0] * 3 + [0.0] * 47)
    half = student.ppf(0.975, N - 1) * value.std(ddof=1) / math.sqrt(N)
    assert lines["near_low"] == pytest.approx(-0.06 - half) and lines["near_verdict"] == "unclear"
    assert lines["matched"] == 3 and lines["matched_verdict"] == "unclear"  # 3 of 50 are too few
    assert lines["matched_least"] == pytest.approx((36 - 33) / N)
    assert lines["matched_most"] == pytest.approx((36 - 28) / N)
    # Two draws are too few for an interval.
    assert far.loc["held", True]["draws"] == 2 and far.loc["held", True]["layers"] == ["c", "d"]
    assert math.isnan(far.loc["held", True]["difference_se"])
    held = far.loc["held", False]
    assert held["beyond"] == pytest.approx((32 - (30 + 35) / 2) / N) and held["control_draws"] == 2
    assert math.isnan(held["beyond_low"]) and held["beyond_verdict"] == "unknown"

    without = coefficient_effects(rows)
    for name in ("difference", "near", "beyond"):
        assert without[name].equals(facts[name])
    assert without["difference_se"].isna().all() and not without["matched"].any()
    for name in ("verdict", "near_verdict", "matched_verdict", "beyond_verdict"):
        assert set(without[name]) == {"unknown"}


class Drawn:
    """Hits at random in two data sets in distribution and one out of it; four controls, two of the same."""

    CURVES = (("", None), ("t", None), ("held", None), *(("held", seed) for seed in range(5)))
    SETS: ClassVar = {"near": 40, "near too": 25, "far": 60}
    HELD = ("c", "d", "e", "c", "f")
    GRID = (0.0, 0.25, 0.5, 1.0)

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.hits, rows = {}, []
        skill = {name: 1.5 * rng.standard_normal(size) for name, size in self.SETS.items()}
        for alpha, (name, draw), dataset in itertools.product(self.GRID, self.CURVES, self.SETS):
            place = self.CURVES.index((name, draw if draw != 3 else 0))  # draw 3 holds what draw 0 does
            own = np.random.default_rng([seed, place, int(4 * alpha), len(dataset)])
            size, shift = (
                self.SETS[dataset],
                (0.6 * alpha - 0.2 * place if name else 0.3 - (alpha - 0.5) ** 2),
            )
            hits = skill[dataset] + 0.5 * own.standard_normal(size) + shift > 0
            self.hits[name, draw, alpha, dataset] = hits
            row: dict[str, object] = {
                "study": "coefficients", "model": "m", "dataset": dataset, "ood": dataset == "far",
                "alpha": alpha, "samples": size, "accuracy": hits.mean(), "coefficients": name or None,
            }  # fmt: skip
            if name == "held":
                layer = "a" if draw is None else self.HELD[draw]
                row |= {"layer": layer, "control": draw is not None, "seed": draw}
            rows.append(row)
        self.rows = studies.frame(rows)

    def of(self, study: str, model: str, dataset: str) -> ImageResults:
        here = self.rows[self.rows["dataset"] == dataset]
        own = [hits for key, hits in self.hits.items() if key[3] == dataset]
        return ImageResults.stack(here, [ImageScores(h, np.zeros(len(h), np.float16), None) for h in own])

    def near(self, name: str, draw: int | None, alpha: float) -> float:
        return float(np.mean([self.hits[name, draw, alpha, d].mean() for d in ("near", "near too")]))

    def best(self, name: str, draw: int | None = None) -> float:
        return max(self.GRID, key=lambda alpha: (self.near(name, draw, alpha), -alpha))

    def far(self, name: str, draw: int | None = None, alpha: float | None = None) -> np.ndarray:
        return self.hits[name, draw, self.best(name, draw) if alpha is None else alpha, "far"].astype(float)

    def near_interval(self, name: str, alpha: float) -> tuple[float, float]:
        """Of the mean over both data sets: their images are independent."""
        each = [
            self.hits[name, None, self.best(name), d].astype(float) - self.hits["", None, alpha, d]
            for d in ("near", "near too")
        ]
        error = math.sqrt(sum(d.var(ddof=1) / len(d) for d in each)) / 2
        half = student.ppf(0.975, 25 - 1) * error if error else 0.0
        mean = (each[0].mean() + each[1].mean()) / 2
        return mean - half, mean + half


def way(low: float, high: float) -> str:
    return "above" if low > 0 else "below" if high < 0 else "unclear"


@pytest.mark.parametrize("seed", [0, 2, 3, 4])
def test_effects_equal_brute_force(seed: int) -> None:
    """Intervals by scipy's paired t test; the two tables are corrected for two cases."""
    s = Drawn(seed)
    facts = coefficient_effects(s.rows, s).set_index(["coefficients", "control"])
    for name in ("t", "held"):
        fact = facts.loc[name, False]
        assert (fact["alpha"], fact["plain_alpha"]) == (s.best(name), s.best(""))
        truth = ttest_rel(s.far(name), s.far("")).confidence_interval(1 - 0.05 / 2)
        assert (fact["difference_low"], fact["difference_high"]) == pytest.approx((truth.low, truth.high))
        assert fact["verdict"] == way(*truth)
        low, high = s.near_interval(name, s.best(""))
        assert (fact["near_low"], fact["near_high"]) == pytest.approx((low, high))
        assert fact["near_verdict"] == way(low, high)
        same = [alpha for alpha in s.GRID if way(*s.near_interval(name, alpha)) == "unclear"]
        differences = [(s.far(name) - s.far("", alpha=alpha)).mean() for alpha in same]
        ends = [
            ttest_rel(s.far(name), s.far("", alpha=alpha)).confidence_interval(1 - 0.05 / 2) for alpha in same
        ]
        assert fact["matched"] == len(same) > 0
        assert fact["matched_least"] == pytest.approx(min(differences))
        assert fact["matched_most"] == pytest.approx(max(differences))
        lowest, highest = min(low for low, _ in ends), max(high for _, high in ends)
        assert fact["matched_verdict"] == way(lowest, highest)
    # The draws 0 and 3 hold the same layers and are one.
    draws = [0, 1, 2, 4]
    for key, value, sign, table in (
        (("held", False), "beyond", "beyond_verdict", [s.far("held") - s.far("held", d) for d in draws]),
        (("held", True), "difference", "verdict", [s.far("held", d) - s.far("") for d in draws]),
    ):
        fact, array = facts.loc[key], np.stack(table)
        mean, error = array.mean(), brute_two_way(array)
        half = student.ppf(1 - 0.025 / (2 if value == "difference" else 1), len(draws) - 1) * error
        assert fact[value] == pytest.approx(mean) and fact[f"{value}_se"] == pytest.approx(error)
        found = fact[f"{value}_low"], fact[f"{value}_high"]
        assert found == pytest.approx((mean - half, mean + half))
        assert fact[sign] == way(mean - half, mean + half)
    assert facts.loc["held", False]["control_draws"] == facts.loc["held", True]["draws"] == 4


def brute_two_way(table: np.ndarray) -> float:
    """Variance over draws, plus that over images, minus that over both, cell by cell."""
    (draws, images), mean = table.shape, table.mean()
    over = [
        sum((line.mean() - mean) ** 2 for line in lines) / (count - 1) / count
        for lines, count in ((table, draws), (table.T, images))
    ]
    both = sum((cell - mean) ** 2 for cell in table.flat) / (table.size - 1) / table.size
    return math.sqrt(max(*over, sum(over) - both))


def test_two_way_errors_have_closed_forms() -> None:
    """Where only draws or only images matter, the error is that of their mean."""
    draws, images = np.array([0.1, 0.3, -0.2, 0.7]), np.array([1.0, 0.0, -1.0, 1.0, 1.0, 0.0])
    for values, table in (
        (draws, draws[:, None] + np.zeros(6)),
        (images, np.zeros(4)[:, None] + images),
    ):
        assert two_way_error(table) == pytest.approx(paired(values)[1])
    assert math.isnan(two_way_error(draws[:, None])) and math.isnan(two_way_error(images[None]))


def test_effects_need_data_in_distribution() -> None:
    rows = by_hand()
    with refused(ValueError, "in distribution"):
        coefficient_effects(rows[rows["ood"]])
    with refused(ValueError, "coefficients"):
        coefficient_effects(rows[rows["alpha"] > 2])


# --- what is shown --------------------------------------------------------------------------------


def facts_of(rows: pd.DataFrame, stored: bool = True) -> Facts:
    return Facts(rows, Tree(), images=Stored(rows) if stored else None)


def clear(rows: pd.DataFrame) -> pd.DataFrame:
    """LiNeS has 47 hits out of distribution at 0.5: 14 more."""
    better = (rows["coefficients"].fillna("") == "LiNeS") & rows["ood"] & (rows["alpha"] == 0.5)
    return rows.assign(accuracy=rows["accuracy"].mask(better, 47 / N))


def costly(rows: pd.DataFrame) -> pd.DataFrame:
    """LiNeS has 47 hits out of distribution at 0.5, but 36 in distribution: 10 less than the plain path."""
    rows = clear(rows)
    table = rows["coefficients"].fillna("") == "LiNeS"
    worse = table & ~rows["ood"] & (rows["alpha"] != 0.5)
    rows = rows.assign(accuracy=rows["accuracy"].mask(worse, 35 / N))
    return rows.assign(accuracy=rows["accuracy"].mask(table & ~rows["ood"] & (rows["alpha"] == 0.5), 36 / N))


def more_draws(rows: pd.DataFrame, hits: int) -> pd.DataFrame:
    """Four draws of the control, as the second, but with so many hits out of distribution, or one less."""
    second = rows[rows["seed"] == 1]
    added = [
        second.assign(
            seed=seed,
            layer=f"c, {name}",
            accuracy=second["accuracy"].mask(second["ood"], (hits - seed % 2) / N),
        )
        for seed, name in ((2, "f"), (3, "g"), (4, "h"), (5, "i"))
    ]
    rest = rows[~rows["seed"].isin([0, 1])]
    return pd.concat([rest, *added], ignore_index=True).sort_values("alpha", kind="stable")


def test_words_say_what_intervals_allow() -> None:
    rows = by_hand()
    held = rows[rows["coefficients"].isna() | (rows["coefficients"] == "held")]
    same = held["layer"].fillna("").eq("a, b") & held["ood"] & (held["alpha"] == 1)
    texts = {
        "unclear": facts_of(held.assign(accuracy=held["accuracy"].mask(same, 30 / N))),
        "clear": facts_of(clear(rows)),
        "costly": facts_of(costly(rows)),
        "no intervals": facts_of(rows, stored=False),
        "beyond": facts_of(more_draws(held, 8)),
        "nothing": facts_of(rows[rows["coefficients"].isna()]),
    }
    found = {name: [one.text for one in words.findings(facts)] for name, facts in texts.items()}
    said("\n".join(itertools.chain(*found.values())))
    assert "accuracy than the plain path in 0 and clearly lower in 0 of 1 case" in found["unclear"][0]
    assert "+4.0 points" in found["unclear"][0] and "no verdict with fewer than 3" in found["unclear"][2]
    assert "in 1 and clearly lower in 0 of 2" in found["clear"][0] and "LiNeS" in found["clear"][0]
    assert (
        "+38.0 points" in found["clear"][0] and "86.0 % against the plain path's 92.0 %" in found["clear"][0]
    )
    assert "in 1 and clearly lower in 0" in found["clear"][1] and "+28.0 to +38.0" in found["clear"][1]
    # No "better" without what it costs in distribution, and none where no position has the same accuracy.
    assert "in 1 (1 of these at lower ID accuracy) and clearly lower" in found["costly"][0]
    assert "72.0 %, clearly lower than the plain path's 92.0 %" in found["costly"][0]
    assert "no interval" in found["no intervals"][0]
    assert "in 1 and clearly lower in 0 of 1 case" in found["beyond"][2] and "4 draws" in found["beyond"][2]
    assert len(found["nothing"]) == 1
    said("\n".join(words.lines(texts["clear"])))
    said("\n".join(words.lines(texts["costly"])))
    assert "better, ID lower" in "\n".join(words.lines(texts["costly"]))


def test_one_image_is_not_several() -> None:
    assert phrases.images(by_hand().assign(samples=1), "n = ") == "n = 1 image of near, n = 1 image of far"


def test_data_that_chose_the_layers_are_named() -> None:
    rows = by_hand().replace({"coefficients": {"held": "stragglers held"}})
    rows = rows[rows["coefficients"].isna() | (rows["coefficients"] == "stragglers held")]
    for dataset, named in (("far", True), ("near", False)):
        layer = {"study": "layers", "model": "m", "dataset": dataset, "layer": "a", "alpha": 0.0}
        facts = facts_of(pd.concat([rows, studies.frame([layer])], ignore_index=True))
        finding, *_ = words.findings(facts)
        assert ("chosen by losses on the same data set" in finding.text) is named
        text = " ".join(" ".join(words.lines(facts)).split())
        assert ("chosen by losses on far" in text) is named
        assert ("chosen by losses on far" in words.section(facts).lead) is named


def test_without_layers_to_hold_the_path_alone_is_left() -> None:
    """As where no model has stragglers and no other table was asked for."""
    rows = by_hand()
    facts = facts_of(rows[rows["coefficients"].isna()])
    assert facts.coefficients.empty
    (finding,) = words.findings(facts)
    assert finding.text == "No layers were found to hold at zero-shot."
    assert len(" ".join(words.lines(facts))) > 100
    assert all(not table.rows for table in words.section(facts).tables)


def test_the_section_has_a_row_for_each_table() -> None:
    section = words.section(facts_of(clear(by_hand())))
    (table,) = section.tables
    assert [row[2].text for row in table.rows] == ["LiNeS", "held", "held: control"]
    assert [row[4].text for row in table.rows] == ["better", "not shown", "no interval"]
    assert [row[4].look for row in table.rows] == ["good", "wide", "wide"]
    assert all(len(row) == len(table.headings) for row in table.rows)
    unexplained = {heading for heading in table.headings if not glossary.words_of(heading)}
    assert unexplained <= {"model", "data set"}


def test_the_chart_has_a_curve_for_each_table() -> None:
    (chart,) = words.section(facts_of(by_hand())).picture.charts
    lines, plain, held, control = (chart.traces[place] for place in (1, 0, 2, 3))
    assert plain["x"] == pytest.approx([80, 88, 92]) and plain["y"] == pytest.approx([60, 66, 56])
    assert lines["x"] == pytest.approx([80, 86, 86]) and lines["y"] == pytest.approx([60, 72, 78])
    assert control["x"] == pytest.approx([80, 85, 83]) and control["y"] == pytest.approx([60, 64, 60])
    assert control["line"] == held["line"] | {"dash": "dot"}
    assert all(trace["show"] == {"model": ["m"], "dataset": ["far"]} for trace in chart.traces)


def test_trackers_keep_the_curves_apart() -> None:
    rows = by_hand()
    names = [name for row in rows.to_dict("records") for name in trackers._read("coefficients", "m", row)[1]]
    curves = rows[["dataset", "coefficients", "seed"]].drop_duplicates()
    assert len({name for name in names if name.endswith("/accuracy")}) == len(curves) == 10


def test_the_figure_has_a_curve_for_each_table(tmp_path: File) -> None:
    rows = pd.concat([by_hand("m"), by_hand("n")], ignore_index=True)
    drawn = figures.coefficients(facts_of(rows), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert len(drawn.axes) == 2
    for panel in drawn.axes:
        curves = {line.get_label(): line for line in panel.get_lines() if len(line.get_xdata()) == 3}
        held, control = "held (2): +8.00", "as many others held (2): +9.00"
        assert list(curves) == ["plain path", "LiNeS: +16.00", held, control]
        across, up = (np.asarray(values) for values in curves["LiNeS: +16.00"].get_data())
        assert across.tolist() == pytest.approx([80, 86, 86]) and up.tolist() == pytest.approx([60, 72, 78])
        assert np.asarray(curves[control].get_data()[1]).tolist() == pytest.approx([60, 64, 60])
    with refused(ValueError, "in distribution"):
        figures.coefficients(Facts(rows[rows["ood"]]), tmp_path / "y.png")


@pytest.mark.parametrize("width", ["one", "two"])
@pytest.mark.parametrize("names", ["short", "long"])
def test_nothing_of_the_figure_is_cut_off(width: FigureWidth, names: str, tmp_path: File) -> None:
    rows = pd.concat([by_hand("m"), by_hand("n")], ignore_index=True)
    if names == "long":
        rows["model"] = rows["model"] + "/$a/" + "runs of-seeds/lr1e-3_wd" * 4
        rows["coefficients"] = rows["coefficients"] + " of " + "some table with a name of its own " * 3
    with figures.look(width=width, captions="none"):
        drawn = figures.coefficients(facts_of(rows), tmp_path / "x.png")
    edge = 0.02 * drawn.dpi
    axes = [axis for panel in drawn.axes for axis in (panel.xaxis, panel.yaxis)]
    ticks = {id(text) for axis in axes for text in axis.get_ticklabels()}
    for text in drawn.findobj(Text):
        if text.get_text() and id(text) not in ticks:
            box = text.get_window_extent()
            assert box.x0 >= -edge and box.x1 <= drawn.bbox.x1 + edge, text.get_text()
            assert box.y0 >= -edge and box.y1 <= drawn.bbox.y1 + edge, text.get_text()


# --- the sweep ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> File:
    folder = make(tmp_path_factory.mktemp("zoo"))
    (folder / "half.toml").write_text("rest = 1.0\nvisual.conv1 = 0.5\n")
    (folder / "ends.toml").write_text("'re:visual.*' = 0.5\nclassification_head = 1\n")
    return folder


BRIEF = ["--alphas", "0:1:3", "--layer-samples", "20", "--device", "cpu", "--slopes", "none"]
BRIEF += ["--hold-draws", "2"]


def command(zoo: File, *more: str) -> list[str]:
    tables = [word for name in ("half", "ends") for word in ("--alpha-table", str(zoo / f"{name}.toml"))]
    return ["coefficients", *own_models(zoo), *BRIEF, *tables, *more]


def rows_of(out: File) -> pd.DataFrame:
    return results.load(out).drop(columns="seconds")


@pytest.mark.slow
def test_a_sweep_from_plan_to_page(zoo: File, tmp_path: File, capsys: pytest.CaptureFixture[str]) -> None:
    held = command(zoo, "--hold", "instability", "--straggler-margin", "1e-6")
    assert sweep.main([*held, "--plan"]) == 0
    plan = capsys.readouterr().out
    line = next(line.split() for line in plan.splitlines() if line.startswith("coefficients"))
    # Of 52 images: two alphas of six curves, and the fine-tuned model is the interpolation's.
    assert line[1] == "2" and int(line[3].replace(",", "")) == 52 * 2 * (2 * 6 - 1)
    out = tmp_path / "run"
    assert sweep.main([*held, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    rows = rows_of(out)
    assert list(rows["study"].unique()) == ["interpolation", "layers", "coefficients"]
    own = rows[rows["study"] == "coefficients"]
    assert {"table half", "table ends"} <= {*own["coefficients"].dropna()}
    # The plain path is the interpolation, and so say the images.
    keys = ["model", "dataset", "alpha"]
    both = own[own["coefficients"].isna()].merge(rows[rows["study"] == "interpolation"], on=keys)
    assert len(both) == 2 * 2 * 3 and (both["loss_x"] == both["loss_y"]).all()
    facts = coefficient_effects(rows, results.Stored(out))
    for fact in facts.to_dict("records"):
        images = results.Stored(out).of("coefficients", fact["model"], fact["dataset"])
        assert images is not None
        table = images.rows["coefficients"].fillna("")
        if fact["coefficients"].startswith("table"):
            ours = (table == fact["coefficients"]) & (images.rows["alpha"] == fact["alpha"])
            plain = (table == "") & (images.rows["alpha"] == fact["plain_alpha"])
            value, error = paired(images.hits[ours][0].astype(float) - images.hits[plain][0])
            assert fact["difference"] == pytest.approx(value) and fact["difference_se"] == pytest.approx(
                error
            )
    assert "With each at its own best alpha in distribution" in " ".join(printed.split())
    assert (out / "figures" / "coefficients.png").exists()
    page = report.write(out).read_text()
    assert "A coefficient for each layer" in page and "table half" in page
    before = (out / "rows.csv").read_bytes()
    assert sweep.main([*held, "--out", str(out)]) == 0
    assert (out / "rows.csv").read_bytes() == before
    # Another content of the file is another request.
    text = (zoo / "half.toml").read_text()
    try:
        (zoo / "half.toml").write_text(text.replace("0.5", "0.25"))
        sweep_refused([*held, "--out", str(out)], "--alpha-table", "half")
    finally:
        (zoo / "half.toml").write_text(text)


@pytest.mark.slow
@pytest.mark.ray
def test_workers_and_a_resumed_run_make_the_same_rows(zoo: File, tmp_path: File, monkeypatch: Any) -> None:
    words = command(zoo, "--hold", "none")
    assert sweep.main([*words, "--out", str(tmp_path / "whole")]) == 0
    assert sweep.main([*words, "--out", str(tmp_path / "two"), "--workers", "2"]) == 0
    pd.testing.assert_frame_equal(rows_of(tmp_path / "two"), rows_of(tmp_path / "whole"))
    add = results.Run.add
    added: list[str] = []

    def then(run: results.Run, study: str, *rest: Any) -> None:
        add(run, study, *rest)
        added.append(study)
        if added.count("coefficients") == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(results.Run, "add", then)
        assert sweep.main([*words, "--out", str(tmp_path / "parts")]) == 130
    assert sweep.main([*words, "--out", str(tmp_path / "parts")]) == 0
    pd.testing.assert_frame_equal(rows_of(tmp_path / "parts"), rows_of(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("more", "facts"),
    [
        pytest.param(["--slopes", "0.5"], ["--slopes", "visual.transformer.resblocks"], id="one block"),
        pytest.param(["--slopes", "0"], ["--slopes", "0"], id="slope"),
        pytest.param(["--slopes", "none", "1"], ["--slopes", "none 1.0"], id="none and a slope"),
        pytest.param(["--hold", "none", "sharpness"], ["--hold", "none sharpness"], id="none and layers"),
        pytest.param(["--alpha-table", "no.toml"], ["--alpha-table", "no.toml"], id="no file"),
        pytest.param(["--alpha-table", "bad.toml"], ["bad", "visual.conv"], id="no layer"),
        pytest.param(["--alpha-table", "some.toml"], ["some", "rest = NUMBER"], id="not all layers"),
        pytest.param(["--alpha-table", "twice.toml"], ["twice", "visual.conv1"], id="a layer twice"),
        pytest.param(["--alpha-table", "half.toml", "more/half.toml"], ["half"], id="a name twice"),
    ],
)
def test_requests_that_make_no_sense(
    zoo: File, more: list[str], facts: list[object], tmp_path: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = {
        "bad": "visual.conv = 0.5\nrest = 1.0", "some": "visual.conv1 = 0.5",
        "twice": "rest = 1.0\nvisual.conv1 = 0.5\n're:visual.conv.*' = 0.5",
        "half": "rest = 1\nvisual.conv1 = 0", "more/half": "rest = 1\nvisual.conv1 = 0",
    }  # fmt: skip
    for name, text in texts.items():
        file = tmp_path / f"{name}.toml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    brief = ["--alphas", "0", "1", "--device", "cpu", "--out", str(tmp_path / "run")]
    hold = [] if "--hold" in more else ["--hold", "none"]
    slopes = [] if "--slopes" in more else ["--slopes", "none"]
    sweep_refused(["coefficients", *own_models(zoo), *brief, *hold, *slopes, *more], *facts)
    assert not (tmp_path / "run").exists()


def test_data_in_and_out_of_distribution_are_needed(zoo: File) -> None:
    words = own_models(zoo)
    for without, facts in (("--id-data", ["--id-data"]), ("--data", ["out-of-distribution"])):
        at = words.index(without)
        sweep_refused(["coefficients", *words[:at], *words[at + 2 :], "--alphas", "0", "1"], *facts)


def test_options_without_the_study_have_no_effect(
    zoo: File, tmp_path: File, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["interpolation", *own_models(zoo), "--alphas", "0", "1", "--device", "cpu", "--slopes", "0.5"]
    assert sweep.main([*words, "--plan"]) == 0
    assert re.search(r"--slopes has no effect.*coefficients", " ".join(capsys.readouterr().out.split()))


def test_a_bare_sweep_leaves_it_out() -> None:
    assert "coefficients" in catalogue.names() and "coefficients" not in catalogue.default()
    assert Tables().hold == ("instability",)
    assert catalogue.study("coefficients").needs(Tree()) == ["interpolation", "layers"]
