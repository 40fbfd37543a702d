"""``Progress``: what a run reports while it measures."""

from __future__ import annotations

import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from threading import RLock
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from tqdm.utils import disp_len

from ...common.words import duration
from .forecast import Forecast, Study, check_cost
from .outputs import JsonLines, Log, Terminal
from .phrases import counted, described, json_row, one_line, outcome_of, percent, rounded
from .process import redirect_warnings

if TYPE_CHECKING:
    from ..trackers import Tracker

MODES = ("bar", "json", "quiet")

_LOGGED = 10.0  # seconds between lines of the log about how far a run is


class Progress:
    """Reports the progress and the remaining time of a run; a context manager.

    Inside the ``with`` statement, Python's warnings become notices. On exit the live line and the trackers
    are closed, and without a call of :meth:`end`, the exception determines the outcome. Methods may be called
    from any thread. An output that fails (disk full, pipe closed, tracker down) is dropped with one notice,
    and the run continues.

    Args:
        log: text file, to which lines are appended in every mode; None: no log.
        mode: ``"bar"``: a live line if standard error is a terminal, and notices on standard error;
            ``"json"``: one JSON object per line on standard output; ``"quiet"``: neither.
        trackers: receive the rows of every measurement; see :mod:`rft_fast.run.trackers`.
        stream: replaces standard error (bar) or standard output (json).
        clock: returns seconds that never decrease.
        now: returns the time of day; without a time zone, it is local.

    Raises:
        ValueError: ``mode`` is unknown.
    """

    def __init__(
        self,
        log: pathlib.Path | None,
        mode: str = "bar",
        trackers: Sequence[Tracker] = (),
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"progress: mode must be one of {', '.join(MODES)}; got {mode!r}")
        self._clock = clock
        self._lock = RLock()
        self._forecast = Forecast(clock())
        self._notices = mode == "bar"
        terminal = (stream or sys.stderr) if mode == "bar" else None
        lines = (stream or sys.stdout) if mode == "json" else None
        self._terminal = Terminal(terminal, self._line, clock, self._lock)
        self._json = JsonLines(lines, now, self._terminal.write)
        self._log = Log(log, now, self._terminal.write)
        self._logged = -math.inf
        self._trackers = list(trackers)
        self._shown = ("", "")  # the study and the model on the live line
        self._ended = False
        self._restore: Callable[[], None] = lambda: None

    # --- called by a run -------------------------------------------------------------------------

    def start(self, command: str, directory: pathlib.Path, resumed: int, workers: int = 1) -> None:
        """Report the start of the run.

        Args:
            command: command line of the run.
            directory: directory of the results.
            resumed: number of measurements made by earlier processes.
            workers: number of simultaneous workers, which sets how many measurements an estimate needs.
        """
        with self._lock:
            self._forecast.start(self._clock(), workers)
            there = f"; {counted(resumed, 'measurement')} already made" if resumed else ""
            beside = f"; {workers} workers" if workers > 1 else ""
            self._log.write(f"start: {command}; in {directory}{there}{beside}")
            self._json.write(
                "start", command=command, directory=str(directory), resumed=resumed, workers=workers
            )
            self._terminal.open()

    def expect(
        self,
        costs: Mapping[str, float],
        had: Mapping[str, float] | None = None,
        counts: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:
        """Set the work of the run; call again to correct the numbers of some or all studies.

        Args:
            costs: study -> cost of all its measurements, in any unit common to all studies.
            had: study -> cost of the measurements made by earlier processes.
            counts: study -> model -> number of measurements that this process makes. A model and a study are
                finished when these are made; without them, a study and its models are when its cost is
                reached.

        Raises:
            ValueError: a cost is negative or not finite, or a study of ``had`` or ``counts`` has no cost.
        """
        had, counts = had or {}, counts or {}
        for what, cost in (*costs.items(), *had.items()):
            check_cost(what, cost)
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
                self._report_finished(study)
            self._terminal.draw()

    def begin(self, study: str, model: str = "") -> None:
        """Report the start of a study or of one of its models; otherwise, the first measurement does."""
        with self._lock:
            now = self._clock()
            self._forecast.begin(study, now)
            self._announce(study)
            self._show(study, model)

    def measured(
        self, study: str, model: str, number: int, rows: Sequence[Mapping[str, object]], cost: float
    ) -> None:
        """Report a finished measurement whose rows are stored.

        Args:
            study: name of the study.
            model: name of the model.
            number: number of the measurement within study and model.
            rows: rows of the measurement.
            cost: cost of the measurement, which may be 0.

        Raises:
            ValueError: the cost is negative or not finite.
        """
        check_cost(f"{study} of {model}", cost)
        with self._lock:
            now, forecast = self._clock(), self._forecast
            this = forecast.measured(study, model, cost, now)
            self._announce(study)
            self._write_measured(this, model, number, rows, now)
            self._report_finished(this)
            if now - self._logged >= _LOGGED:
                self._logged = now
                self._log.write(one_line(study, model, forecast.text(study, now)))
            self._show(study, model)
        # Without the lock: a tracker may wait for its own thread, which may issue a warning.
        for tracker in list(self._trackers):
            self._call(tracker, partial(tracker.measured, study, model, number, rows))

    def notice(self, text: str) -> None:
        """Report a warning, a dead worker, a halved batch or the like."""
        with self._lock:
            self._log.write(f"notice: {text}")
            self._json.write("notice", text=text)
            if self._notices:
                self._terminal.write(text)

    def end(self, outcome: str) -> None:
        """Report the end of the run; only the first call counts.

        Args:
            outcome: ``"finished"``, ``"interrupted"`` or ``"failed: ..."``.
        """
        with self._lock:
            if self._ended:
                return
            self._ended = True
        try:
            self._terminal.close()
            for tracker in list(self._trackers):
                self._call(tracker, tracker.close)
        finally:
            self._trackers = []
            with self._lock:
                now = self._clock()
                for study in self._forecast.studies.values():
                    # An estimated cost may not be reached exactly.
                    study.settle(now, anyway=outcome == "finished")
                    self._report_finished(study)
                seconds = now - self._forecast.started
                self._log.write(f"end: {outcome}, after {duration(seconds)}")
                self._json.write("end", outcome=outcome, seconds=rounded(seconds))

    def __enter__(self) -> Progress:
        self._restore = redirect_warnings(self.notice)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.end(outcome_of(error))
        finally:
            self._restore()

    # --- studies and models ----------------------------------------------------------------------

    def _announce(self, name: str) -> None:
        study = self._forecast.study(name)
        if study.announced:
            return
        study.announced = True
        there = f", {percent(study.fraction)} already done" if study.had else ""
        self._log.write(f"{name}: begun{there}")
        self._json.write("study", study=name, state="begun", seconds=None)

    def _report_finished(self, study: Study) -> None:
        """Report finished models, and the study if it is finished, once each."""
        for model in study.finished_models():
            study.reported.add(model)
            self._log.write(f"{study.name}: {model} finished")
        if study.finished is not None and not study.closed:
            study.closed = True
            seconds = study.seconds(study.finished)
            self._log.write(f"{study.name}: finished in {duration(seconds)}")
            self._json.write("study", study=study.name, state="finished", seconds=rounded(seconds))

    # --- trackers --------------------------------------------------------------------------------

    def _call(self, tracker: Tracker, call: Callable[[], None]) -> None:
        """Call a tracker; if it fails, drop it with a notice."""
        try:
            call()
        except Exception as error:  # no error of a client may end the run
            self._trackers = [other for other in self._trackers if other is not tracker]
            with suppress(Exception):
                tracker.close()
            self.notice(f"{type(tracker).__name__} receives no more rows: {described(error)}")

    def _write_measured(
        self, study: Study, model: str, number: int, rows: Sequence[Mapping[str, object]], now: float
    ) -> None:
        if not self._json:  # nothing to convert the rows for
            return
        self._json.write(
            "measured",
            study=study.name,
            model=model,
            number=number,
            done=study.fraction,
            seconds=rounded(study.seconds(now)),
            seconds_left=rounded(self._forecast.left(study, now)),
            overall_done=self._forecast.fraction,
            overall_seconds=rounded(now - self._forecast.started),
            overall_seconds_left=rounded(self._forecast.left_overall(now)),
            rows=[json_row(row) for row in rows],
        )

    # --- the live line ---------------------------------------------------------------------------

    def _show(self, study: str, model: str) -> None:
        """Show a study and a model on the live line."""
        new = self._shown[0] != study
        self._shown = (study, model)
        self._terminal.draw(always=new)

    def _line(self, width: int) -> str:
        study, model = self._shown
        now = self._clock()
        line = one_line(study, model, self._forecast.text(study, now))
        if disp_len(line) > width:  # the elapsed time matters least
            line = one_line(study, model, self._forecast.text(study, now, elapsed=False), width)
        return line
