"""The study ``soups`` in words, and its section of the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from ..common.tables import aligned
from ..common.words import many, signed, some
from ..studies.facts import Facts
from ..studies.points import BEST_ALPHA, BEST_MODEL, NAMES
from ..studies.soups import GREEDY, STOCK, STUDY, UNIFORM
from .drawing import SYMBOLS, Chart, Key, Picture, Trace, choices, layout, line, safe
from .phrases import joined, points
from .shown import Finding, Section
from .summary import paragraphs
from .tables import Cell, Table, number

_LEAD = (
    "Means of all fine-tuned models (uniform), of a greedy choice of them, and Model Stock, beside zero-shot "
    "and single models. The difference is the accuracy minus that of the best single model. That model, the "
    "greedy soup and one of the alphas are chosen in distribution, on the images that are scored there, so "
    "only data out of distribution judges them"
)
_BOUNDS = ". Intervals are of 95 %, paired over images and corrected for all points and these data sets."


_UNKNOWN = (
    ". Without results of single images, there are no intervals, and the best alpha is chosen on the images "
    "that are scored."
)


def _lead(facts: Facts) -> str:
    return _LEAD + (_BOUNDS if facts.soups["alpha_low"].notna().any() else _UNKNOWN)


def _bounds(fact: dict[Any, Any]) -> str:
    low, high = fact["difference_low"], fact["difference_high"]
    return "" if pd.isna(low) else f"({points(low)} to {points(high)})"


def _members(facts: Facts) -> str:
    table = facts.soups.drop_duplicates("point").set_index("point")["models"]
    kept, every = (table[NAMES[name]].split(", ") for name in (GREEDY, UNIFORM))
    text = f"The best model is {table[BEST_MODEL]}; the greedy soup has {len(kept)} of "
    return f"{text}{many(len(every), 'model')} ({some(kept, 3)})."


def _ratios(facts: Facts) -> list[str]:
    """Describe t beside the best alpha of each data set."""
    ratios, texts = facts.stock.dropna(), []
    if not len(ratios):
        return ["Model Stock: no tensor has a t."]
    low, middle, high = np.quantile(ratios, [0.05, 0.5, 0.95])
    text = (
        f"Model Stock: t is {middle:.2f} in the median of {many(len(ratios), 'tensor')} (90 % of them from "
    )
    texts.append(f"{text}{low:.2f} to {high:.2f}). It is one number per tensor, alpha one for all.")
    for fact in facts.soups[facts.soups["point"] == BEST_ALPHA].to_dict("records"):
        text = f"On {fact['dataset']}, the best alpha to the uniform soup is {fact['alpha']:g}"
        if fact["alpha_low"] == fact["alpha_high"]:
            text += "; every other position is shown to be less accurate"
        elif pd.notna(fact["alpha_low"]):
            inside = int(ratios.between(fact["alpha_low"], fact["alpha_high"]).sum())
            text += f"; {fact['alpha_low']:g} to {fact['alpha_high']:g} are not shown to be less accurate, a "
            text += f"range that holds t of {inside} of {many(len(ratios), 'tensor')}"
        texts.append(f"{text}.")
    return texts


def lines(facts: Facts) -> list[str]:
    """Format each point, in lines."""
    text = paragraphs(facts, f"soups: several fine-tuned models. {_lead(facts)} {_members(facts)} In points.")
    for dataset, group in facts.soups.groupby("dataset", sort=False):
        text.append(f"  {dataset}{'' if group['ood'].iloc[0] else ' (in distribution)'}:")
        cells = [["", "alpha", "accuracy", "minus best model"]]
        for fact in group.to_dict("records"):
            alpha = "" if pd.isna(fact["alpha"]) else f"{fact['alpha']:g}"
            difference = f"{points(fact['difference'])} {_bounds(fact)}".rstrip()
            cells.append([fact["point"], alpha, f"{100 * fact['accuracy']:.1f}", difference])
        text += aligned(cells)
    return text + paragraphs(facts, " ".join(_ratios(facts)))


def findings(facts: Facts) -> Iterator[Finding]:
    """Yield which points differ from the best model, on the data set that decides."""
    where = facts.deciding["dataset"].iloc[0]
    here = facts.soups[(facts.soups["dataset"] == where) & facts.soups["point"].isin(NAMES.values())]
    if here.empty or here["difference_low"].isna().all():
        return
    parts = []
    for what, those in (
        ("more accurate", here["difference_low"] > 0),
        ("less accurate", here["difference_high"] < 0),
    ):
        if those.any():
            some_ = [
                f"{fact['point']} ({points(fact['difference'])})" for fact in here[those].to_dict("records")
            ]
            parts.append(f"{joined(some_)} {_are(some_)} {what}")
    rest = list(here.loc[~((here["difference_low"] > 0) | (here["difference_high"] < 0)), "point"])
    if rest:
        parts.append(f"{joined(rest)} {_are(rest)} not shown to differ")
    text = f"On {where}, against the single model that is best in distribution: {'; '.join(parts)}"
    yield Finding(f"{text} (95 %, corrected for all points and data sets out of distribution).", STUDY)


def _are(names: list[str]) -> str:
    return "are" if len(names) > 1 else "is"


def section(facts: Facts) -> Section:
    """Create the section of the page."""
    return Section(
        STUDY,
        "Beyond the paper",
        "Several fine-tuned models",
        f"{_lead(facts)} {_members(facts)} {' '.join(_ratios(facts))}",
        _picture(facts),
        [_table(facts), _stock(facts)],
    )


def _picture(facts: Facts) -> Picture:
    traces: list[Trace] = []
    rows = facts.part(STUDY).sort_values("alpha", kind="stable")
    methods = [UNIFORM, GREEDY, STOCK]
    for (method, dataset), own in rows.groupby(["method", "dataset"], sort=False):
        n, own = methods.index(method), own[own["alpha"] == 1] if method == STOCK else own
        hover = [
            f"<b>{safe(NAMES[method])}</b><br>α = {alpha:g}, accuracy {100 * accuracy:.1f} %"
            for alpha, accuracy in zip(own["alpha"], own["accuracy"], strict=True)
        ]
        values, show = (100 * own["accuracy"]).tolist(), {"dataset": [dataset]}
        traces.append(line(own["alpha"].tolist(), values, hover, show, f"@c{n}", SYMBOLS[n]))
    return Picture(
        [choices("dataset", "Data set", rows["dataset"])],
        [
            Chart(
                "soups",
                "Accuracy on the paths to the soups",
                "Accuracy against alpha: a line for the uniform and the greedy soup, a point for Model Stock",
                traces,
                layout("α (0 zero-shot, 1 the soup)", "accuracy (%)", 340),
            )
        ],
        [Key(NAMES[method], f"@c{n}", SYMBOLS[n]) for n, method in enumerate(methods)],
    )


def _table(facts: Facts) -> Table:
    rows, chosen = [], []
    for fact in facts.soups.to_dict("records"):
        rows.append(
            [
                Cell(fact["point"]),
                number(fact["alpha"], "g"),
                number(100 * fact["accuracy"], ".1f"),
                number(100 * fact["difference"], "+.2f"),
                Cell(signed(_bounds(fact)), None, "n"),
                Cell(some(fact["models"].split(", "), 3) if fact["models"] else ""),
                Cell(fact["dataset"]),
            ]
        )
        chosen.append({"dataset": fact["dataset"]})
    headings = ["", "α", "accuracy", "minus best model", "95 %, corrected", "models", "data set"]
    return Table("Soups beside single models, in points", headings, rows, chosen)


def _stock(facts: Facts) -> Table:
    rows = [[Cell(str(name), None, "code"), number(t)] for name, t in facts.stock.items()]
    return Table("t of Model Stock", ["tensor", "t"], rows, folded="Show t of each tensor")
