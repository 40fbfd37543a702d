"""The sections of a report: text, charts and tables, independent of HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..common.words import duration, flat, some
from ..config.recorded import shown_as
from ..settings import Layers, Prune, Sharpness
from ..studies.facts import ENDS, Facts
from ..studies.verdicts import gains, straggling
from . import charts, layer_charts, tables
from .drawing import Picture
from .phrases import images, span
from .runs import RunRead
from .summary import sections as printed
from .tables import Cell, Table

if TYPE_CHECKING:
    from ..catalogue import Study


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        name: anchor.
        above: small text above the title.
        title: heading.
        lead: first paragraph.
        picture: charts with their controls and legend.
        tables: tables below the charts.
        warnings: sentences on what cannot be concluded.
        printed: the section of the summary.
    """

    name: str
    above: str
    title: str
    lead: str
    picture: Picture = field(default_factory=Picture)
    tables: list[Table] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    printed: str = ""


def studied(facts: Facts, studies: Iterable[Study]) -> list[Section]:
    """Create a section for each study with results, including its summary as the sweep prints it."""
    shown = [study for study in studies if study.done(facts)]
    return [replace(study.section(facts), printed=printed(facts, [study]).strip("\n")) for study in shown]


def path(facts: Facts) -> Section:
    """Create the section on the path (Figure 1)."""
    warnings = []
    for dataset, group in gains(facts.path, facts.rows).groupby("dataset", sort=False):
        here = f"On {dataset} (n = {group['samples'].iloc[0]:,})"
        unclear = list(group.loc[group["verdict"] == "unclear", "model"])
        if unclear:
            warnings.append(
                f"{here} the 95 % interval of the gain includes 0 for {some(unclear, 4)}: too wide to "
                "conclude that the path beats zero-shot."
            )
        possible = list(group.loc[group["verdict"].isin(["not excluded", "unknown"]), "model"])
        if possible:
            warnings.append(
                f"{here} no position beats zero-shot for {some(possible, 4)}, but at some position the "
                "interval reaches above it: a small gain is not excluded."
            )
    return Section(
        "path",
        "Figure 1 · Eq. 1 and 2",
        "The path",
        "Accuracy and loss on the straight line from zero-shot to fine-tuned. Choose one model to see its "
        "pointwise 95 % interval, which is that of the difference to zero-shot, paired over images. The "
        "gain is the best position against zero-shot on the same images, which makes it optimistic.",
        charts.path(facts),
        [tables.path(facts)],
        warnings,
    )


def layers(facts: Facts) -> Section:
    """Create the section on the layer-wise interpolation (Figure 2)."""
    known = facts.stragglers
    unclear = known[[straggling(fact) == "unclear" for fact in known.to_dict("records")]]
    warnings = []
    for (model, dataset), group in unclear.groupby(["model", "dataset"], sort=False):
        warnings.append(
            f"{model} on {dataset}: it cannot be told whether the instability of {len(group)} layers exceeds "
            f"{facts.of(Layers).straggler_margin:g} nats: {some(list(group['layer']), 4)}."
        )
    part = facts.part("layers")
    return Section(
        "layers",
        "Figure 2 · Def. 1.1 and 1.2",
        "Layer by layer",
        f"Each layer on the path alone, the others {ENDS[facts.of(Layers).others]}; {_images(part)}. A "
        "straggler's instability lies above the margin with 95 % confidence, corrected for all layers and "
        "positions (Bonferroni), and its loss above that at α = 0. Bars are pointwise 95 % intervals, not "
        "corrected.",
        layer_charts.interpolation(facts),
        [tables.layers(facts)],
        warnings,
    )


def _images(part: pd.DataFrame) -> str:
    return images(part, "n = {:,} images of {}", "; ")


def _unclear(table: Table, reason: str = "too wide to tell a sign") -> list[str]:
    """Describe how many intervals of a table are too wide to conclude."""
    wide = len(table.wide())
    return [f"{wide} of {len(table.rows)} intervals include 0 or cannot be given: {reason}."] if wide else []


def _drawn(part: pd.DataFrame) -> str:
    count = span(part.loc[part["draws"].fillna(1) > 0, "draws"])
    return f"{count} draws, {_images(part)}"


def sharpness(facts: Facts) -> Section:
    """Create the section on general sharpness (Figure 3)."""
    part = facts.part("sharpness")
    table = tables.sharpness(facts, "sharpness")
    return Section(
        "sharpness",
        "Figure 3 · Eq. 3",
        "Sharpness of all weights",
        f"The mean rise of the loss under noise on every weight; {_drawn(part)}. Bars are pointwise 95 % "
        "intervals: of sharpness over draws (Student's t), of accuracy over images.",
        charts.sharpness(facts),
        [table],
        _unclear(table),
    )


def layer_sharpness(facts: Facts) -> Section:
    """Create the section on layer-wise sharpness (Figure 4)."""
    part = facts.part("layer-sharpness")
    table = tables.sharpness(facts, "layer-sharpness")
    return Section(
        "layer-sharpness",
        "Figure 4 · Sec. 3.1",
        "Sharpness of each layer",
        f"The same for one layer at a time; {_drawn(part)}. A layer is near zero when its 95 % interval lies "
        f"within {facts.of(Sharpness).zero_margin:g} nats at every α above 0. A wide interval is no evidence "
        "of that.",
        layer_charts.sharpness(facts),
        [table],
        _unclear(table),
    )


def prune(facts: Facts) -> Section:
    """Create the section on pruning (Figure 5)."""
    part, own = facts.part("prune"), facts.of(Prune)
    table = tables.prune(facts)
    warnings = [
        f"{row[0].text} on {row[-1].text}, {row[1].text} ({row[2].text}): mean change {row[3].text} points "
        f"over {row[5].text} masks; {row[4].text}."
        for row in table.wide()
    ]
    return Section(
        "prune",
        "Figure 5 · Algorithm 1",
        "Pruning the stragglers",
        f"{100 * own.keep:g} % of the straggler layers' weights kept, "
        f"{own.mask_seeds} masks; {_images(part)}. Bands reach from the lowest to the highest "
        "mask, for the unpruned path it is the pointwise 95 % interval of its difference to zero-shot. The "
        "control prunes as many other layers, at random.",
        charts.prune(facts),
        [table],
        warnings,
    )


def correlation(facts: Facts) -> Section:
    """Create the section on the correlation of sharpness with accuracy and gain."""
    known = facts.correlation
    picture, names = charts.correlation(known)
    table = tables.correlation(known, names)
    models = int(known["models"].max())
    return Section(
        "correlation",
        "The central claim",
        "Does sharpness tell?",
        f"Rank correlation over n = {models} models of sharpness with accuracy or gain out of distribution. "
        "Intervals are pointwise 95 %, approximate for so few models, and not corrected for how many are "
        "shown; stragglers found on the same models make their own line optimistic.",
        picture,
        [table],
        _unclear(table, f"with {models} models they are too wide to conclude"),
    )


# --- what was run -------------------------------------------------------------------------------


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
        shown_as(names): in_line(value)
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
        "Enough to run it again: the request, what it ran on, and the contents of every input by their hash.",
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
    return Table("What it took", ["study", "models", "time", "peak memory, GiB"], rows)


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
        clear = gains(far, run.facts.rows)["verdict"] == "gain"
        shown.append((f"{clear.sum()} of {len(far)}", "paths with a gain whose interval is above 0"))
    return shown
