"""Figure 1: accuracy and loss along the whole path."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..common.words import signed
from ..studies.facts import Facts, as_facts
from ..studies.gains import BONFERRONI, MAX_T
from ..studies.interpolate import STUDY, Z95
from ..studies.verdicts import Mode, mode, shape
from .captions import not_finite
from .looks import current
from .style import (
    BEATS,
    FAILS,
    UNDECIDED,
    ZERO_SHOT,
    Style,
    arrange,
    canvas,
    curve,
    drawing,
    extra,
    finish,
    headings,
    key,
    level,
    palette,
    plain,
    side_by_side,
    swatches,
)

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
    name: str  # of the change, in words

    def called(self, fact: Mapping[Any, Any]) -> str:
        """Name of a change: a rise in loss is a barrier only where the loss has a bump over its chord."""
        return "barrier" if self.change == "barrier" and shape(fact) == "bump" else self.name

    def range(self, fact: Mapping[Any, Any]) -> str:
        """Bounds of a gain, or the pointwise interval of a rise in loss."""
        if self.change == "gain":
            low, high = (signed(format(100 * fact[end], "+.1f")) for end in ("gain_low", "gain_high"))
            return f"[{low}, {high}]"
        return f"$\\pm$ {self.scale * Z95 * fact[f'{self.change}_se']:.{self.digits}f}"


_STYLES: dict[Mode, Style] = {"high gain": BEATS, "gain": BEATS, "undecided": UNDECIDED, "failure": FAILS}
_ACCURACY = _Quantity("accuracy", "gain_se", "gain", "best_alpha", 100, 1, _STAR, "gain")
_LOSS = _Quantity("loss", "rise_se", "barrier", "barrier_alpha", 1, 2, _TRIANGLE, "rise")


@drawing
def interpolation(rows: pd.DataFrame | Facts, file: str | os.PathLike[str]) -> Figure:
    """Draw accuracy (top) and loss (bottom) over alpha, as in Figure 1; one column per data set.

    One colour per model; the line shows the mode (:func:`rft_fast.studies.verdicts.mode`), dashed with open
    markers for a failure. A star marks the best alpha if one has a higher accuracy than zero-shot, a triangle
    the highest loss if it lies above zero-shot. The largest gain of each data set is annotated with its
    bounds, the largest rise in loss with its 95 % interval; a rise is called a barrier where the loss has a
    bump. Bands show the difference to zero-shot, paired over samples: of accuracy by bounds for all positions
    at once (:func:`rft_fast.studies.gain_bounds`), of the loss by pointwise 95 % intervals. Losses that are
    not finite leave gaps and are counted below the figure.

    Args:
        rows: rows of :func:`rft_fast.studies.interpolation`, for complete paths; or their facts.
        file: output file; its extension selects the format.

    Returns:
        The figure, which is already saved.

    Raises:
        ValueError: :func:`rft_fast.studies.summarize` refuses the rows.
    """
    facts = as_facts(rows)
    summary, rows = facts.path, facts.part(STUDY).sort_values("alpha", kind="stable")
    models, datasets = list(summary["model"].unique()), list(summary["dataset"].unique())
    of_models = palette(models)

    figure = canvas(max(7.0, 0.7 + 2.3 * len(datasets)), 5)
    narrow = current().width == "one"  # accuracy and loss side by side
    per = 1 if narrow else side_by_side(figure, len(datasets), 0.7, 1.45)
    if narrow:
        pairs = arrange(figure, 2, 2, len(datasets), sharex=True)
        panels = [(top, bottom) for ((top,), (bottom,)) in pairs]
    else:
        (panels,) = arrange(figure, len(datasets), per, heights=(1, 1), sharex=True)
    titles = headings(datasets, figure, 0.7, "title", per)
    for (top, bottom), dataset, title in zip(panels, datasets, titles, strict=True):
        curves = rows[rows["dataset"] == dataset]
        here = summary[summary["dataset"] == dataset]
        where = "" if here["ood"].iloc[0] else "in distribution, "
        images = f"({where}{here['samples'].iloc[0]:,} images)"
        top.set_title(f"{title}\n{images}", loc="left" if narrow else "center")
        bottom.set_xlabel(r"$\alpha$")
        _draw(top, curves, here, facts.bounds, of_models, _ACCURACY)
        _draw(bottom, curves, here, facts.bounds, of_models, _LOSS)
    lines = [panels[start : start + per] for start in range(0, len(panels), per)]
    for line in lines:
        for row, label in zip(zip(*line, strict=True), ("accuracy (%)", "loss (nats)"), strict=True):
            row[0].set_ylabel(label)
            level(row)
    marks = [
        key("zero-shot", ZERO_SHOT),
        key("beats zero-shot", BEATS),
        key("undecided", UNDECIDED),
        key("failure: no high gain is possible", FAILS),
        key(r"best $\alpha$", _STAR),
        key("highest loss", _TRIANGLE),
    ]
    height = {"auto": 4.6, "two": 3.7, "one": 1.65}[current().width]
    height = (height + extra(titles)) * len(lines)
    return finish(figure, file, height, marks, _note(rows, summary), swatches(of_models))


def _draw(
    panel: Axes,
    rows: pd.DataFrame,
    facts: pd.DataFrame,
    bounds: pd.DataFrame,
    palette: Mapping[str, Any],
    what: _Quantity,
) -> None:
    """Draw one quantity of every model on one data set, and annotate its largest change."""
    plain(panel)
    for start in rows.loc[rows["alpha"] == 0, what.value].unique():
        panel.axhline(what.scale * start, zorder=1, **ZERO_SHOT)
    largest, text = 0.0, f"no {what.name}"
    for fact in facts.to_dict("records"):
        own = rows[rows["model"] == fact["model"]]
        alpha, value = own["alpha"].to_numpy(), what.scale * own[what.value].to_numpy()
        margin = what.scale * Z95 * own[what.band].to_numpy()
        line = {"color": palette[fact["model"]], "label": fact["model"], "zorder": 3}
        line |= _STYLES[mode(fact)]
        low, high = value - margin, value + margin
        if what is _ACCURACY:
            own = bounds[(bounds["model"] == fact["model"]) & (bounds["dataset"] == fact["dataset"])]
            low, high = (value[0] + 100 * own[end].to_numpy() for end in ("gain_low", "gain_high"))
        curve(panel, alpha, value, low, high, min(0.12, 0.5 / len(palette)), **line)
        change, at = what.scale * fact[what.change], fact[what.position]
        if not (change > 0 and np.isfinite(change)):
            continue
        panel.plot(at, value[0] + change, color=line["color"], zorder=5, **what.mark)
        if change > largest:
            largest, span = change, [value[0], value[0] + change]
            text = f"{what.called(fact)} +{change:.{what.digits}f} {what.range(fact)} at $\\alpha$ = {at:g}"
            where = at
    if infinite := int((~np.isfinite(facts[what.change])).sum()):
        text += f"; {infinite} not finite"
    if largest:
        panel.plot([where, where], span, color="black", lw=0.9, marker="_", ms=6, zorder=4)
    low, high = panel.get_ylim()
    room = 0.13
    if current().width != "auto":
        text, room = text.replace(" at ", "\nat "), 0.3
    panel.set_ylim(low, high + room * (high - low))  # room for the text
    panel.text(0.02, 0.985, text, transform=panel.transAxes, va="top", fontsize="small")


def _note(rows: pd.DataFrame, facts: pd.DataFrame) -> str:
    counts = sorted(rows.groupby(["model", "dataset"])["alpha"].size().unique())
    methods = {MAX_T: "max-T", BONFERRONI: "Bonferroni: no results of single images"}
    by = ", or ".join(methods[name] for name in methods if name in set(facts["gain_method"]))
    note = (
        "Accuracy and loss along the path from zero-shot ($\\alpha$ = 0) to fine-tuned ($\\alpha$ = 1); "
        f"{' or '.join(map(str, counts))} positions $\\alpha$ per curve. Bands: difference to zero-shot, "
        f"paired over images; of accuracy by 95 % bounds for all positions at once, each side ({by}), of the "
        "loss by pointwise 95 % intervals.\nLine: gain where a lower bound is above zero-shot; failure "
        f"where no upper bound reaches {100 * facts['xi'].iloc[0]:g} points; else undecided.\nText in a "
        "panel: the largest gain and rise in loss with these ranges; their $\\alpha$ is chosen on the same "
        "images, which overstates both.\nA rise is called a barrier where the loss has a bump: above the "
        "straight line between its ends (95 %, corrected)."
    )
    return "\n".join(filter(None, [note, not_finite(rows["loss"], "losses")]))
