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


_PATH = "interpolation, layers, prune"
_SHARP = "sharpness, layer-sharpness"
_ALL = f"{_PATH}, {_SHARP}"

ROWS = {
    "study": Column("-", "name of the study", _ALL, "layers"),
    "model": Column("-", "name of the fine-tuned model", _ALL, "lr1e-3-ep3"),
    "dataset": Column("-", "name of the data set", _ALL, "rotated"),
    "ood": Column("-", "whether the data set is out of distribution for the fine-tuned models", _ALL, "True"),
    "layer": Column(
        "-", "the layer that differs from the others; several: joined by ', '; missing: all layers",
        "layers, prune, layer-sharpness", "visual.conv1",
    ),
    "others": Column("-", "end of the other layers; missing: they are at alpha, too", "layers", "zeroshot"),
    "reference": Column(
        "-", "what instability is measured from: the layer's own ends, or the models", "layers", "own"
    ),
    "alpha": Column("-", "position on the path: 0 is zero-shot, 1 is fine-tuned", _ALL, "0.4"),
    "rho": Column("-", "scale of the noise, in units of |w| if it is adaptive; 0: no noise", _ALL, "0.1"),
    "on": Column("-", "weights that are perturbed: interpolated or finetuned", _SHARP, "finetuned"),
    "noise": Column("-", "distribution of the noise", _SHARP, "normal"),
    "adaptive": Column("-", "whether the noise is scaled by |w|", _SHARP, "True"),
    "keep": Column("-", "fraction of the pruned layers' weights that survives; 1: all", _ALL, "0.5"),
    "method": Column("-", "what pruned weights become; missing: nothing is pruned", "prune", "zero"),
    "criterion": Column("-", "how the pruned layers were found, or named", "prune", "instability"),
    "control": Column(
        "-", "whether as many other layers, chosen at random, were pruned instead", "prune", "False"
    ),
    "estimator": Column("-", "estimator of sharpness that was used", _SHARP, "per-image-gradient"),
    "asked": Column("-", "estimator that was asked for; auto chooses by the first draws", _SHARP, "auto"),
    "excluded": Column(
        "-", "layers that were not perturbed, joined by ', '; missing: none", "sharpness", "visual.ln_pre"
    ),
    "noise_alike": Column(
        "-",
        "parameters whose noise the images of a noise batch share, where the others have noise per image, "
        "joined by ', '; missing: none",
        _SHARP,
        "trunk.odd",
    ),
    "noise_batch": Column(
        "images", "number that share one draw of noise; missing: all of them", _SHARP, "128"
    ),
    "normalized": Column("-", "whether logits were normalised before the loss", _ALL, "False"),
    "seed": Column("-", "seed of the noise, or of the mask", f"prune, {_SHARP}", "0"),
    "draws": Column("draws", "number of draws of noise; for the worst case, of steps", _SHARP, "20"),
    "restarts": Column("starts", "starts of each search for the worst case", _SHARP, "1"),
    "samples": Column("images", "number of images", _ALL, "1500"),
    "skipped": Column("images", "number that could not be read and were left out", _ALL, "0"),
    "nonfinite": Column("images", "losses that are NaN or infinite; means include them", _ALL, "0"),
    "loss": Column("nats", "mean cross entropy, of perturbed models over draws, too", _ALL, "1.204"),
    "loss_se": Column("nats", "standard error of loss: over images, or over draws", _ALL, "0.031"),
    "accuracy": Column("fraction", "images whose largest logit is that of their label", _ALL, "0.574"),
    "accuracy_se": Column("fraction", "standard error of accuracy, as that of loss", _ALL, "0.013"),
    "gain": Column("fraction", "accuracy minus that at alpha = 0", _PATH, "0.022"),
    "gain_se": Column("fraction", "standard error of gain, paired over images", _PATH, "0.006"),
    "rise": Column("nats", "loss minus that at alpha = 0", _PATH, "-0.148"),
    "rise_se": Column("nats", "standard error of rise, paired over images", _PATH, "0.019"),
    "instability": Column("nats", "loss minus the mean of those at the two ends (Def. 1)", "layers", "0.287"),
    "instability_se": Column("nats", "standard error of instability, paired over images", "layers", "0.017"),
    "instability_accuracy": Column(
        "fraction", "mean accuracy at the two ends minus accuracy (Def. 1)", "layers", "0.051"
    ),
    "instability_accuracy_se": Column(
        "fraction", "standard error of instability_accuracy, paired over images", "layers", "0.008"
    ),
    "bump": Column(
        "nats", "loss minus the straight line between those at the two ends", "interpolation, layers", "0.202"
    ),
    "bump_se": Column("nats", "standard error of bump, paired over images", "interpolation, layers", "0.012"),
    "distance": Column(
        "-", "Euclidean distance of the weights from zero-shot: alpha |w1 - w0|, over all layers",
        "interpolation", "11.4",
    ),
    "change": Column(
        "fraction", "accuracy minus that of the unpruned model at the same alpha", "prune", "-0.018"
    ),
    "change_se": Column("fraction", "standard error of change, paired over images", "prune", "0.005"),
    "sharpness": Column("nats", "mean loss of perturbed models minus loss without noise", _SHARP, "0.435"),
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
    "sharpness_change_se": Column("nats", "its standard error over draws", "sharpness", "0.004"),
    "sharpness_change_df": Column("-", "degrees of freedom of sharpness_change_se", "sharpness", "17.8"),
    "saturated": Column(
        "-", "whether the perturbed model answers at chance, so that sharpness says nothing", _SHARP, "False"
    ),
    "reached": Column(
        "-", "whether the draws for the requested standard error were made; missing: none was requested",
        _SHARP, "True",
    ),
    "precision": Column("-", "number format of weights and activations", _ALL, "fp32"),
    "seconds": Column("s", "time that the row took; of a shared measurement, its part", _ALL, "0.8"),
}  # fmt: skip

_PROTOCOL = ("rho", "on", "estimator", "noise", "adaptive", "noise_batch", "normalized")
_TESTS = {
    "p": ("-", "probability of a tau of that size by chance, by permutation of the models", "0.035"),
    "p_max": ("-", "the same, corrected for all rows of the family", "0.21"),
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
        "dataset": ("-", "out-of-distribution data set of the outcome", "rotated"),
        "outcome": ("-", "what is correlated with the measure: accuracy at alpha, or gain", "gain"),
        "measured_on": ("-", "data set of the measure; missing for distance, which needs none", "mnist"),
        "circular": ("-", "whether the measure and the outcome are of the same images", "False"),
        "measure": ("-", "general, layer, stragglers, or another measure of the models", "layer"),
        "layer": ("-", "name of the layer; of stragglers, joined by ', '", "visual.conv1"),
        "alpha": ("-", "position of the measure", "0.4"),
    }),
    **_of_rows("correlation", _PROTOCOL),
    "draws": Column("draws", "number of draws of the sharpness; missing: it varies", "correlation", "20"),
    "samples": Column("images", "images of the sharpness; missing: it varies", "correlation", "1024"),
    "seed": Column("-", "seed of the sharpness; missing: it varies", "correlation", "0"),
    **_made("correlation", {
        "models": ("models", "number that are correlated", "9"),
        "nonfinite": ("models", "number of those with a value that is not finite", "0"),
        "saturated": ("models", "number of those whose sharpness is saturated", "0"),
        "ties": ("-", "standard errors that decide on ties: paired, unpaired or none", "unpaired"),
        "tied": ("pairs", "number of pairs of models that are tied in the measure", "2"),
        "kendall": ("-", "Kendall's tau-b", "0.56"),
        "kendall_low": ("-", "lower end of its pointwise 95 % interval", "0.02"),
        "kendall_high": ("-", "upper end of that interval", "0.85"),
        "without_low": ("-", "lowest tau with one model, or group of models, left out", "0.43"),
        "without_high": ("-", "highest tau with one left out", "0.71"),
        **_TESTS,
        "tests": ("rows", "number of rows of the family; missing: the row is not tested", "93"),
        "needed": ("-", "smallest size of tau whose p_max is at most 0.05; NaN: there is none", "0.78"),
        "partial": ("-", "Kendall's partial tau given the clean loss on the same images", "0.21"),
        "spearman": ("-", "Spearman's rank correlation", "0.68"),
        "spearman_low": ("-", "lower end of its pointwise 95 % interval", "-0.06"),
        "spearman_high": ("-", "upper end of that interval", "0.94"),
    }),
}  # fmt: skip

CLAIM = {
    **_made("claim", {
        "dataset": ("-", "out-of-distribution data set of gain and mode", "rotated"),
        "model": ("-", "name of the fine-tuned model", "lr1e-3-ep3"),
        "gain": ("fraction", "highest accuracy on the path minus that at alpha = 0", "0.022"),
        "best_alpha": ("-", "position of that accuracy", "0.6"),
        "mode": ("-", "high gain, gain, failure or undecided", "failure"),
        "at": ("-", "where layers are counted: best (near best_alpha) or finetuned (at 1)", "best"),
        "measured_on": ("-", "data set of the sharpness", "mnist"),
    }),
    **_of_rows("claim", _PROTOCOL),
    **_made("claim", {
        "unit": ("-", "unit of the margin: nats, or share of the sum over layers", "nats"),
        "margin": ("see unit", "sharpness within which a layer is flat", "0.01"),
        "alpha": ("-", "position of the sharpness", "1.0"),
        "by_definition": ("-", "whether alpha is 0, where each sharpness is 0 by definition", "False"),
        "layers": ("layers", "number of layers", "31"),
        "flat": ("layers", "number of flat layers", "11"),
        "smallest": ("nats", "least sharpness of a layer", "-0.004"),
        "smallest_layer": ("-", "its layer", "visual.ln_post"),
        "total": ("nats", "sum of the sharpness of all layers", "3.7"),
        "saturated": ("layers", "number of layers whose sharpness is saturated", "0"),
        "kendall_failure": ("-", "Kendall's tau-b of flat and failure, over models", "0.6"),
        "p_failure": _TESTS["p"],
        "p_max_failure": _TESTS["p_max"],
        "kendall_gain": ("-", "Kendall's tau-b of flat and gain, over models", "-0.57"),
        "p_gain": _TESTS["p"],
        "p_max_gain": _TESTS["p_max"],
    }),
}  # fmt: skip

COST = {
    "study": Column("-", "name of the study", _ALL, "layers"),
    "models": Column("models", "number that the study takes", _ALL, "2"),
    "seconds": Column("s", "time of all workers and all processes of the run", _ALL, "6.8"),
    "peak_memory": Column("bytes", "highest use of memory: of the GPU, or of the process", _ALL, "981282816"),
}

TABLES = {"rows": ROWS, "correlation": CORRELATION, "claim": CLAIM, "cost": COST}


def describe(table: str = "rows") -> pd.DataFrame:
    """Describe the columns of a table of a run.

    Args:
        table: ``"rows"`` (of :func:`rft_fast.results.load`, ``rows.csv`` and Parquet), ``"correlation"``,
            ``"claim"`` or ``"cost"`` (the CSV files of these names).

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
