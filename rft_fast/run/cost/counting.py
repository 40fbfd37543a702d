"""Counts how much a study does: the study runs on a path and an evaluator that do nothing but count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ...datasets import Dataset
from ...evaluate import Evaluator, Scores
from ...evaluate.batches import Batches
from ...evaluate.feed import Images, Prompts, total
from ...evaluate.flipped import Flipped
from ...evaluate.flipping import Perturb, Record
from ...evaluate.flow import Flow
from ...evaluate.runtime import Runtime
from ...path import Path, Weight
from ...path.requests import Groups
from ...path.slots import Part, Slot
from ...studies.others import Others, State
from .work import Work

Study = Callable[[Path, Evaluator], object]


def count(study: Study, path: Path, evaluator: Evaluator, sizes: Mapping[str, tuple[int, bool]]) -> Work:
    """Count the work of ``study(path, evaluator)`` without doing it.

    Decisions of a study that depend on scores are unknown: here all losses are 0, and any standard error that
    is a goal is reached at once.

    Args:
        study: The study.
        path: A path of the model; its live weights stay unchanged.
        evaluator: An evaluator of the model. Its batch size, memory limit and stages count, its images do
            not.
        sizes: Data set -> number of images, and whether it is out of distribution.

    Raises:
        Exception: Whatever the study raises.
    """
    work = Work.none(evaluator)
    study(counted_path(path, work), counted_evaluator(evaluator, sizes, work))
    return work


def counted_path(path: Path, work: Work) -> Path:
    """Return the path in its present state with a writer that counts writes in ``work`` and makes none."""
    return path.written_by(CountingWriter(work))


class CountingWriter:
    """Counts writes and makes none, see :class:`rft_fast.path.writer.Writer`.

    Args:
        work: Where they are counted.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._stand_ins: dict[str, Weight] = {}

    def check(self, parts: Sequence[Part]) -> None:
        """Nothing to check: nothing is written."""

    def write(self, groups: Groups, buffers: bool) -> list[str]:
        self._work.writes += 1
        for request, rows in groups:
            parameters, others = rows.sizes
            if request.noisy or request.masked:
                self._work.noisy += parameters
            else:
                self._work.written += parameters
            self._work.written += others if buffers else 0
        return []

    def weights(self, slots: Sequence[Slot]) -> list[Weight]:
        """Return stand-ins of these weights, without elements, that know how many they stand for."""
        for slot in slots:
            if slot.name not in self._stand_ins:
                parts = (_Elements.of(tensor, self._work) for tensor in (slot.tensor, *slot.ends))
                self._stand_ins[slot.name] = Weight(slot.name, *parts)
        return [self._stand_ins[slot.name] for slot in slots]

    def borrowed(self, slots: Sequence[Slot]) -> list[Weight]:
        self._work.borrowed = max(self._work.borrowed, sum(slot.tensor.numel() for slot in slots))
        return self.weights(slots)

    def warn(self, text: str) -> None:
        """Nothing to say: the study will warn."""


def counted_evaluator(evaluator: Evaluator, sizes: Mapping[str, tuple[int, bool]], work: Work) -> Evaluator:
    """Return the evaluator on data sets of these sizes with an executor that counts; all scores are 0.

    Args:
        evaluator: An evaluator of the model.
        sizes: As for :func:`count`.
        work: Where it is counted.
    """
    like = evaluator.feeds[0]
    feeds = [_feed(name, *size, like) for name, size in sizes.items()]
    return evaluator.of(feeds, Counting(evaluator.runtime, work))


def _feed(name: str, images: int, ood: bool, like: Images) -> Images:
    """Return a data set of that many images, all of which share one element of memory."""
    shape = like.dataset.images.shape[1:]
    pixels = torch.zeros((1,) * (1 + len(shape)), dtype=torch.uint8).expand(images, *shape)
    labels = torch.zeros(1, dtype=torch.int64).expand(images)
    dataset = Dataset(name, pixels, labels, like.dataset.mean, like.dataset.std, ood=ood)
    return Images(dataset, pixels.device, like.dtype, True, like.normalize)


class CountedOthers(Others):
    """Counts which models are loaded, and the writes of paths between them. Nothing is read or computed.

    Args:
        names: Names of the models.
        path: A path of the same size.
        work: Where it is counted.
    """

    def __init__(self, names: Iterable[str], path: Path, work: Work) -> None:
        super().__init__({name: {} for name in names})
        self._work = work
        self._size = sum(slot.tensor.numel() for slot in path.slots)

    def state(self, name: str) -> State:
        self._work.loads += 1
        self._hold(1)
        return {}

    def mean(self, names: Iterable[str]) -> State:
        self._hold(3)
        return super().mean(names)

    def model_stock(self, base: State, names: Iterable[str]) -> tuple[State, dict[str, float]]:
        self._hold(4)
        return super().model_stock(base, names)

    def search(
        self, names: Iterable[str], accuracy: Mapping[str, float], measure: Callable[[str, State], float]
    ) -> tuple[str, ...]:
        self._hold(4)
        return super().search(names, accuracy, measure)

    @contextmanager
    def between(self, path: Path, first: State, last: State) -> Iterator[Path]:
        with path.at(0.0):
            other = path.written_by(path.writer)
            other.write(0.0)
            yield other

    def _hold(self, models: int) -> None:
        self._work.combined = max(self._work.combined, models * self._size)


class Counting:
    """Counts a schedule and computes nothing, see :class:`rft_fast.evaluate.executor.Executor`.

    Args:
        runtime: The model.
        work: Where it is counted.
    """

    def __init__(self, runtime: Runtime, work: Work) -> None:
        self._runtime, self._work = runtime, work
        self._text = len(runtime.stages.text)  # number of stages of the text chain, the first in a Work

    def advance(self, flows: Sequence[Flow], stage: int) -> None:
        for flow in flows:
            self.run(flow, stage)
            flow.position = stage

    def fill(self, flows: Sequence[Flow], place: int, sources: Sequence[Flow]) -> None:
        for flow, source in zip(flows, sources, strict=True):
            self.run(source, flow.position)

    def run(self, flow: Flow, last: int) -> None:
        """Count the stages from the position of a flow to before ``last``, on all of its samples."""
        stages = range(flow.position, last)
        if isinstance(flow.source, Prompts):
            for stage in stages:
                self._work.runs[stage] += 1
        else:
            self._add([self._text + stage for stage in stages], len(flow))

    def join(self, flow: Flow) -> None:
        """Count the join of image features and head."""
        self._add([len(self._work.images) - 1], len(flow))

    def _add(self, stages: Sequence[int], images: int, batches: Batches | None = None) -> None:
        runs = (batches or self._runtime.images).count(images)
        for stage in stages:
            self._work.images[stage] += images
            self._work.runs[stage] += runs

    def results(self, feeds: Sequence[Images], count: int) -> _NoResults:
        self._work.scorings += count
        return _NoResults(self, feeds, count)

    def holding(self, images: int) -> None:
        self._work.held = max(self._work.held, images)

    def gradient(self, feeds: Sequence[Images], weights: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        station, _ = self._runtime.span(map(_source, weights))
        self._work.gradients[stage_at(self._runtime, station)] += total(feeds)
        self._differentiated(self._runtime.slopes, feeds, weights)
        return 0.0, [_Elements.of(_source(weight), self._work) for weight in weights]

    def curvature(
        self, feeds: Sequence[Images], weights: Sequence[Tensor], directions: Sequence[Tensor]
    ) -> Tensor:
        self._work.curvatures += total(feeds)
        self._differentiated(self._runtime.curvatures, feeds, weights)
        return torch.zeros(len(weights), dtype=torch.float64)

    def _differentiated(self, batches: Batches, feeds: Sequence[Images], weights: Sequence[Tensor]) -> None:
        self._work.batches += sum(batches.count(len(feed)) for feed in feeds)
        self._work.differentiated = max(self._work.differentiated, sum(map(_elements, weights)))

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
        reading = range(flow.position, end)  # which have a second product each
        images = len(flow)
        size = sum(weight.live.numel() for weight in weights)
        together = self._runtime.images.together(images, sum(weight.live.nbytes for weight in weights))
        noises = 1 if min(count, together) == 1 else 1 + min(count, together)  # the one made, and copies
        self._work.differentiated = max(self._work.differentiated, (1 + noises) * size)  # and its scale
        for _ in range(count):
            stages = [*reading, *range(flow.position, len(flow.stages))]
            self._add([self._text + stage for stage in stages], images)
            if text is not None:
                self.join(flow)
            self._work.writes += 1
            self._work.noisy += size
        self._work.scorings += count
        zeros = torch.zeros(1, dtype=torch.float64).expand(images)
        return [(_Zeros.of(images), zeros)] * count

    def record(self, flow: Flow, text: Flow | None, weights: Sequence[Flipped], end: int) -> Record:
        # A backward pass without gradients of weights has about as many products as a forward pass.
        stages = range(self._text + flow.position, self._text + len(flow.stages))
        self._add([*stages, *stages], len(flow), self._runtime.slopes)
        if text is not None:
            self.join(flow)
            self.join(flow)
        share = (end - flow.position) / len(flow.stages)
        self._work.recorded = max(self._work.recorded, share * len(flow))
        return Record([], [], [])

    def recorded(self, flow: Flow, weights: Sequence[Flipped], end: int) -> int:
        return 0

    def warn(self, text: str) -> None:
        """Nothing to say: the study will warn."""


class _NoResults:
    """Counts what is scored; all scores are 0."""

    def __init__(self, counting: Counting, feeds: Sequence[Images], count: int) -> None:
        self._counting, self._feeds, self._count = counting, feeds, count

    def judge(self, flows: Sequence[Flow], text: Flow | None, first: int) -> None:
        for flow in flows:
            self._counting.run(flow, len(flow.stages))
            if text is not None:
                self._counting.join(flow)
        if text is not None:
            self._counting.run(text, len(text.stages))

    def blend(
        self,
        flows: Sequence[Flow],
        text: Flow | None,
        write: Callable[[int], object],
        shares: Sequence[float],
    ) -> None:
        for model in (0, 1):
            write(model)
            self.judge(flows, text, 0)

    def scores(self) -> list[dict[str, Scores]]:
        found: dict[str, Scores] = {feed.name: _Zeros.of(len(feed)) for feed in self._feeds}
        return [found] * self._count


class _Zeros(Scores):
    """Scores that are all zero, without computing means."""

    @classmethod
    def of(cls, n: int) -> _Zeros:
        return cls(torch.zeros(1).expand(n), torch.zeros(1, dtype=torch.bool).expand(n))

    nonfinite = 0
    loss = loss_se = accuracy = accuracy_se = 0.0

    def gain_over(self, base: Scores) -> tuple[float, float]:
        self._check_paired(base, "gain_over")
        return 0.0, 0.0

    def rise_over(self, base: Scores) -> tuple[float, float]:
        self._check_paired(base, "rise_over")
        return 0.0, 0.0

    def instability(self, first: Scores, last: Scores) -> tuple[tuple[float, float], tuple[float, float]]:
        self._check_paired(first, "instability")
        self._check_paired(last, "instability")
        return (0.0, 0.0), (0.0, 0.0)

    def bump(self, first: Scores, last: Scores, alpha: float) -> tuple[float, float]:
        self._check_paired(first, "bump")
        self._check_paired(last, "bump")
        return 0.0, 0.0

    def then(self, more: Scores) -> Scores:
        return _Zeros.of(self.samples + more.samples)


class _Elements(Tensor):
    """An empty tensor that stands for ``count`` elements and counts the operations of torch on it."""

    count: int
    source: Tensor
    work: Work

    @staticmethod
    def of(source: Tensor, work: Work, count: int | None = None) -> _Elements:
        found: _Elements = torch.empty(0, dtype=source.dtype).as_subclass(_Elements)
        found.source, found.work = source, work
        found.count = source.numel() if count is None else count
        return found

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        name = func.__name__
        if name == "__get__":
            return out
        met = [value for value in tree_leaves((args, kwargs)) if isinstance(value, _Elements)]
        largest = max(met, key=lambda value: value.count)
        if name not in _VIEWS:
            largest.work.touches += 1
            largest.work.touched += largest.count
        if isinstance(out, Tensor) and not isinstance(out, _Elements) and out.numel() == 0:
            # as_subclass of a view would keep its base alive; it is empty anyway.
            return _Elements.of(out, largest.work, largest.count)
        return out


_VIEWS = frozenset("detach view view_as flatten reshape numel size dim requires_grad_ unsqueeze t".split())


def _elements(weight: Tensor) -> int:
    return weight.count if isinstance(weight, _Elements) else weight.numel()


def _source(weight: Tensor) -> Tensor:
    return weight.source if isinstance(weight, _Elements) else weight


def stage_at(runtime: Runtime, station: int) -> int:
    """Return the number in a :class:`Work` of the first stage that runs at a station."""
    return max(0, station - 1) if runtime.stages.text else station
