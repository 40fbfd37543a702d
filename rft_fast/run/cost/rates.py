"""Seconds per counted thing, measured by a calibration, and the time of work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from ...evaluate import Evaluator, Walk
from ...evaluate.batches import Batches
from ...path import Path
from .counting import stage_at
from .operations import Flops, reached
from .work import Work


@dataclass(frozen=True)
class Rates:
    """Seconds per unit of each thing that :class:`Work` counts, on this machine.

    Attributes:
        images: Per image, for each stage.
        runs: Per run, for each stage.
        gradient: Per image, for all weights.
        curvature: Per image, for all weights.
        batch: Per batch of either, beside its images.
        write: Per write.
        written: Per weight without noise or mask.
        noisy: Per weight with noise or a mask.
        touch: Per operation of torch.
        touched: Per weight that it reads.
    """

    images: list[float]
    runs: list[float]
    gradient: float
    curvature: float
    batch: float
    write: float
    written: float
    noisy: float
    touch: float
    touched: float


def forecast(work: Work, rates: Rates) -> float:
    """Estimate the seconds that work takes."""
    total = sum(n * rate for n, rate in zip(work.images, rates.images, strict=True))
    total += sum(n * rate for n, rate in zip(work.runs, rates.runs, strict=True))
    forward = sum(rates.images)
    for images, share in zip(work.gradients, reached(rates.images), strict=True):
        # All images go forward; the way back ends at the first stage of which weights are differentiated.
        total += images * (min(forward, rates.gradient) + max(0.0, rates.gradient - forward) * share)
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
    """Measure the rates on this machine.

    Measures through the calls of the studies, so threads, batches, graphs and kernels are those of a run. The
    live model is restored.

    Args:
        evaluator: An evaluator of the path's live model, with as many images as the studies score at once, or
            with :func:`images_wanted` if that is fewer. Their values do not matter. Fixed costs of a call are
            included in the rates per image, so few images have other rates than many.
        path: The path.
        costs: FLOPs of the evaluator's stages; they divide the time of stages that are measured together.
        work: The work to estimate; derivatives are measured only if it has any. None: measure all.
        seconds: Approximate duration; large models need one pass at least.

    Raises:
        ValueError: The evaluator is of another model.
    """
    if evaluator.model is not path.model:
        raise ValueError(
            "calibrate: expected an evaluator of the live model of the path, got one of another model"
        )
    clock = _Clock(evaluator.device)
    one = _first(evaluator, 1)
    few = _first(evaluator, 8)
    _judged(few.walk())  # the first calls load libraries and select algorithms
    fits = 0.2 * seconds / clock.of(lambda: _judged(few.walk())) * len(few.feeds[0])
    full = _first(evaluator, min(images_wanted(evaluator), max(len(few.feeds[0]), int(fits))))
    with path.at(0.5):
        images, runs = _forward_rates(full, costs.stages, clock, 0.5 * seconds)
        lives = [weight.live for weight in path.weights()]
        gradient = curvature = batch = 0.0
        if work is None or any(work.gradients):
            gradient, batch = _affine(
                full, one, full.runtime.slopes, lambda e: e.gradient(lives), clock, 0.2 * seconds
            )
        if work is None or work.curvatures:
            signs = [torch.ones_like(live) for live in lives]
            curvature, again = _affine(
                full, one, full.runtime.curvatures, lambda e: e.curvature(lives, signs), clock, 0.2 * seconds
            )
            batch = max(batch, again)
            del signs
        writes = _write_rates(path, clock, 0.1 * seconds)
        touches = _touch_rates(path, clock, 0.05 * seconds)
    return Rates(images, runs, gradient, curvature, batch, *writes, *touches)


def images_wanted(evaluator: Evaluator) -> int:
    """Return the number of images for a calibration: full batches for all cores that the evaluator uses."""
    size, workers = evaluator.runtime.images.full()
    return size * workers


def _first(evaluator: Evaluator, images: int) -> Evaluator:
    """Return an evaluator of the first images of the first data set."""
    feed = evaluator.feeds[0]
    return evaluator.of([feed.cut(slice(0, min(images, len(feed))))])


class _Clock:
    """Seconds of a call, until the device has finished it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def of(self, call: Callable[[], object]) -> float:
        self._wait()
        start = perf_counter()
        call()
        self._wait()
        return perf_counter() - start

    def several(self, call: Callable[[], object], seconds: float) -> list[float]:
        """Time as many calls as fit in the time, at least three, after one that does not count.

        If the first one takes all of the time, it is the only one.
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
    """Return seconds per image, and for the text chain per run, of each stage.

    Measures the scoring from several stations; differences give the stages between them.
    """
    begun = perf_counter()
    whole = clock.of(lambda: _judged(full.walk()))
    if full.device.type == "cuda":  # libraries select algorithms, and launches are recorded
        for _ in range(3):
            whole = clock.of(lambda: _judged(full.walk()))
    elif 4 * whole < seconds:
        whole = clock.of(lambda: _judged(full.walk()))
    text, count = len(full.stages.text), full.stations
    # A round scores from each station, half of the stages on average, and advances from one to the next.
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

    n = len(full.feeds[0])
    images, runs = [0.0] * len(costs), [0.0] * len(costs)
    for first, last, after in _stretches(stations, count, text):
        stages = sorted({stage_at(full.runtime, station) for station in range(first, last)})
        weights = [costs[stage] * (1 if stage < text else n) for stage in stages]
        shares = [w / sum(weights) if sum(weights) else 1 / len(stages) for w in weights]
        took = left[first] if after is None else max(0.0, left[first] - left[after])
        for stage, share in zip(stages, shares, strict=True):
            if stage < text:
                runs[stage] = share * took  # independent of the number of images
            else:
                images[stage] = share * took / n
    return images, runs


def _stretches(stations: Sequence[int], count: int, text: int) -> list[tuple[int, int, int | None]]:
    """Return (first station, end, station that remains after it) between the measured stations."""
    if not text or len(stations) == 1:
        return list(zip(stations, [*stations[1:], count], [*stations[1:], None], strict=True))
    found: list[tuple[int, int, int | None]] = []
    early = [station for station in stations if 1 <= station <= text]
    late = [station for station in stations if station > text]
    # After the text stages, with image features held, only the join remains.
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
    """Return seconds per image and per batch."""
    short = min(clock.several(lambda: call(one), 0.2 * seconds))
    n = len(full.feeds[0])
    if full.device.type == "cpu":  # a batch is hardly faster than its images one by one
        full = _first(full, max(8, int(0.8 * seconds / short)))
        n = len(full.feeds[0])
    long = median(clock.several(lambda: call(full), 0.8 * seconds))
    return _line(long, short, n, batches.count(n))


def _write_rates(path: Path, clock: _Clock, seconds: float) -> tuple[float, float, float]:
    """Return seconds per write, per weight, and per weight with noise."""
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
    """Return seconds per operation on weights, and per weight that it reads."""
    lives = [weight.live.detach() for weight in path.weights()]
    smallest = min(lives, key=Tensor.numel)

    def products(weights: Sequence[Tensor]) -> None:  # three operations each, as the control variate does
        for w in weights:
            torch.dot(w.double().flatten(), w.double().flatten())

    call = median(clock.several(lambda: products([smallest] * 20), seconds / 2)) / 20 / 3
    whole = median(clock.several(lambda: products(lives), seconds / 2)) / 3
    return call, max(0.0, whole - len(lives) * call) / sum(map(Tensor.numel, lives))
