"""The tables of a report, as plain values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from ..common.words import signed
from ..figures.style import margin
from ..names import ON_WORDS
from ..studies.facts import Facts
from ..studies.interpolate import Z95
from ..studies.pruning import kind
from ..studies.verdicts import (
    Association,
    Mode,
    Shape,
    Sign,
    Straggling,
    association,
    half_width,
    layer_shape,
    shape,
    sign,
    straggling,
)

WIDE = "too wide to conclude"


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what it shows.
        value: key for sorting; None: the text.
        look: "", "n" (a number), "good", "bad", "wide" (nothing can be concluded) or "code".
    """

    text: str
    value: float | None = None
    look: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: its caption.
        headings: headings of the columns.
        rows: cells by row.
        chosen: for each row, the values of the section's controls for which it is shown.
        folded: text of the control that unfolds the table; empty: it is open.
    """

    caption: str
    headings: Sequence[str]
    rows: list[list[Cell]]
    chosen: Sequence[Mapping[str, str]] = field(default_factory=list)
    folded: str = ""

    def wide(self) -> list[list[Cell]]:
        """The rows of which nothing can be concluded."""
        return [row for row in self.rows if any(cell.look == "wide" for cell in row)]


def number(value: Any, form: str = ".3f", scale: float = 1.0) -> Cell:
    """Create a cell of a number; a dash if it is missing."""
    if value is None or pd.isna(value):
        return Cell("–", math.inf, "n")
    return Cell(signed(format(scale * float(value), form)), float(value), "n")


def minus(text: str) -> str:
    """Use the minus sign for the hyphens of negative numbers in a sentence, not for those of names."""
    return re.sub(r"(?<![\w.)\]-])-(?=\d)", "\N{MINUS SIGN}", text)


def interval(value: float, low: float, high: float, form: str = "+.1f", scale: float = 1.0) -> Cell:
    """Create a cell of a value with its interval in brackets."""
    if pd.isna(value):
        return Cell("–", math.inf, "n")
    texts = [signed(format(scale * float(x), form)) for x in (value, low, high)]
    if pd.isna(low):
        return Cell(f"{texts[0]} [no interval]", float(value), "n")
    return Cell(f"{texts[0]} [{texts[1]}, {texts[2]}]", float(value), "n")


MODES: dict[Mode, Cell] = {
    "high gain": Cell("high gain", 3, "good"),
    "gain": Cell("gain", 2, "good"),
    "undecided": Cell("undecided", 1, "wide"),
    "failure": Cell("failure", 0, "bad"),
}


def pointwise(value: float, error: float) -> Cell:
    """Create a cell of a gain in points with its pointwise 95 % interval."""
    return interval(value, value - Z95 * error, value + Z95 * error, scale=100)


def path(facts: Facts) -> Table:
    """Create a row per model and data set: :func:`rft_fast.studies.summarize`."""
    rows, chosen = [], []
    for fact in facts.path.to_dict("records"):
        rows.append(
            [
                Cell(fact["model"]),
                Cell(fact["dataset"]),
                interval(fact["gain"], fact["gain_low"], fact["gain_high"], scale=100),
                Cell("–") if pd.isna(fact["mode"]) else MODES[fact["mode"]],
                number(fact["best_alpha"], "g"),
                pointwise(fact["gain_held_out"], fact["gain_held_out_se"]),
                pointwise(fact["gain_id_alpha"], fact["gain_id_alpha_se"]),
                number(fact["id_alpha"], "g"),
                number(fact["zero_shot"], ".1f", 100),
                number(fact["fine_tuned"], ".1f", 100),
                number(fact["barrier"]),
                number(fact["bump"]),
                SHAPE[shape(fact)],
                number(fact["instability_loss"]),
                number(fact["instability_accuracy"], ".1f", 100),
                number(fact["samples"], ",.0f"),
            ]
        )
        chosen.append({"model": fact["model"], "dataset": fact["dataset"]})
    headings = (
        "model|data set|gain [95 % bounds]|mode|best α|held out [95 %]|gain at α of ID [95 %]|α of ID|"
        "zero-shot %|fine-tuned %|barrier|"
        "bump|shape of the loss|instability, loss|instability, acc.|n"
    ).split("|")
    return Table("Every model on every data set", headings, rows, chosen)


SHAPE: dict[Shape, Cell] = {
    "bump": Cell("bump", 2, "bad"),
    "slope": Cell("slope", 1),
    "no rise": Cell("no rise", 0),
    "unknown": Cell("not known", -1, "wide"),
}


def layers(facts: Facts) -> Table:
    """Create a row per layer: :func:`rft_fast.studies.stragglers`."""
    rows, chosen = [], []
    for fact in facts.stragglers.to_dict("records"):
        half = Z95 * fact["instability_se"]
        rows.append(
            [
                Cell(fact["layer"], None, "code"),
                interval(fact["instability"], fact["instability"] - half, fact["instability"] + half, "+.3f"),
                STRAGGLING[straggling(fact)],
                number(fact["instability_low"], "+.3f"),
                number(fact["bump"]),
                SHAPE[layer_shape(fact)] if fact["straggler"] else Cell("–"),
                number(fact["alpha"], "g"),
                number(fact["rise"], "+.3f"),
                number(fact["instability_accuracy"], "+.1f", 100),
                Cell(fact["model"]),
                Cell(fact["dataset"]),
                number(fact["samples"], ",.0f"),
            ]
        )
        chosen.append({"model": fact["model"], "dataset": fact["dataset"]})
    headings = (
        "layer|instability in nats [95 %]|verdict|corrected lower end|bump|by a|at α|rise there|"
        "instability, acc.|model|data set|n"
    ).split("|")
    return Table("Every layer on its own", headings, rows, chosen)


STRAGGLING: dict[Straggling, Cell] = {
    "straggler": Cell("straggler", 2, "bad"),
    "unchanged": Cell("same at both ends", 0),
    "unclear": Cell(WIDE, 1, "wide"),
    "stable": Cell("no straggler", 0),
}


def sharpness(facts: Facts, study: str) -> Table:
    """Create a row per measurement of a sharpness, general or by layer."""
    by_layer = study == "layer-sharpness"
    rows, chosen = [], []
    for row in sharpnesses(facts, study).to_dict("records"):
        if not row["alpha"] and not row["draws"]:
            continue  # nothing is perturbed there
        value, half = row["sharpness"], row["half"]
        rows.append(
            [
                *([Cell(row["layer"], None, "code")] if by_layer else []),
                Cell(row["model"]),
                number(row["alpha"], "g"),
                interval(value, value - half, value + half, "+.3g"),
                Cell("flat layer", 0, "good") if row["near_zero"] else _SHARPNESS[row["verdict"]],
                number(row["draws"], ",.0f"),
                number(row["rho"], "g"),
                Cell(row["dataset"]),
                number(row["samples"], ",.0f"),
            ]
        )
        alpha = {"alpha": f"{row['alpha']:g}"} if by_layer else {}
        chosen.append({"model": row["model"], "setting": row["setting"], **alpha})
    head = ["layer"] if by_layer else []
    head += "model|α|sharpness in nats [95 %]|what the interval says|draws|ρ|measured on|n".split("|")
    folded = "Show every value" if by_layer else ""
    return Table("Sharpness, with Student's t over draws", head, rows, chosen, folded)


_SHARPNESS: dict[str, Cell] = {
    "above": Cell("above 0", 2),
    "below": Cell("below 0", 2),
    "exactly 0": Cell("0", 2),
    "unclear": Cell("includes 0: " + WIDE, 1, "wide"),
    "unknown": Cell("no standard error", 1, "wide"),
    "saturated": Cell("saturated: at chance", 0, "bad"),
}


def sharpnesses(facts: Facts, study: str) -> pd.DataFrame:
    """Add to the rows of a sharpness what they allow one to conclude.

    Returns:
        The rows with ``setting``, which distinguishes one way of measuring from others; ``half``, half of the
        95 % interval; ``verdict``, a :data:`rft_fast.studies.verdicts.Sign`, "exactly 0" or "saturated";
        ``near_zero``, whether the layer is.
    """
    part = facts.part(study)
    value, half = part["sharpness"], margin(part)
    flagged = facts.saturated(part)
    part = part.assign(
        setting=_settings(part),
        half=half,
        verdict=[
            "saturated" if bad else sign(v - h, v + h) if v or h else "exactly 0"
            for v, h, bad in zip(value, half, flagged, strict=True)
        ],
        near_zero=False,
    )
    if study == "layer-sharpness":
        flat = facts.near_zero[facts.near_zero["near_zero"]]
        keys = ["model", "setting", "layer"]
        near = set(flat.assign(setting=_settings(flat))[keys].itertuples(index=False, name=None))
        part["near_zero"] = [key in near for key in part[keys].itertuples(index=False, name=None)]
    return part


def _settings(rows: pd.DataFrame) -> list[str]:
    return [
        f"ρ = {row['rho']:g}, {row['dataset']}, {ON_WORDS.get(row['on'], row['on'])} weights, {row['asked']}"
        for row in rows.to_dict("records")
    ]


PRUNED: dict[Sign, Cell] = {
    "above": Cell("helped", 2, "good"),
    "below": Cell("hurt", 0, "bad"),
    "unclear": Cell("includes 0: " + WIDE, 1, "wide"),
}


def prune(facts: Facts) -> Table:
    """Create a row per way of pruning: its effect, with intervals over masks that are corrected for all."""
    rows, chosen = [], []
    cases = int((~facts.pruning["control"].astype(bool)).sum())
    for fact in facts.pruning.to_dict("records"):
        seeds, change, error = int(fact["seeds"]), fact["change"], fact["change_se"]
        half = half_width(error, seeds - 1, cases)
        reason = "one mask" if seeds == 1 else "masks agree"
        words = PRUNED | {"unknown": Cell(f"{reason}: no interval", 1, "wide")}
        rows.append(
            [
                Cell(fact["model"]),
                Cell("others, at random" if fact["control"] else kind(fact["criterion"])),
                Cell(f"{fact['criterion']}, {fact['method']}"),
                interval(change, change - half, change + half, "+.2f", 100),
                words[sign(change - half, change + half)],
                number(seeds, ".0f"),
                number(len(fact["layers"]), ".0f"),
                number(fact["gain"], "+.1f", 100),
                number(fact["unpruned_gain"], "+.1f", 100),
                Cell(fact["dataset"]),
            ]
        )
        chosen.append({"model": fact["model"], "dataset": fact["dataset"]})
    headings = (
        "model|pruned|criterion, method|mean change in points [95 %, corrected]|what the interval says|masks|"
        "layers|best gain|unpruned|data set"
    ).split("|")
    return Table("What pruning did to accuracy, mean over α > 0", headings, rows, chosen)


_KENDALL: dict[Association, Cell] = {
    "above": Cell("same direction", 3),
    "below": Cell("opposite direction", 3),
    "unclear": Cell("not significant", 2, "wide"),
    "saturated": Cell("saturated: not tested", 1, "wide"),
    "unknown": Cell("not defined", 0, "wide"),
}


def correlation(table: pd.DataFrame, names: Sequence[str]) -> Table:
    """Create a row per rank correlation.

    Args:
        table: the result of :func:`rft_fast.studies.correlation`.
        names: text for the measure of each of its rows.
    """
    rows, chosen = [], []
    for name, fact in zip(names, table.to_dict("records"), strict=True):
        low, high = fact["without_low"], fact["without_high"]
        rows.append(
            [
                Cell(name, None, "code" if fact["measure"] == "layer" else ""),
                number(fact["kendall"], "+.2f"),
                _KENDALL[association(fact)],
                number(fact["p_max"]),
                number(fact["p"]),
                number(fact["needed"], ".2f"),
                number(fact["partial"], "+.2f"),
                Cell("–" if pd.isna(low) else signed(f"{low:+.2f} to {high:+.2f}"), low, "n"),
                interval(fact["spearman"], fact["spearman_low"], fact["spearman_high"], "+.2f"),
                Cell(fact["dataset"] + (" (circular)" if fact["circular"] else "")),
                Cell(fact["outcome"]),
                number(fact["alpha"], "g"),
                number(fact["models"], ".0f"),
            ]
        )
        chosen.append({"dataset": fact["dataset"], "outcome": fact["outcome"], "alpha": f"{fact['alpha']:g}"})
    headings = (
        "measure|Kendall's τ|verdict|p, corrected|p alone|size needed|τ given clean loss|τ without one model|"
        "Spearman's ρ [95 %, pointwise]|data set|against|α|n (models)"
    ).split("|")
    return Table(
        "Sharpness against out-of-distribution accuracy and gain, over models", headings, rows, chosen
    )
