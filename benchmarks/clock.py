"""Seconds of one round from cold caches, on the CPU or a GPU, and the bandwidth to compare with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache

import torch

Run = Callable[[], object]


class Clock:
    """A timer that is called before and after each round, as pytest-benchmark calls its timers.

    The first call of a pair empties the caches and returns 0. On a GPU it empties them by reading, which
    leaves nothing that the round would have to write back, and returns while that is still running: the host
    is ahead, and the time between the two events is the device's alone. (A round with so many launches that
    the device catches up takes the host's time, as it would in use.)
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begun: torch.cuda.Event | float | None = None
        self._large = torch.zeros(2**27 if device.type == "cuda" else 2**24, device=device)
        self._sink = None if device.type == "cuda" else torch.empty_like(self._large)

    def __call__(self) -> float:
        begun, self._begun = self._begun, None
        if begun is None:
            self._begun = self._begin()
            return 0.0
        if isinstance(begun, float):
            return time.perf_counter() - begun
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        torch.cuda.synchronize(self._device)
        return begun.elapsed_time(event) / 1e3

    def _begin(self) -> torch.cuda.Event | float:
        if self._sink is not None:
            self._sink.copy_(self._large)
            return time.perf_counter()
        self._large.sum()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def reset(self) -> None:
        """Prepare for a new row: the last may have failed half-way, and a GPU's clock may have slowed."""
        self._begun = None
        if self._sink is None:
            for _ in range(500):  # a tenth of a second
                self._large.sum()
            torch.cuda.synchronize(self._device)


@cache
def clock(device: torch.device) -> Clock:
    return Clock(device)


def measure(device: torch.device, run: Run) -> float:
    """Return the seconds of one round."""
    timer = clock(device)
    start = timer()
    run()
    return timer() - start


def in_turns(device: torch.device, ours: Run, peer: Run, rounds: int) -> list[float]:
    """Return how many times longer the peer took in each round, with ours and the peer's run in turns.

    A shared machine changes its speed by half from one minute to the next, and a GPU its clock rate: only
    neighbouring rounds are comparable.
    """
    pairs = [(measure(device, ours), measure(device, peer)) for _ in range(rounds)]
    return [theirs / mine for mine, theirs in pairs]


@cache
def bandwidth(device: torch.device, moved: int, operands: int) -> float:
    """Return GB/s of plain torch moving ``moved`` bytes, read and written: the yardstick of a write.

    Args:
        device: Where to measure.
        moved: Bytes.
        operands: 2 for a copy (out.copy_(a)), 3 for a triad (torch.add(a, b, out=out)), in float32.

    Returns:
        The median of 25 rounds.
    """
    elements = moved // (4 * operands)
    tensors = [torch.randn(elements, device=device) for _ in range(operands)]
    out, *sources = tensors
    run = (lambda: out.copy_(*sources)) if operands == 2 else (lambda: torch.add(*sources, out=out))
    times = [measure(device, run) for _ in range(26)]
    return 4 * operands * elements / statistics.median(times[1:]) / 1e9
