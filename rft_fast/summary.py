"""What the rows of a run say: which models and layers a study should take next, and a report in words."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from . import studies
from .cost import duration
from .request import Request
from .studies.pruning import NAMED
from .studies.rows import STUDIES
from .words import some, visible

LEGEND = """\
Accuracies, gain and instability in accuracy in points (%), barrier and instability in loss in nats.
Gain (Eq. 2): highest accuracy on the path minus zero-shot; in brackets its pointwise 95 % normal
interval at that alpha, paired over images. Choosing the best alpha on the same images makes the
gain optimistic. Barrier (Eq. 1): highest loss minus zero-shot. Instability (Def. 1): how much worse
the worst position is than the mean of the two ends. Mode, on out-of-distribution data: failure when
no alpha beats zero-shot, gain when one does, high gain from {xi:g} points on (--xi)."""


# --- what to measure next -----------------------------------------------------------------------


def choose(request: Request, rows: pd.DataFrame) -> dict[str, list[str]]:
    """Study -> the models that it takes, by the rows of the interpolation.

    Those that gain most and least (:func:`rft_fast.studies.best_gains`), as many as :func:`how_many` has.
    Models that were named are taken instead, layer by layer.
    """
    everyone = list(request.zoo.finetuned)
    ranked = list(studies.best_gains(rows).sort_values(ascending=False, kind="stable").index)

    def chosen(count: int) -> list[str]:
        if count < len(everyone) and request.models is not None:
            return request.models
        picked = set(ranked[: (count + 1) // 2]) | set(ranked[len(ranked) - count // 2 :])
        return [name for name in everyone if name in picked]

    return {study: chosen(count) for study, count in how_many(request).items()}


def how_many(request: Request) -> dict[str, int]:
    """Study -> how many models it takes.

    As many as the paper shows: all for the path and general sharpness, four layer by layer (all where the
    correlation needs them), two for layer-wise interpolation and pruning; or those that were named.
    """
    everyone = len(request.zoo.finetuned)
    layerwise = 4 if "layer-sharpness" in request.studies else 2
    if "correlation" in request.studies:
        layerwise = everyone
    few = {"layers": 2, "layer-sharpness": layerwise, "prune": 2}
    if request.models is not None:
        few = dict.fromkeys(few, len(request.models))
    return {"interpolation": everyone, "sharpness": everyone} | {
        study: min(count, everyone) for study, count in few.items()
    }


def _deciding(rows: pd.DataFrame) -> str:
    """The first out-of-distribution data set, or else the first."""
    sets = rows[rows["study"] == "interpolation"].drop_duplicates("dataset")
    far = sets[sets["ood"].fillna(False)]
    return str((far if len(far) else sets)["dataset"].iloc[0])


def to_prune(request: Request, rows: pd.DataFrame, model: str) -> dict[str, list[str]]:
    """Criterion -> the stragglers of a model, by the rows so far."""
    if request.prune_layers is not None:
        return {NAMED: request.prune_layers}
    rows = rows[rows["model"] == model]
    found = {}
    for criterion in request.criteria:
        if criterion == "instability":
            facts = studies.stragglers(rows, request.straggler_margin)
            found[criterion] = list(facts.loc[facts["straggler"], "layer"].unique())
        else:
            facts = studies.near_zero(rows, request.zero_margin)
            # At every rho and on every data set of the sharpness.
            everywhere = facts.groupby("layer", sort=False)["near_zero"].all()
            found[criterion] = list(everywhere.index[everywhere])
    return found


# --- the report ---------------------------------------------------------------------------------


def report(
    request: Request,
    rows: pd.DataFrame,
    correlation: pd.DataFrame | None = None,
    classes: Mapping[str, int] | None = None,
) -> str:
    """A run in words and numbers: a section for each study, then what it comes to.

    correlation: the table of :func:`rft_fast.studies.correlation`, if there is one. classes: data set -> how
    many classes it is scored among.
    """
    # Asked for all of them, people are told why one is left out.
    shown = {*request.measured, *(("correlation",) if request.everything else ())}
    makers = {
        "interpolation": lambda: _interpolation(rows, request.xi),
        "layers": lambda: _layers(rows, request),
        "sharpness": lambda: _sharpness(rows, request),
        "layer-sharpness": lambda: _layer_sharpness(rows, request),
        "prune": lambda: _prune(rows, request),
        "correlation": lambda: _correlation(correlation, rows),
    }
    lines = [line for study in STUDIES if study in shown for line in makers[study]()]
    lost = int((~np.isfinite(rows["loss"])).sum())
    lines += [f"\n{lost} mean losses are not finite; nothing was left out of them."] if lost else []
    return "\n".join([*lines, *_findings(rows, request, correlation, classes or {})])


def _interpolation(rows: pd.DataFrame, xi: float) -> list[str]:
    header = [
        ["", "zero-", "fine-", "best", "", "", "instability", "", ""],
        ["model", "shot", "tuned", "alpha", "gain [95 %]", "barrier", "loss", "accuracy", "mode"],
    ]
    lines = []
    for dataset, facts in studies.summarize(rows, xi).groupby("dataset", sort=False):
        first = facts.iloc[0]
        where = "out of" if first["ood"] else "in"
        skipped = int(rows.loc[rows["dataset"] == dataset, "skipped"].fillna(0).max())
        left_out = f" ({skipped:,} that cannot be read left out)" if skipped else ""
        images = f"{first['samples']:,} images{left_out}"
        lines += [f"\n{visible(dataset)}: {where} distribution, {images}, {first['alphas']} alphas"]
        lines += _table([*header, *map(_cells, facts.fillna({"mode": "-"}).to_dict("records"))], last=True)
    return [*lines, "", LEGEND.format(xi=100 * xi)]


def _cells(fact: dict[Any, Any]) -> list[str]:
    gain, low, high = (100 * fact[name] for name in ("gain", "gain_low", "gain_high"))
    interval = f" [{low:+.1f}, {high:+.1f}]"
    return [
        fact["model"],
        f"{100 * fact['zero_shot']:.1f}",
        f"{100 * fact['fine_tuned']:.1f}",
        f"{fact['best_alpha']:g}",
        f"{gain:+.1f}{interval}" if gain else "0.0" + " " * len(interval),
        _nats(fact["barrier"]),
        _nats(fact["instability_loss"]),
        f"{100 * fact['instability_accuracy']:.1f}",
        fact["mode"],
    ]


def _nats(value: float) -> str:
    """Losses may overflow: nobody wants to read 38 digits."""
    return f"{value:.3f}" if abs(value) < 1e6 else f"{value:.3g}"


def _images(rows: pd.DataFrame) -> str:
    """How many images of each data set the rows are of."""
    counts = rows.groupby("dataset", sort=False)["samples"].max()
    return ", ".join(f"{count:,} images of {name}" for name, count in counts.items())


def _layers(rows: pd.DataFrame, request: Request) -> list[str]:
    facts = studies.stragglers(rows, request.straggler_margin)
    first = facts.iloc[0]
    others = {"zeroshot": "zero-shot", "finetuned": "fine-tuned"}[request.others]
    lines = _words(
        f"layers: each layer on the path, the others {others}; {_images(rows[rows['study'] == 'layers'])}, "
        f"{first['alphas']} alphas. A straggler's instability lies above {request.straggler_margin:g} nats "
        "with 95 % confidence, Bonferroni-corrected for layers and alphas, and its loss above that at "
        "alpha = 0."
    )
    for (model, dataset), group in facts.groupby(["model", "dataset"], sort=False):
        worst = group[group["straggler"]].sort_values("instability", ascending=False)
        on = visible(f"{model} on {dataset}")
        same = int(group["unchanged"].sum())
        left_out = f"; {same} more are the same at both ends" if same else ""
        lines.append(f"  {on}: {len(worst)} of {len(group) - same} layers are stragglers{left_out}")
        lines += [
            f"    {fact['layer']}: instability {_nats(fact['instability'])} "
            f"+- {_nats(fact['instability_se'])} nats, {100 * fact['instability_accuracy']:.1f} points"
            for fact in worst.to_dict("records")
        ]
    return lines


def _sharpness(rows: pd.DataFrame, request: Request) -> list[str]:
    part = rows[rows["study"] == "sharpness"]
    lines = []
    for (_, rho), group in part.groupby(["dataset", "rho"], sort=False):
        lines += _words(f"sharpness: all weights perturbed, {_how(group, rho)}. In nats, +- standard error.")
        alphas = sorted(group["alpha"].unique())
        shown = [alphas[index] for index in sorted({0, len(alphas) // 2, len(alphas) - 1})]
        table = [["model", *(f"alpha {alpha:g}" for alpha in shown)]]
        for model, curve in group.groupby("model", sort=False):
            by_alpha = curve.set_index("alpha")
            table.append([str(model), *(_value(by_alpha.loc[alpha]) for alpha in shown)])
        lines += _table(table)
    return lines


def _layer_sharpness(rows: pd.DataFrame, request: Request) -> list[str]:
    part = rows[rows["study"] == "layer-sharpness"]
    lines = []
    facts = studies.near_zero(rows, request.zero_margin)
    for (dataset, rho), group in part.groupby(["dataset", "rho"], sort=False):
        where = "fine-tuned weights" if (group["on"] == "finetuned").all() else "interpolated weights"
        lines += _words(
            f"layer-sharpness: one layer of the {where} perturbed, {_how(group, rho)}. Near zero: the 95 % "
            f"interval lies within {request.zero_margin:g} nats at every alpha."
        )
        for model, own in group.groupby("model", sort=False):
            same = (facts["model"] == model) & (facts["dataset"] == dataset) & (facts["rho"] == rho)
            flat = facts[same & facts["near_zero"]]
            top = own[own["alpha"] == own["alpha"].max()].nlargest(3, "sharpness")
            sharpest = ", ".join(f"{row['layer']} {_value(row)}" for row in top.to_dict("records"))
            lines += [
                f"  {visible(str(model))}: {len(flat)} of {own['layer'].nunique()} layers near zero; "
                f"sharpest at alpha = {own['alpha'].max():g}:",
                f"    {sharpest}",
            ]
    return lines


def _how(group: pd.DataFrame, rho: float) -> str:
    first = group[group["alpha"] > 0].iloc[0]
    draws = sorted(group.loc[group["alpha"] > 0, "draws"].unique())
    count = f"{draws[0]}" if len(draws) == 1 else f"{draws[0]} to {draws[-1]}"
    unit = "|w|" if first["adaptive"] else "1"
    images = f"{first['samples']} images of {first['dataset']}"
    if pd.isna(first["noise"]):
        worst = f"the worst case by {count} steps ({first['estimator']})"
        return f"rho = {rho:g} in units of {unit}, {worst}, {images}"
    text = f"rho = {rho:g} ({first['noise']}, in units of {unit}), {count} draws ({first['estimator']}), "
    text += f"{images}, seed {first['seed']}"
    missed = int((~group["reached"].fillna(True)).sum())
    return text + (f"; {missed} rows missed the wanted standard error" if missed else "")


def _value(row: Any) -> str:
    error = row["sharpness_se"]
    return f"{row['sharpness']:.3g}" + ("" if pd.isna(error) else f" +- {error:.2g}")


def _prune(rows: pd.DataFrame, request: Request) -> list[str]:
    part = rows[rows["study"] == "prune"]
    lines = _words(
        f"prune: {100 * request.keep:g} % of the {_pruned(request)} layers' weights kept, "
        f"{len(request.mask_seeds)} masks, {_images(part)}. Change in accuracy against the unpruned path, "
        "mean over alpha > 0, in points, +- standard error over masks, on these images; control: as many "
        "other layers at random."
    )
    effects = studies.pruning_effect(rows)
    table = [["model", "on", "criterion", "method", "layers", "pruned", "control"]]
    for key, group in effects.groupby(["model", "dataset", "criterion", "method"], sort=False):
        pruned, control = (group[group["control"] == value] for value in (False, True))
        table.append([*map(str, key), str(len(pruned["layers"].iloc[0])), *map(_change, (pruned, control))])
    for model in part["model"].unique():
        for criterion in to_prune(request, rows, model):
            if effects.query("model == @model and criterion == @criterion").empty:
                table.append([model, "", criterion, "", "0", "-", "-"])
    return [*lines, *_table(table)]


def _pruned(request: Request) -> str:
    return "straggler" if request.prune_layers is None else "named"


def _change(group: pd.DataFrame) -> str:
    if group.empty:
        return "-"
    fact = group.iloc[0]
    error = "" if np.isnan(fact["change_se"]) else f" +- {100 * fact['change_se']:.1f}"
    return f"{100 * fact['change']:+.1f}{error}"


def _correlation(table: pd.DataFrame | None, rows: pd.DataFrame) -> list[str]:
    if table is None:
        far = rows["ood"].fillna(False).any()
        lacking = "at least 3 fine-tuned models" if far else "out-of-distribution data"
        return _words(f"correlation is left out: it needs {lacking}.")
    lines = _words(
        "correlation of sharpness with what happens out of distribution, over models: Kendall's tau "
        "[95 % interval]. All alphas and layers are in correlation.csv."
    )
    shown = table[table["measure"] != "layer"]
    shown = shown[shown["alpha"] == shown["alpha"].max()]
    cells = [["out of distribution", "outcome", "sharpness of", "on", "at alpha", "rho", "models", "tau"]]
    for fact in shown.to_dict("records"):
        what = "all weights" if fact["measure"] == "general" else "the stragglers"
        where = [fact["dataset"], fact["outcome"], what, fact["measured_on"], f"{fact['alpha']:g}"]
        cells.append([*where, f"{fact['rho']:g}", str(fact["models"]), _tau(fact)])
    return [*lines, *_table(cells)]


def _tau(fact: dict[Any, Any]) -> str:
    if np.isnan(fact["kendall"]):
        return "-"
    if np.isnan(fact["kendall_low"]):
        return f"{fact['kendall']:+.2f}"
    return f"{fact['kendall']:+.2f} [{fact['kendall_low']:+.2f}, {fact['kendall_high']:+.2f}]"


def _findings(
    rows: pd.DataFrame, request: Request, correlation: pd.DataFrame | None, classes: Mapping[str, int]
) -> list[str]:
    """What was found, in sentences, whether or not it agrees with the paper."""
    where = _deciding(rows)
    facts = studies.summarize(rows, request.xi).query("dataset == @where")
    lines = [f"- {end.text}" for end in studies.zeroshot_chances(rows, classes) if end.text]
    if facts["mode"].notna().all():
        failing = list(facts.loc[facts["mode"] == "failure", "model"])
        lines.append(
            f"- On {where}, {len(failing)} of {len(facts)} models fail: no alpha beats zero-shot"
            + (f" ({', '.join(failing)})." if failing else ".")
        )
    if "layers" in request.measured:
        lines += _found_stragglers(rows, request, facts)
    if "prune" in request.measured:
        lines += _found_pruning(rows)
    if correlation is not None:
        lines += _found_correlation(correlation, where)
    wrapped = [textwrap.fill(line, 100, subsequent_indent="  ") for line in lines]
    return ["\nIn short", *wrapped] if lines else []


def _found_stragglers(rows: pd.DataFrame, request: Request, facts: pd.DataFrame) -> list[str]:
    found = studies.stragglers(rows, request.straggler_margin)
    modes = facts.set_index("model")["mode"].fillna("in distribution")
    lines = []
    for (model, dataset), group in found.groupby(["model", "dataset"], sort=False):
        names = list(group[group["straggler"]].sort_values("instability", ascending=False)["layer"])
        said = f"{len(names)} stragglers ({some(names, 3)})" if names else "no stragglers"
        lines.append(f"- {model} ({modes[model]}) has {said} on {dataset}.")
    return lines


def _found_pruning(rows: pd.DataFrame) -> list[str]:
    lines = []
    effects = studies.pruning_effect(rows)
    for key, group in effects.groupby(["model", "dataset", "criterion", "method"], sort=False):
        facts = {bool(fact["control"]): fact for fact in group.to_dict("records")}
        pruned = facts[False]
        gained = "came with one mask, without an error,"  # by magnitude, or one seed
        if pruned["seeds"] > 1:
            gained = _verdict(pruned["change"], pruned["change_se"], pruned["seeds"] - 1, "helped", "hurt")
        what, how = ("the named layers", f"({key[3]})")
        if key[2] != NAMED:
            what, how = "the stragglers", f"by {key[2]} ({key[3]})"
        line = (
            f"- Pruning {what} of {key[0]} {how} {gained} on {key[1]}: {100 * pruned['change']:+.1f} points"
        )
        if control := facts.get(True):
            more = pruned["change"] - control["change"]
            error = float(np.hypot(pruned["change_se"], control["change_se"]))
            against = _verdict(more, error, _freedom(pruned, control), "better than", "worse than")
            line += f"; {against} the control: {100 * more:+.1f}"
        lines.append(f"{line}.")
    return lines


def _freedom(*means: Mapping[str, Any]) -> float:
    """Degrees of freedom of a difference of means whose variances differ (Welch and Satterthwaite).

    A control varies much more than what it is for: it draws its layers, too.
    """
    variances = [fact["change_se"] ** 2 for fact in means]
    if not sum(variances) > 0:
        return np.nan
    spread = sum(v**2 / (fact["seeds"] - 1) for v, fact in zip(variances, means, strict=True) if v)
    return float(sum(variances) ** 2 / spread)


def _verdict(value: float, error: float, freedom: float, above: str, below: str) -> str:
    """By a two-sided test at 5 %, with Student's t for the masks.

    Accuracies move in steps of one image, so that a few masks may well change the very same ones: an error
    of nothing is no certainty.
    """
    bound = stdtrit(freedom, 0.975) * error if freedom > 0 and error > 0 else np.nan
    if not abs(value) > bound:
        return {"helped": "neither helped nor hurt clearly"}.get(above, "not clearly different from")
    return above if value > 0 else below


def _found_correlation(table: pd.DataFrame, where: str) -> list[str]:
    part = table[(table["dataset"] == where) & (table["outcome"] == "accuracy")]
    part = part[part["alpha"] == part["alpha"].max()]
    lines = []
    for measure, claim in (
        ("general", "Sharpness of the whole model"),
        ("stragglers", "Sharpness of the stragglers"),
    ):
        for fact in part[part["measure"] == measure].to_dict("records"):
            low, high = fact["kendall_low"], fact["kendall_high"]
            # For a perfect order there is no interval; of four models, one in 12 is perfect by chance.
            if np.isnan(low) and abs(fact["kendall"]) == 1 and fact["models"] > 4:
                verdict = f"orders all models {'as' if fact['kendall'] > 0 else 'against'}"
            elif np.isnan(low):
                verdict = "cannot be judged by"
            elif low <= 0 <= high:
                verdict = "is not seen to go with"
            else:
                verdict = "goes with higher" if low > 0 else "goes with lower"
            lines.append(
                f"- {claim} (alpha = {fact['alpha']:g}, rho = {fact['rho']:g}, {fact['measured_on']}) "
                f"{verdict} accuracy on {where}: tau {_tau(fact)} over {fact['models']} models."
            )
    return [*lines, "  (The paper finds that the whole model's does not tell, and the stragglers' does.)"]


def _words(text: str) -> list[str]:
    """A paragraph, after an empty line."""
    return ["", *textwrap.wrap(text, 100)]


def _table(cells: Iterable[Sequence[str]], last: bool = False) -> list[str]:
    """Lines with columns that stand under each other: the first flush left, with ``last`` the last, too."""
    cells = [[visible(cell) for cell in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        padded[0] = row[0].ljust(widths[0])
        if last:
            padded[-1] = row[-1]
        lines.append("  " + "  ".join(padded))
    return lines


def took(costs: Sequence[Mapping[str, Any]]) -> str:
    """What each study took, in words: time, and memory at its peak."""
    parts = [
        f"{cost['study']} {duration(cost['seconds'])}, {cost['peak_memory'] / 2**30:.1f} GiB"
        for cost in costs
    ]
    return "took     " + "; ".join(parts)
