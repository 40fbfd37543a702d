"""What the studies found, each as one sentence that holds for none, one, or all of the models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..common.words import many, some
from ..names import REFERENCES
from ..settings import Layers, Prune
from ..studies.facts import Facts
from ..studies.interpolate import Z95
from ..studies.pruning import NAMED, kind
from ..studies.sharpness import student_t
from ..studies.verdicts import Association, association, half_width, mode, shape, sign
from .phrases import MEASURES, joined, listed_names, nats, p_value, points, within
from .shown import Finding, Rank

_BOUNDS = "95 % bounds for all alphas at once"


def path(facts: Facts) -> Iterator[Finding]:
    """Yield how many models gain, fail and have a bump, and what an alpha chosen in distribution gains."""
    table = facts.path
    far = table[table["ood"]]
    for text, rank in (
        (_gain(far if len(far) else table), Rank.GAIN),
        (_no_gain(far), Rank.NO_GAIN),
        (_bump(far if len(far) else table), Rank.BUMP),
        (_id_alpha(far), Rank.ID_ALPHA),
    ):
        if text:
            yield Finding(text, "interpolation", rank)


def _who(table: pd.DataFrame, found: Sequence[bool], did: str, did_not: str = "", named: bool = False) -> str:
    """Say how many models did something on each data set, in the past tense, which suits any number.

    Args:
        table: rows of :func:`rft_fast.studies.summarize`.
        found: for each row, whether the model did it.
        did: what they did.
        did_not: the opposite, for a single model.
        named: name the models that did it on the first data set.
    """
    start = "On" if table["ood"].any() else "In distribution, on"
    table = table.assign(found=found)
    groups = {some([name]): own for name, own in table.groupby("dataset", sort=False)}
    counts = {name: f"{own['found'].sum()} of {len(own)}" for name, own in groups.items()}
    if table["model"].nunique() == 1:
        model, where = (
            some([table["model"].iloc[0]]),
            [str(name) for name in table["dataset"][table["found"]]],
        )
        if len(table) == 1 or not where:
            return f"{start} {joined(listed_names(table['dataset']))}, {model} {did if where else did_not}"
        return f"{start} {len(where)} of {len(table)} data sets ({some(where, 3)}), {model} {did}"
    (first, own), *others = groups.items()
    who = list(own["model"][own["found"]]) if named else []
    comma = "" if others else ","
    parts = [f"{start} {first}{comma} {counts[first]} models" + (f" ({some(who, 3)})" if who else "")]
    parts += [f"on {name} {counts[name]}" for name, _ in others[:3]]
    if rest := [own["found"].sum() for _, own in others[3:]]:
        parts.append(f"on {len(rest)} more data sets {min(rest)} to {max(rest)}")
    return f"{joined(parts)} {did}"


def _whose(fact: Mapping[str, Any], table: pd.DataFrame) -> str:
    """Name the model and data set of a row, as far as the table has several."""
    parts = [str(fact["model"])] if table["model"].nunique() > 1 else []
    parts += [f"on {fact['dataset']}"] if table["dataset"].nunique() > 1 else []
    return some([" ".join(parts)]) if parts else ""


def _gain(table: pd.DataFrame) -> str:
    """Say how many models beat zero-shot, and by how much the best one does."""
    found = (table["gain_shown"] > 0).to_list()
    beat = "beat zero-shot accuracy at some alpha with 95 % confidence"
    text = _who(table, found, beat, "was not shown to beat zero-shot accuracy")
    shown = table[found] if any(found) else table
    best = shown.loc[shown["gain"].idxmax()].to_dict()
    if not best["best_alpha"]:
        bound = shown["gain_high"].max(skipna=False)
        changes = (
            "no interval" if pd.isna(bound) else f"a gain of at most {points(bound)} points [95 % bound]"
        )
        return f"{text}: accuracy was highest at alpha = 0, with {changes} at any other alpha."
    whose = _whose(best, table)
    text += f": the {'largest ' if whose else ''}gain was {points(best['gain'])} points "
    text += within(best["gain_low"], best["gain_high"], points, _BOUNDS)
    text += f" at alpha = {best['best_alpha']:g}" + (f" ({whose})" if whose else "")
    if pd.notna(best["gain_held_out"]):
        value, half = best["gain_held_out"], Z95 * best["gain_held_out_se"]
        text += f", and {points(value)} {within(value - half, value + half, points, '95 % interval')}"
        text += " with alpha chosen on other images"
    return f"{text}."


def _no_gain(far: pd.DataFrame) -> str:
    """Say how many models fail, and for how many this is undecided; empty if all gain."""
    if far.empty:
        return ""
    modes = np.array([mode(fact) for fact in far.to_dict("records")])
    failing, undecided = modes == "failure", modes == "undecided"
    xi, names = f"{100 * far['xi'].iloc[0]:g} points", far["model"].nunique()
    high = far.loc[undecided, "gain_high"].max(skipna=False) if undecided.any() else np.nan
    limit = f"95 % bounds for all alphas at once reach {points(high)} points"
    limit = "there are no bounds" if pd.isna(high) else limit
    if not failing.any():
        text = _who(far, undecided.tolist(), "neither gained nor failed for certain", named=True)
        count = "" if pd.isna(high) else f", where {xi} would count"
        return f"{text}: {limit}{count}." if undecided.any() else ""
    text = _who(far, failing.tolist(), "failed", named=True)
    bound = points(far.loc[failing, "gain_high"].max())
    text += f": a gain of at most {bound} points is possible at any alpha [95 % bound], where {xi} would "
    text += "count"
    if undecided.any():
        counts = far.assign(found=undecided).groupby("dataset", sort=False)["found"].sum()
        listed = joined([f"{count} on {some([name])}" for name, count in counts.items() if count])
        text += f"; undecided: {listed if names > 1 else some(list(counts.index[counts > 0]), 3)} ({limit})"
    return f"{text}."


def _bump(table: pd.DataFrame) -> str:
    """Say on how many paths the loss rises above the straight line between its ends; empty if unknown."""
    shapes = np.array([shape(fact) for fact in table.to_dict("records")])
    known = table[shapes != "unknown"]
    if known.empty:
        return ""
    found = (shapes[shapes != "unknown"] == "bump").tolist()
    bump = "had a bump in the loss with 95 % confidence"
    text = _who(known, found, bump, "was not shown to have a bump in the loss")
    text += " (a rise above the straight line between the losses of the two ends)"
    shown = known[found] if any(found) else known
    top = shown.loc[shown["bump"].idxmax()].to_dict()
    if top["bump"] < 1e-9:  # roundings
        return f"{text}: none was measured."
    whose = _whose(top, known)
    text += f": the {'largest' if whose else 'height'} was {nats(top['bump'])} nats "
    text += f"[95 % lower bound for all alphas at once: {nats(top['bump_low'])}]"
    return text + (f" ({whose})." if whose else ".")


def _id_alpha(far: pd.DataFrame) -> str:
    """Say what the alpha that accuracy in distribution chooses gains; empty without such data."""
    known = far[far["gain_id_alpha"].notna()] if len(far) else far
    if known.empty:
        return ""
    known = known[known["dataset"] == known["dataset"].iloc[0]]
    where, gains = some([known["dataset"].iloc[0]]), known["gain_id_alpha"]
    text = f"At the alpha that is best in distribution, the gain on {where} was "
    if len(known) > 1:
        text += f"{points(gains.median())} points in the median of {len(known)} models (range "
        text += f"{points(gains.min())} to {points(gains.max())})"
    elif not known["id_alpha"].iloc[0]:
        text += "0 points, as zero-shot is best there"
    else:
        value, half = gains.iloc[0], Z95 * known["gain_id_alpha_se"].iloc[0]
        text += f"{points(value)} points {within(value - half, value + half, points, '95 % interval')}"
    best = points(known["gain"].median())
    return f"{text}, against {best} points at the alpha that is best on {where} itself."


# --- layers -------------------------------------------------------------------------------------------------


def layers(facts: Facts) -> Iterator[Finding]:
    """Yield how many layers are stragglers, and how unstable the worst layer is."""
    table, margin = facts.stragglers, facts.of(Layers).straggler_margin
    moving = table[~table["unchanged"]]
    if moving.empty:
        yield Finding("No layer differs between the two ends.", "layers", Rank.STRAGGLERS)
        return
    counts = moving.groupby(["model", "dataset"], sort=False)["straggler"].agg(["sum", "size"])
    several = table["dataset"].nunique() > 1
    parts = [
        f"{own['sum']} of {own['size']} layers of {some([model])}"
        + (f" on {some([where])}" if several else "")
        for (model, where), own in counts.iterrows()
    ]
    if len(parts) > 3:
        low, high = counts["sum"].min(), counts["sum"].max()
        parts = [f"{low} to {high} of {counts['size'].max()} layers of {table['model'].nunique()} models"]
    where = "" if several and len(parts) < 4 else f"On {joined(listed_names(table['dataset'].unique()))}, "
    found = table[table["straggler"]]
    top = (found if len(found) else moving).sort_values("instability", ascending=False).iloc[0]
    reference = REFERENCES[facts.of(Layers).reference]
    low = f"95 % lower bound, corrected for layers and alphas: {nats(top['instability_low'])}"
    if pd.isna(top["instability_low"]):
        low = "no bound"
    label = f"{top['layer']} of {top['model']}" if table["model"].nunique() > 1 else top["layer"]
    were = "was a straggler" if len(parts) == 1 and parts[0].startswith("1 of ") else "were stragglers"
    text = (
        f"{where}{joined(parts)} {were}, unstable when moved along the path alone: the highest "
        f"instability, the rise of the loss above {reference}, was {nats(top['instability'])} nats [{low}] "
        f"({some([label])}), where {margin:g} would count"
    )
    yield Finding(f"{text}.", "layers", Rank.STRAGGLERS)


# --- sharpness ----------------------------------------------------------------------------------------------


def sharpness(facts: Facts) -> Iterator[Finding]:
    """Yield how sharp the flattest and the sharpest model are, and at which rho they are saturated."""
    top, chance = _least_saturated(facts, "sharpness")
    if top.empty:
        yield Finding(f"{chance}.", "sharpness", Rank.SHARPNESS)
        return
    first, alpha = top.iloc[0], top["alpha"].iloc[0]
    part = facts.part("sharpness")
    zero = part[(part["alpha"] == 0) & (part["rho"] == first["rho"]) & (part["dataset"] == first["dataset"])]
    zero = zero[~facts.saturated(zero)]
    compared = alpha > 0 and zero["sharpness"].nunique() == 1
    top = top if alpha > 0 or top["sharpness"].nunique() > 1 else top.iloc[:1]  # one zero-shot model
    values = top.assign(half=student_t(top, tests=len(top) + compared) * top["sharpness_se"])
    names = values["model"].map(lambda model: some([model]))
    low, high = values["sharpness"].idxmin(), values["sharpness"].idxmax()
    text = f"{_cause(first, 'all weights')} changed the loss at alpha = {alpha:g} by "
    if values["half"].isna().any():  # one draw, or a worst case of one noise batch
        text += nats(values.loc[low, "sharpness"])
        if len(values) > 1:
            text += (
                f" to {nats(values.loc[high, 'sharpness'])} nats over {len(values)} models, without intervals"
            )
        else:
            text += " nats, without an interval"
        text += ", so that nothing can be concluded"
    elif len(values) + compared == 1:
        text += _rise(values.loc[low], "95 % interval: ")
    else:
        text += _rise(values.loc[low])
        if len(values) > 1:
            text += f" ({names[low]}) to {_rise(values.loc[high])} ({names[high]}) over {len(values)} models"
        if compared:
            one = zero.iloc[:1]
            own = one.assign(half=student_t(one, tests=len(top) + 1) * one["sharpness_se"])
            text += f", and that of the zero-shot model by {_rise(own.iloc[0])}"
        text += f" [95 % intervals, corrected for {len(top) + compared} models]"
    yield Finding(f"{text}{f'; {chance}' if chance else ''}.", "sharpness", Rank.SHARPNESS)


def _cause(row: pd.Series, target: str) -> str:
    """Name what changed the loss: noise, its limit for small rho, or the worst case that was found."""
    worst = row["estimator"].startswith("apgd")
    what = f"The worst perturbation found of {target}" if worst else f"Noise on {target}"
    limit = ", in the limit of small rho" if row["estimator"] == "hessian" else ""
    return f"{what} (rho = {row['rho']:g}{limit}, on {some([row['dataset']])})"


def _rise(row: pd.Series, what: str = "") -> str:
    value, half = row["sharpness"], row["half"]
    interval = "[no interval]" if pd.isna(half) else f"[{what}{nats(value - half)}, {nats(value + half)}]"
    return f"{nats(value)} nats {interval}"


def _least_saturated(facts: Facts, study: str) -> tuple[pd.DataFrame, str]:
    """Choose the way of measuring with the fewest saturated rows at the highest alpha.

    Returns:
        Its rows there that are not saturated, of the largest rho of equally good ones; and a clause on the
        saturated rows of all ways, empty if there are none.
    """
    part = facts.part(study)
    part = part[(part["alpha"] == part["alpha"].max()) & np.isfinite(part["sharpness"])].reset_index()
    if part.empty:
        return part, "The perturbed models have no finite loss"
    part = part.assign(bad=facts.saturated(part))
    ways = part.groupby(["dataset", "rho", "on", "asked"], sort=False, dropna=False)
    (_, best), *_ = sorted(ways, key=lambda way: (way[1]["bad"].mean(), -way[0][1]))
    bad = [(key[1], f"{own['bad'].sum()} of {len(own)}") for key, own in ways if own["bad"].any()]
    if not bad:
        return best, ""
    what = "perturbed models" if study == "sharpness" else "models with one perturbed layer"
    (rho, count), *others = bad
    listed = [f"{count} {what} at rho = {rho:g}", *(f"{count} at rho = {rho:g}" for rho, count in others)]
    clause = (
        f"{joined(listed)} answered at chance (saturated), so that their sharpness says nothing about "
        "flatness"
    )
    return best[~best["bad"]], clause


def layer_sharpness(facts: Facts) -> Iterator[Finding]:
    """Yield which layer is the sharpest, against the median layer."""
    top, chance = _least_saturated(facts, "layer-sharpness")
    if top.empty:
        yield Finding(f"{chance}.", "layer-sharpness", Rank.LAYER_SHARPNESS)
        return
    if not top["alpha"].iloc[0]:
        return  # nothing is perturbed there
    values = top.assign(half=student_t(top, tests=len(top)) * top["sharpness_se"])
    row = values.loc[values["sharpness"].idxmax()]
    label = f"{row['layer']} of {row['model']}" if top["model"].nunique() > 1 else row["layer"]
    which = f"layer {some([label])} alone"
    corrected = f", corrected for {len(top)} layers" if len(top) > 1 else ""
    text = f"{_cause(row, which)} changed the loss at alpha = {row['alpha']:g} by "
    text += _rise(row, f"95 % interval{corrected}: ")
    if len(top) > 1:
        text += f", the most of all layers{' that were not saturated' if chance else ''}, against "
        text += f"{nats(top['sharpness'].median())} nats in the median layer"
    yield Finding(f"{text}{f'; {chance}' if chance else ''}.", "layer-sharpness", Rank.LAYER_SHARPNESS)


# --- pruning ------------------------------------------------------------------------------------------------


def prune(facts: Facts) -> Iterator[Finding]:
    """Yield how often pruning helps or hurts, and the largest change against that of the control."""
    effects = facts.pruning
    if effects.empty:
        sought = " and no ".join(map(kind, facts.of(Prune).criteria))
        yield Finding(f"No layer was pruned, as no {sought} were found.", "prune", Rank.PRUNING)
        return
    pruned, control = effects[~effects["control"].astype(bool)], effects[effects["control"].astype(bool)]
    cases = len(pruned)
    judged = []
    for fact in pruned.to_dict("records"):
        half = half_width(fact["change_se"], fact["seeds"] - 1, cases)
        verdict = sign(fact["change"] - half, fact["change"] + half)
        judged.append({**fact, "half": half, "verdict": verdict})
    clear = [fact for fact in judged if fact["verdict"] in ("above", "below")]
    known = [fact for fact in judged if fact["verdict"] != "unknown"]
    top = max(clear or known or judged, key=lambda fact: abs(fact["change"]))
    what = "the named layers" if top["criterion"] == NAMED else f"the {kind(top['criterion'])}"
    about = f"{what} of {some([top['model']])} on {some([top['dataset']])} (method {top['method']})"
    keys = ["model", "dataset", "criterion", "method", "keep"]
    same = control[(control[keys] == [top[key] for key in keys]).all(axis=1)]
    ends = (top["change"] - top["half"], top["change"] + top["half"])
    corrected = f" corrected for {cases} cases" if cases > 1 else ""
    change = f"{points(top['change'])} points {within(*ends, points, f'95 % interval{corrected}')}"
    change += " on average over alpha > 0"
    against = (
        f", against {points(same['change'].iloc[0])} points with as many other layers" if len(same) else ""
    )
    if cases == 1:
        effect = {"above": "raised", "below": "lowered"}.get(top["verdict"], "did not clearly change")
        text = f"Pruning {about} {effect} accuracy: the change was {change}{against}"
    else:
        helped, hurt = (sum(fact["verdict"] == way for fact in judged) for way in ("above", "below"))
        text = (
            f"Pruning clearly raised accuracy in {helped} and lowered it in {hurt} of {cases} cases (layers, "
        )
        text += f"method and data set): the largest {'of these changes' if clear else 'change'} was {change}"
        text += f", for {about}{against}"
    if np.isnan(top["half"]):
        text += "; one mask, or masks that agree, give no interval"
    yield Finding(f"{text}.", "prune", Rank.PRUNING)


# --- correlation --------------------------------------------------------------------------------------------

_TAU: dict[Association, str] = {
    "above": "went with higher",
    "below": "went with lower",
    "unclear": "had no significant association with",
}


def correlation(facts: Facts) -> Iterator[Finding]:
    """Yield whether sharpness goes with accuracy on the first data set out of distribution."""
    table = facts.correlation
    where = facts.deciding["dataset"].iloc[0]
    part = table[(table["dataset"] == where) & (table["outcome"] == "accuracy")]
    part = part[part["alpha"] == part["alpha"].max()]
    part = part.assign(judged=[association(fact) for fact in part.to_dict("records")])
    clauses: list[str] = []
    for measure, words in MEASURES.items():
        own = part[part["measure"] == measure]
        if own.empty:
            continue
        what = f"sharpness of {words}"
        with_accuracy = "accuracy" if clauses else f"accuracy on {some([where])}"
        tested = own[own["p_max"].notna()]
        if tested.empty:
            why = "saturated" if (own["judged"] == "saturated").any() else "tau is undefined"
            clauses.append(f"{what} was not tested against {with_accuracy} ({why})")
            continue
        fact = tested.loc[tested["p_max"].idxmin()].to_dict()
        higher = "" if fact["judged"] == "unclear" else "higher "
        text = f"{higher}{what} {_TAU[fact['judged']]} {with_accuracy} (Kendall's tau {fact['kendall']:+.2f}"
        if pd.notna(fact["without_low"]):
            text += (
                f" [with any one model left out {fact['without_low']:+.2f} to {fact['without_high']:+.2f}]"
            )
        text += f", p = {p_value(fact['p_max'])} corrected for {many(fact['tests'], 'test')}"
        text += f", rho = {fact['rho']:g}"
        few = fact["judged"] == "unclear" and pd.isna(fact["needed"])
        text += "; no tau of so few models could be significant" if few else ""
        clauses.append(f"{text}{', circular: the same images' if fact['circular'] else ''})")
    rival = part[(part["measure"] == "minus clean loss") & part["kendall"].notna()]
    if clauses and len(rival):
        clauses.append(f"minus the loss without noise has tau {rival['kendall'].iloc[0]:+.2f}")
    if clauses:
        start = f"Over {part['models'].max()} models at alpha = {part['alpha'].iloc[0]:g}"
        yield Finding(f"{start}, {'; '.join(clauses)}.", "correlation", Rank.CORRELATION)
