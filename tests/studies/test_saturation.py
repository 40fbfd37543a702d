"""Which rows are of a model at chance, by figures worked out here."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch
from support.tiny_models import CLASSES, dataset, random_state, staged

from rft_fast import Path, studies
from rft_fast.evaluate import Evaluator
from rft_fast.studies.saturation import flags, saturated

ROW = {"dataset": "d", "estimator": "plain", "draws": 5, "samples": 900, "accuracy": 0.5, "loss": 1.0,
       "sharpness": 0.5}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, False),
        ({"accuracy": 0.119}, True),  # 2 sqrt(.1 * .9 / 900) is .02
        ({"accuracy": 0.121}, False),
        ({"accuracy": 0.081}, True),
        ({"loss": math.log(10) + 0.01}, True),
        ({"loss": math.log(10) - 0.01}, False),
        ({"loss": math.log(10) + 0.01, "sharpness": 0.005}, False),  # the clean loss is no better
        ({"accuracy": 0.1, "draws": 0}, False),  # nothing is perturbed
        ({"accuracy": 0.1, "estimator": "hessian"}, None),
        ({"accuracy": 0.1, "sharpness": None}, None),
        ({"accuracy": 0.0, "samples": 4}, None),  # a model at .55 is as wrong once in 24 times
        ({"accuracy": 0.0, "samples": 4, "loss": 3.0, "sharpness": 2.0}, True),  # the loss decides
        ({"accuracy": 0.0, "samples": 4, "draws": 0}, False),
        ({"accuracy": 0.5, "samples": 4}, False),  # above .1 + 2 sqrt(.1 * .9 / 4) = .4
        ({"accuracy": 0.25, "samples": 12}, None),  # .1 + .173 = .273, and .55 - .287 = .263
        ({"accuracy": 3 / 13, "samples": 13}, True),  # .1 + .166 = .266, and .55 - .276 = .274
    ],
)
def test_a_row(change: dict[str, object], expected: bool | None) -> None:
    row = ROW | change
    assert saturated(row, 10) is expected
    assert saturated(row, None) is None and saturated(row, 1) is None
    found = flags(studies.frame([{**row, "study": "sharpness"}]), {"d": 10})
    assert (None if found.isna().all() else bool(found[0])) is expected


def test_what_rows_say_themselves_counts() -> None:
    rows = studies.frame([{**ROW, "study": "sharpness"}] * 3)
    rows["saturated"] = pd.array([True, False, None], dtype="boolean")
    assert flags(rows, {}).tolist() == [True, False, pd.NA]
    assert flags(rows, {"d": 10}).tolist() == [True, False, False]
    assert flags(rows.drop(columns="saturated"), {"d": 10}).tolist() == [False] * 3


def test_rows_are_flagged_as_they_are_measured() -> None:
    """Among six classes, or the three that a set is scored among; large noise destroys the model."""
    model = staged()
    path = Path(model, random_state(model, 1, 0.1), random_state(model, 2, 0.1))
    sets = [dataset("whole"), dataset("part", labels=torch.arange(37) % 3, classes=torch.arange(3))]
    rows = studies.sharpness(path, Evaluator(model, sets), [0.0, 1.0], [1e-4, 1e3], 2)
    for row in rows.to_dict("records"):
        classes = CLASSES if row["dataset"] == "whole" else 3
        near = abs(row["accuracy"] - 1 / classes) <= 2 * math.sqrt((1 - 1 / classes) / classes / 37)
        lost = row["loss"] >= math.log(classes) > row["loss"] - row["sharpness"]
        assert row["saturated"] == (near or lost)
    layers = studies.layerwise_sharpness(path, Evaluator(model, sets), [0.0, 1.0], [1e3], 2)
    assert not layers.loc[layers["alpha"] == 0, "saturated"].any()  # nothing is perturbed
