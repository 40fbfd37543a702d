"""Figure 2: one layer on the path, the others held at one end."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..common.words import many
from ..names import Names
from ..studies.facts import ENDS, Facts, as_facts
from ..studies.interpolate import Z95
from ..studies.layers import STUDY
from ..studies.verdicts import layer_shape
from . import heat
from .captions import choose, heading, modes_explained, not_finite, several, short
from .looks import current
from .style import (
    ZERO_SHOT,
    Style,
    arrange,
    canvas,
    curve,
    curve_styles,
    drawing,
    extra,
    finish,
    fold,
    key,
    level,
    plain,
    side_by_side,
    wrap,
)

_WORST = 3  # curves per model


@drawing
def layers(
    rows: pd.DataFrame | Facts,
    file: str | os.PathLike[str],
    margin: float | None = None,
    models: Names | None = None,
) -> Figure:
    """Draw the effect of each layer alone on the loss, as in Figure 2; one column per model and data set.

    Top: rise of the loss above alpha = 0 (layers down, alpha across; linear near zero, logarithmic beyond),
    with stragglers marked (:func:`rft_fast.studies.stragglers`). Below: loss and accuracy over alpha of the
    layers with the most unstable loss, three of each model, shown for all. Bands are pointwise 95 %
    intervals of the difference to alpha = 0, paired over samples. Losses that are not finite are crossed out
    in the map, leave gaps in the curves, and are counted.

    Args:
        rows: rows of :func:`rft_fast.studies.layerwise_interpolation`, and of the interpolation, which show
            which models fail; or their facts.
        file: output file; its extension selects the format.
        margin: margin of the stragglers in nats; None: that of the facts, or the default.
        models: models to show; None: those of the highest and the lowest gain in mean out-of-distribution
            accuracy, or the first two without rows of the interpolation.

    Returns:
        The figure, which is already saved.

    Raises:
        ValueError: :func:`rft_fast.studies.stragglers` refuses the rows, or a model has none.
    """
    known = as_facts(rows, straggler_margin=margin)
    facts, gains = known.stragglers, known.ood_gains
    measured = list(facts["model"].unique())
    if unknown := sorted(set(models or ()) - set(measured)):
        raise ValueError(f"layers: models without rows of the study: {', '.join(unknown)}")
    named = [model for model in measured if models is None or model in models]
    models, choice = choose(named, gains, 2) if models is None else (named, "")
    rows = known.part(STUDY)
    rows = rows[rows["model"].isin(models)]
    facts = facts[facts["model"].isin(models)].set_index(["model", "others", "dataset"])
    columns = [at for model in models for at in facts.loc[[model]].index.unique()]
    names = list(rows["layer"].unique())
    curves = dict(zip(_worst(facts, models), curve_styles(), strict=False))

    figure = canvas(max(7.0, 2.2 + 1.75 * len(columns)), 5)
    margin = 1.3 if current().width == "one" else 2.2
    per = side_by_side(figure, len(columns), margin, 0.9)
    heights = [heat.height(len(names)), 1.5, 1.5]
    (panels,) = arrange(figure, len(columns), per, heights=heights, sharex=True)
    room = (figure.get_figwidth() - margin) / per
    parts = [_part(rows, *at) for at in columns]
    maps = [heat.grid(part, "rise", names) for part in parts]
    norm = heat.scale(maps, facts["margin"].iloc[0])
    for at, part, values, (top, *below) in zip(columns, parts, maps, panels, strict=True):
        mesh = heat.draw(top, values, norm)
        found = facts.loc[[at]]
        unstable = set(found.loc[found["straggler"], "layer"])
        heat.mark(top, names, unstable, heat.STRAGGLER)
        shapes = [layer_shape(fact) for fact in found.to_dict("records")]
        counted = many(len(unstable), "straggler")
        if "bump" in shapes or "slope" in shapes:
            counted += f", {shapes.count('bump')} by a bump"
        top.set_title(_title(at, part, counted, room), fontsize="small")
        _curves(below[0], part, curves, "loss", "rise_se", 1)
        _curves(below[1], part, curves, "accuracy", "gain_se", 100)
        below[1].set_xlabel(r"$\alpha$ of the layer")
    headers = _name_models([top for top, *_ in panels], [at[0] for at in columns], room, per, gains)
    labels = short(names)
    for start in range(0, len(panels), per):
        maps_row, *below_rows = zip(*panels[start : start + per], strict=True)
        heat.label(maps_row[0], list(labels.values()))
        for row, text in zip(below_rows, ("loss (nats)", "accuracy (%)"), strict=True):
            row[0].set_ylabel(text)
            level(row)
    heat.colorbar(figure, mesh, [panel for column in panels for panel in column], "rise in loss")

    note = wrap(
        figure,
        "Loss and accuracy with one layer at a time on the path.",
        choice,
        modes_explained(gains),
        r"Colour: loss minus that at $\alpha$ = 0. Curves: the layers of largest instability in loss,",
        f"{_WORST} of each model; bands: pointwise 95 % intervals of the difference to $\\alpha$ = 0, paired",
        "over images. Stragglers: lower end of the one-sided 95 % interval of the instability in loss,",
        f"Bonferroni-corrected for layers and positions, above {facts['margin'].iloc[0]:g} nats; by a",
        "bump: its loss rises above the straight line between the layer's own ends, with the same "
        "correction. No noise.",
        not_finite(rows["loss"], "losses"),
    )
    marks = [key("straggler", heat.STRAGGLER), key("zero-shot", ZERO_SHOT)]
    worst = [key(labels[name], style) for name, style in curves.items()]
    height = (heat.height(len(names)) + 4.2 + extra(headers, 6)) * math.ceil(len(columns) / per)
    return finish(figure, file, height, marks, note, worst)


def _part(rows: pd.DataFrame, model: str, others: str, dataset: str) -> pd.DataFrame:
    found = (rows["model"] == model) & (rows["others"] == others) & (rows["dataset"] == dataset)
    return rows[found].sort_values("alpha", kind="stable")


def _worst(facts: pd.DataFrame, models: Sequence[str]) -> list[str]:
    """The layers with the largest instability of each model, in any column; not finite counts as largest."""
    found: dict[str, None] = {}
    for model in models:
        heights = facts.loc[[model]].groupby("layer", sort=False)["instability"].max()
        broken = facts.loc[[model]].loc[lambda f: ~np.isfinite(f["instability"]), "layer"]
        heights[broken] = np.inf
        found |= dict.fromkeys(heights.sort_values(ascending=False, kind="stable").index[:_WORST])
    return list(found)


def _name_models(
    panels: Sequence[Axes], models: Sequence[str], room: float, per: int, gains: pd.Series
) -> list[str]:
    """Write each model above its columns' titles, which have four lines or more; return these headings."""
    lines = max(panel.get_title().count("\n") + 1 for panel in panels)
    headers = []
    for model in dict.fromkeys(models):
        name = fold(model, room * min(models.count(model), per), "title")
        headers.append(heading(name, model, gains) + lines * "\n")
        panels[models.index(model)].set_title(headers[-1], fontsize="small", fontweight="bold", loc="left")
    return headers


def _title(at: tuple[str, str, str], part: pd.DataFrame, unstable: str, room: float) -> str:
    _, others, dataset = at
    images = several(part["samples"].unique())
    return f"{fold(dataset, room, 'small')}\n{images} images\nothers {ENDS[others]}\n{unstable}"


def _curves(
    panel: Axes, part: pd.DataFrame, curves: Mapping[str, Style], value: str, band: str, scale: float
) -> None:
    plain(panel)
    for name, style in curves.items():
        own = part[part["layer"] == name]
        alpha, y = own["alpha"].to_numpy(), scale * own[value].to_numpy()
        margin = scale * Z95 * own[band].to_numpy()
        curve(panel, alpha, y, y - margin, y + margin, label=name, **style)
    start = part.loc[part["alpha"] == 0, value].unique()
    if len(start) == 1:  # the same for all layers if the others are zero-shot
        panel.axhline(scale * start[0], zorder=1, **ZERO_SHOT)
