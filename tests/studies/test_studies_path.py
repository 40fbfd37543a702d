"""The interpolation study against plain torch, and its summary against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from support.tiny_models import Told
from support.wording import refused
from torch import Tensor, nn

from rft_fast import studies
from rft_fast.datasets import Dataset
from rft_fast.evaluate import Evaluator, Scores
from rft_fast.path import Path
from rft_fast.studies.verdicts import shape

ALPHAS = [0.0, 0.25, 0.5, 1.0]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- the study ------------------------------------------------------------------------------------


def random_state(model: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator) / 4
        for name, tensor in model.state_dict().items()
    }


def random_set(name: str, n: int, ood: bool) -> Dataset:
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 5, (n,), generator=generator)
    return Dataset(name, images, labels, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), ood=ood)


class Setting:
    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.Tanh(), nn.Linear(6, 5))
        self.ends = [random_state(self.model, seed) for seed in (1, 2)]
        self.path = Path(self.model, self.ends[0], self.ends[1])
        self.sets = [random_set("far", 97, True), random_set("near", 41, False)]
        self.evaluator = Evaluator(self.model, self.sets, batch_size=16)

    def brute(self, alpha: float, data: Dataset) -> tuple[np.ndarray, np.ndarray]:
        """Losses and hits, image by image, in float64, from weights mixed by hand."""
        zero, one = self.ends
        w = {name: (1 - alpha) * zero[name].double() + alpha * one[name].double() for name in zero}
        mean, std = (torch.tensor(x).double().view(3, 1, 1) for x in (data.mean, data.std))
        x = ((data.images.double() / 255 - mean) / std).flatten(1)
        logits = torch.tanh(x @ w["1.weight"].T + w["1.bias"]) @ w["3.weight"].T + w["3.bias"]
        losses = logits.logsumexp(1) - logits[torch.arange(len(x)), data.labels]
        return losses.numpy(), (logits.argmax(1) == data.labels).numpy()


def test_rows_equal_brute_force() -> None:
    s = Setting()
    told = Told()
    rows = studies.interpolation(s.path, s.evaluator, [1, 0.5, 0, 0.25], model="m", sink=told)
    assert list(rows.columns) == list(studies.COLUMNS)
    assert rows["alpha"].tolist() == [a for a in ALPHAS for _ in s.sets]
    assert rows["dataset"].tolist() == ["far", "near"] * 4
    assert rows["ood"].tolist() == [True, False] * 4
    assert told.numbers == list(range(8))
    pd.testing.assert_frame_equal(rows, studies.frame(told.rows))
    assert set(rows["study"]) == {"interpolation"} and set(rows["model"]) == {"m"}
    assert set(rows["precision"]) == {"fp32"} and (rows["seconds"] > 0).all()
    other = ["layer", "others", "on", "noise", "seed", "draws", "instability", "sharpness"]
    assert rows[other].isna().all(axis=None)

    for row in rows.to_dict("records"):
        data = s.sets[0] if row["dataset"] == "far" else s.sets[1]
        losses, hits = s.brute(row["alpha"], data)
        losses0, hits0 = s.brute(0.0, data)
        n = len(losses)
        assert row["samples"] == n
        assert row["accuracy"] == hits.mean()
        assert row["loss"] == pytest.approx(losses.mean(), abs=1e-5)
        assert row["loss_se"] == pytest.approx(losses.std(ddof=1) / math.sqrt(n), abs=1e-5)
        assert row["accuracy_se"] == pytest.approx(hits.std(ddof=1) / math.sqrt(n), abs=1e-12)
        gains = hits.astype(float) - hits0  # paired: the variance of differences, image by image
        assert row["gain"] == pytest.approx(gains.mean(), abs=1e-12)
        assert row["gain_se"] == pytest.approx(gains.std(ddof=1) / math.sqrt(n), abs=1e-12)
        rises = losses - losses0
        assert row["rise"] == pytest.approx(rises.mean(), abs=1e-5)
        assert row["rise_se"] == pytest.approx(rises.std(ddof=1) / math.sqrt(n), abs=1e-5)
        bumps = losses - (1 - row["alpha"]) * losses0 - row["alpha"] * s.brute(1.0, data)[0]
        assert row["bump"] == pytest.approx(bumps.mean(), abs=1e-5)
        assert row["bump_se"] == pytest.approx(bumps.std(ddof=1) / math.sqrt(n), abs=1e-5)
        zero, one = s.ends
        moved = math.sqrt(sum(float(((one[k].double() - zero[k].double()) ** 2).sum()) for k in zero))
        assert row["distance"] == pytest.approx(row["alpha"] * moved, rel=1e-12)


def test_known_zeroshot_scores_change_nothing() -> None:
    s = Setting()
    plain = studies.interpolation(s.path, s.evaluator, ALPHAS)
    with s.path.at(0.0):
        known = s.evaluator.noting().scores()
    rows = studies.interpolation(s.path, s.evaluator, ALPHAS, zeroshot=known)
    pd.testing.assert_frame_equal(rows.drop(columns="seconds"), plain.drop(columns="seconds"))


def test_a_position_alone_has_the_bump_of_the_whole_path() -> None:
    """What is resumed measures the fine-tuned end once more, unless somebody kept its scores."""
    s = Setting()
    plain = studies.interpolation(s.path, s.evaluator, ALPHAS)
    known: dict[str, Scores] = {}
    seen = []
    scores = s.evaluator.among(["far"]).scores
    with s.path.at(1.0):
        truth = scores()["far"]
    for _ in range(2):  # measured, then known
        alone = studies.interpolation(s.path, s.evaluator, ALPHAS, finetuned=known, only=[4])
        assert set(known) == {"far", "near"} and torch.equal(known["far"].losses, truth.losses)
        seen.append(alone.drop(columns="seconds"))
    expected = plain.drop(columns="seconds").iloc[[4]].reset_index(drop=True)
    for alone in seen:
        pd.testing.assert_frame_equal(alone, expected)
    studies.interpolation(s.path, s.evaluator, ALPHAS, finetuned=(none := {}), only=[0])
    assert not none  # at alpha = 0 there is no bump, whatever the other end


def test_weights_come_back_also_after_a_failure() -> None:
    s = Setting()
    s.path.write(0.37)
    before = s.path.checksum()
    studies.interpolation(s.path, s.evaluator, ALPHAS)
    assert s.path.checksum() == before and s.path.alpha == 0.37

    def stop(number: int, rows: list[dict[str, object]]) -> None:
        if rows[0]["alpha"] == 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        studies.interpolation(s.path, s.evaluator, ALPHAS, sink=stop)
    assert s.path.checksum() == before

    with pytest.raises(RuntimeError, match="scoring fails"):
        studies.interpolation(s.path, Failing(s.path, s.evaluator), ALPHAS)  # type: ignore[arg-type]
    assert s.path.checksum() == before and s.path.alpha == 0.37


class Failing:
    """An evaluator that fails on the way."""

    precision = "fp32"
    normalize_logits = False

    def __init__(self, path: Path, evaluator: Evaluator) -> None:
        self.model, self.datasets = evaluator.model, evaluator.datasets
        self.path, self.evaluator = path, evaluator

    def among(self, names: Iterable[str]) -> Failing:
        return Failing(self.path, self.evaluator.among(names))

    def noting(self) -> Failing:
        return self

    def scores(self) -> dict[str, Scores]:
        if self.path.alpha == 0.5:
            raise RuntimeError("scoring fails")
        return self.evaluator.scores()


def test_an_evaluator_of_another_model_is_refused() -> None:
    s, other = Setting(), Setting()
    with refused(ValueError):
        studies.interpolation(s.path, other.evaluator, ALPHAS)


@pytest.mark.parametrize(
    ("alphas", "message"),
    [
        ([], r"add \[0.0, 1.0\]"),
        ([0, 0.5], r"add \[1.0\]"),
        ([0.2, 1], r"add \[0.0\]"),
        ([0, 0.5, 0.5, 1], r"\[0.5\] more than once"),
        ([0, -0.0, 1], r"\[0.0\] more than once"),
        ([0, 1, math.nan], "nan"),
        ([0, 1, math.inf], "inf"),
        ([0, 1, 1.5], r"got \[1.5\]"),
        ([-0.1, 0, 1], r"got \[-0.1\]"),
    ],
)
def test_unfit_alphas_are_refused(alphas: list[float], message: str) -> None:
    with refused(ValueError) as caught:
        studies.check_alphas(alphas)
    assert caught.match(message)
    s = Setting()
    with refused(ValueError):
        studies.interpolation(s.path, s.evaluator, alphas)


# --- the summary ------------------------------------------------------------------------------------


class Scripted:
    """A path and an evaluator in one whose scores are written down, not computed."""

    precision = "fp32"
    normalize_logits = False
    distance = 1.0

    def __init__(self, script: dict[float, tuple[list[float], list[int]]], ood: bool = True) -> None:
        self.model = nn.Identity()
        self.script = script
        images = torch.zeros((len(script[0][0]), 3, 1, 1), dtype=torch.uint8)
        labels = torch.zeros(len(images), dtype=torch.int64)
        self.datasets = [Dataset("set", images, labels, (0.0,) * 3, (1.0,) * 3, ood=ood)]

    @contextmanager
    def at(self, alpha: float) -> Iterator[None]:
        self.alpha = alpha
        yield

    def among(self, names: Iterable[str]) -> Scripted:
        assert list(names) == ["set"]
        return self

    def noting(self) -> Scripted:
        return self

    def scores(self) -> dict[str, Scores]:
        losses, correct = self.script[self.alpha]
        return {"set": Scores(torch.tensor(losses), torch.tensor(correct, dtype=torch.bool))}

    def rows(self, model: str = "m") -> pd.DataFrame:
        alphas = list(self.script)
        scripted: Any = self
        return studies.interpolation(scripted, scripted, alphas, model=model)


HAND = {
    # alpha: losses, hits;          L      A
    0.0: ([1.0, 2.0, 3.0, 2.0], [1, 1, 0, 0]),  # 2.00   .50
    0.3: ([1.0, 1.0, 1.0, 2.0], [1, 1, 1, 0]),  # 1.25   .75
    0.6: ([4.0, 2.0, 3.0, 5.0], [0, 0, 0, 1]),  # 3.50   .25
    0.8: ([2.0, 2.0, 1.0, 3.0], [0, 1, 1, 1]),  # 2.00   .75
    1.0: ([3.0, 1.0, 1.0, 1.0], [1, 1, 0, 1]),  # 1.50   .75
}


def test_summary_by_hand() -> None:
    (fact,) = studies.summarize(Scripted(HAND).rows()).to_dict("records")
    assert (fact["model"], fact["dataset"], fact["ood"]) == ("m", "set", True)
    assert (fact["samples"], fact["alphas"], fact["xi"]) == (4, 5, 0.02)
    assert (fact["zero_shot"], fact["fine_tuned"]) == (0.5, 0.75)
    assert (fact["gain"], fact["best_alpha"]) == (0.25, 0.3)  # the smallest alpha that reaches it
    # Differences of hits at 0.3: 0, 0, 1, 0: variance 3/12, standard error sqrt(1/4 / 4).
    assert fact["gain_se"] == pytest.approx(0.25)
    # Bonferroni: four positions, Student's t of three degrees of freedom, one more image that changes sides.
    hits = np.array([HAND[a][1] for a in (0.3, 0.6, 0.8, 1.0)]) - np.array(HAND[0.0][1])
    t = stats.t.ppf(1 - 0.05 / 4, 3)
    half = t * np.sqrt(hits.var(axis=1, ddof=1) / 4 + 1 / (4 * 3))
    assert fact["gain_low"] == pytest.approx(max(hits.mean(axis=1) - half))
    assert fact["gain_high"] == pytest.approx(max(hits.mean(axis=1) + half))
    assert (fact["gain_method"], fact["gain_critical"]) == ("bonferroni", pytest.approx(t))
    assert (fact["barrier"], fact["barrier_alpha"]) == (1.5, 0.6)
    # Differences of losses at 0.6: 3, 0, 0, 3: variance 9/3, standard error sqrt(3 / 4).
    assert fact["barrier_se"] == pytest.approx(math.sqrt(3 / 4))
    # Rises above 0: -.75, 1.5, 0, -.5; four tests.
    errors = [np.std(np.subtract(HAND[a][0], HAND[0.0][0]), ddof=1) / 2 for a in (0.3, 0.6, 0.8, 1.0)]
    rises = np.array([-0.75, 1.5, 0.0, -0.5])
    t = stats.t.ppf(1 - 0.05 / 4, 3)
    assert fact["barrier_low"] == pytest.approx(max(rises - t * np.array(errors)))
    # The chord runs from 2 to 1.5: bumps of -.6, 1.8 and .4; at 0.6 image by image 1.8, .6, 1.2, 3.6.
    assert (fact["bump"], fact["bump_alpha"]) == (pytest.approx(1.8), 0.6)
    assert fact["bump_se"] == pytest.approx(np.std([1.8, 0.6, 1.2, 3.6], ddof=1) / 2)
    chords = {a: (1 - a) * np.array(HAND[0.0][0]) + a * np.array(HAND[1.0][0]) for a in HAND}
    bumps = [np.array(HAND[a][0]) - chords[a] for a in (0.3, 0.6, 0.8)]
    t = stats.t.ppf(1 - 0.05 / 3, 3)
    assert fact["bump_low"] == pytest.approx(max(b.mean() - t * b.std(ddof=1) / 2 for b in bumps))
    assert fact["instability_loss"] == pytest.approx(3.5 - (2.0 + 1.5) / 2)
    assert fact["instability_accuracy"] == pytest.approx((0.5 + 0.75) / 2 - 0.25)
    assert (fact["mode"], fact["mode_observed"]) == ("undecided", "high gain")  # four images


@pytest.mark.parametrize(
    ("hits", "mode"),
    [(50, "failure"), (49, "failure"), (51, "gain"), (52, "high gain"), (53, "high gain")],
)
def test_mode_by_threshold(hits: int, mode: str) -> None:
    losses = [1.0] * 100
    curve = {a: (losses, [1] * h + [0] * (100 - h)) for a, h in ((0.0, 50), (0.5, hits), (1.0, 40))}
    (fact,) = studies.summarize(Scripted(curve).rows(), xi=0.02).to_dict("records")
    assert fact["mode_observed"] == mode
    assert fact["gain"] == max(0, hits - 50) / 100
    if mode == "failure":
        assert (fact["best_alpha"], fact["gain"], fact["gain_se"]) == (0.0, 0.0, 0.0)


def test_best_gains_by_hand() -> None:
    failing = {0.0: HAND[0.0], 0.5: HAND[0.6], 1.0: ([1.0] * 4, [0, 0, 1, 0])}  # .50 .25 .25
    far = pd.concat([Scripted(HAND).rows("a"), Scripted(failing).rows("b")])
    near = pd.concat([Scripted(failing, ood=False).rows(name) for name in "ab"]).assign(dataset="near")
    assert studies.best_gains(pd.concat([far, near])).to_dict() == {"a": 0.25, "b": -0.25}
    assert studies.best_gains(near).to_dict() == {"a": -0.25, "b": -0.25}
    # The mean over data sets comes first, then the best alpha.
    other = Scripted({a: (HAND[0.0][0], hits) for a, hits in ((0.0, [1] * 4), (0.3, [0] * 4), (0.6, [1] * 4),
                                                              (0.8, [1] * 4), (1.0, [0] * 4))})  # fmt: skip
    both = pd.concat([Scripted(HAND).rows("a"), other.rows("a").assign(dataset="other")])
    assert studies.best_gains(both).to_dict() == {"a": (0.25 + 0.0) / 2}


def test_threshold_is_settable_and_in_distribution_has_no_mode() -> None:
    rows = Scripted(HAND).rows()
    assert studies.summarize(rows, xi=0.25)["mode_observed"].tolist() == ["high gain"]
    assert studies.summarize(rows, xi=0.26)["mode_observed"].tolist() == ["gain"]
    (fact,) = studies.summarize(Scripted(HAND, ood=False).rows()).to_dict("records")
    assert pd.isna(fact["mode"]) and pd.isna(fact["mode_observed"]) and fact["gain"] == 0.25


def curve_of(losses: list[float], ood: bool = True) -> dict[str, Any]:
    """The summary of a path of 100 images whose mean losses are these; changes have a spread of 0.1."""
    alphas = np.linspace(0, 1, len(losses))
    wobble = np.random.default_rng(0).normal(size=100)
    script = {float(a): ([m + 0.1 * a * w for w in wobble], [1] * 100)
              for a, m in zip(alphas, losses, strict=True)}  # fmt: skip
    (fact,) = studies.summarize(Scripted(script, ood).rows()).to_dict("records")
    return {str(name): value for name, value in fact.items()}


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([1.0, 1.5, 2.0], "slope"),  # a straight line: half the difference of its ends by Def. 1, and no bump
        ([1.0, 1.2, 2.0], "slope"),
        ([1.0, 1.8, 2.0], "bump"),  # monotone, and yet above the line
        ([2.0, 1.8, 1.0], "bump"),  # never above zero-shot
        ([1.0, 0.9, 0.5], "bump"),
        ([1.0, 0.6, 0.5], "no rise"),
        ([1.0, 1.0, 1.0], "no rise"),
        ([1.0, 2.0], "unknown"),  # nothing between the ends
    ],
)
def test_a_slope_is_no_bump(losses: list[float], expected: str) -> None:
    fact = curve_of(losses)
    assert shape(fact) == expected
    middle = losses[1] - (losses[0] + losses[-1]) / 2
    assert fact["bump"] == pytest.approx(max(0.0, middle if len(losses) > 2 else 0.0), abs=1e-6)


def test_rows_without_bumps_have_an_unknown_shape() -> None:
    (fact,) = studies.summarize(Scripted(HAND).rows().assign(bump=math.nan)).to_dict("records")
    assert math.isnan(fact["bump"]) and math.isnan(fact["bump_alpha"]) and shape(fact) == "unknown"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_not_averaged_away(bad: float) -> None:
    script = {**HAND, 0.6: ([bad, 2.0, 3.0, 5.0], [0, 0, 0, 1])}
    (fact,) = studies.summarize(Scripted(script).rows()).to_dict("records")
    for name in ("barrier", "bump", "instability_loss"):
        assert str(fact[name]) == str(bad)
    assert math.isnan(fact["barrier_low"]) and math.isnan(fact["bump_low"]) and shape(fact) == "unknown"
    assert fact["barrier_alpha"] == 0.6 and fact["gain"] == 0.25
    script = {**HAND, 0.0: ([bad, 2.0, 3.0, 5.0], [1, 1, 0, 0])}
    (fact,) = studies.summarize(Scripted(script).rows()).to_dict("records")
    assert math.isnan(fact["instability_loss"]) and not math.isfinite(fact["barrier"])


def test_summary_of_many_keeps_their_order() -> None:
    rows = pd.concat([Scripted(HAND).rows(name) for name in "zay"]).iloc[::-1]
    other = rows.assign(study="layers")
    facts = studies.summarize(pd.concat([other, rows]))
    assert facts["model"].tolist() == ["y", "a", "z"]
    assert facts["gain"].tolist() == [0.25] * 3


def test_what_cannot_be_summarized_is_refused() -> None:
    rows = Scripted(HAND).rows()
    for xi in (-0.1, 1.0, 2.0, math.nan):
        with refused(ValueError):
            studies.summarize(rows, xi)
    with refused(ValueError):
        studies.summarize(rows.iloc[:0])
    with refused(ValueError, "m", "set", "1.0"):
        studies.summarize(rows.iloc[:-1])  # a run that was stopped
    with refused(ValueError):
        studies.summarize(pd.concat([rows, rows]))


def test_unknown_columns_are_refused() -> None:
    with refused(ValueError, "accurcy"):
        studies.frame([{"accurcy": 0.5}])


# --- against guessing -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "samples", "classes", "verdict"),
    [
        (100, 1000, 10, "near"),
        (118, 1000, 10, "near"),
        (121, 1000, 10, "above"),
        (80, 1000, 10, "below"),
        (0, 200, 10, "below"),  # as of labels that are none in place: as telling as chance
        (0, 20, 10, "near"),
        (3, 3, 10, "above"),
        (2, 2, 2, "near"),
        (56, 50_000, 1000, "near"),
        (700, 50_000, 1000, "above"),
        (1, 1, 10, "unknown"),
        (40, 40, 1, "unknown"),
    ],
)
def test_a_zero_shot_end_against_guessing(right: int, samples: int, classes: int, verdict: str) -> None:
    row = {"dataset": "x", "accuracy": right / samples, "samples": samples}
    end = studies.against_chance(row, classes)
    truth = stats.binomtest(right, samples).proportion_ci(0.95, "exact")
    assert (end.low, end.high) == pytest.approx((truth.low, truth.high), abs=1e-9)
    assert end.verdict == verdict and end.chance == 1 / classes
    said = {
        "near": "near chance",
        "below": "below chance",
        "unknown": "support no conclusion",
        "above": "",
    }
    assert said[verdict] in end.text and bool(end.text) == (verdict != "above")


def test_ends_of_their_own_are_compared_with_guessing_one_by_one() -> None:
    columns = ("study", "model", "dataset", "alpha", "accuracy", "samples")
    rows = studies.frame(
        dict(zip(columns, (*values, 500), strict=True))
        for values in [
            ("interpolation", "a", "own", 0.0, 0.1), ("interpolation", "b", "own", 0.0, 0.9),
            ("interpolation", "a", "all", 0.0, 0.1), ("interpolation", "b", "all", 0.0, 0.1),
            ("interpolation", "a", "own", 1.0, 0.1), ("layers", "a", "own", 0.0, 0.2),
            ("interpolation", "a", "other", 0.0, 0.1),
        ]
    )  # fmt: skip
    found = studies.zeroshot_chances(rows, {"own": 10, "all": 10, "absent": 2})
    assert [(end.dataset, end.models, end.verdict) for end in found] == [
        ("own", ("a",), "near"), ("own", ("b",), "above"), ("all", (), "near"),
    ]  # fmt: skip
    assert "of a is near chance" in found[0].text
