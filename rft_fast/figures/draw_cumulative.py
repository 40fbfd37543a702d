"""Cumulative paths: maps of the loss, sets of layers down, alpha across."""

from __future__ import annotations

import math
import os

import pandas as pd
from matplotlib.figure import Figure

from ..names import Names
from ..settings import Layers
from ..studies.cumulative import KEYS, STUDY
from ..studies.facts import Facts, as_facts
from . import heat
from .captions import not_finite, short
from .looks import current
from .style import LINE, arrange, canvas, drawing, finish, fold, key, side_by_side, wrap


@drawing
def cumulative(
    rows: pd.DataFrame | Facts, file: str | os.PathLike[str], models: Names | None = None
) -> Figure:
    """Draw the rise of the loss of sets of layers; one column per model, data set and direction.

    Args:
        rows: rows of :func:`rft_fast.studies.cumulative_interpolation`, or their facts.
        file: output file; its extension selects the format.
        models: models to show; None: all of them.

    Returns:
        The figure, which is already saved.

    Raises:
        ValueError: :func:`rft_fast.studies.cumulative_effects` refuses the rows, or a model has none.
    """
    facts = as_facts(rows)
    part, effects = facts.part(STUDY), facts.cumulative
    if unknown := sorted({*(models or ())} - {*part["model"]}):
        raise ValueError(f"cumulative: models without rows of the study: {', '.join(unknown)}")
    names = list(part["layer"].unique())
    part = part if models is None else part[part["model"].isin(models)]
    columns = sorted(
        part.groupby(KEYS, sort=False), key=lambda column: list(part["model"]).index(column[0][0])
    )

    figure = canvas(max(5.0, 2.2 + 1.75 * len(columns)), 5)
    margin = 1.3 if current().width == "one" else 2.2
    per = side_by_side(figure, len(columns), margin, 0.9)
    (panels,) = arrange(figure, len(columns), per, sharex=True)
    room = (figure.get_figwidth() - margin) / per
    maps = [heat.grid(own, "rise", names) for _, own in columns]
    norm = heat.scale(maps, facts.of(Layers).straggler_margin)
    titles = []
    for place, ((at, own), values, (panel,)) in enumerate(zip(columns, maps, panels, strict=True)):
        mesh = heat.draw(panel, values, norm)
        same = (effects[KEYS] == list(at)).all(axis=1)
        heat.mark(panel, names, {*effects.loc[same & effects["falls"], "layer"]}, heat.STRAGGLER)
        which = "up to the layer" if at[2] == "first" else "from the layer on"
        titles.append(
            "\n".join([*(fold(name, room) for name in at[:2]), f"{own['samples'].max()} images", which])
        )
        panel.set_title(titles[-1], fontsize="small")
        panel.set_xlabel(r"$\alpha$ of the set")
        if place % per == 0:
            heat.label(panel, list(short(names).values()))
    heat.colorbar(figure, mesh, [panel for (panel,) in panels], "rise in loss")
    note = wrap(
        figure,
        "Loss with a set of layers on the path: all up to the named one, or all from it on; the others are",
        r"zero-shot. Colour: loss minus that at $\alpha$ = 0. Marked sets lower accuracy at some $\alpha$:",
        "the one-sided 95 % bound of the difference to zero-shot, paired over images and",
        "Bonferroni-corrected for sets and positions, is below 0. No noise.",
        not_finite(part["loss"], "losses"),
    )
    lines = max(title.count("\n") for title in titles)
    height = (heat.height(len(names)) + 1.2 + LINE * lines) * math.ceil(len(columns) / per)
    return finish(figure, file, height, [key("accuracy falls", heat.STRAGGLER)], note)
