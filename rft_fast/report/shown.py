"""What a study shows: findings and a section of the page. ``Shown`` is a study as the report sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from ..common.words import first_line
from ..studies.facts import Facts
from .drawing import Picture
from .tables import Table


class Rank(IntEnum):
    """What a finding is about, the most important first: findings stand in this order."""

    FAILED = 0
    CHANCE = 1
    GAIN = 2
    NO_GAIN = 3
    CLAIM = 4
    STRAGGLERS = 5
    SHARPNESS = 6
    PRUNING = 7
    CORRELATION = 8
    BUMP = 9
    ID_ALPHA = 10
    LAYER_SHARPNESS = 11
    OTHER = 12


@dataclass(frozen=True)
class Finding:
    """One sentence on a result.

    Attributes:
        text: the sentence; names in it are not escaped.
        study: name of the study that it results from.
        rank: what it is about, which decides on its place.
    """

    text: str
    study: str
    rank: Rank = Rank.OTHER


@dataclass(frozen=True)
class Look:
    """Something to look at first.

    Attributes:
        section: name of the section.
        title: text of the link to it.
        text: what is seen there, in a sentence.
        choose: key of a control of the section -> the value to choose.
    """

    section: str
    title: str
    text: str
    choose: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Download:
    """A CSV file within the page.

    Attributes:
        name: name of the file.
        text: text of the button.
        parts: the files of sections of which it is made, one after another; their first lines are the same.
    """

    name: str
    text: str
    parts: Sequence[str]


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
        study: name of the study that it shows.
        files: name -> text of a CSV file.
        downloads: buttons that save such files.
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
    study: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    downloads: Sequence[Download] = ()

    @property
    def searched(self) -> bool:
        """Whether layers can be searched for."""
        return any("names" in chart.layout.get("meta", {}) for chart in self.picture.charts)


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


class Attempts:
    """Catches the errors of single studies, so that the others are shown.

    Attributes:
        failed: name of a study -> its first error, in one line.
    """

    def __init__(self) -> None:
        self.failed: dict[str, str] = {}

    @contextmanager
    def at(self, study: str) -> Iterator[None]:
        """Record an error of the block as one of this study, and go on after it.

        Raises:
            OSError, MemoryError: the block raised it; no single study is the reason.
        """
        try:
            yield
        except (OSError, MemoryError):
            raise
        except Exception as error:  # of any kind: it must not hide the other studies
            self.failed.setdefault(study, f"{type(error).__name__}: {first_line(error)}")
