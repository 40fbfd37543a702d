"""Paths between two fine-tuned models, pair by pair."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .style import (
    GREY,
    LINE,
    Style,
    arrange,
    canvas,
    drawing,
    extra,
    finish,
    fold,
    headings,
    key,
    plain,
    side_by_side,
    wrap,
)

_LINE: Style = {"ls": "", "marker": "o", "ms": 4, "color": "black", "lw": 1.2}
_GAIN: Style = {"ls": "", "marker": "D", "ms": 4, "color": "tab:blue", "mfc": "white", "lw": 1.2}
_BUMP: Style = {"ls": "", "marker": "^", "ms": 5, "color": "tab:red"}
_ROOM = 1.5  # inches of a name
_ZERO: Style = {"ls": ":", "lw": 1, "color": GREY}


@drawing
def pairs(table: pd.DataFrame, file: str | os.PathLike[str]) -> Figure:
    """Draw the accuracy between two models against that of the two, in points; a panel per data set.

    Args:
        table: the result of :func:`rft_fast.studies.pair_effects`.
        file: output file; its extension selects the format.

    Returns:
        The figure, which is already saved.

    Raises:
        ValueError: the table is empty.
    """
    if table.empty:
        raise ValueError("figures.pairs: expected the table of studies.pair_effects, got none")
    sets = list(table["dataset"].unique())
    names = list(dict.fromkeys(zip(table["model"], table["partner"], strict=True)))
    labels = [f"{fold(model, _ROOM)}\nto {fold(partner, _ROOM)}" for model, partner in names]
    figure = canvas(max(5.0, 2.2 + 2.0 * len(sets)), 4)
    per = side_by_side(figure, len(sets), 2.0, 1.2)
    (columns,) = arrange(figure, len(sets), per)
    titles = headings(sets, figure, 2.0, "small", per)
    for number, ((panel,), dataset, title) in enumerate(zip(columns, sets, titles, strict=True)):
        plain(panel)
        panel.set_title(title, loc="left")
        panel.axvline(0, **_ZERO)
        here = table[table["dataset"] == dataset]
        at = np.array([names.index(pair) for pair in zip(here["model"], here["partner"], strict=True)])
        for column, style, shift in (("above_line", _LINE, -0.16), ("gain_held_out", _GAIN, 0.16)):
            half = 100 * (here[f"{column}_high"] - here[column])
            panel.errorbar(100 * here[column], at + shift, xerr=half, capsize=2, **style)
        bumps = (here["bump_low"] > 0).to_numpy()
        edge = panel.get_yaxis_transform()
        if bumps.any():  # an empty line would lie at the origin, and the layout would make room for it
            panel.plot([0.97] * int(bumps.sum()), at[bumps], transform=edge, clip_on=False, **_BUMP)
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.set_yticks(range(len(names)))
        panel.tick_params("y", left=False, labelleft=False)
        if number % per == 0:
            panel.set_yticks(range(len(names)), labels, fontsize="small")
            panel.tick_params("y", labelleft=True)
        panel.set_xlabel("accuracy (points)")
    note = wrap(
        figure,
        "Circles: accuracy in the middle of the path between two models, minus the straight line between",
        "their accuracies. Diamonds: accuracy at the best position minus that of the better model, both",
        "chosen on other images (five folds). Bars: 95 % intervals, paired over images, corrected for all",
        "pairs of a data set; none where no image differs.",
        "Triangles: the loss is shown to rise above the straight line between the two losses.",
    )
    marks = [
        key("middle", _LINE),
        key("best position, held out", _GAIN),
        key("bump in the loss", _BUMP),
    ]
    each = LINE * max(label.count("\n") + 1 for label in labels) + 0.06
    height = (1.0 + each * len(names) + extra(titles)) * -(-len(sets) // per)
    return finish(figure, file, height, marks, note)
