"""Soups beside zero-shot, single models and their mean: the points of one table, against the best model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from .bands import FOLDS, best
from .choice import cross_fitted
from .gains import STUDY as PATH
from .gains import hits_in_order
from .images import Images, check_images
from .rows import of_study
from .soups import GREEDY, STOCK, STUDY, UNIFORM
from .verdicts import interval

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Hits = NDArray[np.float64]

ZEROSHOT, BEST_MODEL, MEAN = "zero-shot", "best model", "mean of models"
BY_ID, BEST_ALPHA = "uniform, alpha by ID", "uniform, best alpha"
NAMES = {UNIFORM: "uniform soup", GREEDY: "greedy soup", STOCK: "Model Stock"}


def soup_points(rows: pd.DataFrame, images: Images | None = None) -> pd.DataFrame:
    """Compare soups with the single model of highest accuracy in distribution (ID), on every data set.

    The best model, the greedy soup and *uniform, alpha by ID* are chosen on the ID images, so only data out
    of distribution (OOD) judges them: intervals are of OOD data, of 95 %, paired over images, by Student's t,
    and Bonferroni-corrected for all points and OOD data sets. They do not count that the models are a sample.
    They are missing without results of single images, and where no image differs, which is no certainty.

    Args:
        rows: rows of :func:`soups` and of :func:`rft_fast.studies.interpolation`; others are ignored.
        images: results of single images of these rows; None: there are none.

    Returns:
        One row per (data set, point): zero-shot, the best model, the mean of all models, the uniform soup,
        the greedy soup, Model Stock, and two positions on the path from zero-shot to the uniform soup.

        - ``dataset``, ``ood``, ``point``, ``models`` (names, joined by ", ");
        - ``alpha``: position on the path to the uniform soup, or 1 for a soup itself. Of *uniform, alpha by
          ID* it is that of highest mean ID accuracy, the smallest of equal ones; of *uniform, best alpha*
          that of highest accuracy here;
        - ``alpha_low``, ``alpha_high``: of the best alpha, the smallest and the largest position that is not
          shown to be less accurate (one-sided, paired, corrected for all other positions);
        - ``accuracy``: a fraction; of *uniform, best alpha* cross-fitted: for the images of each of five
          folds, at the best position on the other four;
        - ``difference`` to the best model, with ``difference_se``, ``difference_low``, ``difference_high``;
        - ``samples``.

    Raises:
        TypeError: ``rows`` is not a table of rows, or ``images`` is not what gives results.
        ValueError: there are no rows of the study, not those of every soup, or none of the path of a model.
    """
    check_images(images, "soup_points")
    own = of_study(rows, STUDY, "soup_points").reset_index(drop=True)
    paths = of_study(rows, PATH, "soup_points").reset_index(drop=True)
    model, every = str(own["model"].iloc[0]), list(paths["model"].unique())
    far = own[own["ood"].astype(bool)]["dataset"].nunique()
    near = own[(own["method"] == UNIFORM) & ~own["ood"].astype(bool)].groupby("alpha")["accuracy"].mean()
    by_id = float(near.index[best(near)]) if len(near) else math.nan
    found: list[dict[str, Any]] = []
    for dataset, here in own.groupby("dataset", sort=False):
        ends = {name: paths[(paths["dataset"] == dataset) & (paths["model"] == name)] for name in every}
        if lacking := [name for name in {model, *every} if name not in ends or ends[name].empty]:
            raise ValueError(
                f"soup_points: expected the path of each model, with that of {model!r}, on {dataset!r}; "
                f"missing: {', '.join(sorted(lacking))}"
            )
        whole = here[here["alpha"] == 1]["method"].tolist()
        if lacking := [NAMES[method] for method in NAMES if method not in whole]:
            raise ValueError(
                f"soup_points: the rows on {dataset!r} lack the {', the '.join(lacking)}; finish the run"
            )
        tests = 7 * far if bool(here["ood"].iloc[0]) else 0
        found += _Points(here, ends, images).table(model, by_id, tests)
    return pd.DataFrame(found)


def stock_ratios(rows: pd.DataFrame) -> pd.Series:
    """Return t of Model Stock of each tensor that moves, by its name, in the order of the model.

    Args:
        rows: rows of :func:`soups`; rows of other studies are ignored.
    """
    own = of_study(rows, STUDY, "stock_ratios")
    texts = own.loc[own["method"] == STOCK, "coefficients"].dropna()
    pairs = (
        [entry.rpartition("=") for entry in texts.iloc[0].split(", ")] if len(texts) and texts.iloc[0] else []
    )
    return pd.Series({name: float(t) for name, _, t in pairs}, dtype=float)


class _Points:
    """The points of one data set.

    Args:
        here: rows of the soups.
        ends: name of a model -> rows of its path.
        images: results of single images; None: there are none.
    """

    def __init__(self, here: pd.DataFrame, ends: dict[str, pd.DataFrame], images: Images | None) -> None:
        self._first = here.iloc[0]
        self._rows = {"": here, **ends}
        self._hits = {name: hits_in_order(part, images, "soup_points") for name, part in self._rows.items()}

    def _at(self, name: str, method: str | None, alpha: float) -> tuple[float, Hits | None]:
        """Return the accuracy of a row, and its hits; ``name`` "" for soups."""
        rows, hits = self._rows[name], self._hits[name]
        there = rows["alpha"] == alpha
        if method is not None:
            there &= rows["method"] == method
        (place,) = np.flatnonzero(there.to_numpy())
        return float(rows["accuracy"].iloc[place]), None if hits is None else hits[place]

    def table(self, top: str, by_id: float, tests: int) -> list[dict[str, Any]]:
        """Return a row for each point.

        Args:
            top: name of the best model.
            by_id: position on the path to the uniform soup that ID accuracy chooses; NaN: there is none.
            tests: number of intervals to correct for; 0: none is computed.
        """
        soups = self._rows[""]
        alphas = np.sort(soups.loc[soups["method"] == UNIFORM, "alpha"].to_numpy(dtype=float))
        curve = [self._at("", UNIFORM, alpha) for alpha in alphas]
        accuracy, table = np.array([value for value, _ in curve]), _stacked([hits for _, hits in curve])
        members = {method: str(soups.loc[soups["method"] == method, "partners"].iloc[0]) for method in NAMES}
        single = [self._at(name, None, 1.0) for name in self._rows if name]
        hits = _stacked([hits for _, hits in single])
        mean = float(np.mean([value for value, _ in single])), None if hits is None else hits.mean(axis=0)
        fitted = cross_fitted(table.astype(bool)) if table is not None and table.shape[1] >= FOLDS else None
        fit = float(accuracy.max() if fitted is None else fitted.mean()), fitted
        points: dict[str, tuple[str, float, tuple[float, Hits | None]]] = {
            ZEROSHOT: ("", math.nan, self._at(top, None, 0.0)),
            BEST_MODEL: (top, math.nan, self._at(top, None, 1.0)),
            MEAN: (", ".join(name for name in self._rows if name), math.nan, mean),
            **{NAMES[method]: (names, 1.0, self._at("", method, 1.0)) for method, names in members.items()},
        }
        if not math.isnan(by_id):
            points[BY_ID] = members[UNIFORM], by_id, self._at("", UNIFORM, by_id)
        points[BEST_ALPHA] = members[UNIFORM], float(alphas[best(accuracy)]), fit
        base, baseline = points[BEST_MODEL][2]
        found = []
        for name, (models, alpha, (value, own)) in points.items():
            low, high = _as_good(alphas, accuracy, table) if name == BEST_ALPHA else (math.nan, math.nan)
            each = None if own is None or baseline is None or not tests else np.round(own - baseline, 12)
            found.append(
                {
                    "dataset": str(self._first["dataset"]),
                    "ood": bool(self._first["ood"]),
                    "point": name,
                    "models": models,
                    "alpha": alpha,
                    "alpha_low": low,
                    "alpha_high": high,
                    "accuracy": value,
                    **interval("difference", each, max(tests, 1)),
                    "difference": value - base,
                    "samples": int(self._first["samples"]),
                }
            )
        return found


def _stacked(hits: list[Hits | None]) -> Hits | None:
    """Return hits as [rows, images]; None if some are not known."""
    known = [each for each in hits if each is not None]
    return np.stack(known) if len(known) == len(hits) else None


def _as_good(alphas: Hits, accuracy: Hits, table: Hits | None) -> tuple[float, float]:
    """Return the range of the positions that are not shown to be less accurate than the best one."""
    if table is None or table.shape[1] < 2:
        return math.nan, math.nan
    top = best(accuracy)
    images, worse = table.shape[1], np.zeros(len(alphas), dtype=bool)
    critical = float(stdtrit(images - 1, 1 - 0.05 / max(len(alphas) - 1, 1)))
    for place in range(len(alphas)):
        each = table[top] - table[place]
        error = float(each.std(ddof=1)) / math.sqrt(images)
        worse[place] = error > 0 and each.mean() > critical * error
    return float(alphas[~worse].min()), float(alphas[~worse].max())
