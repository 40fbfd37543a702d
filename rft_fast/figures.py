"""Rows as pictures: one figure per study, readable in print and by the colour-blind."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D

from .studies.path import STUDY, Z95, summarize

# Paul Tol's "muted" scheme: nine colours that stay apart under the common colour deficiencies.
_MUTED = "#332288 #CC6677 #44AA99 #882255 #DDCC77 #117733 #88CCEE #AA4499 #999933".split()
_GREY = "0.3"
_SMALL = 7.5  # points

Style = dict[str, Any]
_Place = Literal["outside upper center", "outside lower center"]
_BEATS: Style = {"ls": "-", "lw": 1.2, "marker": "o", "ms": 3}
_FAILS: Style = {"ls": (0, (3.5, 1.5)), "lw": 1.2, "marker": "o", "ms": 3.5, "mfc": "white"}
_ZERO_SHOT: Style = {"ls": ":", "lw": 1, "color": _GREY}
_STAR: Style = {"ls": "", "marker": "*", "ms": 9, "mec": "black", "mew": 0.6}
_TRIANGLE: Style = {"ls": "", "marker": "v", "ms": 6, "mec": "black", "mew": 0.6}


@dataclass(frozen=True)
class _Quantity:
    """What a panel shows: a quantity, and its largest rise above zero-shot."""

    value: str  # column of the rows
    band: str  # column of the rows: paired standard error of the difference to zero-shot
    change: str  # column of the summary, with <change>_se
    position: str  # column of the summary: the alpha of the change
    scale: float
    digits: int
    mark: Style


_ACCURACY = _Quantity("accuracy", "gain_se", "gain", "best_alpha", 100, 1, _STAR)
_LOSS = _Quantity("loss", "rise_se", "barrier", "barrier_alpha", 1, 2, _TRIANGLE)


def interpolation(rows: pd.DataFrame, file: str | os.PathLike[str]) -> Figure:
    """Figure 1: accuracy (top) and loss (bottom) over alpha, one column per data set.

    One colour per model; dashed with open markers where no alpha beats zero-shot. A star marks the
    best alpha where one does, a triangle the highest loss where it lies above zero-shot; the
    largest gain and the deepest barrier of each data set are measured off and written out with
    their 95 % intervals. Bands are pointwise 95 % intervals of the difference to zero-shot, paired
    over samples. Losses that are not finite leave gaps, and are counted below the figure.

    Args:
        rows: of :func:`rft_fast.studies.interpolation`, for complete paths.
        file: where the picture goes; its ending chooses the format.

    Returns:
        The figure, already saved.

    Raises:
        ValueError: as :func:`rft_fast.studies.summarize`.
    """
    summary = summarize(rows)
    rows = rows[rows["study"] == STUDY].sort_values("alpha", kind="stable")
    models, datasets = list(summary["model"].unique()), list(summary["dataset"].unique())
    colours = dict(zip(models, _colours(len(models)), strict=True))

    width = max(7.0, 0.7 + 2.3 * len(datasets))  # inches
    figure = Figure(figsize=(width, 5), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(datasets), sharex=True, squeeze=False)
    for (top, bottom), dataset in zip(panels.T, datasets, strict=True):
        curves = rows[rows["dataset"] == dataset]
        facts = summary[summary["dataset"] == dataset]
        where = "" if facts["ood"].iloc[0] else "in distribution, "
        top.set_title(f"{dataset}\n({where}{facts['samples'].iloc[0]:,} images)", fontsize=9)
        bottom.set_xlabel(r"$\alpha$", fontsize=9)
        _draw(top, curves, facts, colours, _ACCURACY)
        _draw(bottom, curves, facts, colours, _LOSS)
    panels[0, 0].set_ylabel("accuracy (%)", fontsize=9)
    panels[1, 0].set_ylabel("loss", fontsize=9)
    key = [
        Line2D([], [], label="zero-shot", **_ZERO_SHOT),
        Line2D([], [], label="beats zero-shot", color=_GREY, **_BEATS),
        Line2D([], [], label="never does: failure", color=_GREY, **_FAILS),
        Line2D([], [], label=r"best $\alpha$", color=_GREY, **_STAR),
        Line2D([], [], label="highest loss", color=_GREY, **_TRIANGLE),
    ]
    names = [Line2D([], [], label=name, color=colours[name], lw=3) for name in models]
    legends = _legend(figure, "outside upper center", key, _note(rows))
    legends += _legend(figure, "outside lower center", names)
    figure.set_figheight(4.6 + legends)
    figure.savefig(file)
    return figure


def _draw(
    panel: Axes,
    rows: pd.DataFrame,
    facts: pd.DataFrame,
    colours: Mapping[str, Any],
    what: _Quantity,
) -> None:
    """One quantity of every model on one data set, the largest change of it measured off."""
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    for level in rows.loc[rows["alpha"] == 0, what.value].unique():
        panel.axhline(what.scale * level, zorder=1, **_ZERO_SHOT)
    largest, text = 0.0, f"no {what.change}"
    for fact in facts.to_dict("records"):
        curve = rows[rows["model"] == fact["model"]]
        alpha, value = curve["alpha"].to_numpy(), what.scale * curve[what.value].to_numpy()
        margin = what.scale * Z95 * curve[what.band].to_numpy()
        colour = colours[fact["model"]]
        style = _BEATS if fact["gain"] > 0 else _FAILS
        panel.plot(alpha, value, color=colour, label=fact["model"], zorder=3, **style)
        panel.fill_between(
            alpha,
            value - margin,
            value + margin,
            color=colour,
            alpha=min(0.12, 0.5 / len(colours)),
            lw=0,
        )
        change, at = what.scale * fact[what.change], fact[what.position]
        if not (change > 0 and np.isfinite(change)):
            continue
        panel.plot(at, value[0] + change, color=colour, zorder=5, **what.mark)
        if change > largest:
            largest, span = change, [value[0], value[0] + change]
            error = what.scale * Z95 * fact[f"{what.change}_se"]
            text = (
                f"{what.change} +{change:.{what.digits}f} $\\pm$ {error:.{what.digits}f}"
                f" at $\\alpha$ = {at:g}"
            )
            where = at
    if lost := int((~np.isfinite(facts[what.change])).sum()):
        text += f"; {lost} not finite"
    if largest:
        panel.plot([where, where], span, color="black", lw=0.9, marker="_", ms=6, zorder=4)
    low, high = panel.get_ylim()
    panel.set_ylim(low, high + 0.13 * (high - low))  # room for the text
    panel.text(0.02, 0.985, text, transform=panel.transAxes, va="top", fontsize=_SMALL)


def _legend(figure: Figure, place: _Place, handles: Sequence[Line2D], title: str = "") -> float:
    """Adds a legend in as few lines as the figure's width allows; returns its height in inches."""

    def make(columns: int) -> Legend:
        legend: Legend = figure.legend(
            handles=handles, loc=place, ncols=columns, fontsize=_SMALL, frameon=False
        )
        legend.set_title(title)
        legend.get_title().set_fontsize(_SMALL)
        legend.get_title().set_multialignment("center")
        return legend

    legend = make(len(handles))
    if legend.get_window_extent().width > figure.bbox.width:
        legend.remove()
        legend = make(1)  # as wide as the widest entry
        spacing = legend.columnspacing * _SMALL * figure.dpi / 72
        fitting = max(1, figure.bbox.width // (legend.get_window_extent().width + spacing))
        legend.remove()
        lines = math.ceil(len(handles) / fitting)
        legend = make(math.ceil(len(handles) / lines))
    return float(legend.get_window_extent().height / figure.dpi)


def _note(rows: pd.DataFrame) -> str:
    counts = sorted(rows.groupby(["model", "dataset"])["alpha"].size().unique())
    note = (
        f"{' or '.join(map(str, counts))} positions $\\alpha$ per curve. Bands: pointwise 95 % "
        "intervals of the difference to zero-shot, paired over images.\n"
        "Written out: the largest gain and barrier with that interval; their $\\alpha$ is chosen "
        "on the same images, which overstates both."
    )
    lost = int((~np.isfinite(rows["loss"])).sum())
    return note + (f"\n{lost} losses that are not finite are not drawn." if lost else "")


def _colours(count: int) -> list[Any]:
    """Nine that the eye tells apart; beyond that, an even scale in the order of the models."""
    if count <= len(_MUTED):
        return list(_MUTED[:count])
    return list(colormaps["viridis"](np.linspace(0, 0.9, count)))
