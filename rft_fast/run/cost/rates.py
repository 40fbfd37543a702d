"""What one of each counted thing takes: FLOPs by measure, seconds by a calibration, bytes by reckoning."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...common import meter
from ...evaluate import Evaluator, Walk
from ...evaluate.batches import Batches
from ...evaluate.evaluator import RESIDENT
from ...evaluate.modes import differentiating
from ...path import Path
from .counting import Work, batch_count, stage_at


@dataclass(frozen=True)
class Flops:
    """FLOPs of one image through each stage (of the text chain: of one run), as common/meter.py counts them.

    gradient, curvature: of one image, in batches of the evaluator's size, for all weights; None: not known,
    because the model cannot be measured so.
    """

    stages: list[float]
    text: int
    """How many of the stages are the text chain's."""
    gradient: float | None = None
    curvature: float | None = None

    @property
    def forward(self) -> float:
        """Of one image through the image chain."""
        return sum(self.stages[self.text :])

    def forwards(self, work: Work) -> float:
        """Images through the image chain, a part of the way counting as its part of the FLOPs."""
        pairs = zip(work.images[self.text :], self.stages[self.text :], strict=True)
        return sum(n * f for n, f in pairs) / self.forward if self.forward else max(work.images)

    def of(self, work: Work) -> float:
        """FLOPs of all of it. Where those of derivatives are not known: 3 and 9 times the forward pass."""
        text = zip(work.runs[: self.text], self.stages[: self.text], strict=True)
        total = sum(n * f for n, f in text) + self.forwards(work) * self.forward
        gradient = 3 * self.forward if self.gradient is None else self.gradient
        curvature = 9 * self.forward if self.curvature is None else self.curvature
        for images, reached in zip(work.gradients, _reached(self.stages), strict=True):
            total += images * (self.forward + max(0.0, gradient - self.forward) * reached)
        return total + work.curvatures * curvature


def flops(evaluator: Evaluator, work: Work | None = None) -> Flops:
    """What the evaluator's stages cost. Runs two images through the model.

    work: what it is wanted for, since derivatives take a while to measure; None: for forward passes.
    """
    chains, feed = evaluator.stages, evaluator._feeds[0]
    with evaluator._scoring():
        images = feed.prepare(slice(0, min(2, len(feed))))
        found, x = _chain_flops(chains.image, images)
        per_image = [f / len(images) for f in found]
        text: list[float] = []
        if chains.text and chains.prompts is not None and chains.join and chains.head:
            few = chains.prompts[:2]
            found, features = _chain_flops(chains.text, few)
            text = [f * len(chains.prompts) / len(few) for f in found]
            head, join = (
                chains.head(features.new_ones((len(chains.prompts), *features.shape[1:]))),
                chains.join,
            )
            joined = _measured(lambda: join(x, head))
            per_image.append(joined.flops / len(images) if joined else 0.0)
    return Flops(
        text + per_image,
        len(text),
        _derivative(evaluator, 1) if work and any(work.gradients) else None,
        _derivative(evaluator, 2) if work and work.curvatures else None,
    )


def _chain_flops(chain: Sequence[Any], inputs: Tensor) -> tuple[list[float], Tensor]:
    found, x = [], inputs
    for stage in chain:
        reading = _measured(lambda stage=stage, x=x: stage.run(x, inputs))  # type: ignore[misc]
        found.append(float(reading.flops) if reading else 0.0)
        x = stage.run(x, inputs)
    return found, x


def _measured(run: Callable[[], object]) -> meter.Reading | None:
    try:
        return meter.measure(run)
    except RuntimeError:
        return None


def _derivative(evaluator: Evaluator, order: int) -> float | None:
    """FLOPs per image of the first or second derivative of a full batch, all weights asked for."""
    feed, device = evaluator._feeds[0], evaluator.device
    batches = evaluator._slopes if order == 1 else evaluator._curvatures
    size = batches.size(sys.maxsize)
    shape = (size, *feed.dataset.images.shape[1:])
    weights = [p for p in evaluator.model.parameters() if p.is_floating_point()]

    def run() -> None:
        logits = evaluator.model(torch.empty(shape, dtype=feed.dtype, device=device))
        loss = F.cross_entropy(logits.float(), torch.zeros(size, dtype=torch.int64, device=device))
        options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
        grads = torch.autograd.grad(loss, weights, create_graph=order == 2, **options)
        if order == 2:
            torch.autograd.grad(grads, weights, [torch.empty_like(w) for w in weights], **options)

    kernel = sdpa_kernel(SDPBackend.MATH) if order == 2 else nullcontext()
    with differentiating(evaluator.model, evaluator.precision, weights), kernel:
        reading = _measured(run)
    return reading.flops / size if reading else None


def _reached(costs: Sequence[float]) -> list[float]:
    """For each stage, the share of the whole that it and the later ones have."""
    whole = sum(costs) or 1.0
    return [sum(costs[stage:]) / whole for stage in range(len(costs))]


@dataclass(frozen=True)
class Rates:
    """Seconds of one of each thing that :class:`Work` counts, on this machine."""

    images: list[float]
    runs: list[float]
    gradient: float
    """One image, for all weights."""
    curvature: float
    batch: float
    """What a batch of either takes, beside its images."""
    write: float
    written: float
    noisy: float
    touch: float
    touched: float


def forecast(work: Work, rates: Rates) -> float:
    """Seconds that the work takes."""
    total = sum(n * rate for n, rate in zip(work.images, rates.images, strict=True))
    total += sum(n * rate for n, rate in zip(work.runs, rates.runs, strict=True))
    forward = sum(rates.images)
    for images, reached in zip(work.gradients, _reached(rates.images), strict=True):
        # All images go forward; the way back is as long as the first weights asked for are early.
        total += images * (min(forward, rates.gradient) + max(0.0, rates.gradient - forward) * reached)
    pairs = (
        (work.curvatures, rates.curvature),
        (work.batches, rates.batch),
        (work.writes, rates.write),
        (work.written, rates.written),
        (work.noisy, rates.noisy),
        (work.touches, rates.touch),
        (work.touched, rates.touched),
    )
    return total + sum(n * rate for n, rate in pairs)


def calibrate(
    evaluator: Evaluator, path: Path, costs: Flops, work: Work | None = None, seconds: float = 10.0
) -> Rates:
    """Measures what one of each thing takes, in about so many seconds (large models: at least one pass).

    Through the same calls as the studies', so that threads, batches, graphs and kernels are those of the
    run. The live model is as it was before once this ends.

    evaluator: of the path's live model, with as many images as are scored at once where the rates are to
        hold, or :func:`images_wanted` if that is fewer; their values do not matter. What a call costs beside
        its images is shared out among them, so that few images have other rates than many.
    costs: of the evaluator's stages; what lies between two that are measured is shared out by them.
    work: what the rates are wanted for; derivatives are measured only if it has any. None: all.
    """
    if evaluator.model is not path.model:
        raise ValueError(
            "calibrate: expected an evaluator of the path's live model, got one of another model"
        )
    clock = _Clock(evaluator.device)
    one = _first(evaluator, 1)
    few = _first(evaluator, 8)
    _judged(few.walk())  # first calls load and choose things
    fits = 0.2 * seconds / clock.of(lambda: _judged(few.walk())) * len(few._feeds[0])
    full = _first(evaluator, min(images_wanted(evaluator), max(len(few._feeds[0]), int(fits))))
    with path.at(0.5):
        images, runs = _forward_rates(full, costs.stages, clock, 0.5 * seconds)
        lives = [weight.live for weight in path.weights()]
        gradient = curvature = batch = 0.0
        if work is None or any(work.gradients):
            gradient, batch = _affine(
                full, one, full._slopes, lambda e: e.gradient(lives), clock, 0.2 * seconds
            )
        if work is None or work.curvatures:
            signs = [torch.ones_like(live) for live in lives]
            curvature, again = _affine(
                full, one, full._curvatures, lambda e: e.curvature(lives, signs), clock, 0.2 * seconds
            )
            batch = max(batch, again)
            del signs
        writes = _write_rates(path, clock, 0.1 * seconds)
        touches = _touch_rates(path, clock, 0.05 * seconds)
    return Rates(images, runs, gradient, curvature, batch, *writes, *touches)


def images_wanted(evaluator: Evaluator) -> int:
    """So many images a calibration should have: full batches for every core that takes some."""
    return evaluator._size(sys.maxsize) * evaluator._workers(sys.maxsize)


def _first(evaluator: Evaluator, images: int) -> Evaluator:
    """An evaluator of so many images of the first set."""
    feed = evaluator._feeds[0]
    return evaluator._of([feed.cut(slice(0, min(images, len(feed))))])


class _Clock:
    """Seconds of a call, until the device is done with it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def of(self, call: Callable[[], object]) -> float:
        self._wait()
        start = perf_counter()
        call()
        self._wait()
        return perf_counter() - start

    def several(self, call: Callable[[], object], seconds: float) -> list[float]:
        """As many calls as fit in the time, three or more, after one that does not count.

        Where the first one takes all of the time, it is the only one.
        """
        first = self.of(call)
        if first > seconds:
            return [first]
        times = max(3, min(25, int(seconds / max(first, 1e-6)) - 1))
        return [self.of(call) for _ in range(times)]

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _judged(walk: Walk) -> None:
    for score in walk.scores().values():
        _ = (score.loss, score.accuracy, score.nonfinite)  # as the studies do


def _forward_rates(
    full: Evaluator, costs: Sequence[float], clock: _Clock, seconds: float
) -> tuple[list[float], list[float]]:
    """Seconds per image (of the text chain: per run) of each stage, by what is left from some stations on."""
    begun = perf_counter()
    whole = clock.of(lambda: _judged(full.walk()))
    if full.device.type == "cuda":  # libraries choose their algorithms, and launches are recorded
        for _ in range(3):
            whole = clock.of(lambda: _judged(full.walk()))
    elif 4 * whole < seconds:
        whole = clock.of(lambda: _judged(full.walk()))
    text, count = len(full.stages.text), full.stations
    # A round scores from each of the stations, half of the way on average, and gets from one to the next.
    passes = (seconds - (perf_counter() - begun)) / whole
    rounds = 5 if passes > 20 else 3 if passes > 6 else 1
    anchors = int(max(1, min(count, 2 * (passes / rounds - 1))))
    stations = sorted({i * count // anchors for i in range(anchors)})
    if text and anchors > 3:
        stations = sorted({*stations, 1, text + 1, count - 1})
    elif text:
        stations = [0]
    times: dict[int, list[float]] = {station: [] for station in stations}
    for _ in range(rounds if len(stations) > 1 else 0):
        walk = full.walk()
        for station in stations:
            walk.advance(station)
            times[station].append(clock.of(partial(_judged, walk)))
    left = {station: median(several) if several else whole for station, several in times.items()}

    n = len(full._feeds[0])
    images, runs = [0.0] * len(costs), [0.0] * len(costs)
    for first, last, after in _stretches(stations, count, text):
        stages = sorted({stage_at(full, station) for station in range(first, last)})
        weights = [costs[stage] * (1 if stage < text else n) for stage in stages]
        shares = [w / sum(weights) if sum(weights) else 1 / len(stages) for w in weights]
        took = left[first] if after is None else max(0.0, left[first] - left[after])
        for stage, share in zip(stages, shares, strict=True):
            if stage < text:
                runs[stage] = share * took  # the prompts are the same for any number of images
            else:
                images[stage] = share * took / n
    return images, runs


def _stretches(stations: Sequence[int], count: int, text: int) -> list[tuple[int, int, int | None]]:
    """(first station, end, station that is left to do after it) between the stations that were measured."""
    if not text or len(stations) == 1:
        return list(zip(stations, [*stations[1:], count], [*stations[1:], None], strict=True))
    found: list[tuple[int, int, int | None]] = []
    early = [station for station in stations if 1 <= station <= text]
    late = [station for station in stations if station > text]
    # After the text stages, image features being held, only the join is left.
    found += zip(early, [*early[1:], text + 1], [*early[1:], count - 1], strict=True)
    found += zip(late, [*late[1:], count], [*late[1:], None], strict=True)
    return found


def _line(long: float, short: float, images: int, batches: int) -> tuple[float, float]:
    """(a, b) of ``long = a * images + b * batches`` and ``short = a + b``, neither of them negative."""
    if images == batches:
        return long / images, 0.0
    slope = min(long / images, max(0.0, (long - batches * short) / (images - batches)))
    return slope, (long - images * slope) / batches


def _affine(
    full: Evaluator,
    one: Evaluator,
    batches: Batches,
    call: Callable[[Evaluator], object],
    clock: _Clock,
    seconds: float,
) -> tuple[float, float]:
    """Seconds per image and per batch."""
    short = min(clock.several(lambda: call(one), 0.2 * seconds))
    n = len(full._feeds[0])
    if full.device.type == "cpu":  # where a batch is hardly faster than its images one by one
        full = _first(full, max(8, int(0.8 * seconds / short)))
        n = len(full._feeds[0])
    long = median(clock.several(lambda: call(full), 0.8 * seconds))
    return _line(long, short, n, batch_count(batches, n))


def _write_rates(path: Path, clock: _Clock, seconds: float) -> tuple[float, float, float]:
    """Seconds per write, per weight, and per weight with noise."""
    sizes = {layer: sum(tensor.numel() for tensor in path.tensors(layer)) for layer in path.layers}
    whole, layer = (
        sum(slot.tensor.numel() for slot in path.slots),
        min(sizes, key=sizes.__getitem__, default=""),
    )
    each = seconds / 4

    def rates(rho: float) -> tuple[float, float]:
        long = median(clock.several(lambda: path.write(0.5, rho, on="interpolated"), each))
        if not layer or sizes[layer] == whole:
            return long / whole, 0.0
        short = median(clock.several(lambda: path.write(0.5, rho, [layer], on="interpolated"), each))
        slope = max(0.0, (long - short) / (whole - sizes[layer]))
        return slope, max(0.0, short - slope * sizes[layer])

    written, write = rates(0.0)
    noisy, again = rates(0.1)
    return max(write, again), written, noisy


def _touch_rates(path: Path, clock: _Clock, seconds: float) -> tuple[float, float]:
    """Seconds per operation on weights, and per weight that it reads."""
    lives = [weight.live.detach() for weight in path.weights()]
    smallest = min(lives, key=Tensor.numel)

    def products(weights: Sequence[Tensor]) -> None:  # three operations each, as the control variate does
        for w in weights:
            torch.dot(w.double().flatten(), w.double().flatten())

    call = median(clock.several(lambda: products([smallest] * 20), seconds / 2)) / 20 / 3
    whole = median(clock.several(lambda: products(lives), seconds / 2)) / 3
    return call, max(0.0, whole - len(lives) * call) / sum(map(Tensor.numel, lives))


COPIES = 5
"""Of the weights that the worst case climbs with, float32."""


@dataclass(frozen=True)
class Memory:
    """Peak memory in bytes, and what it is made of."""

    program: int
    """On the CPU: what the process holds already beside the weights, libraries above all."""
    weights: int
    """The live model and its two ends."""
    images: int
    """Those on the device, or the batches on their way to it."""
    held: int
    """Activations before a stage, of all images of a walk."""
    batches: int
    """Activations of the batches in work."""
    copies: int
    """Gradients, and copies of the weights that the worst case works with."""

    @property
    def total(self) -> int:
        return self.program + self.weights + self.images + self.held + self.batches + self.copies


def memory(work: Work, evaluator: Evaluator, path: Path, images: int) -> Memory:
    """Peak memory of the work. ``images``: how many are loaded, those of all evaluators together."""
    device = evaluator.device
    weights = _bytes(path)
    program = 0 if device.type == "cuda" else max(0, meter.resident() - weights)
    pixels = math.prod(evaluator.datasets[0].images.shape[1:])
    resident = images * pixels
    if device.type == "cuda" and resident > RESIDENT * evaluator.memory_limit:
        resident = 2 * evaluator._size(sys.maxsize) * pixels
    forward = [evaluator._images, evaluator._prompts] if evaluator.stages.text else [evaluator._images]
    activations = max(map(_in_work, forward))
    derived = max(
        _in_work(evaluator._slopes) if any(work.gradients) else 0,
        _in_work(evaluator._curvatures) if work.curvatures else 0,
    )
    held = int(work.held * evaluator._boundary)
    # Gradients are taken before anything is held, so that only the larger of the two counts.
    if derived > held + activations:
        held, activations = 0, derived
    copies = 4 * int(work.differentiated + COPIES * work.borrowed)
    return Memory(program, weights, resident, held, activations, copies)


def _in_work(batches: Batches) -> int:
    """Bytes of the full batches that are in work at once."""
    size, need = batches.size(sys.maxsize), batches._needed()
    return batches.workers(sys.maxsize, size) * (need.fixed + size * need.each)


def _bytes(path: Path) -> int:
    """Bytes of the live model and its ends, each piece of memory once."""
    tensors = [t for slot in path.slots for t in (slot.tensor, *slot.ends)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
