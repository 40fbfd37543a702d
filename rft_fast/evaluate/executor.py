"""Executors: what carries out the schedule of evaluators and walks.

:class:`rft_fast.evaluate.Evaluator` and its walks decide which stages run on which images, when activations
are held, and how variants share batches. :class:`rft_fast.evaluate.computing.Computing` computes it;
:class:`rft_fast.run.cost.Counting` counts it. So the cost of a study is counted by the code that schedules
it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from .feed import Images
from .flipped import Flipped
from .flipping import Perturb, Record
from .flow import Flow
from .scores import Scores


class Results(Protocol):
    """Scores of several variants of the weights."""

    def judge(self, flows: Sequence[Flow], text: Flow | None, first: int) -> None:
        """Run flows to the end of their chains and score them with the present weights.

        Args:
            flows: One for each data set, all with the same number of copies; they stay at their positions.
            text: The prompts whose features make the head; None: the head is fixed.
            first: Number of the variant of the first copy.
        """

    def blend(
        self,
        flows: Sequence[Flow],
        text: Flow | None,
        write: Callable[[int], object],
        shares: Sequence[float],
    ) -> None:
        """Score weighted means of the logits of two models; variant k has ``shares[k]`` of the second one.

        Args:
            flows, text: As for :meth:`judge`.
            write: write(0) and write(1) write the weights of the two models.
            shares: One for each variant, in [0, 1].
        """

    def scores(self) -> list[dict[str, Scores]]:
        """Return, for each variant, data set name -> scores, on the CPU."""


class Executor(Protocol):
    """Carries out a schedule."""

    def advance(self, flows: Sequence[Flow], stage: int) -> None:
        """Run flows to before a later stage and hold their activations there.

        Raises:
            MemoryError: They do not fit. The flows must restart then.
        """

    def fill(self, flows: Sequence[Flow], place: int, sources: Sequence[Flow]) -> None:
        """Run ``sources`` to the positions of ``flows``, and hold the activations there as copy number
        ``place``.

        The sources stay at their positions.

        Raises:
            MemoryError: The activations do not fit.
        """

    def results(self, feeds: Sequence[Images], count: int) -> Results:
        """Return room for the scores of ``count`` variants."""

    def holding(self, images: int) -> None:
        """Note that activations of so many images are held at once, or would be with more variants."""

    def gradient(self, feeds: Sequence[Images], weights: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """Compute as :meth:`rft_fast.evaluate.Evaluator.gradient`."""

    def curvature(
        self, feeds: Sequence[Images], weights: Sequence[Tensor], directions: Sequence[Tensor]
    ) -> Tensor:
        """Compute as :meth:`rft_fast.evaluate.Evaluator.curvature`."""

    def flipped(
        self,
        flow: Flow,
        text: Flow | None,
        weights: Sequence[Flipped],
        end: int,
        perturb: Perturb,
        count: int,
        record: Record | None,
    ) -> list[tuple[Scores, Tensor]]:
        """As :meth:`rft_fast.evaluate.Walk.flipped`; ``text``: what makes the head; ``end``: the
        stage after the last with weights.
        """

    def record(self, flow: Flow, text: Flow | None, weights: Sequence[Flipped], end: int) -> Record:
        """As :meth:`rft_fast.evaluate.Walk.record`, with the arguments of :meth:`flipped`."""

    def recorded(self, flow: Flow, weights: Sequence[Flipped], end: int) -> int:
        """Return the bytes that :meth:`record` holds of one image; 0 where nothing is computed."""

    def warn(self, text: str) -> None:
        """Issue a UserWarning on behalf of the caller of a walk."""
