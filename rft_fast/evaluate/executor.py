"""The seam between a schedule and what carries it out.

:class:`rft_fast.evaluate.Evaluator` and its walks decide which stages run on which images, when activations
are held and how variants share batches. An executor does it: :class:`rft_fast.evaluate.computing.Computing`
computes; :class:`rft_fast.run.cost.Counting` counts, so that what is counted is what would be computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from .feed import Images
from .flow import Flow
from .scores import Scores


class Results(Protocol):
    """The scores of several variants of the weights, as they come in."""

    def judge(self, flows: Sequence[Flow], text: Flow | None, first: int) -> None:
        """Runs flows to their end and scores them, with the weights as they are now.

        Args:
            flows: one for each data set, all of as many copies; they stay where they are.
            text: the prompts, whose features make the head; None: the head is fixed.
            first: the number of the first copy's variant.
        """

    def scores(self) -> list[dict[str, Scores]]:
        """For each variant: data set name -> scores, on the CPU."""


class Executor(Protocol):
    """Carries out what a schedule decides."""

    def advance(self, flows: Sequence[Flow], stage: int) -> None:
        """Runs flows to before a later stage, and holds there what comes of them.

        Raises MemoryError where it does not fit. The flows are good for nothing then but to restart.
        """

    def fill(self, flows: Sequence[Flow], place: int, sources: Sequence[Flow]) -> None:
        """Runs ``sources`` to where ``flows`` are, which hold what comes of them as copy number ``place``.

        The sources stay where they are. Raises MemoryError where it does not fit.
        """

    def results(self, feeds: Sequence[Images], count: int) -> Results:
        """Room for the scores of so many variants."""

    def holding(self, images: int) -> None:
        """Activations of so many images are held at once, or would be for more variants."""

    def gradient(self, feeds: Sequence[Images], weights: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """As :meth:`rft_fast.evaluate.Evaluator.gradient`."""

    def curvature(
        self, feeds: Sequence[Images], weights: Sequence[Tensor], directions: Sequence[Tensor]
    ) -> Tensor:
        """As :meth:`rft_fast.evaluate.Evaluator.curvature`."""

    def warn(self, text: str) -> None:
        """Warns the caller of a walk of what became of it."""
