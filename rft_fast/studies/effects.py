"""Tables of coefficients against the plain path, and held layers against their controls."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .bands import best
from .coefficients import STUDY
from .images import Images, check_images
from .rows import of_study
from .verdicts import Sign, half_width, sign, two_way_error

DRAWS = 3
"""Fewest different draws of a control that allow an interval."""

_CURVE = ["coefficients", "seed"]
_KEY = [*_CURVE, "alpha"]
_PLAIN = ("", -1)

Key = tuple[Hashable, ...]
"""Name of a table ("" for the plain path), seed of a control (-1 without one) and alpha."""

Array = NDArray[np.float64]


class _Scored:
    """Accuracies of one model on one data set by position, and hits of its images where they are known."""

    def __init__(self, rows: pd.DataFrame, images: Images | None) -> None:
        first = rows.iloc[0]
        kept = None if images is None else images.of(STUDY, str(first["model"]), str(first["dataset"]))
        self.samples = int(first["samples"])
        self._accuracy = dict(zip(_keys(rows), rows["accuracy"].astype(float), strict=True))
        self._hits = {} if kept is None else dict(zip(_keys(kept.rows), kept.hits, strict=True))

    def difference(self, ours: Key, theirs: Key) -> float:
        return float(self._accuracy[ours] - self._accuracy[theirs])

    def paired(self, pairs: Sequence[tuple[Key, Key]]) -> Array | None:
        """Return the differences image by image, [pairs, images]; None: not known."""
        if any(key not in self._hits for pair in pairs for key in pair):
            return None
        return np.stack([self._hits[one].astype(np.float64) - self._hits[other] for one, other in pairs])

    def error(self, ours: Key, theirs: Key) -> float:
        """Return the standard error of a difference, paired over images."""
        each = self.paired([(ours, theirs)])
        if each is None or each.shape[1] < 2:
            return math.nan
        return float(each[0].std(ddof=1)) / math.sqrt(each.shape[1])


def _known(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.fillna({"coefficients": "", "seed": -1, "control": False, "ood": False})


def _keys(rows: pd.DataFrame) -> list[Key]:
    return [*_known(rows)[_KEY].itertuples(index=False, name=None)]


def coefficient_effects(rows: pd.DataFrame, images: Images | None = None) -> pd.DataFrame:
    """Compare each table with the plain path, and held layers with their controls, out of distribution.

    Each side is at its own alpha of highest mean accuracy over the data sets in distribution (ID), the
    smallest of equal ones: accuracy out of distribution chooses neither. A second comparison is with all
    positions of the plain path whose ID accuracy is not shown to differ from the table's.

    Args:
        rows: rows of :func:`coefficients`; rows of other studies are ignored.
        images: results of single images of these rows; None: there are none, and no intervals.

    Returns:
        One row per (model, data set out of distribution, coefficients, control):

        - ``samples``; ``layers`` (held; of the first draw), ``draws`` of different layers (1 without any);
        - ``alpha``, ``near``: of the table, the best alpha and the mean ID accuracy there (of a control:
          the alpha of the first draw, and the mean accuracy over draws);
          ``plain_alpha``, ``plain_near``: of the plain path;
        - ``near_low``, ``near_high``: pointwise 95 % interval of the difference of these two accuracies,
          paired over images, and ``near_verdict``, its :func:`.verdicts.sign`; missing for controls;
        - ``difference`` in accuracy, mean over draws, with ``difference_se`` and the 95 % interval
          ``difference_low``, ``difference_high`` by Student's t, Bonferroni-corrected for all tables that are
          no control; ``verdict``: its sign. Paired over images. The error of a control counts images and
          draws (:func:`.verdicts.two_way_error`), and is missing with fewer than :data:`DRAWS` draws;
        - ``matched``: number of positions of the plain path at the same ID accuracy: the paired 95 %
          interval of the difference to the table's contains 0. ``matched_least`` and ``matched_most``: the
          smallest and the largest of the differences to these; ``matched_verdict``: "above" ("below") only if
          the corrected interval of each is; missing for controls;
        - ``beyond``: accuracy of held layers minus the mean over the draws of their control, each at its own
          best alpha; ``control_draws``; ``beyond_low``, ``beyond_high``: 95 % interval, whose error counts
          images and draws, with one degree of freedom less than there are draws, Bonferroni-corrected for all
          such comparisons; ``beyond_verdict``. Missing with fewer than :data:`DRAWS` draws.

    Raises:
        TypeError: ``rows`` is not a table of rows, or ``images`` is not what gives results.
        ValueError: there are no rows of the study, or none in distribution.
    """
    check_images(images, "coefficient_effects")
    rows = _known(of_study(rows, STUDY, "coefficient_effects"))
    far = rows["ood"].astype(bool)
    if far.all():
        raise ValueError("coefficient_effects: alpha is chosen in distribution, but there are no such rows")
    case, control = ["model", "dataset", "coefficients"], rows["control"].astype(bool)
    judged = rows[far & ~control & (rows["coefficients"] != "")]
    different = rows[far & control].groupby(case)["layer"].nunique()
    tests = max(len(judged[case].drop_duplicates()), 1), max(int((different >= DRAWS).sum()), 1)
    found = [fact for _, own in rows.groupby("model", sort=False) for fact in _of_model(own, images, tests)]
    return pd.DataFrame(found, columns=[*found[0]] if found else [*case, "control"])


def _of_model(own: pd.DataFrame, images: Images | None, tests: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Yield the comparisons of one model; ``tests``: their number with the plain path, and with controls."""
    far = own["ood"].astype(bool)
    near = own[~far].groupby(_KEY)["accuracy"].mean()
    chosen: dict[Key, Key] = {key: curve.index[best(curve)] for key, curve in near.groupby(level=_CURVE)}
    inside = [_Scored(part, images) for _, part in own[~far].groupby("dataset", sort=False)]
    plain = chosen[_PLAIN]
    for _, here in own[far].groupby("dataset", sort=False):
        scored = _Scored(here, images)
        tables = here[here["coefficients"] != ""].groupby(["coefficients", "control"], sort=False)
        for (name, control), curves in tables:
            curves = curves.drop_duplicates("layer")  # draws of the same layers are one draw
            ours = [chosen[name, seed] for seed in curves["seed"]]
            first = curves.iloc[0]
            fact = {key: first[key] for key in ("model", "dataset", "samples", "coefficients")}
            fact |= {"control": bool(control)}
            fact |= {"layers": [] if pd.isna(first["layer"]) else first["layer"].split(", ")}
            fact |= {"draws": len(ours), "alpha": ours[0][-1], "near": near[ours].mean()}
            fact |= {"plain_alpha": plain[-1], "plain_near": near[plain]}
            low, high = (math.nan, math.nan) if control else _interval_near(inside, ours[0], plain)
            fact |= {"near_low": low, "near_high": high, "near_verdict": sign(low, high)}
            fact |= _difference(scored, [(key, plain) for key in ours], bool(control), tests[0])
            positions = [] if control else [key for key in near.index if key[:2] == _PLAIN]
            fact |= _matched(scored, inside, ours[0], positions, tests[0])
            drawn = here[(here["coefficients"] == name) & here["control"].astype(bool) & (not control)]
            drawn = drawn.drop_duplicates("layer")
            controls = [(ours[0], chosen[name, seed]) for seed in drawn["seed"]]
            fact |= {"control_draws": len(controls)}
            yield fact | _difference(scored, controls, True, tests[1], "beyond")


def _interval_near(inside: Sequence[_Scored], ours: Key, theirs: Key) -> tuple[float, float]:
    """Return the 95 % interval of the difference in mean accuracy over the data sets in distribution."""
    value = float(np.mean([each.difference(ours, theirs) for each in inside]))
    errors = [each.error(ours, theirs) for each in inside]
    error = math.sqrt(sum(each**2 for each in errors)) / len(errors)  # their images are different ones
    # Positions that agree on every image have the same accuracy on these: error and width are 0.
    half = half_width(error, min(each.samples for each in inside) - 1) if error else 0.0
    return value - half, value + half


def _difference(
    scored: _Scored, pairs: Sequence[tuple[Key, Key]], drawn: bool, tests: int, name: str = "difference"
) -> dict[str, Any]:
    """Return the mean difference of pairs with its interval; ``drawn``: they are a sample, as images are."""
    value = float(np.mean([scored.difference(*pair) for pair in pairs])) if pairs else math.nan
    error, freedom = math.nan, len(pairs) - 1
    if not drawn:
        error, freedom = scored.error(*pairs[0]), scored.samples - 1
    elif len(pairs) >= DRAWS and (each := scored.paired(pairs)) is not None:
        error = two_way_error(each)
    half = half_width(error, freedom, tests)
    low, high = value - half, value + half
    return {name: value, f"{name}_se": error, f"{name}_low": low, f"{name}_high": high} | {
        "verdict" if name == "difference" else f"{name}_verdict": sign(low, high)
    }


def _matched(
    scored: _Scored, inside: Sequence[_Scored], ours: Key, positions: Sequence[Key], tests: int
) -> dict[str, Any]:
    """Compare a table with all positions of the plain path whose ID accuracy is not shown to differ."""
    near = {key: _interval_near(inside, ours, key) for key in positions}
    same = [key for key, (low, high) in near.items() if low <= 0 <= high]  # false without an interval
    verdicts, values = set[Sign](), [scored.difference(ours, key) for key in same]
    for key, value in zip(same, values, strict=True):
        half = half_width(scored.error(ours, key), scored.samples - 1, tests)
        verdicts.add(sign(value - half, value + half))
    # The same verdict at all positions, or none.
    verdict: Sign = "unknown" if verdicts <= {"unknown"} else "unclear"
    if len(verdicts) == 1:
        (verdict,) = verdicts
    least, most = (min(values), max(values)) if values else (math.nan, math.nan)
    found = {"matched": len(same), "matched_least": least, "matched_most": most}
    return found | {"matched_verdict": verdict}
