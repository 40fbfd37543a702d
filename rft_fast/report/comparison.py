"""The comparison of two runs: their settings, and the measurements that both made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from ..common.words import flat, many, signed, some
from ..config.recorded import shown_as, value_as
from ..studies.coefficients import STUDY as COEFFICIENTS
from ..studies.interpolate import Z95
from ..studies.rows import asked
from .charts import points
from .drawing import Chart, Key, Picture, choices, layout, line, rule, safe
from .files import with_matched
from .matching import matched, other_tables, paired, without
from .provenance import in_line, title
from .runs import RunRead
from .shown import Section
from .tables import Cell, Table, interval, number

_SCALE = {
    "accuracy": (100.0, "+.1f", "points"),
    "loss": (1.0, "+.3f", "nats"),
    "sharpness": (1.0, "+.3g", "nats"),
}
_UNIT = {"points": "%"}  # of a value, where that of its difference is another
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
    tables = other_tables(first, second)
    common = matched(
        without(first.facts.rows, tables), without(second.facts.rows, tables), paired(first, second)
    )
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
        f"{study}: {_differ(int(row['sum']), int(row['size']))}, by the 95 % interval of the difference."
        for study, row in by_study.iterrows()
    ]
    chance = 0.05 * common["known"].sum()
    findings.append(
        f"All studies together: {_differ(int(apart.sum()), len(common))}. If the runs measured the same and "
        f"the values were independent, about {chance:,.0f} would differ by chance. After correction for all "
        f"comparisons (Bonferroni), {_differ(int(corrected.sum()), len(common))}."
    )
    findings.append(_pairing(common))
    titles = [title(first), title(second)]
    return {
        "title": f"Two runs: {titles[0]}"
        if titles[0] == titles[1]
        else f"{titles[0]} (A) and {titles[1]} (B)",
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
        "parts": [_configuration(settings), with_matched(_measurements(common), common)],
        "models": 2,
        "names": first.facts.names | second.facts.names,
    }


def _differ(count: int, total: int) -> str:
    of = f"of {total:,} values"
    return many(f"{count:,}", f"{of} differs", f"{of} differ")


def _pairing(common: pd.DataFrame) -> str:
    """Say how many differences are paired over images."""
    count = int(common["paired"].sum())
    of = f"of {len(common):,} differences"
    start = (
        f"{many(f'{count:,}', f'{of} is', f'{of} are')} paired: both runs scored the same images, and kept "
        "the result of each."
        if count
        else "No difference is paired: the runs did not score the same images, or did not keep the result "
        "of each."
    )
    if count == len(common):
        return start
    return (
        f"{start} The intervals of all others are those of independent measurements; where the runs share "
        "images or noise, they are usually too wide."
    )


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
    if names := sorted({name for _, name in other_tables(first, second)}):
        yield f"Not compared, as its coefficients differ between A and B: {some(names)}."
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


def _layer(row: Mapping[Any, Any]) -> str:
    """Name what was moved, held or perturbed, after its table of coefficients; empty for all layers."""
    layer = "" if pd.isna(row["layer"]) else str(row["layer"])
    if row["study"] == COEFFICIENTS and pd.notna(row["coefficients"]):
        return ": ".join(part for part in (str(row["coefficients"]), layer) if part)
    if pd.notna(row["partners"]):
        return f"to {row['partners']}" if pd.isna(row["method"]) else str(row["method"])
    return layer if pd.isna(row["cumulative"]) else f"{layer} ({row['cumulative']})"


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
                + (f"{safe(layer)}<br>" if (layer := _layer(row)) else "")
                + signed(f"A {scale * row['a']:{form[1:]}}, B {scale * row['b']:{form[1:]}}")
                + f" {_UNIT.get(unit, unit)}<br>B − A {points(row['difference'], row['half'], scale, form)} "
                f"{unit} (95 %, {'paired' if row['paired'] else 'independent'})"
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
        "The chart has the interval of each value. The table has that of their difference, and whether it is "
        "paired.",
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
        change = row["difference"]
        rows.append(
            [
                Cell(str(row["model"])),
                Cell(str(row["dataset"])),
                Cell(f"{row['study']}, {row['value']} ({_UNIT.get(unit, unit)})"),
                number(row["alpha"], "g"),
                number(row["a"], form[1:], scale),
                number(row["b"], form[1:], scale),
                interval(change, change - row["half"], change + row["half"], form, scale),
                verdict,
                Cell("paired" if row["paired"] else "independent" if row["known"] else "–"),
                number(row["n_a"], ",.0f"),
                number(row["n_b"], ",.0f"),
                Cell(_layer(row), None, "code"),
            ]
        )
        chosen.append({"what": f"{row['study']}, {row['value']}"})
    more = f", the {_SHOWN} furthest apart of {len(common):,}" if len(common) > _SHOWN else ""
    return Table(
        f"Both runs side by side{more}",
        signed("model|data set|what|α|A|B|B − A [95 %]|verdict|interval|n of A|n of B|layer").split("|"),
        rows,
        chosen,
    )
