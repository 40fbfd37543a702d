"""The limit of the default tier: a test without the marker ``slow`` takes at most two seconds of CPU.

Beyond it, the summary of pytest lists the test; beyond three times as much, the test fails.

CPU seconds of this process, all its threads, and the child processes that it waited for. Other load makes
them longer, too: the limit is scaled by a loop of known length, timed at the start of the session and again
before a test fails, and by the load average per core. Not counted: fixtures that several tests share, which
have a limit of their own, and a test in which modules are imported for the first time.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

LIMIT = 2.0  # CPU seconds of one test
SHARED = 6.0  # CPU seconds of the shared fixtures that one test sets up
REFERENCE = 0.014  # CPU seconds of loop() on the machine that the limits are meant for
MARGIN = 3  # a test fails beyond so many limits
IMPORTS = 25  # as many new modules, and the time went into importing them


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def loop() -> float:
    """CPU seconds of a fixed piece of work: bytecode, and memory beyond the caches."""
    start, total, block = time.thread_time(), 0, bytes(1 << 23)
    for number in range(300_000):
        total += number & 7
    hashlib.blake2b(block).digest()
    return time.thread_time() - start


@dataclass
class Cost:
    """Of one test: CPU seconds of its own and of shared fixtures, and how many modules were imported."""

    own: float = 0.0
    shared: float = 0.0
    modules: int = 0


class Guard:
    """A plugin of pytest that lists tests of the default tier beyond the limit, and fails those far beyond.

    Args:
        limit: CPU seconds of one test on the reference machine.
        shared: CPU seconds of the shared fixtures that one test sets up.
    """

    def __init__(self, limit: float = LIMIT, shared: float = SHARED) -> None:
        self.limit, self.shared = limit, shared
        self._slowness = self._measured()
        self._cost = Cost()

    @staticmethod
    def _measured() -> float:
        """How much slower than the reference machine this one is now, by a loop and its load; never faster.

        Threads of busy processes wait for each other, some of them spinning: CPU time grows with the load.
        """
        load = os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0
        return max(1.0, load, max(loop() for _ in range(3)) / REFERENCE)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        self._cost = Cost()
        return (yield from self._watch())

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        yield from self._watch()
        if item.get_closest_marker("slow") is None:
            if reason := self._excess(MARGIN):
                pytest.fail(reason, pytrace=False)
            if reason := self._excess(1):
                item.user_properties.append(("slow", reason))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for report in terminalreporter.stats.get("passed", []):
            for name, reason in report.user_properties:
                if name == "slow":
                    terminalreporter.write_line(f"SLOW {report.nodeid}: {reason}")

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
        if fixturedef.scope == "function":
            return (yield)
        before = cpu_seconds(), self._cost.shared
        try:
            return (yield)
        finally:  # one shared fixture may set up another
            self._cost.shared = before[1] + cpu_seconds() - before[0]

    def _watch(self) -> Iterator[None]:
        start, shared, modules = cpu_seconds(), self._cost.shared, len(sys.modules)
        try:
            return (yield)
        finally:
            self._cost.own += cpu_seconds() - start - (self._cost.shared - shared)
            self._cost.modules += len(sys.modules) - modules

    def _excess(self, margin: float) -> str:
        """Why the test that has just run is slower than ``margin`` limits; empty where it is not."""
        cost = self._cost
        if cost.modules >= IMPORTS or sys.gettrace() is not None or self._on_a_gpu():
            return ""
        for what, seconds, limit in (
            ("the test", cost.own, self.limit * margin),
            ("its shared fixtures", cost.shared, self.shared * margin),
        ):
            if seconds > limit * self._slowness:
                self._slowness = max(self._slowness, self._measured())
            if seconds > limit * self._slowness:
                return (
                    f"{what} took {seconds:.1f} s of CPU, limit {limit * self._slowness:.1f} s "
                    f"({limit:g} s, {self._slowness:.1f} times as slow a machine): "
                    "mark it slow or make it faster (CONTRIBUTING.md, Tests)"
                )
        return ""

    @staticmethod
    def _on_a_gpu() -> bool:
        """With a GPU, a test's first launch takes seconds: contexts are created, kernels compiled."""
        torch = sys.modules.get("torch")
        return torch is not None and bool(torch.cuda.is_available())
