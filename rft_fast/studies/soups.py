"""Soups of fine-tuned models as points of the tables: uniform, greedy, Model Stock, and the paths to them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

import pandas as pd

from ..common.words import some
from .gains import STUDY as PATH
from .images import Kept
from .interpolate import along, check_alphas, check_evaluator, together
from .others import Others, State, end
from .rows import Measured, Row, Sink, scored

if TYPE_CHECKING:
    from ..evaluate import Evaluator, Scores
    from ..path import Path

STUDY, SEARCH = "soups", "greedy"
UNIFORM, GREEDY, STOCK = "uniform", "greedy", "model-stock"
KEPT, LEFT_OUT = "kept", "left out"


def greedy_search(
    path: Path,
    evaluator: Evaluator,
    others: Others | Mapping[str, State],
    accuracy: Mapping[str, float],
    *,
    model: str = "",
    only: Collection[int] | None = None,
    sink: Sink | None = None,
) -> pd.DataFrame:
    """Choose the models of a greedy soup (Wortsman et al. 2022, Recipe 1) on some data sets.

    In the order of their accuracies, each model is kept if the mean of it and those kept before is at least
    as accurate as the mean without it; accuracy is the mean over the data sets. The soup is fitted to these
    images: judge it on others. In memory are four states beside the ends of ``path`` and the live model,
    which is restored bit for bit.

    Args:
        path: a path of the live model.
        evaluator: scores the live model on the data sets that decide.
        others: name -> state dict of a model.
        accuracy: name of each model to choose from -> its accuracy there; of equal ones the first comes
            first.
        model: name of the model whose rows these are.
        only, sink: as for :func:`rft_fast.studies.interpolation`; the search is one measurement.

    Returns:
        For each model but the best one, in the order in which they are tried, one row per data set, with the
        columns of :data:`rft_fast.studies.COLUMNS`: ``partners`` is the model, the scores are those of the
        soup with it, and ``method`` says whether it is kept.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: fewer than two models, an unknown one, or one that does not fit the live model.
    """
    check_evaluator(path, evaluator, SEARCH)
    known = _known(others, list(accuracy), SEARCH)
    record = Measured(SEARCH, 1, only, sink)
    if not record.wants(0):
        return record.frame()
    rows: list[Row] = []

    def measure(tried: str, state: State) -> float:
        start = perf_counter()
        with known.between(path, end(path, 0), state) as own, own.at(1.0):
            parts = [evaluator.among(group).scores() for group in together(evaluator)]
        scores = {name: score for part in parts for name, score in part.items()}
        for name in scores:
            row = scored(SEARCH, evaluator, name, scores, perf_counter() - start)
            rows.append(row | {"model": model, "partners": tried, "alpha": 1.0, "rho": 0.0, "keep": 1.0})
        return mean_accuracy([score.accuracy for score in scores.values()])

    kept = known.search(list(accuracy), accuracy, measure)
    record.add(0, [row | {"method": KEPT if row["partners"] in kept else LEFT_OUT} for row in rows])
    return record.frame()


def soups(
    path: Path,
    evaluator: Evaluator,
    alphas: Iterable[float],
    others: Others | Mapping[str, State],
    members: Mapping[str, Sequence[str]],
    *,
    model: str = "",
    zeroshot: MutableMapping[str, Scores] | None = None,
    only: Collection[int] | None = None,
    sink: Sink | None = None,
    images: Kept | None = None,
) -> pd.DataFrame:
    """Measure the paths from zero-shot to soups of models, and Model Stock, on every data set.

    At alpha = 1 is the soup itself, with the bits that ``python -m rft_fast.merge`` writes for the same files
    in float32; statistics of BatchNorm are averaged like weights. Models are read one after the other: beside
    the ends of ``path`` and the live model, up to three states are in memory, for Model Stock four. On
    return, and on any error, the live model is restored bit for bit.

    Args:
        path: the live model and its zero-shot end.
        evaluator, alphas, model, zeroshot, sink, images: as for :func:`rft_fast.studies.interpolation`.
        others: name -> state dict of a model, with the names and shapes of the live model.
        members: name of a soup -> its models, in the order in which they are added. Model Stock is of those
            of the first soup.
        only: numbers of the measurements to make; None: all. For each soup, and then for Model Stock at alpha
            0 and 1, they are numbered as those of :func:`rft_fast.studies.interpolation`.

    Returns:
        One row per (soup, alpha, data set), with the columns of :data:`rft_fast.studies.COLUMNS`. ``method``
        is the soup, ``partners`` are its models. Of Model Stock, ``coefficients`` is t of each tensor that
        moves, as ``name=t``, joined by ", ".

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: as for :func:`rft_fast.studies.interpolation`; no soup, one without models, Model Stock of
            fewer than two, an unknown model, or one that does not fit.

    Warns:
        UserWarning: Model Stock has no result for a tensor, which stays at its zero-shot value.
    """
    grid = check_alphas(alphas)
    check_evaluator(path, evaluator, STUDY)
    if not members or not all(members.values()):
        raise ValueError(f"soups: expected the models of at least one soup, got {dict(members)!r}")
    first = list(next(iter(members.values())))
    known = _known(others, first, STUDY)
    for names in members.values():
        known.check(names, STUDY)
    zeroshot = {} if zeroshot is None else zeroshot
    tasks = [(method, list(names), grid) for method, names in members.items()] + [(STOCK, first, [0.0, 1.0])]
    sets = len(evaluator.datasets)
    record = Measured(STUDY, sum(len(positions) * sets for *_, positions in tasks), only, sink, images)
    at = 0
    for method, names, positions in tasks:
        start, at = at, at + len(positions) * sets
        if not any(map(record.wants, range(start, at))):
            continue
        common = {"study": STUDY, "model": model, "method": method, "partners": ", ".join(names)}
        if method == STOCK:
            state, ratios = known.model_stock(end(path, 0), names)
            common["coefficients"] = ", ".join(f"{name}={t:.6g}" for name, t in ratios.items())
            if lost := [name for name, t in ratios.items() if math.isnan(t)]:
                path.warn(
                    f"soups: Model Stock has no result for {some(lost)}, because the models move there in "
                    "opposite directions; it stays at zero-shot"
                )
        else:
            state = known.mean(names)
        with known.between(path, end(path, 0), state) as own:
            along(record, start, own, evaluator, positions, zeroshot, {}, common)
        del state, own
    return record.frame()


def _known(others: Others | Mapping[str, State], names: Sequence[str], study: str) -> Others:
    known = others if isinstance(others, Others) else Others(others)
    known.check(names, study)
    if len(names) < 2:
        raise ValueError(f"{study}: expected at least two models, got {', '.join(names) or 'none'}")
    return known


def mean_accuracy(values: Sequence[float]) -> float:
    """Return the mean over data sets, each of which counts the same; the same for the same values."""
    return math.fsum(values) / len(values)


def id_accuracies(rows: pd.DataFrame) -> dict[str, float]:
    """Return the mean accuracy in distribution of each fine-tuned model, the best first.

    Args:
        rows: of :func:`rft_fast.studies.interpolation`, at alpha = 1; others are ignored.
    """
    near = (rows["study"] == PATH) & (rows["alpha"] == 1) & ~rows["ood"].fillna(False).astype(bool)
    groups = rows[near].groupby("model", sort=False)["accuracy"]
    found = {str(model): mean_accuracy(own.tolist()) for model, own in groups}
    return dict(sorted(found.items(), key=lambda item: -item[1]))
