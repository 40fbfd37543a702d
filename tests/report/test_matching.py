"""Differences of two runs, paired over images where both scored the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from support.tiny_report import CONFIG

from rft_fast import results
from rft_fast.report import comparison, matching, runs
from rft_fast.studies.images import ImageScores

IMAGES, ALPHAS = 40, (0.0, 0.5, 1.0)
Hits = dict[float, np.ndarray]


def make(folder: Path, rng: np.random.Generator, shared: Hits, images: bool = True, **config: Any) -> Hits:
    """A run of one model; about a tenth of its answers are other than the shared ones."""
    found: Hits = {}
    data = {"near": {**CONFIG["data"]["near"], "samples": IMAGES}}
    with results.Run(folder, {**CONFIG, "measured": ["interpolation"], "data": data, **config}) as run:
        for number, alpha in enumerate(ALPHAS):
            hits = shared[alpha] ^ (rng.random(IMAGES) < 0.1)
            losses = np.where(hits, 0.25, 2.0).astype(np.float16)
            found[alpha] = hits
            scores = ImageScores(hits, losses, None)
            row = {
                "study": "interpolation", "model": "m", "dataset": "near", "ood": False, "alpha": alpha,
                "rho": 0.0, "keep": 1.0, "samples": IMAGES, "accuracy": hits.mean(),
                "accuracy_se": hits.std(ddof=1) / IMAGES**0.5, "loss": losses.astype(float).mean(),
                "loss_se": losses.astype(float).std(ddof=1) / IMAGES**0.5, "gain": 0.0, "gain_se": 0.0,
                "rise": 0.0, "rise_se": 0.0,
            }  # fmt: skip
            run.add("interpolation", "m", number, [row], [scores] if images else [])
    return found


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def shared(rng: np.random.Generator) -> Hits:
    return {alpha: rng.random(IMAGES) < 0.7 for alpha in ALPHAS}


def compared(tmp_path: Path, *names: str) -> Any:
    read = [runs.read(tmp_path / name) for name in names]
    return matching.matched(read[0].facts.rows, read[1].facts.rows, matching.paired(*read))


def test_the_same_images_are_paired(tmp_path: Path, rng: np.random.Generator, shared: Hits) -> None:
    """scipy's paired t interval is the truth."""
    a, b = (make(tmp_path / name, rng, shared) for name in "ab")
    found = compared(tmp_path, "a", "b")
    assert found["paired"].all() and len(found) == 2 * len(ALPHAS)
    for fact in found.to_dict("records"):
        x, y = (hits[fact["alpha"]].astype(float) for hits in (a, b))
        if fact["value"] == "loss":
            x, y = (np.where(hits, 0.25, 2.0) for hits in (x, y))
        expected = stats.ttest_rel(y, x).confidence_interval(0.95)
        low, high = fact["difference"] - fact["half"], fact["difference"] + fact["half"]
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    apart = matching.matched(*(runs.read(tmp_path / name).facts.rows for name in "ab"))
    assert not apart["paired"].any() and (found["half"] < apart["half"]).all()  # as of independent images


@pytest.mark.parametrize("why", ["other images", "not kept", "no hash"])
def test_others_are_not_paired(tmp_path: Path, rng: np.random.Generator, shared: Hits, why: str) -> None:
    make(tmp_path / "a", rng, shared)
    near = {**CONFIG["data"]["near"], "samples": IMAGES}
    if why == "other images":
        near["sha256 of scored images"] = "e" * 64
    elif why == "no hash":
        del near["sha256 of scored images"]
    make(tmp_path / "b", rng, shared, images=why != "not kept", data={"near": near})
    found = compared(tmp_path, "a", "b")
    assert not found["paired"].any() and found["known"].all()
    both = [runs.read(tmp_path / name) for name in "ab"]
    page = comparison.compare(*both)
    assert any("No difference is paired" in text for text in page["findings"])
    verdicts = {row[8].text for part in page["parts"] for table in part.tables for row in table.rows[:99]
                if part.name == "measurements"}  # fmt: skip
    assert verdicts == {"independent"}


def test_a_run_paired_with_itself_does_not_differ(
    tmp_path: Path, rng: np.random.Generator, shared: Hits
) -> None:
    make(tmp_path / "a", rng, shared)
    found = compared(tmp_path, "a", "a")
    assert found["paired"].all() and not found["apart"].any() and (found["half"] == 0).all()


def test_part_of_the_images_is_paired_only_if_drawn_alike(
    tmp_path: Path, rng: np.random.Generator, shared: Hits
) -> None:
    data = {"near": {**CONFIG["data"]["near"], "samples": 2 * IMAGES}}  # of which the rows have half
    settings = [{**CONFIG["settings"], "along": {"alphas": list(ALPHAS), "seed": seed}} for seed in (0, 0, 1)]
    for name, own in zip("abc", settings, strict=True):
        make(tmp_path / name, rng, shared, data=data, settings=own)
    assert compared(tmp_path, "a", "b")["paired"].all()
    assert not compared(tmp_path, "a", "c")["paired"].any()


def with_tables(folder: Path, half: float, found: str) -> None:
    """A run with two tables from files and a search, of which it knows the coefficients."""
    tables = [["half", [[None, 1.0], ["visual.conv1", half]]], ["same", [["a", 0.5], [None, 1.0]]]]
    if half != 0.5:
        tables = [
            [name, entries[::-1]] for name, entries in tables
        ]  # in another order, which is no difference
    base = {"model": "m", "dataset": "near", "ood": False, "rho": 0.0, "keep": 1.0, "samples": IMAGES}
    base |= {"accuracy": 0.7, "accuracy_se": 0.05, "loss": 1.0, "loss_se": 0.1}
    settings = {**CONFIG["settings"], "coefficients": {"tables": tables, "search": "near"}}
    measured = ["interpolation", "search", "coefficients"]
    with results.Run(folder, {**CONFIG, "measured": measured, "settings": settings}) as run:
        for number, alpha in enumerate(ALPHAS):
            run.add("interpolation", "m", number, [base | {"study": "interpolation", "alpha": alpha}])
            names = [None, "table half", "table same", "LiNeS, slope 1", "greedy search"]
            row = base | {"study": "coefficients", "alpha": alpha}
            run.add("coefficients", "m", number, [row | {"coefficients": name} for name in names])
        row = base | {"study": "search", "alpha": 1.0, "layer": "a", "coefficients": found}
        run.add("search", "m", 0, [row])


@pytest.mark.parametrize(("half", "found"), [(0.5, "0"), (0.25, "0"), (0.5, "0.75"), (0.25, "0.75")])
def test_other_tables_of_one_name_are_not_compared(tmp_path: Path, half: float, found: str) -> None:
    with_tables(tmp_path / "a", 0.5, "0")
    with_tables(tmp_path / "b", half, found)
    page = comparison.compare(*(runs.read(tmp_path / name) for name in "ab"))
    (part,) = (part for part in page["parts"] if part.name == "measurements")
    text = " ".join(cell.text for table in part.tables for row in table.rows for cell in row)
    named = [note for note in page["notes"] if "coefficients differ" in note]
    others = {"table half": half != 0.5, "greedy search": found != "0"}
    for name, other in others.items():
        assert (name not in text) is other and any(name in note for note in named) is other
    assert "table same" in text and "LiNeS, slope 1" in text
    assert len(named) == any(others.values())
