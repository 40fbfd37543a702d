"""Coefficients of layers against the plain path, in summary, findings and page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import cycle
from typing import Any

import pandas as pd

from ..common.tables import aligned
from ..common.words import many, signed, some, visible
from ..studies.coefficients import STUDY
from ..studies.effects import DRAWS
from ..studies.facts import Facts
from ..studies.pruning import kind
from ..studies.verdicts import Sign
from .drawing import SYMBOLS, Chart, Key, Picture, choices, layout, line, safe
from .phrases import images, joined, points, within
from .shown import Finding, Rank, Section
from .summary import paragraphs
from .tables import Cell, Table, interval, number

_ABOUT = (
    "Each layer is at its coefficient times alpha; on the plain path all coefficients are 1. Each table and "
    "the plain path are at their own best alpha: that of the highest mean accuracy in distribution (ID). "
    "Difference in accuracy of these two out of distribution: in points, with 95 % intervals, paired over "
    "images and Bonferroni-corrected for all tables and data sets. At the same ID accuracy: the differences "
    "to all positions of the plain path whose ID accuracy is not shown to differ from the table's, from the "
    "smallest to the largest; better or worse only if all of them are. A control holds as many other "
    "layers, chosen at random; layers with equal ends do not count. The interval of its difference counts "
    f"images and draws, and there is none with fewer than {DRAWS} draws of different layers."
)
_CHOSEN_BY = {"instability": "layers", "sharpness": "layer-sharpness"}  # criterion -> study
_CONTROL = {False: "", True: ": control"}
_WORDS: dict[Sign, str] = {
    "above": "better",
    "below": "worse",
    "unclear": "not shown",
    "unknown": "no interval",
}
_LOOKS: dict[Sign, tuple[int, str]] = {
    "above": (2, "good"),
    "below": (0, "bad"),
    "unclear": (1, "wide"),
    "unknown": (1, "wide"),
}
# By the sign of the difference in accuracy in distribution: what "better" is not said without.
_CLAUSES: dict[Sign, str] = {"below": ", ID lower", "above": "", "unclear": "", "unknown": ""}
_NEAR: dict[Sign, str] = {
    "below": ", clearly lower than the plain path's",
    "above": ", clearly higher than the plain path's",
    "unclear": " against the plain path's",
    "unknown": " against the plain path's",
}


def _choosing(facts: Facts) -> dict[str, list[str]]:
    """Return held layers by name of the table -> the data sets out of distribution that chose them."""
    far = {*facts.coefficients["dataset"]}
    tables, found = {*facts.coefficients["coefficients"]}, {}
    for criterion, study in _CHOSEN_BY.items():
        name = f"{kind(criterion)} held"
        sets = [each for each in facts.part(study)["dataset"].unique() if each in far]
        if name in tables and sets:
            found[name] = sets
    return found


def _about(facts: Facts) -> str:
    """Describe the comparison, and which data sets are no independent test of held layers."""
    chosen = [
        f" Layers of the table '{name}' were chosen by losses on {joined(sets)}, so it has no independent "
        "test there."
        for name, sets in _choosing(facts).items()
    ]
    return "".join([_ABOUT, *chosen])


def _verdict(fact: Mapping[Any, Any]) -> str:
    """Return the verdict against the plain path, with the clause on accuracy in distribution."""
    return _WORDS[fact["verdict"]] + (_CLAUSES[fact["near_verdict"]] if fact["verdict"] == "above" else "")


def _range(fact: Mapping[Any, Any]) -> str:
    """Return the range of differences at the same accuracy in distribution."""
    ends = dict.fromkeys(points(fact[f"matched_{end}"]) for end in ("least", "most"))
    return " to ".join(ends) if fact["matched"] else "-"


def _same(fact: Mapping[Any, Any]) -> str:
    """Return the verdict at the same accuracy in distribution."""
    none = not fact["matched"] and fact["near_verdict"] != "unknown"
    return "no position" if none else _WORDS[fact["matched_verdict"]]


def lines(facts: Facts) -> list[str]:
    """Format the comparisons with the plain path and with controls, in lines."""
    found = paragraphs(facts, f"coefficients: {images(facts.part(STUDY))}. {_about(facts)}")
    for (model, dataset), own in facts.coefficients.groupby(["model", "dataset"], sort=False):
        plain = f"alpha {own['plain_alpha'].iloc[0]:g}, ID {100 * own['plain_near'].iloc[0]:.1f} %"
        found.append(f"  {visible(f'{model} on {dataset}')}; plain path: {plain}")
        table = [["coefficients", "held", "alpha", "ID %", "difference", "verdict"]]
        same = [["at the same ID accuracy", "positions", "difference", "verdict"]]
        beyond = [["against the control", "draws", "difference", "verdict"]]
        for fact in own.to_dict("records"):
            name, held = fact["coefficients"] + _CONTROL[fact["control"]], str(len(fact["layers"]) or "-")
            alpha = f"{fact['alpha']:g}" if fact["draws"] == 1 else "-"
            row = [name, held, alpha, f"{100 * fact['near']:.1f}", _with_interval(fact, "difference")]
            table.append([*row, _verdict(fact)])
            if not fact["control"]:
                same.append([name, str(fact["matched"]), _range(fact), _same(fact)])
            if fact["control_draws"]:
                row = [name, str(fact["control_draws"]), _with_interval(fact, "beyond")]
                beyond.append([*row, _beyond(fact)])
        for part in (table, same, beyond):
            found += aligned(part) if len(part) > 1 else []
    return found


def _with_interval(fact: Mapping[Any, Any], name: str) -> str:
    ends = within(fact[f"{name}_low"], fact[f"{name}_high"], points, "").replace("[: ", "[")
    return f"{points(fact[name])} {ends}"


def _beyond(fact: Mapping[Any, Any]) -> str:
    few = fact["control_draws"] < DRAWS
    return "no verdict" if few else _WORDS[fact["beyond_verdict"]]


def findings(facts: Facts) -> Iterator[Finding]:
    """Yield how many tables are shown to be better or worse than the plain path, and than controls."""
    effects = facts.coefficients
    judged = effects[~effects["control"].astype(bool)]
    if judged.empty:
        yield Finding("No layers were found to hold at zero-shot.", STUDY, Rank.PRUNING)
        return
    better, worse = (judged[judged["verdict"] == way] for way in ("above", "below"))
    lower = (better["near_verdict"] == "below").sum()
    clause = f" ({lower} of these at lower ID accuracy)" if lower else ""
    top = _largest(judged, "difference", "verdict")
    cases = many(len(judged), "case")
    text = (
        "With each at its own best alpha in distribution, a coefficient for each layer gave clearly higher "
        f"accuracy than the plain path in {len(better)}{clause} and clearly lower in {len(worse)} of {cases} "
        f"(model, table and data set out of distribution): the largest {_of(better, worse)} was "
        f"{points(top['difference'])} points {_ends(top, 'difference', len(judged))}, by {_named(top)}, "
        f"with an ID accuracy of {100 * top['near']:.1f} %{_NEAR[top['near_verdict']]} "
        f"{100 * top['plain_near']:.1f} %"
    )
    if top["dataset"] in _choosing(facts).get(top["coefficients"], ()):
        text += "; these layers were chosen by losses on the same data set"
    yield Finding(f"{text}.", STUDY, Rank.PRUNING)
    if top["near_verdict"] != "unknown":
        yield Finding(_at_the_same(judged, top), STUDY, Rank.PRUNING)
    held = judged[judged["control_draws"] > 0]
    if len(held):
        yield Finding(_against_controls(held), STUDY, Rank.PRUNING)


def _largest(facts: pd.DataFrame, value: str, verdict: str) -> pd.Series:
    """Return the largest difference, of those with a verdict if there are any."""
    clear = facts[facts[verdict].isin(["above", "below"])]
    return (clear if len(clear) else facts).sort_values(value, key=abs).iloc[-1]


def _of(better: pd.DataFrame, worse: pd.DataFrame) -> str:
    return "of these differences" if len(better) + len(worse) else "difference"


def _named(fact: pd.Series) -> str:
    return f"{some([fact['coefficients']])} ({some([fact['model']])} on {some([fact['dataset']])})"


def _ends(fact: pd.Series, name: str, cases: int) -> str:
    what = "95 % interval" + (f", corrected for {cases} cases" if cases > 1 else "")
    return within(fact[f"{name}_low"], fact[f"{name}_high"], points, what)


def _at_the_same(judged: pd.DataFrame, top: pd.Series) -> str:
    """Say what holds at the same accuracy in distribution."""
    better, worse = ((judged["matched_verdict"] == way).sum() for way in ("above", "below"))
    text = (
        "Against all positions of the plain path at the same ID accuracy, a coefficient for each layer gave "
        f"clearly higher accuracy out of distribution in {better} and clearly lower in {worse} of "
        f"{many(len(judged), 'case')}; {_named(top)}: "
    )
    count = many(top["matched"], "position")
    return f"{text}{_range(top)} points, {count}." if top["matched"] else f"{text}no such position."


def _against_controls(held: pd.DataFrame) -> str:
    """Compare held layers with as many others."""
    enough = held[held["control_draws"] >= DRAWS]
    few = len(held) - len(enough)
    rest = f"no verdict with fewer than {DRAWS} draws of other layers (--hold-draws)"
    if enough.empty:
        return f"Held layers against as many others, held at random: {rest}."
    better, worse = (enough[enough["beyond_verdict"] == way] for way in ("above", "below"))
    top = _largest(enough, "beyond", "beyond_verdict")
    return (
        "Held layers gave clearly higher accuracy out of distribution than as many others, held at random, "
        f"in {len(better)} and clearly lower in {len(worse)} of {many(len(enough), 'case')}: the largest "
        f"{_of(better, worse)} was {points(top['beyond'])} points {_ends(top, 'beyond', len(enough))}, by "
        f"{_named(top)}, over {top['control_draws']} draws."
        + (f" In {many(few, 'other case')}: {rest}." if few else "")
    )


def section(facts: Facts) -> Section:
    """Create the section on coefficients of layers."""
    rows = [
        [
            Cell(fact["model"]),
            Cell(fact["dataset"]),
            Cell(fact["coefficients"] + _CONTROL[fact["control"]]),
            _points(fact, "difference"),
            Cell(_verdict(fact), *_LOOKS[fact["verdict"]]),
            *(number(fact[name], ".1f", 100) for name in ("near", "plain_near")),
            Cell(signed(_range(fact)) if fact["matched"] else "–"),
            Cell("–" if fact["control"] else _same(fact)),
            *_cells_beyond(fact),
            number(fact["alpha"] if fact["draws"] == 1 else None, "g"),
            number(fact["plain_alpha"], "g"),
            number(len(fact["layers"]), ".0f"),
        ]
        for fact in facts.coefficients.to_dict("records")
    ]
    head = (
        "model|data set|coefficients|points against the plain path [95 %]|what the interval says|"
        "accuracy in distribution|plain path's|points at the same accuracy in distribution|verdict there|"
        "points against the control [95 %]|verdict against the control|α|α, plain path|layers held"
    ).split("|")
    table = Table("Accuracy out of distribution, each at its best α in distribution", head, rows)
    lead = f"{_about(facts)} {images(facts.part(STUDY), 'n = ', '; ')}."
    return Section(STUDY, "Beyond the paper", "A coefficient for each layer", lead, _picture(facts), [table])


def _points(fact: Mapping[Any, Any], name: str) -> Cell:
    return interval(fact[name], fact[f"{name}_low"], fact[f"{name}_high"], "+.2f", 100)


def _cells_beyond(fact: Mapping[Any, Any]) -> list[Cell]:
    return [_points(fact, "beyond"), Cell(_beyond(fact) if fact["control_draws"] else "–")]


def _picture(facts: Facts) -> Picture:
    """Draw accuracy out of distribution against that in distribution; of controls, means over draws."""
    part = facts.part(STUDY).fillna({"coefficients": "plain path", "control": False})
    keys = ["model", "coefficients", "control", "alpha"]
    near, far = (part[part["ood"].astype(bool) == ood] for ood in (False, True))
    across = 100 * near.groupby(keys)["accuracy"].mean()
    colours = {name: f"@c{n - 1}" if n else "@ink" for n, name in enumerate(part["coefficients"].unique())}
    symbols = dict(zip(colours, cycle(SYMBOLS)))
    traces = []
    for (model, dataset, name, control), curve in far.groupby(["model", "dataset", *keys[1:3]], sort=False):
        y, x = 100 * curve.groupby("alpha")["accuracy"].mean(), across[model, name, control]
        hover = [
            f"<b>{safe(name + _CONTROL[control])}</b>, α = {alpha:g}<br>in distribution {x[alpha]:.1f} %<br>"
            f"{safe(dataset)} {y[alpha]:.1f} %"
            for alpha in x.index
        ]
        style = (symbols[name] + "-open", "dot") if control else (symbols[name], "solid")
        show = {"model": [model], "dataset": [dataset]}
        traces.append(line(x.tolist(), y[x.index].tolist(), hover, show, colours[name], *style))
    alt = "Accuracy out of distribution against accuracy in distribution, a curve along alpha for each table"
    axes = layout("mean accuracy in distribution (%)", "accuracy (%)", 420)
    legend = [Key(name, colour, symbols[name]) for name, colour in colours.items()]
    controls = [choices(of, text, far[of]) for of, text in (("model", "Model"), ("dataset", "Data set"))]
    chart = Chart("front", "Out of distribution against in distribution", alt, traces, axes, wide=True)
    return Picture(controls, [chart], [*legend, Key("control: others held", "@grey", "circle-open", "dot")])
