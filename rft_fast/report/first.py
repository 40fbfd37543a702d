"""What to look at first on the page of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..common.words import many, some
from ..studies.facts import Facts
from ..studies.verdicts import mode
from .drawing import ALL
from .phrases import joined, points
from .shown import Attempts, Look, Section


def looks(facts: Facts, parts: Sequence[Section]) -> list[Look]:
    """Choose what to look at first, in the order of reading.

    Args:
        facts: facts of a run.
        parts: the sections of its page.

    Returns:
        Links to sections that exist; without what an analysis that fails would have chosen.
    """
    shown = {part.name for part in parts}
    found: list[Look] = []
    attempts = Attempts()
    for choose in (_path, _layers, _saturated, _claim):
        with attempts.at(choose.__name__):
            found += [look for look in choose(facts) if look.section in shown]
    boxes = [f"“{part.title}”" for part in parts if part.warnings]
    if boxes:
        first = next(part.name for part in parts if part.warnings)
        text = f"See the yellow {'box' if len(boxes) == 1 else 'boxes'} in {joined(boxes)}."
        found.append(Look(first, "What cannot be concluded?", text))
    return found


def _path(facts: Facts) -> Iterator[Look]:
    """The best and the worst path on the data set that decides."""
    table = facts.deciding
    gains = table[np.isfinite(table["gain"])]
    if gains.empty:
        return
    best = gains.loc[gains["gain"].idxmax()]
    text = f"On {some([best['dataset']])}, the highest gain is {points(best['gain'])} points"
    text += f" at alpha = {best['best_alpha']:g} ({some([best['model']])})"
    failing = [fact["model"] for fact in table.to_dict("records") if fact["ood"] and mode(fact) == "failure"]
    text += f"; compare it with {some(failing, 2)}, which failed." if failing else "."
    yield Look("path", "Does the path beat zero-shot?", text, {"dataset": best["dataset"], "model": ALL})


def _layers(facts: Facts) -> Iterator[Look]:
    """The most unstable straggler, or else the most unstable layer."""
    if facts.part("layers").empty:
        return
    table = facts.stragglers[np.isfinite(facts.stragglers["instability"])]
    if table.empty:
        return
    found = table[table["straggler"]]
    top = (found if len(found) else table).sort_values("instability", ascending=False, kind="stable").iloc[0]
    which = f"{some([top['layer']])} of {some([top['model']])} on {some([top['dataset']])}"
    text = f"The most unstable straggler is {which}."
    if found.empty:
        text = f"No layer is a straggler; the most unstable one is {which}."
    choose = {"model": top["model"], "dataset": top["dataset"], "layer": top["layer"]}
    yield Look("layers", "Which layer spoils the path?", text, choose)


def _saturated(facts: Facts) -> Iterator[Look]:
    """How much of the sharpness is saturated, before it is read."""
    for study in ("sharpness", "layer-sharpness"):
        part = facts.part(study)
        count = 0 if part.empty else int(facts.saturated(part).sum())
        if count:
            of = f"of {len(part):,} values"
            are = many(f"{count:,}", f"{of} is", f"{of} are")
            text = f"{are} saturated, which says nothing about flatness."
            yield Look(study, f"Which {study.replace('-', ' ')} can be read?", text)


def _claim(facts: Facts) -> Iterator[Look]:
    """The paper's claim, or else the correlation."""
    if "claim" in facts.measured:
        text = "The number of flat layers of each model against its gain, with a test by permutation."
        yield Look("claim", "Do flat layers go with failure?", text)
    if "correlation" in facts.measured:
        text = "Rank correlations over models, with the loss without noise as a competitor."
        yield Look("correlation", "Does sharpness predict accuracy?", text)
