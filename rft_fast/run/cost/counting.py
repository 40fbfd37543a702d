"""How much a study does: it is run on stand-ins, an evaluator and a path, that only count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ...datasets import Dataset
from ...evaluate import Evaluator, Scores, Walk
from ...evaluate.batches import Batches
from ...evaluate.feed import Images
from ...kernels import Write
from ...path import Path, Weight
from ...path.slots import Part, Rows, Slot

Study = Callable[[Path, Evaluator], object]

_MAXIMA = ("held", "differentiated", "borrowed")


@dataclass
class Work:
    """How much is done. ``+`` joins, ``*`` repeats; numbers of what is held at once become the larger one.

    Stages are numbered along the text chain, then the image chain, then the join, if there is a text
    chain; else along the image chain.
    """

    images: list[float]
    """Images that go through each stage; through a stage of the text chain 0, its cost is per run."""
    runs: list[float]
    """How often each stage runs on a batch; a stage of the text chain on all of its prompts."""
    scorings: float = 0
    """Settings of the weights that are scored."""
    gradients: list[float] = field(default_factory=list)
    """Images whose loss is differentiated, by the first stage whose weights are asked for."""
    curvatures: float = 0
    """Images whose loss is differentiated twice."""
    batches: float = 0
    """Batches of either."""
    writes: float = 0
    """Writes of weights."""
    written: float = 0
    """Weights written without noise or mask."""
    noisy: float = 0
    """Weights written with noise or a mask."""
    touches: float = 0
    """Operations of torch on weights and gradients, such as the products of the control variate."""
    touched: float = 0
    """Weights that they read."""
    held: float = 0
    """Images whose activations are held at once."""
    differentiated: float = 0
    """Weights whose gradient is held at once."""
    borrowed: float = 0
    """Weights that a study works on with copies of its own, at once."""

    @classmethod
    def none(cls, evaluator: Evaluator) -> Work:
        """No work yet, for an evaluator with these stages."""
        stages = len(evaluator.stages.text) + len(evaluator.stages.image) + bool(evaluator.stages.text)
        return cls([0.0] * stages, [0.0] * stages, gradients=[0.0] * stages)

    def __add__(self, other: Work) -> Work:
        return Work(**{f.name: _joined(f.name, self, other) for f in fields(self)})

    def __mul__(self, times: float) -> Work:
        found = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in _MAXIMA:
                value = [times * v for v in value] if isinstance(value, list) else times * value
            found[f.name] = value
        return Work(**found)


def _joined(name: str, one: Work, other: Work) -> Any:
    a, b = getattr(one, name), getattr(other, name)
    if isinstance(a, list):
        return [x + y for x, y in zip(a, b, strict=True)]
    return max(a, b) if name in _MAXIMA else a + b


def count(study: Study, path: Path, evaluator: Evaluator, sizes: Mapping[str, tuple[int, bool]]) -> Work:
    """The work of ``study(path, evaluator)``, without doing it.

    path, evaluator: of the model in question; the weights stay as they are. The evaluator's own data may be
        few images; its batch size, memory limit and stages count.
    sizes: data set -> how many images it has, and whether it is out of distribution.

    What a study decides by its scores cannot be known: here all losses are 0, and a wanted standard
    error is reached at once. Raises what the study raises.
    """
    work = Work.none(evaluator)
    study(counted_path(path, work), CountedEvaluator(evaluator, sizes, work))
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
        size = rows.size if buffers else rows.size_without_buffers
        self._work.writes += 1
        if request.noisy or request.masked:
            self._work.noisy += size
        else:
            self._work.written += size
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


class CountedEvaluator(Evaluator):
    """An evaluator that counts what would go through the model, and has zeros for all scores.

    Made from a real one, whose stages, batch size and memory limit it takes; sizes: as in :func:`count`.
    """

    def __init__(self, evaluator: Evaluator, sizes: Mapping[str, tuple[int, bool]], work: Work) -> None:
        self.__dict__.update(evaluator.__dict__)
        shape = evaluator.datasets[0].images.shape[1:]
        self._feeds = [_Counted(name, *size, shape) for name, size in sizes.items()]
        self.datasets = [feed.dataset for feed in self._feeds]
        self._work = work

    def walk(self) -> Walk:
        return _CountedWalk(self, self._work)

    def gradient(self, weights: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        stage = stage_at(self, self.stage_of(map(_source, weights)))
        self._work.gradients[stage] += sum(map(len, self._feeds))
        self._differentiated(weights, self._slopes)
        return 0.0, [_Elements.of(_source(weight), self._work) for weight in weights]

    def curvature(self, weights: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
        self._work.curvatures += sum(map(len, self._feeds))
        self._differentiated(weights, self._curvatures)
        return torch.zeros(len(weights), dtype=torch.float64)

    def _differentiated(self, weights: Sequence[Tensor], batches: Batches) -> None:
        self._work.batches += sum(batch_count(batches, len(feed)) for feed in self._feeds)
        self._work.differentiated = max(self._work.differentiated, sum(map(_elements, weights)))

    def _check_device(self) -> None:
        """Nothing is run on it."""


class _CountedWalk(Walk):
    def __init__(self, evaluator: CountedEvaluator, work: Work) -> None:
        super().__init__(evaluator)
        self._work = work
        self._lengths = [len(flow.source) for flow in self._flows]
        self._text_stages, self._image_stages = len(evaluator.stages.text), len(evaluator.stages.image)
        self._at_text = self._at_image = 0

    def advance(self, stage: int) -> None:
        if not self.stage <= stage < self._evaluator.stations:
            raise ValueError(f"Walk.advance: no way from station {self.stage} to {stage}")
        if stage == self.stage:
            return
        text = self._text_stages
        if not text:
            self._through(stage, self._lengths)
            self._at_image = stage
        elif stage <= text:
            self._through(self._image_stages, self._lengths)
            self._at_image = self._image_stages
            if self._evaluator._holds_prompts:
                self._read(stage - 1)
                self._at_text = stage - 1
        else:
            self._read(text)
            self._at_text = text
            if self.stage <= text and stage < self._evaluator.stations - 1:
                self._at_image = 0
            self._through(stage - text - 1, self._lengths)
            self._at_image = stage - text - 1
        self.stage = stage
        self._hold(1)

    def variants(self, write: Callable[[int], object], count: int, last: int) -> list[dict[str, Scores]]:
        if not self.stage <= last < self._evaluator.stations:
            raise ValueError(f"Walk.variants: no way from station {self.stage} to {last}")
        for k in range(count):
            write(k)
        group, end = self._group(last), self._end(last)
        if end is None or group == 1:
            self._judge_counted(self._lengths, count)
        else:
            full, rest = divmod(count, group)
            for variants, times in ((group, full), (rest, 1)):
                if variants == 1:
                    self._judge_counted(self._lengths, times)
                elif variants and times:
                    self._through(end, self._lengths, variants * times)
                    start, self._at_image = self._at_image, end
                    self._judge_counted([variants * n for n in self._lengths], times)
                    self._at_image = start
            if count > 1:
                self._hold(1 + group)  # more draws than these may come
        self._work.scorings += count
        names = [flow.source.name for flow in self._flows if isinstance(flow.source, Images)]
        found: dict[str, Scores] = {n: _Zeros.of(k) for n, k in zip(names, self._lengths, strict=True)}
        return [found] * count

    def _judge_counted(self, lengths: Sequence[int], times: int) -> None:
        self._through(self._image_stages, lengths, times)
        if self._text_stages:
            self._read(self._text_stages, times)
            self._add(len(self._work.images) - 1, lengths, times)

    def _through(self, last: int, lengths: Sequence[int], times: int = 1) -> None:
        for stage in range(self._at_image, last):
            self._add(self._text_stages + stage, lengths, times)

    def _add(self, stage: int, lengths: Sequence[int], times: int) -> None:
        self._work.images[stage] += times * sum(lengths)
        self._work.runs[stage] += times * sum(batch_count(self._evaluator._images, n) for n in lengths)

    def _read(self, last: int, times: int = 1) -> None:
        for stage in range(self._at_text, last):
            self._work.runs[stage] += times

    def _hold(self, times: int) -> None:
        self._work.held = max(self._work.held, times * sum(self._lengths))


class _Counted(Images):
    """A data set of which only the number of images is known."""

    def __init__(self, name: str, images: int, ood: bool, shape: Sequence[int]) -> None:
        self._shape = shape
        self.labels = torch.zeros(1, dtype=torch.int64).expand(images)  # one number, however many there are
        self.images = torch.zeros((1,) * (1 + len(shape)), dtype=torch.uint8).expand(images, *shape)
        self.dataset = Dataset(name, self.images, self.labels, (0.0,) * 3, (1.0,) * 3, ood=ood)

    def cut(self, part: slice) -> Images:
        size = len(range(*part.indices(len(self))))
        return _Counted(self.name, size, self.dataset.ood, self._shape)


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


def batch_count(batches: Batches, images: int) -> int:
    """How many batches a set of so many images makes."""
    return -(-images // batches.size(images))


def stage_at(evaluator: Evaluator, station: int) -> int:
    """The number in a :class:`Work` of the first stage that runs at a station."""
    return max(0, station - 1) if evaluator.stages.text else station
