"""The correlation table as a forest plot: does sharpness predict out-of-distribution performance?"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..studies.correlation import COMPETITORS
from ..studies.permutation import LEVEL, least
from . import heat
from .captions import measures, several, stated
from .looks import MUTED
from .style import (
    GREY,
    Style,
    arrange,
    canvas,
    curve,
    curve_styles,
    drawing,
    extra,
    finish,
    headings,
    key,
    level,
    plain,
    side_by_side,
    wrap,
)

_MEASURES = ["general", "stragglers", *COMPETITORS, "layer"]
_KENDALL: Style = {"ls": "", "marker": "o", "ms": 3.5, "color": MUTED[0], "mfc": "white"}
_SIGNIFICANT: Style = {**_KENDALL, "mfc": MUTED[0]}
_SATURATED: Style = {"ls": "", "marker": "x", "ms": 6, "mew": 1, "color": GREY}
_SPEARMAN: Style = {"ls": "", "marker": "D", "ms": 3, "color": MUTED[1], "mfc": "white"}
_ZERO: Style = {"ls": ":", "lw": 1, "color": GREY}


@drawing
def correlation(table: pd.DataFrame, file: str | os.PathLike[str], alpha: float | None = None) -> Figure:
    """Draw rank correlations of sharpness with accuracy and gain; one column per outcome and data set.

    Top: Kendall's tau over alpha, for general sharpness, that of the stragglers, and measures that need no
    perturbation. Bottom: Kendall's tau and Spearman's rho at one alpha, for these and for every layer. A tau
    is filled where its permutation p, corrected for all of the same outcome, is at most 0.05, and crossed
    where the sharpness is saturated. Bands and bars are pointwise 95 % intervals, for orientation. Names
    include the settings of the sharpness that vary, such as rho. Undefined correlations leave gaps and are
    counted, as are those without an interval.

    Args:
        table: the result of :func:`rft_fast.studies.correlation`.
        file: output file; its extension selects the format.
        alpha: position of the bottom panels; None: 1, or the highest in the table.

    Returns:
        The figure, which is already saved.

    Raises:
        ValueError: the table is empty, or does not have this alpha.
    """
    if table.empty:
        raise ValueError("figures.correlation: expected rows of studies.correlation, got none")
    alphas = sorted(map(float, table["alpha"].unique()))
    alpha = alpha if alpha is not None else 1.0 if 1.0 in alphas else alphas[-1]
    if alpha not in alphas:
        raise ValueError(f"figures.correlation: expected an alpha among {alphas}, got {alpha:g}")
    table = table.assign(name=measures(table)).sort_values("alpha", kind="stable")
    at = table[table["alpha"] == alpha]
    names = [name for measure in _MEASURES for name in at.loc[at["measure"] == measure, "name"].unique()]
    styles = dict(zip(table.loc[table["measure"] != "layer", "name"].unique(), cycle(curve_styles())))
    parts = table.groupby(["dataset", "outcome"], sort=False)
    columns = list(parts.groups)

    figure = canvas(max(7.0, 1.8 + 1.7 * len(columns)), 5)
    heights = [1.5, heat.height(len(names))] if styles else [heat.height(len(names))]
    per = side_by_side(figure, len(columns), 1.2, 0.7)
    (panels,) = arrange(figure, len(columns), per, heights=heights)
    titles = headings([dataset for dataset, _ in columns], figure, 1.2, "small", per)
    for column, outcome, title in zip(panels, columns, titles, strict=True):
        here = parts.get_group(outcome)
        models = several(here["models"].unique())
        column[0].set_title(f"{outcome[1]} on\n{title}\n{models} models", fontsize="small")
        if here["kendall"].isna().all():
            column[-1].text(0.1, 0.5, "not\ndefined", transform=column[-1].transAxes, fontsize="small")
        for panel in column[:-1]:
            _along(panel, here, styles)
            panel.set_xlim(alphas[0] - 0.05, alphas[-1] + 0.05)
            if len(alphas) == 1:
                panel.set_xticks(alphas, [f"{alphas[0]:g}"])
        _forest(column[-1], here[here["alpha"] == alpha].set_index("name").reindex(names))
    for first in panels[::per]:
        heat.label(first[-1], names)
        first[0].set_ylabel(r"Kendall's $\tau$" if styles else "")
    for start in range(0, len(panels) if styles else 0, per):
        level([column[0] for column in panels[start : start + per]])

    general, layers = table["measure"] == "general", table["measure"].isin(["stragglers", "layer"])
    note = wrap(
        figure,
        "Rank correlation over models of sharpness with accuracy and gain.",
        f"General sharpness: {stated(table[general])}" if general.any() else "",
        f"Layer-wise sharpness: {stated(table[layers])}" if layers.any() else "",
        f"Lower panels: $\\alpha$ = {alpha:g}. Filled: p by permutation of the models, corrected for all "
        "measures and positions of the same outcome.",
        _limits(table),
        "Bands and bars: pointwise 95 % intervals, for orientation.",
        *_gaps(table),
    )
    marks = [key("Kendall", _KENDALL), key(f"p at most {LEVEL:g}, corrected", _SIGNIFICANT)]
    marks += [key("saturated: not tested", _SATURATED)] if (table["saturated"] > 0).any() else []
    marks += [key("Spearman", _SPEARMAN)]
    marks += [key(name, style) for name, style in styles.items()]
    height = (sum(heights) + 1.6 + extra(titles)) * math.ceil(len(columns) / per)
    return finish(figure, file, height, marks, note)


def _along(panel: Axes, rows: pd.DataFrame, styles: Mapping[str, Style]) -> None:
    """Kendall's tau over alpha, with its band."""
    plain(panel)
    panel.set_ylim(-1.05, 1.05)
    panel.axhline(0, **_ZERO)
    panel.set_xlabel(r"$\alpha$")
    for name, style in styles.items():
        own = rows[rows["name"] == name]
        columns = (own[column] for column in ("alpha", "kendall", "kendall_low", "kendall_high"))
        curve(panel, *columns, label=name, **style)


def _forest(panel: Axes, rows: pd.DataFrame) -> None:
    """One line per row: Kendall above, Spearman below, each with its interval."""
    plain(panel)
    panel.tick_params("y", left=False, labelleft=False)
    panel.set_xlim(-1.05, 1.05)
    panel.set_xticks([-1, -0.5, 0, 0.5, 1], ["\N{MINUS SIGN}1", "\N{MINUS SIGN}0.5", "0", "0.5", "1"])
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.axvline(0, **_ZERO)
    panel.set_xlabel("rank\ncorrelation")
    for name, style, shift in (("kendall", _KENDALL, -0.2), ("spearman", _SPEARMAN, 0.2)):
        places = np.arange(len(rows)) + shift
        ends = rows[f"{name}_low"], rows[f"{name}_high"]
        panel.hlines(places, *ends, color=style["color"], lw=0.8)
        panel.plot(rows[name], places, label=name, **style)
    for label, chosen, style in (
        ("significant", rows["p_max"] <= LEVEL, _SIGNIFICANT),
        ("saturated", rows["saturated"] > 0, _SATURATED),
    ):
        at = np.flatnonzero(chosen.to_numpy(dtype=bool, na_value=False))
        panel.plot(rows["kendall"].iloc[at], at - 0.2, label=label, **style)
    for change in np.flatnonzero(rows["measure"].to_numpy()[1:] != rows["measure"].to_numpy()[:-1]):
        panel.axhline(change + 0.5, color="0.8", lw=0.6)


def _limits(table: pd.DataFrame) -> str:
    """A sentence on what so few models can show."""
    counts = sorted(count for count in table["models"].unique() if count >= 3)
    limits = {int(count): least(int(count)) for count in counts}
    texts = [f"{limit:.2f} ({n} models)" for n, limit in limits.items() if not np.isnan(limit)]
    return f"Even one test alone needs $|\\tau|$ of {', '.join(texts)}." if texts else ""


def _gaps(table: pd.DataFrame) -> Iterator[str]:
    """Yield sentences that count the missing values and explain them."""
    undefined = table["kendall"].isna()
    if count := int(undefined.sum()):
        yield f"{count:,} of {len(table):,} correlations are not defined"
        yield f"({int((table['nonfinite'] > 0).sum()):,} for a value that is not finite; the others for one"
        yield "side being the same for all models, or fewer than three of them)."
    if count := int((table["kendall_low"].isna() & ~undefined).sum()):
        yield f"{count:,} have no interval (too few models, or exactly 1 or -1)."
