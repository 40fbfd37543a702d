"""What a study shows: findings and a section of the page. ``Shown`` is a study as the report sees it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from ..studies.facts import Facts
from .drawing import Picture
from .tables import Table


@dataclass(frozen=True)
class Finding:
    """One or two sentences on a result.

    Attributes:
        text: the sentences; names in them are not escaped.
        study: name of the study that it results from.
        dataset: name of the data set that it is about; None: several.
        model: name of the model that it is about; None: several.
        paper: whether it states the paper's result, for comparison.
    """

    text: str
    study: str
    dataset: str | None = None
    model: str | None = None
    paper: bool = False


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
        caption: caption of the figure in the run's folder.
    """

    name: str
    above: str
    title: str
    lead: str
    picture: Picture = field(default_factory=Picture)
    tables: list[Table] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    printed: str = ""
    caption: str = ""


class Shown(Protocol):
    """A study, as far as summary and page need it (:class:`rft_fast.catalogue.Study`)."""

    name: str

    def done(self, facts: Facts) -> bool:
        """Whether a run has anything of it to show."""

    def say(self, facts: Facts) -> list[str]:
        """Its part of the summary, as lines for a terminal."""

    def say_missing(self, facts: Facts) -> list[str]:
        """Its part of the summary where it was left out of a run of all studies."""

    def findings(self, facts: Facts) -> Iterator[Finding]:
        """What it found, as sentences."""

    def section(self, facts: Facts) -> Section:
        """Its section of the page."""
