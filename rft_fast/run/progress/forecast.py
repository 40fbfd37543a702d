"""How much is done, and how long the rest takes.

How long is left: seconds for a unit of cost, times the cost that is left, summed over the studies. The
seconds are of the wall clock and of this process alone, so that workers beside each other need no account
of their own:

- The time from one measurement's end to the next one's belongs to the study of the latter.
- Studies that take turns ran at the same time, on several workers. Whose the time was cannot be told, so
  from then on they share one rate: all their seconds for all their cost.
- A rate forgets: what was seen counts half after 10 minutes, or after half of the time seen where that is
  longer. So a slower machine shows soon, and one odd measurement among few does not.
- Until a study has made two measurements for each worker, the rate of everything that ran is used for it.

It is exact where a unit of cost always takes the same time, and for a study that ran on its own from its
second measurement on, whatever a unit took in those before. With several workers it is too long until
their longest measurements have ended once, since what is in flight is not seen, and a little too short at the
end of a phase, when some find nothing more to do.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..cost.table import duration
from .phrases import percent, time_left

_HALF_LIFE = 600.0  # seconds after which a rate has forgotten half
_FEW = 2  # measurements for each worker before a study's own rate is believed
_NOTHING = 1e-9  # a share of the cost that is only the rounding of a sum


class _Pace:
    """Seconds for a unit of cost, of late."""

    def __init__(self) -> None:
        self.seconds = self.cost = 0.0  # both forget alike
        self.whole = 0.0
        self.count = 0  # of measurements that cost something

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
    """A study's costs. total: None where nobody told. wanted, made: measurements of this process by model."""

    name: str
    pace: _Pace = field(default_factory=_Pace)
    total: float | None = None
    had: float = 0.0
    done: float = 0.0
    wanted: dict[str, int] = field(default_factory=dict)
    made: Counter[str] = field(default_factory=Counter)
    reported: set[str] = field(default_factory=set)  # the models that are said to be finished
    begun: float | None = None
    finished: float | None = None
    announced: bool = False  # is it said that it began?
    closed: bool = False  # is it said that it is finished?

    def settle(self, now: float, anyway: bool = False) -> None:
        """Finds out whether the study is finished; ``anyway``: it is, if it ever began."""
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
        """Cost that is left; None where nobody told."""
        return self._rest if self.finished is None else 0.0

    @property
    def fraction(self) -> float | None:
        """Of the cost that is done; None where nobody told."""
        remaining = self.remaining
        if not remaining:
            return None if remaining is None else 1.0
        return 1 - remaining / (self.total or remaining)

    def finished_models(self) -> list[str]:
        """Those that have all their measurements and are not yet said to be finished."""
        return [
            model
            for model, made in self.made.items()
            if model not in self.reported
            and (self.finished is not None or made >= self.wanted.get(model, math.inf))
        ]

    def seconds(self, now: float) -> float:
        """Since it began, until it finished."""
        if self.begun is None:
            return 0.0
        return (now if self.finished is None else self.finished) - self.begun


class Forecast:
    """What is done and what is left, in cost and in seconds. See above."""

    def __init__(self, now: float) -> None:
        self.studies: dict[str, Study] = {}
        self.started = now
        self._workers = 1
        self._last = now  # when the last measurement ended
        self._order: list[str] = []  # studies, in the order of their last measurements
        self._current = ""  # the study that the time since then belongs to

    def start(self, now: float, workers: int) -> None:
        self.started = self._last = now
        self._workers = workers

    def study(self, name: str) -> Study:
        return self.studies.setdefault(name, Study(name))

    def begin(self, name: str, now: float) -> None:
        if not self._order:
            self._last = now  # what was before the first study was no measuring
        self._current = name
        study = self.study(name)
        study.begun = now if study.begun is None else study.begun

    def measured(self, name: str, model: str, cost: float, now: float) -> Study:
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
        """One rate for studies that run at the same time, and for those that ran with them before."""
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
        """Seconds that a study still takes; None where that is not known."""
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
        return _sum([self.left(study, now) for study in self.studies.values()])

    @property
    def fraction(self) -> float | None:
        """Of the cost of all studies; None where that is not known."""
        left = _sum([study.remaining for study in self.studies.values()])
        if left is None:
            return None
        total = sum(study.total or 0.0 for study in self.studies.values())
        return 1.0 if left == 0 else (total - left) / total

    def text(self, name: str, now: float, elapsed: bool = True) -> str:
        """How far a study and the whole are, in words; no study named: the whole."""
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
    """None where one is missing, or all."""
    known = [number for number in numbers if number is not None]
    return sum(known) if known and len(known) == len(numbers) else None


def check_cost(what: str, cost: float) -> None:
    if not (math.isfinite(cost) and cost >= 0):
        raise ValueError(f"progress: the cost of {what} must be finite and not below 0; got {cost}")
