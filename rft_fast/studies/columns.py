"""What the columns of a run's tables mean: rows, and the tables that are made of them."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd

from .rows import COLUMNS


class Column(NamedTuple):
    """What a column means.

    Attributes:
        unit: Unit of its values; "-" for numbers without a unit, and for text.
        meaning: A phrase.
        filled: The studies that fill it, in all of their rows or in some.
        example: A value, as text.
    """

    unit: str
    meaning: str
    filled: str
    example: str


_LAYERS = "layers, cumulative"
_ENDS = f"interpolation, {_LAYERS}, ensemble, pairs, soups"
_PATH = f"{_ENDS}, prune, coefficients"
_CHANGED = "prune, coefficients"
_SHARP = "sharpness, layer-sharpness"
_ALL = f"{_PATH}, {_SHARP}"

ROWS = {
    "study": Column("-", "name of the study", _ALL, "layers"),
    "model": Column("-", "name of the fine-tuned model", _ALL, "lr1e-3-ep3"),
    "dataset": Column("-", "name of the data set", _ALL, "rotated"),
    "ood": Column("-", "whether the data set is out of distribution for the fine-tuned models", _ALL, "True"),
    "partners": Column(
        "-", "the model at alpha = 1 (pairs), or the averaged models, joined by ', ' (soups); missing: none",
        "pairs, soups", "lr2e-3-ep4",
    ),
    "layer": Column(
        "-", "layer that is moved, held, pruned or perturbed; several: joined by ', '; missing: all layers",
        f"{_LAYERS}, prune, layer-sharpness, coefficients", "visual.conv1",
    ),
    "others": Column(
        "-", "weights of the other layers: zeroshot or finetuned; missing: also at alpha",
        _LAYERS, "zeroshot"
    ),
    "cumulative": Column(
        "-", "layers that are moved with it: those before it (first) or after it (last); missing: none",
        "cumulative", "first",
    ),
    "reference": Column(
        "-", "baseline of instability: own (the layer's own two ends) or models (the two original models)",
        _LAYERS, "own",
    ),
    "alpha": Column(
        "-", "position on the path: 0 is zero-shot (of pairs: the model), 1 is fine-tuned", _ALL, "0.4"
    ),
    "rho": Column("-", "scale of the noise, in units of |w| if it is adaptive; 0: no noise", _ALL, "0.1"),
    "on": Column("-", "weights that are perturbed: interpolated or finetuned", _SHARP, "finetuned"),
    "noise": Column("-", "distribution of the noise", _SHARP, "normal"),
    "adaptive": Column("-", "whether the noise is scaled by |w|", _SHARP, "True"),
    "keep": Column("-", "fraction of the weights in pruned layers that survives; 1: all", _ALL, "0.5"),
    "method": Column(
        "-", "value of pruned weights; of soups: uniform, greedy or model-stock; missing: neither",
        "prune, soups", "zero",
    ),
    "criterion": Column("-", "how the pruned layers were selected", "prune", "instability"),
    "coefficients": Column(
        "-", "table of a coefficient for each layer; of Model Stock: t of each tensor; missing: 1 for all",
        "coefficients, soups", "LiNeS, slope 0.5"
    ),
    "control": Column(
        "-", "whether this is the control: as many other layers, chosen at random, are pruned or held",
        "prune, coefficients", "False"
    ),
    "estimator": Column("-", "estimator of sharpness that was used", _SHARP, "per-image-gradient"),
    "asked": Column("-", "estimator that was requested; auto: the first draws decided", _SHARP, "auto"),
    "excluded": Column(
        "-", "layers that were not perturbed, joined by ', '; missing: none", "sharpness", "visual.ln_pre"
    ),
    "noise_alike": Column(
        "-",
        "parameters with noise per noise batch, where all others have noise per image, joined by ', '; "
        "missing: none",
        _SHARP,
        "trunk.odd",
    ),
    "noise_batch": Column(
        "images", "images that share one draw of noise; missing: all of them", _SHARP, "128"
    ),
    "normalized": Column("-", "whether logits were normalised before the loss", _ALL, "False"),
    "seed": Column("-", "seed of the noise, mask or control", f"prune, coefficients, {_SHARP}", "0"),
    "draws": Column("draws", "number of draws of noise; for the worst case, number of steps", _SHARP, "20"),
    "restarts": Column("starts", "number of starts of each search for the worst case", _SHARP, "1"),
    "samples": Column("images", "number of images", _ALL, "1500"),
    "skipped": Column("images", "images that could not be read and were left out", _ALL, "0"),
    "nonfinite": Column("images", "images whose loss is NaN or infinite; means include them", _ALL, "0"),
    "loss": Column("nats", "mean cross entropy over images; with noise, also over draws", _ALL, "1.204"),
    "loss_se": Column("nats", "standard error of loss: over images, or over draws", _ALL, "0.031"),
    "accuracy": Column(
        "fraction", "share of images whose largest logit is that of their label", _ALL, "0.574"
    ),
    "accuracy_se": Column(
        "fraction", "standard error of accuracy: over images, or over draws", _ALL, "0.013"
    ),
    "gain": Column("fraction", "accuracy minus that at alpha = 0", _PATH, "0.022"),
    "gain_se": Column("fraction", "standard error of gain, paired over images", _PATH, "0.006"),
    "rise": Column("nats", "loss minus that at alpha = 0", _PATH, "-0.148"),
    "rise_se": Column("nats", "standard error of rise, paired over images", _PATH, "0.019"),
    "instability": Column("nats", "loss minus the mean loss of the two ends (Def. 1)", _LAYERS, "0.287"),
    "instability_se": Column("nats", "standard error of instability, paired over images", _LAYERS, "0.017"),
    "instability_accuracy": Column(
        "fraction", "mean accuracy of the two ends minus accuracy (Def. 1)", _LAYERS, "0.051"
    ),
    "instability_accuracy_se": Column(
        "fraction", "standard error of instability_accuracy, paired over images", _LAYERS, "0.008"
    ),
    "bump": Column(
        "nats", "loss minus the straight line between the losses of the two ends", _ENDS, "0.202"
    ),
    "bump_se": Column("nats", "standard error of bump, paired over images", _ENDS, "0.012"),
    "entropy": Column("nats", "mean entropy of the predictions", "interpolation, pairs, soups", "0.61"),
    "distance": Column(
        "-", "Euclidean distance of the weights from alpha = 0: alpha |w1 - w0|, over all layers",
        "interpolation, pairs, soups", "11.4",
    ),
    "change": Column(
        "fraction", "accuracy minus that of the path as it is, at the same alpha", _CHANGED, "-0.018"
    ),
    "change_se": Column("fraction", "standard error of change, paired over images", _CHANGED, "0.005"),
    "change_loss": Column("nats", "the same difference of the loss", "coefficients", "0.04"),
    "change_loss_se": Column("nats", "its standard error, paired over images", "coefficients", "0.009"),
    "sharpness": Column("nats", "mean loss with noise minus loss without noise", _SHARP, "0.435"),
    "sharpness_se": Column(
        "nats", "standard error of sharpness over draws, for these images; worst case: over noise batches",
        _SHARP, "0.016",
    ),
    "sharpness_df": Column("-", "degrees of freedom of sharpness_se", _SHARP, "19.3"),
    "sharpness_se_images": Column(
        "nats", "standard error of sharpness over images, for these draws", _SHARP, "0.021"
    ),
    "sharpness_change": Column(
        "nats", "sharpness minus that at alpha = 0, paired over draws", "sharpness", "-0.12"
    ),
    "sharpness_change_se": Column(
        "nats", "standard error of sharpness_change over draws", "sharpness", "0.004"
    ),
    "sharpness_change_df": Column("-", "degrees of freedom of sharpness_change_se", "sharpness", "17.8"),
    "saturated": Column(
        "-", "whether the perturbed model answers at chance; then sharpness says nothing", _SHARP, "False"
    ),
    "reached": Column(
        "-", "whether all draws for --goal-se were made; missing: no goal was requested",
        _SHARP, "True",
    ),
    "precision": Column("-", "number format of weights and activations", _ALL, "fp32"),
    "seconds": Column("s", "duration; if rows share a measurement, the part of this row", _ALL, "0.8"),
}  # fmt: skip

_PROTOCOL = ("rho", "on", "estimator", "noise", "adaptive", "noise_batch", "normalized")
_TESTS = {
    "p": ("-", "p-value of tau, two-sided, by permutation of the models", "0.035"),
    "p_max": ("-", "p-value, corrected for all rows of the family", "0.21"),
}


def _made(name: str, texts: dict[str, tuple[str, str, str]]) -> dict[str, Column]:
    """Columns of a table that one study makes; those of the protocol are as in rows."""
    return {
        column: Column(unit, meaning, name, example) for column, (unit, meaning, example) in texts.items()
    }


def _of_rows(name: str, columns: tuple[str, ...]) -> dict[str, Column]:
    return {column: ROWS[column]._replace(filled=name) for column in columns}


CORRELATION = {
    **_made("correlation", {
        "dataset": ("-", "out-of-distribution data set on which the outcome is measured", "rotated"),
        "outcome": ("-", "what the measure is correlated with: accuracy (at alpha) or gain", "gain"),
        "measured_on": ("-", "data set on which the measure is taken; missing for distance", "mnist"),
        "circular": ("-", "whether measure and outcome use the same images", "False"),
        "measure": ("-", "sharpness (general, layer, stragglers), or another measure of the models", "layer"),
        "layer": ("-", "name of the layer; stragglers: their names, joined by ', '", "visual.conv1"),
        "alpha": ("-", "position of the measure", "0.4"),
    }),
    **_of_rows("correlation", _PROTOCOL),
    "draws": Column("draws", "number of draws of the sharpness; missing: it varies", "correlation", "20"),
    "samples": Column("images", "images of the sharpness; missing: it varies", "correlation", "1024"),
    "seed": Column("-", "seed of the sharpness; missing: it varies", "correlation", "0"),
    **_made("correlation", {
        "models": ("models", "models that are correlated", "9"),
        "nonfinite": ("models", "models with a value that is not finite", "0"),
        "saturated": ("models", "models whose sharpness is saturated", "0"),
        "ties": ("-", "errors that decide which models are tied: paired, unpaired or none", "unpaired"),
        "tied": ("pairs", "pairs of models that are tied in the measure", "2"),
        "kendall": ("-", "Kendall's tau-b", "0.56"),
        "kendall_low": ("-", "lower end of its pointwise 95 % interval", "0.02"),
        "kendall_high": ("-", "upper end of this interval", "0.85"),
        "without_low": ("-", "lowest tau with one model, or group of models, left out", "0.43"),
        "without_high": ("-", "highest tau with one left out", "0.71"),
        **_TESTS,
        "tests": ("rows", "rows of the family; missing: the row is not tested", "93"),
        "needed": ("-", "smallest |tau| whose p_max is at most 0.05; NaN: there is none", "0.78"),
        "partial": ("-", "Kendall's partial tau given the clean loss on the same images", "0.21"),
        "spearman": ("-", "Spearman's rank correlation", "0.68"),
        "spearman_low": ("-", "lower end of its pointwise 95 % interval", "-0.06"),
        "spearman_high": ("-", "upper end of this interval", "0.94"),
    }),
}  # fmt: skip

CLAIM = {
    **_made("claim", {
        "dataset": ("-", "out-of-distribution data set on which gain and mode are measured", "rotated"),
        "model": ("-", "name of the fine-tuned model", "lr1e-3-ep3"),
        "gain": ("fraction", "highest accuracy on the path minus that at alpha = 0", "0.022"),
        "best_alpha": ("-", "position of the highest accuracy", "0.6"),
        "mode": ("-", "high gain, gain, failure or undecided", "failure"),
        "at": ("-", "where layers are counted: best (nearest to best_alpha) or finetuned (1)", "best"),
        "measured_on": ("-", "data set on which sharpness is measured", "mnist"),
    }),
    **_of_rows("claim", _PROTOCOL),
    **_made("claim", {
        "unit": ("-", "unit of the margin: nats, or share of the sum over layers", "nats"),
        "margin": ("see unit", "a layer is flat if its sharpness is within this of 0", "0.01"),
        "alpha": ("-", "position of the sharpness", "1.0"),
        "by_definition": ("-", "whether alpha is 0, where every sharpness is 0 by definition", "False"),
        "layers": ("layers", "number of layers", "31"),
        "flat": ("layers", "number of flat layers", "11"),
        "smallest": ("nats", "lowest sharpness of a layer", "-0.004"),
        "smallest_layer": ("-", "layer with the lowest sharpness", "visual.ln_post"),
        "total": ("nats", "sum of the sharpness of all layers", "3.7"),
        "saturated": ("layers", "layers whose sharpness is saturated", "0"),
        "kendall_failure": ("-", "Kendall's tau-b of flat and failure over the models", "0.6"),
        "p_failure": _TESTS["p"],
        "p_max_failure": _TESTS["p_max"],
        "kendall_gain": ("-", "Kendall's tau-b of flat and gain over the models", "-0.57"),
        "p_gain": _TESTS["p"],
        "p_max_gain": _TESTS["p_max"],
    }),
}  # fmt: skip

COST = {
    "study": Column("-", "name of the study", _ALL, "layers"),
    "models": Column("models", "models that the study measures", _ALL, "2"),
    "seconds": Column("s", "time, summed over all workers and processes of the run", _ALL, "6.8"),
    "peak_memory": Column("bytes", "peak memory of the GPU, or of the process", _ALL, "981282816"),
}

CHOICE = _made("choice", {
    "dataset": ("-", "out-of-distribution data set on which the regret is measured", "rotated"),
    "model": ("-", "name of the fine-tuned model", "lr1e-3-ep3"),
    "rule": ("-", "rule that chooses alpha without labels of these images", "ID accuracy"),
    "alpha": ("-", "position that the rule chooses", "0.4"),
    "best_alpha": ("-", "position of the highest accuracy", "0.6"),
    "accuracy": ("fraction", "accuracy at alpha", "0.872"),
    "gain": ("fraction", "accuracy at alpha minus that at alpha = 0", "0.018"),
    "regret": ("fraction", "accuracy at the best position minus that at alpha", "0.004"),
    "regret_se": ("fraction", "standard error of regret, paired over images", "0.003"),
    "cross_fitted": ("-", "whether the best position is chosen on other images than regret", "True"),
    "samples": ("images", "number of images", "1500"),
})  # fmt: skip

ENSEMBLE = _made("ensemble", {
    "model": ("-", "name of the fine-tuned model", "lr1e-3-ep3"),
    "dataset": ("-", "data set that is scored", "rotated"),
    "ood": ("-", "whether it is out of distribution", "True"),
    "gain_path": ("fraction", "highest accuracy on the path minus that at alpha = 0", "0.022"),
    "gain_ensemble": ("fraction", "highest accuracy of an ensemble minus that at alpha = 0", "0.017"),
    "difference": ("fraction", "mean accuracy on the path minus that of the ensemble", "0.004"),
    "difference_se": ("fraction", "standard error of difference, paired over images", "0.002"),
    "difference_low": ("fraction", "lower end of its 95 % interval", "0.001"),
    "difference_high": ("fraction", "upper end of this interval", "0.008"),
    "samples": ("images", "number of images", "1500"),
    "alphas": ("-", "number of positions between the ends", "9"),
})  # fmt: skip

PAIRS = _made("pairs", {
    "model": ("-", "name of the fine-tuned model at alpha = 0", "lr1e-3-ep3"),
    "partner": ("-", "name of the fine-tuned model at alpha = 1", "lr2e-3-ep4"),
    "dataset": ("-", "data set that is scored", "rotated"),
    "ood": ("-", "whether it is out of distribution", "True"),
    "accuracy_model": ("fraction", "accuracy at alpha = 0", "0.871"),
    "accuracy_partner": ("fraction", "accuracy at alpha = 1", "0.865"),
    "gain": ("fraction", "highest accuracy on the path minus that of the better end", "0.012"),
    "gain_alpha": ("-", "position of the highest accuracy", "0.4"),
    "gain_held_out": ("fraction", "the same, with position and end chosen on other images", "0.009"),
    "gain_held_out_se": ("fraction", "standard error of gain_held_out, paired over images", "0.004"),
    "gain_held_out_low": ("fraction", "lower end of its 95 % interval, corrected for all pairs", "-0.002"),
    "gain_held_out_high": ("fraction", "upper end of this interval", "0.02"),
    "middle": ("-", "position nearest to 0.5", "0.5"),
    "above_line": ("fraction", "accuracy there minus the straight line between both ends", "0.015"),
    "above_line_se": ("fraction", "standard error of above_line, paired over images", "0.004"),
    "above_line_low": ("fraction", "lower end of its 95 % interval, corrected for all pairs", "0.004"),
    "above_line_high": ("fraction", "upper end of this interval", "0.026"),
    "bump": ("nats", "largest loss above the straight line between both ends", "0.08"),
    "bump_se": ("nats", "standard error of bump, paired over images", "0.011"),
    "bump_alpha": ("-", "position of this loss", "0.5"),
    "bump_low": ("nats", "lower end of its one-sided 95 % interval, corrected", "0.05"),
    "samples": ("images", "number of images", "1500"),
    "alphas": ("-", "number of positions", "11"),
})  # fmt: skip

SOUPS = _made("soups", {
    "dataset": ("-", "data set that is scored", "rotated"),
    "ood": ("-", "whether it is out of distribution", "True"),
    "point": ("-", "zero-shot, a model, a mean of models or a soup", "uniform soup"),
    "models": ("-", "its models, joined by ', '; missing: none", "lr1e-3-ep3, lr2e-3-ep4"),
    "alpha": ("-", "position on the path to the soup; missing: it is on none", "1"),
    "alpha_low": ("-", "smallest position that is not shown to be less accurate than the best", "0.6"),
    "alpha_high": ("-", "largest such position", "1"),
    "accuracy": ("fraction", "accuracy; at the best alpha, cross-fitted", "0.871"),
    "difference": ("fraction", "accuracy minus that of the model that is best in distribution", "0.012"),
    "difference_se": ("fraction", "standard error of difference, paired over images", "0.004"),
    "difference_low": ("fraction", "lower end of its 95 % interval, corrected", "0.001"),
    "difference_high": ("fraction", "upper end of this interval", "0.023"),
    "samples": ("images", "number of images", "1500"),
})  # fmt: skip

TABLES = {
    "rows": ROWS,
    "correlation": CORRELATION,
    "claim": CLAIM,
    "ensemble": ENSEMBLE,
    "choice": CHOICE,
    "pairs": PAIRS,
    "soups": SOUPS,
    "cost": COST,
}


def describe(table: str = "rows") -> pd.DataFrame:
    """Describe the columns of a table of a run.

    Args:
        table: ``"rows"`` (of :func:`rft_fast.results.load`, ``rows.csv`` and Parquet), ``"correlation"``,
            ``"claim"``, ``"ensemble"``, ``"choice"``, ``"pairs"``, ``"soups"`` or ``"cost"`` (the CSV files
            of these names).

    Returns:
        One row per column, in order: ``name``, ``type`` (of pandas; only of rows), ``unit``, ``meaning``,
        ``filled_by`` (names of studies, joined by ", "), ``example``.

    Raises:
        TypeError: ``table`` is not a name.
        ValueError: There is no such table.
    """
    if not isinstance(table, str):
        raise TypeError(
            f"describe: expected the name of a table, one of {', '.join(TABLES)}, got {type(table).__name__}"
        )
    if table not in TABLES:
        raise ValueError(f"describe: expected one of {', '.join(TABLES)}, got {table!r}")
    columns = TABLES[table]
    names = list(COLUMNS) if table == "rows" else list(columns)
    found = [(name, COLUMNS[name] if table == "rows" else None, *columns[name][:4]) for name in names]
    return pd.DataFrame(
        found, columns=["name", "type", "unit", "meaning", "filled_by", "example"], dtype="string"
    )
