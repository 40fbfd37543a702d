"""Coefficients of layers against the plain path, in summary, findings and page."""

from __future__ import annotations

from collections.abc import Iterator

from ..common.tables import aligned
from ..common.words import many, some, visible
from ..studies.coefficients import STUDY
from ..studies.facts import Facts
from .phrases import images, points, within
from .shown import Finding, Rank, Section
from .summary import paragraphs
from .tables import PRUNED, Cell, Table, interval, number

_ABOUT = (
    "Each layer is at its coefficient times alpha; on the plain path all coefficients are 1. A control holds "
    "as many other layers, chosen at random. Each table is at the alpha of its highest mean accuracy in "
    "distribution (ID), and the plain path at the alpha whose accuracy there is nearest. Difference in "
    "accuracy of these two: in points, with 95 % intervals, paired over images and Bonferroni-corrected for "
    "all tables and data sets out of distribution."
)
_CONTROL = {False: "", True: ": control"}


def lines(facts: Facts) -> list[str]:
    """Format the comparison with the plain path, in lines."""
    found = paragraphs(facts, f"coefficients: {images(facts.part(STUDY))}. {_ABOUT}")
    for (model, dataset), own in facts.coefficients.groupby(["model", "dataset"], sort=False):
        found.append(f"  {visible(f'{model} on {dataset}')}")
        table = [["coefficients", "held", "alpha", "ID %", "plain", "ID %", "difference"]]
        for fact in own.to_dict("records"):
            ends = within(fact["difference_low"], fact["difference_high"], points, "").replace("[: ", "[")
            name, held = fact["coefficients"] + _CONTROL[fact["control"]], str(len(fact["layers"]) or "-")
            single = fact["draws"] == 1
            both = [
                (f"{fact[f'{of}alpha']:g}" if single else "-", f"{100 * fact[f'{of}near']:.1f}")
                for of in ("", "plain_")
            ]
            table.append([name, held, *both[0], *both[1], f"{points(fact['difference'])} {ends}"])
        found += aligned(table)
    return found


def findings(facts: Facts) -> Iterator[Finding]:
    """Yield how many tables are shown to be better or worse than the plain path out of distribution."""
    effects = facts.coefficients
    judged = effects[effects["ood"] & ~effects["control"]]
    if judged.empty:
        yield Finding("No layers were found to hold at zero-shot.", STUDY, Rank.PRUNING)
        return
    better, worse = (judged[judged["verdict"] == way] for way in ("above", "below"))
    clear = judged[judged["verdict"].isin(["above", "below"])]
    top = (clear if len(clear) else judged).sort_values("difference", key=abs).iloc[-1]
    same = effects[["model", "dataset", "coefficients"]] == top[["model", "dataset", "coefficients"]]
    control = effects[effects["control"] & same.all(axis=1)]["difference"]
    what = "95 % interval" + (f", corrected for {len(judged)} cases" if len(judged) > 1 else "")
    text = (
        "At about the same accuracy in distribution, a coefficient for each layer gave clearly higher "
        f"accuracy than the plain path in {len(better)} and clearly lower in {len(worse)} of "
        f"{many(len(judged), 'case')} (model, table and data set out of distribution): the largest "
        f"{'of these differences' if len(clear) else 'difference'} was {points(top['difference'])} points "
        f"{within(top['difference_low'], top['difference_high'], points, what)}, by "
        f"{some([top['coefficients']])} ({some([top['model']])} on {some([top['dataset']])})"
    )
    if len(control):
        text += f", against {points(control.iloc[0])} points with as many other layers held"
    yield Finding(f"{text}.", STUDY, Rank.PRUNING)


def section(facts: Facts) -> Section:
    """Create the section on coefficients of layers."""
    words = PRUNED | {"unknown": Cell("no interval", 1, "wide")}
    rows = [
        [
            Cell(fact["model"]),
            Cell(fact["coefficients"] + _CONTROL[fact["control"]]),
            interval(fact["difference"], fact["difference_low"], fact["difference_high"], "+.2f", 100),
            words[fact["verdict"]],
            *(number(fact[name] if fact["draws"] == 1 else None, "g") for name in ("alpha", "plain_alpha")),
            *(number(fact[name], ".1f", 100) for name in ("near", "plain_near")),
            number(len(fact["layers"]), ".0f"),
            Cell(fact["dataset"]),
        ]
        for fact in facts.coefficients.to_dict("records")
    ]
    head = (
        "model|coefficients|against the plain path, in points [95 %, corrected]|what the interval says|α|"
        "α, plain path|accuracy in distribution|plain path's|layers held|data set"
    ).split("|")
    table = Table("Accuracy at about the same accuracy in distribution", head, rows)
    lead = f"{_ABOUT} {images(facts.part(STUDY), 'n = {:,} images of {}', '; ')}."
    return Section(STUDY, "Beyond the paper", "A coefficient for each layer", lead, tables=[table])
