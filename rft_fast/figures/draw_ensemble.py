"""The path against ensembles of its two ends' logits, model by model."""

from __future__ import annotations

import os

import pandas as pd
from matplotlib.figure import Figure

from . import heat
from .style import (
    GREY,
    Style,
    arrange,
    canvas,
    drawing,
    extra,
    finish,
    headings,
    key,
    plain,
    side_by_side,
    wrap,
)

_MODEL: Style = {"ls": "", "marker": "o", "ms": 4, "color": "black", "mfc": "white", "lw": 1.2}
_APART: Style = {**_MODEL, "mfc": "black"}
_ZERO: Style = {"ls": ":", "lw": 1, "color": GREY}


@drawing
def ensemble(table: pd.DataFrame, file: str | os.PathLike[str]) -> Figure:
    """Draw the accuracy of the path minus that of the ensembles, in points; a panel per data set.

    Args:
        table: the result of :func:`rft_fast.studies.ensemble_difference`.
        file: output file; its extension selects the format.

    Returns:
        The figure, which is already saved.

    Raises:
        ValueError: the table is empty.
    """
    if table.empty:
        raise ValueError("figures.ensemble: expected the table of studies.ensemble_difference, got none")
    sets, models = list(table["dataset"].unique()), list(table["model"].unique())
    figure = canvas(max(5.0, 2.2 + 2.0 * len(sets)), 4)
    per = side_by_side(figure, len(sets), 1.8, 1.2)
    (columns,) = arrange(figure, len(sets), per)
    titles = headings(sets, figure, 1.8, "small", per)
    for number, ((panel,), dataset, title) in enumerate(zip(columns, sets, titles, strict=True)):
        plain(panel)
        panel.set_title(title, loc="left")
        panel.axvline(0, **_ZERO)
        here = table[table["dataset"] == dataset]
        apart = (here["difference_low"] > 0) | (here["difference_high"] < 0)
        for style, own in ((_APART, here[apart]), (_MODEL, here[~apart])):
            half = 100 * (own["difference_high"] - own["difference"])
            panel.errorbar(
                100 * own["difference"], own["model"].map(models.index), xerr=half, capsize=2, **style
            )
        panel.set_ylim(len(models) - 0.5, -0.5)
        panel.set_yticks(range(len(models)))
        panel.tick_params("y", left=False, labelleft=False)
        if number % per == 0:
            heat.label(panel, models)
        panel.set_xlabel("path minus ensemble\n(points)")
    note = wrap(
        figure,
        "Accuracy on the path minus that of the mean of the two ends' logits, at the same positions: the "
        "mean over the positions between the ends.",
        "Bars: 95 % intervals, paired over images." if table["difference_low"].notna().any() else "",
    )
    marks = [key("a model", _MODEL), key("interval without 0", _APART)]
    height = (0.9 + heat.height(len(models)) + extra(titles)) * -(-len(sets) // per)
    return finish(figure, file, height, marks, note)
