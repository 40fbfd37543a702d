"""Seconds of one round from cold caches, on the CPU or a GPU; and the copy bandwidth to compare with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache

import torch

Clock = Callable[[], float]
Run = Callable[[], object]


@cache
def clock(device: torch.device) -> Clock:
    """A timer to be called before and after each round, as pytest-benchmark calls its timers.

    The first call of a pair empties the caches, and returns 0. On a GPU it does so by reading, which leaves
    nothing that the round would have to write back, and returns while that still runs: the host is ahead
    then, and the time between the two events the device's alone. (A round of so many launches that the
    device catches up takes the host's time, as it would in use.)
    """
    if device.type == "cuda":
        large = torch.zeros(2**27, device=device)
        started: list[torch.cuda.Event] = []

        def seconds() -> float:
            event = torch.cuda.Event(enable_timing=True)
            if started:
                event.record()
                torch.cuda.synchronize(device)
                return started.pop().elapsed_time(event) / 1e3
            large.sum()
            event.record()
            started.append(event)
            return 0.0

        return seconds

    source, sink = torch.zeros(2**24), torch.empty(2**24)
    begun: list[float] = []

    def seconds() -> float:
        if begun:
            return time.perf_counter() - begun.pop()
        sink.copy_(source)
        begun.append(time.perf_counter())
        return 0.0

    return seconds


def measure(device: torch.device, run: Run) -> float:
    """Seconds of one round."""
    timer = clock(device)
    start = timer()
    run()
    return timer() - start


def in_turns(device: torch.device, ours: Run, peer: Run, rounds: int) -> list[float]:
    """How many times longer the peer took, round by round, ours and the peer's one after the other.

    A shared machine changes its speed by half from one minute to the next, and a GPU its clock: only
    neighbours compare.
    """
    pairs = [(measure(device, ours), measure(device, peer)) for _ in range(rounds)]
    return [theirs / mine for mine, theirs in pairs]


@cache
def copy_bandwidth(device: torch.device) -> float:
    """GB/s of out.copy_(source), bytes read and written, median of 25. 64 M float32, on a GPU 256 M."""
    elements = 2**28 if device.type == "cuda" else 2**26
    source, out = torch.randn(elements, device=device), torch.empty(elements, device=device)
    times = [measure(device, lambda: out.copy_(source)) for _ in range(26)]
    return 2 * 4 * elements / statistics.median(times[1:]) / 1e9
