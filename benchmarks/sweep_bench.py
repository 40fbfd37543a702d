"""The results of a run, kept as they are measured: each timing is on disk before the next begins."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from time import perf_counter
from typing import Any, TypeVar

import record
import sweep_case
import sweep_goals
import torch
from sweep_case import Case
from sweep_options import Options

from rft_fast.common import disk
from rft_fast.evaluate import Evaluator
from rft_fast.evaluate.precision import PRECISIONS

T = TypeVar("T")
# Largest difference of two losses that count as the same number, as a share of 1 + loss: batches of other
# sizes round differently.
SAME = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
ROUNDED = {"tf32": 2e-3, "bf16x3": 1e-4}  # instead, where products of float32 are rounded


class TimeIsUp(Exception):
    """There is no time for another measurement."""


class Log:
    """The runs of a call, one per architecture.

    Attributes:
        out: JSON file that always holds what is known.
        runs: As the JSON file holds them: about, options, parts, goals, and failures if there are any.
        timings: Number of timings.
    """

    def __init__(self, out: pathlib.Path | None = None) -> None:
        self.out, self.timings = out, 0
        self.runs: list[dict[str, Any]] = []
        self._said: dict[tuple[str, ...], dict[str, Any]] = {}

    def begin(self, about: Mapping[str, Any], options: Options) -> dict[str, Any]:
        """Add a new, empty run."""
        run = {"about": about, "options": asdict(options), "parts": {}, "goals": []}
        self.runs.append(run)
        return run

    def save(self, done: bool = False) -> None:
        """Write the JSON file, and a row for each result that is new or has changed.

        done: a part is complete, so that its goals are judged; adds a row for each of them.
        """
        run = self.runs[-1]
        run["goals"] = list(sweep_goals.goals(run))
        if self.out:
            whole = run if len(self.runs) == 1 else {"runs": self.runs}
            disk.replace(self.out, (json.dumps(whole, indent=1) + "\n").encode())
        for key, facts in sweep_goals.rows(run):
            if self._said.get(key) != facts and (done or key[0] != "goal"):
                self._said[key] = facts
                record.row(key[0], **facts)


class Bench:
    """One architecture: its case, and the results of the parts.

    case: the case, or a function that makes it when the first part begins.
    """

    def __init__(
        self, case: Case | Callable[[], Case], options: Options, log: Log | None = None, about: Any = None
    ) -> None:
        self._make, self.options = case, options
        self.log = Log() if log is None else log
        self.run = self.log.begin(about or {}, options)
        self.failures: list[AssertionError] = []
        self._part, self._found = "", {}
        self._shared: dict[Any, Any] = {}

    @property
    def case(self) -> Case:
        if not isinstance(self._make, Case):
            self.check_time("making weights and images")
            self._make = self._make()
        return self._make

    @property
    def device(self) -> torch.device:
        return torch.device(self.options.device)

    def shared(self, key: Any, make: Callable[[], T]) -> T:
        """Return what several parts use; the first one makes it."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def measure(self, part: str, run: Callable[[Bench], None]) -> dict[str, Any]:
        """Measure one part and return its results, as many as there was time for.

        Raises AssertionError where the numbers of two contenders differ, after the rest is measured.
        """
        self._part, self._found, self.failures = part, {}, []
        try:
            run(self)
        except TimeIsUp as up:
            record.left_out(f"{self.options.arch}, {part}: {up} and what follows")
        finally:
            self.log.save(done=True)
        if self.failures:
            raise self.failures[0]
        return self._found

    def begin(self, found: dict[str, Any]) -> dict[str, Any]:
        """Set the results that the part fills in; they count from its first timing on."""
        self._found = found
        return found

    def not_measured(self, why: str) -> None:
        """Record why the part cannot be measured here."""
        self.begin({"not measured": why})
        self.run["parts"][self._part] = self._found
        record.row("not measured", arch=self.options.arch, part=self._part, why=why)
        self.log.save()

    def check_time(self, what: str) -> None:
        """Raise TimeIsUp if ``what`` should not begin any more."""
        if record.time_is_up():
            raise TimeIsUp(what)

    def timed(self, what: str, run: Callable[[], T]) -> tuple[T, float]:
        """Run something; return its result, and the seconds until the device is done.

        Raises TimeIsUp if it is too late to begin.
        """
        self.check_time(what)
        self._synchronize()
        start = perf_counter()
        found = run()
        self._synchronize()
        return found, perf_counter() - start

    def timing(self, contender: str, seconds: float, precision: str = "fp32", **facts: Any) -> None:
        """Record a timing whose numbers are right and in the results; on return it is on disk."""
        self.log.timings += 1
        self.run["parts"][self._part] = self._found
        where = {"arch": self.options.arch, "part": self._part, "contender": contender}
        record.row("timing", **where, precision=precision, seconds=seconds, **facts)
        self.log.save()

    def failed(self, error: AssertionError) -> None:
        """Record numbers that differ. The part continues, and fails at its end."""
        self.failures.append(error)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def evaluator(self, precision: str = "fp32", samples: int | None = None) -> Evaluator:
        """Return the evaluator of the first images, in our batches; the model is cut into stages once."""
        case = self.case
        if samples in (None, len(case.data.labels)):
            return case.evaluator(precision)
        key = ("evaluator", precision, samples)
        return self.shared(key, lambda: case.evaluator(precision).on([sweep_case.cut(case.data, samples)]))


def allowed(precision: str, loss: float) -> float:
    """Return by how much two losses of about this size may differ and count as the same number."""
    return (1 + loss) * ROUNDED.get(precision, SAME[PRECISIONS[precision]])


def turns(peer: Sequence[float], ours: Sequence[float]) -> list[float]:
    """Return how many times longer the peer took in each round; the last round may lack one of them."""
    return [theirs / mine for theirs, mine in zip(peer, ours)]


def check_same(
    what: str, ours: Mapping[Any, Sequence[float]], peer: Mapping[Any, Sequence[float]], allowed: float
) -> float:
    """Return the largest difference between numbers under the same keys.

    Raises AssertionError where one is larger than allowed or not finite, or keys differ.
    """
    if set(ours) != set(peer):
        raise AssertionError(f"{what}: ours and the peer measured different things: {set(ours) ^ set(peer)}")
    largest = 0.0
    for key in ours:
        for mine, theirs in zip(ours[key], peer[key], strict=True):
            if not abs(mine - theirs) <= allowed:  # a NaN is not
                raise AssertionError(
                    f"{what}: {key}: ours {mine}, the peer's {theirs}, allowed {allowed:.1e}"
                )
            largest = max(largest, abs(mine - theirs))
    return largest


def check_scores(
    what: str,
    ours: Mapping[Any, Sequence[float]],
    peer: Mapping[Any, Sequence[float]],
    samples: int,
    precision: str = "fp32",
) -> float:
    """Check that losses agree; accuracies may differ by one image, a tie that rounds either way."""
    losses, peers = ({key: value[:1] for key, value in side.items()} for side in (ours, peer))
    hits, peers_hits = ({key: value[1:] for key, value in side.items()} for side in (ours, peer))
    largest = max((value[0] for value in ours.values()), default=0.0)
    check_same(f"{what}: accuracy", hits, peers_hits, 1.001 / samples)
    return check_same(f"{what}: loss", losses, peers, allowed(precision, largest))
