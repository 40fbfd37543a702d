"""Coefficients of layers: accuracy out of distribution against that in distribution."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ..common.words import many, signed
from ..studies.coefficients import STUDY
from ..studies.facts import Facts, as_facts
from .style import (
    Style,
    arrange,
    canvas,
    curve_styles,
    drawing,
    extra,
    finish,
    fold,
    key,
    plain,
    points,
    side_by_side,
    wrap,
)

_PLAIN: Style = {"color": "black", "ls": "-", "lw": 1.2, "marker": ".", "ms": 4}
_CONTROL: Style = {"ls": (0, (1.5, 1)), "mfc": "white"}
_CHOSEN: Style = {"ls": "", "marker": "*", "ms": 10, "mec": "black", "mew": 0.6, "zorder": 5}
_ZERO: Style = {"ls": "", "marker": "D", "ms": 7, "mfc": "none", "mec": "black", "mew": 1}
_KEYS = ["model", "coefficients", "control"]


@drawing
def coefficients(rows: pd.DataFrame | Facts, file: str | os.PathLike[str]) -> Figure:
    """Draw accuracy out of distribution against mean accuracy in distribution, along alpha.

    One panel per model and data set; a curve for each table, of controls the mean over draws. Stars: the
    alpha of highest accuracy in distribution, with the corrected 95 % interval of the difference to that of
    the plain path.

    Args:
        rows: rows of :func:`rft_fast.studies.coefficients`, or their facts.
        file: output file; its extension selects the format.

    Returns:
        The figure, which is already saved.

    Raises:
        ValueError: :func:`rft_fast.studies.coefficient_effects` refuses the rows.
    """
    facts = as_facts(rows)
    effects, part = facts.coefficients, facts.part(STUDY).fillna({"coefficients": "", "control": False})
    near, far = (part[part["ood"].astype(bool) == ood] for ood in (False, True))
    across = 100 * near.groupby([*_KEYS, "alpha"])["accuracy"].mean()
    names = [name for name in far["coefficients"].unique() if name]
    styles = {"": _PLAIN, **{name: curve_styles()[n % 9] | {"ms": 4} for n, name in enumerate(names)}}
    groups = list(far.groupby(["model", "dataset"], sort=False))

    figure = canvas(max(7.0, 0.7 + 3.2 * min(3, len(groups))), 5)
    per = min(3, side_by_side(figure, len(groups), 0.7, 2.1))
    entries, titles, room = 0, [], (figure.get_figwidth() - 1) / per
    (panels,) = arrange(figure, len(groups), per)
    for (panel,), ((model, dataset), here) in zip(panels, groups, strict=True):
        plain(panel)
        own = effects[(effects["model"] == model) & (effects["dataset"] == dataset)]
        facts_of = {(fact["coefficients"], fact["control"]): fact for fact in own.to_dict("records")}
        for (name, control), curve in here.groupby(_KEYS[1:], sort=False):
            y, style = 100 * curve.groupby("alpha")["accuracy"].mean(), styles[name]
            fact, x = facts_of.get((name, control)), across[model, name, control]
            label = fold(_label(fact), room - 0.7)
            panel.plot(x, y[x.index], label=label, **style | (_CONTROL if control else {}))
            if not control:
                alpha = x.idxmax() if fact is None else fact["alpha"]
                error = 0 if fact is None else 100 * (fact["difference_high"] - fact["difference"])
                panel.errorbar(x[alpha], y[alpha], error, **{**_CHOSEN, "color": style["color"]})
                panel.plot(x.iloc[0], y.iloc[0], **_ZERO)
        panel.set_xlabel("mean accuracy in distribution (%)")
        panel.set_ylabel("accuracy (%)")
        below = panel.transAxes + points(panel, 0, -34)
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, borderaxespad=0)
        labels = [str(line.get_label()) for line in panel.get_lines() if line.get_label()[0] != "_"]
        entries = max(entries, sum(1 + label.count("\n") for label in labels))
        images = many(f"{here['samples'].iloc[0]:,}", "image")
        titles.append(f"{fold(model, room, 'title')}\non {fold(dataset, room - 0.2, 'title')}, {images}")
        panel.set_title(titles[-1])
    note = wrap(
        figure,
        "Accuracy out of distribution against mean accuracy in distribution, along the path with each layer",
        r"at its coefficient times $\alpha$. Curves of controls: means over draws. Stars: the $\alpha$ of",
        "highest accuracy in distribution. Below: accuracy at the star minus that at the star of the plain",
        "path, in points; bars at the stars: its 95 % interval, paired over images and corrected for all",
        "tables and panels.",
    )
    marks = [key("plain path", _PLAIN), key("zero-shot", _ZERO)]
    marks.append(key(r"best $\alpha$ in distribution", _CHOSEN, mfc="white"))
    marks.append(key("control: as many other layers, at random", {"marker": "o", "ms": 4} | _CONTROL))
    lines = -(-len(groups) // per)
    return finish(figure, file, (3.0 + 0.17 * entries + extra(titles)) * lines, marks, note)


def _label(fact: Mapping[Any, Any] | None) -> str:
    """Name of a table, number of layers held, and difference to the plain path."""
    if fact is None:
        return "plain path"
    held = f" ({len(fact['layers'])})" if fact["layers"] else ""
    name = f"as many others held{held}" if fact["control"] else f"{fact['coefficients']}{held}"
    return f"{name}: {signed(format(100 * fact['difference'], '+.2f'))}"
