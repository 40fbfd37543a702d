"""The paper's claim: flat layers of models that fail and of models that gain."""

from __future__ import annotations

import math
import os

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..studies.claim import SETTING
from .captions import setting
from .style import (
    BEATS,
    FAILS,
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
    swatches,
    wrap,
)

_UNDECIDED: Style = {"ls": ":", "marker": "D"}


@drawing
def claim(table: pd.DataFrame, file: str | os.PathLike[str]) -> Figure:
    """Draw the flat layers of each model at alpha = 1: over the margin, and against the gain.

    There are two panels per out-of-distribution data set, and a row per way of measuring. Left: number of
    flat layers at each margin in nats. Right: that number at the middle margin, over the gain. Models that
    fail are dashed with open markers, undecided ones dotted with diamonds.

    Args:
        table: the result of :func:`rft_fast.studies.claim`.
        file: output file; its extension selects the format.

    Returns:
        The figure, which is already saved.

    Raises:
        ValueError: the table is empty.
    """
    if table.empty:
        raise ValueError("figures.claim: expected rows of studies.claim, got none")
    here = table[(table["at"] == "finetuned") & (table["unit"] == "nats")]
    margins = sorted(here["margin"].unique())
    middle = margins[(len(margins) - 1) // 2]
    models, sets = list(here["model"].unique()), list(here["dataset"].unique())
    of_models = palette(models)
    parts = [part for _, part in here.groupby(["measured_on", *SETTING[1:]], sort=False, dropna=False)]

    figure = canvas(max(7.0, 1 + 3.6 * len(sets)), 5)
    per = max(2, side_by_side(figure, 2 * len(sets), 0.8, 1.3) // 2 * 2)
    groups = arrange(figure, 2 * len(sets), per, len(parts), sharey="row")
    titles = headings(sets, figure, 1.0, "small", per // 2)
    for group, part in zip(groups, parts, strict=True):
        panels = [panel for (panel,) in group]
        how = setting(part.rename(columns={"measured_on": "dataset", "dataset": "set"}))
        for first in panels[::per]:
            first.set_ylabel(f"flat layers of {part['layers'].iloc[0]}\n{how}")
            first.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
        for left, right, dataset, title in zip(panels[::2], panels[1::2], sets, titles, strict=True):
            for (model, mode), own in part[part["dataset"] == dataset].groupby(
                ["model", "mode"], sort=False, dropna=False
            ):
                style = {"failure": FAILS, "gain": BEATS, "high gain": BEATS}.get(mode, _UNDECIDED)
                own = own.sort_values("margin")
                left.plot(own["margin"], own["flat"], color=of_models[model], label=model, **style)
                at = own[own["margin"] == middle]
                right.plot(100 * at["gain"], at["flat"], color=of_models[model], label=model, **style)
            for panel in (left, right):
                plain(panel)
            if not part["flat"].any():
                left.set_ylim(-0.25, 1.25)  # a count: neither fractions nor numbers below 0
            left.set_xscale("log")
            left.set_xticks(margins, [f"{margin:g}" for margin in margins], minor=False)
            left.minorticks_off()
            right.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))  # labels of narrow panels
            if group is groups[0] or per < len(panels):
                left.set_title(title, loc="left")
            if group is groups[-1] or per < len(panels):
                left.set_xlabel("margin\n(nats, log scale)")
                right.set_xlabel("gain (points)")

    note = wrap(
        figure,
        "Flat layers of models that fail and of models that gain.",
        "Layers of the fine-tuned model, at $\\alpha$ = 1, whose sharpness, with its 95 % interval, lies",
        f"within the margin of zero. Over the gain: at {middle:g} nats.",
    )
    marks = [key("gains", BEATS), key("fails", FAILS)]
    if not here["mode"].isin(["failure", "gain", "high gain"]).all():
        marks.append(key("undecided", _UNDECIDED))
    lines = math.ceil(2 * len(sets) / per) * len(parts)
    return finish(figure, file, 0.4 + (2.4 + extra(titles)) * lines, marks, note, swatches(of_models))
