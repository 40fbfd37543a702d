"""``Walk``: data sets on their way through the stages of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .executor import Executor
from .feed import Images, Prompts, total
from .flipped import Flipped
from .flipping import Perturb, Record
from .flow import Flow
from .runtime import Runtime
from .scores import Scores


class Walk:
    """Data sets on their way through the stages of a model, so that earlier stages need not run again.

    Made by :meth:`Evaluator.walk`. Holds the activations of all images of the evaluator before one stage.
    Scores do not depend on the station where they start, as long as the weights of the stages before it are
    unchanged.

    A station is a position where the walk can stand. Without a text tower, station i is before image stage i.
    With a text tower of T stages, station 0 is before everything; 1 to T are before the text stages, with
    image features held; the next ones are before the image stages, with text features held; the last one is
    before the logits, with both held.

    The walk decides which stages run on which images, and what is held; its executor does it.

    Attributes:
        stage: The present station.
        feeds: The data sets.
        flows: The activations of each data set.
        text: The activations of the prompts; None if the head is fixed.
    """

    feeds: list[Images]
    flows: list[Flow]
    text: Flow | None

    def __init__(self, runtime: Runtime, feeds: Sequence[Images], executor: Executor, room: int) -> None:
        self.stage = 0
        self.feeds = list(feeds)
        self._runtime, self._executor = runtime, executor
        self._room = room  # images that may be held
        chains = runtime.stages
        self.flows = [Flow(chains.image, feed) for feed in feeds]
        self.text = None
        if chains.text and chains.prompts is not None:
            self.text = Flow(chains.text, Prompts(chains.prompts))

    def advance(self, stage: int) -> None:
        """Move on to a later station, with the present weights.

        After an error the walk is at its old station, but holds nothing: it computes earlier stages again
        when needed.

        Args:
            stage: The station.

        Raises:
            ValueError: The station is behind: a walk does not turn back.
            MemoryError: The activations do not fit.
        """
        if not self.stage <= stage < self._runtime.stations:
            raise ValueError(
                f"Walk.advance: expected a stage from {self.stage} to {self._runtime.stations - 1}, "
                f"got {stage}"
            )
        if stage == self.stage:
            return
        try:
            self._advance(stage)
        except BaseException:
            # Activations are replaced in place: some belong to the new stage now, others do not.
            for flow in [*self.flows, *([self.text] if self.text is not None else [])]:
                flow.restart()
            raise
        self.stage = stage
        self._executor.holding(total(self.feeds))

    def _advance(self, stage: int) -> None:
        if self.text is None:
            self._executor.advance(self.flows, stage)
            return
        text = len(self.text.stages)
        if stage <= text:
            self._executor.advance(self.flows, len(self._runtime.stages.image))
            if self._runtime.holds_prompts:
                self._executor.advance([self.text], stage - 1)
            else:
                self._executor.warn(
                    f"Evaluator: activations of {len(self.text)} prompts do not fit in memory; the "
                    "text tower runs from its beginning for every score"
                )
        else:
            self._executor.advance([self.text], text)
            if self.stage <= text and stage < self._runtime.stations - 1:
                for flow in self.flows:  # back to the images: their features cannot be used here
                    flow.restart()
            self._executor.advance(self.flows, stage - text - 1)

    def scores(self) -> dict[str, Scores]:
        """Score the model with its present weights, as :meth:`Evaluator.scores`, from this station on."""
        return self.variants(lambda _: None, 1, self._runtime.stations - 1)[0]

    def variants(self, write: Callable[[int], object], count: int, last: int) -> list[dict[str, Scores]]:
        """Score several variants of the weights of the stations from the present one to ``last``.

        If a variant does not fill a batch, the stages after ``last`` run once for several variants, with the
        weights that the last of them has written. Results are copied to the CPU at the end.

        Args:
            write: write(k) writes the weights of variant k, for k = 0 ... count - 1, and changes nothing
                else.
            count: Number of variants.
            last: The last station whose weights differ.

        Returns:
            For each variant: data set name -> per-image losses and hits.

        Raises:
            ValueError: ``last`` is behind or no station; or the walk is at a text station, and ``last`` is in
                the image tower, whose features are held.
        """
        stations, text = self._runtime.stations, len(self._runtime.stages.text)
        if not self.stage <= last < stations or 0 < self.stage <= text < last < stations - 1:
            among = f" or {stations - 1}" if 0 < self.stage <= text else ""
            raise ValueError(
                f"Walk.variants: expected a last station from {self.stage} to "
                f"{text if among else stations - 1}{among}, got {last}"
            )
        results = self._executor.results(self.feeds, count)
        end = self._end(last)
        group = 1 if end is None else self._group()
        for first in range(0, count, group):
            variants = range(first, min(count, first + group))
            if end is None or len(variants) == 1:
                for k in variants:
                    write(k)
                    results.judge(self.flows, self.text, k)
                continue
            together = [Flow(flow.stages, flow.source, end, len(variants)) for flow in self.flows]
            for place, k in enumerate(variants):
                write(k)
                self._executor.fill(together, place, self.flows)
            results.judge(together, self.text, first)
        if group > 1 and count > 1:
            self._executor.holding((1 + group) * total(self.feeds))
        return results.scores()

    def blend(self, write: Callable[[int], object], shares: Sequence[float]) -> list[dict[str, Scores]]:
        """Score weighted means of the logits of two models (an ensemble), each of which runs once.

        The logits of the first model are held for all images, in float32.

        Args:
            write: write(0) and write(1) write the weights of the two models, which differ in stations from
                the present one on alone.
            shares: Shares of the second model, in [0, 1]; 0 and 1 have the bits of one model alone.

        Returns:
            For each share: data set name -> per-image losses and hits.
        """
        results = self._executor.results(self.feeds, len(shares))
        results.blend(self.flows, self.text, write, shares)
        return results.scores()

    def flipped(
        self,
        weights: Sequence[Flipped],
        last: int,
        perturb: Perturb,
        count: int,
        record: Record | None,
    ) -> list[tuple[Scores, Tensor]]:
        """Scores with perturbations of its own for each image, of a walk of one data set.

        Args:
            weights: those that are perturbed, read by the stations from the present one to ``last`` alone.
            perturb: returns perturbation k, for k = 0 ... count - 1, of these weights, whose layouts are
                known then. It is called for one at a time, and again where not all images are held at once.
            record: for the control variate, what :meth:`record` returned for these weights, or for more of
                them at this station or an earlier one; None: no control variate.

        Returns:
            For each perturbation the scores, and of each image <gradient of its loss, its perturbation>
            (float64 [n] on the CPU; zeros without control).

        Raises:
            NoRule: the weights cannot differ between images (:mod:`rft_fast.evaluate.flips`).
            MemoryError: a single image does not fit.
        """
        (_, end), (flow,) = self._runtime.image_stages(self.stage, last), self.flows
        return self._executor.flipped(flow, self.text, weights, end, perturb, count, record)

    def record(self, weights: Sequence[Flipped], last: int) -> Record:
        """Return what the control variates of some weights take of the unperturbed model.

        It serves all draws, of each of the weights alone or of several. Takes a forward and a backward pass
        from the present station on, without gradients of weights.

        Args:
            weights: read by the stations from the present one to ``last`` alone.
            last: the last station that reads one of them.

        Raises:
            NoRule: as :meth:`flipped`.
            MemoryError: a single image does not fit.
        """
        (_, end), (flow,) = self._runtime.image_stages(self.stage, last), self.flows
        return self._executor.record(flow, self.text, weights, end)

    def _group(self) -> int:
        """Return how many variants share a batch after the stages in which they differ."""
        images = total(self.feeds)
        enough = self._runtime.images.enough(min(map(len, self.feeds)))
        return max(1, min(enough // images, self._room // images - 1))  # one is held already

    def _end(self, last: int) -> int | None:
        """Return the image stage after station ``last``; None: no stage is left, or the text differs."""
        text = len(self._runtime.stages.text)
        if text and self.stage <= text:
            return None
        end = last - text if text else last + 1
        return end if end < len(self._runtime.stages.image) else None
