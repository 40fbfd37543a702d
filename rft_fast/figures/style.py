"""What figures share: colours, panels, legends, captions, and how they are saved."""

from __future__ import annotations

import functools
import math
import os
import pathlib
import re
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
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
from .looks import MUTED, WIDTHS, Size, applied, current, in_points

GREY = "0.3"
LINE = 0.15  # inches, height of a line of a title
_UNDATED: Mapping[str, Mapping[str, None]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
_ALIKE = 1 / 3  # part of a shared axis that the curves of every panel must fill

_SYMBOLS = {r"\alpha": "α", r"\rho": "ρ", r"\tau": "τ", r"\xi": "ξ", r"\pm": "±"}

_P = ParamSpec("_P")
Style = dict[str, Any]
Place = Literal["outside upper center", "outside lower center"]
BEATS: Style = {"ls": "-", "marker": "o"}
UNDECIDED: Style = {"ls": "-.", "marker": "o"}
FAILS: Style = {"ls": (0, (3.5, 1.5)), "marker": "o", "ms": 3.5, "mfc": "white"}
SATURATED: Style = {"ls": "", "marker": "D", "ms": 5, "mfc": "none", "mec": "black", "mew": 0.8}
SATURATED_EXPLAINED = (
    "Saturated: the perturbed model answers at chance, so sharpness says nothing about flatness."
)
ZERO_SHOT: Style = {"ls": ":", "lw": 1, "color": GREY}


def curve_styles() -> list[Style]:
    """Nine styles of curves, distinct by line style and marker, too."""
    kinds = zip(cycle(_palette()), "os^vDPX<>", ["-", "--", "-."] * 3)
    return [{"color": colour, "marker": marker, "ls": line} for colour, marker, line in kinds]


def canvas(width: float, height: float) -> Figure:
    """Create an empty figure, which needs no display.

    Args:
        width: in inches, where the look does not fix it.
        height: in inches.
    """
    width = WIDTHS.get(current().width, width)
    figure = Figure(figsize=(width, height), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def side_by_side(figure: Figure, count: int, margin: float, least: float) -> int:
    """How many of some panels stand side by side: all of them, if the look does not fix the width.

    Args:
        figure: the figure.
        count: number of panels.
        margin: inches of its width without panels.
        least: width in inches of a panel with its labels.
    """
    if current().width == "auto":
        return count
    return max(1, min(count, int((figure.get_figwidth() - margin) / least)))


def arrange(
    figure: Figure, count: int, per: int, groups: int = 1, heights: Sequence[float] = (1,), **how: Any
) -> list[list[Any]]:
    """Make groups of columns of panels; a group takes several lines if not all columns fit side by side.

    Args:
        figure: the figure.
        count: columns of a group.
        per: columns side by side (:func:`side_by_side`).
        groups: number of groups, one above the other.
        heights: relative heights of the panels of a column.
        how: as for :meth:`matplotlib.figure.Figure.subplots`.

    Returns:
        Group -> column -> its panels, from top to bottom.
    """
    rows, lines = len(heights), math.ceil(count / per)
    grid = figure.subplots(
        groups * lines * rows, per, squeeze=False, height_ratios=[*heights] * (groups * lines), **how
    )
    found: list[list[Any]] = [[] for _ in range(groups)]
    for group, columns in enumerate(found):
        for place in range(lines * per):
            line, across = divmod(place, per)
            top = (group * lines + line) * rows
            column = grid[top : top + rows, across]
            if place < count:
                columns.append(column)
                column[-1].tick_params("x", labelbottom=True)
            else:
                for panel in column:
                    panel.remove()
    return found


def level(panels: Sequence[Axes]) -> None:
    """Give the panels of a row the same vertical axis, or mark the row where that would flatten a panel.

    Args:
        panels: from left to right, with all that they show; the first one has the label of the axis.
    """
    limits = [panel.get_ylim() for panel in panels]
    low, high = min(low for low, _ in limits), max(high for _, high in limits)
    first, *others = panels
    if min(high - low for low, high in limits) < _ALIKE * (high - low):
        first.set_ylabel("\n".join(filter(None, [first.get_ylabel(), "(scales differ)"])))
        return
    for panel in panels:
        panel.set_ylim(low, high)
    for panel in others:
        panel.tick_params("y", labelleft=False)


def drawing(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """Decorate a drawing function so that any names are shown as they are.

    ``$`` does not start a formula, control characters are escaped, characters that the style's fonts lack
    come from others, and those that all fonts lack become boxes, which the caption says.
    """

    @functools.wraps(draw)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        shown: dict[str, str] = {}
        changed: Any = [_shown(value, shown) for value in args]
        named: Any = {key: value if key == "file" else _shown(value, shown) for key, value in kwargs.items()}
        text = "".join(shown.values())
        with applied(text, _shown(current().models, shown)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from")
            return draw(*changed, **named)

    return run


def _shown(value: Any, shown: dict[str, str]) -> Any:
    """Escape the names in facts, tables and lists of names; different names stay different."""

    def name(text: Any) -> Any:
        if not isinstance(text, str) or (new := visible(text).replace("$", r"\$")) == text:
            if isinstance(text, str) and not text.isascii():
                shown.setdefault(text, text)
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
    """Prepare a panel of curves: no spines at the top and right, unless a style file sets them."""
    fix_ticks(panel)
    for side in ("top", "right"):
        panel.spines[side].set_visible(current().style.get(f"axes.spines.{side}", False))


def fix_ticks(panel: Axes) -> None:
    """Fix the sizes of tick labels, by which ticks are chosen, for later uses of the figure."""
    panel.tick_params("x", labelsize=in_points("x"))
    panel.tick_params("y", labelsize=in_points("y"))


def points(panel: Axes, x: float, y: float) -> ScaledTranslation:
    """Offset in points, for marks beside a panel."""
    figure: Any = panel.get_figure()
    return ScaledTranslation(x / 72, y / 72, figure.dpi_scale_trans)


def colours(count: int) -> list[Any]:
    """Distinct colours, nine or those of the style; for more models, an even scale in their order."""
    if count <= len(palette := _palette()):
        return palette[:count]
    return list(colormaps["viridis"](np.linspace(0, 0.9, count)))


def palette(models: Sequence[str]) -> dict[str, Any]:
    """Model -> its colour: by its place among the models of the look, or else among these."""
    known = current().models
    order = known if set(models) <= set(known) else models
    found = dict(zip(order, colours(len(order)), strict=True))
    return {model: found[model] for model in models}


def _palette() -> list[str]:
    chosen = current().style.get("axes.prop_cycle")
    return list(MUTED if chosen is None else chosen.by_key()["color"])


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
        legend: Legend = figure.legend(handles=handles, loc=place, ncols=columns)
        legend.set_title(title)
        legend.get_title().set_multialignment("center")
        return legend

    legend = make(len(handles))
    if legend.get_window_extent().width > figure.bbox.width:
        legend.remove()
        legend = make(1)  # as wide as the widest entry
        spacing = legend.columnspacing * in_points("small") * figure.dpi / 72
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
    """Add legends, set the final height, and save the figure and its caption atomically.

    Args:
        figure: the figure.
        file: output file; its extension selects the format.
        height: height without the legends, in inches.
        marks: entries of the legend above the panels.
        note: the caption; above those entries, or in a text file, by the look.
        names: entries of the legend below the panels.
    """
    where = current()
    note = " ".join(f"{note} {_boxes(where.boxes)}".split())
    title = wrap(figure, note) if where.captions == "in" else ""
    legends = legend(figure, "outside upper center", marks, title)
    if names:
        legends += legend(figure, "outside lower center", names)
    figure.set_figheight(height + legends)
    file = pathlib.Path(file)
    kind = file.suffix[1:] or "png"
    with disk.replacing(file) as temporary:
        figure.savefig(temporary, format=kind, metadata=_UNDATED.get(kind))
    if where.captions == "file":
        disk.replace(caption_file(file), f"{plain_text(note)}\n".encode())
    return figure


def caption_file(figure: pathlib.Path) -> pathlib.Path:
    """The file with the caption of a figure."""
    return figure.with_suffix(".txt")


def _boxes(characters: str) -> str:
    return (
        f"No font that is installed here has the characters {characters}, which are shown as boxes."
        if characters
        else ""
    )


def plain_text(text: str) -> str:
    """A caption with characters instead of its formulas, which have single symbols only."""

    def characters(formula: re.Match[str]) -> str:
        return re.sub(r"\\[a-z]+", lambda name: _SYMBOLS.get(name[0], name[0]), formula[1])

    return re.sub(r"(?<!\\)\$(.*?)(?<!\\)\$", characters, text).replace(r"\$", "$")


def wrap(figure: Figure, *sentences: str) -> str:
    """Join sentences and wrap them to the figure's width; empty ones are left out."""
    text = " ".join(filter(None, sentences))
    return textwrap.fill(text, int(18 * figure.get_figwidth()), break_on_hyphens=False)


def fold(name: str, inches: float, size: Size = "small") -> str:
    """Break a name into lines of this width and similar length, at separators if possible.

    Nothing is left out.
    """
    wide = sum(unicodedata.east_asian_width(one) in "WF" for one in name) / max(1, len(name))
    least = int(8 / (1 + wide))
    most = max(least, int(110 * inches / in_points(size) / (1 + wide)))
    if len(name) <= most:
        return name
    lines = _folded(name, most)
    widths = range(max(least, math.ceil(len(name) / len(lines))), most)
    even = (folded for width in widths if len(folded := _folded(name, width)) == len(lines))
    return "\n".join(next(even, lines))


def _folded(name: str, most: int) -> list[str]:
    one = r"(?:\\\$|\\(?!\$)|[^\\])"  # an escaped dollar stays one character
    pattern = rf"{one}{{1,{most}}}\Z|{one}{{{most // 2},{most}}}(?<=[/ _.-])|{one}{{1,{most}}}"
    return re.findall(pattern, name)


def headings(
    names: Sequence[str], figure: Figure, margin: float, size: Size, per: int | None = None
) -> list[str]:
    """Fold names of columns to their width.

    Args:
        names: the names.
        figure: the figure.
        margin: inches of its width without columns.
        size: size of the text.
        per: columns side by side; None: all.
    """
    return [fold(name, (figure.get_figwidth() - margin) / (per or len(names)), size) for name in names]


def extra(names: Iterable[str], lines: int = 1) -> float:
    """Height in inches that the longest of some folded names needs beyond so many lines."""
    return LINE * max(0, max((name.count("\n") + 1 for name in names), default=0) - lines)


def margin(rows: pd.DataFrame, of: str = "sharpness") -> pd.Series:
    """Half-width of the 95 % interval of each sharpness: 0 if it is exact, NaN without a standard error.

    Args:
        rows: rows of a sharpness.
        of: column of the values.
    """
    error = rows[f"{of}_se"]
    return (student_t(rows, of) * error).where(error != 0, 0.0)
