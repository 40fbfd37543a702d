"""What a run found, as sentences, whether or not it agrees with the paper."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..common.words import some
from ..studies.facts import Facts
from ..studies.pruning import NAMED
from ..studies.verdicts import Sign, half_width, sign
from .phrases import tau

if TYPE_CHECKING:
    from ..catalogue import Study


@dataclass(frozen=True)
class Finding:
    """A sentence, or two, on what was found. Names stand in the text as they are, control characters too.

    study: what it comes of. dataset, model: what it is about; None: several, or all. paper: the sentence says
    what the paper finds, for comparison.
    """

    text: str
    study: str
    dataset: str | None = None
    model: str | None = None
    paper: bool = False


def findings(facts: Facts, studies: Iterable[Study]) -> list[Finding]:
    """What the studies of a run found, in their order.

    Args:
        facts: of a run with rows of the interpolation.
        studies: those to ask; one without rows has no findings.

    Raises:
        ValueError: as the analyses of :class:`rft_fast.studies.facts.Facts`.
    """
    ends = [Finding(end.text, "interpolation", end.dataset) for end in facts.chances if end.text]
    nothing = {end.dataset for end in facts.chances if end.verdict == "unknown"}
    found = [one for study in studies if study.done(facts) for one in study.findings(facts)]
    return ends + [one for one in found if one.dataset not in nothing]


def of_path(path: pd.DataFrame) -> Iterator[Finding]:
    """Which models fail. path: the summary of one data set."""
    if path["mode"].notna().all():
        where, failing = path["dataset"].iloc[0], list(path.loc[path["mode"] == "failure", "model"])
        names = f" ({', '.join(failing)})" if failing else ""
        text = f"On {where}, {len(failing)} of {len(path)} models fail: no alpha beats zero-shot{names}."
        yield Finding(text, "interpolation", where)


def of_layers(stragglers: pd.DataFrame, path: pd.DataFrame) -> Iterator[Finding]:
    """The stragglers of each model. path: the summary of one data set, which says whether models fail."""
    modes = path.set_index("model")["mode"].fillna("in distribution")
    for (model, dataset), group in stragglers.groupby(["model", "dataset"], sort=False):
        names = list(group[group["straggler"]].sort_values("instability", ascending=False)["layer"])
        said = f"{len(names)} stragglers ({some(names, 3)})" if names else "no stragglers"
        yield Finding(f"{model} ({modes[model]}) has {said} on {dataset}.", "layers", dataset, model)


def of_pruning(effects: pd.DataFrame) -> Iterator[Finding]:
    """What pruning did, and whether it did so more than its control."""
    for key, group in effects.groupby(["model", "dataset", "criterion", "method"], sort=False):
        model, dataset, criterion, method = key
        facts = {bool(fact["control"]): fact for fact in group.to_dict("records")}
        pruned = facts[False]
        gained = "came with one mask, without an error,"  # by magnitude, or one seed
        if pruned["seeds"] > 1:
            gained = verdict(pruned["change"], pruned["change_se"], pruned["seeds"] - 1, "helped", "hurt")
        what, how = ("the named layers", f"({method})")
        if criterion != NAMED:
            what, how = "the stragglers", f"by {criterion} ({method})"
        text = f"Pruning {what} of {model} {how} {gained} on {dataset}: {100 * pruned['change']:+.1f} points"
        if control := facts.get(True):
            more = pruned["change"] - control["change"]
            error = float(np.hypot(pruned["change_se"], control["change_se"]))
            against = verdict(more, error, _freedom(pruned, control), "better than", "worse than")
            text += f"; {against} the control: {100 * more:+.1f}"
        yield Finding(f"{text}.", "prune", dataset, model)


def _freedom(*means: Mapping[str, Any]) -> float:
    """Degrees of freedom of a difference of means whose variances differ (Welch and Satterthwaite).

    A control varies much more than what it is for: it draws its layers, too.
    """
    variances = [fact["change_se"] ** 2 for fact in means]
    if not sum(variances) > 0:
        return np.nan
    spread = sum(v**2 / (fact["seeds"] - 1) for v, fact in zip(variances, means, strict=True) if v)
    return float(sum(variances) ** 2 / spread)


def verdict(value: float, error: float, freedom: float, above: str, below: str) -> str:
    """A two-sided test at 5 % in words, with Student's t for the masks."""
    half = half_width(error, freedom)
    judged = sign(value - half, value + half)
    if judged in ("above", "below"):
        return above if judged == "above" else below
    return {"helped": "neither helped nor hurt clearly"}.get(above, "not clearly different from")


_TAU: dict[Sign, str] = {
    "above": "goes with higher",
    "below": "goes with lower",
    "unclear": "is not seen to go with",
    "unknown": "cannot be judged by",
}


def of_correlation(table: pd.DataFrame, where: str) -> Iterator[Finding]:
    """Whether sharpness goes with accuracy on one data set, at the highest alpha; what the paper finds."""
    part = table[(table["dataset"] == where) & (table["outcome"] == "accuracy")]
    part = part[part["alpha"] == part["alpha"].max()]
    for measure, claim in (
        ("general", "Sharpness of the whole model"),
        ("stragglers", "Sharpness of the stragglers"),
    ):
        for fact in part[part["measure"] == measure].to_dict("records"):
            judged = sign(fact["kendall_low"], fact["kendall_high"])
            # For a perfect order there is no interval; of four models, one in 12 is perfect by chance.
            perfect = judged == "unknown" and abs(fact["kendall"]) == 1 and fact["models"] > 4
            words = _TAU[judged]
            if perfect:
                words = f"orders all models {'as' if fact['kendall'] > 0 else 'against'}"
            text = (
                f"{claim} (alpha = {fact['alpha']:g}, rho = {fact['rho']:g}, {fact['measured_on']}) "
                f"{words} accuracy on {where}: tau {tau(fact)} over {fact['models']} models."
            )
            yield Finding(text, "correlation", where)
    text = "(The paper finds that the whole model's does not tell, and the stragglers' does.)"
    yield Finding(text, "correlation", paper=True)
