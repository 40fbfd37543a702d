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

from ..common.words import signed
from .looks import current, in_points
from .style import GREY, Style, fix_ticks, points

MAP = "RdBu_r"  # diverging, symmetric in lightness, safe for colour deficiencies
STRAGGLER: Style = {"ls": "", "marker": "<", "ms": 5, "color": "black", "mew": 0}
NOT_FINITE: Style = {"ls": "", "marker": "x", "ms": 4, "color": GREY}
_SMALLEST = 5.0  # points, the smallest legible label


def height(layers: int) -> float:
    """Height of a map in inches: generous for few layers, at most what a page and the labels allow."""
    row = 0.11 if current().width == "one" else 0.16
    return min(max(row * layers, 0.8), max(9.0, 0.085 * layers), 14.0)


def grid(rows: pd.DataFrame, column: str, layers: Sequence[str]) -> pd.DataFrame:
    """Pivot a column of rows to layers (in the given order) by alphas (ascending).

    NaN where there is no row; infinite where a value was measured but is not a number.
    """
    table = rows.fillna({column: np.inf}).pivot(index="layer", columns="alpha", values=column)
    return table.reindex(list(layers)).sort_index(axis=1)


def draw(panel: Axes, values: pd.DataFrame, norm: AsinhNorm) -> ScalarMappable:
    """Draw the map, first layer on top: grey without a value, crossed out where not finite."""
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
    fix_ticks(panel)
    panel.tick_params(labelleft=False, left=False)
    panel.grid(False)
    return mesh


def label(panel: Axes, names: Sequence[str]) -> None:
    """Label the layers, in smaller type if there are many; if there are too many, only every n-th."""
    room = 72 * 0.85 * height(len(names)) / len(names)  # points
    step = math.ceil(_SMALLEST / room)
    panel.set_yticks(range(0, len(names), step), names[::step])
    panel.tick_params(
        "y", labelleft=True, left=step > 1, labelsize=max(_SMALLEST, min(in_points("small"), room))
    )


def mark(panel: Axes, layers: Sequence[str], marked: Collection[str], style: Style, column: int = 0) -> None:
    """Mark some layers to the right of the map; ``column`` separates several kinds of marks."""
    places = [place for place, name in enumerate(layers) if name in marked]
    if not places:
        return  # an empty line would lie at the origin, and the layout would make room for it
    beside = panel.get_yaxis_transform() + points(panel, 5 + 8 * column, 0)
    panel.plot(np.ones(len(places)), places, transform=beside, clip_on=False, **style)


def scale(values: Sequence[pd.DataFrame], small: float) -> AsinhNorm:
    """Colour scale for all maps, centred at zero: about linear up to ``small``, logarithmic beyond."""
    found = np.abs(np.concatenate([table.to_numpy().ravel() for table in values]))
    largest = max(found[np.isfinite(found)], default=0.0) or small
    return AsinhNorm(linear_width=min(small, largest) / 2, vmin=-largest, vmax=largest)


def ticks(width: float, largest: float) -> np.ndarray:
    """Ticks of such a scale: zero, powers of ten above ``width``, and the ends."""
    tens = 10.0 ** np.arange(np.ceil(np.log10(width)), np.log10(largest / 1.7))
    up = np.append(tens, largest)
    return np.concatenate([-up[::-1], [0], up])


def colorbar(figure: Figure, mesh: ScalarMappable, panels: Sequence[Axes], text: str) -> None:
    """Add the colour bar to the right of the panels, or below them in a figure of one column."""
    norm: Any = mesh.norm
    below = current().width == "one"
    marks = ticks(norm.linear_width, norm.vmax)
    where: Style = {"pad": 0.02, "shrink": 0.5, "anchor": (0, 1)}
    if below:
        marks = marks[(marks == 0) | (np.abs(marks) > norm.vmax / 20)]
        where = {"pad": 0.01, "shrink": 0.8, "location": "bottom"}
    bar = figure.colorbar(mesh, ax=list(panels), aspect=30, ticks=marks, **where)
    bar.set_ticklabels([signed(f"{tick:.2g}") for tick in marks])
    bar.ax.minorticks_off()
    fix_ticks(bar.ax)
    bar.set_label(f"{text}{' ' if below else chr(10)}(nats, asinh scale)")


def _edges(alphas: np.ndarray) -> np.ndarray:
    """Borders of the cells: halfway between positions, and as far on the outside."""
    if len(alphas) == 1:
        return np.array([alphas[0] - 0.5, alphas[0] + 0.5])
    middle = (alphas[1:] + alphas[:-1]) / 2
    return np.concatenate([[2 * alphas[0] - middle[0]], middle, [2 * alphas[-1] - middle[-1]]])
