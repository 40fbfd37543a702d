"""Building blocks of charts: plotly traces as plain dictionaries.

Colours are tokens that page.js replaces by those of the theme: ``@c0``, ``@c1`` and so on (one per model),
``@ink``, ``@grey``, ``@bad``, ``@good``, each with an optional opacity: ``@c3/.15``. ``show`` of a trace
lists the values of each control of the section for which it is drawn; ``ALL`` is a control's "all".
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from ..common.words import signed, visible
from ..figures.heat import ticks

# Words in letters that run from right to left, with what joins them.
RIGHT_TO_LEFT = re.compile(r"[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc](?:[\w.-]*\w)?")
ALL = "*"
Trace = dict[str, Any]
SYMBOLS = "circle square triangle-up triangle-down diamond cross x triangle-left triangle-right".split()
SATURATED = "star-open"
FONT = 12


@dataclass(frozen=True)
class Control:
    """A selector with options (value, text), of which the first is selected initially."""

    key: str
    label: str
    options: list[tuple[str, str]]


@dataclass(frozen=True)
class Chart:
    """One picture; ``alt`` describes it, ``wide`` gives it the full width of the page."""

    name: str
    title: str
    alt: str
    traces: list[Trace]
    layout: dict[str, Any]
    wide: bool = False


@dataclass(frozen=True)
class Key:
    """An entry of a legend: text, colour token, plotly symbol and dash."""

    text: str
    colour: str
    symbol: str = ""
    dash: str = ""


@dataclass(frozen=True)
class Picture:
    """The charts of a section, with their controls and legend."""

    controls: list[Control] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)


def choices(key: str, label: str, values: Iterable[Any], everything: str = "") -> Control:
    """Create a control of these values; ``everything``: text of an option for all, which comes first."""
    options = [(str(value), str(value)) for value in dict.fromkeys(values)]
    first = [(ALL, everything)] if everything and len(options) > 1 else []
    return Control(key, label, first + options)


def safe(text: object) -> str:
    """Escape text for plotly, which interprets some HTML; numbers after Hebrew or Arabic stay after it."""
    return RIGHT_TO_LEFT.sub(
        "\N{FIRST STRONG ISOLATE}\\g<0>\N{POP DIRECTIONAL ISOLATE}",
        html.escape(visible(str(text), lines=True), quote=False),
    )


def layout(x: str, y: str, height: int, **more: Any) -> dict[str, Any]:
    """Create a plotly layout with titled axes; the page adds the colours."""
    made: dict[str, Any] = {
        "xaxis": {"title": {"text": x}},
        "yaxis": {"title": {"text": y}},
        "height": height,
        "margin": {"l": 56, "r": 16, "t": 32, "b": 46},
        "showlegend": False,
        "hovermode": "closest",
    }
    for name, value in more.items():
        made[name] = {**made.get(name, {}), **value} if isinstance(value, dict) else value
    return made


def line(
    x: Sequence[float],
    y: Sequence[float],
    hover: Sequence[str],
    show: Mapping[str, Sequence[str]],
    colour: str,
    symbol: str = "circle",
    dash: str = "solid",
    error: Sequence[float] | None = None,
    across: Sequence[float] | None = None,
    mode: str = "lines+markers",
    name: str = "",
) -> Trace:
    """Create a curve; ``error`` and ``across`` are half-widths of vertical and horizontal bars."""
    trace: Trace = {
        "type": "scatter",
        "mode": mode,
        "name": safe(name),
        "x": list(x),
        "y": list(y),
        "line": {"color": colour, "width": 1.8, "dash": dash},
        "marker": {"color": colour, "size": 7, "symbol": symbol, "line": {"width": 1.2, "color": colour}},
        "hoverinfo": "text",
        "hovertext": list(hover),
        "show": {key: list(values) for key, values in show.items()},
    }
    bars = {"color": f"{colour}/.45", "thickness": 1.2, "width": 0}
    if error is not None:
        trace["error_y"] = {"array": list(error), **bars}
    if across is not None:
        trace["error_x"] = {"array": list(across), **bars}
    return trace


def band(
    x: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    show: Mapping[str, Sequence[str]],
    colour: str,
) -> Trace:
    """Create a band around a curve, without the points where it is not finite."""
    points = [
        (a, b, c) for a, b, c in zip(x, low, high, strict=True) if math.isfinite(b) and math.isfinite(c)
    ]
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [a for a, _, _ in points] + [a for a, _, _ in reversed(points)],
        "y": [b for _, b, _ in points] + [c for _, _, c in reversed(points)],
        "fill": "toself",
        "fillcolor": f"{colour}/.16",
        "line": {"width": 0},
        "hoverinfo": "skip",
        "showlegend": False,
        "show": {key: list(values) for key, values in show.items()},
    }


def rule(x: Sequence[float], y: Sequence[float], show: Mapping[str, Sequence[str]] | None = None) -> Trace:
    """Create a thin dotted reference line."""
    return {
        "type": "scatter",
        "mode": "lines",
        "x": list(x),
        "y": list(y),
        "line": {"color": "@grey", "width": 1.2, "dash": "dot"},
        "hoverinfo": "skip",
        "show": {key: list(values) for key, values in (show or {}).items()},
    }


def heat(values: pd.DataFrame, small: float, largest: float, hover: list[list[str]], what: str) -> Trace:
    """Create a heat map, layers down and alphas across.

    Colours are centred at zero, about linear up to ``small`` and logarithmic beyond.
    """
    width = min(small, largest) / 2
    top = math.asinh(largest / width)
    stops = ticks(width, largest)
    return {
        "type": "heatmap",
        "z": np.arcsinh(values.to_numpy(dtype=float) / width).tolist(),
        "zmin": -top,
        "zmax": top,
        "colorscale": "@diverging",
        "xgap": 1,
        "ygap": 1,
        "hoverinfo": "text",
        "hovertext": hover,
        "colorbar": {
            "title": {"text": what, "side": "right"},
            "tickvals": [math.asinh(tick / width) for tick in stops],
            "ticktext": [signed(f"{tick:.2g}") for tick in stops],
            "thickness": 10,
            "len": min(1.0, 300 / rows_height(len(values))),
            "y": 1,
            "yanchor": "top",
            "outlinewidth": 0,
        },
        "show": {},
    }


def rows_height(count: int) -> int:
    """Return the height in pixels of a chart with so many layers."""
    return max(70 + count * _row(count), 190)  # room for the colour bar


def _row(count: int) -> int:
    return 19 if count <= 60 else 12


def of_layers(names: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
    """Create the parts of a layout with one line for each layer, the first on top.

    Args:
        names: names of the layers, by which they are found.
        texts: what the axis shows of each.
    """
    axis = {
        "title": {"text": ""},
        "tickmode": "array",
        "tickvals": list(range(len(texts))),
        "ticktext": [safe(text) for text in texts],
        "range": [len(texts) - 0.5, -0.5],
        "automargin": True,
        "showgrid": False,
        "tickfont": {"size": 11 if len(texts) <= 60 else 9},
    }
    return {"yaxis": axis, "meta": {"names": list(names), "row": _row(len(texts))}}


def marks(
    x: Sequence[float],
    y: Sequence[float],
    symbol: str,
    hover: Sequence[str],
    size: int = 8,
    colour: str = "@ink",
) -> Trace:
    """Create marks beside or on a heat map."""
    return {
        "type": "scatter",
        "mode": "markers",
        "x": list(x),
        "y": list(y),
        "marker": {"symbol": symbol, "size": size, "color": colour, "line": {"width": 1, "color": colour}},
        "hoverinfo": "text" if hover else "skip",
        "hovertext": list(hover),
        "cliponaxis": False,
        "show": {},
    }
