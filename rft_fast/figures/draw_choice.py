"""The regret of each rule that chooses alpha without labels from elsewhere."""

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
    palette,
    plain,
    side_by_side,
    swatches,
    wrap,
)

_MODEL: Style = {"ls": "", "marker": "o", "ms": 3.5, "mfc": "white"}
_MEAN: Style = {"ls": "", "marker": "D", "ms": 4, "color": "black", "lw": 1.2}
_ZERO: Style = {"ls": ":", "lw": 1, "color": GREY}


@drawing
def choice(table: pd.DataFrame, means: pd.DataFrame, file: str | os.PathLike[str]) -> Figure:
    """Draw the regret of each rule, in points: a circle for each model, a diamond for their mean.

    There is a panel per out-of-distribution data set, with a line per rule.

    Args:
        table: the result of :func:`rft_fast.studies.choice`.
        means: the result of :func:`rft_fast.studies.choice_means`.
        file: output file; its extension selects the format.

    Returns:
        The figure, which is already saved.

    Raises:
        ValueError: a table is empty.
    """
    if table.empty or means.empty:
        raise ValueError("figures.choice: expected the tables of studies.choice and choice_means, got none")
    sets, rules = list(table["dataset"].unique()), list(means["rule"].unique())
    of_models = palette(list(table["model"].unique()))
    figure = canvas(max(5.0, 1.6 + 2.4 * len(sets)), 4)
    per = side_by_side(figure, len(sets), 1.2, 1.4)
    (columns,) = arrange(figure, len(sets), per)
    titles = headings(sets, figure, 1.2, "small", per)
    for number, ((panel,), dataset, title) in enumerate(zip(columns, sets, titles, strict=True)):
        plain(panel)
        panel.set_title(title, loc="left")
        panel.axvline(0, **_ZERO)
        here, mean = table[table["dataset"] == dataset], means[means["dataset"] == dataset]
        lines = {rule: line for line, rule in enumerate(rules)}
        for model, own in here.groupby("model", sort=False):
            at = own["rule"].map(lines) - 0.12
            panel.plot(100 * own["regret"], at, color=of_models[model], **_MODEL)
        sides = [100 * (mean["regret"] - mean["regret_low"]), 100 * (mean["regret_high"] - mean["regret"])]
        panel.errorbar(100 * mean["regret"], mean["rule"].map(lines) + 0.18, xerr=sides, capsize=2, **_MEAN)
        panel.set_ylim(len(rules) - 0.5, -0.5)
        panel.set_yticks(range(len(rules)))
        panel.tick_params("y", left=False, labelleft=False)
        if number % per == 0:
            heat.label(panel, rules)
        panel.set_xlabel("regret (points)")
    fitted = bool(table["cross_fitted"].all())
    note = wrap(
        figure,
        "Accuracy at the best position of a path, minus that at the position that a rule chooses without "
        "labels of these images.",
        "The best position is chosen on other images than it is measured on (five folds)."
        if fitted
        else "The best position is chosen and measured on the same images, so regrets are too large.",
        "Bars: 95 % intervals of the means, over models and images."
        if means["regret_low"].notna().any()
        else "",
    )
    marks = [key("a model", {**_MODEL, "color": GREY}), key("mean", _MEAN)]
    height = (0.9 + 0.34 * len(rules) + extra(titles)) * -(-len(sets) // per)
    return finish(figure, file, height, marks, note, swatches(of_models))
