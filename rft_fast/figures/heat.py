"""Heat maps of layers (down) by alpha (across), legible for a few layers and for hundreds."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import AsinhNorm
from matplotlib.figure import Figure

from .style import GREY, SMALL, Style, points

MAP = "RdBu_r"  # diverging, of even lightness on both sides, safe for the colour-blind
STRAGGLER: Style = {"ls": "", "marker": "<", "ms": 5, "color": "black", "mew": 0}
NOT_FINITE: Style = {"ls": "", "marker": "x", "ms": 4, "color": GREY}
_SMALLEST = 5.0  # points, of a label that can still be read


def height(layers: int) -> float:
    """Inches for so many layers: generous, then what a page has, then what the labels need."""
    return min(max(0.16 * layers, 0.8), max(9.0, 0.085 * layers), 14.0)


def grid(rows: pd.DataFrame, column: str, layers: Sequence[str]) -> pd.DataFrame:
    """A column of rows with one per layer and alpha: layers in the given order by ascending alpha.

    NaN where there is no row; what was measured but is not a number is infinite.
    """
    table = rows.fillna({column: np.inf}).pivot(index="layer", columns="alpha", values=column)
    return table.reindex(list(layers)).sort_index(axis=1)


def draw(panel: Axes, values: pd.DataFrame, norm: AsinhNorm) -> ScalarMappable:
    """The map, first layer on top; grey where there is no value, crossed out where it is not finite."""
    finite = np.isfinite(values.to_numpy())
    mesh = panel.pcolormesh(
        _edges(values.columns.to_numpy()),
        np.arange(len(values) + 1) - 0.5,
        np.ma.masked_where(~finite, values.to_numpy()),
        cmap=MAP,
        norm=norm,
        rasterized=True,
    )
    panel.set_facecolor("0.85")
    layer, alpha = np.nonzero(np.isinf(values.to_numpy()))
    if len(layer):
        panel.plot(values.columns.to_numpy()[alpha], layer, **NOT_FINITE)
    panel.set_ylim(len(values) - 0.5, -0.5)
    panel.tick_params(labelsize=8, labelleft=False, left=False)
    return mesh


def label(panel: Axes, names: Sequence[str]) -> None:
    """Names the rows: smaller where there are many, and only every so many where there are too many."""
    room = 72 * 0.85 * height(len(names)) / len(names)  # points
    step = math.ceil(_SMALLEST / room)
    panel.set_yticks(range(0, len(names), step), names[::step])
    panel.tick_params("y", labelleft=True, left=step > 1, labelsize=max(_SMALLEST, min(SMALL, room)))


def mark(panel: Axes, layers: Sequence[str], marked: Collection[str], style: Style, column: int = 0) -> None:
    """Marks some of the layers right of the map; columns keep several kinds of marks apart."""
    places = [place for place, name in enumerate(layers) if name in marked]
    if not places:
        return  # an empty line lies at the origin, and the layout makes room for it
    beside = panel.get_yaxis_transform() + points(panel, 5 + 8 * column, 0)
    panel.plot(np.ones(len(places)), places, transform=beside, clip_on=False, **style)


def scale(values: Sequence[pd.DataFrame], small: float) -> AsinhNorm:
    """Colours for all the maps, centred at zero: about linear up to a small value, logarithmic beyond."""
    found = np.abs(np.concatenate([table.to_numpy().ravel() for table in values]))
    largest = max(found[np.isfinite(found)], default=0.0) or small
    return AsinhNorm(linear_width=min(small, largest) / 2, vmin=-largest, vmax=largest)


def ticks(width: float, largest: float) -> np.ndarray:
    """Of a scale that is about linear up to a width: zero, the powers of ten, and the ends."""
    tens = 10.0 ** np.arange(np.ceil(np.log10(width)), np.log10(largest / 1.7))
    up = np.append(tens, largest)
    return np.concatenate([-up[::-1], [0], up])


def colorbar(figure: Figure, mesh: ScalarMappable, panels: np.ndarray, text: str) -> None:
    """The legend of the colours, right of the panels."""
    norm: Any = mesh.norm
    marks = ticks(norm.linear_width, norm.vmax)
    bar = figure.colorbar(mesh, ax=panels, aspect=30, shrink=0.5, pad=0.02, anchor=(0, 1), ticks=marks)
    bar.ax.set_yticklabels([f"{tick:.2g}" for tick in marks])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=8)
    bar.set_label(text, fontsize=9)


def _edges(alphas: np.ndarray) -> np.ndarray:
    """The borders of cells around positions: halfway to the next; as far on the outside."""
    if len(alphas) == 1:
        return np.array([alphas[0] - 0.5, alphas[0] + 0.5])
    middle = (alphas[1:] + alphas[:-1]) / 2
    return np.concatenate([[2 * alphas[0] - middle[0]], middle, [2 * alphas[-1] - middle[-1]]])
