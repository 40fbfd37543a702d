"""``Walk``: data sets on their way through a model's stages, so that what comes before need not run again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from copy import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .feed import Images, Prompts
from .scores import Scores
from .stages import Stage

if TYPE_CHECKING:
    from .evaluator import Evaluator


class Walk:
    """Data sets on their way through a model's stages: what a change late in the model need not redo.

    Made by :meth:`Evaluator.walk`. ``stage`` is the station where it stands: before the image stage of
    that number. With a text tower: 0, everything is still to come; 1 to T, before the text stages, with the
    image features held; then before the image stages, with the text features held; last, before the
    logits, with both. Scores are the same from whatever station they start, as long as the weights of
    the stages that are behind have not changed since. Held are activations of all images of the
    evaluator before the present stage alone.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        self.stage = 0
        self._evaluator = evaluator
        chains = evaluator.stages
        self._flows = [_Flow(evaluator, chains.image, feed) for feed in evaluator._feeds]
        self._text: _Flow | None = None
        if chains.text and chains.prompts is not None:
            self._text = _Flow(evaluator, chains.text, Prompts(chains.prompts))

    def advance(self, stage: int) -> None:
        """On to before this station, with the weights as they are now.

        If it fails, the walk stays where it was, but holds nothing any more: it computes what is behind
        again when that is needed.

        Raises ValueError for a station that is behind: a walk does not turn back. MemoryError where
        the activations do not fit.
        """
        if not self.stage <= stage < self._evaluator.stations:
            raise ValueError(
                f"Walk.advance: expected a stage from {self.stage} to {self._evaluator.stations - 1}, "
                f"got {stage}"
            )
        if stage == self.stage:
            return
        try:
            with self._evaluator._scoring():
                self._advance(stage)
        except BaseException:
            # Activations are replaced in place: some are those before this stage by now, some are not.
            for flow in [*self._flows, *([self._text] if self._text is not None else [])]:
                flow.restart()
            raise
        self.stage = stage

    def _advance(self, stage: int) -> None:
        if self._text is None:
            self._move(stage)
            return
        images, text = len(self._evaluator.stages.image), len(self._evaluator.stages.text)
        if stage <= text:
            self._move(images)
            if self._evaluator._holds_prompts:
                self._text.advance(stage - 1)
            else:
                warnings.warn(
                    f"Evaluator: activations of {len(self._text)} prompts do not fit in memory; the "
                    "text tower runs from its beginning for every score",
                    stacklevel=3,
                )
        else:
            self._text.advance(text)
            if self.stage <= text and stage < self._evaluator.stations - 1:
                for flow in self._flows:  # back to the images: the whole features are of no use here
                    flow.restart()
            self._move(stage - text - 1)

    def _move(self, stage: int) -> None:
        for flow in self._flows:
            flow.advance(stage)

    def scores(self) -> dict[str, Scores]:
        """As :meth:`Evaluator.scores`, from the present station on."""
        return self.variants(lambda _: None, 1, self._evaluator.stations - 1)[0]

    def variants(self, write: Callable[[int], object], count: int, last: int) -> list[dict[str, Scores]]:
        """Scores of several settings of the weights of the stations from the present one to ``last``.

        write(k) makes the weights those of variant k, for k = 0 ... count - 1. It must change nothing else:
        the stages after ``last`` run once for several variants together where a variant does not fill a
        batch, with the weights that the last of them left. The results come to the CPU at the end.

        Raises ValueError for a last station that is behind or none, or, from a text station, for one
        of the image tower, whose features are held.
        """
        stations, text = self._evaluator.stations, len(self._evaluator.stages.text)
        if not self.stage <= last < stations or 0 < self.stage <= text < last < stations - 1:
            among = f" or {stations - 1}" if 0 < self.stage <= text else ""
            raise ValueError(
                f"Walk.variants: expected a last station from {self.stage} to "
                f"{text if among else stations - 1}{among}, got {last}"
            )
        evaluator = self._evaluator
        # Made outside of inference mode, so that callers may use the results in any way.
        results = [_Results(count, len(flow.source), evaluator.device) for flow in self._flows]
        group, end = self._group(last), self._end(last)
        for first in range(0, count, group):
            variants = range(first, min(count, first + group))
            if len(variants) == 1 or end is None:
                for k in variants:
                    write(k)
                    with evaluator._scoring():
                        self._judge(self._flows, [result.rows(k, k + 1) for result in results])
                continue
            flows = [_Flow(evaluator, flow.stages, flow.source, end, len(variants)) for flow in self._flows]
            for place, k in enumerate(variants):
                write(k)
                with evaluator._scoring():
                    for flow, many in zip(self._flows, flows, strict=True):
                        many.fill(place, flow)
            with evaluator._scoring():
                self._judge(flows, [result.rows(variants.start, variants.stop) for result in results])
        names = [flow.source.name for flow in self._flows if isinstance(flow.source, Images)]
        found = [result.scores() for result in results]
        return [{name: column[k] for name, column in zip(names, found, strict=True)} for k in range(count)]

    def _group(self, last: int) -> int:
        """How many variants share a batch after station ``last``."""
        if self._end(last) is None:
            return 1
        evaluator = self._evaluator
        images = sum(len(flow.source) for flow in self._flows)
        enough = evaluator._images.enough(min(len(flow.source) for flow in self._flows))
        return max(1, min(enough // images, evaluator._room_held() // images - 1))  # one is held already

    def _end(self, last: int) -> int | None:
        """The image stage after station ``last``; None: no stage is left, or the text differs."""
        text = len(self._evaluator.stages.text)
        if text and self.stage <= text:
            return None
        end = last - text if text else last + 1
        return end if end < len(self._evaluator.stages.image) else None

    def _judge(self, flows: Sequence[_Flow], results: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Fills in losses [n] and hits [n] of every flow."""
        chains = self._evaluator.stages
        head = None
        if self._text is not None and chains.head is not None:
            head = chains.head(self._text.finished())
        place = dict(zip(map(id, flows), results, strict=True))

        def work(flow: _Flow, batch: slice) -> tuple[Tensor, Tensor]:
            x = flow.run(batch, len(chains.image))
            if head is not None and chains.join is not None:
                x = chains.join(x, head)
            return flow.judge(x, batch)

        def take(flow: _Flow, batch: slice, found: tuple[Tensor, Tensor]) -> None:
            for kept, new in zip(place[id(flow)], found, strict=True):
                kept[batch] = new

        self._evaluator._images.map(flows, work, take)


class _Flow:
    """Samples on their way through a chain of stages, held before one of them.

    copies: how often each sample of the source is held, one variant after the other.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        stages: tuple[Stage, ...],
        source: Images | Prompts,
        position: int = 0,
        copies: int = 1,
    ) -> None:
        self.stages, self.source, self.position = stages, source, position
        self._batches = evaluator._prompts if isinstance(source, Prompts) else evaluator._images
        self._graphs, self._normalize = evaluator._graphs, evaluator.normalize_logits
        self._copies = copies
        self._held: Tensor | None = None  # before stage `position`; None: before the first

    def __len__(self) -> int:
        return len(self.source) * self._copies

    def run(self, batch: slice, last: int) -> Tensor:
        """What a batch is before stage ``last``. Use it, or copy it, before the next run."""
        stages = self.stages[self.position : last]
        inputs = None
        if self._held is None:
            x = inputs = self.source.prepare(batch)
        else:
            x = self._held[batch]
            if any(stage.reads_inputs for stage in stages):
                inputs = self._inputs(batch)
        if self._graphs is not None:
            return self._graphs.run(self.stages, self.position, last, x, inputs)
        for stage in stages:
            x = stage.run(x, x if inputs is None else inputs)
        return x

    def _inputs(self, batch: slice) -> Tensor:
        """What the chain begins with, of samples that may be of several copies."""
        parts = [self.source.prepare(part) for part in self._parts(batch)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _parts(self, batch: slice) -> list[slice]:
        """Which samples of the source a batch is: it may reach from one copy into the next."""
        n, at, parts = len(self.source), batch.start, []
        while at < batch.stop:
            stop = min(batch.stop, at - at % n + n)
            parts.append(slice(at % n, at % n + stop - at))
            at = stop
        return parts

    def advance(self, stage: int, keep: bool = False) -> None:
        """Held before a later stage, in place of what it came from where the shape allows.

        keep: leave alone what it came from.
        """
        if stage == self.position:
            return
        held = None if keep else self._held

        def take(_: _Flow, batch: slice, x: Tensor) -> None:
            nonlocal held
            if held is None or held.shape[1:] != x.shape[1:] or held.dtype != x.dtype:
                held = x.new_empty((len(self), *x.shape[1:]))
            held[batch] = x

        self._batches.map([self], lambda _, batch: self.run(batch, stage), take)
        self._held, self.position = held, stage

    def fill(self, place: int, flow: _Flow) -> None:
        """Takes up another flow's samples, run to before this one's stage, as copy number ``place``."""
        start = place * len(flow)

        def take(_: _Flow, batch: slice, x: Tensor) -> None:
            if self._held is None:
                self._held = x.new_empty((len(self), *x.shape[1:]))
            self._held[start + batch.start : start + batch.stop] = x

        self._batches.map([flow], lambda _, batch: flow.run(batch, self.position), take)

    def restart(self) -> None:
        """Before the first stage again."""
        self._held, self.position = None, 0

    def finished(self) -> Tensor:
        """What all samples are after the last stage; this flow stays where it is."""
        last = len(self.stages)
        if self.position == last and self._held is not None:
            return self._held
        end = copy(self)
        end.advance(last, keep=True)
        if end._held is None:
            raise RuntimeError("Evaluator: a chain without stages or samples has no result")
        return end._held

    def ahead(self, batch: slice) -> None:
        """Begins to fetch a batch, if nothing is held of it."""
        if self._held is None:
            self.source.ahead(batch)

    def judge(self, logits: Tensor, batch: slice) -> tuple[Tensor, Tensor]:
        """Losses and hits of a batch."""
        if not isinstance(self.source, Images):
            raise TypeError("Evaluator: prompts have no labels")
        parts = self._parts(batch)
        rows = torch.split(logits, [part.stop - part.start for part in parts])
        found = [self.source.judge(row, part, self._normalize) for row, part in zip(rows, parts, strict=True)]
        if len(found) == 1:
            return found[0]
        return torch.cat([losses for losses, _ in found]), torch.cat([hits for _, hits in found])


class _Results:
    """Losses and hits of several variants, on the device until all are there."""

    def __init__(self, count: int, samples: int, device: torch.device) -> None:
        self._losses = torch.empty((count, samples), device=device)
        self._hits = torch.empty((count, samples), device=device, dtype=torch.bool)

    def rows(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Room for those of variants ``first`` to before ``last``, one after the other."""
        return self._losses[first:last].view(-1), self._hits[first:last].view(-1)

    def scores(self) -> list[Scores]:
        losses, hits = self._losses.cpu(), self._hits.cpu()
        return [Scores(losses[k], hits[k]) for k in range(len(losses))]
