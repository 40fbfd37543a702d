"""The study ``pairs`` in words, and its section of the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from ..common.tables import aligned
from ..common.words import many, signed
from ..studies.facts import Facts
from ..studies.pairs import STUDY
from .drawing import SYMBOLS, Chart, Key, Picture, Trace, choices, layout, line, safe
from .phrases import nats, points
from .shown import Finding, Section
from .summary import paragraphs
from .tables import Cell, Table, number

_LEAD = (
    "The path between two fine-tuned models, without zero-shot. In the middle, its accuracy is compared with "
    "the straight line between the accuracies of the two. The best position is compared with the better "
    "model, both chosen on other images than they are measured on (five folds). A bump is a loss above the "
    "straight line between the two losses (Frankle et al. 2020)"
)
_BOUNDS = ". Intervals are of 95 %, paired over images and corrected for all pairs of a data set."
_UNKNOWN = (
    ". Without results of single images, nothing is known of the best position and of intervals of accuracy."
)


def _lead(facts: Facts) -> str:
    return _LEAD + (_BOUNDS if facts.pairs["gain_held_out"].notna().any() else _UNKNOWN)


def _bounds(fact: dict[Any, Any], name: str) -> str:
    """Format a value in points with its interval; a dash if it is not known."""
    if pd.isna(fact[name]):
        return "-"
    low, high = fact[f"{name}_low"], fact[f"{name}_high"]
    interval = "" if pd.isna(low) else f" ({points(low)} to {points(high)})"
    return f"{points(fact[name])}{interval}"


def _bump(fact: dict[Any, Any]) -> str:
    shown = "" if pd.isna(fact["bump_low"]) else ", shown" if fact["bump_low"] > 0 else ", not shown"
    return f"{nats(fact['bump'])}{shown}"


def lines(facts: Facts) -> list[str]:
    """Format each pair, in lines."""
    text = paragraphs(facts, f"pairs: between fine-tuned models. {_lead(facts)} In points; bumps in nats.")
    for dataset, group in facts.pairs.groupby("dataset", sort=False):
        text.append(f"  {dataset}:")
        cells = [["pair", "accuracies", "middle", "best", "bump"]]
        for fact in group.to_dict("records"):
            ends = "{:.1f}, {:.1f}".format(*(100 * fact[f"accuracy_{end}"] for end in ("model", "partner")))
            gain = [_bounds(fact, name) for name in ("above_line", "gain_held_out")]
            cells.append([f"{fact['model']} to {fact['partner']}", ends, *gain, _bump(fact)])
        text += aligned(cells)
    return text


def findings(facts: Facts) -> Iterator[Finding]:
    """Yield for how many pairs there is a bump or a better position, on the data set that decides."""
    where = facts.deciding["dataset"].iloc[0]
    here = facts.pairs[facts.pairs["dataset"] == where]
    if here.empty or here["bump_low"].isna().all():
        return
    bumps = int((here["bump_low"] > 0).sum())
    text = f"On {where}, the path between two fine-tuned models is shown to have a bump in the loss for "
    text += f"{bumps} of {many(len(here), 'pair')}"
    if here["above_line_low"].notna().any():
        above, below = int((here["above_line_low"] > 0).sum()), int((here["above_line_high"] < 0).sum())
        gains, losses = ((here["gain_held_out_low"] > 0).sum(), (here["gain_held_out_high"] < 0).sum())
        text += (
            f"; its middle is more accurate than the straight line between both for {above}, and less for "
        )
        text += f"{below}; its best position, chosen on other images, beats the better model for {gains}"
        text += f", and is worse for {losses}" if losses else ""
    yield Finding(f"{text} (95 %, corrected for all pairs).", STUDY)


def section(facts: Facts) -> Section:
    """Create the section of the page."""
    return Section(
        STUDY,
        "Beyond the paper",
        "Between two fine-tuned models",
        _lead(facts),
        _picture(facts),
        [_table(facts)],
    )


def _picture(facts: Facts) -> Picture:
    traces: list[Trace] = []
    rows = facts.part(STUDY).sort_values("alpha", kind="stable")
    names = list(dict.fromkeys(zip(rows["model"], rows["partners"], strict=True)))
    for (model, partner, dataset), own in rows.groupby(["model", "partners", "dataset"], sort=False):
        n = names.index((model, partner))
        hover = [
            f"<b>{safe(model)}</b> to <b>{safe(partner)}</b><br>α = {alpha:g}, accuracy {100 * accuracy:.1f}"
            " %"
            for alpha, accuracy in zip(own["alpha"], own["accuracy"], strict=True)
        ]
        show = {"dataset": [dataset], "model": [model]}
        values, symbol = (100 * own["accuracy"]).tolist(), SYMBOLS[n % len(SYMBOLS)]
        traces.append(line(own["alpha"].tolist(), values, hover, show, f"@c{n % 9}", symbol))
    keys = [Key(f"{a} to {b}", f"@c{n % 9}", SYMBOLS[n % len(SYMBOLS)]) for n, (a, b) in enumerate(names)]
    controls = [choices("dataset", "Data set", rows["dataset"]), choices("model", "From", rows["model"])]
    frame = layout("α (0 the first model, 1 the second)", "accuracy (%)", 340)
    alt = "Accuracy against alpha, a line for each pair of models"
    return Picture(controls, [Chart("pairs", "Accuracy between two models", alt, traces, frame)], keys)


def _table(facts: Facts) -> Table:
    rows = [
        [
            Cell(fact["model"]),
            Cell(fact["partner"]),
            number(100 * fact["accuracy_model"], ".1f"),
            number(100 * fact["accuracy_partner"], ".1f"),
            Cell(signed(_bounds(fact, "above_line")), None, "n"),
            Cell(signed(_bounds(fact, "gain_held_out")), None, "n"),
            number(fact["bump"]),
            number(fact["bump_low"], "+.3f"),
            Cell(fact["dataset"]),
        ]
        for fact in facts.pairs.to_dict("records")
    ]
    headings = (
        "from|to|accuracy of the first|of the second|middle above the line [95 %, corrected]|"
        "best minus better model [95 %, corrected]|bump|corrected lower end|data set"
    ).split("|")
    chosen = [{"dataset": fact["dataset"], "model": fact["model"]} for fact in facts.pairs.to_dict("records")]
    return Table("Paths between two models; accuracy in points, bumps in nats", headings, rows, chosen)
