"""Figure 5: the effect of pruning flat layers or stragglers on the path."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..common.words import signed
from ..studies.facts import Facts, as_facts
from ..studies.interpolate import Z95
from ..studies.pruning import STUDY, kind
from .captions import heading, modes_explained, not_finite, several
from .looks import current
from .style import (
    Style,
    arrange,
    canvas,
    curve,
    curve_styles,
    drawing,
    extra,
    finish,
    fold,
    headings,
    key,
    level,
    plain,
    points,
    side_by_side,
    wrap,
)

_VARIANT = ["criterion", "method", "keep"]
_KEYS = [*_VARIANT, "control"]
_UNPRUNED: Style = {"color": "black", "ls": "-", "lw": 1.2}
_PRUNED: Style = {"ls": "-", "marker": "o", "ms": 3, "lw": 1.2}
_CONTROL: Style = {"ls": (0, (1.5, 1)), "mfc": "white"}


@drawing
def prune(rows: pd.DataFrame | Facts, file: str | os.PathLike[str]) -> Figure:
    """Draw accuracy over alpha, unpruned and pruned (Figure 5); one column per model, one row per data set.

    One colour and marker per way of pruning: solid and filled for the layers of a criterion, dotted and open
    for the control, as many other layers at random. Curves are means over mask seeds; bands extend from the
    lowest to the highest seed. The band of the unpruned path is the pointwise 95 % interval of the difference
    to zero-shot, paired over images. Below each panel is the mean change of accuracy over alpha > 0, with its
    standard error over seeds. Accuracies that are not finite leave gaps and are counted.

    Args:
        rows: rows of :func:`rft_fast.studies.prune_stragglers`, and of the interpolation, which show which
            models fail; or their facts.
        file: output file; its extension selects the format.

    Returns:
        The figure, which is already saved.

    Raises:
        ValueError: there are no rows of the study, or :func:`rft_fast.studies.summarize` refuses a path.
    """
    facts = as_facts(rows)
    effects, gains = facts.pruning, facts.ood_gains
    rows = facts.part(STUDY).sort_values("alpha", kind="stable")
    models, datasets = list(rows["model"].unique()), list(rows["dataset"].unique())
    variants = effects[_VARIANT].drop_duplicates().itertuples(index=False, name=None)
    styles = dict(zip(variants, cycle(curve_styles())))

    varying = [name for name in _VARIANT if effects[name].nunique() > 1]

    figure = canvas(max(7.0, 0.7 + 3.1 * len(models)), 5)
    per = side_by_side(figure, len(models), 0.7, 2.1)
    titles = headings(models, figure, 1.5, "title", per)
    groups = [[panel for (panel,) in group] for group in arrange(figure, len(models), per, len(datasets))]
    for group, dataset in zip(groups, datasets, strict=True):
        for panel, model, name in zip(group, models, titles, strict=True):
            here = (rows["model"] == model) & (rows["dataset"] == dataset)
            found = (effects["model"] == model) & (effects["dataset"] == dataset)
            _panel(panel, rows[here], effects[found], styles, varying)
            if per < len(models) or group is groups[0]:
                panel.set_title(heading(name, model, gains))
        images = several(rows.loc[rows["dataset"] == dataset, "samples"].unique())
        for start in range(0, len(group), per):
            row = group[start : start + per]
            row[0].set_ylabel(f"{fold(dataset, 2, 'title')}\n{images} images\naccuracy (%)")
            level(row)

    pruned = rows[rows["method"].notna()]
    note = wrap(
        figure,
        "Accuracy along the path, unpruned and with layers pruned.",
        f"Weights kept: {several(pruned['keep'].unique())}; mask seeds {several(pruned['seed'].unique())}."
        if len(pruned)
        else "There were no layers to prune.",
        "Curves: means over mask seeds; bands: lowest to highest seed, and for the unpruned path the",
        "pointwise 95 % interval of the difference to zero-shot, paired over images. Below: mean change of",
        r"accuracy over $\alpha$ > 0, in points, $\pm$ its standard error over seeds.",
        modes_explained(gains),
        not_finite(rows["accuracy"], "accuracies"),
    )
    kinds = " or ".join(dict.fromkeys(map(kind, effects["criterion"]))) or "layers"
    marks = [key("unpruned", _UNPRUNED)]
    marks.append(key(f"{kinds} pruned", _PRUNED))
    marks.append(key("control: as many other layers, at random", _PRUNED | _CONTROL))
    entries = effects.groupby(["model", "dataset"]).size().max() if len(effects) else 0
    lines = math.ceil(len(models) / per) * len(datasets)
    panel = 2.0 if current().width == "one" else 2.5
    height = 0.6 + (panel + 0.16 * entries) * lines + extra(titles) * (1 if per == len(models) else lines)
    return finish(figure, file, height, marks, note)


def _panel(
    panel: Axes,
    rows: pd.DataFrame,
    effects: pd.DataFrame,
    styles: Mapping[tuple[object, ...], Style],
    varying: Sequence[str],
) -> None:
    plain(panel)
    unpruned = rows[rows["method"].isna()]
    alpha, accuracy = unpruned["alpha"], 100 * unpruned["accuracy"]
    margin = 100 * Z95 * unpruned["gain_se"]
    curve(panel, alpha, accuracy, accuracy - margin, accuracy + margin, 0.12, **_UNPRUNED)
    handles = []
    for effect in effects.to_dict("records"):
        curves = rows[(rows[_KEYS] == [effect[name] for name in _KEYS]).all(axis=1)]
        seeds = 100 * curves.pivot(index="alpha", columns="seed", values="accuracy")
        style = styles[tuple(effect[name] for name in _VARIANT)] | (_CONTROL if effect["control"] else {})
        mean, low, high = (seeds.agg(how, axis=1, skipna=False) for how in ("mean", "min", "max"))
        handles += curve(panel, seeds.index, mean, low, high, label=_label(effect, varying), **style)
    panel.set_xlabel(r"$\alpha$")
    if handles:
        panel.legend(
            handles=handles,
            loc="upper center",
            bbox_to_anchor=(0.5, 0),
            bbox_transform=panel.transAxes + points(panel, 0, -34),  # below the axis and its label
            borderaxespad=0,
        )


def _label(effect: Mapping[str, Any], varying: Sequence[str]) -> str:
    """Number of pruned layers, the settings that vary, and the mean change of accuracy."""
    count = len(effect["layers"])
    who = f"{count} at random" if effect["control"] else f"{count} {kind(effect['criterion'])}"
    how = f" ({', '.join(several([effect[name]]) for name in varying)})" if varying else ""
    error = f"$\\pm$ {100 * effect['change_se']:.2f} points"
    error = "points (one seed)" if pd.isna(effect["change_se"]) else error
    return f"{who}{how}: {signed(format(100 * effect['change'], '+.2f'))} {error}"
