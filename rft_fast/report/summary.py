"""The summary of a run, for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..common.tables import aligned
from ..common.terminal import Style, styled
from ..common.words import duration, many, paragraph, visible
from ..names import REFERENCES
from ..settings import Along, Layers, Prune, Sharpness
from ..studies.facts import ENDS, Facts
from ..studies.gains import MAX_T
from ..studies.interpolate import Z95
from ..studies.verdicts import association, shape
from .findings import findings
from .phrases import (
    MEASURES,
    PAPER_CORRELATION,
    by_shape,
    images,
    limits,
    p_value,
    pruned_layers,
    span,
)
from .shown import Attempts, Finding, Shown

LEGEND = (
    "Accuracies, gains and instability in accuracy in points (%), barrier, bump and instability in loss"
    " in nats. Gain (Eq. 2): highest accuracy on the path minus zero-shot, on the images that choose "
    "the best alpha, which makes it optimistic. In brackets a lower and an upper bound of the best gain"
    " over alpha > 0, each with 95 % confidence, corrected for all positions ({by}), paired over "
    "images. Mode, out of distribution: gain where that lower bound is above 0, high gain where such a "
    "position gains {xi:g} points or more (--xi), failure where the upper bound is below {xi:g} points,"
    " otherwise undecided. Held out: alpha chosen on four fifths of the images, measured on the others."
    " Alpha of ID: the best one in distribution, and the gain there. +-: half of the 95 % interval over"
    " images. Barrier (Eq. 1): highest loss minus zero-shot. Bump: highest loss above the straight line"
    " between the losses of the two ends. Shape of the loss: a bump where that lies above 0 with 95 % "
    "confidence, a slope where only the loss lies above zero-shot, no rise where neither is shown "
    "(Student's t, Bonferroni-corrected for the positions). Instability (Def. 1): how much worse the "
    "worst position is than the mean of the two ends."
)


def report(
    facts: Facts,
    studies: Iterable[Shown],
    found: Sequence[Finding] | None = None,
    attempts: Attempts | None = None,
) -> str:
    """Format the findings, then a section for each study.

    Args:
        facts: facts of the run's rows.
        studies: the studies, in order.
        found: their findings; None: they are collected here.
        attempts: records the studies that fail; the others are shown.
    """
    studies, attempts = list(studies), Attempts() if attempts is None else attempts
    lines = []
    for finding in findings(facts, studies, attempts) if found is None else found:
        lines += paragraph(visible(finding.text), facts.names, "- ")
    short = [styled("In short", "heading"), *lines] if lines else []
    return "\n".join([*short, sections(facts, studies, attempts)])


def sections(facts: Facts, studies: Iterable[Shown], attempts: Attempts | None = None) -> str:
    """Format a section for each study with results, and for those missing from a run of all studies."""
    attempts = Attempts() if attempts is None else attempts
    lines = []
    for study in studies:
        if not study.done(facts):
            lines += study.say_missing(facts) if facts.everything else []
            continue
        with attempts.at(study.name):
            lines += study.say(facts)
            continue
        lines += paragraphs(facts, f"{study.name}: its tables failed ({attempts.failed[study.name]}).")
    infinite = int((~np.isfinite(facts.rows["loss"])).sum())
    are = many(infinite, "mean loss is", "mean losses are")
    lines += [f"\n{are} not finite; a mean is over all images."] if infinite else []
    return "\n".join(lines)


def interpolation(facts: Facts) -> list[str]:
    """Format the path of each model (Figure 1), in lines."""
    lines = []
    for dataset, group in facts.path.groupby("dataset", sort=False):
        first = group.iloc[0]
        where = "out of" if first["ood"] else "in"
        skipped = int(facts.rows.loc[facts.rows["dataset"] == dataset, "skipped"].fillna(0).max())
        left_out = f" (without {skipped:,} that cannot be read)" if skipped else ""
        images = f"{first['samples']:,} images{left_out}"
        lines += [f"\n{visible(dataset)}: {where} distribution, {images}, {first['alphas']} alphas"]
        records = group.to_dict("records")
        lines += aligned([*_ACCURACIES, *map(_accuracies, records)], last=True, style=_verdict)
        lines += ["", *aligned([*_LOSSES, *map(_losses, records)], last=True)]
    methods = set(facts.path["gain_method"])
    by = (
        "by max-T"
        if methods == {MAX_T}
        else "Bonferroni-corrected where no results of single images are kept"
    )
    return [*lines, "", *paragraph(LEGEND.format(xi=100 * facts.of(Along).xi, by=by), facts.names)]


def _verdict(cell: str) -> str:
    """Colour the word of a mode."""
    style: dict[str, Style] = {
        "gain": "good",
        "high gain": "good",
        "failure": "error",
        "undecided": "warning",
    }
    word = cell.strip()
    return cell.replace(word, styled(word, style[word])) if word in style else cell


_ACCURACIES = [
    ["", "zero-", "fine-", "best", "", "held", "alpha", "gain at", ""],
    ["model", "shot", "tuned", "alpha", "gain [95 % bounds]", "out", "of ID", "alpha of ID", "mode"],
]
_LOSSES = [
    ["", "", "", "instability", "", "shape of"],
    ["model", "barrier", "bump", "loss", "accuracy", "the loss"],
]


def _accuracies(fact: dict[Any, Any]) -> list[str]:
    """Cells of a model's gain."""
    bounds = ", ".join(_points(fact[end]) for end in ("gain_low", "gain_high"))
    return [
        fact["model"],
        f"{100 * fact['zero_shot']:.1f}",
        f"{100 * fact['fine_tuned']:.1f}",
        f"{fact['best_alpha']:g}",
        f"{_points(fact['gain'])} [{bounds}]",
        _points(fact["gain_held_out"], fact["gain_held_out_se"]),
        "-" if pd.isna(fact["id_alpha"]) else f"{fact['id_alpha']:g}",
        _points(fact["gain_id_alpha"], fact["gain_id_alpha_se"]),
        "-" if pd.isna(fact["mode"]) else fact["mode"],
    ]


def _points(value: float, error: float | None = None) -> str:
    """Format a difference in accuracy in points, with half of its 95 % interval if an error is given."""
    if pd.isna(value):
        return "-"
    if not value and not error:  # alpha = 0 is best
        return "0.0"
    return f"{100 * value:+.1f}" + ("" if error is None else f" +- {100 * Z95 * error:.1f}")


def _losses(fact: dict[Any, Any]) -> list[str]:
    """Cells of a model's loss along the path."""
    return [
        fact["model"],
        _nats(fact["barrier"]),
        _nats(fact["bump"]) if pd.notna(fact["bump"]) else "-",
        _nats(fact["instability_loss"]),
        f"{100 * fact['instability_accuracy']:.1f}",
        shape(fact).replace("unknown", "-"),
    ]


def _nats(value: float) -> str:
    """Format a loss; one that overflowed would have 38 digits."""
    return f"{value:.3f}" if abs(value) < 1e6 else f"{value:.3g}"


def layers(facts: Facts) -> list[str]:
    """Format the stragglers (Figure 2), in lines."""
    lines = paragraphs(
        facts,
        f"layers: each layer on the path, the others {ENDS[facts.of(Layers).others]}; "
        f"{images(facts.part('layers'))}, {facts.stragglers.iloc[0]['alphas']} alphas. A straggler's "
        f"instability lies above {facts.of(Layers).straggler_margin:g} nats with 95 % confidence "
        "(Bonferroni-corrected for layers and alphas), and its loss above that at alpha = 0. Instability is "
        f"measured from {REFERENCES[facts.of(Layers).reference]}. By a bump: the loss also rises above "
        "the straight line between the layer's own ends, with the same correction. By a slope: this is not "
        "shown.",
    )
    for (model, dataset), group in facts.stragglers.groupby(["model", "dataset"], sort=False):
        worst = group[group["straggler"]].sort_values("instability", ascending=False)
        on = visible(f"{model} on {dataset}")
        same = int(group["unchanged"].sum())
        left_out = f"; {many(same, 'more is', 'more are')} the same at both ends" if same else ""
        shapes = f": {by_shape(worst)}" if len(worst) else ""
        of = f"of {len(group) - same} layers"
        are = many(len(worst), f"{of} is a straggler", f"{of} are stragglers")
        lines.append(f"  {on}: {are}{left_out}{shapes}")
        lines += [
            f"    {fact['layer']}: instability {_nats(fact['instability'])} "
            f"+- {_nats(fact['instability_se'])} nats, {100 * fact['instability_accuracy']:.1f} points; "
            f"bump {_nats(fact['bump'])}"
            for fact in worst.to_dict("records")
        ]
    return lines


def sharpness(facts: Facts) -> list[str]:
    """Format general sharpness (Figure 3) at the ends and in the middle, in lines."""
    lines = []
    for (_, rho), group in facts.part("sharpness").groupby(["dataset", "rho"], sort=False):
        lines += paragraphs(
            facts, f"sharpness: all weights perturbed, {_how(facts, group, rho)}. In nats, +- standard error."
        )
        alphas = sorted(group["alpha"].unique())
        shown = [alphas[index] for index in sorted({0, len(alphas) // 2, len(alphas) - 1})]
        table = [["model", *(f"alpha {alpha:g}" for alpha in shown)]]
        for model, curve in group.groupby("model", sort=False):
            by_alpha = curve.set_index("alpha")
            table.append([str(model), *(_value(by_alpha.loc[alpha]) for alpha in shown)])
        lines += aligned(table)
    return lines


def layer_sharpness(facts: Facts) -> list[str]:
    """Format the flattest and the sharpest layers (Figure 4), in lines."""
    lines = []
    near = facts.near_zero
    for (dataset, rho), group in facts.part("layer-sharpness").groupby(["dataset", "rho"], sort=False):
        where = "fine-tuned weights" if (group["on"] == "finetuned").all() else "interpolated weights"
        lines += paragraphs(
            facts,
            f"layer-sharpness: one layer of the {where} perturbed, {_how(facts, group, rho)}. Flat: the "
            f"95 % interval lies within {facts.of(Sharpness).zero_margin:g} nats at every alpha.",
        )
        for model, own in group.groupby("model", sort=False):
            same = (near["model"] == model) & (near["dataset"] == dataset) & (near["rho"] == rho)
            tested = near[same & near["bound"].notna()]
            count, flat = own["layer"].nunique(), int(tested["near_zero"].sum())
            of = f"of {count} layers"
            if len(tested) < count:  # one draw, or a worst case
                of = f"of {len(tested)} tested layers"
            flats = f"{many(flat, f'{of} is', f'{of} are')} flat"
            flats += f"; {count - len(tested)} not tested" if len(tested) < count else ""
            if tested.empty:
                flats = "flatness is not tested, as there is no standard error (one draw, or a worst case)"
            top = own[own["alpha"] == own["alpha"].max()].nlargest(3, "sharpness")
            sharpest = ", ".join(f"{row['layer']} {_value(row)}" for row in top.to_dict("records"))
            lines += [
                f"  {visible(str(model))}: {flats}; sharpest at alpha = {own['alpha'].max():g}:",
                f"    {sharpest}",
            ]
    return lines


def _how(facts: Facts, group: pd.DataFrame, rho: float) -> str:
    first = group[group["alpha"] > 0].iloc[0]
    count = span(group.loc[group["alpha"] > 0, "draws"])
    unit = "|w|" if first["adaptive"] else "1"
    images = f"{first['samples']} images of {first['dataset']}"
    if pd.isna(first["noise"]):
        worst = f"the worst case by {many(count, 'step')} ({first['estimator']})"
        if (starts := span(group["restarts"].fillna(1))) != "1":
            worst += f", the highest of {starts} starts with seed {first['seed']}"
        return f"rho = {rho:g} in units of {unit}, {worst}, {images}{_saturated(facts, group)}"
    text = f"rho = {rho:g} ({first['noise']}, in units of {unit}), {many(count, 'draw')} "
    text += f"({first['estimator']}), {images}, seed {first['seed']}"
    missed = int((~group["reached"].fillna(True)).sum())
    text += f"; {many(missed, 'row')} did not reach the requested standard error" if missed else ""
    return text + _saturated(facts, group)


def _saturated(facts: Facts, group: pd.DataFrame) -> str:
    count = int(facts.saturated(group).sum())
    said = f"; in {count:,} of {len(group):,} rows the perturbed model answers at chance (saturated)"
    return f"{said}, so that sharpness says nothing about flatness" if count else ""


def _value(row: Any) -> str:
    error = row["sharpness_se"]
    return f"{row['sharpness']:.3g}" + ("" if pd.isna(error) else f" +- {error:.2g}")


def prune(facts: Facts) -> list[str]:
    """Format the effects of pruning (Figure 5), in lines."""
    part, own = facts.part("prune"), facts.of(Prune)
    lines = paragraphs(
        facts,
        f"prune: {100 * own.keep:g} % of the weights of {pruned_layers(own)} kept, "
        f"{many(own.mask_seeds, 'mask')}, {images(part)}. Change in accuracy "
        "against the unpruned path, mean over alpha > 0, in points, +- standard error over masks, on these "
        f"images; control: {'as many other layers at random' if own.control else 'none'}.",
    )
    effects = facts.pruning
    table = [["model", "on", "criterion", "method", "layers", "pruned", "control"]]
    for key, group in effects.groupby(["model", "dataset", "criterion", "method"], sort=False):
        pruned, control = (group[group["control"] == value] for value in (False, True))
        table.append([*map(str, key), str(len(pruned["layers"].iloc[0])), *map(_change, (pruned, control))])
    for model in part["model"].unique():
        for criterion in facts.to_prune(model):
            if effects.query("model == @model and criterion == @criterion").empty:
                unknown = criterion == "sharpness" and facts.untested
                table.append([model, "", criterion, "", "not tested" if unknown else "0", "-", "-"])
    return [*lines, *aligned(table)]


def _change(group: pd.DataFrame) -> str:
    if group.empty:
        return "-"
    fact = group.iloc[0]
    error = "" if np.isnan(fact["change_se"]) else f" +- {100 * fact['change_se']:.1f}"
    return f"{100 * fact['change']:+.1f}{error}"


def correlation(facts: Facts) -> list[str]:
    """Format the rank correlations at the highest alpha, in lines."""
    table = facts.correlation
    shown = table[table["measure"] != "layer"]
    shown = shown[shown["alpha"] == shown["alpha"].max()]
    ties = table.loc[table["ties"] != "none", "ties"]
    lines = paragraphs(
        facts,
        "correlation over models with out-of-distribution accuracy and gain: Kendall's tau, its range with "
        "one model left out, and tau given the clean loss. p: by permutation of the models, and corrected "
        f"for all layers and alphas of the same outcome (max-T). {PAPER_CORRELATION} "
        + (f"Sharpnesses within 2 standard errors ({ties.iloc[0]}) are tied. " if len(ties) else "")
        + f"{limits(table)} All alphas and layers are in correlation.csv.",
    )
    cells = [
        "out of distribution|outcome|measure|on|alpha|rho|tau|without one|given loss|p|corrected".split("|")
    ]
    for fact in pd.concat([own for _, own in shown.groupby(["dataset", "outcome"], sort=False)]).to_dict(
        "records"
    ):
        numbers = [fact[name] for name in ("kendall", "without_low", "without_high", "partial")]
        value, low, high, given = ("-" if np.isnan(number) else f"{number:+.2f}" for number in numbers)
        judged = association(fact)
        cells.append(
            [
                fact["dataset"],
                fact["outcome"],
                MEASURES.get(fact["measure"], fact["measure"]),
                "-"
                if pd.isna(fact["measured_on"])
                else fact["measured_on"] + (" (circular)" if fact["circular"] else ""),
                f"{fact['alpha']:g}",
                "" if pd.isna(fact["rho"]) else f"{fact['rho']:g}",
                value,
                f"{low} to {high}" if low != "-" else "-",
                given,
                p_value(fact["p"]),
                "saturated" if judged == "saturated" else p_value(fact["p_max"]),
            ]
        )
    return [*lines, *aligned(cells)]


def paragraphs(facts: Facts, text: str) -> list[str]:
    """Wrap a paragraph, with an empty line before it."""
    return ["", *paragraph(visible(text), facts.names)]


def cost(costs: Sequence[Mapping[str, Any]]) -> str:
    """Describe the time and the peak memory of each study."""
    parts = [
        f"{cost['study']} {duration(cost['seconds'])}, {cost['peak_memory'] / 2**30:.1f} GiB"
        for cost in costs
    ]
    return "cost     " + "; ".join(parts)
