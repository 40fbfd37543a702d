"""The path with a coefficient for each layer: LiNeS, tables, stragglers or flat layers held at zero-shot."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .. import settings
from ..common.fields import Group, option
from ..common.numeric import as_float, whole
from ..names import CRITERIA, Criterion
from ..path.coefficients import Entries, Table, lines, read_table, spread
from .prune import DECIDED_BY
from .study import Study, Task

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from ..common.fields import Tree
    from ..names import Names
    from ..report.shown import Finding, Section
    from ..studies.facts import Facts
    from .study import Chosen, Request


SEARCHED = "greedy search"
"""Name of the table that a search finds."""


def _slope(text: str) -> float | str:
    if text != "none" and not 0 < as_float(text) <= 1:
        raise ValueError(f"expected a number above 0, at most 1, or none; got {text}")
    return text if text == "none" else float(text)


def _some(values: Sequence[float | str]) -> tuple[float | str, ...]:
    if "none" in values and len(values) > 1:
        raise ValueError(f"none stands alone; got {' '.join(map(str, values))}")
    return () if "none" in values else settings.once(values)


def _table(text: str) -> tuple[str, Entries]:
    return pathlib.Path(text).stem, read_table(text)


def _tables(tables: Sequence[tuple[str, Entries]]) -> tuple[tuple[str, Entries], ...]:
    settings.once([name for name, _ in tables])
    return tuple(tables)


@dataclass(frozen=True)
class Tables:
    """Settings of the study ``coefficients``: slopes of LiNeS, names and content of files, layers to hold."""

    GROUP: ClassVar = Group("coefficients", place=("settings", "coefficients"))

    slopes: tuple[float, ...] = option(
        (0.5, 1.0),
        "slopes of LiNeS: coefficients from 1 - SLOPE in the first block to 1 in the last (default: 0.5 1); "
        "none: no LiNeS",
        metavar="SLOPE",
        check=_slope,
        many="once",
        whole=_some,
        none="none",
    )
    tables: tuple[tuple[str, Entries], ...] = option(
        (),
        "TOML file with a coefficient for each layer, such as visual.conv1 = 0.0, and rest = 1.0 for all "
        "others; may be repeated",
        name="alpha-table",
        metavar="FILE",
        check=_table,
        many="each",
        whole=_tables,
        named=True,
        own="only the command line may set which tables are measured; leave it out",
    )
    hold: tuple[Criterion, ...] = option(
        ("instability",),
        "layers to hold at zero-shot: stragglers (instability, the default), flat layers (sharpness), none",
        choices=(*CRITERIA, "none"),
        many="once",
        whole=_some,
        none="none",
    )
    hold_draws: int = option(
        3, "random choices of as many other layers (default: 3)", metavar="N", check=whole(0, 1000)
    )

    search: str | None = option(
        None,
        "in-distribution data set on which a coefficient is searched for each layer, one layer after the "
        "other; they are measured on all other data sets",
        metavar="NAME",
    )


def tables_of(own: Tables, layers: Sequence[str]) -> dict[str, Table]:
    """Name -> coefficients: LiNeS, and files."""
    found: dict[str, Table] = {}
    for slope in own.slopes:
        instead = "--slopes none --alpha-table FILE"
        found[f"LiNeS, slope {slope:g}"] = lines(layers, 1 - slope, slope, "argument --slopes", instead)
    for name, entries in own.tables:
        spread(entries, layers, f"argument --alpha-table: {name}: the coefficient", "rest = NUMBER")
        found[f"table {name}"] = dict(entries)
    return found


class Search(Study):
    """A greedy search of coefficients on images in distribution, of which ``coefficients`` makes a table."""

    name = "search"
    help = "the coefficients of lowest loss, layer by layer"
    most = 2
    hidden = True

    def measure(self, task: Task) -> None:
        from .. import studies

        own = task.evaluator.among([str(task.request.of(Tables).search)])
        studies.search_coefficients(task.path, own, model=task.model, only=task.only, sink=task.sink)

    def draw(self, facts: Facts, file: str | os.PathLike[str], models: Names | None) -> None:
        raise ValueError(f"{self.name}: it has no figure")

    def say(self, facts: Facts) -> list[str]:
        return []

    def section(self, facts: Facts) -> Section:
        raise ValueError(f"{self.name}: it has no section")


class Coefficients(Study):
    """Tables of coefficients against the plain path, in and out of distribution (beyond the paper)."""

    name = "coefficients"
    help = "a coefficient for each layer: LiNeS, tables, layers held"
    phase = 2
    options = Tables
    most = 2
    reaches_ends = True
    keeps_images = True
    rows_vary = True  # as many as there are layers to hold
    by_default = False

    def needs(self, tree: Tree) -> list[str]:
        own = tree.of(Tables)
        search = [Search.name] if own.search is not None else []
        return ["interpolation", *search, *(DECIDED_BY[criterion] for criterion in own.hold)]

    def lacks(self, models: int, ood: bool) -> str:
        return "" if ood else "out-of-distribution data"

    def validate(self, request: Request) -> None:
        data, search = request.zoo.data, request.of(Tables).search
        near = [name for name in data if not data[name].ood]
        if search is not None and (search not in near or len(near) < 2):
            raise ValueError(
                "argument --search: expected an in-distribution data set, and at least one other to judge "
                f"the result; got {search}, and in distribution are {', '.join(near) or 'none'}"
            )
        if not near:
            raise ValueError(
                "coefficients: this study chooses alpha on in-distribution data, of which there are none; "
                "add some (--id-data), or leave coefficients out"
            )

    def fits(self, request: Request, layers: Sequence[str]) -> None:
        tables_of(request.of(Tables), layers)

    def choose(self, facts: Facts, model: str) -> Chosen:
        hold = facts.of(Tables).hold
        picked: dict[str, list[str]] = {criterion: facts.picked(criterion, model) for criterion in hold}
        found = facts.part(Search.name).query("model == @model")
        picked[Search.name] = [*(found["layer"] + "=" + found["coefficients"])]
        return {criterion: layers for criterion, layers in picked.items() if layers}

    def guess(self, request: Request, layers: Sequence[str], model: str) -> Chosen:
        own = request.of(Tables)
        searched = {Search.name: [f"{layer}=0" for layer in layers]} if own.search is not None else {}
        return {criterion: list(layers[:1]) for criterion in own.hold} | searched

    def assumptions(self, request: Request) -> Iterator[str]:
        if request.of(Tables).hold:
            yield "Coefficients: assuming that each model has layers to hold; otherwise it costs less."

    def measure(self, task: Task) -> None:
        from .. import studies
        from ..studies.pruning import kind
        from .known import ByAlpha

        own, along = task.request.of(Tables), task.request.of(settings.Along)
        chosen = dict(task.chosen or {})
        pairs = [pair.rpartition("=") for pair in chosen.pop(Search.name, ())]
        searched = {SEARCHED: {layer: float(value) for layer, _, value in pairs}} if pairs else {}
        judging = [data.name for data in task.evaluator.datasets if data.name != own.search]
        studies.coefficients(
            task.path,
            task.evaluator.among(judging),
            along.alphas,
            tables_of(own, task.path.layers) | searched,
            {f"{kind(criterion)} held": layers for criterion, layers in chosen.items()},
            seeds=range(along.seed, along.seed + own.hold_draws),
            model=task.model,
            plain=ByAlpha(task.zeroshot, task.own),
            only=task.only,
            sink=task.sink,
            images=task.images,
        )

    def draw(self, facts: Facts, file: str | os.PathLike[str], models: Names | None) -> None:
        from .. import figures

        figures.coefficients(facts, file)

    def say(self, facts: Facts) -> list[str]:
        from ..report import coefficients

        return coefficients.lines(facts)

    def findings(self, facts: Facts) -> Iterator[Finding]:
        from ..report import coefficients

        return coefficients.findings(facts)

    def section(self, facts: Facts) -> Section:
        from ..report import coefficients

        return coefficients.section(facts)
