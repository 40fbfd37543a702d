"""The values that two runs have in common, and their differences, paired over images where possible."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from .. import catalogue
from ..catalogue.coefficients import SEARCHED, Search, Tables
from ..config.recorded import tree_of
from ..settings import Along
from ..studies.coefficients import STUDY as COEFFICIENTS
from ..studies.rows import asked
from .runs import RunRead

KEYS = (
    "study model dataset partners layer others cumulative alpha rho on noise adaptive keep method criterion "
    "coefficients control estimator noise_batch normalized seed"
).split()
"""Columns that identify a measurement of a run."""
_MANY = 1e9  # degrees of freedom with which Student's t is the normal distribution

Config = dict[str, Any]
Errors = dict[tuple[str, str], tuple[float, int]]
"""Place of a value and its kind -> standard error of its difference, and number of images."""


def matched(first: pd.DataFrame, second: pd.DataFrame, pairs: Errors | None = None) -> pd.DataFrame:
    """Match the values that two runs have in common, and test whether they differ.

    Args:
        first: rows of run A.
        second: rows of run B.
        pairs: errors of differences that are paired over images (:func:`paired`); all others are as of
            independent measurements.

    Returns:
        One row per value, with columns that identify it and

        - ``value``: "accuracy", "loss" or "sharpness";
        - ``a``, ``b``, ``a_se``, ``b_se``, ``n_a``, ``n_b``: the values, their standard errors, and images;
        - ``difference``: b - a, and ``half``, the half-width of its 95 % interval by Student's t;
        - ``paired``: whether the interval is of differences image by image;
        - ``apart``: whether the interval excludes 0; ``corrected``: the same with Bonferroni's correction;
        - ``known``: whether the difference has a standard error.
    """
    sides = [_long(rows) for rows in (first, second)]
    both = sides[0].merge(sides[1], on=["place", "value"], suffixes=("", "_b"))
    both = both.rename(
        columns={
            "x": "a",
            "x_b": "b",
            "se": "a_se",
            "se_b": "b_se",
            "samples": "n_a",
            "samples_b": "n_b",
            "count": "count_a",
        }
    )
    difference = both["b"] - both["a"]
    error, freedom = np.hypot(both["a_se"], both["b_se"]), _freedom(both)
    found = [(pairs or {}).get(key) for key in zip(both["place"], both["value"], strict=True)]
    joined = np.array([each is not None for each in found], dtype=bool)
    error = error.mask(joined, [np.nan if each is None else each[0] for each in found])
    freedom = freedom.mask(joined, [np.nan if each is None else each[1] - 1 for each in found])
    known = error.notna()
    half = stdtrit(freedom, 0.975) * error
    bound = stdtrit(freedom, 1 - 0.025 / max(int(known.sum()), 1))
    # Without a standard error there is no test, unless one side is not finite.
    one_sided = np.isfinite(both["a"]) != np.isfinite(both["b"])
    return both.assign(
        difference=difference,
        half=half,
        known=known,
        paired=joined,
        apart=(difference.abs() > half) | one_sided,
        corrected=(difference.abs() > bound * error) | one_sided,
    )


def _count(rows: pd.DataFrame) -> pd.Series:
    """Return one more than the degrees of freedom of each standard error: of images, or of draws."""
    pairs = rows["estimator"].str.startswith("antithetic").fillna(False)
    draws = rows["draws"].astype(float) / np.where(pairs, 2, 1)
    draws = (rows["sharpness_df"] + 1).fillna(draws)
    return draws.where(rows["estimator"].notna(), rows["samples"].astype(float))


def _freedom(both: pd.DataFrame) -> pd.Series:
    """Degrees of freedom of the differences (Welch and Satterthwaite); many without an error."""
    parts = [(both[f"{side}_se"] ** 2, both[f"count_{side}"] - 1) for side in "ab"]
    spread = sum((variance**2 / freedom).where(freedom > 0, 0) for variance, freedom in parts)
    freedom = sum(variance for variance, _ in parts) ** 2 / spread
    return freedom.where(np.isfinite(freedom), _MANY)


def _long(rows: pd.DataFrame) -> pd.DataFrame:
    """Reshape to one row per value, with ``place``, all of its keys as one text."""
    rows, place = _placed(rows)
    parts = []
    for value in ("accuracy", "loss", "sharpness"):
        # Rows with an estimator are of a sharpness; their mean accuracy and loss are not compared.
        part = rows[rows[value].notna() & ((value == "sharpness") == rows["estimator"].notna())]
        parts.append(
            part[[*KEYS, "samples"]].assign(
                place=place[part.index], value=value,
                x=part[value].astype(float), se=part[f"{value}_se"].astype(float),
                count=_count(part),
            )
        )  # fmt: skip
    return pd.concat(parts).drop_duplicates(["place", "value"])


def _placed(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """Return rows whose keys can be compared between runs, and all keys of each as one text."""
    # The zero-shot measurement is the same for all models, and seeds identify only masks and controls.
    shared = (rows["study"] == "interpolation") & (rows["alpha"] == 0)
    rows = rows.assign(
        alpha=rows["alpha"].round(9),
        model=rows["model"].mask(shared, "zero-shot"),
        seed=rows["seed"].where(rows["method"].notna() | rows["coefficients"].notna()),
        estimator=asked(rows),
    )
    return rows, rows[KEYS].astype("string").fillna("").agg("\x1f".join, axis=1)


def paired(first: RunRead, second: RunRead) -> Errors:
    """Return the standard errors of the differences that can be paired.

    They are those of which both runs have results of single images, of the same images in the same order: the
    hash of images and labels is the same, and so is the seed that draws some of them.
    """
    found: Errors = {}
    keeping = {study.name for study in catalogue.studies() if study.keeps_images}
    keys = ["study", "model", "dataset"]
    ours, theirs = (
        {*map(tuple, run.facts.rows[keys].drop_duplicates().to_numpy())} for run in (first, second)
    )
    for study, model, dataset in sorted(ours & theirs):
        if study not in keeping or not _same_images(first.config, second.config, dataset):
            continue
        a, b = (
            None if run.facts.images is None else run.facts.images.of(study, model, dataset)
            for run in (first, second)
        )
        if a is None or b is None or a.hits.shape[1] != b.hits.shape[1]:
            continue
        count = a.hits.shape[1]
        if count < 2 or (
            count < _scored(first.config, dataset) and _seed(first.config) != _seed(second.config)
        ):
            continue
        rows = {place: row for row, place in enumerate(_placed(b.rows)[1])}
        for row, place in enumerate(_placed(a.rows)[1]):
            if place in rows:
                for value, x, y in (("accuracy", a.hits, b.hits), ("loss", a.losses, b.losses)):
                    with np.errstate(invalid="ignore"):  # infinite losses have no error
                        change = y[rows[place]].astype(np.float64) - x[row].astype(np.float64)
                        found[place, value] = float(change.std(ddof=1) / math.sqrt(count)), count
    return found


def other_tables(first: RunRead, second: RunRead) -> set[tuple[str, str]]:
    """Return (model, table of coefficients) of tables with one name in both runs, but other coefficients."""
    sides = []
    for run in (first, second):
        rows = run.facts.part(COEFFICIENTS)[["model", "coefficients"]].dropna().drop_duplicates()
        files = {f"table {name}": dict(entries) for name, entries in tree_of(run.config).of(Tables).tables}
        search = run.facts.part(Search.name)
        sides.append(
            {
                (model, name): files[name] if name in files else _found(search, model)
                for model, name in rows.itertuples(index=False, name=None)
                if name in files or name == SEARCHED
            }
        )
    return {key for key in sides[0].keys() & sides[1].keys() if sides[0][key] != sides[1][key]}


def _found(search: pd.DataFrame, model: str) -> dict[str, str]:
    """Return the coefficient of each layer that a search has chosen."""
    own = search[search["model"] == model]
    return dict(zip(own["layer"], own["coefficients"], strict=True))


def without(rows: pd.DataFrame, tables: set[tuple[str, str]]) -> pd.DataFrame:
    """Return the rows without those of some (model, table of coefficients)."""
    if not tables:
        return rows
    keys = zip(rows["model"], rows["coefficients"], strict=True)
    other = np.array([key in tables for key in keys])
    return rows[~(other & (rows["study"] == COEFFICIENTS))]


def _same_images(first: Config, second: Config, dataset: str) -> bool:
    hashes = [
        [value for key, value in config["data"].get(dataset, {}).items() if key.startswith("sha256")]
        for config in (first, second)
    ]
    return bool(hashes[0]) and hashes[0] == hashes[1]


def _scored(config: Config, dataset: str) -> int:
    return int(config["data"][dataset].get("samples") or 0)


def _seed(config: Config) -> object:
    return tree_of(config).of(Along).seed
