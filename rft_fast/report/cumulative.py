"""The study ``cumulative`` in words, and its section of the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..common.words import paragraph, some, visible
from ..figures.captions import short
from ..names import CUMULATIVE
from ..settings import Layers
from ..studies.cumulative import KEYS, STUDY
from ..studies.facts import Facts
from .drawing import Chart, Key, Picture, Trace, choices, layout, of_layers, rows_height
from .layer_charts import across, heat_map, largest_of
from .phrases import images, nats, points
from .shown import Finding, Section
from .summary import paragraphs
from .tables import Cell, Table, number

_ABOUT = (
    "A set is shown to lower accuracy where a one-sided 95 % bound of its difference to zero-shot lies below "
    "0 at some alpha, and to have a bump in the loss where that of the bump lies above 0. Both are "
    "Bonferroni-corrected for all sets and alphas."
)


def _smallest(facts: Facts) -> Iterator[tuple[Any, list[dict[Any, Any]], list[dict[Any, Any]]]]:
    """Yield each path, its sets that lower accuracy, and its sets with a bump; smaller sets first."""
    for at, sets in facts.cumulative.groupby(KEYS, sort=False):
        yield at, sets[sets["falls"]].to_dict("records"), sets[sets["bumps"]].to_dict("records")


def _size(fact: dict[Any, Any]) -> str:
    """Name a set: ``"3 of 31 layers (up to conv1)"``."""
    way = "up to" if fact["cumulative"] == "first" else "from"
    return f"{fact['moved']} of {fact['layers']} layers ({way} {some([fact['layer']])})"


def _said(model: str, falls: list[dict[Any, Any]], bumps: list[dict[Any, Any]]) -> str:
    """Say with which layers accuracy falls, and with which the loss has a bump."""
    text = f"no set was shown to lower the accuracy of {some([model])}"
    if falls:
        change, high = (points(falls[0][name]) for name in ("change", "change_high"))
        text = f"the smallest set shown to lower the accuracy of {some([model])} has {_size(falls[0])}: "
        text += f"{change} points at alpha = {falls[0]['alpha']:g} [95 % upper bound: {high}]"
    if not bumps:
        return f"{text}; none was shown to have a bump in the loss"
    return (
        f"{text}; the smallest with a bump in the loss has {_size(bumps[0])}: {nats(bumps[0]['bump'])} nats"
    )


def lines(facts: Facts) -> list[str]:
    """Format where accuracy falls and where a bump appears, in lines."""
    scored = images(facts.part(STUDY))
    about = f"cumulative: the first or the last layers on the path, the others zero-shot; {scored}. {_ABOUT}"
    text = paragraphs(facts, about)
    for (model, dataset, way), *found in _smallest(facts):
        line = f"{CUMULATIVE[way]} on {visible(dataset)}: {_said(model, *found)}."
        text += paragraph(line, facts.names, "- ")
    return text


def findings(facts: Facts) -> Iterator[Finding]:
    """Yield the smallest sets that lower accuracy or have a bump, on the first data set, by direction."""
    where = facts.cumulative["dataset"].iloc[0]
    for way, what in CUMULATIVE.items():
        said = [_said(at[0], *found) for at, *found in _smallest(facts) if tuple(at[1:]) == (where, way)]
        if said:
            start = f"On {some([where])}, with {what} on the path and the others zero-shot, "
            more = f"; {len(said) - 2} more models are in the summary" if len(said) > 2 else ""
            yield Finding(f"{start}{'; '.join(said[:2])}{more}.", STUDY)


def _table(facts: Facts) -> Table:
    """Create a row per set: :func:`rft_fast.studies.cumulative_effects`."""
    rows, chosen = [], []
    for fact in facts.cumulative.to_dict("records"):
        rows.append(
            [
                Cell(fact["layer"], None, "code"),
                number(fact["moved"], ".0f"),
                Cell(CUMULATIVE[fact["cumulative"]]),
                number(fact["change"], "+.1f", 100),
                number(fact["change_high"], "+.1f", 100),
                Cell("lower", 0, "bad") if fact["falls"] else Cell("not shown", 1),
                number(fact["alpha"], "g"),
                number(fact["bump"]),
                number(fact["bump_low"], "+.3f"),
                Cell(fact["model"]),
                Cell(fact["dataset"]),
            ]
        )
        chosen.append({"model": fact["model"], "dataset": fact["dataset"]})
    headings = (
        "layer|layers on the path|which layers|accuracy against zero-shot|corrected upper end|accuracy|at α|"
        "bump|corrected lower end|model|data set"
    ).split("|")
    return Table("Every set of layers", headings, rows, chosen, "Show every set")


def section(facts: Facts) -> Section:
    """Create the section on cumulative paths."""
    part, effects, margin = facts.part(STUDY), facts.cumulative, facts.of(Layers).straggler_margin
    layers = list(part["layer"].unique())
    largest, falls = largest_of(part["rise"], margin), "accuracy falls"
    shared = of_layers(layers, list(short(layers).values())) | across(part)
    charts = []
    for way, what in CUMULATIVE.items():
        traces: list[Trace] = []
        for (model, dataset, _), own in part[part["cumulative"] == way].groupby(KEYS, sort=False):
            here = effects[(effects[KEYS] == [model, dataset, way]).all(axis=1)]
            marked, show = {*here.loc[here["falls"], "layer"]}, {"model": [model], "dataset": [dataset]}
            how = (layers, margin, largest, "rise in loss", marked, show)
            traces += heat_map(own, "rise", "rise_se", *how, label=falls)
        title, frame = f"Rise in loss, {what}", layout("α of the set", "", rows_height(len(layers)), **shared)
        charts += (
            [Chart(way, title, f"Map: {title}; sets down, alpha across", traces, frame)] if traces else []
        )
    controls = [choices("model", "Model", part["model"]), choices("dataset", "Data set", part["dataset"])]
    lead = "Layers 1 to i, or i to L, on the path, the others zero-shot, for every layer i; "
    return Section(
        STUDY,
        "Layer-wise connectivity",
        "The first layers, and the last",
        f"{lead}{images(part, 'n = ', '; ')}. {_ABOUT} Marked sets lower accuracy.",
        Picture(controls, charts, [Key(falls, "@bad", "triangle-left")]),
        [_table(facts)],
    )
