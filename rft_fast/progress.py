"""How a run is going: a line on the terminal, a log to read, JSON for machines. docs/progress.md shows them.

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

import json
import math
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from threading import Event, RLock, Thread
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

import pandas as pd
from tqdm import TqdmWarning, tqdm
from tqdm.utils import disp_len, disp_trim

from .cost.table import duration

if TYPE_CHECKING:
    from .trackers import Tracker

MODES = ("bar", "json", "quiet")

_HALF_LIFE = 600.0  # seconds after which a rate has forgotten half
_FEW = 2  # measurements for each worker before a study's own rate is believed
_NOTHING = 1e-9  # a share of the cost that is only the rounding of a sum
_LOGGED, _DRAWN, _TICK = 10.0, 0.1, 1.0  # seconds between lines of the log, pictures of the bar, its ticks
_WIDTH = 80  # of a terminal that does not tell


class Progress:
    """Tells people and machines how a run is going; use it in a ``with`` statement.

    Meanwhile Python's warnings become notices. On exit the bar and the trackers are closed; where
    :meth:`end` was not called, the exception tells how it ended. Methods may be called from any thread.
    What cannot be written any more (disk full, pipe closed, tracker down) is left out from then on, which
    is said once; the run goes on.

    Args:
        log: file that gets lines appended, in every mode; None: none.
        mode: ``"bar"``: a live line where standard error is a terminal, and notices on standard error;
            ``"json"``: one JSON object a line on standard output; ``"quiet"``: neither.
        trackers: get every measurement's rows; see :mod:`rft_fast.trackers`.
        stream: instead of standard error (bar) or standard output (json).
        clock: seconds that never go back.
        now: the time of day; without a time zone, local time.

    Raises:
        ValueError: no such mode.
    """

    def __init__(
        self,
        log: Path | None,
        mode: str = "bar",
        trackers: Sequence[Tracker] = (),
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"progress: mode must be one of {', '.join(MODES)}; got {mode!r}")
        self._clock, self._now = clock, now
        self._lock = RLock()  # taken before tqdm's own, never while that is held
        self._forecast = _Forecast(clock())
        self._log = log
        self._logged = -math.inf
        self._trackers = list(trackers)
        self._json = (stream or sys.stdout) if mode == "json" else None
        self._terminal = (stream or sys.stderr) if mode == "bar" else None
        self._bar: Any = None
        self._drawn = -math.inf
        self._ticker: Thread | None = None
        self._stop = Event()
        self._shown: tuple[str, str] | None = None  # the study and model on the live line
        self._ended = False
        self._restore: Callable[[], None] = lambda: None

    # --- what a run calls ------------------------------------------------------------------------

    def start(self, command: str, directory: Path, resumed: int, workers: int = 1) -> None:
        """The run starts.

        Args:
            command: what was asked.
            directory: where the results go.
            resumed: how many measurements an earlier process has made.
            workers: how many measure at the same time. They only tell how many measurements a rate
                needs before it is believed.
        """
        with self._lock:
            self._forecast.start(self._clock(), workers)
            there = f"; {_number(resumed, 'measurement')} there already" if resumed else ""
            beside = f"; {workers} workers" if workers > 1 else ""
            self._write(f"start: {command}; in {directory}{there}{beside}")
            self._emit("start", command=command, directory=str(directory), resumed=resumed, workers=workers)
            self._open_bar()

    def expect(
        self,
        costs: Mapping[str, float],
        had: Mapping[str, float] | None = None,
        counts: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:
        """What there is to do. May be called again with better numbers, for some studies or all.

        Args:
            costs: study -> cost of all its measurements, in any unit that is the same for all.
            had: study -> cost of those that an earlier process made.
            counts: study -> model -> how many measurements this process makes, from its start. They tell
                exactly when a model and a study are finished. Without them a study is when its cost
                is reached, and its models are with it.

        Raises:
            ValueError: a cost that is negative or not finite; a study in ``had`` or ``counts`` that has
                no cost.
        """
        had, counts = had or {}, counts or {}
        for what, cost in (*costs.items(), *had.items()):
            _check_cost(what, cost)
        with self._lock:
            unknown = sorted({*had, *counts} - set(costs) - set(self._forecast.studies))
            if unknown:
                raise ValueError(
                    f"progress: expected the costs of {unknown}, too; got those of {sorted(costs)}"
                )
            now = self._clock()
            for name in {**costs, **had, **counts}:
                study = self._forecast.study(name)
                study.total = float(costs[name]) if name in costs else study.total
                study.had = float(had.get(name, study.had))
                study.wanted = dict(counts.get(name, study.wanted))
                study.settle(now)
                self._say_finished(study)
            self._draw(now)

    def begin(self, study: str, model: str = "") -> None:
        """A study, or a model of it, begins. Need not be called: its first measurement tells, only later."""
        with self._lock:
            now = self._clock()
            self._forecast.begin(study, now)
            self._announce(study)
            self._show(study, model, now)

    def measured(
        self, study: str, model: str, number: int, rows: Sequence[Mapping[str, object]], cost: float
    ) -> None:
        """A measurement is made, and its rows are safe.

        Args:
            number: of the measurement within its study and model.
            cost: that of this measurement; 0 is fine.

        Raises:
            ValueError: a cost that is negative or not finite.
        """
        _check_cost(f"{study} of {model}", cost)
        with self._lock:
            now, forecast = self._clock(), self._forecast
            this = forecast.measured(study, model, cost, now)
            self._announce(study)
            self._emit_measured(this, model, number, rows, now)
            self._say_finished(this)
            if now - self._logged >= _LOGGED:
                self._logged = now
                self._write(_line(study, model, forecast.text(study, now)))
            self._show(study, model, now)
        # Outside the lock: a tracker may wait for a thread of its own, which may be about to warn.
        for tracker in list(self._trackers):
            self._call(tracker, partial(tracker.measured, study, model, number, rows))

    def notice(self, text: str) -> None:
        """Something worth knowing: a warning, a dead worker, a halved batch."""
        with self._lock:
            self._write(f"notice: {text}")
            self._emit("notice", text=text)
            if self._terminal is not None:
                self._tell(text)

    def end(self, outcome: str) -> None:
        """The run ends; only the first call counts.

        Args:
            outcome: ``"finished"``, ``"interrupted"`` or ``"failed: ..."``.
        """
        with self._lock:
            if self._ended:
                return
            self._ended = True
        try:
            self._close_bar()
            for tracker in list(self._trackers):
                self._call(tracker, tracker.close)
        finally:
            self._trackers = []
            with self._lock:
                now = self._clock()
                for study in self._forecast.studies.values():
                    # The cost of a study may have been estimated, and not be reached exactly.
                    study.settle(now, anyway=outcome == "finished")
                    self._say_finished(study)
                seconds = now - self._forecast.started
                self._write(f"end: {outcome}, after {duration(seconds)}")
                self._emit("end", outcome=outcome, seconds=_rounded(seconds))

    def __enter__(self) -> Progress:
        self._restore = _redirect_warnings(self.notice)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.end(_outcome(error))
        finally:
            self._restore()

    # --- studies and models ----------------------------------------------------------------------

    def _announce(self, name: str) -> None:
        study = self._forecast.study(name)
        if study.announced:
            return
        study.announced = True
        there = f", {_percent(study.fraction)} there already" if study.had else ""
        self._write(f"{name}: begun{there}")
        self._emit("study", study=name, state="begun", seconds=None)

    def _say_finished(self, study: _Study) -> None:
        """Says which models are finished, and whether the study is, once each."""
        for model in study.finished_models():
            study.told.add(model)
            self._write(f"{study.name}: {model} finished")
        if study.finished is not None and not study.closed:
            study.closed = True
            seconds = study.seconds(study.finished)
            self._write(f"{study.name}: finished in {duration(seconds)}")
            self._emit("study", study=study.name, state="finished", seconds=_rounded(seconds))

    # --- trackers --------------------------------------------------------------------------------

    def _call(self, tracker: Tracker, call: Callable[[], None]) -> None:
        """A call of a tracker; one that fails is dropped, and it is said why."""
        try:
            call()
        except Exception as error:  # whatever their clients raise must not end the run
            self._trackers = [other for other in self._trackers if other is not tracker]
            with suppress(Exception):
                tracker.close()
            self.notice(f"{type(tracker).__name__} gets no more rows: {_said(error)}")

    # --- log and JSON ----------------------------------------------------------------------------

    def _write(self, text: str) -> None:
        """A line of the log. The file is opened for each: it is always whole, and may be moved."""
        if self._log is None:
            return
        line = f"{self._now():%Y-%m-%d %H:%M:%S}  {_plain(text)}\n"
        try:
            with self._log.open("a+b") as file:
                # A process that died in the middle of a line has left it open.
                if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
                    line = "\n" + line
                file.write(line.encode("utf-8", "backslashreplace"))
        except OSError as error:
            self._log = None
            self._tell(f"the log is not written any more, the run goes on: {error}")

    def _emit(self, event: str, **fields: object) -> None:
        """A line of JSON."""
        if self._json is None:
            return
        moment = self._now()
        moment = moment if moment.tzinfo else moment.astimezone()
        stamped = {"event": event, "time": moment.isoformat(timespec="milliseconds"), **fields}
        line = json.dumps(stamped, allow_nan=False)
        try:
            self._json.write(line + "\n")
            self._json.flush()
        except (OSError, ValueError) as error:  # ValueError: closed on our side
            _discard(self._json)
            self._json = None
            self._tell(f"nobody reads the JSON lines any more, the run goes on: {error}")

    def _emit_measured(
        self, study: _Study, model: str, number: int, rows: Sequence[Mapping[str, object]], now: float
    ) -> None:
        if self._json is None:
            return
        self._emit(
            "measured",
            study=study.name,
            model=model,
            number=number,
            done=study.fraction,
            seconds=_rounded(study.seconds(now)),
            seconds_left=_rounded(self._forecast.left(study, now)),
            overall_done=self._forecast.fraction,
            overall_seconds=_rounded(now - self._forecast.started),
            overall_seconds_left=_rounded(self._forecast.left_overall(now)),
            rows=[_json_row(row) for row in rows],
        )

    # --- the terminal ----------------------------------------------------------------------------

    def _tell(self, text: str) -> None:
        """A line on the terminal, above the live one."""
        with suppress(OSError, ValueError, AttributeError):  # there may be no standard error (None)
            tqdm.write(_plain(text), file=self._terminal or sys.stderr)
            (self._terminal or sys.stderr).flush()

    def _open_bar(self) -> None:
        if self._terminal is None or not self._terminal.isatty() or self._bar is not None or self._ended:
            return
        # tqdm's, so that its other bars and tqdm.write of anybody keep out of the way of this one.
        # Its size is no matter: the line is made to fit here.
        self._bar = tqdm(file=self._terminal, bar_format="{desc}", leave=False, ncols=10_000, nrows=20)
        self._draw(self._clock())
        self._ticker = Thread(target=self._tick, name="progress", daemon=True)
        self._ticker.start()

    def _close_bar(self) -> None:
        self._stop.set()
        if self._ticker is not None:
            self._ticker.join(10 * _TICK)
        with self._lock:
            bar, self._bar = self._bar, None
            if bar is not None:
                with suppress(OSError, ValueError):
                    bar.close()

    def _tick(self) -> None:
        """Keeps the time on the line going while a measurement takes long."""
        while not self._stop.wait(_TICK):
            with self._lock:
                self._draw(self._clock())

    def _show(self, study: str, model: str, now: float) -> None:
        """Puts a study and model on the line, at most every tenth of a second unless the study is new."""
        new = self._shown is None or self._shown[0] != study
        self._shown = (study, model)
        if new or now - self._drawn >= _DRAWN:
            self._draw(now)

    def _draw(self, now: float) -> None:
        if self._bar is None:
            return
        self._drawn = now
        width = _columns(self._terminal)
        study, model = self._shown or ("", "")
        line = _line(study, model, self._forecast.text(study, now))
        if disp_len(line) > width:  # the time it took is missed least
            line = _line(study, model, self._forecast.text(study, now, took=False), width)
        with suppress(OSError, ValueError):  # the terminal is gone
            self._bar.set_description_str(line)


# --- how long it takes ---------------------------------------------------------------------------


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
class _Study:
    """A study's costs. total: None where nobody told. wanted, made: measurements of this process by model."""

    name: str
    pace: _Pace = field(default_factory=_Pace)
    total: float | None = None
    had: float = 0.0
    done: float = 0.0
    wanted: dict[str, int] = field(default_factory=dict)
    made: Counter[str] = field(default_factory=Counter)
    told: set[str] = field(default_factory=set)  # the models that are said to be finished
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
            if model not in self.told
            and (self.finished is not None or made >= self.wanted.get(model, math.inf))
        ]

    def seconds(self, now: float) -> float:
        """Since it began, until it finished."""
        if self.begun is None:
            return 0.0
        return (now if self.finished is None else self.finished) - self.begun


class _Forecast:
    """What is done and what is left, in cost and in seconds. See the module's first lines."""

    def __init__(self, now: float) -> None:
        self.studies: dict[str, _Study] = {}
        self.started = now
        self._workers = 1
        self._last = now  # when the last measurement ended
        self._order: list[str] = []  # studies, in the order of their last measurements
        self._current = ""  # the study that the time since then belongs to

    def start(self, now: float, workers: int) -> None:
        self.started = self._last = now
        self._workers = workers

    def study(self, name: str) -> _Study:
        return self.studies.setdefault(name, _Study(name))

    def begin(self, name: str, now: float) -> None:
        if not self._order:
            self._last = now  # what was before the first study was no measuring
        self._current = name
        study = self.study(name)
        study.begun = now if study.begun is None else study.begun

    def measured(self, name: str, model: str, cost: float, now: float) -> _Study:
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

    def left(self, study: _Study, now: float) -> float | None:
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

    def text(self, name: str, now: float, took: bool = True) -> str:
        """How far a study and the whole are, in words; no study named: the whole."""
        whole = f"in all {_percent(self.fraction)}, {_left(self.left_overall(now))}"
        if not name:
            return whole
        study = self.study(name)
        times = [duration(study.seconds(now))] if took or study.finished is not None else []
        times += [_left(self.left(study, now))] if study.finished is None else []
        return f"{_percent(study.fraction)}  [{', '.join(times)}]  {whole}"

    def _whole(self) -> _Pace:
        return _Pace.of_all(list({id(s.pace): s.pace for s in self.studies.values()}.values()))


def _sum(numbers: Sequence[float | None]) -> float | None:
    """None where one is missing, or all."""
    known = [number for number in numbers if number is not None]
    return sum(known) if known and len(known) == len(numbers) else None


# --- words ---------------------------------------------------------------------------------------


def _check_cost(what: str, cost: float) -> None:
    if not (math.isfinite(cost) and cost >= 0):
        raise ValueError(f"progress: the cost of {what} must be finite and not below 0; got {cost}")


def _percent(fraction: float | None) -> str:
    """Rounded down, so that 100 % means all."""
    return "? %" if fraction is None else f"{math.floor(100 * fraction + _NOTHING)} %"


def _left(seconds: float | None) -> str:
    return "? left" if seconds is None else f"{duration(seconds)} left"


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _line(study: str, model: str, rest: str, width: int | None = None) -> str:
    """The parts on one line; where that is too long, the model's name gives way in its middle."""

    def joined(model: str) -> str:
        return _plain("  ".join(part for part in (study, model, rest) if part))

    short, kept = model, len(model)
    while width is not None and disp_len(joined(short)) > width and short:
        kept -= 1
        short = f"{model[: (kept + 1) // 2]}...{model[len(model) - kept // 2 :]}" if kept > 0 else ""
    line = joined(short)
    return line if width is None else str(disp_trim(line, width))


def _plain(text: str) -> str:
    """Text as one line that does nothing to a terminal."""
    text = re.sub(r"[^\S ]+", " ", text.strip())
    return "".join(c if c.isprintable() else "?" for c in text)


def _rounded(seconds: float | None) -> float | None:
    """To milliseconds."""
    return None if seconds is None else round(seconds, 3)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _outcome(error: BaseException | None) -> str:
    if error is None:
        return "finished"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {_said(error)}"


def _json_row(row: Mapping[str, object]) -> dict[str, object]:
    """A row as strict JSON: without what is missing, and what is not finite as a word."""
    return {
        name: _json_value(value) for name, value in row.items() if value is not None and value is not pd.NA
    }


def _json_value(value: Any) -> object:
    if hasattr(value, "item"):  # numpy's and torch's numbers
        value = value.item()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    return value if isinstance(value, bool | int | str) else str(value)


def _columns(terminal: TextIO | None) -> int:
    """What fits on a line of a terminal; not its last column, after which some would wrap."""
    try:
        columns = os.get_terminal_size(terminal.fileno()).columns if terminal else 0
    except (OSError, ValueError):  # no terminal of the system's
        columns = 0
    return (columns or _WIDTH) - 1


# --- what belongs to the process -----------------------------------------------------------------


@contextmanager
def held_warnings() -> Iterator[list[str]]:
    """Meanwhile Python's warnings become texts in the list, for a :class:`Progress` that is not there yet.

    Where that never comes, because of an error, they are printed on standard error.
    """
    texts: list[str] = []
    restore = _redirect_warnings(texts.append)
    try:
        yield texts
    except BaseException:
        for text in texts:
            print(text, file=sys.stderr)
        raise
    finally:
        restore()


def _redirect_warnings(notice: Callable[[str], None]) -> Callable[[], None]:
    """Sends Python's warnings to ``notice`` until the function that is returned is called."""
    before, process = warnings.showwarning, os.getpid()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        # Not those that are on their way to a file; not in a forked worker, where our lock may be held
        # by a thread that is not there; not those that tqdm raises while it holds its lock.
        if file is not None or os.getpid() != process or issubclass(category, TqdmWarning):
            before(message, category, filename, lineno, file, line)
        else:
            notice(f"{category.__name__}: {message} ({Path(filename).name}, line {lineno})")

    def restore() -> None:
        if warnings.showwarning is show:  # else somebody has put another in its place since
            warnings.showwarning = before

    warnings.showwarning = show
    return restore


def _discard(stream: TextIO) -> None:
    """Lets standard output go nowhere. What waits in its buffer would fail again when Python exits."""
    if stream is sys.stdout:
        with suppress(OSError, ValueError):  # no file of the system's
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
