"""Soups against the best single model, and Model Stock's t beside the best alpha of the path to the soup."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
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
    palette,
    plain,
    side_by_side,
    wrap,
)

_POINT: Style = {"ls": "", "marker": "o", "ms": 4, "color": "black", "mfc": "white", "lw": 1.2}
_APART: Style = {**_POINT, "mfc": "black"}
_T: Style = {"ls": "", "marker": ".", "ms": 4, "color": "black"}
_ALPHA: Style = {"ls": "-", "marker": "D", "ms": 4, "lw": 2}
_ZERO: Style = {"ls": ":", "lw": 1, "color": GREY}


@drawing
def soups(table: pd.DataFrame, stock: pd.Series, file: str | os.PathLike[str]) -> Figure:
    """Draw the accuracy of each point minus that of the best model, in points; a panel per data set.

    The last panel has t of Model Stock, a dot for each tensor in the order of the model, and for each data
    set the best alpha of the path to the uniform soup, with the range that is not shown to be worse.

    Args:
        table: the result of :func:`rft_fast.studies.soup_points`.
        stock: that of :func:`rft_fast.studies.stock_ratios`.
        file: output file; its extension selects the format.

    Returns:
        The figure, which is already saved.

    Raises:
        ValueError: the table is empty.
    """
    if table.empty:
        raise ValueError("figures.soups: expected the table of studies.soup_points, got none")
    sets, points = list(table["dataset"].unique()), list(table["point"].unique())
    figure = canvas(max(5.0, 3.8 + 1.8 * len(sets)), 4)
    per = side_by_side(figure, len(sets) + 1, 1.8, 1.2)
    (columns,) = arrange(figure, len(sets) + 1, per)
    near = table[~table["ood"].astype(bool)]["dataset"].unique()
    names = [f"{name} (ID)" if name in near else name for name in sets]
    titles = headings([*names, "Model Stock"], figure, 1.8, "small", per)
    for number, ((panel,), dataset) in enumerate(zip(columns, sets, strict=False)):
        plain(panel)
        panel.set_title(titles[number], loc="left")
        panel.axvline(0, **_ZERO)
        here = table[table["dataset"] == dataset]
        apart = (here["difference_low"] > 0) | (here["difference_high"] < 0)
        for style, own in ((_APART, here[apart]), (_POINT, here[~apart])):
            if len(own):
                half = 100 * (own["difference_high"] - own["difference"])
                at = own["point"].map(points.index)
                panel.errorbar(100 * own["difference"], at, xerr=half, capsize=2, **style)
        panel.set_ylim(len(points) - 0.5, -0.5)
        panel.set_yticks(range(len(points)))
        panel.tick_params("y", left=False, labelleft=False)
        if number % per == 0:
            heat.label(panel, points)
        panel.set_xlabel("accuracy minus best\nmodel (points)")
    ((last,),) = columns[len(sets) :]
    plain(last)
    last.set_title(titles[-1], loc="left")
    colours = palette(sets)
    _ratios(last, table, stock, colours)
    note = wrap(
        figure,
        "Accuracy minus that of the single model of highest accuracy in distribution (ID). Bars: 95 % "
        "intervals, paired over images, corrected for all points and data sets out of distribution."
        if table["difference_low"].notna().any()
        else "Accuracy minus that of the single model of highest accuracy in distribution (ID).",
        "On ID data, models, greedy soup and alpha are chosen on the images that are scored.",
        "The best alpha of the path to the uniform soup is cross-fitted."
        if table["alpha_low"].notna().any()
        else "The best alpha is chosen on the images that are scored.",
        "Right: t of Model Stock for each tensor, from the first (top) to the last; coloured: the best alpha",
        "of the path to the uniform soup, and the range that is not shown to be less accurate.",
    )
    marks = [key("a point", _POINT), key("interval without 0", _APART), key("t of a tensor", _T)]
    marks += [key(f"best alpha, {name}", {**_ALPHA, "color": colours[name]}) for name in sets]
    height = (0.9 + 0.34 * len(points) + extra(titles)) * -(-(len(sets) + 1) // per)
    return finish(figure, file, height, marks, note)


def _ratios(panel: Axes, table: pd.DataFrame, stock: pd.Series, colours: dict[str, str]) -> None:
    """Draw t of each tensor, and the best alpha of each data set below."""
    if len(stock):
        panel.plot(stock.to_numpy(), np.linspace(0, 1, len(stock)), **_T)
    best = table[table["alpha_low"].notna() | (table["point"] == table["point"].iloc[-1])]
    for place, fact in enumerate(best.drop_duplicates("dataset").to_dict("records")):
        style = {**_ALPHA, "color": colours[fact["dataset"]]}
        at = 1.12 + 0.1 * place
        if pd.notna(fact["alpha_low"]):
            panel.plot([fact["alpha_low"], fact["alpha_high"]], [at, at], **{**style, "marker": ""})
        panel.plot([fact["alpha"]], [at], **style)
    panel.set_ylim(1.12 + 0.1 * table["dataset"].nunique(), -0.05)
    panel.tick_params("y", left=False, labelleft=False)
    panel.set_yticks([])
    panel.set_xlabel("t, or alpha")
