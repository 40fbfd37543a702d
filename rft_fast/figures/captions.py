"""Measurements in words, for figures: what was measured and how, names in short, what is missing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..common.words import many, signed
from ..names import ON_WORDS
from .style import fold, margin

# Columns that distinguish one measurement of sharpness from another.
SETTING = "rho dataset on asked noise adaptive noise_batch normalized".split()


def not_finite(values: Iterable[float], what: str) -> str:
    """A sentence that counts the values that are not finite; empty if there are none."""
    finite = np.isfinite(np.asarray(values, dtype=float))
    of = f"of {finite.size:,} {what}"
    are = many(f"{(~finite).sum():,}", f"{of} is", f"{of} are")
    return "" if finite.all() else f"{are} not finite, and not drawn."


def unknown_errors(rows: pd.DataFrame) -> str:
    """A sentence that counts the sharpnesses without an interval; empty if there are none."""
    count = int(margin(rows).isna().sum())
    have = many(count, f"of {len(rows)} values has", f"of {len(rows)} values have")
    return f"{have} no standard error (a worst case, or one draw): no bar." if count else ""


def stated(rows: pd.DataFrame) -> str:
    """A sentence that describes how sharpness was measured, from the columns of its rows."""
    rows = rows[rows["draws"].fillna(1) > 0]  # without perturbation there are no draws
    climbed = rows["estimator"].str.startswith("apgd").all()
    flags = [("not adaptive", "adaptive", False), ("logits normalised", "normalized", True)]
    parts = [
        _plural(text.format(several(values if column != "on" else map(_on, values))))
        for text, column in (
            (r"$\rho$ = {}", "rho"),
            ("{} steps" if climbed else "{} draws", "draws"),
            ("{} images", "samples"),
            ("seed {}", "seed"),
            ("estimator {}", "estimator"),
            ("{} noise", "noise"),
            ("on {} weights", "on"),
            ("noise anew every {} images", "noise_batch"),
        )
        if len(values := rows[column].dropna().unique())
    ]
    if "restarts" in rows and len(starts := rows.loc[rows["restarts"] > 1, "restarts"].unique()):
        parts.append(f"the highest of {several(starts)} starts")
    if "excluded" in rows and len(without := rows["excluded"].dropna().unique()):
        parts.append(f"without {max(len(names.split(', ')) for names in without)} excluded layers")
    parts += [text for text, column, flag in flags if (rows[column] == flag).any()]
    return ", ".join(parts) + "."


def setting(rows: pd.DataFrame) -> str:
    """The settings that identify a measurement of sharpness, in two lines.

    Without formulas, whose text has no characters of other fonts.
    """
    first = rows.iloc[0]
    where = fold(first["dataset"], 2, "title")
    return f"ρ = {first['rho']:g} on {where}\n{first['estimator']}, {_on(first['on'])} weights"


def _plural(text: str) -> str:
    """``"1 draw"`` of ``"1 draws"``."""
    return re.sub(r"\b(1 \w+)s$", r"\1", text)


def _on(value: Any) -> Any:
    return ON_WORDS.get(value, value)


def several(values: Iterable[Any]) -> str:
    """Up to three values in words; the range if there are more."""
    found = sorted(values)
    texts = [
        x if isinstance(x, str) else f"{x:,}" if isinstance(x, int | np.integer) else f"{x:g}" for x in found
    ]
    return " or ".join(texts) if len(texts) <= 3 else f"{texts[0]} to {texts[-1]}"


def short(names: Sequence[str]) -> dict[str, str]:
    """Shorten layer names, as far as they stay distinct, by a shared prefix and up to their first number.

    ``visual.transformer.resblocks.3.attn.in_proj`` becomes ``3.attn.in_proj``.
    """
    parts = [name.split(".") for name in names]
    rest = []
    for part in parts:
        alike = [other for other in parts if other[0] == part[0]]
        same = 0
        while all(len(other) > same + 1 and other[same] == part[same] for other in alike):
            same += 1
        rest.append(".".join(part[same:]))
    tails = [re.sub(r"^.*?(?<![^.])(?=\d+(\.|$))", "", name) for name in rest]
    unique = next(texts for texts in (tails, rest, names) if len(set(texts)) == len(names))
    return dict(zip(names, unique, strict=True))


def measures(
    table: pd.DataFrame, said: Mapping[str, str] | None = None, rho: str = r"$\rho$ = "
) -> pd.Series:
    """Name the measure of each row of a correlation, with those of its settings that vary.

    Args:
        table: the result of :func:`rft_fast.studies.correlation`.
        said: measure -> its name in words, if that differs.
        rho: text before a noise scale.
    """
    layers = short(list(table.loc[table["measure"] == "layer", "layer"].unique()))
    words = said or {}
    named = [
        layers[layer] if measure == "layer" else words.get(measure, measure)
        for measure, layer in zip(table["measure"], table["layer"], strict=True)
    ]
    names = pd.Series(named, index=table.index)
    for column in ("rho", "measured_on", "estimator", "on"):
        varies = table.groupby("measure")[column].transform(lambda own: own.nunique(dropna=False)) > 1
        mark = rho if column == "rho" else ""
        texts = table[column].map(lambda value, mark=mark: f", {mark}{several([_on(value)])}")
        names = names.where(~varies, names + texts)
    return names


def choose(models: Sequence[str], gains: pd.Series, count: int) -> tuple[list[str], str]:
    """Choose at most ``count`` models, of the highest and the lowest gains, and say so in a sentence."""
    if len(models) <= count:
        return list(models), ""
    if not set(models) <= set(gains.index):
        return list(models[:count]), f"The first {count} of {len(models)} models."
    ranked = list(gains[list(models)].sort_values(ascending=False, kind="stable").index)
    half = count // 2
    return ranked[: count - half] + ranked[-half:], (
        f"Of {len(models)} models, those with the {count - half} highest and the {half} lowest gains in "
        "mean OOD accuracy."
    )


def heading(name: str, model: str, gains: pd.Series) -> str:
    """The folded name of a model, and below it its observed gain in mean out-of-distribution accuracy."""
    gain = signed(f"gain {100 * gains[model]:+.1f} points") if model in gains else ""
    return "\n".join(filter(None, [name, gain]))


def modes_explained(gains: pd.Series) -> str:
    """A sentence that explains :func:`heading`; empty without gains."""
    return "" if gains.empty else "Gain: highest mean out-of-distribution accuracy over zero-shot, in points."
