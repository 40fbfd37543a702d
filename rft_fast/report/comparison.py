"""The comparison of two runs: their settings, and the measurements that both made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from ..common.words import flat, many, some
from ..config.recorded import shown_as, value_as
from ..studies.interpolate import Z95
from ..studies.rows import asked
from .charts import points
from .drawing import Chart, Key, Picture, choices, layout, line, rule, safe
from .provenance import in_line
from .runs import RunRead
from .shown import Section
from .tables import Cell, Table, interval, number, signed

# Columns that identify a measurement of a run.
_KEYS = (
    "study model dataset layer others alpha rho on noise adaptive keep method criterion control estimator "
    "noise_batch normalized seed"
).split()
_SCALE = {
    "accuracy": (100.0, "+.1f", "points"),
    "loss": (1.0, "+.3f", "nats"),
    "sharpness": (1.0, "+.3g", "nats"),
}
_MANY = 1e9  # degrees of freedom with which Student's t is the normal distribution
_SHOWN = 500  # most rows of the table


def compare(first: RunRead, second: RunRead) -> dict[str, Any]:
    """Compare two runs.

    Args:
        first: run A.
        second: run B.

    Returns:
        Arguments of :func:`rft_fast.report.page.render`.

    Raises:
        ValueError: the runs have no measurement in common.
    """
    common = matched(first.facts.rows, second.facts.rows)
    if common.empty:
        raise ValueError(
            f"report: {first.directory} and {second.directory} have no measurement in common: no model, data "
            "set and position that both have"
        )
    settings = _settings(first.config, second.config)
    apart = common["apart"].to_numpy(dtype=bool)
    corrected = common["corrected"].to_numpy(dtype=bool)
    by_study = common.groupby("study", sort=False)["apart"].agg(["sum", "size"])
    findings = [
        f"{study}: {int(row['sum'])} of {int(row['size'])} values differ beyond their error bars."
        for study, row in by_study.iterrows()
    ]
    chance = 0.05 * common["known"].sum()
    findings.append(
        f"In all {apart.sum():,} of {len(common):,}; about {chance:,.0f} would by chance if the runs "
        f"were equal and the values independent. {corrected.sum():,} still differ after correction for all "
        "comparisons (Bonferroni)."
    )
    return {
        "title": f"{first.config['zoo']} and {second.config['zoo']}",
        "above": "rft_fast comparison of two runs",
        "about": " · ".join(
            f"{name} {run.directory} ({run.config['date'][:10]})"
            for name, run in (("A", first), ("B", second))
        ),
        "commands": [f"A  {first.config['command']}", f"B  {second.config['command']}"],
        "tiles": [
            (f"{len(settings)}", "settings differ"),
            (f"{len(common):,}", "values that both measured"),
            (f"{apart.sum():,}", "differ beyond their error bars"),
            (f"{corrected.sum():,}", "still differ after correction for all"),
        ],
        "findings": findings,
        "notes": [*_notes(first, second, common)],
        "parts": [_configuration(settings), _measurements(common)],
        "models": 2,
    }


def matched(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Match the values that two runs have in common, and test whether they differ.

    Args:
        first: rows of run A.
        second: rows of run B.

    Returns:
        One row per value, with columns that identify it and

        - ``value``: "accuracy", "loss" or "sharpness";
        - ``a``, ``b``, ``a_se``, ``b_se``, ``n_a``, ``n_b``: the values, their standard errors, and images;
        - ``difference``: b - a, and ``half``, the half-width of its 95 % interval by Student's t, as of
          independent measurements;
        - ``apart``: whether the interval excludes 0; ``corrected``: the same with Bonferroni's correction;
        - ``known``: whether the difference has a standard error.
    """
    sides = [_long(rows) for rows in (first, second)]
    both = sides[0].merge(sides[1], on=["place", "value"], suffixes=("", "_b"))
    both = both.rename(
        columns={
            "x": "a",
            "x_b": "b",
            "se": "a_se",
            "se_b": "b_se",
            "samples": "n_a",
            "samples_b": "n_b",
            "count": "count_a",
        }
    )
    difference = both["b"] - both["a"]
    error = np.hypot(both["a_se"], both["b_se"])
    known = error.notna()
    freedom = _freedom(both)
    half = stdtrit(freedom, 0.975) * error
    bound = stdtrit(freedom, 1 - 0.025 / max(int(known.sum()), 1))
    # Without a standard error there is no test, unless one side is not finite.
    one_sided = np.isfinite(both["a"]) != np.isfinite(both["b"])
    return both.assign(
        difference=difference,
        half=half,
        known=known,
        apart=(difference.abs() > half) | one_sided,
        corrected=(difference.abs() > bound * error) | one_sided,
    )


def _count(rows: pd.DataFrame) -> pd.Series:
    """Return one more than the degrees of freedom of each standard error: of images, or of draws."""
    pairs = rows["estimator"].str.startswith("antithetic").fillna(False)
    draws = rows["draws"].astype(float) / np.where(pairs, 2, 1)
    draws = (rows["sharpness_df"] + 1).fillna(draws)
    return draws.where(rows["estimator"].notna(), rows["samples"].astype(float))


def _freedom(both: pd.DataFrame) -> pd.Series:
    """Degrees of freedom of the differences (Welch and Satterthwaite); many without an error."""
    parts = [(both[f"{side}_se"] ** 2, both[f"count_{side}"] - 1) for side in "ab"]
    spread = sum((variance**2 / freedom).where(freedom > 0, 0) for variance, freedom in parts)
    freedom = sum(variance for variance, _ in parts) ** 2 / spread
    return freedom.where(np.isfinite(freedom), _MANY)


def _long(rows: pd.DataFrame) -> pd.DataFrame:
    """Reshape to one row per value, with ``place``, all of its keys as one text."""
    # The zero-shot measurement is the same for all models, and seeds identify only masks.
    shared = (rows["study"] == "interpolation") & (rows["alpha"] == 0)
    rows = rows.assign(
        alpha=rows["alpha"].round(9),
        model=rows["model"].mask(shared, "zero-shot"),
        seed=rows["seed"].where(rows["method"].notna()),
        estimator=asked(rows),
    )
    place = rows[_KEYS].astype("string").fillna("").agg("\x1f".join, axis=1)
    parts = []
    for value in ("accuracy", "loss", "sharpness"):
        # Rows with an estimator are of a sharpness; their mean accuracy and loss are not compared.
        part = rows[rows[value].notna() & ((value == "sharpness") == rows["estimator"].notna())]
        facts = part[
            ["study", "model", "dataset", "layer", "alpha", "rho", "criterion", "control", "seed", "samples"]
        ]
        parts.append(
            facts.assign(
                place=place[part.index], value=value,
                x=part[value].astype(float), se=part[f"{value}_se"].astype(float),
                count=_count(part),
            )
        )  # fmt: skip
    return pd.concat(parts).drop_duplicates(["place", "value"])


def _notes(first: RunRead, second: RunRead, common: pd.DataFrame) -> Iterator[str]:
    for name, run in (("A", first), ("B", second)):
        yield from (f"{name}: {note}" for note in run.notes)
        others = (second if run is first else first).facts.rows
        for column, what in (("model", "models"), ("dataset", "data sets"), ("study", "studies")):
            if alone := [
                str(x) for x in run.facts.rows[column].unique() if x not in set(others[column].unique())
            ]:
                yield f"Only {name} has the {what} {some(alone)}."
    yield from _other_estimators(first.facts.rows, second.facts.rows)
    if count := int((~common["known"]).sum()):
        yield f"Not compared, as there is no standard error: {many(count, 'value')}."


def _other_estimators(first: pd.DataFrame, second: pd.DataFrame) -> Iterator[str]:
    """Say which studies' sharpness was measured by different estimators, as by another version."""
    sides = []
    for rows in (first, second):
        rows = rows.assign(asked=asked(rows))
        sides.append(
            {study: set(part["asked"].dropna()) for study, part in rows.groupby("study", sort=False)}
        )
    apart: dict[tuple[str, str], list[str]] = {}
    for study, ours in sides[0].items():
        theirs = sides[1].get(study, set())
        if ours and theirs and not ours & theirs:
            apart.setdefault((some(sorted(ours)), some(sorted(theirs))), []).append(str(study))
    for (one, other), studies in apart.items():
        yield (
            f"The sharpness of {some(studies)} cannot be compared: A measured it by the estimator {one}, B "
            f"by {other}."
        )


def _settings(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the keys of ``config.json`` whose values differ, with both values."""
    a, b = (
        {
            shown_as(names): in_line(value_as(names, value))
            for names, value in flat(config)
            if names[0] != "run"
        }
        for config in (first, second)
    )
    names = dict.fromkeys([*a, *b])
    return [(name, a.get(name, "–"), b.get(name, "–")) for name in names if a.get(name) != b.get(name)]


def _configuration(settings: list[tuple[str, str, str]]) -> Section:
    rows = [[Cell(name), Cell(a, None, "code"), Cell(b, None, "code")] for name, a, b in settings]
    return Section(
        "configuration",
        "config.json",
        "Settings",
        "The settings, versions and hashes in which the two runs differ; everything else is the same."
        if rows
        else "The two runs have the same settings and inputs.",
        tables=[Table("Settings that differ", ["setting", "A", "B"], rows)] if rows else [],
    )


def _measurements(common: pd.DataFrame) -> Section:
    traces = [rule([-1e3, 1e3], [-1e3, 1e3])]
    ranges: dict[str, list[float]] = {}
    for (study, value), group in common.groupby(["study", "value"], sort=False):
        scale, form, unit = _SCALE[value]
        where = f"{study}, {value}"
        for apart, colour, symbol in ((False, "@grey/.7", "circle-open"), (True, "@bad", "diamond")):
            part = group[group["apart"] == apart]
            hover = [
                f"<b>{safe(row['model'])}</b> on {safe(row['dataset'])}, α = {row['alpha']:g}<br>"
                + ("" if pd.isna(row["layer"]) else f"{safe(row['layer'])}<br>")
                + f"A {scale * row['a']:{form[1:]}}, B {scale * row['b']:{form[1:]}} {unit}<br>B − A "
                f"{points(row['difference'], row['half'], scale, form)} (95 %)"
                for row in part.to_dict("records")
            ]
            trace = line(
                (scale * part["a"]).tolist(), (scale * part["b"]).tolist(), hover, {"what": [where]}, colour,
                symbol, mode="markers",
            )  # fmt: skip
            trace["error_x"] = _bars(scale * Z95 * part["a_se"], colour)
            trace["error_y"] = _bars(scale * Z95 * part["b_se"], colour)
            traces.append(trace)
        values = scale * group[["a", "b"]].to_numpy(dtype=float)
        values = values[np.isfinite(values)]
        if len(values):
            room = 0.05 * float(np.ptp(values)) or 1.0
            ranges[where] = [float(values.min()) - room, float(values.max()) + room]
    for where, (low, high) in ranges.items():
        traces.append(rule([low, high], [low, high], {"what": [where]}))
    chart = Chart(
        "both",
        "B against A, each with its 95 % interval",
        "Values of the second run against those of the first",
        traces[1:],
        layout("A", "B", 480),
        wide=True,
    )
    control = choices(
        "what", "Values", (f"{s}, {v}" for s, v in zip(common["study"], common["value"], strict=True))
    )
    keys = [Key("differs beyond its error bars", "@bad", "diamond"), Key("does not", "@grey", "circle-open")]
    return Section(
        "measurements",
        "rows.sqlite",
        "Measurements",
        "Values that both runs have under the same name: study, model, data set, layer, position and noise. "
        "Error bars of a difference are those of independent measurements. Where both runs scored the same "
        "images or drew the same noise, they are conservative: the true ones are narrower.",
        Picture([control], [chart], keys),
        [_table(common)],
    )


def _bars(half: pd.Series, colour: str) -> dict[str, Any]:
    return {"array": half.tolist(), "color": colour.partition("/")[0] + "/.3", "thickness": 1, "width": 0}


def _table(common: pd.DataFrame) -> Table:
    """Create the table of values: different ones first, in descending order of standard errors apart."""
    far = (common["difference"].abs() / (common["half"] / Z95)).fillna(0)
    shown = common.assign(far=far).sort_values(["apart", "far"], ascending=False, kind="stable").head(_SHOWN)
    rows, chosen = [], []
    for row in shown.to_dict("records"):
        scale, form, unit = _SCALE[row["value"]]
        verdict = (
            Cell("differs, also corrected", 3, "bad")
            if row["corrected"]
            else Cell("differs", 2, "bad")
            if row["apart"]
            else Cell("within error bars", 1)
            if row["known"]
            else Cell("no standard error", 0, "wide")
        )
        layer = "" if pd.isna(row["layer"]) else str(row["layer"])
        change = row["difference"]
        rows.append(
            [
                Cell(str(row["model"])),
                Cell(str(row["dataset"])),
                Cell(f"{row['study']}, {row['value']} ({unit})"),
                number(row["alpha"], "g"),
                number(row["a"], form[1:], scale),
                number(row["b"], form[1:], scale),
                interval(change, change - row["half"], change + row["half"], form, scale),
                verdict,
                number(row["n_a"], ",.0f"),
                number(row["n_b"], ",.0f"),
                Cell(layer, None, "code"),
            ]
        )
        chosen.append({"what": f"{row['study']}, {row['value']}"})
    more = f", the {_SHOWN} furthest apart of {len(common):,}" if len(common) > _SHOWN else ""
    return Table(
        f"Both runs side by side{more}",
        signed("model|data set|what|α|A|B|B − A [95 %]|verdict|n of A|n of B|layer").split("|"),
        rows,
        chosen,
    )
