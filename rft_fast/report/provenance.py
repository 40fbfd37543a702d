"""What was run: the settings, models, images and cost of a run, and a few numbers for the top of the page."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import pandas as pd

from ..common.words import duration, flat, many
from ..config.recorded import shown_as, value_as
from . import tables
from .runs import RunRead
from .shown import Section
from .tables import Cell, Table


def provenance(run: RunRead) -> Section:
    """Create the section on versions, settings and hashes, from ``config.json``."""
    config = run.config
    device = config.get("device_name") or config["settings"]["computed"]["device"] or ""
    machine = f"{device}, {config.get('platform', '')}"
    plain = {
        "date": config["date"],
        "machine": machine,
        "versions": ", ".join(f"{name} {value}" for name, value in config["versions"].items()),
        "architecture": config["arch"],
    }
    tabled = {
        "command",
        "zoo",
        "arch",
        "zeroshot",
        "finetuned",
        "data",
        "device_name",
        "run",
        "platform",
        *plain,
    }
    settings = plain | {
        shown_as(names): in_line(value_as(names, value))
        for outer, entry in config.items()
        if outer not in tabled
        for names, value in (flat({outer: entry}) if outer == "settings" else [((outer,), entry)])
    }
    models = [("zero-shot", config["zeroshot"]), *config["finetuned"].items()]
    shown = [
        Table(
            "Settings",
            ["setting", "value"],
            [[Cell(a), Cell(str(b), None, "code")] for a, b in settings.items()],
        ),
        Table(
            "Models",
            ["model", "file", "SHA-256"],
            [[Cell(name), *(_code(fact, key) for key in ("path", "sha256"))] for name, fact in models],
        ),
        Table(
            "Images",
            ["data set", "distribution", "n", "file", "SHA-256 of images and labels"],
            [
                [
                    Cell(name),
                    Cell("out of distribution" if fact.get("ood") else "in distribution"),
                    tables.number(fact.get("samples"), ",.0f"),
                    _code(fact, "path"),
                    _code(fact, next((key for key in fact if key.startswith("sha256")), "sha256")),
                ]
                for name, fact in config["data"].items()
            ],
        ),
    ]
    if run.costs is not None:
        shown.append(_cost(run.costs))
    return Section(
        "run",
        "config.json",
        "What was run",
        "All that is needed to repeat the run: its settings, the machine, and a hash of every input.",
        tables=shown,
    )


def _code(fact: Mapping[str, Any], key: str) -> Cell:
    return Cell(str(fact.get(key, "–")), None, "code")


def in_line(value: Any) -> str:
    """Format a value of ``config.json`` in one line."""
    if isinstance(value, dict):
        entries = (f"{name}: {in_line(inner)}" for name, inner in value.items() if inner is not None)
        return "; ".join(entries) or "–"
    if isinstance(value, list):
        return ", ".join(map(in_line, value)) or "–"
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cost(costs: pd.DataFrame) -> Table:
    rows = [
        [
            Cell(str(cost["study"])),
            tables.number(cost["models"], ".0f"),
            Cell(duration(cost["seconds"]), cost["seconds"]),
            tables.number(cost["peak_memory"] / 2**30, ".1f"),
        ]
        for cost in costs.to_dict("records")
    ]
    return Table("Cost", ["study", "models", "time", "peak memory, GiB"], rows)


def title(run: RunRead) -> str:
    """The name of the zoo; of checkpoints without one, what they are: no name of a file."""
    config = run.config
    arch, count = str(config["arch"]), len(config["finetuned"])
    if config["zoo"] != pathlib.Path(arch).stem:
        return str(config["zoo"])
    return many(count, "fine-tuned model") + ("" if arch.endswith(".json") else f" of {arch}")


def tiles(run: RunRead) -> list[tuple[str, str]]:
    """Return the numbers at the top of the page, each with a caption."""
    path = run.facts.path
    far = path[path["ood"]]
    images = path.drop_duplicates("dataset")["samples"].sum()
    shown = [
        (f"{path['model'].nunique()}", "fine-tuned models"),
        (f"{path['dataset'].nunique()}", f"image sets, {far['dataset'].nunique()} out of distribution"),
        (f"{images:,}", "images scored at every position"),
        (f"{run.count:,}", "measurements"),
    ]
    if len(far):
        clear = far["gain_shown"] > 0
        shown.append((f"{clear.sum()} of {len(far)}", "paths with a gain (bounds for all α at once)"))
    return shown
