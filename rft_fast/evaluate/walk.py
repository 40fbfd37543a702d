"""``Walk``: data sets on their way through a model's stages, so that what comes before need not run again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .executor import Executor
from .feed import Images, Prompts, total
from .flow import Flow
from .runtime import Runtime
from .scores import Scores


class Walk:
    """Data sets on their way through a model's stages: what a change late in the model need not redo.

    Made by :meth:`Evaluator.walk`. ``stage`` is the station where it stands: before the image stage of
    that number. With a text tower: 0, everything is still to come; 1 to T, before the text stages, with the
    image features held; then before the image stages, with the text features held; last, before the
    logits, with both. Scores are the same from whatever station they start, as long as the weights of
    the stages that are behind have not changed since. Held are activations of all images of the
    evaluator before the present stage alone.

    It decides which stages run on what, and what is held; its executor does it.
    """

    feeds: list[Images]
    """The data sets."""
    flows: list[Flow]
    """Their images, each where it stands."""
    text: Flow | None
    """The prompts; None where the head is fixed."""

    def __init__(self, runtime: Runtime, feeds: Sequence[Images], executor: Executor, room: int) -> None:
        self.stage = 0
        self.feeds = list(feeds)
        self._runtime, self._executor = runtime, executor
        self._room = room  # images that may be held between stages
        chains = runtime.stages
        self.flows = [Flow(chains.image, feed) for feed in feeds]
        self.text = None
        if chains.text and chains.prompts is not None:
            self.text = Flow(chains.text, Prompts(chains.prompts))

    def advance(self, stage: int) -> None:
        """On to before this station, with the weights as they are now.

        If it fails, the walk stays where it was, but holds nothing any more: it computes what is behind
        again when that is needed.

        Raises ValueError for a station that is behind: a walk does not turn back. MemoryError where
        the activations do not fit.
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
            # Activations are replaced in place: some are those before this stage by now, some are not.
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
                for flow in self.flows:  # back to the images: the whole features are of no use here
                    flow.restart()
            self._executor.advance(self.flows, stage - text - 1)

    def scores(self) -> dict[str, Scores]:
        """As :meth:`Evaluator.scores`, from the present station on."""
        return self.variants(lambda _: None, 1, self._runtime.stations - 1)[0]

    def variants(self, write: Callable[[int], object], count: int, last: int) -> list[dict[str, Scores]]:
        """Scores of several settings of the weights of the stations from the present one to ``last``.

        write(k) makes the weights those of variant k, for k = 0 ... count - 1. It must change nothing else:
        the stages after ``last`` run once for several variants together where a variant does not fill a
        batch, with the weights that the last of them left. The results come to the CPU at the end.

        Raises ValueError for a last station that is behind or none, or, from a text station, for one
        of the image tower, whose features are held.
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

    def _group(self) -> int:
        """How many variants share a batch after the stages in which they differ."""
        images = total(self.feeds)
        enough = self._runtime.images.enough(min(map(len, self.feeds)))
        return max(1, min(enough // images, self._room // images - 1))  # one is held already

    def _end(self, last: int) -> int | None:
        """The image stage after station ``last``; None: no stage is left, or the text differs."""
        text = len(self._runtime.stages.text)
        if text and self.stage <= text:
            return None
        end = last - text if text else last + 1
        return end if end < len(self._runtime.stages.image) else None
