"""What is shown as a table: plain values, each with its text, and what rows can be chosen by."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from ..figures.style import margin
from ..studies.facts import Facts
from ..studies.interpolate import Z95

WIDE = "too wide to conclude"


@dataclass(frozen=True)
class Cell:
    """A text, what it sorts by (None: the text), and its look: "", n (a number), good, bad, wide or code."""

    text: str
    value: float | None = None
    look: str = ""


@dataclass(frozen=True)
class Table:
    """Cells under headings. ``chosen``: for each row, what the section's controls must be to show it."""

    caption: str
    headings: Sequence[str]
    rows: list[list[Cell]]
    chosen: Sequence[Mapping[str, str]] = field(default_factory=list)
    folded: str = ""  # the words to unfold it with; empty: open

    def wide(self) -> list[list[Cell]]:
        """The rows of which nothing can be concluded."""
        return [row for row in self.rows if any(cell.look == "wide" for cell in row)]


def number(value: Any, form: str = ".3f", scale: float = 1.0) -> Cell:
    """A number as a cell; a dash where there is none."""
    if value is None or pd.isna(value):
        return Cell("–", math.inf, "n")
    return Cell(signed(format(scale * float(value), form)), float(value), "n")


def signed(text: str) -> str:
    """With a minus that is one, and zeros without a sign."""
    return re.sub(r"(?<![\w.])[-+](0(\.0+)?)(?![\d.])", r"\1", text).replace("-", "\N{MINUS SIGN}")


def interval(value: float, low: float, high: float, form: str = "+.1f", scale: float = 1.0) -> Cell:
    """A value and its interval in brackets."""
    if pd.isna(value):
        return Cell("–", math.inf, "n")
    texts = [signed(format(scale * float(x), form)) for x in (value, low, high)]
    if pd.isna(low):
        return Cell(f"{texts[0]} [no interval]", float(value), "n")
    return Cell(f"{texts[0]} [{texts[1]}, {texts[2]}]", float(value), "n")


def gain_words(fact: Mapping[str, Any], furthest: float) -> Cell:
    """What the interval of a gain allows one to say; furthest: the highest end of one at any alpha > 0."""
    if fact["gain"] > 0:
        return Cell("gain", 2, "good") if fact["gain_low"] > 0 else Cell(WIDE, 1, "wide")
    if math.isnan(furthest):  # of a single image
        return Cell("no gain seen; no interval", 0, "wide")
    if furthest > 0:
        return Cell(f"no gain seen; {signed(f'{100 * furthest:+.1f}')} not excluded", 0, "wide")
    return Cell("no gain", 0, "bad")


def path(facts: Facts) -> Table:
    """A row per model and data set: :func:`rft_fast.studies.summarize`, and what can be concluded."""
    rows, chosen = [], []
    for fact in facts.path.to_dict("records"):
        fact["mode"] = "–" if pd.isna(fact["mode"]) else fact["mode"]
        looks = {"failure": "bad", "gain": "good", "high gain": "good"}
        gain = interval(fact["gain"], fact["gain_low"], fact["gain_high"], scale=100)
        rows.append(
            [
                Cell(fact["model"]),
                Cell(fact["dataset"]),
                gain if fact["gain"] else Cell("0.0", 0.0, "n"),
                gain_words(fact, furthest(facts.rows, fact["model"], fact["dataset"])),
                Cell(fact["mode"], None, looks.get(fact["mode"], "")),
                number(fact["best_alpha"], "g"),
                number(fact["zero_shot"], ".1f", 100),
                number(fact["fine_tuned"], ".1f", 100),
                number(fact["barrier"]),
                number(fact["instability_loss"]),
                number(fact["instability_accuracy"], ".1f", 100),
                number(fact["samples"], ",.0f"),
            ]
        )
        chosen.append({"model": fact["model"], "dataset": fact["dataset"]})
    headings = (
        "model|data set|gain [95 %]|what the interval says|mode|best α|zero-shot %|fine-tuned %|barrier|"
        "instability, loss|instability, acc.|n"
    ).split("|")
    return Table("Every model on every data set", headings, rows, chosen)


def furthest(rows: pd.DataFrame, model: str, dataset: str) -> float:
    """The highest end of the pointwise 95 % intervals of A(alpha) - A(0), over alpha > 0."""
    curve = rows[(rows["study"] == "interpolation") & (rows["model"] == model) & (rows["alpha"] > 0)]
    curve = curve[curve["dataset"] == dataset]
    return float((curve["gain"] + Z95 * curve["gain_se"]).max(skipna=False))


def layers(facts: Facts) -> Table:
    """A row per layer: :func:`rft_fast.studies.stragglers`."""
    rows, chosen = [], []
    for fact in facts.stragglers.to_dict("records"):
        half = Z95 * fact["instability_se"]
        rows.append(
            [
                Cell(fact["layer"], None, "code"),
                interval(fact["instability"], fact["instability"] - half, fact["instability"] + half, "+.3f"),
                straggler_words(fact),
                number(fact["instability_low"], "+.3f"),
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
        "layer|instability in nats [95 %]|verdict|corrected lower end|at α|rise there|instability, acc.|"
        "model|data set|n"
    ).split("|")
    return Table("Every layer on its own", headings, rows, chosen)


def straggler_words(fact: Mapping[str, Any]) -> Cell:
    """Straggler or not; a layer above the margin whose interval reaches below it is neither."""
    if fact["straggler"]:
        return Cell("straggler", 2, "bad")
    if fact["unchanged"]:
        return Cell("same at both ends", 0)
    half = Z95 * fact["instability_se"]
    if fact["instability"] + half > fact["margin"] and fact["rise"] + Z95 * fact["rise_se"] > 0:
        return Cell(WIDE, 1, "wide")
    return Cell("not one", 0)


def sharpness(facts: Facts, study: str) -> Table:
    """A row per measurement of a sharpness, general or by layer."""
    part = facts.part(study)
    halves = margin(part)
    by_layer = study == "layer-sharpness"
    keys = ["model", "dataset", "rho", "layer"]
    flat = facts.near_zero[facts.near_zero["near_zero"]] if by_layer else part[:0]
    near = set(flat[keys].itertuples(index=False, name=None))
    rows, chosen = [], []
    for row, half in zip(part.to_dict("records"), halves, strict=True):
        if not row["alpha"] and not row["draws"]:
            continue  # nothing is perturbed there
        value = row["sharpness"]
        rows.append(
            [
                *([Cell(row["layer"], None, "code")] if by_layer else []),
                Cell(row["model"]),
                number(row["alpha"], "g"),
                interval(value, value - half, value + half, "+.3g"),
                sharpness_words(value, half, tuple(row[key] for key in keys) in near),
                number(row["draws"], ",.0f"),
                number(row["rho"], "g"),
                Cell(row["dataset"]),
                number(row["samples"], ",.0f"),
            ]
        )
        alpha = {"alpha": f"{row['alpha']:g}"} if by_layer else {}
        chosen.append({"model": row["model"], "setting": setting(row), **alpha})
    head = ["layer"] if by_layer else []
    head += "model|α|sharpness in nats [95 %]|what the interval says|draws|ρ|measured on|n".split("|")
    folded = "Show every value" if by_layer else ""
    return Table("Sharpness, with Student's t over draws", head, rows, chosen, folded)


def sharpness_words(value: float, half: float, near: bool) -> Cell:
    if near:
        return Cell("layer near zero", 0, "good")
    if pd.isna(half):
        return Cell("no standard error", 1, "wide")
    if half and abs(value) <= half:
        return Cell("includes 0: " + WIDE, 1, "wide")
    return Cell("above 0" if value > 0 else "below 0" if value < 0 else "0", 2)


def setting(row: Mapping[str, Any]) -> str:
    """What one measurement of sharpness is told from another by."""
    return f"ρ = {row['rho']:g}, {row['dataset']}, {row['on']} weights, {row['estimator']}"


def prune(facts: Facts) -> Table:
    """A row per way of pruning: :func:`rft_fast.studies.pruning_effect` with its interval over masks."""
    rows, chosen = [], []
    for fact in facts.pruning.to_dict("records"):
        seeds, change, error = int(fact["seeds"]), fact["change"], fact["change_se"]
        half = float(stdtrit(seeds - 1, 0.975)) * error if seeds > 1 else math.nan
        if np.isnan(half):
            words = Cell("one mask: no interval", 1, "wide")
        elif abs(change) > half:
            words = Cell("helped", 2, "good") if change > 0 else Cell("hurt", 0, "bad")
        else:
            words = Cell("includes 0: " + WIDE, 1, "wide")
        rows.append(
            [
                Cell(fact["model"]),
                Cell("others, at random" if fact["control"] else "stragglers"),
                Cell(f"{fact['criterion']}, {fact['method']}"),
                interval(change, change - half, change + half, "+.2f", 100),
                words,
                number(seeds, ".0f"),
                number(len(fact["layers"]), ".0f"),
                number(fact["gain"], "+.1f", 100),
                number(fact["unpruned_gain"], "+.1f", 100),
                Cell(fact["dataset"]),
            ]
        )
        chosen.append({"model": fact["model"], "dataset": fact["dataset"]})
    headings = (
        "model|pruned|criterion, method|mean change in points [95 %]|what the interval says|masks|layers|"
        "best gain|unpruned|data set"
    ).split("|")
    return Table("What pruning did to accuracy, mean over α > 0", headings, rows, chosen)


def correlation(found: pd.DataFrame, names: Sequence[str]) -> Table:
    """A row per rank correlation; names: of what each row of the correlation measures."""
    rows, chosen = [], []
    for name, fact in zip(names, found.to_dict("records"), strict=True):
        low, high = fact["kendall_low"], fact["kendall_high"]
        if pd.isna(fact["kendall"]):
            words = Cell("not defined", 1, "wide")
        elif pd.isna(low):
            words = Cell("no interval", 1, "wide")
        elif low <= 0 <= high:
            words = Cell("includes 0: " + WIDE, 1, "wide")
        else:
            words = Cell("same direction" if low > 0 else "opposite direction", 2)
        rows.append(
            [
                Cell(name, None, "code" if fact["measure"] == "layer" else ""),
                interval(fact["kendall"], low, high, "+.2f"),
                words,
                interval(fact["spearman"], fact["spearman_low"], fact["spearman_high"], "+.2f"),
                Cell(fact["dataset"]),
                Cell(fact["outcome"]),
                number(fact["alpha"], "g"),
                number(fact["models"], ".0f"),
            ]
        )
        chosen.append({"dataset": fact["dataset"], "outcome": fact["outcome"], "alpha": f"{fact['alpha']:g}"})
    headings = "sharpness of|Kendall's τ [95 %]|by τ|Spearman's ρ [95 %]|data set|against|α|n (models)".split(
        "|"
    )
    return Table("Sharpness against what happens out of distribution, over models", headings, rows, chosen)
