"""How figures look: width, place of captions and style, chosen for a block of code."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import matplotlib
from cycler import cycler
from matplotlib.font_manager import FontProperties

from ..names import CAPTIONS, FIGURE_WIDTHS, Captions, FigureWidth, Names
from . import fonts, stylefile

# Paul Tol's "muted" scheme: nine colours that stay distinct under the common colour deficiencies.
MUTED = "#332288 #CC6677 #44AA99 #882255 #DDCC77 #117733 #88CCEE #AA4499 #999933".split()
# In inches: columns of journals and conferences are 3.3 to 3.5, pages 6.5 to 7.2.
WIDTHS: Mapping[FigureWidth, float] = {"one": 3.4, "two": 7.0}
_BASE: Mapping[str, Any] = {
    "axes.titlesize": "medium",
    "axes.labelsize": "medium",
    "xtick.labelsize": "small",
    "ytick.labelsize": "small",
    "legend.fontsize": "small",
    "legend.title_fontsize": "small",
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3,
    "axes.prop_cycle": cycler(color=MUTED),
    # Text stays text; the same figure gives the same bytes.
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "rft_fast",
}


@dataclass(frozen=True)
class Look:
    """How figures look.

    Attributes:
        width: ``"auto"``: as wide as the panels need; or that of ``"one"`` or ``"two"`` columns of a paper.
        captions: caption in a text ``"file"`` beside the figure, ``"in"`` the figure, or ``"none"``.
        style: settings of matplotlib, of a style file.
        models: names of models in the order of their colours; a figure with others has its own order.
        boxes: characters of names that no font has, which become boxes.
    """

    width: FigureWidth = "auto"
    captions: Captions = "in"
    style: Mapping[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = ()
    boxes: str = ""


_CURRENT: ContextVar[Look | None] = ContextVar("look", default=None)


def current() -> Look:
    """How figures look now."""
    return _CURRENT.get() or Look()


@contextmanager
def look(
    *,
    width: FigureWidth = "auto",
    captions: Captions = "in",
    style: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    models: Names = (),
) -> Iterator[None]:
    """Set how the figures look that are drawn in a ``with`` block.

    Args:
        width: as wide as the panels need, or the width of ``"one"`` (3.4 inches) or ``"two"`` (7 inches)
            columns of a paper.
        captions: ``"file"``: text file beside the figure, with its name and the ending ``.txt``, which is
            replaced; ``"in"``: above the panels; ``"none"``.
        style: style file of matplotlib, or what was read of it; None: ours. Other settings of matplotlib have
            no effect on figures.
        models: names of models, of which a figure may show some: each keeps its colour, by this order.

    Raises:
        OSError: as :func:`rft_fast.figures.stylefile.read`.
        TypeError: the style is neither a file nor what was read of it.
        ValueError: an unknown width or place of captions, or as :func:`rft_fast.figures.stylefile.read`.
    """
    if width not in FIGURE_WIDTHS:
        raise ValueError(f"figures.look: width: expected one of {', '.join(FIGURE_WIDTHS)}; got {width!r}")
    if captions not in CAPTIONS:
        raise ValueError(f"figures.look: captions: expected one of {', '.join(CAPTIONS)}; got {captions!r}")
    if not (style is None or isinstance(style, str | os.PathLike | Mapping)):
        raise TypeError(f"figures.look: style: expected a style file or None, got {style!r}")
    settings = style if isinstance(style, Mapping) else {} if style is None else stylefile.read(style)
    token = _CURRENT.set(Look(width, captions, settings, tuple(models)))
    try:
        yield
    finally:
        _CURRENT.reset(token)


@contextmanager
def applied(text: str, models: Names) -> Iterator[None]:
    """Apply the look to matplotlib's settings in a ``with`` block.

    Args:
        text: characters that fonts are needed for.
        models: :attr:`Look.models`, as they are shown.
    """
    before = current()
    settings: Any = matplotlib.rcParams
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # neither a matplotlibrc nor the caller's settings change a figure
        sizes = {"font.size": 9 if before.width == "auto" else 8}
        settings.update({**_BASE, **sizes, **before.style})
        families = fonts.installed(before.style)
        more, boxes = fonts.covering(text, families)
        settings["font.family"] = [*families, *more]
        token = _CURRENT.set(replace(before, models=tuple(models), boxes="".join(boxes)))
        try:
            yield
        finally:
            _CURRENT.reset(token)


_SIZES = {
    "title": "axes.titlesize",
    "label": "axes.labelsize",
    "small": "legend.fontsize",
    "x": "xtick.labelsize",
    "y": "ytick.labelsize",
}
Size = Literal["title", "label", "small", "x", "y"]


def in_points(size: Size) -> float:
    """A size of text in points, by the look in use. x, y: labels of ticks."""
    settings: Any = matplotlib.rcParams
    return float(FontProperties(size=settings[_SIZES[size]]).get_size_in_points())
