"""The correlation study against ranks worked out by hand, brute force over pairs, and simulation."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kendalltau, spearmanr
from support.wording import refused

from rft_fast import studies
from rft_fast.studies.correlation import correlation
from rft_fast.studies.verdicts import association

ALPHAS = (0.0, 0.5, 1.0)
Row = dict[str, object]


def path(model: str, accuracies: list[float], dataset: str = "far", ood: bool = True) -> list[Row]:
    """Rows of an interpolation with these accuracies at ALPHAS."""
    return [
        {
            "study": "interpolation", "model": model, "dataset": dataset, "ood": ood, "alpha": alpha,
            "samples": 10, "accuracy": accuracy, "gain": accuracy - accuracies[0], "gain_se": 0.01,
            "loss": 1.0, "rise": 0.0, "rise_se": 0.1,
        }
        for alpha, accuracy in zip(ALPHAS, accuracies, strict=True)
    ]  # fmt: skip


def sharp(model: str, values: list[float], layer: str | None = None, **other: object) -> list[Row]:
    """Rows of a sharpness with these values at the alphas above 0; at 0 it is 0."""
    return [
        {
            "study": "layer-sharpness" if layer else "sharpness", "model": model, "layer": layer,
            "dataset": "near", "ood": False, "alpha": alpha, "rho": 0.5, "on": "finetuned" if layer else
            "interpolated", "estimator": "plain", "noise": "normal", "adaptive": True, "seed": 3,
            "draws": 20 if alpha else 0, "samples": 77, "sharpness": value, "sharpness_se": 0.1, **other,
        }
        for alpha, value in zip(ALPHAS, [0.0, *values], strict=True)
    ]  # fmt: skip


def pick(table: pd.DataFrame, **keys: Any) -> dict[str, Any]:
    for name, value in keys.items():
        table = table[table[name] == value]
    (row,) = table.to_dict("records")
    return {str(name): value for name, value in row.items()}


def zoo(x: list[float], accuracy: list[float], **other: object) -> pd.DataFrame:
    """A zoo whose general sharpness and accuracy at alpha = 1 are these; both vary at 0.5 as well."""
    rows: list[Row] = []
    for i, (sharpness, end) in enumerate(zip(x, accuracy, strict=True)):
        rows += path(f"m{i}", [0.1, 0.2 + 0.01 * i, end])
        rows += sharp(f"m{i}", [-float(i), sharpness], **other)
    return studies.frame(rows)


def brute_tau_b(x: np.ndarray, y: np.ndarray) -> float:
    """Concordant minus discordant pairs, over the geometric mean of the pairs untied on each side."""
    pairs = [(i, j) for i in range(len(x)) for j in range(i)]
    balance = sum(np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in pairs)
    untied = [sum(v[i] != v[j] for i, j in pairs) for v in (x, y)]
    return float(balance / math.sqrt(untied[0] * untied[1]))


def test_ranks_with_ties_by_hand() -> None:
    # x: 1 2 2 4 5 5, ranks 1 2.5 2.5 4 5.5 5.5; y: ranks 2 1 3 5 4 6. Of 15 pairs 2 are tied in x;
    # discordant: (0,1) and none else of the untied but (3,4): 11 - 2 = 9.
    x, y = [1.0, 2.0, 2.0, 4.0, 5.0, 5.0], [0.3, 0.2, 0.4, 0.6, 0.5, 0.7]
    row = pick(correlation(zoo(x, y)), outcome="accuracy", alpha=1)
    assert row["kendall"] == pytest.approx(9 / math.sqrt(13 * 15))
    # Pearson of the ranks: means 3.5; cov sum = 2.5*1.5 + 1*2.5 + 1*.5 + .5*1.5 + 2*.5 + 2*2.5 = 13.5;
    # sums of squares 16.5 and 17.5.
    rho = 13.5 / math.sqrt(16.5 * 17.5)
    assert row["spearman"] == pytest.approx(rho)
    assert (row["models"], row["nonfinite"]) == (6, 0)
    for name, variance in (("kendall", 0.437 / 2), ("spearman", (1 + rho**2 / 2) / 3)):
        low, high = (math.atanh(row[f"{name}_{end}"]) for end in ("low", "high"))
        assert (low + high) / 2 == pytest.approx(math.atanh(row[name]))
        assert (high - low) / 2 == pytest.approx(1.959964 * math.sqrt(variance), abs=1e-6)
    # At alpha = 0.5 sharpness falls as accuracy rises: an exact -1, whose z is infinite.
    row = pick(correlation(zoo(x, y)), outcome="accuracy", alpha=0.5)
    assert (row["kendall"], row["spearman"]) == pytest.approx((-1, -1))
    assert all(math.isnan(row[f"{n}_{end}"]) for n in ("kendall", "spearman") for end in ("low", "high"))


@pytest.mark.parametrize("seed", range(5))
def test_brute_force_over_pairs_and_scipy_agree(seed: int) -> None:
    x, y = np.random.default_rng(seed).integers(0, 6, (2, 12)).astype(float)
    row = pick(correlation(zoo(list(x), list(y / 10))), outcome="accuracy", alpha=1)
    assert row["kendall"] == pytest.approx(brute_tau_b(x, y))
    assert row["kendall"] == pytest.approx(kendalltau(x, y).statistic)
    assert row["spearman"] == pytest.approx(spearmanr(x, y).statistic)


@pytest.mark.slow
def test_gain_is_the_largest_over_alpha_at_every_alpha_of_sharpness() -> None:
    # gains .3, .2, .1, 0, 0: the best alpha is 0.5, 1, 1, 0 and 0
    curves = [[0.5, 0.8, 0.1], [0.5, 0.6, 0.7], [0.5, 0.1, 0.6], [0.5, 0.4, 0.3], [0.5, 0.2, 0.5]]
    rows = [row for i, curve in enumerate(curves) for row in path(f"m{i}", curve)]
    sharpness = np.array([[1, 2, 3, 4, 5], [5, 1, 4, 2, 3]])
    rows += [row for i in range(5) for row in sharp(f"m{i}", list(sharpness[:, i].astype(float)))]
    table = correlation(studies.frame(rows))
    assert table["alpha"].tolist() == [0.5, 1, 0.5, 1]
    for alpha, x in zip((0.5, 1), sharpness, strict=True):
        row = pick(table, outcome="gain", alpha=alpha)
        assert row["kendall"] == pytest.approx(brute_tau_b(x, np.array([3, 2, 1, 0, 0])))


@pytest.mark.slow(but=r"^30-0\.8$")
@pytest.mark.parametrize(("n", "r"), [(9, 0.0), (9, 0.6), (30, 0.0), (30, 0.8)])
def test_intervals_cover_the_truth(n: int, r: float) -> None:
    """Each layer of the zoo is one repetition: a sample of n models from a bivariate normal."""
    rng = np.random.default_rng(n)
    rows = [row for m in range(n) for row in path(f"m{m}", [0.0, 0.0, m / n])]
    for i in range(300):
        x = rng.normal(size=n)
        y = r * x + math.sqrt(1 - r * r) * rng.normal(size=n)
        # Only ranks matter: numbering the models by y lets all layers share one set of accuracies.
        for m, sharpness in enumerate(x[np.argsort(y)]):
            rows += sharp(f"m{m}", [0.0, sharpness], f"layer {i}", sharpness_se=0.0)[2:]
    table = correlation(studies.frame(rows))
    table = table[table["outcome"] == "accuracy"]
    assert len(table) == 300
    truths = {"kendall": 2 / math.pi * math.asin(r), "spearman": 6 / math.pi * math.asin(r / 2)}
    for name, truth in truths.items():
        covered = table[f"{name}_low"].le(truth) & table[f"{name}_high"].ge(truth)
        assert 0.9 <= covered.mean() <= 0.99


def layered() -> list[Row]:
    """Six models with three layers, of which b and c together tell the accuracy, but not alone."""
    b, c = [1.0, 6.0, 2.0, 5.0, 3.0, 9.0], [9.0, 3.0, 9.0, 7.0, 11.0, 6.0]
    rows: list[Row] = []
    for i in range(6):
        name = f"m{i}"
        rows += path(name, [0.1, 0.9, b[i] + c[i]]) + path(name, [0.1, 0.2, 0.3], "near", ood=False)
        rows += sharp(name, [0.0, 1.0]) + sharp(name, [0.0, float(i % 3)], "z.a")
        rows += sharp(name, [0.0, b[i]], "y.b") + sharp(name, [0.0, c[i]], "x.c")
    return rows


def test_stragglers_are_the_mean_of_their_layers() -> None:
    table = correlation(studies.frame(layered()), ["y.b", "x.c", "y.b"])
    table = table[(table["alpha"] == 1) & (table["outcome"] == "accuracy")]
    assert table["measure"].tolist() == ["general", "stragglers", "layer", "layer", "layer", "ID accuracy"]
    table = table[table["measure"] != "ID accuracy"]
    assert table["layer"].tolist()[1:] == ["y.b, x.c", "z.a", "y.b", "x.c"]  # in measured order
    assert pick(table, measure="stragglers")["kendall"] == pytest.approx(1)
    assert abs(pick(table, layer="y.b")["kendall"]) < 0.6
    stated = table[["dataset", "measured_on", "rho", "estimator", "draws", "samples", "seed"]]
    assert (stated == ["far", "near", 0.5, "plain", 20, 77, 3]).all(axis=None)
    assert table["on"].tolist() == ["interpolated"] + 4 * ["finetuned"]
    # General sharpness is the same for all models: no correlation, nor an error.
    assert math.isnan(pick(table, measure="general")["spearman"])


def test_stragglers_are_not_guessed() -> None:
    assert "stragglers" not in set(correlation(studies.frame(layered()))["measure"])
    assert "stragglers" not in set(correlation(studies.frame(layered()), [])["measure"])
    with refused(ValueError, "y.bb", "3", "y.b"):
        correlation(studies.frame(layered()), ["y.bb"])


def interpolated(model: str, layer: str, instability: float) -> list[Row]:
    """Rows of a layer-wise interpolation that rises by twice its instability."""
    return [
        {
            "study": "layers", "model": model, "layer": layer, "dataset": "far", "ood": True, "alpha": alpha,
            "others": "zeroshot", "samples": 10, "rise": 2 * height, "rise_se": 0.01, "instability": height,
            "instability_se": 0.01, "instability_accuracy": 0.0, "instability_accuracy_se": 0.01,
        }
        for alpha, height in zip(ALPHAS, (0.0, instability, 0.0), strict=True)
    ]  # fmt: skip


def test_stragglers_of_any_model_are_found() -> None:
    found = [("m0", "z.a", 0.0), ("m0", "y.b", 0.9), ("m0", "x.c", 0.0)]
    found += [("m5", "z.a", 0.0), ("m5", "y.b", 0.0), ("m5", "x.c", 0.9)]
    rows = studies.frame([*layered(), *(row for each in found for row in interpolated(*each))])
    pd.testing.assert_frame_equal(correlation(rows), correlation(rows, ["y.b", "x.c"]))
    none = studies.frame([*layered(), *interpolated("m0", "y.b", 0.0)])
    assert "stragglers" not in set(correlation(none)["measure"])
    unmeasured = studies.frame([*layered(), *interpolated("m0", "w.d", 0.9)])
    with refused(ValueError, "w.d"):
        correlation(unmeasured)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_counted_and_never_dropped(bad: float) -> None:
    rows = zoo([1.0, bad, 3.0, 4.0, bad, 6.0], [0.3, 0.2, 0.4, 0.6, 0.5, 0.7])
    table = correlation(rows)
    row = pick(table, outcome="accuracy", alpha=1)
    assert (row["models"], row["nonfinite"]) == (6, 2)
    assert math.isnan(row["kendall"]) and math.isnan(row["spearman"])
    assert pick(table, outcome="accuracy", alpha=0.5)["nonfinite"] == 0


def test_the_models_that_both_have_are_correlated() -> None:
    x, y = [1.0, 2.0, 3.0, 4.0, 0.0], [0.3, 0.2, 0.4, 0.6, 0.5]
    rows = zoo(x, y)
    part = rows[(rows["study"] == "interpolation") | rows["model"].isin(["m0", "m1", "m2", "m3"])]
    row = pick(correlation(part), outcome="accuracy", alpha=1)
    assert row["models"] == 4 and row["kendall"] == pytest.approx(4 / 6)
    assert math.isnan(row["kendall_low"]) and row["spearman_low"] < row["spearman"]  # n = 4
    part = rows[(rows["study"] == "sharpness") | (rows["model"] != "m4")]
    assert pick(correlation(part), outcome="accuracy", alpha=1)["models"] == 4
    two = rows[(rows["study"] == "interpolation") | rows["model"].isin(["m0", "m1"])]
    with refused(ValueError, "3", "2", "m0", "m1"):
        correlation(two)
    # With another setting that has enough models, the two are told of, and not refused.
    both = pd.concat([two, rows[rows["study"] == "sharpness"].assign(rho=2.0)])
    row = pick(correlation(both), outcome="accuracy", alpha=1, rho=0.5)
    assert row["models"] == 2 and math.isnan(row["kendall"])


def test_an_alpha_without_accuracies_has_no_models() -> None:
    rows = zoo([1.0, 2.0, 3.0], [0.3, 0.2, 0.4])
    table = correlation(rows[(rows["study"] == "sharpness") | (rows["alpha"] != 0.5)])
    assert pick(table, outcome="accuracy", alpha=0.5)["models"] == 0
    assert pick(table, outcome="gain", alpha=0.5)["models"] == 3
    nudged = rows.assign(alpha=rows["alpha"].where(rows["study"] == "sharpness", rows["alpha"] - 1e-12))
    nudged["alpha"] = nudged["alpha"].clip(lower=0)
    assert pick(correlation(nudged), outcome="accuracy", alpha=0.5)["models"] == 3


def test_settings_are_kept_apart() -> None:
    rows = zoo([1.0, 2.0, 3.0], [0.3, 0.2, 0.4])
    sharpness = rows[rows["study"] == "sharpness"]
    others = [
        sharpness.assign(**{name: value}, sharpness=-sharpness["sharpness"])
        for name, value in {"rho": 2.0, "on": "finetuned", "estimator": "apgd-l2", "dataset": "b"}.items()
    ]
    table = correlation(pd.concat([rows, *others]))
    ends = table[(table["alpha"] == 1) & (table["outcome"] == "accuracy")]
    assert len(ends) == 5
    assert ends["kendall"].tolist() == pytest.approx([1 / 3] + 4 * [-1 / 3])


def test_bad_rows_are_refused() -> None:
    rows = zoo([1.0, 2.0, 3.0], [0.3, 0.2, 0.4])
    sharpness, measured = rows["study"] == "sharpness", rows[rows["study"] == "sharpness"]
    with refused(ValueError, "interpolation"):
        correlation(measured)
    with refused(ValueError):
        correlation(rows.assign(ood=False))
    with refused(ValueError):
        correlation(rows[~sharpness])
    with refused(ValueError, "1.0"):
        correlation(rows[sharpness | (rows["alpha"] < 1)])
    with refused(ValueError, "rho=0.5", "6", "m1", "alpha=1"):
        correlation(rows[~(sharpness & (rows["model"] == "m1") & (rows["alpha"] == 1))])
    with refused(ValueError, "m0", "alpha=0.5"):
        correlation(pd.concat([rows, measured.assign(seed=4)]))
    with refused(ValueError, "normal", "uniform"):
        correlation(pd.concat([rows, measured.assign(noise="uniform")]))
    layers = studies.frame(layered())
    gone = (layers["layer"] == "y.b") & (layers["model"] == "m3")
    with refused(ValueError, "2", "36", "m3", "y.b", "alpha=0.5"):
        correlation(layers[~gone])


# --- ties, tests, competitors ------------------------------------------------------------------------------


def judged(rows: pd.DataFrame, **keys: Any) -> dict[str, Any]:
    return pick(correlation(rows), outcome="accuracy", alpha=1, **keys)


def test_sharpnesses_within_their_errors_are_tied() -> None:
    x, y = [1.0, 1.2, 3.0, 3.1, 9.0], [0.1, 0.2, 0.3, 0.5, 0.4]
    rows = zoo(x, y)  # errors of 0.1: differences below 0.28 are ties
    row = judged(rows, measure="general")
    assert (row["ties"], row["tied"]) == ("unpaired", 2)
    assert row["kendall"] == pytest.approx((7 - 1) / math.sqrt(8 * 10))
    assert row["spearman"] == pytest.approx(spearmanr(x, y).statistic)
    changes = rows.assign(sharpness_change_se=rows["sharpness_se"] / 2)  # below 0.14: one tie
    row = judged(changes, measure="general")
    assert (row["ties"], row["tied"]) == ("paired", 1)
    assert row["kendall"] == pytest.approx((8 - 1) / math.sqrt(9 * 10))
    exact = judged(rows.assign(sharpness_se=math.nan), measure="general")
    assert (exact["ties"], exact["tied"], exact["kendall"]) == ("none", 0, pytest.approx(kendalltau(x, y)[0]))


def test_p_is_that_of_all_orders_and_corrected_within_its_family() -> None:
    """Two layers, of which one orders the models as the accuracy does at both alphas."""
    names, a, b = range(5), [1.0, 2, 3, 4, 5], [2.0, 1, 4, 5, 3]
    rows: list[Row] = []
    for i in names:
        rows += path(f"m{i}", [0.1, 0.2 + 0.01 * i, 0.3 + 0.01 * i])
        rows += sharp(f"m{i}", [a[i], a[i]], "a") + sharp(f"m{i}", [b[i], a[i]], "b")
    table = correlation(studies.frame(rows))
    table = table[table["outcome"] == "accuracy"]
    taus = np.abs([[kendalltau([v[k] for k in order], a).statistic for v in (a, b)]
                   for order in permutations(names)])  # fmt: skip
    largest = taus.max(1)
    for layer, alpha, x in (("a", 0.5, a), ("a", 1, a), ("b", 0.5, b), ("b", 1, a)):
        row = pick(table, layer=layer, alpha=alpha)
        size = abs(kendalltau(x, a).statistic)
        assert row["p"] == pytest.approx((taus[:, int(x is b)] >= size - 1e-9).mean())
        assert row["p_max"] == pytest.approx((largest >= size - 1e-9).mean())
        assert row["tests"] == 4
    row = pick(table, layer="b", alpha=0.5)
    left_out = [kendalltau(np.delete(b, i), np.delete(a, i)).statistic for i in names]
    assert (row["without_low"], row["without_high"]) == pytest.approx((min(left_out), max(left_out)))
    grouped = correlation(studies.frame(rows), groups={"m0": "g", "m1": "g"})
    row = pick(grouped, layer="b", alpha=0.5, outcome="accuracy")
    left_out = [kendalltau(b[2:], a[2:]).statistic, *left_out[2:]]
    assert (row["without_low"], row["without_high"]) == pytest.approx((min(left_out), max(left_out)))


def test_competitors_and_the_partial_correlation() -> None:
    """Clean losses, accuracies in distribution and bumps of six models, and tau given the loss."""
    rng = np.random.default_rng(0)
    x, loss, near, bump, y = rng.permuted(np.tile(np.arange(6.0), (5, 1)), axis=1)
    rows: list[Row] = []
    for i in range(6):
        rows += path(f"m{i}", [0.0, 0.1, y[i] / 10])
        rows += path(f"m{i}", [0.0, 0.1, near[i] / 10], "id", ood=False)
        rows += sharp(f"m{i}", [1.0, x[i]], sharpness_se=0.0, loss=loss[i] + x[i])
    frame = studies.frame(rows)
    table = correlation(frame)
    taus = {name: kendalltau(value, y).statistic for name, value in (("x", x), ("z", loss), ("id", near))}
    xz = kendalltau(x, loss).statistic
    row = judged(frame, measure="general")
    assert row["kendall"] == pytest.approx(taus["x"])
    given = (taus["x"] - xz * taus["z"]) / math.sqrt((1 - xz**2) * (1 - taus["z"] ** 2))
    assert row["partial"] == pytest.approx(given)
    at_end = dict(outcome="accuracy", alpha=1)
    assert pick(table, measure="minus clean loss", **at_end)["kendall"] == pytest.approx(-taus["z"])
    assert pick(table, measure="ID accuracy", measured_on="id", **at_end)["kendall"] == pytest.approx(
        taus["id"]
    )
    assert "bump" not in set(table["measure"])
    heights = frame["model"].map({f"m{i}": bump[i] for i in range(6)}).where(frame["alpha"] == 0.5, 0.0)
    bumps = correlation(frame.assign(bump=heights, bump_se=0.01))
    row = pick(bumps, measure="bump", measured_on="id", **at_end)
    assert row["kendall"] == pytest.approx(kendalltau(bump, y).statistic)
    assert not row["circular"]
    away = frame["model"].map({f"m{i}": float(bump[i]) for i in range(6)}) * frame["alpha"]
    table = correlation(frame.assign(distance=away.where(frame["study"] == "interpolation")))
    for outcome, truth in (("accuracy", y), ("gain", np.maximum(y - 1, 0))):
        row = pick(table, measure="distance", outcome=outcome, alpha=1)
        assert row["kendall"] == pytest.approx(kendalltau(bump, y).statistic if outcome == "accuracy"
                                               else kendalltau(bump, truth).statistic)  # fmt: skip
        assert pd.isna(row["measured_on"]) and not row["circular"] and row["ties"] == "none"
        family = table[(table["outcome"] == outcome) & ~table["measure"].isin(["general", "layer"])]
        assert set(family["tests"].dropna()) == {len(family[family["kendall"].notna()])}
    there = frame.assign(dataset=frame["dataset"].where(frame["study"] != "sharpness", "far"))
    assert pick(correlation(there), measure="general", **at_end)["circular"]


def test_saturated_sharpness_is_shown_and_not_tested() -> None:
    rows = zoo([1.0, 2.0, 3.0, 4.0, 5.0], [0.1, 0.2, 0.3, 0.4, 0.5])
    rows.loc[rows["study"] == "sharpness", ["loss", "accuracy"]] = [6.0, 0.1]
    chance = correlation(rows, classes={"near": 10})
    row = pick(chance, outcome="accuracy", alpha=1, measure="general")
    assert (row["saturated"], row["kendall"]) == (5, 1)
    assert math.isnan(row["p"]) and math.isnan(row["p_max"]) and pd.isna(row["tests"])
    assert association(row) == "saturated"
    row = pick(correlation(rows), outcome="accuracy", alpha=1, measure="general")
    assert row["saturated"] == 0 and row["p"] == pytest.approx(2 / math.factorial(5))
    assert association(row) == "above" and association(row | {"p_max": 0.051}) == "unclear"
    assert (
        association(row | {"kendall": -1.0}) == "below"
        and association(row | {"p_max": math.nan}) == "unknown"
    )
