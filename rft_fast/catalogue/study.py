"""``Study``: what a run has to know of a study, from its name to its section of the report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar

from .. import settings
from ..names import Names

if TYPE_CHECKING:  # the command line is read before torch and pandas are imported
    import os
    from collections.abc import MutableMapping

    import pandas as pd

    from ..common.fields import Tree
    from ..evaluate import Evaluator, Scores
    from ..path import Path
    from ..report.shown import Finding, Section
    from ..studies.facts import Facts
    from ..studies.images import Kept
    from ..studies.others import Others
    from ..studies.rows import Sink

Images = Literal["all images", "images of layers and prune", "images of sharpness"]
"""Which images a study scores. Runs on disk keep scores under these names."""

Chosen: TypeAlias = Mapping[str, Names]
"""What a study takes because of earlier rows: what the rows call the choice -> names of layers or of models,
or numbers as text."""

_Settings = TypeVar("_Settings")


class Data(Protocol):
    """What a study needs to know of a data set."""

    @property
    def ood(self) -> bool:
        """Whether it is out of distribution."""


class Zoo(Protocol):
    """What a study needs to know of models."""

    @property
    def finetuned(self) -> Mapping[str, object]:
        """Fine-tuned models by name."""

    @property
    def data(self) -> Mapping[str, Data]:
        """Data sets by name."""

    @property
    def own_heads(self) -> bool:
        """Whether each model has a zero-shot end of its own, for it keeps its own head."""


class Request(Protocol):
    """What a study needs to know of a request (:class:`rft_fast.config.request.Request`)."""

    @property
    def studies(self) -> Sequence[str]:
        """Names of the requested studies, without those that they need."""

    @property
    def zoo(self) -> Zoo:
        """The models."""

    def of(self, kind: type[_Settings]) -> _Settings:
        """The settings of a class."""


@dataclass(frozen=True)
class Task:
    """The measurements of one study of one model that are to be made.

    Attributes:
        request: the whole request.
        path: the live model between its two ends.
        evaluator: scores that live model on the images of the study.
        model: name of the fine-tuned model.
        chosen: layers that :meth:`Study.choose` picked; None where the study picks none.
        zeroshot: (data set, 0.0) -> scores at alpha = 0, shared by all models that start there. The study
            adds what it needs.
        own: (data set, alpha) -> scores of this model that several measurements need, likewise.
        kept: what the study keeps between measurements in this process, for all models that share
            ``zeroshot``.
        others: the fine-tuned models of the request, for a study that combines them (:attr:`Study.combines`).
        only: numbers of the measurements to make; None: all.
        sink: called with each measurement's number and rows as soon as it is made.
        images: receives the results of single images of each measurement before the sink is called, from a
            study that keeps them (:attr:`Study.keeps_images`); None: they are not kept.
    """

    request: Request
    path: Path
    evaluator: Evaluator
    model: str
    chosen: Chosen | None
    zeroshot: MutableMapping[tuple[str, float], Scores]
    own: MutableMapping[tuple[str, float], Scores]
    kept: MutableMapping[Any, Any]
    others: Others
    only: Collection[int] | None
    sink: Sink | None
    images: Kept | None = None


class Study(ABC):
    """One study. A subclass says what is special about it; :mod:`rft_fast.catalogue` lists an instance.

    Methods that need torch, pandas or matplotlib import them when they run: a command reads its arguments
    before it loads anything large.
    """

    name: str
    """On the command line, in rows, and of its files."""
    help: str
    """What it measures, in some ten words, for ``--help``."""
    phase: int = 1
    """Studies of a phase run side by side, once all of the phases before are done. The path is phase 0."""
    images: Images = "all images"
    options: type | None = None
    """A settings class of its own, whose fields are options of the sweep (:mod:`rft_fast.common.fields`)."""
    measures: bool = True
    """False: it is made of the rows of other studies."""
    most: int | None = None
    """Models that it takes, those of highest and lowest gain; None: all."""
    zeroshot_first: bool = False
    """Its measurements at alpha = 0 of the first model come before all others, which compare with them."""
    same_at_zeroshot: bool = False
    """At alpha = 0 its rows are the same for all models that start there."""
    skips_unchanged: bool = False
    """Layers that are the same at both ends are not measured."""
    reaches_ends: bool = False
    """Each of its curves has alpha = 0 and alpha = 1."""
    pooled: bool = False
    """Its figure is about all models together: a choice of models does not apply to it."""
    rows_vary: bool = False
    """Models have different numbers of rows."""
    keeps_images: bool = False
    """It fills :attr:`Task.images`."""
    combines: bool = False
    """Its measurements of a model read other models of the request, too."""
    averages: bool = False
    """It averages the models of the request, whose integer tensors must be equal."""
    by_default: bool = True
    """A sweep for which no study is named makes it: the studies of the paper."""
    hidden: bool = False
    """Others need it, and nobody names it: it has no figure, section or words of its own."""
    rounds: int = 1
    """If above 1, its measurements of all models are made number by number, each chosen by the rows of those
    before."""

    # --- before it runs -----------------------------------------------------------------------------------

    def needs(self, tree: Tree) -> Collection[str]:
        """Names of the studies whose rows it, its figure or its choice of models needs.

        Args:
            tree: the settings of the request.
        """
        return ("interpolation",)

    def lacks(self, models: int, ood: bool) -> str:
        """What it needs and a request does not have, in words; empty if nothing.

        Args:
            models: how many fine-tuned models are studied.
            ood: whether there is out-of-distribution data.
        """
        return ""

    def validate(self, request: Request) -> None:  # noqa: B027 (may be left as it is)
        """Raises ValueError where the settings of a request do not allow its measurements."""

    def fits(self, request: Request, layers: Sequence[str]) -> None:  # noqa: B027 (may be left as it is)
        """Raises ValueError where the settings of a request do not fit the layers of one of its models."""

    def models(self, request: Request) -> int:
        """How many models it takes."""
        everyone = len(request.zoo.finetuned)
        most = self.most_models(request)
        if most is None:
            return everyone
        return min(everyone, most if (named := request.of(settings.Layers).models) is None else len(named))

    def most_models(self, request: Request) -> int | None:
        """:attr:`most`, where the request has a say in it."""
        return self.most

    def choose(self, facts: Facts, model: str) -> Chosen | None:
        """The layers of a model that it takes by the rows of earlier phases; None: it does not choose."""
        return None

    def guess(self, request: Request, layers: Sequence[str], model: str) -> Chosen | None:
        """What to estimate costs with before :meth:`choose` can tell; models are the first of the request.

        Args:
            request: the request.
            layers: those of the model.
            model: its name.
        """
        return None

    def images_at_once(self, request: Request, images: int) -> int:
        """Images that are scored between two writes of the weights, out of so many of a data set."""
        return images

    def notices(self, facts: Facts) -> Iterator[str]:
        """What a run says once all rounds are done."""
        return iter(())

    def assumptions(self, request: Request) -> Iterator[str]:
        """What ``--plan`` takes for granted, as sentences."""
        return iter(())

    # --- what it measures ---------------------------------------------------------------------------------

    def measure(self, task: Task) -> None:
        """Makes the measurements of a task.

        Raises:
            ValueError: it is made of rows.
        """
        raise ValueError(f"{self.name}: it is made of the rows of other studies; it measures nothing")

    # --- what came of it ----------------------------------------------------------------------------------

    def done(self, facts: Facts) -> bool:
        """Whether a run has anything of it to show."""
        return not facts.part(self.name).empty

    def check(self, facts: Facts) -> None:  # noqa: B027 (may be left as it is)
        """Raises ValueError, with the reason, where the rows of a run do not allow its analysis."""

    def table(self, facts: Facts) -> pd.DataFrame | None:
        """What stands in ``<name>.csv`` beside the rows; None: no such file."""
        return None

    @abstractmethod
    def draw(self, facts: Facts, file: str | os.PathLike[str], models: Names | None) -> None:
        """Draws its figure. models: names of models to show; None: the study's own choice."""

    @abstractmethod
    def say(self, facts: Facts) -> list[str]:
        """Its part of the summary, as lines for a terminal."""

    def say_missing(self, facts: Facts) -> list[str]:
        """Its part of the summary where it was left out of a run of all studies."""
        return []

    def findings(self, facts: Facts) -> Iterator[Finding]:
        """What it found, as sentences."""
        return iter(())

    @abstractmethod
    def section(self, facts: Facts) -> Section:
        """Its section of the report."""
