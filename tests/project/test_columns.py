"""Every column of a run's tables is described, truly, and the documentation says the same."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from support import tiny_columns, tiny_report
from support.wording import refused
from torch import nn

from rft_fast import catalogue, results, studies
from rft_fast.datasets import Dataset
from rft_fast.evaluate import Evaluator
from rft_fast.path import Path

pytestmark = pytest.mark.usefixtures("one_thread")
READ: dict[str, Any] = {"float64": float, "Int64": int, "boolean": ["False", "True"].index, "string": str}
# Filled where something is asked for that is not asked for here.
SOMETIMES = {"noise_alike", "noise_batch", "reached", "restarts", "excluded"}


def test_every_column_of_the_rows_is_described() -> None:
    """One that lacks a description is added to rft_fast/studies/columns.py."""
    from rft_fast.studies.columns import ROWS

    assert list(ROWS) == list(results.COLUMNS)
    told = results.describe()
    assert dict(zip(told["name"], told["type"], strict=True)) == results.COLUMNS
    for _, row in told.iterrows():
        READ[row["type"]](row["example"])
        assert row["unit"] and row["meaning"] and set(row["filled_by"].split(", ")) <= set(catalogue.names())


def test_the_studies_fill_what_is_said() -> None:
    draw = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3))
    ends = [
        {name: torch.randn(weight.shape, generator=draw) for name, weight in model.state_dict().items()}
        for _ in "01"
    ]
    images = torch.randint(0, 256, (60, 3, 2, 2), dtype=torch.uint8, generator=draw)
    data = Dataset("d", images, torch.arange(60) % 3, (0.5,) * 3, (0.2,) * 3)
    path, evaluator = Path(model, *ends), Evaluator(model, [data])
    other = {name: (ends[0][name] + 2 * ends[1][name]) / 3 for name in ends[0]}
    measured = {
        "interpolation": studies.interpolation(path, evaluator, [0, 0.5, 1], model="m"),
        "layers": studies.layerwise_interpolation(path, evaluator, [0, 0.5, 1], model="m"),
        "cumulative": studies.cumulative_interpolation(path, evaluator, [0, 0.5, 1], model="m"),
        "sharpness": studies.sharpness(path, evaluator, [0, 1], [0.5], 2, model="m"),
        "layer-sharpness": studies.layerwise_sharpness(path, evaluator, [0, 1], [0.5], 2, model="m"),
        "prune": studies.prune_stragglers(path, evaluator, [0, 1], layers=["1"], seeds=[0], model="m"),
        "coefficients": studies.coefficients(
            path, evaluator, [0, 1], {"t": {"1": 0.5, None: 1}}, {"held": ["1"]}, seeds=[0], model="m"
        ),
        "ensemble": studies.ensemble(path, evaluator, [0, 0.5, 1], model="m"),
        "pairs": studies.pairs(path, evaluator, [0, 0.5, 1], {"n": ends[0]}, model="m"),
        "soups": studies.soups(
            path, evaluator, [0, 0.5, 1], {"m": ends[1], "n": other}, {"uniform": ["m", "n"]}, model="m"
        ),
    }
    told = results.describe().set_index("name")["filled_by"].str.split(", ")
    for study, rows in measured.items():
        filled = {name for name in rows if rows[name].notna().any()}
        said = {name for name, names in told.items() if study in names}
        assert filled <= said and said - filled <= SOMETIMES, study


@pytest.mark.parametrize("name", ["correlation", "claim", "ensemble", "choice", "pairs", "soups"])
def test_every_column_of_the_other_tables_is_described(name: str) -> None:
    rows = list(tiny_report.make_rows())
    path = [row for row in rows if row["study"] == "interpolation"]
    rows += [row | {"study": study, "partners": "good"} for study in ("ensemble", "pairs") for row in path]
    best = [row | {"study": "soups", "partners": "good, bad"} for row in path if row["model"] == "good"]
    rows += [row | {"method": method} for method in ("uniform", "greedy", "model-stock") for row in best]
    facts = tiny_report.make_facts(studies.frame(rows))
    table = catalogue.study(name).table(facts)
    assert table is not None
    told = results.describe(name)
    assert list(table) == told["name"].tolist() and set(told["filled_by"]) == {name}
    assert not pd.isna(told.drop(columns="type")).any(axis=None)
    with refused(ValueError, "rows", "cost", "nothing"):
        results.describe("nothing")


def test_the_documentation_says_the_same() -> None:
    """After a change: python -m support.tiny_columns, in the folder tests."""
    page = tiny_columns.PAGE.read_text("utf-8")
    assert tiny_columns.updated(page) == page and page.count("| `alpha` |") == 5
