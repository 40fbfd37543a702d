"""The study ``claim`` in words, and its section of the page."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pandas as pd

from ..common.tables import aligned
from ..common.words import many, signed, some
from ..names import ON_WORDS
from ..settings import Sharpness
from ..studies.claim import SETTING
from ..studies.facts import Facts
from ..studies.verdicts import Association, association
from .charts import colours, model_keys
from .drawing import SYMBOLS, Chart, Picture, Trace, choices, layout, line, safe
from .phrases import PAPER_CLAIM, p_value, points
from .shown import Finding, Rank, Section
from .summary import paragraphs
from .tables import Cell, Table, number

_JUDGED: dict[Association, Cell] = {
    "above": Cell("goes with it", 3),
    "below": Cell("goes against it", 3),
    "unclear": Cell("not significant", 2, "wide"),
    "saturated": Cell("saturated: not tested", 1, "wide"),
    "unknown": Cell("not tested", 0, "wide"),
}
_PLACES = {"best": "α*", "finetuned": "1"}


def lines(facts: Facts) -> list[str]:
    """Format the flat layers of each model, in lines."""
    table, margin = facts.claim, facts.of(Sharpness).zero_margin
    text = paragraphs(
        facts,
        "claim: flat layers of models that fail and of models that gain. A layer is flat at one alpha where "
        "the 95 % interval of its sharpness lies within a margin of zero, in nats. Counts are at alpha = 1, "
        "and in the last column at the measured position nearest to alpha*, the best position of the path. "
        "At alpha = 0, noise on the fine-tuned weights changes nothing, so that every layer is flat by "
        "definition: these counts are not compared. All margins and tests are in "
        f"claim.csv. {PAPER_CLAIM}{_missing(facts)}",
    )
    nats = table[table["unit"] == "nats"]
    margins = sorted(nats["margin"].unique())
    for _, part in nats.groupby(["dataset", "measured_on", *SETTING[1:]], sort=False, dropna=False):
        first = part.iloc[0]
        text += [f"  {first['dataset']}, sharpness on {first['measured_on']}, rho = {first['rho']:g}:"]
        cells = [
            ["model", "mode", "gain", *(f"< {m:g}" for m in margins), "smallest", "alpha*", f"< {margin:g}"]
        ]
        for model, own in part.groupby("model", sort=False):
            end = own[own["at"] == "finetuned"].set_index("margin")
            best = own[(own["at"] == "best") & (own["margin"] == margin)]
            fact = end.iloc[0]
            at_best = "-"
            if len(best) and (best["by_definition"].iloc[0] or not facts.untested):
                at_best = f"{best['flat'].iloc[0]} at {best['alpha'].iloc[0]:g}"
            cells.append(
                [
                    str(model),
                    str(fact["mode"]),
                    points(fact["gain"]),
                    *("-" if facts.untested else str(end.loc[m, "flat"]) for m in margins),
                    f"{fact['smallest']:.3g}",
                    f"{fact['best_alpha']:g}",
                    at_best,
                ]
            )
        text += aligned(cells)
    return text


def left_out(facts: Facts, lacking: str) -> list[str]:
    """Say that the study is left out, in lines."""
    return paragraphs(facts, f"claim is left out: it needs {lacking}.")


def _missing(facts: Facts) -> str:
    """Say which models have no layer-wise sharpness; empty if none."""
    known = set(facts.claim["model"])
    if missing := [model for model in facts.path["model"].unique() if model not in known]:
        return f" Without layer-wise sharpness, and left out: {some(missing, 4)}."
    return ""


def findings(facts: Facts) -> Iterator[Finding]:
    """Yield whether models that fail have more flat layers at alpha = 1, on the first OOD data set."""
    where, margin = facts.deciding["dataset"].iloc[0], facts.of(Sharpness).zero_margin
    tests = facts.claim_tests
    here = tests[(tests["dataset"] == where) & (tests["at"] == "finetuned") & (tests["outcome"] == "failure")]
    here = here[(here["unit"] == "nats") & (here["margin"] == margin)]
    if here.empty:
        return
    # p_max is corrected for all ways of measuring, so the smallest one holds.
    fact = here.loc[here["p_max"].idxmin() if here["p_max"].notna().any() else here.index[0]].to_dict()
    what = f"flat layers (sharpness within {margin:g} nats of zero at alpha = 1, rho = {fact['rho']:g}, "
    what += f"on {fact['measured_on']})"
    gaining = fact["models"] - fact["failing"]
    if facts.untested:
        why = "with one draw a sharpness has no interval"
    elif not fact["failing"] or not gaining:
        why = f"{many(fact['failing'], 'model')} failed and {gaining} gained"
    else:
        why = ""
    if why:
        text = f"Whether models that fail on {where} have more {what} cannot be tested: {why}."
        yield Finding(text, "claim", Rank.CLAIM)
        return
    text = f"On {where}, the {many(fact['failing'], 'model')} that failed had on average "
    text += f"{fact['mean_failing']:.1f} {what}, the {many(gaining, 'model')} that gained "
    text += f"{fact['mean_gaining']:.1f}: "
    text += {
        "above": "significantly more",
        "below": "significantly fewer",
        "unclear": "no significant difference",
    }.get(association(fact), "not tested")
    if pd.notna(fact["p_max"]):
        text += f" (Kendall's tau {fact['kendall']:+.2f}, p = {p_value(fact['p_max'])} by permutation, "
        text += f"corrected for {many(fact['tests'], 'test')})"
    decided = facts.deciding["mode"].isin(["undecided"]).sum()
    text += f"; {many(decided, 'model')} undecided, left out" if decided else ""
    yield Finding(f"{text}.", "claim", Rank.CLAIM)


def section(facts: Facts) -> Section:
    """Create the section of the page."""
    tests = facts.claim_tests
    warnings = [text.strip()] if (text := _missing(facts)) else []
    groups = tests[(tests["outcome"] == "failure") & (tests["at"] == "finetuned")]
    for dataset, models, failing in groups[["dataset", "models", "failing"]].drop_duplicates().to_numpy():
        ways = math.comb(models, failing)
        found = f"On {dataset}, {failing} of {models} models fail"
        if ways == 1:
            warnings.append(f"{found}: there are no two groups to compare.")
        elif ways < 100:
            warnings.append(
                f"{found}: p cannot be smaller than 1/{ways} = {1 / ways:.3f}, without correction."
            )
    return Section(
        "claim",
        "The paper's claim",
        "Do models that fail have more flat layers?",
        "Algorithm 1 prunes layers whose sharpness is near zero. A layer is flat at one α where its 95 % "
        "interval (Student's t over draws) lies within a margin of zero, in nats or as a share of the sum "
        "over layers. Most models have one, so the number of flat layers is compared, by permutation of the "
        "models, corrected for all margins (max-T). At α* = 0 every sharpness is 0 by definition, and not "
        "compared; elsewhere sharpness grows with α, so that counts at α* follow α*. " + PAPER_CLAIM,
        _picture(facts),
        [_table(tests)],
        warnings,
    )


def _settings(table: pd.DataFrame) -> pd.Series:
    return pd.Series(
        [
            f"ρ = {row['rho']:g}, {row['measured_on']}, {ON_WORDS.get(row['on'], row['on'])} weights, "
            f"{row['estimator']}"
            for row in table.to_dict("records")
        ],
        index=table.index,
    )


def _within(unit: str, margin: float) -> str:
    return f"{margin:g} nats" if unit == "nats" else f"{100 * margin:g} % of the sum"


def _picture(facts: Facts) -> Picture:
    """Draw the number of flat layers against the gain."""
    table = facts.claim.assign(setting=_settings(facts.claim))
    table = table.assign(
        within=[_within(*each) for each in zip(table["unit"], table["margin"], strict=True)],
        place=table["at"].map(_PLACES),
    )
    numbers = colours(facts)
    traces: list[Trace] = []
    for fact in table.to_dict("records"):
        n = numbers[fact["model"]]
        symbol = SYMBOLS[n % len(SYMBOLS)] + ("-open" if fact["mode"] == "failure" else "")
        hover = (
            f"<b>{safe(fact['model'])}</b> ({fact['mode']}), gain "
            f"{signed(format(100 * fact['gain'], '+.1f'))} points<br>"
            f"{fact['flat']} of {fact['layers']} layers at α = {fact['alpha']:g}"
            + ("<br>0 by definition" if fact["by_definition"] else "")
        )
        show = {name: [fact[name]] for name in ("dataset", "setting", "place", "within")}
        traces.append(
            line([100 * fact["gain"]], [fact["flat"]], [hover], show, f"@c{n}", symbol, mode="markers")
        )
    main = f"{facts.of(Sharpness).zero_margin:g} nats"
    within = sorted(table["within"].unique(), key=lambda text: text != main)
    return Picture(
        [
            choices("dataset", "Data set", table["dataset"]),
            choices("setting", "Measured", table["setting"]),
            choices("place", "At α", sorted(table["place"].unique())),
            choices("within", "Flat within", within),
        ],
        [
            Chart(
                "flat",
                "Flat layers against the gain",
                "Number of flat layers against the gain, a sign for each model, hollow for those that fail",
                traces,
                layout("gain (points)", "flat layers", 380),
            )
        ],
        model_keys(numbers),
    )


def _table(tests: pd.DataFrame) -> Table:
    """Create a row per test."""
    rows, chosen = [], []
    tests = tests.sort_values("at", ascending=False, kind="stable")  # alpha = 1 first
    for setting, fact in zip(_settings(tests), tests.to_dict("records"), strict=True):
        what = fact["measure"]
        if what == "flat layers":
            what += f" within {_within(fact['unit'], fact['margin'])}"
        rows.append(
            [
                Cell(what),
                Cell(_PLACES[fact["at"]]),
                Cell(fact["outcome"]),
                number(fact["mean_failing"], ".3g"),
                number(fact["mean_gaining"], ".3g"),
                number(fact["kendall"], "+.2f"),
                _JUDGED[association(fact)],
                number(fact["p_max"]),
                number(fact["p"]),
                number(fact["needed"], ".2f"),
                number(fact["models"], ".0f"),
                Cell(fact["dataset"]),
                Cell(setting),
            ]
        )
        chosen.append({"dataset": fact["dataset"], "setting": setting, "place": _PLACES[fact["at"]]})
    headings = (
        "measure|at α|against|mean, failing|mean, gaining|Kendall's τ|verdict|p, corrected|p alone|"
        "size needed|n (models)|data set|measured"
    ).split("|")
    return Table("Flat layers against failure and gain, over models", headings, rows, chosen)
