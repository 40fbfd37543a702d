"""The study ``choice`` in words, and its section of the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from ..common.tables import aligned
from ..common.words import many, signed
from ..studies.choice import RULES
from ..studies.facts import Facts
from .charts import colours, model_keys
from .drawing import SYMBOLS, Chart, Picture, Trace, choices, layout, line, safe
from .phrases import joined, points
from .shown import Finding, Rank, Section
from .summary import paragraphs
from .tables import Cell, Table, number

_LEAD = (
    "The best position of a path is known only with labels of the out-of-distribution images. Each rule "
    "chooses one without them. Its regret is the accuracy at the best position minus that at the chosen one"
)
_FITTED = ", where the best position is chosen on other images than it is measured on (five folds)."
_OBSERVED = (
    ". Without results of at least five single images, the best position is chosen and measured on the same "
    "images, and every regret is too large."
)
_INTERVAL = " In brackets: 95 % intervals of the mean, over models and images."


def _lead(facts: Facts) -> str:
    fitted = _FITTED if facts.choice["cross_fitted"].all() else _OBSERVED
    return _LEAD + fitted + (_INTERVAL if facts.choice_means["regret_low"].notna().any() else "")


def lines(facts: Facts) -> list[str]:
    """Format the mean regret of each rule, in lines."""
    table, means = facts.choice, facts.choice_means
    text = paragraphs(facts, f"choice: alpha without labels. {_lead(facts)} In points.")
    for dataset, group in means.groupby("dataset", sort=False):
        text += [f"  {dataset}, {many(int(group['models'].max()), 'model')}:"]
        cells = [["rule", "alpha", "mean regret", "", "largest"]]
        for fact in group.to_dict("records"):
            own = table[(table["dataset"] == dataset) & (table["rule"] == fact["rule"])]
            cells.append(
                [
                    fact["rule"],
                    _span(own["alpha"]),
                    points(fact["regret"]),
                    _bounds(fact, "regret"),
                    points(fact["largest"]),
                ]
            )
        text += aligned(cells)
    return text


def _span(alphas: pd.Series) -> str:
    low, high = alphas.min(), alphas.max()
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _bounds(fact: dict[Any, Any], name: str) -> str:
    """Format an interval in points; empty if it is not known."""
    if pd.isna(fact[f"{name}_low"]):
        return ""
    return f"({points(fact[f'{name}_low'])} to {points(fact[f'{name}_high'])})"


def findings(facts: Facts) -> Iterator[Finding]:
    """Yield what choosing alpha by ID accuracy costs, and which rules differ from it."""
    where = facts.deciding["dataset"].iloc[0]
    means = facts.choice_means
    here = means[means["dataset"] == where].set_index("rule", drop=False)
    usual = here.loc["ID accuracy"].to_dict()
    text = (
        f"Choosing alpha by accuracy in distribution costs {points(usual['regret'])} points of accuracy on "
    )
    text += f"{where} {_bounds(usual, 'regret')}".rstrip()
    text += f", the mean over {many(usual['models'], 'model')}"
    for how, other in (("less", here["beyond_id_high"] < 0), ("more", here["beyond_id_low"] > 0)):
        if other.any():
            text += f"; {how} by the rules {joined(list(here.loc[other, 'rule']))} (corrected for all rules)"
    yield Finding(f"{text}.", "choice", Rank.ID_ALPHA)


def section(facts: Facts) -> Section:
    """Create the section of the page."""
    return Section(
        "choice",
        "Beyond the paper",
        "Which alpha, without labels from elsewhere?",
        _lead(facts).replace("alpha", "α"),
        _picture(facts),
        [_means(facts), _choices(facts)],
        [] if facts.choice["cross_fitted"].all() else ["Every regret is too large (see above)."],
    )


def _picture(facts: Facts) -> Picture:
    numbers = colours(facts)
    rules = list(facts.choice_means["rule"].unique())
    traces: list[Trace] = []
    for fact in facts.choice.to_dict("records"):
        n = numbers[fact["model"]]
        hover = (
            f"<b>{safe(fact['model'])}</b>, {safe(fact['rule'])}<br>α = {fact['alpha']:g}, regret "
            f"{signed(format(100 * fact['regret'], '+.1f'))} points"
        )
        at = rules.index(fact["rule"]) - 0.12
        show = {"dataset": [fact["dataset"]]}
        symbol = SYMBOLS[n % len(SYMBOLS)] + "-open"
        traces.append(line([100 * fact["regret"]], [at], [hover], show, f"@c{n}", symbol, mode="markers"))
    for fact in facts.choice_means.to_dict("records"):
        hover = f"mean, {safe(fact['rule'])}<br>{signed(points(fact['regret']))} points "
        hover += signed(_bounds(fact, "regret"))
        half = 100 * (fact["regret_high"] - fact["regret"])
        traces.append(
            line(
                [100 * fact["regret"]],
                [rules.index(fact["rule"]) + 0.18],
                [hover],
                {"dataset": [fact["dataset"]]},
                "@ink",
                "diamond",
                across=None if pd.isna(half) else [half],
                mode="markers",
            )
        )
    axis = {"tickvals": list(range(len(rules))), "ticktext": rules, "range": [len(rules) - 0.5, -0.5]}
    return Picture(
        [choices("dataset", "Data set", facts.choice["dataset"])],
        [
            Chart(
                "regret",
                "Regret of each rule",
                "Regret of each rule in points: a sign for each model, a diamond for their mean, with its "
                "interval",
                traces,
                layout("regret (points)", "", 120 + 44 * len(rules), yaxis=axis, margin={"l": 96}),
            )
        ],
        model_keys(numbers),
    )


def _means(facts: Facts) -> Table:
    rows, chosen = [], []
    for fact in facts.choice_means.to_dict("records"):
        rows.append(
            [
                Cell(fact["rule"]),
                Cell(RULES[fact["rule"]]),
                number(100 * fact["regret"], "+.2f"),
                Cell(signed(_bounds(fact, "regret")), look="n"),
                number(100 * fact["largest"], "+.2f"),
                Cell(signed(_bounds(fact, "beyond_id")), look="n"),
                Cell(fact["dataset"]),
            ]
        )
        chosen.append({"dataset": fact["dataset"]})
    headings = (
        "rule|chooses|mean regret|95 % interval|largest|minus that of ID accuracy [95 %, corrected]|data set"
    ).split("|")
    return Table("Regret of each rule over the models, in points", headings, rows, chosen)


def _choices(facts: Facts) -> Table:
    rows, chosen = [], []
    for fact in facts.choice.to_dict("records"):
        rows.append(
            [
                Cell(fact["model"]),
                Cell(fact["rule"]),
                number(fact["alpha"], "g"),
                number(100 * fact["accuracy"], ".1f"),
                number(100 * fact["gain"], "+.1f"),
                number(100 * fact["regret"], "+.2f"),
                number(100 * fact["regret_se"], ".2f"),
                Cell(fact["dataset"]),
            ]
        )
        chosen.append({"dataset": fact["dataset"]})
    headings = ["model", "rule", "α", "accuracy", "gain", "regret", "standard error", "data set"]
    return Table(
        "The choice of each rule for each model, in points", headings, rows, chosen, folded="each model"
    )
