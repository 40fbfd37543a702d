"""The findings of a run as sentences, whether or not they agree with the paper."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from ..common.words import some
from ..studies.facts import Facts
from ..studies.pruning import kind
from ..studies.verdicts import Association, Mode, association, half_width, mode, shape, sign
from .phrases import by_shape, p_value
from .shown import Finding, Shown


def findings(facts: Facts, studies: Iterable[Shown]) -> list[Finding]:
    """Collect the findings of studies, in their order, after the zero-shot ends that are near chance.

    Args:
        facts: facts of a run, with rows of the interpolation.
        studies: the studies; those without rows are skipped.

    Raises:
        ValueError: an analysis of :class:`rft_fast.studies.facts.Facts` refuses the rows.
    """
    ends = [Finding(end.text, "interpolation", end.dataset) for end in facts.chances if end.text]
    nothing = {end.dataset for end in facts.chances if end.verdict == "unknown"}
    found = [one for study in studies if study.done(facts) for one in study.findings(facts)]
    return ends + [one for one in found if one.dataset not in nothing]


def of_path(path: pd.DataFrame) -> Iterator[Finding]:
    """Yield which models gain and fail, by how much, and on whose paths the loss has a bump.

    Args:
        path: :func:`rft_fast.studies.summarize` of one data set.
    """
    yield _of_modes(path)
    yield from _of_gains(path)
    yield from _of_shapes(path)


_BOUNDS = "(95 % bounds on each side, for all alphas at once.)"
_ONE: dict[Mode, str] = {
    "high gain": "{model} gained over zero-shot, with an observed gain of {xi} or more",
    "gain": "{model} gained over zero-shot, by less than {xi} where the gain is significant",
    "failure": "{model} failed, as no gain of {xi} is possible",
    "undecided": "it is undecided whether {model} gained over zero-shot",
}


def _of_modes(path: pd.DataFrame) -> Finding:
    """Say how many models gain, fail, or are undecided, by bounds for all positions at once."""
    where, count, xi = path["dataset"].iloc[0], len(path), f"{100 * path['xi'].iloc[0]:g} points"
    models: dict[Mode, list[str]] = {}
    for fact in path.to_dict("records"):
        models.setdefault(mode(fact), []).append(fact["model"])
    if count == 1:
        ((found, (model,)),) = models.items()
        text = f"On {where}, {_ONE[found].format(model=some([model]), xi=xi)}. {_BOUNDS}"
        return Finding(text, "interpolation", where)
    high, lower = models.get("high gain", []), models.get("gain", [])
    text = f"{len(high + lower) or 'none'} of {count} models gained over zero-shot"
    if high or lower:
        text += f", {len(high) or 'none'} of them with an observed gain of {xi} or more"
    if failing := models.get("failure"):
        text += f"; {len(failing)} failed, as no gain of {xi} is possible ({some(failing, 4)})"
    if undecided := models.get("undecided"):
        text += f"; undecided: {len(undecided)} ({some(undecided, 4)})"
    return Finding(f"On {where}, {text}. {_BOUNDS}", "interpolation", where)


def _of_gains(path: pd.DataFrame) -> Iterator[Finding]:
    """Yield the median gain: as observed, held out, and at the alpha that is best in distribution."""
    where = path["dataset"].iloc[0]
    parts = [f"{100 * path['gain'].median():+.1f} points at the best alpha"]
    for name, words in (
        ("gain_held_out", "with alpha chosen on other images"),
        ("gain_id_alpha", "at the alpha that is best in distribution"),
    ):
        if path[name].notna().all():
            parts.append(f"{100 * path[name].median():+.1f} {words}")
    if len(parts) > 1:
        of = f"median gain of {len(path)} models" if len(path) > 1 else f"gain of {path['model'].iloc[0]}"
        yield Finding(f"On {where}, {of}: {', '.join(parts)}.", "interpolation", where)


def _of_shapes(path: pd.DataFrame) -> Iterator[Finding]:
    """Yield on how many models' paths the loss has a bump."""
    where = path["dataset"].iloc[0]
    shapes = [shape(fact) for fact in path.to_dict("records")]
    known = len(shapes) - shapes.count("unknown")
    if not known:
        return
    if len(path) == 1:
        (fact,) = path.to_dict("records")
        told = {"bump": f"rises above the straight line between its ends (bump: {fact['bump']:.3f} nats)",
                "slope": "only slopes upward"}.get(shapes[0], "is not shown to rise")  # fmt: skip
        yield Finding(f"On {where}, the loss of {fact['model']} {told}.", "interpolation", where)
        return
    of = f"of {known} model{'s' if known > 1 else ''}"
    bumps = path[[each == "bump" for each in shapes]].sort_values("bump", ascending=False)
    listed = [f"{fact['model']} {fact['bump']:.3f}" for fact in bumps.to_dict("records")]
    text = f"the loss of {len(listed) or 'none'} {of} rises above the straight line between its ends"
    text += f" (bump in nats: {some(listed, 4)})" if listed else ""
    text += f"; that of {shapes.count('slope') or 'none'} only slopes upward"
    yield Finding(f"On {where}, {text}.", "interpolation", where)


def of_layers(stragglers: pd.DataFrame, path: pd.DataFrame) -> Iterator[Finding]:
    """Yield the stragglers of each model on each data set.

    Args:
        stragglers: the result of :func:`rft_fast.studies.stragglers`.
        path: :func:`rft_fast.studies.summarize` of one data set, for the mode of each model.
    """
    modes = path.set_index("model")["mode"].fillna("in distribution")
    for (model, dataset), group in stragglers.groupby(["model", "dataset"], sort=False):
        worst = group[group["straggler"]].sort_values("instability", ascending=False)
        which = f"{len(worst) or 'no'} straggler{'' if len(worst) == 1 else 's'} on {dataset}"
        which += f": {by_shape(worst)}" if len(worst) else ""
        yield Finding(f"{model} ({modes[model]}) has {which}.", "layers", dataset, model)


def of_pruning(effects: pd.DataFrame) -> Iterator[Finding]:
    """Yield the effect of pruning, alone and compared with the control.

    Args:
        effects: the result of :func:`rft_fast.studies.pruning_effect`.
    """
    for key, group in effects.groupby(["model", "dataset", "criterion", "method"], sort=False):
        model, dataset, criterion, method = key
        facts = {bool(fact["control"]): fact for fact in group.to_dict("records")}
        pruned = facts[False]
        gained = "cannot be judged from one mask"  # pruned by magnitude, or with one seed
        if pruned["seeds"] > 1:
            gained = verdict(pruned["change"], pruned["change_se"], pruned["seeds"] - 1, "helped", "hurt")
        text = f"Pruning the {kind(criterion)} of {model} ({method}) {gained} on {dataset}: "
        text += f"{100 * pruned['change']:+.1f} points"
        if control := facts.get(True):
            more = pruned["change"] - control["change"]
            error = float(np.hypot(pruned["change_se"], control["change_se"]))
            against = verdict(more, error, _freedom(pruned, control), "better than", "worse than")
            text += f"; {against} the control: difference {100 * more:+.1f}"
        yield Finding(f"{text}.", "prune", dataset, model)


def _freedom(*means: Mapping[str, Any]) -> float:
    """Degrees of freedom of a difference of means with different variances (Welch and Satterthwaite).

    The control varies more than the pruning it is compared with: its layers are random, too.
    """
    variances = [fact["change_se"] ** 2 for fact in means]
    if not sum(variances) > 0:
        return np.nan
    spread = sum(v**2 / (fact["seeds"] - 1) for v, fact in zip(variances, means, strict=True) if v)
    return float(sum(variances) ** 2 / spread)


def verdict(value: float, error: float, freedom: float, above: str, below: str) -> str:
    """Describe the result of a two-sided test at 5 %, by Student's t over masks."""
    half = half_width(error, freedom)
    judged = sign(value - half, value + half)
    if judged in ("above", "below"):
        return above if judged == "above" else below
    return {"helped": "had no clear effect"}.get(above, "not clearly different from")


_TAU: dict[Association, str] = {
    "above": "is associated with higher",
    "below": "is associated with lower",
    "unclear": "has no significant association with",
    "unknown": "has an undefined association with",
}


def of_correlation(table: pd.DataFrame, where: str) -> Iterator[Finding]:
    """Yield whether sharpness and accuracy are associated at the highest alpha, and the paper's result.

    Args:
        table: the result of :func:`rft_fast.studies.correlation`.
        where: name of the data set of the accuracy.
    """
    part = table[(table["dataset"] == where) & (table["outcome"] == "accuracy")]
    part = part[part["alpha"] == part["alpha"].max()]
    for measure, claim in (
        ("general", "Sharpness of the whole model"),
        ("stragglers", "Sharpness of the stragglers"),
    ):
        for fact in part[part["measure"] == measure].to_dict("records"):
            yield Finding(_associated(fact, claim, where, part), "correlation", where)
    text = (
        "(In the paper, the sharpness of the whole model does not predict accuracy; that of the stragglers "
        "does.)"
    )
    yield Finding(text, "correlation", paper=True)


def _associated(fact: Mapping[Any, Any], claim: str, where: str, part: pd.DataFrame) -> str:
    """Describe one rank correlation, beside that of the clean loss on the same images."""
    judged = association(fact)
    claim += f" (alpha = {fact['alpha']:g}, rho = {fact['rho']:g}, {fact['measured_on']})"
    if judged == "saturated":
        tau = f"Its tau with accuracy on {where}"
        tau += (
            " is undefined, and would say" if pd.isna(fact["kendall"]) else f", {fact['kendall']:+.2f}, says"
        )
        return (
            f"{claim} is saturated in {fact['saturated']} of {fact['models']} models: perturbed, they answer "
            f"at chance. {tau} nothing of flatness; a smaller rho may."
        )
    text = f"{claim} {_TAU[judged]} accuracy on {where}: "
    if judged == "unknown":
        return f"{text}it is not defined over {fact['models']} models."
    text += f"tau {fact['kendall']:+.2f} over {fact['models']} models, p = {p_value(fact['p_max'])} "
    text += f"(permutation, corrected for {fact['tests']} tests)"
    if judged == "unclear":
        possible = pd.notna(fact["needed"])
        text += (
            f"; {fact['needed']:.2f} would be significant" if possible else "; with so few, no tau could be"
        )
    if pd.notna(fact["partial"]):
        text += f"; given the clean loss, tau {fact['partial']:+.2f}"
    same = part["measured_on"] == fact["measured_on"]
    for other in part[same & (part["measure"] == "minus clean loss")].to_dict("records"):
        known = f"tau {other['kendall']:+.2f}, p = {p_value(other['p_max'])}"
        text += f"; minus the clean loss alone, {'tau undefined' if pd.isna(other['kendall']) else known}"
    circular = " Circular: both are of the same images." if fact["circular"] else ""
    return f"{text}.{circular}"
