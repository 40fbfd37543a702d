"""How a run is going: what is said and written, and how long it takes, against simulated runs."""

from __future__ import annotations

import fcntl
import heapq
import io
import json
import math
import os
import pty
import random
import struct
import subprocess
import sys
import termios
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tqdm
from support import PATIENCE
from support.wording import refused, said

from rft_fast.run.progress import Progress, held_warnings

ROW = {"study": "layers", "model": "m1", "dataset": "far", "alpha": 0.5, "accuracy": 0.75}


class Clock:
    """Time that passes when told to; both the seconds and the time of day."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        zone = timezone(timedelta(hours=2))
        return datetime(2026, 3, 1, 12, 0, 0, tzinfo=zone) + timedelta(seconds=self.seconds)


def made(
    clock: Clock, log: Path | None = None, mode: str = "json", **more: Any
) -> tuple[Progress, io.StringIO]:
    stream = io.StringIO()
    return Progress(log, mode, stream=stream, clock=clock, now=clock.now, **more), stream


def events(stream: io.StringIO) -> list[dict[str, Any]]:
    def refused(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refused) for line in stream.getvalue().splitlines()]


def measurements(stream: io.StringIO) -> list[dict[str, Any]]:
    return [event for event in events(stream) if event["event"] == "measured"]


# --- how long it takes ---------------------------------------------------------------------------


def simulate(
    jobs: Sequence[tuple[str, float]],
    unit: Mapping[str, float],
    workers: int = 1,
    slower: tuple[float, float] = (math.inf, 1.0),
    expected: Mapping[str, float] | None = None,
    had: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Runs (study, cost) jobs on workers that take the next one each, ``unit`` seconds for a unit of cost.

    From the time ``slower[0]`` on, what begins takes ``slower[1]`` times as long. Returns the events,
    each with ``truth``: the seconds to the end of its study, and of everything.
    """
    ended, free = [], [0.0] * workers  # (when, order, study, cost); when each worker is free
    for order, (study, cost) in enumerate(jobs):
        begins = heapq.heappop(free)
        seconds = cost * unit[study] * (slower[1] if begins >= slower[0] else 1)
        ended.append((begins + seconds, order, study, cost))
        heapq.heappush(free, begins + seconds)
    clock = Clock()
    progress, stream = made(clock)
    with progress:
        progress.start("sweep", Path("run"), 0, workers)
        progress.expect(expected or total(jobs), had or {})
        for when, order, study, cost in sorted(ended):
            clock.seconds = when
            progress.measured(study, "m", order, [], cost)
    found = measurements(stream)
    last = {study: when for when, _, study, _ in sorted(ended)}
    for event, (when, *_rest) in zip(found, sorted(ended), strict=True):
        event["at"] = when
        event["truth"] = (last[event["study"]] - when, max(last.values()) - when)
    return found


def total(jobs: Sequence[tuple[str, float]]) -> dict[str, float]:
    return {name: sum(cost for study, cost in jobs if study == name) for name, _ in jobs}


def test_time_left_is_exact_where_a_unit_of_cost_always_takes_the_same_time() -> None:
    rng = random.Random(0)
    jobs = [
        (study, rng.uniform(0.1, 50)) for study in ("interpolation", "layers", "prune") for _ in range(40)
    ]
    for event in simulate(jobs, dict.fromkeys(total(jobs), 7.3)):
        assert (event["seconds_left"], event["overall_seconds_left"]) == pytest.approx(
            event["truth"], abs=2e-3
        )


def test_a_study_on_its_own_is_exact_from_its_second_measurement_on() -> None:
    jobs = [("interpolation", 3.0)] * 20 + [("layers", 5.0)] * 30 + [("prune", 2.0)] * 10
    found = simulate(jobs, {"interpolation": 0.01, "layers": 0.2, "prune": 0.0025})
    seen: dict[str, int] = {}
    for event in found:
        seen[event["study"]] = seen.get(event["study"], 0) + 1
        if event["study"] == "interpolation" or seen[event["study"]] >= 2:
            assert event["seconds_left"] == pytest.approx(event["truth"][0], abs=2e-3)
    # The first measurement of a study is judged by all that ran: .6 + 1 seconds for 65 units.
    first = next(event for event in found if event["study"] == "layers")
    assert first["seconds_left"] == pytest.approx(29 * 5 * 1.6 / 65, rel=2e-3)
    assert [event["overall_seconds_left"] for event in found[-9:]] == pytest.approx(
        [event["truth"][1] for event in found[-9:]], abs=2e-3
    )


def test_workers_beside_each_other_are_exact_after_every_wave() -> None:
    jobs = [("layers", 4.0)] * 20 + [("sharpness", 4.0)] * 20
    found = simulate(jobs, {"layers": 10.0, "sharpness": 10.0}, workers=4)
    assert [event["overall_seconds_left"] for event in found[:3]] == [None] * 3  # the wave is not over
    for event in found[3::4]:
        assert event["overall_seconds_left"] == pytest.approx(event["truth"][1], abs=2e-3)


def test_studies_that_run_at_the_same_time_share_a_rate() -> None:
    # One takes six times as long as the other; which of them a second was spent on, nobody can tell.
    rng = random.Random(1)
    jobs = [(rng.choice(("layers", "prune")), rng.uniform(1, 3)) for _ in range(400)]
    found = simulate(jobs, {"layers": 2.0, "prune": 12.0}, workers=8)
    for event in found[100:300]:
        assert event["overall_seconds_left"] == pytest.approx(event["truth"][1], rel=0.15)
    # In turns, and with the same cost: the common rate is exact after every pair.
    turns = simulate([("layers", 1.0), ("prune", 1.0)] * 10, {"layers": 2.0, "prune": 12.0})
    for event in turns[3::2]:
        assert event["overall_seconds_left"] == pytest.approx(event["truth"][1], rel=0.01, abs=2e-3)


def test_long_measurements_beside_short_ones() -> None:
    # Half of the workers end one every second, the others one in 100: hardly any time ends with theirs.
    jobs = (
        [("layers", 1.0)] * 4 + [("prune", 100.0)] * 4 + ([("layers", 1.0)] * 100 + [("prune", 100.0)]) * 12
    )
    jobs += [("prune", 100.0)] * 60
    found = simulate(jobs, {"layers": 1.0, "prune": 1.0}, workers=8)
    checked = [event for event in found if event["at"] >= 419 and event["truth"][1] > 400]
    assert len(checked) > 20
    for event in checked:
        assert event["overall_seconds_left"] == pytest.approx(event["truth"][1], rel=0.3)


def test_what_ran_before_at_the_same_time_does_not_spoil_what_runs_now() -> None:
    jobs = [("layers", 1.0), ("sharpness", 1.0)] * 50 + [("prune", 1.0)] * 50
    for event in simulate(jobs, {"layers": 1.0, "sharpness": 1.0, "prune": 9.0})[102:]:
        assert event["overall_seconds_left"] == pytest.approx(event["truth"][1], abs=2e-3)


def test_a_machine_that_becomes_slower_is_noticed() -> None:
    jobs = [("layers", 1.0)] * 1000
    found = simulate(jobs, {"layers": 10.0}, slower=(3600.0, 2.0))
    at_once, later = (next(e for e in found if e["at"] >= at) for at in (3620, 3600 + 3600))
    assert at_once["seconds_left"] == pytest.approx(at_once["truth"][0] / 2, rel=0.02)
    assert later["seconds_left"] == pytest.approx(later["truth"][0], rel=0.2)


def test_what_an_earlier_process_made_counts_as_done_and_says_nothing_of_speed() -> None:
    found = simulate(
        [("layers", 10.0)] * 5, {"layers": 3.0}, expected={"layers": 200.0}, had={"layers": 150.0}
    )
    assert [event["done"] for event in found] == pytest.approx([0.8, 0.85, 0.9, 0.95, 1.0])
    assert [event["seconds_left"] for event in found] == pytest.approx([120, 90, 60, 30, 0])
    assert found[-1]["done"] == found[-1]["overall_done"] == 1


def test_measurements_that_cost_nothing() -> None:
    clock = Clock()
    progress, stream = made(clock)
    progress.start("sweep", Path("run"), 0)
    progress.expect({"layers": 4.0, "prune": 0.0}, counts={"layers": {"m": 4}, "prune": {"m": 2}})
    for number, (study, cost) in enumerate([("layers", 0), ("layers", 2), ("layers", 2), ("layers", 0),
                                            ("prune", 0), ("prune", 0)]):  # fmt: skip
        clock.seconds += 5 * cost
        progress.measured(study, "m", number, [], cost)
    found = measurements(stream)
    assert [event["overall_seconds_left"] for event in found] == [None, 10, 0, 0, 0, 0]
    assert [event["overall_done"] for event in found] == [0, 0.5, 1, 1, 1, 1]
    # Counts tell when a study is over: not at the last measurement that costs something.
    ends = [event for event in events(stream) if event.get("state") == "finished"]
    assert [(event["study"], event["seconds"]) for event in ends] == [("layers", 20), ("prune", 0)]
    order = [event["event"] for event in events(stream)]
    assert order == ["start", "study", *["measured"] * 4, "study", "study", *["measured"] * 2, "study"]


def test_a_study_ends_with_its_cost_whatever_the_rounding_of_sums() -> None:
    progress, stream = made(Clock())
    progress.expect({"layers": 1.0})
    for number in range(10):  # ten times .1 is not 1 in floating point
        progress.measured("layers", "m", number, [], 0.1)
    kinds = [event.get("state", event["event"]) for event in events(stream)]
    assert kinds == ["begun", *["measured"] * 10, "finished"]
    assert measurements(stream)[-2]["done"] == pytest.approx(0.9) and measurements(stream)[-1]["done"] == 1


def test_what_was_before_the_first_study_is_no_measuring() -> None:
    clock = Clock()
    progress, stream = made(clock)
    progress.start("sweep", Path("run"), 0)
    progress.expect({"layers": 4.0})
    clock.seconds = 100  # models are read
    progress.begin("layers", "m")
    clock.seconds = 110
    progress.measured("layers", "m", 0, [], 1.0)
    (found,) = measurements(stream)
    assert (found["seconds"], found["seconds_left"], found["overall_seconds"]) == (10, 30, 110)


def test_better_numbers_later() -> None:
    clock = Clock()
    progress, stream = made(clock)
    progress.expect({"layers": 2.0, "prune": 100.0})
    for number in range(2):
        clock.seconds += 8
        progress.measured("layers", "m", number, [], 1.0)
    progress.expect({"prune": 3.0})  # layers stays as it was
    clock.seconds += 8
    progress.measured("prune", "m", 0, [], 1.0)
    progress.expect({"prune": 4.0}, counts={"prune": {"m": 4}})
    clock.seconds += 8
    progress.measured("prune", "m", 1, [], 1.0)
    assert [event["overall_seconds_left"] for event in measurements(stream)] == [808, 800, 16, 16]
    assert [event["overall_done"] for event in measurements(stream)] == pytest.approx(
        [1 / 102, 2 / 102, 0.6, 4 / 6]
    )


def test_a_study_that_nobody_expected_has_no_time_left_to_tell() -> None:
    clock = Clock()
    progress, stream = made(clock)
    progress.expect({"layers": 1.0})
    clock.seconds += 1
    progress.measured("prune", "m", 0, [], 1.0)
    (found,) = measurements(stream)
    assert [found[name] for name in ("done", "seconds_left", "overall_done", "overall_seconds_left")] == [
        None
    ] * 4
    with refused(ValueError, "sharpness"):
        progress.expect({"layers": 1.0}, had={"sharpness": 1.0})


@pytest.mark.parametrize("seed", range(20))
def test_no_number_is_ever_negative_or_not_finite(seed: int) -> None:
    rng = random.Random(seed)
    clock = Clock()
    progress, stream = made(clock)
    names = ["a", "b", "c"]
    progress.start("sweep", Path("run"), 0, rng.randint(1, 4))
    progress.expect({name: rng.choice([0, 1e-300, 1, 1e18]) for name in names})
    for number in range(60):
        clock.seconds += rng.choice([0, 0, 1e-9, 1, 1e6])
        progress.measured(rng.choice(names), "m", number, [], rng.choice([0, 5e-324, 1e-3, 1e17]))
        if rng.random() < 0.1:
            progress.expect({rng.choice(names): rng.choice([0, 1e17, 1e19])})
    found = measurements(stream)
    assert len(found) == 60
    for event in found:
        for name in ("done", "overall_done"):
            assert 0 <= event[name] <= 1
        for name in ("seconds", "seconds_left", "overall_seconds", "overall_seconds_left"):
            assert event[name] is None or 0 <= event[name] < math.inf


@pytest.mark.parametrize("cost", [-1.0, math.nan, math.inf])
def test_costs_that_are_none_are_refused(cost: float) -> None:
    progress, stream = made(Clock())
    with refused(ValueError):
        progress.expect({"layers": cost})
    with refused(ValueError):
        progress.measured("layers", "m", 0, [], cost)
    assert stream.getvalue() == ""


# --- JSON ----------------------------------------------------------------------------------------


def test_json_lines_are_strict_and_complete() -> None:
    clock = Clock()
    progress, stream = made(clock)
    row = {"dataset": "far", "ood": True, "layer": None, "rho": pd.NA, "alpha": 0.25, "draws": 4,
           "loss": float("nan"), "loss_se": float("inf"), "rise": float("-inf"), "accuracy": np.float32(0.5),
           "samples": np.int64(9), "reached": np.bool_(False), "seed": 2**40}  # fmt: skip
    with progress:
        progress.start("sweep 'a b'", Path("runs/1"), 3)
        progress.expect({"layers": 4.0})
        clock.seconds = 2.5
        progress.measured("layers", "m1", 7, [row, {"alpha": 1.0}], 1.0)
        progress.notice("two\nlines")
    start, begun, measured, notice, finished, end = events(stream)
    assert start == {"event": "start", "time": "2026-03-01T12:00:00.000+02:00", "command": "sweep 'a b'",
                     "directory": "runs/1", "resumed": 3, "workers": 1}  # fmt: skip
    assert begun == {"event": "study", "time": "2026-03-01T12:00:02.500+02:00", "study": "layers",
                     "state": "begun", "seconds": None}  # fmt: skip
    assert measured == {
        "event": "measured", "time": "2026-03-01T12:00:02.500+02:00", "study": "layers", "model": "m1",
        "number": 7, "done": 0.25, "seconds": 2.5, "seconds_left": 7.5, "overall_done": 0.25,
        "overall_seconds": 2.5, "overall_seconds_left": 7.5,
        "rows": [{"dataset": "far", "ood": True, "alpha": 0.25, "draws": 4, "loss": "nan", "loss_se": "inf",
                  "rise": "-inf", "accuracy": 0.5, "samples": 9, "reached": False, "seed": 2**40},
                 {"alpha": 1.0}],
    }  # fmt: skip
    assert notice["text"] == "two\nlines"
    assert (finished["event"], finished["state"], finished["seconds"]) == ("study", "finished", 2.5)
    # Nobody said how it ended, and there was no exception.
    assert end == {
        "event": "end",
        "time": "2026-03-01T12:00:02.500+02:00",
        "outcome": "finished",
        "seconds": 2.5,
    }


def test_the_local_time_has_its_offset() -> None:
    stream = io.StringIO()
    before = datetime.now().astimezone()
    Progress(None, "json", stream=stream).notice("now")
    at = datetime.fromisoformat(events(stream)[0]["time"])
    assert at.utcoffset() == before.utcoffset()
    assert timedelta(seconds=-0.001) <= at - before < timedelta(seconds=60)  # milliseconds, cut


BROKEN = """
import sys
from pathlib import Path
from rft_fast.run.progress import Progress
with Progress(Path(sys.argv[1]), "json") as progress:
    progress.start("sweep", Path("run"), 0)
    input()  # until the other side has closed
    for number in range(3):
        progress.measured("layers", "m", number, [], 1.0)
    print("the report")
"""


@pytest.mark.slow
def test_a_reader_that_leaves_does_not_end_the_run(tmp_path: Path) -> None:
    run = subprocess.Popen([sys.executable, "-c", BROKEN, str(tmp_path / "run.log")], stdin=subprocess.PIPE,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert run.stdin and run.stdout and run.stderr
    assert json.loads(run.stdout.readline())["event"] == "start"
    run.stdout.close()
    run.stdin.write("\n")
    run.stdin.close()
    said(run.stderr.read(), "[Errno 32] Broken pipe")
    assert run.wait() == 0
    said((tmp_path / "run.log").read_text().splitlines()[-1])


# --- the log -------------------------------------------------------------------------------------


def test_the_log(tmp_path: Path) -> None:
    clock, log = Clock(), tmp_path / "run.log"
    for mode in ("bar", "json", "quiet"):
        clock.seconds = 0
        progress, _ = made(clock, log, mode)
        with progress:
            progress.start("sweep\n--out x", Path("runs/1"), 12)
            progress.expect({"layers": 60.0, "prune": 4.0}, {"layers": 20.0}, {"layers": {"a": 10, "b": 30}})
            for model, count in (("a", 10), ("b", 30)):
                for number in range(count):
                    clock.seconds += 2
                    progress.measured("layers", model, number, [ROW], 1.0)
            progress.notice("a worker died:\r\n\x1b[31mkilled\u2028now")
            progress.measured("prune", "b", 0, [ROW], 4.0)
            progress.end("failed: no\npower")
            progress.end("finished")  # it is said already
        wanted = """\
12:00:00  start: sweep --out x; in runs/1; 12 measurements already made
12:00:02  layers: begun, 35 % already done
12:00:02  layers  a  35 %  [2.0 s, 78 s left]  in all 32 %, 86 s left
12:00:12  layers  a  43 %  [12 s, 68 s left]  in all 40 %, 76 s left
12:00:20  layers: a finished
12:00:22  layers  b  51 %  [22 s, 58 s left]  in all 48 %, 66 s left
12:00:32  layers  b  60 %  [32 s, 48 s left]  in all 56 %, 56 s left
12:00:42  layers  b  68 %  [42 s, 38 s left]  in all 64 %, 46 s left
12:00:52  layers  b  76 %  [52 s, 28 s left]  in all 71 %, 36 s left
12:01:02  layers  b  85 %  [62 s, 18 s left]  in all 79 %, 26 s left
12:01:12  layers  b  93 %  [72 s, 8.0 s left]  in all 87 %, 16 s left
12:01:20  layers: b finished
12:01:20  layers: finished in 80 s
12:01:20  notice: a worker died: \\u001b[31mkilled now
12:01:20  prune: begun
12:01:20  prune: b finished
12:01:20  prune: finished in 0.0 s
12:01:20  end: failed: no power, after 80 s
"""
        assert log.read_text() == "".join(f"2026-03-01 {line}\n" for line in wanted.splitlines())
        log.unlink()


def test_the_log_is_added_to_and_an_unfinished_line_is_closed(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    log.write_text("2026-01-01 00:00:00  start: sweep\n2026-01-01 00:00:0")
    clock = Clock()
    progress, _ = made(clock, log, "quiet")
    progress.notice("α")
    progress.notice("b")
    assert log.read_text(encoding="utf-8").splitlines() == [
        "2026-01-01 00:00:00  start: sweep",
        "2026-01-01 00:00:0",
        "2026-03-01 12:00:00  notice: α",
        "2026-03-01 12:00:00  notice: b",
    ]


@pytest.mark.parametrize("mode", ["bar", "json", "quiet"])
@pytest.mark.parametrize("kind", ["full", "missing"])
def test_a_log_that_cannot_be_written_is_said_once(
    kind: str, mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, why = {
        "full": (Path("/dev/full"), "No space left on device"),
        "missing": (tmp_path / "none" / "run.log", "No such file or directory"),
    }[kind]
    if kind == "full" and not log.exists():
        pytest.skip("needs /dev/full")
    clock = Clock()
    stream = io.StringIO() if mode == "json" else None
    with Progress(log, mode, stream=stream, clock=clock, now=clock.now) as progress:
        progress.start("sweep", Path("run"), 0)
        progress.measured("layers", "m", 0, [], 1.0)
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    said(printed.err, why)
    if stream is not None:
        assert events(stream)[-1]["outcome"] == "finished"


# --- how it ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "finished"),
        (KeyboardInterrupt(), "interrupted"),
        (OSError("disk gone"), "failed: OSError: disk gone"),
        (ValueError(), "failed: ValueError"),
    ],
)
def test_the_end_that_nobody_told(error: BaseException | None, outcome: str) -> None:
    progress, stream = made(Clock())
    try:
        with progress:
            progress.measured("layers", "m", 0, [], 1.0)
            if error:
                raise error
    except BaseException as caught:
        assert caught is error
    found = events(stream)
    assert found[-1]["event"] == "end" and found[-1]["outcome"] == outcome
    # Only what is finished is called so.
    assert [e["state"] for e in found if e["event"] == "study"] == ["begun", "finished"][
        : 1 + (error is None)
    ]


def test_modes_are_checked() -> None:
    with refused(ValueError, "loud"):
        Progress(None, "loud")


# --- warnings ------------------------------------------------------------------------------------


def test_warnings_become_notices_and_are_left_alone_afterwards() -> None:
    before = warnings.showwarning
    progress, stream = made(Clock())
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        mine = warnings.showwarning
        with progress:
            threads = [threading.Thread(target=warnings.warn, args=(f"text {i}",)) for i in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            with warnings.catch_warnings(record=True) as caught:
                warnings.warn("for somebody else", stacklevel=1)
        assert warnings.showwarning is mine
    assert warnings.showwarning is before
    assert [str(warning.message) for warning in caught] == ["for somebody else"]
    notices = [event["text"] for event in events(stream) if event["event"] == "notice"]
    assert sorted(text[:19] for text in notices) == [f"UserWarning: text {i}" for i in range(8)]
    assert all(" (threading.py, line " in text for text in notices)


def test_tqdms_own_warnings_go_their_own_way() -> None:
    # They may come while tqdm's lock is held, for which a thread that holds ours may be waiting.
    heard: list[str] = []
    progress, stream = made(Clock())
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: heard.append(str(message))
        with progress:
            warnings.warn("tqdm's", tqdm.TqdmWarning, stacklevel=1)
            warnings.warn("ours", stacklevel=1)
    assert heard == ["tqdm's"]
    assert [e["text"].split(" (")[0] for e in events(stream) if e["event"] == "notice"] == [
        "UserWarning: ours"
    ]


def test_measurements_from_many_threads() -> None:
    progress, stream = made(Clock())
    progress.expect({"layers": 400.0}, counts={"layers": {f"m{i}": 50 for i in range(8)}})

    def work(model: str) -> None:
        for number in range(50):
            progress.measured("layers", model, number, [ROW], 1.0)

    threads = [threading.Thread(target=work, args=(f"m{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [event["done"] for event in measurements(stream)] == pytest.approx(
        [i / 400 for i in range(1, 401)]
    )
    assert {(e["model"], e["number"]) for e in measurements(stream)} == {
        (f"m{i}", number) for i in range(8) for number in range(50)
    }


FORKED = """
import os, sys, warnings
from pathlib import Path
from rft_fast.run.progress import Progress
with Progress(Path(sys.argv[1]), "quiet") as progress, progress._lock:  # as if a thread were writing
    child = os.fork()
    if child == 0:
        warnings.warn("from a worker")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    warnings.warn("from the run")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_warnings_before_a_progress_are_held_and_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    with held_warnings() as texts:
        warnings.warn("early", stacklevel=1)
    assert len(texts) == 1 and texts[0].startswith("UserWarning: early (test_progress.py, line ")
    assert capsys.readouterr().err == ""
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), held_warnings():
            warnings.warn(f"in vain: {error}", stacklevel=1)
            raise error
        assert capsys.readouterr().err.startswith("UserWarning: in vain: ")


@pytest.mark.slow
def test_a_forked_worker_warns_by_itself(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    run = subprocess.run(
        [sys.executable, "-W", "always::UserWarning", "-c", FORKED, str(log)],
        stderr=subprocess.PIPE,
        text=True,
        timeout=PATIENCE,
    )
    assert run.returncode == 0
    assert "UserWarning: from a worker" in run.stderr and "from the run" not in run.stderr
    assert "UserWarning: from the run" in log.read_text() and "worker" not in log.read_text()


# --- the terminal --------------------------------------------------------------------------------


class Screen:
    """A terminal of 80 columns that knows what is needed here; it refuses anything else."""

    def __init__(self, columns: int = 80) -> None:
        self.columns, self.row, self.column = columns, 0, 0
        self.cells: dict[tuple[int, int], str] = {}

    def feed(self, text: str) -> None:
        for piece in text.replace("\x1b[A", "\x00"):
            if piece == "\r":
                self.column = 0
            elif piece == "\n":
                self.row += 1
            elif piece == "\x00":
                self.row -= 1
            else:
                assert piece.isprintable(), repr(piece)
                if self.column == self.columns:
                    self.row, self.column = self.row + 1, 0
                self.cells[self.row, self.column] = piece
                self.column += 1

    @property
    def lines(self) -> list[str]:
        height = max((row for row, _ in self.cells), default=-1) + 1
        rows = ["".join(self.cells.get((row, c), " ") for c in range(self.columns)) for row in range(height)]
        while rows and not rows[-1].strip():
            rows.pop()
        return [row.rstrip() for row in rows]


@contextmanager
def terminal(columns: int = 80) -> Iterator[tuple[Any, Any]]:
    """A real terminal: a stream to write to, and a function that gives what can then be seen."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    os.set_blocking(master, False)
    screen = Screen(columns or 80)
    with open(slave, "w", encoding="utf-8") as stream:

        def look() -> list[str]:
            stream.flush()
            data = b""
            try:
                while piece := os.read(master, 65536):
                    data += piece
            except BlockingIOError:
                pass
            screen.feed(data.decode())
            return screen.lines

        yield stream, look
    os.close(master)


def test_the_live_line_leaves_nothing_behind() -> None:
    clock = Clock()
    with terminal() as (stream, look):
        with Progress(None, stream=stream, clock=clock, now=clock.now) as progress:
            progress.start("sweep", Path("run"), 0)
            assert look() == ["in all ? %, ? left"]
            progress.expect({"layers": 100.0, "layer-sharpness": 300.0})
            progress.begin("layers", "m1")
            assert look() == ["layers  m1  0 %  [0.0 s, ? left]  in all 0 %, ? left"]
            clock.seconds = 600
            progress.measured("layers", "m1", 0, [], 20.0)
            assert look() == ["layers  m1  20 %  [10 min, 40 min left]  in all 5 %, 3 h 10 min left"]
            progress.notice("the batch is halved")
            line = "layers  m1  20 %  [10 min, 40 min left]  in all 5 %, 3 h 10 min left"
            assert look() == ["the batch is halved", line]
            tqdm.tqdm.write("somebody else", file=stream)
            assert look() == ["the batch is halved", "somebody else", line]
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.warn("odd", stacklevel=1)
            said = look()
            assert said[2].startswith("UserWarning: odd (test_progress.py, line ") and said[3:] == [line]
            with tqdm.tqdm(total=3, desc="reading", file=stream, leave=False, ncols=60) as bar:
                bar.update(2)
                bar.refresh()
                assert look()[3] == line and look()[4].startswith("reading:  67%")
            clock.seconds = 3000
            progress.measured("layers", "m1", 1, [], 80.0)
            long = "lr1e-5-ep4-wd0.5-seed1-of-a-very-long-name-indeed"
            progress.measured("layer-sharpness", long, 0, [], 3.0)
            (shown,) = look()[3:]
            assert shown == (
                "layer-sharpness  lr1...ed  1 %  [2 h 24 min left]  in all 25 %, 2 h 24 min left"
            )
            progress.measured("layer-sharpness", "m12", 0, [], 0.0)
            clock.seconds = 3000.25
            progress.measured("layer-sharpness", "m12", 0, [], 0.0)
            assert look()[3:] == [
                "layer-sharpness  m12  1 %  [2 h 24 min left]  in all 25 %, 2 h 24 min left"
            ]
        assert look() == ["the batch is halved", "somebody else", said[2]]


def test_others_that_write_to_standard_output_do_not_garble_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal() as (stream, look):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "stdout", stream)
        with Progress(None, clock=Clock()) as progress:
            progress.start("sweep", Path("run"), 0)
            tqdm.tqdm.write("to standard output")
            assert look() == ["to standard output", "in all ? %, ? left"]
        assert look() == ["to standard output"]


@pytest.mark.parametrize("columns", [20, 40, 0])
def test_the_live_line_fits_narrow_terminals(columns: int) -> None:
    clock = Clock()
    with terminal(columns) as (stream, look):  # 0: it does not tell its size; then there are 80
        with Progress(None, stream=stream, clock=clock, now=clock.now) as progress:
            progress.start("sweep", Path("run"), 0)
            progress.expect({"layer-sharpness": 10.0})
            for number in range(9):
                clock.seconds += 1000
                progress.measured("layer-sharpness", "模型" * 9, number, [], 1.0)
                (line,) = look()
                assert line.startswith("layer-sharpness  ")
        assert look() == []


def test_the_line_goes_on_while_a_measurement_takes_long() -> None:
    clock = Clock()
    with terminal() as (stream, look), Progress(None, stream=stream, clock=clock) as progress:
        progress.start("sweep", Path("run"), 0)
        progress.expect({"layers": 2.0})
        clock.seconds = 60
        progress.measured("layers", "m1", 0, [], 1.0)
        assert look() == ["layers  m1  50 %  [60 s, 60 s left]  in all 50 %, 60 s left"]
        clock.seconds = 85
        wanted = ["layers  m1  50 %  [85 s, 35 s left]  in all 50 %, 35 s left"]
        until = time.monotonic() + PATIENCE
        while look() != wanted and time.monotonic() < until:
            time.sleep(0.05)
        assert look() == wanted


def test_without_a_terminal_only_notices_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    for mode, err in (("bar", "halved\n"), ("quiet", "")):
        clock = Clock()
        with Progress(None, mode, clock=clock) as progress:
            progress.start("sweep", Path("run"), 0)
            progress.expect({"layers": 2.0})
            progress.measured("layers", "m1", 0, [], 1.0)
            progress.notice("halved")
        printed = capsys.readouterr()
        assert (printed.out, printed.err) == ("", err)


# --- trackers ------------------------------------------------------------------------------------


class Recorder:
    """A tracker that keeps what it gets, and fails from some call on."""

    def __init__(self, good: int = 1000, closes: bool = True) -> None:
        self.good, self.closes, self.calls, self.closed = good, closes, [], 0  # type: ignore[var-annotated]

    def measured(self, study: str, model: str, number: int, rows: Sequence[Mapping[str, object]]) -> None:
        if len(self.calls) == self.good:
            raise ConnectionError("no\nnetwork")
        self.calls.append((study, model, number, list(rows)))

    def close(self) -> None:
        self.closed += 1
        if not self.closes:
            raise RuntimeError("cannot finish")


def test_a_tracker_that_fails_is_dropped_and_the_others_go_on() -> None:
    good, bad, unclosed = Recorder(), Recorder(good=1), Recorder(closes=False)
    progress, stream = made(Clock(), trackers=[bad, good, unclosed])
    with progress:
        for number in range(3):
            progress.measured("layers", "m", number, [ROW], 1.0)
    wanted = [("layers", "m", number, [ROW]) for number in range(3)]
    assert good.calls == unclosed.calls == wanted and bad.calls == wanted[:1]
    assert good.closed == 1 and bad.closed == 1
    assert [event["text"] for event in events(stream) if event["event"] == "notice"] == [
        "Recorder receives no more rows: ConnectionError: no\nnetwork",
        "Recorder receives no more rows: RuntimeError: cannot finish",
    ]
    assert events(stream)[-1]["event"] == "end"  # after all notices
