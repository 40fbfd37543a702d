"""Completed share and estimated remaining time.

The remaining time is the remaining cost times seconds per unit of cost, summed over the studies. Seconds are
wall-clock time of this process, so workers need no accounts of their own:

- The time between the ends of two consecutive measurements belongs to the study of the second.
- Studies whose measurements alternate run at the same time, on several workers. Their times cannot be
  separated, so they share one rate from then on: the sum of their seconds per sum of their costs.
- Rates are weighted averages: the weight of an observation halves after 10 minutes, or after half of the
  observed time if that is longer. A machine that becomes slower shows soon; one outlier among few
  measurements does not.
- Until a study has two measurements per worker, the common rate of all studies is used.

The estimate is exact if a unit of cost always takes the same time and, from its second measurement on, for a
study that runs alone. With several workers it is too high until their longest measurements have ended once,
as unfinished ones are not counted, and slightly too low at the end of a phase, when some workers are idle.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...common.words import duration
from .phrases import percent, time_left

_HALF_LIFE = 600.0  # seconds
_FEW = 2  # measurements per worker before a study's own rate is used
_NOTHING = 1e-9  # largest share of the cost that is a rounding error


class _Pace:
    """Seconds per unit of cost, a weighted average."""

    def __init__(self) -> None:
        self.seconds = self.cost = 0.0  # sums with the same weights
        self.whole = 0.0  # seconds, unweighted
        self.count = 0  # measurements with a cost above 0

    def add(self, seconds: float, cost: float) -> None:
        self.whole += seconds
        kept = 0.5 ** (seconds / max(_HALF_LIFE, self.whole / 2))
        self.seconds = self.seconds * kept + seconds
        self.cost = self.cost * kept + cost
        self.count += cost > 0

    @classmethod
    def of_all(cls, paces: Sequence[_Pace]) -> _Pace:
        made = cls()
        for name in ("seconds", "cost", "whole", "count"):
            setattr(made, name, sum(getattr(pace, name) for pace in paces))
        return made

    @property
    def rate(self) -> float | None:
        return self.seconds / self.cost if self.cost > 0 else None


@dataclass
class Study:
    """Costs and times of a study.

    Attributes:
        name: name of the study.
        pace: its rate, which studies can share.
        total: cost of all measurements; None if unknown.
        had: cost of those made by earlier processes.
        done: cost of those made by this process.
        wanted: model -> number of measurements that this process makes.
        made: model -> number of those that are made.
        reported: models reported as finished.
        begun: time of the beginning, in seconds of the clock.
        finished: time of the end.
        announced: whether the beginning was reported.
        closed: whether the end was reported.
    """

    name: str
    pace: _Pace = field(default_factory=_Pace)
    total: float | None = None
    had: float = 0.0
    done: float = 0.0
    wanted: dict[str, int] = field(default_factory=dict)
    made: Counter[str] = field(default_factory=Counter)
    reported: set[str] = field(default_factory=set)
    begun: float | None = None
    finished: float | None = None
    announced: bool = False
    closed: bool = False

    def settle(self, now: float, anyway: bool = False) -> None:
        """Update whether the study is finished; with ``anyway``, it is if it has begun."""
        if not (self._complete or anyway):
            self.finished, self.closed = None, False
        elif self.begun is not None and self.finished is None:
            self.finished = now

    @property
    def _complete(self) -> bool:
        if self.wanted:
            return all(self.made[model] >= count for model, count in self.wanted.items())
        return self._rest == 0

    @property
    def _rest(self) -> float | None:
        if self.total is None:
            return None
        rest = self.total - self.had - self.done
        return rest if rest > _NOTHING * self.total else 0.0

    @property
    def remaining(self) -> float | None:
        """Remaining cost; None if unknown."""
        return self._rest if self.finished is None else 0.0

    @property
    def fraction(self) -> float | None:
        """Completed share of the cost; None if unknown."""
        remaining = self.remaining
        if not remaining:
            return None if remaining is None else 1.0
        return 1 - remaining / (self.total or remaining)

    def finished_models(self) -> list[str]:
        """Return the models that have all their measurements and are not yet reported as finished."""
        return [
            model
            for model, made in self.made.items()
            if model not in self.reported
            and (self.finished is not None or made >= self.wanted.get(model, math.inf))
        ]

    def seconds(self, now: float) -> float:
        """Return the seconds from the beginning to the end, or to ``now``."""
        if self.begun is None:
            return 0.0
        return (now if self.finished is None else self.finished) - self.begun


class Forecast:
    """Completed and remaining cost and time of all studies.

    Args:
        now: time in seconds of the clock, as in all methods.
    """

    def __init__(self, now: float) -> None:
        self.studies: dict[str, Study] = {}
        self.started = now
        self._workers = 1
        self._last = now  # end of the last measurement
        self._order: list[str] = []  # studies, in the order of their last measurements
        self._current = ""  # study to which the time since then belongs

    def start(self, now: float, workers: int) -> None:
        """Start the clock of the run."""
        self.started = self._last = now
        self._workers = workers

    def study(self, name: str) -> Study:
        """Return the study of that name, which is created if need be."""
        return self.studies.setdefault(name, Study(name))

    def begin(self, name: str, now: float) -> None:
        """Record the beginning of a study or of one of its models."""
        if not self._order:
            self._last = now  # the time before the first study is not measuring
        self._current = name
        study = self.study(name)
        study.begun = now if study.begun is None else study.begun

    def measured(self, name: str, model: str, cost: float, now: float) -> Study:
        """Record a finished measurement; return its study."""
        study = self.study(name)
        study.begun = self._last if study.begun is None else study.begun
        if name in self._order:
            self._pool(self._order[self._order.index(name) :])
            self._order.remove(name)
        self._order.append(name)
        study.pace.add(max(0.0, now - self._last), cost)
        study.done += cost
        study.made[model] += 1
        study.settle(now)
        self._last, self._current = now, name
        return study

    def _pool(self, names: Sequence[str]) -> None:
        """Merge the rates of studies that run at the same time, and of those merged with them before."""
        if len(names) < 2:
            return
        paces = list({id(pace): pace for pace in (self.studies[name].pace for name in names)}.values())
        if len(paces) < 2:
            return
        pooled = _Pace.of_all(paces)
        for study in self.studies.values():
            if any(study.pace is pace for pace in paces):
                study.pace = pooled

    def left(self, study: Study, now: float) -> float | None:
        """Estimate the remaining seconds of a study; None if unknown."""
        remaining = study.remaining
        if not remaining:
            return remaining
        pace, enough = study.pace, _FEW * self._workers
        if pace.count < enough:
            pace, enough = self._whole(), self._workers
        rate = pace.rate
        if rate is None or pace.count < enough:
            return None
        since = max(0.0, now - self._last) if study.name == self._current else 0.0
        seconds = max(0.0, remaining * rate - since)
        return seconds if math.isfinite(seconds) else None

    def left_overall(self, now: float) -> float | None:
        """Estimate the remaining seconds of all studies; None if unknown."""
        return _sum([self.left(study, now) for study in self.studies.values()])

    @property
    def fraction(self) -> float | None:
        """Completed share of the cost of all studies; None if unknown."""
        left = _sum([study.remaining for study in self.studies.values()])
        if left is None:
            return None
        total = sum(study.total or 0.0 for study in self.studies.values())
        return 1.0 if left == 0 else (total - left) / total

    def text(self, name: str, now: float, elapsed: bool = True) -> str:
        """Describe the progress of a study and of the whole run.

        Args:
            name: name of the study; empty: only the whole run.
            now: time in seconds of the clock.
            elapsed: include the time since a running study began.
        """
        whole = f"in all {percent(self.fraction)}, {time_left(self.left_overall(now))}"
        if not name:
            return whole
        study = self.study(name)
        times = [duration(study.seconds(now))] if elapsed or study.finished is not None else []
        times += [time_left(self.left(study, now))] if study.finished is None else []
        return f"{percent(study.fraction)}  [{', '.join(times)}]  {whole}"

    def _whole(self) -> _Pace:
        return _Pace.of_all(list({id(s.pace): s.pace for s in self.studies.values()}.values()))


def _sum(numbers: Sequence[float | None]) -> float | None:
    """Add numbers; None if there are none or one is None."""
    known = [number for number in numbers if number is not None]
    return sum(known) if known and len(known) == len(numbers) else None


def check_cost(what: str, cost: float) -> None:
    """Raise ValueError for a cost that is negative or not finite."""
    if not (math.isfinite(cost) and cost >= 0):
        raise ValueError(f"progress: the cost of {what} must be finite and not below 0; got {cost}")
