"""Coefficients of layers against the plain path, in summary, findings and page."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

from ..common.tables import aligned
from ..common.words import many, some, visible
from ..studies.coefficients import STUDY
from ..studies.facts import Facts
from ..studies.pruning import kind
from .drawing import SYMBOLS, Chart, Key, Picture, choices, layout, line, safe
from .phrases import images, joined, points, within
from .shown import Finding, Rank, Section
from .summary import paragraphs
from .tables import PRUNED, Cell, Table, interval, number

_ABOUT = (
    "Each layer is at its coefficient times alpha; on the plain path all coefficients are 1. A control holds "
    "as many other layers, chosen at random; layers with equal ends do not count. Each table is at the alpha "
    "of its highest mean accuracy in distribution (ID), and the plain path at the alpha whose accuracy there "
    "is nearest. Difference in accuracy of these two: in points; out of distribution with 95 % intervals, "
    "paired over images and Bonferroni-corrected for all tables and data sets."
)
_CHOSEN_BY = {"instability": "layers", "sharpness": "layer-sharpness"}  # criterion -> study
_CONTROL = {False: "", True: ": control"}


def _choosing(facts: Facts) -> dict[str, list[str]]:
    """Return held layers by name of the table -> the data sets out of distribution that chose them."""
    far = {*facts.coefficients.loc[facts.coefficients["ood"], "dataset"]}
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


def lines(facts: Facts) -> list[str]:
    """Format the comparison with the plain path, in lines."""
    found = paragraphs(facts, f"coefficients: {images(facts.part(STUDY))}. {_about(facts)}")
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
    if top["dataset"] in _choosing(facts).get(top["coefficients"], ()):
        text += "; these layers were chosen by losses on the same data set"
    yield Finding(f"{text}.", STUDY, Rank.PRUNING)


def section(facts: Facts) -> Section:
    """Create the section on coefficients of layers."""
    words = PRUNED | {"unknown": Cell("no interval", 1, "wide")}
    rows = [
        [
            Cell(fact["model"]),
            Cell(fact["dataset"]),
            Cell(fact["coefficients"] + _CONTROL[fact["control"]]),
            interval(fact["difference"], fact["difference_low"], fact["difference_high"], "+.2f", 100),
            words[fact["verdict"]],
            *(number(fact[name] if fact["draws"] == 1 else None, "g") for name in ("alpha", "plain_alpha")),
            *(number(fact[name], ".1f", 100) for name in ("near", "plain_near")),
            number(len(fact["layers"]), ".0f"),
        ]
        for fact in facts.coefficients.to_dict("records")
    ]
    head = (
        "model|data set|coefficients|points against the plain path [95 %]|what the interval says|α|"
        "α, plain path|accuracy in distribution|plain path's|layers held"
    ).split("|")
    table = Table("Accuracy at about the same accuracy in distribution", head, rows)
    lead = f"{_about(facts)} {images(facts.part(STUDY), 'n = {:,} images of {}', '; ')}."
    return Section(STUDY, "Beyond the paper", "A coefficient for each layer", lead, _picture(facts), [table])


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
