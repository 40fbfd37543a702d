"""Figure 3: general sharpness along the path, and out-of-distribution accuracy against it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from ..common.words import many
from ..studies.facts import Facts, as_facts
from ..studies.interpolate import Z95
from ..studies.rows import of_study
from ..studies.sharpness import STUDY
from .captions import SETTING, not_finite, setting, stated, unknown_errors
from .looks import current
from .style import (
    BEATS,
    FAILS,
    SATURATED,
    SATURATED_EXPLAINED,
    Style,
    arrange,
    canvas,
    drawing,
    extra,
    finish,
    fold,
    key,
    level,
    margin,
    palette,
    plain,
    side_by_side,
    swatches,
    wrap,
)

_ZERO: Style = {"ls": "", "marker": "+", "ms": 7, "mew": 1.2, "color": "black"}
_FEW = 3
"""Positions that have a tick each."""
_END: Style = {"ls": "", "marker": "s", "ms": 5}


@drawing
def sharpness(rows: pd.DataFrame | Facts, file: str | os.PathLike[str]) -> Figure:
    """Draw general sharpness over alpha (left) and accuracy against it (right), as in Figure 3.

    There is one row of panels per rho, data set of the sharpness, estimator or other setting, and one colour
    per model. Left: the difference to alpha = 0, paired over draws, where the rows have it; dashed with open
    markers for a failure on every out-of-distribution data set. Right, one panel per out-of-distribution
    data set: dashed for a failure on that set; each point is a model at one alpha, joined in order of alpha,
    with a cross at zero-shot and a square at the fine-tuned end. Bars are pointwise 95 %
    intervals: of the sharpness over draws, by Student's t, and of the accuracy over images. Values that are
    not finite are counted, saturated ones have a diamond.

    Args:
        rows: rows of :func:`rft_fast.studies.sharpness`, and of the interpolation at the same alphas, which
            have the accuracies (without them, only the left panel is drawn, with a note); or their facts.
        file: output file; its extension selects the format.

    Returns:
        The figure, which is already saved.

    Raises:
        ValueError: there are no rows of the study, or :func:`rft_fast.studies.summarize` refuses a path.
    """
    facts = as_facts(rows)
    measured = of_study(facts.rows, STUDY, "figures.sharpness").sort_values("alpha", kind="stable")
    measured = measured.assign(saturated=facts.saturated(measured))
    accuracies, far = facts.ood_rows, facts.ood_path.assign(fails=lambda path: path["mode"] == "failure")
    failing = far.groupby("model")["fails"].all()
    sets = list(far["dataset"].unique())
    models = list(measured["model"].unique())
    of_models = palette(models)
    parts = [part for _, part in measured.groupby(SETTING, sort=False, dropna=False)]

    figure = canvas(max(7.0, 3.4 + 2.2 * len(sets)), 5)
    fixed = current().width != "auto"
    per = side_by_side(figure, 1 + len(sets), 0.4, 1.3)
    ratios = [1.3] + [1.0] * len(sets) if per > len(sets) else None
    groups = arrange(figure, 1 + len(sets), per, len(parts), width_ratios=ratios)
    unmatched = 0
    titles = [fold(name, 1.3 if fixed else 2.2, "title") for name in sets]
    for columns, part in zip(groups, parts, strict=True):
        left, *others = panels = [panel for (panel,) in columns]
        paired = part["sharpness_change"].notna().all()
        of = "sharpness_change" if paired else "sharpness"
        _along(left, part, of, of_models, set(failing.index[failing]))
        left.set_title(setting(part).replace(", ", ",\n" if current().width == "one" else ", "))
        left.set_ylabel("general sharpness" + (" minus\nthat of zero-shot" if paired else "") + " (nats)")
        for panel, dataset, name in zip(others, sets, titles, strict=True):
            points = _matched(part, accuracies[accuracies["dataset"] == dataset])
            unmatched += len(part) - len(points)
            here = far[far["dataset"] == dataset]
            _against(panel, points, of_models, set(here.loc[here["fails"], "model"]))
            panel.set_title(name)
        for start in range(0, len(panels), per):
            if row := panels[max(start, 1) : start + per]:  # those of accuracy
                row[0].set_ylabel("accuracy (%)")
                level(row)
        if fixed or columns is groups[-1]:
            for panel in panels:
                panel.set_xlabel(r"$\alpha$" if panel is left else "sharpness (nats)")

    note = wrap(
        figure,
        "General sharpness along the path, and accuracy against it." if sets else "",
        f"Sharpness: {stated(measured)}",
        _paired(measured),
        "Bars: pointwise 95 % intervals, of sharpness over draws, of accuracy over images.",
        _failure(far) if sets else "",
        r"Models are shifted sideways a little over $\alpha$." if len(models) > 1 else "",
        "" if sets else "No rows of the interpolation: accuracy is not shown, nor which models fail.",
        f"{many(unmatched, 'position has', 'positions have')} no accuracy." if unmatched else "",
        not_finite(measured["sharpness"], "values of sharpness"),
        unknown_errors(measured),
        SATURATED_EXPLAINED if measured["saturated"].any() else "",
    )
    marks = [
        key("gain, or undecided", BEATS),
        key("failure", FAILS),
        key(r"zero-shot, $\alpha$ = 0", _ZERO),
        key(r"fine-tuned, $\alpha$ = 1", _END),
    ]
    marks = marks if sets else [key("mean over draws", BEATS)]
    marks += [key("saturated", SATURATED)] if measured["saturated"].any() else []
    lines = math.ceil((1 + len(sets)) / per) * len(parts)
    height = 0.3 + (2.1 if fixed else 2.6) * lines + extra(titles) * len(parts)
    return finish(figure, file, height, marks, note, swatches(of_models))


def _failure(far: pd.DataFrame) -> str:
    """A sentence that explains which models fail. far: the summary of paths out of distribution."""
    return (
        f"Failure: no gain of {100 * far['xi'].iloc[0]:g} points is possible, by 95 % bounds for all "
        r"$\alpha$ at once; on the left, on none of these data sets."
    )


def _bars(colour: Any) -> Style:
    return {"color": colour, "ecolor": to_rgba(colour, 0.5), "elinewidth": 0.7}


def _paired(rows: pd.DataFrame) -> str:
    """A sentence on differences to zero-shot, and what they are measured from; empty without them."""
    zero = rows[(rows["alpha"] == 0) & rows["sharpness_change"].notna()]
    if zero.empty:
        return ""
    from_ = [
        f"{row['sharpness']:.3g} $\\pm$ {row['sharpness_se']:.2g} nats at $\\rho$ = {row['rho']:g}"
        for row in zero.drop_duplicates(["sharpness", "rho"]).to_dict("records")
    ]
    return (
        "Left: difference to zero-shot, paired over draws, which all positions and models share. Zero-shot "
        f"($\\pm$ standard error): {', '.join(from_[:4])}{' ...' if len(from_) > 4 else ''}."
    )


def _along(panel: Axes, part: pd.DataFrame, of: str, palette: Mapping[str, Any], failures: set[str]) -> None:
    """A column over alpha; models are shifted sideways so that their bars do not overlap."""
    plain(panel)
    alphas = part["alpha"].unique()
    room = 0.4 * np.diff(alphas).min(initial=1)
    if len(alphas) <= _FEW:  # sideways shifts are no positions
        panel.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
    for i, (model, colour) in enumerate(palette.items()):
        curve = part[part["model"] == model]
        x = curve["alpha"] + room * ((i + 0.5) / len(palette) - 0.5)
        style = FAILS if model in failures else BEATS
        panel.errorbar(x, curve[of], margin(curve, of), label=model, **_bars(colour), **style)
        flagged = curve["saturated"]
        panel.plot(x[flagged], curve.loc[flagged, of], zorder=4, **SATURATED)


def _against(panel: Axes, points: pd.DataFrame, palette: Mapping[str, Any], failures: set[str]) -> None:
    """Accuracy over sharpness, with the positions of a model joined."""
    plain(panel)
    for model, colour in palette.items():
        curve = points[points["model"] == model]
        x, y = curve["sharpness"], 100 * curve["ood_accuracy"]
        style = (FAILS if model in failures else BEATS) | {"lw": 0.6}
        across, up = margin(curve), 100 * Z95 * curve["ood_accuracy_se"]
        panel.errorbar(x, y, up, across, label=model, **_bars(colour), **style)
        start, end, flagged = curve["alpha"] == 0, curve["alpha"] == 1, curve["saturated"]
        panel.plot(x[flagged], y[flagged], zorder=5, **SATURATED)
        panel.plot(x[start], y[start], zorder=4, **_ZERO)
        panel.plot(x[end], y[end], zorder=4, color=colour, mfc=style.get("mfc"), **_END)


def _matched(part: pd.DataFrame, accuracies: pd.DataFrame) -> pd.DataFrame:
    """Join each sharpness with the accuracy of the same model at the same alpha, if there is one."""
    names = {"accuracy": "ood_accuracy", "accuracy_se": "ood_accuracy_se"}
    found = accuracies.assign(position=accuracies["alpha"].round(9)).rename(columns=names)
    return part.assign(position=part["alpha"].round(9)).merge(
        found[["model", "position", *names.values()]], on=["model", "position"]
    )
