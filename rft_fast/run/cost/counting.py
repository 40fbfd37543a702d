"""How much a study does: it runs on a path and an evaluator whose writer and executor only count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ...datasets import Dataset
from ...evaluate import Evaluator, Scores
from ...evaluate.batches import Batches
from ...evaluate.feed import Images, Prompts, total
from ...evaluate.flow import Flow
from ...evaluate.runtime import Runtime
from ...kernels import Write
from ...path import Path, Weight
from ...path.slots import Part, Rows, Slot
from .work import Work

Study = Callable[[Path, Evaluator], object]


def count(study: Study, path: Path, evaluator: Evaluator, sizes: Mapping[str, tuple[int, bool]]) -> Work:
    """The work of ``study(path, evaluator)``, without doing it.

    path, evaluator: of the model in question; the weights stay as they are. The evaluator's own data may be
        few images; its batch size, memory limit and stages count.
    sizes: data set -> how many images it has, and whether it is out of distribution.

    What a study decides by its scores cannot be known: here all losses are 0, and a wanted standard
    error is reached at once. Raises what the study raises.
    """
    work = Work.none(evaluator)
    study(counted_path(path, work), counted_evaluator(evaluator, sizes, work))
    return work


def counted_path(path: Path, work: Work) -> Path:
    """The path in its present state, whose writes count and change nothing."""
    return path.written_by(CountingWriter(work))


class CountingWriter:
    """Counts the writes that a path decides on, and makes none."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._stand_ins: dict[str, Weight] = {}

    def check(self, parts: Sequence[Part]) -> None:
        """Nothing will be written."""

    def write(self, request: Write, rows: Rows, buffers: bool) -> list[str]:
        parameters, others = rows.sizes
        self._work.writes += 1
        if request.noisy or request.masked:
            self._work.noisy += parameters
        else:
            self._work.written += parameters
        self._work.written += others if buffers else 0
        return []

    def weights(self, slots: Sequence[Slot]) -> list[Weight]:
        """These weights without elements, of which the number is known."""
        for slot in slots:
            if slot.name not in self._stand_ins:
                parts = (_Elements.of(tensor, self._work) for tensor in (slot.tensor, *slot.ends))
                self._stand_ins[slot.name] = Weight(slot.name, *parts)
        return [self._stand_ins[slot.name] for slot in slots]

    def borrowed(self, slots: Sequence[Slot]) -> list[Weight]:
        self._work.borrowed = max(self._work.borrowed, sum(slot.tensor.numel() for slot in slots))
        return self.weights(slots)

    def warn(self, text: str) -> None:
        """The study itself will warn."""


def counted_evaluator(evaluator: Evaluator, sizes: Mapping[str, tuple[int, bool]], work: Work) -> Evaluator:
    """The evaluator on data sets of these sizes, which counts what it would do, and has zeros for all scores.

    sizes: as in :func:`count`.
    """
    like = evaluator.feeds[0]
    feeds = [_feed(name, *size, like) for name, size in sizes.items()]
    return evaluator.of(feeds, Counting(evaluator.runtime, work))


def _feed(name: str, images: int, ood: bool, like: Images) -> Images:
    """A data set of which only the number of images is known."""
    shape = like.dataset.images.shape[1:]
    pixels = torch.zeros((1,) * (1 + len(shape)), dtype=torch.uint8).expand(images, *shape)
    labels = torch.zeros(1, dtype=torch.int64).expand(images)
    dataset = Dataset(name, pixels, labels, like.dataset.mean, like.dataset.std, ood=ood)
    return Images(dataset, pixels.device, like.dtype, True, like.normalize)


class Counting:
    """Counts what a schedule decides (an :class:`rft_fast.evaluate.executor.Executor`), and does nothing."""

    def __init__(self, runtime: Runtime, work: Work) -> None:
        self._runtime, self._work = runtime, work
        self._text = len(runtime.stages.text)  # stages of the text chain, which a Work has first

    def advance(self, flows: Sequence[Flow], stage: int) -> None:
        for flow in flows:
            self.run(flow, stage)
            flow.position = stage

    def fill(self, flows: Sequence[Flow], place: int, sources: Sequence[Flow]) -> None:
        for flow, source in zip(flows, sources, strict=True):
            self.run(source, flow.position)

    def run(self, flow: Flow, last: int) -> None:
        """Counts the stages from where the flow is to before ``last``, on all of its samples."""
        stages = range(flow.position, last)
        if isinstance(flow.source, Prompts):
            for stage in stages:
                self._work.runs[stage] += 1
        else:
            self._add([self._text + stage for stage in stages], len(flow))

    def join(self, flow: Flow) -> None:
        """Counts what makes logits of image features and of those of the prompts."""
        self._add([len(self._work.images) - 1], len(flow))

    def _add(self, stages: Sequence[int], images: int) -> None:
        batches = self._runtime.images.count(images)
        for stage in stages:
            self._work.images[stage] += images
            self._work.runs[stage] += batches

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

    def warn(self, text: str) -> None:
        """The study itself will warn."""


class _NoResults:
    """Counts what is scored, and has zeros for all scores."""

    def __init__(self, counting: Counting, feeds: Sequence[Images], count: int) -> None:
        self._counting, self._feeds, self._count = counting, feeds, count

    def judge(self, flows: Sequence[Flow], text: Flow | None, first: int) -> None:
        for flow in flows:
            self._counting.run(flow, len(flow.stages))
            if text is not None:
                self._counting.join(flow)
        if text is not None:
            self._counting.run(text, len(text.stages))

    def scores(self) -> list[dict[str, Scores]]:
        found: dict[str, Scores] = {feed.name: _Zeros.of(len(feed)) for feed in self._feeds}
        return [found] * self._count


class _Zeros(Scores):
    """Scores that are all zero, which nobody needs to add up."""

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

    def then(self, more: Scores) -> Scores:
        return _Zeros.of(self.samples + more.samples)


class _Elements(Tensor):
    """An empty tensor in place of one of ``count`` elements, which counts what torch does with it."""

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
            # as_subclass of a view would keep what it came from; there is nothing in it anyway.
            return _Elements.of(out, largest.work, largest.count)
        return out


_VIEWS = frozenset("detach view view_as flatten reshape numel size dim requires_grad_ unsqueeze t".split())


def _elements(weight: Tensor) -> int:
    return weight.count if isinstance(weight, _Elements) else weight.numel()


def _source(weight: Tensor) -> Tensor:
    return weight.source if isinstance(weight, _Elements) else weight


def stage_at(runtime: Runtime, station: int) -> int:
    """The number in a :class:`Work` of the first stage that runs at a station."""
    return max(0, station - 1) if runtime.stages.text else station
