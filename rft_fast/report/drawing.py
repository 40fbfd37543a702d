"""What the charts share: plotly's traces as plain dictionaries, in colours that the page names by theme.

A colour is a token that page.js replaces: ``@c0`` and on (one per model), ``@ink``, ``@grey``,
``@bad``, ``@good``, each with an opacity if need be: ``@c3/.15``. ``show`` says what each control of the
section may be for a trace to be drawn; ``ALL`` is a control's "all".
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from ..common.words import visible
from ..figures.heat import ticks

ALL = "*"
Trace = dict[str, Any]
SYMBOLS = "circle square triangle-up triangle-down diamond cross x triangle-left triangle-right".split()
FONT = 12


@dataclass(frozen=True)
class Control:
    """A selector: what it chooses by, and its options as (value, text); the first is chosen at first."""

    key: str
    label: str
    options: list[tuple[str, str]]


@dataclass(frozen=True)
class Chart:
    """One picture: ``alt`` says what it shows; ``wide`` takes the whole width of the page."""

    name: str
    title: str
    alt: str
    traces: list[Trace]
    layout: dict[str, Any]
    wide: bool = False


@dataclass(frozen=True)
class Key:
    """An entry of a legend: a model's number, or a token of colour, a symbol of plotly's, a dash."""

    text: str
    colour: str
    symbol: str = ""
    dash: str = ""


@dataclass(frozen=True)
class Picture:
    """The charts of a section, what they are chosen by, and what their signs mean."""

    controls: list[Control] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)


def choices(key: str, label: str, values: Iterable[Any], everything: str = "") -> Control:
    """A control over values; ``everything``: the words for all of them, which then come first."""
    options = [(str(value), str(value)) for value in dict.fromkeys(values)]
    first = [(ALL, everything)] if everything and len(options) > 1 else []
    return Control(key, label, first + options)


def safe(text: object) -> str:
    """Text for plotly, which reads a little HTML in what it draws."""
    return html.escape(visible(str(text), lines=True), quote=False)


def layout(x: str, y: str, height: int, **more: Any) -> dict[str, Any]:
    """Axes with their names; the colours are the page's."""
    found: dict[str, Any] = {
        "xaxis": {"title": {"text": x}},
        "yaxis": {"title": {"text": y}},
        "height": height,
        "margin": {"l": 56, "r": 16, "t": 32, "b": 46},
        "showlegend": False,
        "hovermode": "closest",
    }
    for name, value in more.items():
        found[name] = {**found.get(name, {}), **value} if isinstance(value, dict) else value
    return found


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
    """A curve with its points; errors are half an interval."""
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
    """An interval around a curve, as one closed shape; where it is not finite, there is none."""
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
    """A thin dotted line of reference."""
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
    """Layers down, alphas across; about linear up to a small value, logarithmic beyond, centred at zero."""
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
            "ticktext": [f"{tick:.2g}".replace("-", "\N{MINUS SIGN}") for tick in stops],
            "thickness": 10,
            "len": min(1.0, 300 / rows_height(len(values))),
            "y": 1,
            "yanchor": "top",
            "outlinewidth": 0,
        },
        "show": {},
    }


def rows_height(count: int) -> int:
    """Pixels for so many layers."""
    return 70 + count * (19 if count <= 60 else 12)


def layer_axis(names: Sequence[str]) -> dict[str, Any]:
    """An axis of layers, the first on top."""
    return {
        "title": {"text": ""},
        "tickmode": "array",
        "tickvals": list(range(len(names))),
        "ticktext": [safe(name) for name in names],
        "range": [len(names) - 0.5, -0.5],
        "automargin": True,
        "showgrid": False,
        "tickfont": {"size": 11 if len(names) <= 60 else 9},
    }


def marks(
    x: Sequence[float],
    y: Sequence[float],
    symbol: str,
    hover: Sequence[str],
    size: int = 8,
    colour: str = "@ink",
) -> Trace:
    """Signs beside or on a heat map."""
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
