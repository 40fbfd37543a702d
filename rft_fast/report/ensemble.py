"""The study ``ensemble`` in words, and its section of the page."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from ..common.tables import aligned
from ..common.words import many, signed
from ..studies.ensemble import STUDY
from ..studies.facts import Facts
from ..studies.gains import STUDY as PATH
from .charts import ALPHA, colours
from .drawing import SYMBOLS, Chart, Key, Picture, choices, layout, line, safe
from .phrases import points
from .shown import Finding, Section
from .summary import paragraphs
from .tables import Cell, Table, number

_LEAD = (
    "An ensemble averages the logits of the zero-shot and of the fine-tuned model, with the shares 1 - alpha "
    "and alpha. It runs two models, a position of the path only one. The difference is the accuracy on the "
    "path minus that of the ensemble, in points: the mean over the positions between the ends"
)
_PAIRED = ", with a 95 % interval paired over images."


def _lead(facts: Facts) -> str:
    return _LEAD + (_PAIRED if facts.ensemble["difference_low"].notna().any() else ".")


def lines(facts: Facts) -> list[str]:
    """Format the difference of each model, in lines."""
    text = paragraphs(
        facts,
        f"ensemble: logits instead of weights. {_lead(facts)} Path and ensemble: the best gain of each, on "
        "the images that choose alpha.",
    )
    for dataset, group in facts.ensemble.groupby("dataset", sort=False):
        text.append(f"  {dataset}:")
        cells = [["model", "path", "ensemble", "difference"]]
        for fact in group.to_dict("records"):
            gains = [points(fact[name]) for name in ("gain_path", "gain_ensemble")]
            cells.append([fact["model"], *gains, f"{points(fact['difference'])} {_bounds(fact)}".rstrip()])
        text += aligned(cells)
    return text


def _bounds(fact: dict[str, float]) -> str:
    low, high = fact["difference_low"], fact["difference_high"]
    return "" if pd.isna(low) else f"({points(low)} to {points(high)})"


def findings(facts: Facts) -> Iterator[Finding]:
    """Yield for how many models path and ensembles differ, on the data set that decides."""
    where = facts.deciding["dataset"].iloc[0]
    here = facts.ensemble[facts.ensemble["dataset"] == where]
    above, below = int((here["difference_low"] > 0).sum()), int((here["difference_high"] < 0).sum())
    if here.empty or here["difference_low"].isna().all():
        return
    text = f"On {where}, averaging the weights is more accurate than averaging the logits for {above} of "
    text += f"{many(len(here), 'model')}, and less accurate for {below} (95 %, each model by itself)"
    yield Finding(f"{text}.", "ensemble")


def section(facts: Facts) -> Section:
    """Create the section of the page."""
    return Section(
        "ensemble",
        "Beyond the paper",
        "Do averaged weights beat averaged logits?",
        _lead(facts).replace("alpha", "α").replace(" - ", " \N{MINUS SIGN} "),
        _picture(facts),
        [_table(facts)],
    )


def _picture(facts: Facts) -> Picture:
    numbers = colours(facts)
    traces = []
    for study, name, dash in ((PATH, "path", "solid"), (STUDY, "ensemble", "dot")):
        rows = facts.part(study).sort_values("alpha", kind="stable")
        for (model, dataset), own in rows.groupby(["model", "dataset"], sort=False):
            hover = [
                f"<b>{safe(model)}</b>, {name}<br>α = {alpha:g}, accuracy {100 * accuracy:.1f} %"
                for alpha, accuracy in zip(own["alpha"], own["accuracy"], strict=True)
            ]
            n = numbers[model]
            symbol = SYMBOLS[n % len(SYMBOLS)] + ("-open" if study == STUDY else "")
            show = {"dataset": [dataset], "model": [model]}
            values = (100 * own["accuracy"]).tolist()
            traces.append(line(own["alpha"].tolist(), values, hover, show, f"@c{n}", symbol, dash))
    both = facts.ensemble
    return Picture(
        [choices("dataset", "Data set", both["dataset"]), choices("model", "Model", both["model"])],
        [
            Chart(
                "blend",
                "Accuracy of path and ensembles",
                "Accuracy against alpha: a solid line for the path, a dotted one for the ensembles",
                traces,
                layout(ALPHA, "accuracy (%)", 340),
            )
        ],
        [Key("path", "@ink", "circle"), Key("ensemble of logits", "@ink", "circle-open", "dot")],
    )


def _table(facts: Facts) -> Table:
    rows = [
        [
            Cell(fact["model"]),
            number(100 * fact["gain_path"], "+.1f"),
            number(100 * fact["gain_ensemble"], "+.1f"),
            number(100 * fact["difference"], "+.2f"),
            Cell(signed(_bounds(fact)), look="n"),
            Cell(fact["dataset"]),
        ]
        for fact in facts.ensemble.to_dict("records")
    ]
    headings = ["model", "gain of the path", "gain of ensembles", "difference", "95 % interval", "data set"]
    chosen = [{"dataset": name} for name in facts.ensemble["dataset"]]
    return Table("Averaged weights minus averaged logits, in points", headings, rows, chosen)
