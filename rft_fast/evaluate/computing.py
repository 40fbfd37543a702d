"""The executor that computes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from . import derivatives
from . import precision as formats
from .batches import Batches
from .feed import Images, Prompts
from .flipped import Flipped
from .flipping import Flips, Perturb, Perturbation, Record, frozen
from .flow import Flow
from .runtime import Runtime
from .scores import Scores
from .stages import Stage, evaluating


class Computing:
    """Carries out a schedule on the model's device, see :class:`rft_fast.evaluate.executor.Executor`.

    Args:
        runtime: The model.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def advance(self, flows: Sequence[Flow], stage: int) -> None:
        with self._runtime.scoring():
            for flow in flows:
                self._advance(flow, stage)

    def _advance(self, flow: Flow, stage: int, keep: bool = False) -> None:
        """Hold a flow before a later stage; reuse its buffer if the shape is the same, unless ``keep``."""
        if stage == flow.position:
            return
        held = None if keep else flow.held

        def take(_: Flow, batch: slice, x: Tensor) -> None:
            nonlocal held
            if held is None or held.shape[1:] != x.shape[1:] or held.dtype != x.dtype:
                held = x.new_empty((len(flow), *x.shape[1:]))
            held[batch] = x

        self._batches(flow).map([flow], lambda _, batch: self._run(flow, batch, stage), take)
        flow.held, flow.position = held, stage

    def fill(self, flows: Sequence[Flow], place: int, sources: Sequence[Flow]) -> None:
        with self._runtime.scoring():
            for flow, source in zip(flows, sources, strict=True):
                self._fill(flow, place, source)

    def _fill(self, flow: Flow, place: int, source: Flow) -> None:
        start = place * len(source)

        def take(_: Flow, batch: slice, x: Tensor) -> None:
            if flow.held is None:
                flow.held = x.new_empty((len(flow), *x.shape[1:]))
            flow.held[start + batch.start : start + batch.stop] = x

        self._batches(flow).map([source], lambda _, batch: self._run(source, batch, flow.position), take)

    def results(self, feeds: Sequence[Images], count: int) -> _Results:
        return _Results(self, self._runtime, feeds, count)

    def holding(self, images: int) -> None:
        """Nothing to do: memory is allocated when it is needed."""

    def gradient(self, feeds: Sequence[Images], weights: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        runtime = self._runtime
        return derivatives.gradient(runtime.model, runtime.precision, runtime.slopes, feeds, weights)

    def curvature(
        self, feeds: Sequence[Images], weights: Sequence[Tensor], directions: Sequence[Tensor]
    ) -> Tensor:
        runtime = self._runtime
        batches = runtime.curvatures
        return derivatives.curvature(runtime.model, runtime.precision, batches, feeds, weights, directions)

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
        runtime = self._runtime
        flips = self._flips(flow, weights, end)
        flips.check()
        own = None if record is None else record.at(flips.weights)
        with runtime.scoring():
            head = self.head(text)
        shape, device = (count, len(flow)), runtime.device
        losses, best = torch.empty(shape, device=device), torch.empty(shape, device=device, dtype=torch.int32)
        controls = torch.zeros(shape, device=device, dtype=torch.float64)
        draws = [_Draw(flow, [found[k] for found in (losses, best, controls)]) for k in range(count)]
        noise = sum(weight.live.nbytes for weight in flips.weights)
        together = runtime.images.together(len(flow), noise)
        for first in range(0, count, together):
            some = draws[first : first + together]
            for k, draw in enumerate(some, first):
                made = perturb(k, flips.weights)
                # The next one overwrites it.
                draw.perturbation = made if len(some) == 1 else made.copy()
            self._perturbed(flips, some, head, own)
            for draw in some:
                draw.perturbation = None
        losses, best, controls = losses.cpu(), best.cpu(), controls.cpu()
        feed = flow.images
        return [(feed.scores(losses[k], best[k]), controls[k]) for k in range(count)]

    def _flips(self, flow: Flow, weights: Sequence[Flipped], end: int) -> Flips:
        """The stages with these weights, of which it is found out once how they are read."""
        known = self._runtime.flips
        key = (flow.position, end, *(id(weight.live) for weight in weights))
        if key not in known:
            with self._runtime.scoring():
                sample = flow.source.prepare(slice(0, min(2, len(flow))))
                x = sample
                for stage in self._runtime.traced.image[: flow.position]:
                    x = stage.run(x, sample)
                known[key] = Flips(
                    self._runtime.traced.image, flow.position, end, weights, x, sample, self._runtime.replays
                )
        return known[key]

    def recorded(self, flow: Flow, weights: Sequence[Flipped], end: int) -> int:
        return self._flips(flow, weights, end).bytes

    def record(self, flow: Flow, text: Flow | None, weights: Sequence[Flipped], end: int) -> Record:
        flips = self._flips(flow, weights, end)
        with self._runtime.scoring():
            head = self.head(text)
        found: Record | None = None
        own_head = None if head is None else head.clone()  # of no inference mode

        def work(flow: Flow, batch: slice) -> Record:
            x, inputs = self._start(flow, batch)
            return flips.record(
                x.clone(), inputs.clone(), lambda x: flow.judge(self._joined(x, own_head), batch)[0]
            )

        def take(flow: Flow, batch: slice, part: Record) -> None:
            nonlocal found
            found = found or part.empty(len(flow))
            found.put(batch, part)

        with (
            formats.exact(self._runtime.precision),
            evaluating(self._runtime.model),
            frozen(self._runtime.model),
        ):
            self._runtime.slopes.map([flow], work, take)
        if found is None:
            raise ValueError("Evaluator: a data set without images has no losses")
        return found

    def _perturbed(
        self, flips: Flips, draws: Sequence[_Draw], head: Tensor | None, record: Record | None
    ) -> None:
        """Compute losses, predictions and controls of some perturbations into their rows."""

        def work(draw: _Draw, batch: slice) -> tuple[Tensor, ...]:
            flow, perturbation = draw.flow, draw.perturbation
            if perturbation is None:
                raise RuntimeError("Evaluator: a draw without its perturbation")
            x, inputs = self._start(flow, batch)
            signs = flips.signs(perturbation, flow.numbers(batch))
            control = None if record is None else flips.control(record.of(batch), perturbation, signs)
            for number in range(flow.position, len(flow.stages)):
                if number in flips.sites:
                    x = flips.run(number, x, inputs, perturbation, signs)
                else:
                    x = self._stage(flow.stages[number], x, inputs)
            return (*flow.judge(self._joined(x, head), batch), *([] if control is None else [control]))

        def take(draw: _Draw, batch: slice, found: tuple[Tensor, ...]) -> None:
            for row, new in zip(draw.rows, found, strict=False):
                row[batch] = new

        with self._runtime.scoring():
            self._runtime.images.map(draws, work, take)

    def _stage(self, stage: Stage, x: Tensor, inputs: Tensor) -> Tensor:
        """Run a stage; its operations alone where they are known. The compiler replays for itself."""
        if self._runtime.stages is not self._runtime.traced:
            return stage.run(x, inputs)
        if not stage.reads_inputs or inputs is x:
            return self._runtime.replays.run(stage, lambda x: stage.run(x, x), [x], stage.tensors)
        return self._runtime.replays.run(stage, stage.run, [x, inputs], stage.tensors)

    def _start(self, flow: Flow, batch: slice) -> tuple[Tensor, Tensor]:
        """A batch where the flow is, and the inputs of the chain."""
        if flow.held is None:
            x = flow.source.prepare(batch)
            return x, x
        reads = any(stage.reads_inputs for stage in flow.stages[flow.position :])
        return flow.held[batch], flow.inputs(batch) if reads else flow.held[batch]

    def warn(self, text: str) -> None:
        warnings.warn(text, stacklevel=4)

    def logits(self, flow: Flow, batch: slice, head: Tensor | None) -> Tensor:
        """Run the rest of the model on a batch.

        Args:
            flow: Where the batch is.
            batch: Which of its samples.
            head: Weights of the head [classes, d]; None: the head is fixed.

        Returns:
            Logits [n, classes].
        """
        return self._joined(self._run(flow, batch, len(flow.stages)), head)

    def _joined(self, x: Tensor, head: Tensor | None) -> Tensor:
        """Logits of image features and the weights of the head; where that is fixed, x are logits."""
        join = self._runtime.stages.join
        return x if head is None or join is None else join(x, head)

    def head(self, text: Flow | None) -> Tensor | None:
        """Return the weights of the head [classes, d] that the prompts give; None: the head is fixed."""
        head = self._runtime.stages.head
        return None if text is None or head is None else head(self._finished(text))

    def _finished(self, flow: Flow) -> Tensor:
        """Return the activations after the last stage; the flow stays at its position."""
        last = len(flow.stages)
        if flow.position == last and flow.held is not None:
            return flow.held
        end = copy(flow)
        self._advance(end, last, keep=True)
        if end.held is None:
            raise RuntimeError("Evaluator: a chain without stages or samples has no result")
        return end.held

    def _run(self, flow: Flow, batch: slice, last: int) -> Tensor:
        """Return the activations of a batch before stage ``last``; the next run may overwrite them."""
        stages = flow.stages[flow.position : last]
        inputs = None
        if flow.held is None:
            x = inputs = flow.source.prepare(batch)
        else:
            x = flow.held[batch]
            if any(stage.reads_inputs for stage in stages):
                inputs = flow.inputs(batch)
        if self._runtime.graphs is not None:
            return self._runtime.graphs.run(flow.stages, flow.position, last, x, inputs)
        for stage in stages:
            x = stage.run(x, x if inputs is None else inputs)
        return x

    def _batches(self, flow: Flow) -> Batches:
        return self._runtime.prompts if isinstance(flow.source, Prompts) else self._runtime.images


@dataclass(eq=False)
class _Draw:
    """The images of a flow with one perturbation.

    Attributes:
        flow: The images.
        rows: What is computed of them, [n] each: losses, predictions, controls.
        perturbation: None: before and after it is computed.
    """

    flow: Flow
    rows: Sequence[Tensor]
    perturbation: Perturbation | None = None

    def __len__(self) -> int:
        return len(self.flow)

    def ahead(self, batch: slice) -> None:
        self.flow.ahead(batch)


class _Results:
    """Losses and predictions of several variants, on the device until all are computed."""

    def __init__(self, computing: Computing, runtime: Runtime, feeds: Sequence[Images], count: int) -> None:
        self._computing, self._runtime = computing, runtime
        self._feeds = feeds
        # Created outside of inference mode, so that callers may use the results in any way.
        shapes, device = [(count, len(feed)) for feed in feeds], runtime.device
        self._losses = [torch.empty(shape, device=device) for shape in shapes]
        self._best = [torch.empty(shape, device=device, dtype=torch.int32) for shape in shapes]

    def judge(self, flows: Sequence[Flow], text: Flow | None, first: int) -> None:
        kept = {
            id(flow): [rows[first : first + flow.copies].view(-1) for rows in pair]
            for flow, *pair in zip(flows, self._losses, self._best, strict=True)
        }

        def work(flow: Flow, batch: slice) -> tuple[Tensor, Tensor]:
            return flow.judge(self._computing.logits(flow, batch, head), batch)

        def take(flow: Flow, batch: slice, found: tuple[Tensor, Tensor]) -> None:
            for rows, new in zip(kept[id(flow)], found, strict=True):
                rows[batch] = new

        with self._runtime.scoring():
            head = self._computing.head(text)
            self._runtime.images.map(flows, work, take)

    def blend(
        self,
        flows: Sequence[Flow],
        text: Flow | None,
        write: Callable[[int], object],
        shares: Sequence[float],
    ) -> None:
        first: dict[int, Tensor] = {}
        rows = {id(flow): pair for flow, *pair in zip(flows, self._losses, self._best, strict=True)}

        def logits(flow: Flow, batch: slice) -> Tensor:
            return self._computing.logits(flow, batch, head).float()

        def keep(flow: Flow, batch: slice, found: Tensor) -> None:
            if id(flow) not in first:
                first[id(flow)] = found.new_empty((len(flow), found.shape[1]))
            first[id(flow)][batch] = found

        def work(flow: Flow, batch: slice) -> list[tuple[Tensor, Tensor]]:
            second = logits(flow, batch)
            # lerp has exact ends
            return [flow.judge(first[id(flow)][batch].lerp(second, share), batch) for share in shares]

        def take(flow: Flow, batch: slice, found: list[tuple[Tensor, Tensor]]) -> None:
            for k, pair in enumerate(found):
                for row, new in zip(rows[id(flow)], pair, strict=True):
                    row[k, batch] = new

        with self._runtime.scoring():
            write(0)
            head = self._computing.head(text)
            self._runtime.images.map(flows, logits, keep)
            write(1)
            head = self._computing.head(text)
            self._runtime.images.map(flows, work, take)

    def scores(self) -> list[dict[str, Scores]]:
        columns = [(losses.cpu(), best.cpu()) for losses, best in zip(self._losses, self._best, strict=True)]
        return [
            {
                feed.name: feed.scores(losses[k], best[k])
                for feed, (losses, best) in zip(self._feeds, columns, strict=True)
            }
            for k in range(len(columns[0][0]))
        ]
