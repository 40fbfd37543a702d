"""The paper's claim on toy models whose flat layers are counted by hand."""

from __future__ import annotations

import math
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kendalltau
from support.wording import refused, said

from rft_fast import figures, studies
from rft_fast.catalogue.claim import Claim
from rft_fast.report import claim as words
from rft_fast.studies.claim import claim, claim_tests
from rft_fast.studies.facts import Facts

# Gains at alpha = 0.5, and the sharpness of three layers at alpha = 1, each +- 0.001; at 0.5 it is half.
GAINS = {"a": 0.06, "b": 0.04, "c": 0.02, "d": -0.1, "e": -0.2, "f": 0.05}
SHARPNESS = {
    "a": [0.5, 0.4, 0.3], "b": [0.5, 0.015, 0.3], "c": [0.5, 0.4, 0.006], "d": [0.015, 0.005, 0.4],
    "e": [0.005, 0.001, -0.004], "f": [0.3, 0.2, 0.1],
}  # fmt: skip
T9 = 2.262157  # two-sided 95 %, nine degrees of freedom


def make_rows(**change: Any) -> pd.DataFrame:
    rows: list[dict[str, object]] = []
    for model, gain in GAINS.items():
        for alpha, value in ((0.0, 0.0), (0.5, gain), (1.0, -0.3)):
            rows.append({
                "study": "interpolation", "model": model, "dataset": "far", "ood": True, "alpha": alpha,
                "samples": 1000, "accuracy": 0.5 + value, "gain": value, "gain_se": 0.001 * (alpha > 0),
                "loss": 1.0 - value, "rise": -value, "rise_se": 0.001,
            })  # fmt: skip
        for (layer, value), alpha in product(enumerate(SHARPNESS[model]), (0.0, 0.6, 1.0)):
            rows.append({
                "study": "layer-sharpness", "model": model, "dataset": "near", "ood": False,
                "layer": f"layer {layer}", "alpha": alpha, "rho": 0.5, "on": "finetuned",
                "estimator": "plain", "noise": "normal", "adaptive": True, "normalized": False, "seed": 0,
                "draws": 10 if alpha else 0, "samples": 100, "sharpness": alpha * value,
                "sharpness_se": 0.001 * (alpha > 0), "loss": 1.0 + alpha * value, "accuracy": 0.5, **change,
            })  # fmt: skip
    return studies.frame(rows)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return claim(make_rows())


def test_flat_layers_by_hand(table: pd.DataFrame) -> None:
    ends = table[table["at"] == "finetuned"].set_index("model")
    # |S| + 2.26 * 0.001 < margin
    for margin, counts in ((0.01, [0, 0, 1, 1, 3, 0]), (0.02, [0, 1, 1, 2, 3, 0]), (0.1, [0, 1, 1, 2, 3, 0])):
        own = ends[(ends["unit"] == "nats") & (ends["margin"] == margin)]
        assert own.loc[list(GAINS), "flat"].tolist() == counts
    brute = [
        [sum(abs(s) + T9 * 0.001 < share * sum(values) for s in values) for values in SHARPNESS.values()]
        for share in (0.003, 0.01)
    ]
    for share, counts in zip((0.003, 0.01), brute, strict=True):
        own = ends[(ends["unit"] == "share") & (ends["margin"] == share)]
        assert own.loc[list(GAINS), "flat"].tolist() == counts
    one = ends.loc["e"].iloc[0]
    assert (one["smallest"], one["smallest_layer"], one["layers"]) == (-0.004, "layer 2", 3)
    assert one["total"] == pytest.approx(0.002) and one["mode"] == "failure"
    assert list(ends["mode"].unique()) == ["high gain", "failure"]


def test_alpha_star_is_the_nearest_measured_or_zero_by_definition(table: pd.DataFrame) -> None:
    best = table[(table["at"] == "best") & (table["margin"] == 0.02)].set_index("model")
    assert best["best_alpha"].to_dict() == {m: 0.5 if g > 0 else 0.0 for m, g in GAINS.items()}
    assert best["alpha"].to_dict() == {m: 0.6 if g > 0 else 0.0 for m, g in GAINS.items()}
    trivial = best[best["by_definition"]]
    assert (
        list(trivial.index) == ["d", "e"] and (trivial["flat"] == 3).all() and (trivial["total"] == 0).all()
    )
    tests = claim_tests(table)
    here = tests[(tests["at"] == "best") & (tests["outcome"] == "failure")]
    assert (here["defined"] == 2).all() and here["p"].isna().all()  # no model that fails is left
    # The same where alpha = 0 was not measured.
    rows = make_rows()
    fewer = claim(rows[(rows["study"] == "interpolation") | (rows["alpha"] > 0)])
    pd.testing.assert_frame_equal(fewer, table)
    # Where the interpolated weights are perturbed, alpha = 0 is measured, and nothing is known without.
    there = claim(make_rows(on="interpolated"))
    assert not there["by_definition"].any()
    rows = make_rows(on="interpolated")
    rows = rows[(rows["study"] == "interpolation") | (rows["alpha"] > 0)]
    assert set(claim(rows).query("at == 'best'")["model"]) == set("abcf")


def test_failure_against_gain_by_every_order(table: pd.DataFrame) -> None:
    """Two of six models fail: 15 ways to choose two, by the sizes of tau with each margin."""
    tests = claim_tests(table)
    tests = tests[(tests["at"] == "finetuned") & (tests["outcome"] == "failure")]
    assert len(tests) == 7 and tests["measure"].value_counts()["flat layers"] == 6
    fails = [float(gain < 0) for gain in GAINS.values()]
    ends = table[(table["at"] == "finetuned") & (table["unit"] == "nats")]
    measures = [ends.loc[ends["margin"] == m, "flat"].to_numpy(dtype=float)
                for m in (0.01, 0.02, 0.04, 0.1)]  # fmt: skip
    row = tests[(tests["unit"] == "nats") & (tests["margin"] == 0.02)].iloc[0]
    counts = measures[1]
    assert (row["models"], row["failing"], row["mean_failing"], row["mean_gaining"]) == (6, 2, 2.5, 0.5)
    assert row["kendall"] == pytest.approx(kendalltau(counts, fails).statistic)
    orders = [kendalltau(counts, order).statistic for order in set(permutations(fails))]
    assert len(orders) == 15
    assert row["p"] == pytest.approx(np.mean(np.abs(orders) >= abs(row["kendall"]) - 1e-9))
    assert row["p"] <= row["p_max"] and row["tests"] == 6  # no layer is within 0.3 % of a sum
    gains = claim_tests(table).query("at == 'finetuned' and outcome == 'gain' and unit == 'nats'")
    clipped = [max(0.0, gain) for gain in GAINS.values()]
    for measure, tau in zip(measures, gains["kendall"], strict=True):
        assert tau == pytest.approx(kendalltau(measure, clipped).statistic)


def test_saturated_layers_and_undecided_models(table: pd.DataFrame) -> None:
    rows = make_rows()
    chance = (rows["layer"] == "layer 0") & (rows["model"] == "a") & (rows["alpha"] == 1)
    rows.loc[chance, "saturated"] = True
    found = claim(rows)
    assert found.groupby(["model", "at"])["saturated"].max().to_dict()["a", "finetuned"] == 1
    tests = claim_tests(found)
    here = tests[tests["at"] == "finetuned"].groupby("unit", dropna=False)["p"]
    assert here.apply(lambda own: own.isna().all()).to_dict()["share"]
    assert not tests.loc[(tests["at"] == "finetuned") & (tests["unit"] == "nats"), "p"].isna().any()
    undecided = claim_tests(table.assign(mode=table["mode"].where(table["model"] != "a", "undecided")))
    row = undecided[(undecided["at"] == "finetuned") & (undecided["margin"] == 0.02)]
    assert row.set_index("outcome")["models"].to_dict() == {"failure": 5, "gain": 6}


def test_it_is_said(tmp_path: Path) -> None:
    facts = Facts(make_rows(), measured=["interpolation", "layer-sharpness", "claim"])
    study = Claim()
    assert study.done(facts)
    texts = [one.text for one in study.findings(facts)]
    said(
        texts[0],
        "far",
        "near",
        "2 models that failed had on average 2.5",
        "4 models that gained 0.5",
        "0.02 nats",
    )
    assert len(texts) == 1
    printed = "\n".join(study.say(facts))
    assert "3 at 0" in printed and "-0.004" in printed
    drawn = figures.claim(facts.claim, tmp_path / "claim.png")
    left, right = drawn.axes
    lines = {line.get_label(): line for line in left.lines}
    assert lines["d"].get_ydata().tolist() == [1, 2, 2, 2] and lines["d"].get_linestyle() == "--"
    assert {line.get_label(): line.get_xdata()[0] for line in right.lines}["a"] == pytest.approx(6)
    section = study.section(facts)
    (shown,) = section.tables
    assert len(shown.rows) == len(facts.claim_tests)
    merged = study.table(facts)
    assert len(merged) == len(facts.claim)
    row = merged.query("model == 'a' and at == 'finetuned' and margin == 0.02").iloc[0]
    test = facts.claim_tests.query("at == 'finetuned' and margin == 0.02 and outcome == 'failure'").iloc[0]
    assert (row["kendall_failure"], row["p_max_failure"]) == (test["kendall"], test["p_max"])


def test_what_is_missing_is_said() -> None:
    rows = make_rows()
    said("\n".join(Claim().say_missing(Facts(rows[rows["model"].isin(["a", "b"])]))), "3")
    said("\n".join(Claim().say_missing(Facts(rows.assign(ood=False)))))
    assert Claim().say_missing(Facts(rows)) == []  # of an earlier version
    part = rows[(rows["study"] == "interpolation") | ~rows["model"].isin(["a", "e"])]
    printed = " ".join(words.lines(Facts(part)))
    said(printed[printed.index("Without") : printed.index("far,")], "a, e")
    alone = rows[(rows["study"] == "interpolation") | rows["model"].isin(["a", "b"])]
    (first, *_) = [one.text for one in words.findings(Facts(alone))]
    said(first, "0 models failed", "2 gained")
    layers = rows["study"] == "layer-sharpness"
    with refused(ValueError, "layer-sharpness"):
        claim(rows[~layers])
    with refused(ValueError, "interpolation"):
        claim(rows.assign(ood=False))
    with refused(ValueError, "near", "alpha = 1", "0.6"):
        claim(rows[~layers | (rows["alpha"] < 1)])
    with refused(ValueError, "c", "1 of 9", "layer 1", "alpha=0.6"):
        claim(
            rows[~(layers & (rows["model"] == "c") & (rows["layer"] == "layer 1") & (rows["alpha"] == 0.6))]
        )
    with refused(ValueError, "0"):
        claim(rows, 0.0)
    assert math.isnan(claim_tests(claim(alone))["p"].max())
    with refused(ValueError):
        figures.claim(pd.DataFrame(), "no.png")
