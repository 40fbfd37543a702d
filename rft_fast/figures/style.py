"""What figures share: colours, sizes, legends, and the description of a measurement in words."""

from __future__ import annotations

import functools
import math
import os
import pathlib
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, ParamSpec

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from ..common import disk
from ..common.words import visible
from ..studies.facts import Facts
from ..studies.sharpness import student_t

# Paul Tol's "muted" scheme: nine colours that stay distinct under the common colour deficiencies.
MUTED = "#332288 #CC6677 #44AA99 #882255 #DDCC77 #117733 #88CCEE #AA4499 #999933".split()
GREY = "0.3"
SMALL = 7.5  # points
LINE = 0.15  # inches, height of a line of a title

_P = ParamSpec("_P")
Style = dict[str, Any]
Place = Literal["outside upper center", "outside lower center"]
BEATS: Style = {"ls": "-", "lw": 1.2, "marker": "o", "ms": 3}
FAILS: Style = {"ls": (0, (3.5, 1.5)), "lw": 1.2, "marker": "o", "ms": 3.5, "mfc": "white"}
ZERO_SHOT: Style = {"ls": ":", "lw": 1, "color": GREY}
# Distinct by line style and marker, too.
CURVES: list[Style] = [
    {"color": colour, "marker": marker, "ls": line, "lw": 1.2, "ms": 3}
    for colour, marker, line in zip(MUTED, "os^vDPX<>", ["-", "--", "-."] * 3, strict=True)
]


def canvas(width: float, height: float) -> Figure:
    """Create an empty figure of this size in inches, which needs no display."""
    figure = Figure(figsize=(width, height), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def drawing(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """Decorate a drawing function so that any names are shown as they are.

    ``$`` does not start a formula, control characters are escaped, and characters that the font lacks become
    boxes without a warning for each.
    """

    @functools.wraps(draw)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        shown: dict[str, str] = {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from")
            changed: Any = [_shown(value, shown) for value in args]
            named: Any = {
                key: value if key == "file" else _shown(value, shown) for key, value in kwargs.items()
            }
            return draw(*changed, **named)

    return run


def _shown(value: Any, shown: dict[str, str]) -> Any:
    """Escape the names in facts, tables and lists of names; different names stay different."""

    def name(text: Any) -> Any:
        if not isinstance(text, str) or (new := visible(text).replace("$", r"\$")) == text:
            return text
        while text not in shown and new in shown.values():  # different names stay different
            new += "'"
        return shown.setdefault(text, new)

    if isinstance(value, Facts):
        rows = _shown(value.rows, shown)
        return value if rows is value.rows else value.renamed(rows)
    if isinstance(value, list | tuple):
        return type(value)(map(name, value))
    if isinstance(value, pd.DataFrame):
        odd = [c for c in value if any(name(text) is not text for text in pd.unique(value[c]))]
        if not odd:
            return value
        return value.assign(**{column: value[column].map(name, na_action="ignore") for column in odd})
    return value


def plain(panel: Axes) -> None:
    """Set small tick labels and remove the spines at the top and right."""
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def points(panel: Axes, x: float, y: float) -> ScaledTranslation:
    """Offset in points, for marks beside a panel."""
    figure: Any = panel.get_figure()
    return ScaledTranslation(x / 72, y / 72, figure.dpi_scale_trans)


def colours(count: int) -> list[Any]:
    """Nine distinct colours; for more models, an even scale in their order."""
    if count <= len(MUTED):
        return list(MUTED[:count])
    return list(colormaps["viridis"](np.linspace(0, 0.9, count)))


def swatches(palette: Mapping[str, Any]) -> list[Line2D]:
    """Legend entries that name the models of a palette."""
    return [key(model, {"lw": 3}, color=colour) for model, colour in palette.items()]


def curve(
    panel: Axes, x: Any, y: Any, low: Any, high: Any, shade: float = 0.15, **style: Any
) -> list[Line2D]:
    """Draw a line in a band of its colour; ``shade`` is the opacity of the band."""
    line = panel.plot(x, y, **style)
    panel.fill_between(x, low, high, color=style["color"], alpha=shade, lw=0)
    return line


def key(label: str, style: Style, **other: Any) -> Line2D:
    """Create a legend entry."""
    return Line2D([], [], label=label, **{"color": GREY, **style, **other})


def legend(figure: Figure, place: Place, handles: Sequence[Line2D], title: str = "") -> float:
    """Add a legend in as few lines as the figure's width allows; return its height in inches."""
    for handle in handles:
        handle.set_label(fold(str(handle.get_label()), figure.get_figwidth() - 0.6))

    def make(columns: int) -> Legend:
        legend: Legend = figure.legend(
            handles=handles, loc=place, ncols=columns, fontsize=SMALL, frameon=False
        )
        legend.set_title(title)
        legend.get_title().set_fontsize(SMALL)
        legend.get_title().set_multialignment("center")
        return legend

    legend = make(len(handles))
    if legend.get_window_extent().width > figure.bbox.width:
        legend.remove()
        legend = make(1)  # as wide as the widest entry
        spacing = legend.columnspacing * SMALL * figure.dpi / 72
        fitting = max(1, figure.bbox.width // (legend.get_window_extent().width + spacing))
        legend.remove()
        lines = math.ceil(len(handles) / fitting)
        legend = make(math.ceil(len(handles) / lines))
    return float(legend.get_window_extent().height / figure.dpi)


def finish(
    figure: Figure,
    file: str | os.PathLike[str],
    height: float,
    marks: Sequence[Line2D],
    note: str,
    names: Sequence[Line2D] = (),
) -> Figure:
    """Add legends, set the final height, and save the figure atomically.

    Args:
        figure: the figure.
        file: output file; its extension selects the format.
        height: height without the legends, in inches.
        marks: entries of the legend above the panels.
        note: text above those entries.
        names: entries of the legend below the panels.
    """
    legends = legend(figure, "outside upper center", marks, note)
    if names:
        legends += legend(figure, "outside lower center", names)
    figure.set_figheight(height + legends)
    file = pathlib.Path(file)
    with disk.replacing(file) as temporary:
        figure.savefig(temporary, format=file.suffix[1:] or "png")
    return figure


def wrap(figure: Figure, *sentences: str) -> str:
    """Join sentences and wrap them to the figure's width; empty ones are left out."""
    return textwrap.fill(" ".join(filter(None, sentences)), int(18 * figure.get_figwidth()))


def fold(name: str, inches: float, size: float = SMALL) -> str:
    """Break a name into lines of this width, at separators if possible, without abbreviation."""
    most = max(8, int(110 * inches / size))
    one = r"(?:\\\$|\\(?!\$)|[^\\])"  # an escaped dollar stays one character
    pattern = rf"{one}{{1,{most}}}\Z|{one}{{{most // 2},{most}}}(?<=[/ _.-])|{one}{{1,{most}}}"
    return name if len(name) <= most else "\n".join(re.findall(pattern, name))


def headings(names: Sequence[str], figure: Figure, margin: float, size: float) -> list[str]:
    """Fold names of columns to their width; ``margin``: inches of the figure's width without columns."""
    return [fold(name, (figure.get_figwidth() - margin) / len(names), size) for name in names]


def extra(names: Iterable[str], lines: int = 1) -> float:
    """Height in inches that the longest of some folded names needs beyond so many lines."""
    return LINE * max(0, max((name.count("\n") + 1 for name in names), default=0) - lines)


def margin(rows: pd.DataFrame) -> pd.Series:
    """Half-width of the 95 % interval of each sharpness: 0 if it is exact, NaN without a standard error."""
    error = rows["sharpness_se"]
    return (student_t(rows) * error).where(error != 0, 0.0)
