"""Figure 4: sharpness of every layer along the path."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import cycle

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..names import Names
from ..settings import Sharpness
from ..studies.facts import Facts, as_facts
from ..studies.sharpness import LAYER_STUDY
from . import heat
from .captions import (
    SETTING,
    choose,
    heading,
    modes_explained,
    not_finite,
    setting,
    short,
    stated,
    unknown_errors,
)
from .looks import current
from .style import (
    SATURATED,
    SATURATED_EXPLAINED,
    Style,
    arrange,
    canvas,
    drawing,
    extra,
    finish,
    headings,
    key,
    margin,
    points,
    side_by_side,
    wrap,
)

_MODELS = 4
_UNCERTAIN: Style = {"ls": "", "marker": ".", "ms": 2.5, "color": "black", "mew": 0}
_NEAR_ZERO: Style = {"ls": "", "marker": "o", "ms": 4, "mfc": "white", "mec": "black", "mew": 0.8}
_BEST: Style = {"ls": "--", "lw": 1, "color": "black"}
_STARS = "*^Dsv<>pPXhd8"  # one per out-of-distribution data set, above the map


@drawing
def layer_sharpness(
    rows: pd.DataFrame | Facts,
    file: str | os.PathLike[str],
    zero_margin: float | None = None,
    straggler_margin: float | None = None,
    models: Names | None = None,
) -> Figure:
    """Draw the sharpness of each layer (down) at each alpha (across), as in Figure 4; one column per model.

    Colours are linear near zero and logarithmic beyond, the same for all models of a row; a dot marks values
    whose 95 % interval includes zero. To the right of a map, circles mark flat layers
    (:func:`rft_fast.studies.near_zero`) and triangles mark stragglers on any data set, given rows of the
    layer-wise interpolation. Given rows of the interpolation, dashed lines mark the best alpha of the whole
    path on each out-of-distribution data set. Of more than four models, the two with the highest and the two
    with the lowest gain in mean out-of-distribution accuracy are shown; without those rows, the first four.
    Other settings, such as rho or the data set, have rows of their own. Values that are not finite are
    crossed out and counted, saturated ones have a diamond.

    Args:
        rows: rows of :func:`rft_fast.studies.layerwise_sharpness` and of the studies named above; or their
            facts.
        file: output file; its extension selects the format.
        zero_margin: margin of the flat layers in nats; None: that of the facts, or the default.
        straggler_margin: margin of the stragglers in nats; None: that of the facts, or the default.
        models: models to show, if they have rows; None: four, chosen as above.

    Returns:
        The figure, which is already saved.

    Raises:
        ValueError: :func:`rft_fast.studies.near_zero`, :func:`rft_fast.studies.summarize` or
            :func:`rft_fast.studies.stragglers` refuses the rows.
    """
    facts = as_facts(rows, zero_margin=zero_margin, straggler_margin=straggler_margin)
    flat = facts.near_zero[facts.near_zero["near_zero"]]
    gains, best, unstable = facts.ood_gains, facts.ood_path, facts.unstable
    edge = facts.of(Sharpness).zero_margin
    rows = facts.part(LAYER_STUDY)
    measured = [model for model in rows["model"].unique() if models is None or model in models]
    models, choice = choose(measured, gains, _MODELS if models is None else len(measured))
    rows = rows[rows["model"].isin(models)]
    rows = rows.assign(saturated=facts.saturated(rows))
    names = list(rows["layer"].unique())
    parts = [part for _, part in rows.groupby(SETTING, sort=False, dropna=False)]
    stars = dict(zip(best["dataset"].unique(), cycle(_STARS)))

    figure = canvas(max(7.0, 2.2 + 1.9 * len(models)), 5)
    narrow = current().width == "one"
    margin = 1.3 if narrow else 2.2
    per = side_by_side(figure, len(models), margin, 0.5)
    groups = arrange(figure, len(models), per, len(parts), sharex=True)
    titles = headings(models, figure, margin, "small", per)
    for group, part in zip(groups, parts, strict=True):
        line = [panel for (panel,) in group]
        near = flat.merge(part[SETTING].drop_duplicates())
        curves = [part[part["model"] == model] for model in models]
        maps = [heat.grid(curve, "sharpness", names) for curve in curves]
        norm = heat.scale(maps, edge)
        for panel, model, name, curve, values in zip(line, models, titles, curves, maps, strict=True):
            mesh = heat.draw(panel, values, norm)
            _uncertain(panel, curve, names)
            flagged = curve[curve["saturated"]]
            panel.plot(flagged["alpha"], flagged["layer"].map(names.index), zorder=3, **SATURATED)
            heat.mark(panel, names, set(near.loc[near["model"] == model, "layer"]), _NEAR_ZERO)
            heat.mark(panel, names, unstable.get(model, set()), heat.STRAGGLER, 1)
            _positions(panel, best[best["model"] == model], stars)
            panel.set_title(heading(name, model, gains), fontsize="small", pad=6 + 8 * len(stars))
            panel.set_xlabel(r"$\alpha$" if group is groups[-1] or per < len(models) else "")
        for first in line[::per]:
            heat.label(first, list(short(names).values()))
            first.set_ylabel(setting(part))
        heat.colorbar(figure, mesh, line, "layer-wise sharpness")

    note = wrap(
        figure,
        f"Sharpness of each layer along the path: {stated(rows)}",
        choice,
        modes_explained(gains),
        "Dots: the 95 % interval over draws, with Student's t, includes zero. Flat layer: that interval lies",
        f"within {edge:g} nats of zero at every $\\alpha$ > 0.",
        "Stragglers: of the layer-wise interpolation, on any data set." if unstable else "",
        r"$\alpha$*: the best position of the whole path; 0 where none beats zero-shot." if stars else "",
        not_finite(rows["sharpness"], "values"),
        unknown_errors(rows),
        SATURATED_EXPLAINED if rows["saturated"].any() else "",
    )
    marks = [key("interval includes zero", _UNCERTAIN), key("flat layer", _NEAR_ZERO)]
    marks += [key("saturated", SATURATED)] if rows["saturated"].any() else []
    marks += [key("straggler", heat.STRAGGLER)] if unstable else []
    marks += [key(f"α* on {name}", {**_BEST, "marker": star}) for name, star in stars.items()]
    lines = math.ceil(len(models) / per) * len(parts)
    height = (heat.height(len(names)) + (1.2 if narrow else 0.6) + extra(titles)) * lines + 0.6
    return finish(figure, file, height, marks, note)


def _uncertain(panel: Axes, curve: pd.DataFrame, names: Sequence[str]) -> None:
    """Mark values whose interval includes zero with dots, except exact zeros."""
    bounds = margin(curve)
    maybe = curve[(curve["sharpness"].abs() <= bounds) & (bounds != 0)]
    panel.plot(maybe["alpha"], maybe["layer"].map(names.index), zorder=3, **_UNCERTAIN)


def _positions(panel: Axes, best: pd.DataFrame, stars: Mapping[str, str]) -> None:
    """Draw a line at each best alpha, and above the map a sign for its data set."""
    for alpha in best["best_alpha"].unique():
        panel.axvline(alpha, **_BEST)
    alphas = best.set_index("dataset")["best_alpha"]
    for row, (dataset, star) in enumerate(stars.items()):
        if dataset in alphas:
            above = panel.get_xaxis_transform() + points(panel, 0, 5 + 8 * row)
            style = {**_BEST, "marker": star, "ms": 4, "label": dataset}
            panel.plot(alphas[dataset], 1, transform=above, clip_on=False, **style)
