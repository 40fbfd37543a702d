"""A run's directory: nothing is lost, nothing is half there, nothing that is not ours is touched."""

from __future__ import annotations

import csv
import errno
import json
import math
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import torch
from support import PATIENCE
from support.wording import command_refused, refused, said

from rft_fast import __version__, results, studies
from rft_fast.common import disk
from rft_fast.evaluate import Scores
from rft_fast.results import __main__ as command
from rft_fast.results import database, schema

COLUMNS = studies.COLUMNS
PAGE = 4096
CONFIG: dict[str, Any] = {
    "finetuned": {"m": {"sha256": "1"}, "a": {"sha256": "2"}},
    "versions": {"rft_fast": __version__, "python": "3.11.7", "torch": "2.9"},
}
FORK = multiprocessing.get_context("fork")


def row(model: str = "m", study: str = "interpolation", **more: object) -> dict[str, object]:
    return {"study": study, "model": model, "dataset": "d", "ood": True, "alpha": 0.5, "samples": 7,
            "loss": 1 / 3, "accuracy": 0.1, **more}  # fmt: skip


def truth(number: int) -> list[dict[str, object]]:
    """The rows of a measurement in tests that need many: from 1 to 4 of them."""
    draw = random.Random(number)
    return [
        row(alpha=draw.random(), loss=draw.random(), dataset=f"d{i}" * 20, draws=number)
        for i in range(1 + number % 4)
    ]


def without_missing(rows: Iterable[Mapping[str, object]]) -> list[dict[str, object]]:
    return [{name: value for name, value in one.items() if value is not None} for one in rows]


def files(folder: Path) -> dict[str, bytes]:
    """All files but the lock, and what SQLite keeps in memory that processes share."""
    found = [file for file in folder.rglob("*") if file.is_file() and not file.name.endswith("-shm")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in found if file.name != ".lock"}


def same(found: pd.DataFrame, rows: Iterable[Mapping[str, object]]) -> None:
    pd.testing.assert_frame_equal(found, studies.frame(rows), check_exact=True)


def read_csv(file: Path) -> list[dict[str, Any]]:
    """Through the standard library, which reads every float exactly."""
    read: dict[str, Any] = {
        "string": str,
        "float64": float,
        "Int64": int,
        "boolean": {"True": True, "False": False}.__getitem__,
    }
    with file.open(newline="", encoding="utf-8") as stream:
        table = csv.DictReader(stream)
        assert table.fieldnames == list(COLUMNS)
        return [
            {name: read[kind](line[name]) if line[name] else None for name, kind in COLUMNS.items()}
            for line in table
        ]


def read_sqlite(file: Path) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    """Measurements with their rows, by SQL alone."""
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    with closing(sqlite3.connect(file)) as base:
        for study, model, number in base.execute("SELECT study, model, number FROM measurements"):
            assert (study, model, number) not in found
            found[study, model, number] = []
        query = f"""SELECT m.study, m.model, m.number, {", ".join(f'rows."{c}"' for c in COLUMNS)} FROM rows
            JOIN measurements AS m ON m.id = rows.measurement ORDER BY rows.rowid"""
        for line in base.execute(query):
            found[line[:3]].append(dict(zip(COLUMNS, line[3:], strict=True)))
        assert base.execute("SELECT count(*) FROM rows").fetchone()[0] == sum(map(len, found.values()))
    return found


def child(work: Callable[[], object]) -> int:
    """Runs this in a process of its own; returns its exit status."""
    process = FORK.Process(target=work, daemon=True)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def leave(out: Path, numbers: Iterable[int], config: Mapping[str, object] = CONFIG) -> None:
    """Measures in a process that ends as if it was killed."""

    def work() -> None:
        run = results.Run(out, config)
        for number in numbers:
            run.add("interpolation", "m", number, truth(number))
        os._exit(9)

    assert child(work) == 9


# --- rows ---------------------------------------------------------------------------------------------

ODD = {
    "string": ["", 'a "quoted", one', "two\nlines\r\n", "ü 漢字 🙂", "it's; DROP TABLE", "nan", "\x00", None],
    "float64": [math.nan, math.inf, -math.inf, 5e-324, 1.7976931348623157e308, 0.1 + 0.2, -1 / 3, 7.0, None],
    "Int64": [2**63 - 1, -(2**63), 0, 2**53 + 1, None],
    "boolean": [True, False, None],
}  # fmt: skip


def test_every_value_comes_back(tmp_path: Path) -> None:
    count = max(map(len, ODD.values()))
    rows: list[dict[str, Any]] = [
        {name: ODD[kind][i % len(ODD[kind])] for name, kind in COLUMNS.items()} for i in range(count)
    ]
    for one in rows:
        one |= {"study": "prune", "model": 'it\'s "m"\n'}
    with results.Run(tmp_path, {}) as run:
        run.add("prune", 'it\'s "m"\n', 3, rows)
        again = run.measurement("prune", 'it\'s "m"\n', 3)
        same(run.rows(), rows)
    assert [list(map(repr, one.items())) for one in again] == [list(map(repr, one.items())) for one in rows]
    loaded = results.load(tmp_path)
    same(loaded, rows)
    assert dict(loaded.dtypes.map(str)) == COLUMNS
    for one, expected in zip(read_csv(tmp_path / "rows.csv"), rows, strict=True):
        # An empty text and a missing one look the same in CSV; a measured NaN and a missing number do not.
        assert repr(one) == repr({name: None if value == "" else value for name, value in expected.items()})


def test_sqlite_has_the_numbers(tmp_path: Path) -> None:
    with results.Run(tmp_path, {}) as run:
        run.add("layers", "m", 0, [row(study="layers", loss=math.nan, loss_se=None, rise=-math.inf)])
        run.add("layers", "m", 1, [])
    found = read_sqlite(tmp_path / "rows.sqlite")
    assert list(found) == [("layers", "m", 0), ("layers", "m", 1)] and found["layers", "m", 1] == []
    (one,) = found["layers", "m", 0]
    expected = {name: None for name in COLUMNS} | row(study="layers", loss="nan", rise=-math.inf, ood=1)
    assert one == expected


def test_values_of_other_libraries_are_stored_as_numbers(tmp_path: Path) -> None:
    table = pd.DataFrame({"samples": [9], "seed": [2**62 + 1], "gain": [0.25], "ood": [True], "on": ["x"]})
    odd = {name: table[name].iloc[0] for name in table}
    odd |= {"loss": np.float32(0.1), "draws": np.int32(3), "control": np.bool_(False), "noise": np.str_("n")}
    with results.Run(tmp_path, {}) as run:
        run.add(np.str_("interpolation"), np.str_("m"), np.int64(4), [row(**odd)])
        run.scores("z")[np.str_("d"), np.float64(0.0)] = some_scores(1)
        run.scores("z")[np.str_("d"), 1] = some_scores(2)
        assert run.done("interpolation", "m") == {4} and ("d", 1.0) in run.scores("z")
    expected = row(samples=9, seed=2**62 + 1, gain=0.25, on="x", loss=0.10000000149011612, draws=3)
    with results.Run(tmp_path, {}) as run:  # which looks at all checksums
        assert without_missing(run.measurement("interpolation", "m", 4)) == [
            {name: {**expected, "control": False, "noise": "n"}[name] for name in COLUMNS if name in
             {*expected, "control", "noise"}}
        ]  # fmt: skip


def test_a_zero_has_no_sign(tmp_path: Path) -> None:
    with results.Run(tmp_path, {}) as run:
        run.add("interpolation", "m", 0, [row(gain=-0.0)])
    with results.Run(tmp_path, {}) as run:
        (one,) = run.measurement("interpolation", "m", 0)
    assert math.copysign(1, float(str(one["gain"]))) == 1


def test_the_order_is_the_requests_whoever_measured_when(tmp_path: Path) -> None:
    config = {"finetuned": {"b": 1, "a": 2}}
    rows, measurements = [], []
    for study in ("interpolation", "layers", "sharpness", "layer-sharpness", "prune", "a study to come"):
        for model in ("b", "a", "unnamed", "another"):
            for number in (0, 2, 10):
                of = [row(model, study, seed=number, draws=i) for i in range(1 + number % 3)]
                rows += of
                measurements.append((study, model, number, of))
    for seed in range(3):
        shuffled = random.Random(seed).sample(measurements, len(measurements))
        unnamed = [model for _, model, *_ in shuffled if model in ("unnamed", "another")]
        if unnamed[0] == "unnamed":  # those come as they appear
            break
    with results.Run(tmp_path, config) as run:
        for one in shuffled:
            run.add(*one)
        same(run.rows(), rows)
    same(results.load(tmp_path), rows)
    expected = [{name: one.get(name) for name in COLUMNS} for one in rows]
    assert read_csv(tmp_path / "rows.csv") == expected


def test_what_a_run_leaves_behind(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    config = {"alphas": [0.1], "name": "ü"}
    with results.Run(out, config) as run:
        assert run.resumed == 0
        for number in range(3):
            run.add("interpolation", "m", number, [row(seed=number)])
            same(results.load(out), [row(seed=n) for n in range(number + 1)])
            assert not (out / "rows.csv").exists()
        assert run.figure("interpolation") == out / "figures" / "interpolation.png"
        assert run.table("cost") == out / "cost.csv"
    assert json.loads((out / "config.json").read_text(encoding="utf-8")) == config
    # One file that can be copied: no log beside it.
    assert {file.name for file in out.iterdir()} == {
        "rows.sqlite", "rows.csv", "config.json", "figures", ".lock"
    }  # fmt: skip
    assert (out / "rows.sqlite").read_bytes()[18:20] == b"\x01\x01"  # nor is one expected


def test_rows_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    with results.Run(tmp_path, {}) as run:
        run.add("interpolation", "m", 0, [row()])
        with refused(ValueError, "m"):
            run.add("interpolation", "m", 0, [row(loss=2.0)])
        with refused(ValueError, "m"):
            run.add("interpolation", "m", 1, [row(), row(study="layers")])
        with refused(ValueError, "a"):
            run.add("interpolation", "m", 1, [row("a")])
        with refused(ValueError, "accurcy"):
            run.add("interpolation", "m", 1, [row(), row(accurcy=0.5)])
        for name, value, kind in (
            ("seed", 2**63, "Int64"), ("seed", 1.5, "Int64"), ("draws", math.nan, "Int64"),
            ("draws", math.inf, "Int64"), ("loss", "high", "float64"), ("ood", "yes", "boolean"),
        ):  # fmt: skip
            with refused(ValueError, kind, name, f"{value!r}"):
                run.add("interpolation", "m", 1, [row(), row(**{name: value})])
        with refused(ValueError, "m"):
            run.measurement("interpolation", "m", 1)
        same(run.rows(), [row()])
        assert run.done("interpolation", "m") == {0}
        run.add("interpolation", "m", 1, [row(loss=2.0)])
        assert without_missing(run.measurement("interpolation", "m", 1)) == [row(loss=2.0)]


def test_a_run_may_be_closed_twice(tmp_path: Path) -> None:
    with results.Run(tmp_path, {}) as run:
        run.add("interpolation", "m", 0, [row()])
        run.close()
        with results.Run(tmp_path, {}) as again:  # which has the place now
            again.add("interpolation", "m", 1, [row()])
    assert len(results.load(tmp_path)) == len(read_csv(tmp_path / "rows.csv")) == 2


def test_loading_from_nowhere_is_refused_and_makes_nothing(tmp_path: Path) -> None:
    for read in (results.load, results.recover):
        with refused(FileNotFoundError):
            read(tmp_path)
    assert results.recorded(tmp_path) is None
    assert not list(tmp_path.iterdir())


# --- others meanwhile ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_another_process_reads_while_it_runs(tmp_path: Path) -> None:
    code = f"""
from rft_fast import results
print(results.load({str(tmp_path)!r})["draws"].tolist(), results.recorded({str(tmp_path)!r}))
"""
    with results.Run(tmp_path, {"seed": 3}) as run:
        run.add("interpolation", "m", 0, [row(draws=5), row(draws=6)])
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        assert done.stdout.strip() == "[5, 6] {'seed': 3}"
        run.add("interpolation", "m", 1, [row()])  # and that leaves the writer alone


@pytest.mark.parametrize("network", [False, True])
def test_a_reader_never_sees_half_a_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: bool
) -> None:
    monkeypatch.setattr(database, "on_network", lambda file: network)
    results.Run(tmp_path, CONFIG).close()
    enough = FORK.Event()

    def work() -> None:
        with results.Run(tmp_path, CONFIG) as run:
            for number in range(100_000):
                if enough.is_set():
                    break
                time.sleep(0.005)
                run.add("interpolation", "m", number, truth(number))

    process = FORK.Process(target=work, daemon=True)
    process.start()
    seen: set[int] = set()
    while len(seen) < 10 and process.is_alive():
        rows = results.load(tmp_path)
        seen.add(len(rows))
        measured = len(set(rows["draws"]))
        same(rows, [one for number in range(measured) for one in truth(number)])
    enough.set()
    process.join()
    assert process.exitcode == 0 and len(seen) == 10


def test_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready, told = os.pipe()

    def work() -> None:
        with results.Run(tmp_path, CONFIG) as run:
            run.add("interpolation", "m", 0, truth(0))
            os.write(told, b"!")
            time.sleep(600)

    process = FORK.Process(target=work, daemon=True)
    process.start()
    assert os.read(ready, 1) == b"!"
    before = files(tmp_path)
    facts = process.pid, "--workers"
    for call in (
        lambda: results.Run(tmp_path, CONFIG),
        lambda: results.Run(tmp_path, CONFIG, overwrite=True),
        lambda: results.check(tmp_path),
        lambda: results.check(tmp_path, overwrite=True),
        lambda: results.recover(tmp_path),
    ):
        with refused(ValueError, *facts):
            call()
    with monkeypatch.context() as patch:  # both have looked before either began
        patch.setattr("rft_fast.results.directory.refuse_in_use", lambda directory: None)
        with refused(ValueError, *facts):
            results.Run(tmp_path, CONFIG)
    assert files(tmp_path) == before
    process.kill()
    process.join()
    results.check(tmp_path)
    with results.Run(tmp_path, CONFIG) as run:
        assert run.resumed == 1
        with refused(ValueError, os.getpid()):
            results.Run(tmp_path, CONFIG)
    results.check(tmp_path)
    for end in (ready, told):
        os.close(end)


# --- killed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [False, True])
def test_what_was_added_outlives_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: bool
) -> None:
    monkeypatch.setattr(database, "on_network", lambda file: network)
    leave(tmp_path, range(5))
    same(results.load(tmp_path), [one for number in range(5) for one in truth(number)])
    with results.Run(tmp_path, CONFIG) as run:
        assert run.resumed == 5 and run.done("interpolation", "m") == set(range(5))
        assert run.done("interpolation", "a") == run.done("layers", "m") == set()
        # What is said to be written is on the disk: the log is flushed at each commit.
        (mode,), (flush,) = (
            run._database.execute(f"PRAGMA {name}").fetchone() for name in ("journal_mode", "synchronous")
        )
    assert (mode, flush) == (("delete", 3) if network else ("wal", 2))  # EXTRA, FULL


@pytest.mark.slow
@pytest.mark.parametrize("network", [False, True])
def test_killed_at_random_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: bool) -> None:
    monkeypatch.setattr(database, "on_network", lambda file: network)
    draw = random.Random(int(network))
    in_flight = 0
    acknowledged: set[int] = set()
    for attempt in range(20):
        read, write = os.pipe()

        def work(write: int = write) -> None:
            with results.Run(tmp_path, CONFIG) as run:
                for number in range(100_000):
                    if number not in run.done("interpolation", "m"):
                        run.add("interpolation", "m", number, truth(number))
                        os.write(write, b"%d\n" % number)

        process = FORK.Process(target=work, daemon=True)
        process.start()
        os.close(write)
        with open(read, "rb") as stream:
            numbers = set()
            if attempt % 2:  # every other time it may still be opening
                numbers |= {int(stream.readline()) for _ in range(draw.randrange(1, 12))}
            time.sleep(draw.random() * (0.01 if attempt % 2 else 0.15))
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            numbers |= {int(line) for line in stream.read().split(b"\n")[:-1]}
        in_flight += bool(numbers)
        assert not numbers & acknowledged  # none is made twice
        acknowledged |= numbers
        if (tmp_path / "rows.sqlite").exists():
            rows = results.load(tmp_path)
            there = set(rows["draws"].tolist())
            assert acknowledged <= there and there == set(range(len(there)))
            same(rows, [one for number in sorted(there) for one in truth(number)])
    assert in_flight >= 10
    with results.Run(tmp_path, CONFIG) as run:
        assert run.resumed == len(there)
        run.add("layers", "m", 0, [row(study="layers")])
    assert len(results.load(tmp_path)) == len(rows) + 1


class Mortal(sqlite3.Connection):
    """A connection whose process dies before a statement."""

    left = 0

    @classmethod
    def step(cls) -> None:
        if cls.left == 0:
            os._exit(9)
        cls.left -= 1

    def execute(self, *arguments: Any) -> Any:
        self.step()
        return super().execute(*arguments)

    def executemany(self, *arguments: Any) -> Any:
        self.step()
        return super().executemany(*arguments)


def die_after(steps: int, work: Callable[[], object]) -> bool:
    """Does this in a process that dies after so many statements, removed and replaced files.

    Returns whether it died.
    """
    connect, unlink, replace = sqlite3.connect, os.unlink, os.replace

    def counted(action: Callable[..., object]) -> Callable[..., object]:
        def counting(*arguments: Any, **more: Any) -> object:
            Mortal.step()
            return action(*arguments, **more)

        return counting

    def dying() -> None:
        Mortal.left = steps
        sqlite3.connect = lambda *a, **k: connect(*a, factory=Mortal, **k)  # type: ignore[assignment]
        os.unlink, os.replace = counted(unlink), counted(replace)  # type: ignore[assignment]
        work()
        os._exit(0)

    status = child(dying)
    assert status in (0, 9)
    return status == 9


@pytest.mark.slow
def test_killed_between_any_two_steps_of_beginning(tmp_path: Path) -> None:
    def work() -> None:
        results.Run(out, CONFIG).add("interpolation", "m", 0, truth(3))

    counts = []
    for steps in range(1000):
        out = tmp_path / str(steps)
        died = die_after(steps, work)
        if (out / "rows.sqlite").exists():
            counts.append(len(results.load(out)))
        if not died:
            break
        with results.Run(out, CONFIG) as run:
            assert run.resumed in (0, 1) and run.config == CONFIG
            if not run.resumed:
                run.add("interpolation", "m", 0, truth(3))
            same(run.rows(), truth(3))
    assert steps > 20 and set(counts) == {0, 4}  # all four rows, or none


@pytest.mark.slow
def test_killed_between_any_two_steps_of_replacing(tmp_path: Path) -> None:
    old = tmp_path / "old"
    leave(old, range(3))  # all of it in the log beside it
    for name in ("interpolation.png", "mine.png"):
        (old / "figures" / name).write_bytes(name.encode())
    new = {**CONFIG, "seed": 1}
    states = set()
    for steps in range(1000):
        out = tmp_path / str(steps)
        shutil.copytree(old, out)

        def work(out: Path = out) -> None:
            results.Run(out, new, overwrite=True)

        died = die_after(steps, work)
        # It is the old run, or none, or the new one; never a part of one.
        there = results.recorded(out)
        states.add(None if there is None else there.get("seed", 0))
        rows = results.load(out)
        same(rows, [one for n in range(3) for one in truth(n)] if there == CONFIG else [])
        with results.Run(out, new, overwrite=there == CONFIG) as run:
            assert run.resumed == 0 and run.config == new
        assert (out / "figures" / "mine.png").read_bytes() == b"mine.png"
        assert not (out / "figures" / "interpolation.png").exists()
        if not died:
            break
    assert states == {0, None, 1}


def no_tables(file: Path) -> None:
    with closing(sqlite3.connect(file)) as base:
        base.execute("CREATE TABLE one (a)")
        base.execute("DROP TABLE one")
    assert file.stat().st_size > 0


@pytest.mark.parametrize("make", [Path.touch, no_tables])
def test_a_database_with_nothing_in_it_is_no_run(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "rows.sqlite")
    results.check(tmp_path)
    assert results.recorded(tmp_path) is None and results.load(tmp_path).empty
    with results.Run(tmp_path, CONFIG) as run:
        assert run.resumed == 0
        run.add("interpolation", "m", 0, [row()])
    same(results.load(tmp_path), [row()])


def test_rows_of_a_run_whose_database_was_emptied_are_kept(tmp_path: Path) -> None:
    with results.Run(tmp_path, CONFIG) as run:
        run.add("interpolation", "m", 0, [row()])
    (tmp_path / "rows.sqlite").write_bytes(b"")
    before = files(tmp_path)
    for overwrite in (False, True):
        with refused(ValueError, "rows.csv", "config.json", "rows.sqlite"):
            results.Run(tmp_path, CONFIG, overwrite=overwrite)
    assert files(tmp_path) == before


def test_a_run_that_fails_keeps_its_rows(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), results.Run(tmp_path, {}) as run:
        run.add("interpolation", "m", 0, [row()])
        raise KeyboardInterrupt
    same(results.load(tmp_path), [row()])
    assert len(read_csv(tmp_path / "rows.csv")) == 1


# --- going on, or not ---------------------------------------------------------------------------------


def test_a_run_goes_on_with_the_same_configuration(tmp_path: Path) -> None:
    first = [row(dataset="d", seconds=1.0), row(dataset="e", seconds=None)]
    with results.Run(tmp_path, {**CONFIG, "date": "then"}) as run:
        run.add("interpolation", "m", 4, first)
    (tmp_path / "config.json").unlink()
    with results.Run(tmp_path, {**CONFIG, "date": "now"}) as run:
        assert run.resumed == 1 and run.config["date"] == "then"
        assert run.done("interpolation", "m") == {4}
        again = run.measurement("interpolation", "m", 4)
        assert list(again[0]) == list(COLUMNS)
        assert without_missing(again) == without_missing(first)
        run.add("interpolation", "m", 0, [row()])
    assert json.loads((tmp_path / "config.json").read_text())["date"] == "then"
    same(results.load(tmp_path), [row(), *first])


ASKED: dict[str, Any] = {
    "command": "python -m rft_fast.sweep --xi 0.02", "date": "2026-01-02", "platform": "Linux", "threads": 2,
    "zoo": "digits", "arch": None, "alphas": [0.0, 0.5, 1.0], "xi": 0.02, "seed": 0, "everything": True,
    "zeroshot": {"path": "/a/z.pt", "format": None, "sha256": "0"},
    "finetuned": {"m": {"path": "/a/m.pt", "sha256": "1"}, "a": {"path": "/a/a.pt", "sha256": "2"}},
    "head": {"templates": ["a {}."], "given": None},
    "data": {"near": {"path": "/d", "ood": False, "samples": 10, "sha256 of labels": "3"}},
    "batch_size": 32, "impl": "cpp", "device": "cpu", "device_name": "",
    "versions": {"rft_fast": __version__, "python": "3.11.7", "torch": "2.9"},
}  # fmt: skip


def changed(key: str, value: object, config: Mapping[str, Any] = ASKED) -> dict[str, Any]:
    """The configuration with another value at a dotted key; None: without it."""
    copy: dict[str, Any] = json.loads(json.dumps(config))
    *outer, last = key.split(".")
    table = copy
    for name in outer:
        table = table[name]
    if value is None:
        del table[last]
    else:
        table[last] = value
    return copy


@pytest.mark.parametrize(
    ("key", "value", "there", "now"),
    [
        ("zoo", "fasttext", "digits", "fasttext"),
        ("arch", "ViT-B-32", "None", "ViT-B-32"),
        ("alphas", [0.0, 1.0], "[0.0, 0.5, 1.0]", "[0.0, 1.0]"),
        ("xi", 0.03, "0.02", "0.03"),
        ("seed", 1, "0", "1"),
        ("everything", False, "True", "False"),
        ("zeroshot.sha256", "9", "0", "9"),
        ("finetuned.a.sha256", "9", "2", "9"),
        ("finetuned.new", {"sha256": "4"}, "nothing", "4"),
        ("finetuned.a", None, "2", "nothing"),
        ("head.templates", ["b {}."], "['a {}.']", "['b {}.']"),
        ("data.near.samples", 11, "10", "11"),
        ("data.near.ood", True, "False", "True"),
        ("batch_size", 64, "32", "64"),
        ("impl", "triton", "cpp", "triton"),
        ("device_name", "H100", "", "H100"),
        ("versions.torch", "2.10", "2.9", "2.10"),
        pytest.param("versions.rft_fast", "0.0.1", __version__, "0.0.1", id="versions.rft_fast"),
        ("xi", None, "0.02", "nothing"),
        ("more", 1, "nothing", "1"),
    ],
)
def test_another_configuration_is_refused(
    tmp_path: Path, key: str, value: object, there: str, now: str
) -> None:
    with results.Run(tmp_path, ASKED) as run:
        run.add("interpolation", "m", 0, [row()])
    before = files(tmp_path)
    other = changed(key, value)
    name = {"finetuned.new": "finetuned.new.sha256", "finetuned.a": "finetuned.a.sha256"}.get(key, key)
    facts = name, there, now, "--overwrite"
    with refused(ValueError, *facts):
        results.Run(tmp_path, other)
    if value is not None:  # what is not asked is not compared: it is not known yet
        with refused(ValueError, *facts):
            results.check(tmp_path, config=other)
        with refused(ValueError, *facts):
            results.check(tmp_path, config={key.split(".")[0]: other[key.split(".")[0]]})
    assert files(tmp_path) == before
    results.check(tmp_path, overwrite=True, config=other)
    assert files(tmp_path) == before


def test_named_values_differ_by_their_names() -> None:
    def config(*tables: list[Any]) -> dict[str, Any]:
        return {"settings": {"coefficients": {"tables": list(tables)}}}

    a, other, b, c = ["a", [[None, 1.0]]], ["a", [[None, 0.5]]], ["b", [["x", 0.5]]], ["c", []]
    for there, now, told in [
        (config(a, b), config(other, c), "a has another content, b only in the run, c only requested"),
        (config(a, b), config(b, a), "another order"),
        (config(a), config(), "a only in the run"),
    ]:
        assert results.differences(there, now) == [f"--alpha-table: {told}"]
    assert results.differences(config(a, b), config(a, b)) == []


@pytest.mark.parametrize(
    ("there", "now", "remedy"),
    [
        ("0.7.0.dev0", "0.7.0.dev0", None),
        ("0.7.0.dev0", "0.7.0.dev3+g1a2b3c", None),
        ("0.7.0.dev3", "0.7.0.dev0", None),  # the newer one's run, as long as its rows can be read
        ("0.7.0", "0.7.0+cu12", None),
        ("0.6.0", "0.7.0", "pip install rft-fast==0.6.0"),
        ("0.6.0", "0.7.0.dev0", "pip install rft-fast==0.6.0"),
        ("0.7.0rc1", "0.7.0", "pip install rft-fast==0.7.0rc1"),
        ("0.7.0.dev0", "0.7.0", "from the source that made it"),  # which is at no index
        ("0.6.0.dev0", "0.7.0.dev0", "from the source that made it"),
    ],
)
def test_only_the_release_that_began_a_run_resumes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str, now: str, remedy: str | None
) -> None:
    monkeypatch.setattr("rft_fast.results.loading.__version__", there)
    with results.Run(tmp_path, changed("versions.rft_fast", there)) as run:
        run.add("interpolation", "m", 0, [row()])
    monkeypatch.setattr("rft_fast.results.loading.__version__", now)
    other = changed("versions.rft_fast", now)
    if remedy is None:
        results.check(tmp_path, config=other)
        with results.Run(tmp_path, other) as run:
            assert run.resumed == 1
    else:
        for attempt in (results.check, results.Run):
            with refused(results.Mismatch, there, now, remedy):
                attempt(tmp_path, config=other)
    same(results.load(tmp_path), [row()])  # any of them can be read


@pytest.mark.parametrize(
    ("there", "now"), [("0.8.0", "0.7.0"), ("0.8.0.dev0", "0.7.0.dev0"), ("0.7.0", "0.7.0.dev0")]
)
def test_the_run_of_a_newer_version_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str, now: str
) -> None:
    monkeypatch.setattr("rft_fast.results.loading.__version__", there)
    results.Run(tmp_path, changed("versions.rft_fast", there)).close()
    monkeypatch.setattr("rft_fast.results.loading.__version__", now)
    for attempt in (results.load, results.check, results.recorded):
        with refused(ValueError, there, now):
            attempt(tmp_path)


def test_what_the_numbers_do_not_depend_on_is_not_compared(tmp_path: Path) -> None:
    with results.Run(tmp_path, ASKED) as run:
        run.add("interpolation", "m", 0, [row()])
    other = ASKED
    for key in ("command", "date", "platform", "threads", "versions.python", "zeroshot.path",
                "finetuned.m.path", "data.near.path"):  # fmt: skip
        other = changed(key, "another", other)
    other["finetuned"] = dict(reversed(other["finetuned"].items()))
    assert results.differences(ASKED, other) == []
    results.check(tmp_path, config=other)
    results.check(tmp_path, config={"xi": 0.02})
    results.check(tmp_path, config={})
    with results.Run(tmp_path, other) as run:
        assert run.resumed == 1 and run.config == ASKED
    assert results.recorded(tmp_path) == ASKED
    assert results.differences({"path": "/x", "a": (1, 2)}, {"path": "/y", "a": [1, 2]}) == []
    # Only Python's version is left out, of whatever else is called so.
    assert results.differences({"python": "3.10"}, {"python": "3.11"}) == [
        "python: 3.10 in the run, 3.11 requested"
    ]


@pytest.mark.parametrize("table", ["finetuned", "data"])
@pytest.mark.parametrize("name", ["path", "date", "command", "platform", "threads", "versions.python", "a.b"])
def test_a_model_may_be_called_as_what_is_not_compared(tmp_path: Path, table: str, name: str) -> None:
    config = {table: {name: {"path": "/a", "sha256": "1"}}}
    with results.Run(tmp_path, config) as run:
        run.add("interpolation", "m", 0, [row()])
    results.Run(tmp_path, {table: {name: {"path": "/b", "sha256": "1"}}}).close()
    with refused(ValueError, f"{table}.{name}.sha256", "2"):
        results.Run(tmp_path, {table: {name: {"path": "/a", "sha256": "2"}}})
    # What is not there is not the word for it.
    assert results.differences({"a": "nothing"}, {}) == ["a: nothing in the run, nothing requested"]
    assert results.differences({"a": {"b": 1}}, {"a.b": 1}) != []


def test_a_run_is_replaced_only_on_purpose(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with results.Run(out, {"seed": 1}) as run:
        run.add("interpolation", "m", 0, [row(seed=1)])
        run.scores("zeroshot")["d", 0.0] = some_scores(1)
    ours = ["figures/interpolation.png", "figures/correlation.png", "correlation.csv", "cost.csv", "run.log",
            "report.html", "comparison.html"]  # fmt: skip
    theirs = ["figures/mine.png", "notes.txt", "rows.csv.bak", "rows.sqlite.bak", "rows.recovered.sqlite"]
    for name in [*ours, *theirs]:
        (out / name).write_bytes(name.encode())
    before = files(out)
    with refused(ValueError, "2"):
        results.Run(out, {"seed": 2})
    results.check(out, overwrite=True)
    assert files(out) == before
    with results.Run(out, {"seed": 2}, overwrite=True) as run:
        assert run.resumed == 0 and run.rows().empty and not run.scores("zeroshot")
        assert files(out).keys() & {*ours, "rows.csv"} == set()
        run.add("interpolation", "m", 0, [row(seed=2)])
    same(results.load(out), [row(seed=2)])
    assert json.loads((out / "config.json").read_text()) == {"seed": 2}
    assert {name: files(out)[name] for name in theirs} == {name: name.encode() for name in theirs}


@pytest.mark.parametrize("name", ["config.json", "rows.csv", "figures", "cost.csv", "run.log"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_under_our_names_are_left_alone(tmp_path: Path, name: str, overwrite: bool) -> None:
    (tmp_path / name).write_text("theirs")
    with refused(ValueError, name, "rows.sqlite"):
        results.Run(tmp_path, {}, overwrite=overwrite)
    assert files(tmp_path) == {name: b"theirs"}


def test_other_files_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("theirs")
    with results.Run(tmp_path, {}) as run:
        run.add("interpolation", "m", 0, [row()])
    assert (tmp_path / "README.md").read_text() == "theirs"


def text(file: Path) -> None:
    file.write_bytes(b"no database at all, but long enough to be one" * 100)


def short_text(file: Path) -> None:
    file.write_bytes(b"hello")


def browser(file: Path) -> None:
    with closing(sqlite3.connect(file, isolation_level=None)) as base:
        base.execute("CREATE TABLE bookmarks (url)")
        base.execute("INSERT INTO bookmarks VALUES ('https://example.org')")
        base.execute("CREATE TABLE rows (a, b)")


@pytest.mark.parametrize(
    "make",
    [text,
     short_text,
     browser],
)  # fmt: skip
@pytest.mark.parametrize("with_config", [False, True])
def test_a_database_of_others_is_refused_and_kept(
    tmp_path: Path, make: Callable[[Path], None], with_config: bool
) -> None:
    make(tmp_path / "rows.sqlite")
    if with_config:
        (tmp_path / "config.json").write_text("{}")
    before = files(tmp_path)
    for overwrite in (False, True):
        with refused(ValueError):
            results.Run(tmp_path, {}, overwrite=overwrite)
    for read in (results.load, results.recorded):
        with refused(ValueError):
            read(tmp_path)
    with refused(ValueError):
        results.check(tmp_path, overwrite=True)
    assert "none of it could be read" in results.recover(tmp_path)
    assert files(tmp_path) == before


def old_run(folder: Path) -> None:
    """As version 0.1.0 left it."""
    with closing(sqlite3.connect(folder / "rows.sqlite", isolation_level=None)) as base:
        base.execute("CREATE TABLE rows (study TEXT, model TEXT, dataset TEXT, alpha REAL, loss REAL)")
        base.execute("INSERT INTO rows VALUES ('interpolation', 'm', 'd', 0.5, 1.0)")
    for name in ("config.json", "rows.csv"):
        (folder / name).write_text("{}")


def newer_format(folder: Path) -> None:
    results.Run(folder, CONFIG).close()
    with closing(sqlite3.connect(folder / "rows.sqlite", isolation_level=None)) as base:
        base.execute("ALTER TABLE run RENAME TO runs")
        base.execute(f"PRAGMA user_version = {schema.FORMAT + 1}")


def newer_version(folder: Path) -> None:
    schema.create(folder / "rows.sqlite", {"versions": {"rft_fast": "99.1"}})


@pytest.mark.parametrize(
    ("make", "facts"),
    [(old_run, ""),
     (newer_format, "rft_fast"),
     (newer_version, "rft_fast 99.1")],
)  # fmt: skip
def test_runs_of_other_versions(tmp_path: Path, make: Callable[[Path], None], facts: str) -> None:
    make(tmp_path)
    before = files(tmp_path)
    for call in (
        lambda: results.Run(tmp_path, CONFIG),
        lambda: results.check(tmp_path, config=CONFIG),
        lambda: results.load(tmp_path),
        lambda: results.recorded(tmp_path),
    ):
        with refused(ValueError, *facts.split()):
            call()
    assert files(tmp_path) == before
    with results.Run(tmp_path, CONFIG, overwrite=True) as run:
        run.add("interpolation", "m", 0, [row()])
    same(results.load(tmp_path), [row()])


def test_a_request_that_is_no_json_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        results.Run(tmp_path / "run", {"path": tmp_path})
    assert not (tmp_path / "run").exists()


# --- places -------------------------------------------------------------------------------------------


def test_places_that_cannot_be_written_to_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("theirs")
    for place in (file, file / "run"):
        with refused(ValueError):
            results.Run(place, {})
    # Root may write anywhere, so permissions are pretended.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    (tmp_path / "there").mkdir()
    for place in (tmp_path / "there", tmp_path / "new"):
        with refused(PermissionError):
            results.Run(place, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "there"]


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that other users can enter."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def finished(out: Path) -> None:
    with results.Run(out, CONFIG) as run:
        for number in range(5):
            run.add("interpolation", "m", number, truth(number))


def killed(out: Path) -> None:
    leave(out, range(5))
    assert (out / "rows.sqlite-wal").exists()


def killed_and_copied(out: Path) -> None:
    killed(out)
    (out / "rows.sqlite-shm").unlink()


def killed_and_garbled(out: Path) -> None:
    killed(out)
    (out / "rows.sqlite-shm").write_bytes(random.Random(0).randbytes(32768))


def killed_in_a_commit(out: Path) -> None:
    """What was written of one that did not come to its end is to be taken back."""

    def work() -> None:
        database.on_network = lambda *_: True  # by a rollback journal
        run = results.Run(out, CONFIG)
        for number in range(5):
            run.add("interpolation", "m", number, truth(number))
        run._database.execute("PRAGMA cache_size = 1")
        run._database.execute("BEGIN")
        run._database.execute("UPDATE rows SET loss = 7, dataset = zeroblob(3000)")
        os._exit(9)

    assert child(work) == 9
    assert (out / "rows.sqlite-journal").stat().st_size > 512


@pytest.mark.parametrize(
    "make", [finished, killed, killed_and_copied, killed_and_garbled, killed_in_a_commit]
)
def test_who_may_not_write_can_read(shared: Path, make: Callable[[Path], None]) -> None:
    out = shared / "run"
    make(out)
    for file in out.rglob("*"):
        file.chmod(0o555 if file.is_dir() else 0o444)
    out.chmod(0o555)
    before = files(out)
    assert b"\x00" * 3000 in before["rows.sqlite"] or make is not killed_in_a_commit

    def work() -> None:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        with pytest.raises(PermissionError):
            (out / "new").touch()
        same(results.load(out), [one for number in range(5) for one in truth(number)])
        assert results.recorded(out) == CONFIG
        with pytest.raises(PermissionError, match="not writable"):  # in a process of its own
            results.Run(out, CONFIG)
        with pytest.raises(OSError, match="Permission denied"):
            results.recover(out)

    try:
        assert child(work) == 0
        assert files(out) == before
    finally:
        out.chmod(0o755)


@pytest.mark.parametrize("make", [killed_and_garbled, killed_in_a_commit])
def test_what_a_kill_left_is_put_right(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path)
    same(results.load(tmp_path), [one for number in range(5) for one in truth(number)])
    make(tmp_path / "again")
    with results.Run(tmp_path / "again", CONFIG) as run:
        assert run.resumed == 5
        same(run.rows(), [one for number in range(5) for one in truth(number)])


def test_a_full_disk_is_told_and_what_was_measured_before_is_kept(tmp_path: Path) -> None:
    with refused(OSError, "rows.sqlite"):
        with results.Run(tmp_path, CONFIG) as run:
            run.add("interpolation", "m", 0, truth(0))
            pages = run._database.execute("PRAGMA page_count").fetchone()[0]
            run._database.execute(f"PRAGMA max_page_count = {pages + 4}")  # SQLite's own full disk
            for number in range(1, 1000):
                run.add("interpolation", "m", number, truth(number))
    loaded = results.load(tmp_path)
    assert number > 1 and set(loaded["draws"]) == set(range(number))
    same(loaded, [one for before in range(number) for one in truth(before)])
    assert len(read_csv(tmp_path / "rows.csv")) == len(loaded)
    with results.Run(tmp_path, CONFIG) as run:
        assert run.resumed == number
        run.add("interpolation", "m", number, truth(number))


def removed(out: Path) -> None:
    shutil.rmtree(out)


def renamed(out: Path) -> None:
    out.rename(out.with_name(f"{out.name}, elsewhere"))


def exchanged(out: Path) -> None:
    renamed(out)
    finished(out)


def replaced(out: Path) -> None:
    shutil.copyfile(out / "rows.sqlite", out / "copy")
    (out / "copy").rename(out / "rows.sqlite")


def without_log(out: Path) -> None:
    (out / "rows.sqlite-wal").unlink()


@pytest.mark.parametrize("happens", [removed, renamed, exchanged, replaced, without_log])
def test_a_place_that_is_lost_in_mid_run(tmp_path: Path, happens: Callable[[Path], None]) -> None:
    out = tmp_path / "run"
    with refused(OSError, "rows.sqlite"), results.Run(out, CONFIG) as run:
        run.add("interpolation", "m", 0, truth(0))
        happens(out)
        before = files(out)
        with refused(OSError, "rows.sqlite"):
            run.scores("z")["d", 0.0] = some_scores(0)
        run.add("interpolation", "m", 1, truth(1))
    # What is at the place now is not ours, or has lost something; nothing is written there.
    if happens is without_log:
        same(results.load(out), truth(0))  # SQLite had it open, and wrote it back
    else:
        assert files(out).items() <= before.items()
    if happens in (renamed, exchanged):
        same(results.load(tmp_path / "run, elsewhere"), truth(0))
    # Where nothing was added afterwards, it is told in the end.
    again = tmp_path / "again"
    with refused(OSError, "rows.sqlite"), results.Run(again, CONFIG):
        happens(again)
    assert "rows.csv" not in files(again) or happens is exchanged
    if again.exists():
        shutil.rmtree(again)
    with results.Run(again, CONFIG) as run:
        assert run.resumed == 0


def test_a_file_that_is_spoilt_in_mid_run(tmp_path: Path) -> None:
    finished(tmp_path)
    with refused(OSError, "rows.sqlite"):
        with results.Run(tmp_path, CONFIG) as run:
            before = (tmp_path / "rows.csv").read_bytes()
            with (tmp_path / "rows.sqlite").open("r+b") as stream:  # in its place
                stream.seek(PAGE)
                stream.write(b"junk" * (tmp_path / "rows.sqlite").stat().st_size)
            run._database.execute("PRAGMA shrink_memory")
            scores = run.scores("z")
            for use in (
                run.rows,
                lambda: run.done("interpolation", "m"),
                lambda: run.measurement("interpolation", "m", 0),
                lambda: run.add("interpolation", "m", 9, truth(9)),
                lambda: scores["d", 0.0],
                lambda: scores.update({("d", 0.0): some_scores(0)}),
                lambda: list(scores),
                lambda: len(scores),
            ):
                with refused(OSError, "rows.sqlite"):
                    use()
    assert (tmp_path / "rows.csv").read_bytes() == before


def test_the_error_in_the_statement_is_told_not_a_later_one(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyError, match="the first"), results.Run(out, CONFIG):
        shutil.rmtree(out)
        raise KeyError("the first")


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "file"
    disk.replace(file, b"old")
    with file.open("rb") as reader:
        with disk.replacing(file) as temporary:
            temporary.write_bytes(b"new")
            assert file.read_bytes() == b"old"
        assert reader.read() == b"old"  # who has it open keeps what was there
    with pytest.raises(KeyError), disk.replacing(file) as temporary:
        temporary.write_bytes(b"half")
        raise KeyError
    with pytest.raises(FileNotFoundError), disk.replacing(file):
        pass
    assert files(tmp_path) == {"file": b"new"}


def test_a_folder_that_cannot_be_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems do not know how; a disk that fails is another matter."""

    def failing(number: int) -> Callable[[int], None]:
        def fsync(handle: int) -> None:
            raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    disk.sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        disk.sync_folder(tmp_path)


# --- network file systems -----------------------------------------------------------------------------

MOUNTS = """\
/dev/vda / ext4 rw,relatime 0 0
proc /proc proc rw 0 0
home:/export /home nfs4 rw 0 0
/dev/sdb /home/me/local xfs rw 0 0
//box/share /mnt/with\\040space cifs rw 0 0
auto.data /data autofs rw 0 0
fs /data/deep lustre rw 0 0
me@there: /ssh fuse.sshfs rw 0 0
/dev/sdc /stick fuseblk rw 0 0
old:/a /again nfs rw 0 0
/dev/sdd /again ext4 rw 0 0
"""


@pytest.mark.parametrize(
    ("place", "network"),
    [("/rows.sqlite", False), ("/home/me/rows.sqlite", True), ("/home/me/local/run/rows.sqlite", False),
     ("/homes/rows.sqlite", False), ("/mnt/with space/rows.sqlite", True), ("/data/rows.sqlite", False),
     ("/data/deep/rows.sqlite", True), ("/ssh/rows.sqlite", True), ("/stick/rows.sqlite", False),
     ("/again/rows.sqlite", False)],
)  # fmt: skip
def test_network_file_systems_are_known(tmp_path: Path, place: str, network: bool) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_bytes(MOUNTS.encode() + b"/dev/x /\xff ext4 rw 0 0\n")
    assert database.on_network(Path(place), mounts) is network


def test_where_the_system_does_not_tell(tmp_path: Path) -> None:
    assert database.on_network(tmp_path / "rows.sqlite", tmp_path / "none") is False
    link = tmp_path / "link"
    link.symlink_to("/home")
    (tmp_path / "mounts").write_text(MOUNTS)
    assert database.on_network(link / "rows.sqlite", tmp_path / "mounts") is True


def test_on_a_network_there_is_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(tmp_path)
    monkeypatch.setattr(database, "on_network", lambda file: True)
    with results.Run(tmp_path, CONFIG) as run:
        assert run.resumed == 5
        run.add("interpolation", "m", 5, truth(5))
        assert not list(tmp_path.glob("rows.sqlite-*"))
    same(results.load(tmp_path), [one for number in range(6) for one in truth(number)])


def test_one_file_is_left_unless_somebody_reads(tmp_path: Path) -> None:
    with results.Run(tmp_path, CONFIG) as run:
        run.add("interpolation", "m", 0, truth(0))
        assert (tmp_path / "rows.sqlite-wal").stat().st_size > 0
    assert [file.name for file in tmp_path.glob("rows.sqlite*")] == ["rows.sqlite"]
    with results.Run(tmp_path, CONFIG) as run, database.reading(tmp_path / "rows.sqlite") as reader:
        run.add("interpolation", "m", 1, truth(1))
        run._database.execute(f"PRAGMA busy_timeout = {int(2000 * PATIENCE)}")  # ms
        start = time.monotonic()
        run.close()
        assert time.monotonic() - start < PATIENCE  # it does not wait for them
        assert reader.execute("SELECT count(*) FROM measurements").fetchone()[0] == 1  # as they found it
        run._close, run.close = None, lambda: None  # type: ignore[assignment, method-assign]
    same(results.load(tmp_path), [*truth(0), *truth(1)])


# --- scores -------------------------------------------------------------------------------------------


def some_scores(seed: int, count: int = 1000) -> Scores:
    bits = np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)  # NaNs of all kinds
    losses = torch.from_numpy(bits.view(np.float32).copy())
    losses[:4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])[:count]
    return Scores(losses, torch.from_numpy(bits % 3 == 0))


def bits(scores: Scores) -> tuple[bytes, list[bool], torch.dtype, torch.dtype]:
    return scores.losses.numpy().tobytes(), scores.correct.tolist(), scores.losses.dtype, scores.correct.dtype


def test_scores_come_back_bit_for_bit(tmp_path: Path) -> None:
    keys = [("a", 0.0), ("b", 1 / 3), ("ü", 1.0), ("empty", 0.0)]
    kept = {key: some_scores(seed, 0 if key[0] == "empty" else 1000) for seed, key in enumerate(keys)}
    with results.Run(tmp_path, CONFIG) as run:
        scores, others = run.scores("zeroshot"), run.scores("interpolated")
        assert not scores and len(others) == 0 and ("a", 0.0) not in scores
        with pytest.raises(KeyError, match=r"a.*0\.0"):
            scores["a", 0.0]
        for key, value in kept.items():
            scores[key] = value
        others["a", 0.0] = some_scores(77)
        with refused(TypeError):
            del scores["a", 0.0]
    for again in range(2):
        with results.Run(tmp_path, CONFIG) as run:
            scores, others = run.scores("zeroshot"), run.scores("interpolated")
            assert list(scores) == keys and len(scores) == 4 and ("a", 0.0) in scores
            assert ("a", 0.5) not in scores and list(others) == [("a", 0.0)]
            assert {key: bits(value) for key, value in scores.items()} == {
                key: bits(value) for key, value in kept.items()
            }
            assert bits(others["a", 0.0]) == bits(some_scores(77))
            scores["b", 1 / 3].losses.zero_()  # what is given out is a copy
            if not again:
                keys.append(keys.pop(0))  # it counts as the last
                kept["a", 0.0] = scores["a", 0.0] = some_scores(100, 7)
    assert results.load(tmp_path).empty


def test_predictions_and_entropies_come_back_with_them(tmp_path: Path) -> None:
    plain = some_scores(1, 7)
    predictions, entropies = torch.arange(-1, 6, dtype=torch.int32), torch.linspace(0, 1, 7)
    entropies[2] = math.nan
    with results.Run(tmp_path, CONFIG) as run:
        scores = run.scores("zeroshot")
        scores["a", 0.0] = replace(plain, predictions=predictions)
        scores["b", 0.0] = replace(plain, predictions=predictions, entropies=entropies)
        for name in "ab":
            found = scores[name, 0.0]
            assert bits(found) == bits(plain) and found.predictions is not None
            assert found.predictions.tolist() == predictions.tolist()
            assert (found.entropies is None) is (name == "a")
        assert found.entropies is not None
        np.testing.assert_array_equal(found.entropies.numpy(), entropies.numpy())


def test_scores_outlive_the_process(tmp_path: Path) -> None:
    def work() -> None:
        results.Run(tmp_path, CONFIG).scores("z")["a", 0.0] = some_scores(3)
        os._exit(9)

    assert child(work) == 9
    with results.Run(tmp_path, CONFIG) as run:
        assert bits(run.scores("z")["a", 0.0]) == bits(some_scores(3))


# --- the command line ---------------------------------------------------------------------------------


def refuses(*arguments: object, facts: tuple[object, ...] = ()) -> str:
    return command_refused(command.main, arguments, *facts)


def test_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, table, parquet = tmp_path / "run", tmp_path / "x.csv", tmp_path / "x.parquet"
    rows = [
        row("m"),
        row("m", loss=math.nan, seed=2**62 + 1, ood=None, layer='a "b"\n'),
        row("a", rise=math.inf),
    ]
    with results.Run(out, {**CONFIG, "command": "python -m rft_fast.sweep", "date": "today"}) as run:
        run.add("interpolation", "a", 0, rows[2:])
        run.add("interpolation", "m", 0, rows[:2])
        assert command.main([str(out), "--csv", str(table), "--parquet", str(parquet)]) == 0
    said = capsys.readouterr().out
    assert [line.split() for line in said.splitlines()[:5]] == [
        ["command", "python", "-m", "rft_fast.sweep"],
        ["begun", "today"],
        ["rows", "3"],
        ["study", "models", "rows"],
        ["interpolation", "2", "3"],
    ]
    assert f"3 rows to {table}" in said and f"3 rows to {parquet}" in said
    assert table.read_bytes() == (out / "rows.csv").read_bytes()
    assert [repr(one) for one in read_csv(table)] == [
        repr({name: one.get(name) for name in COLUMNS}) for one in rows
    ]
    read = pd.read_parquet(parquet, dtype_backend="numpy_nullable")
    assert list(read) == list(COLUMNS)
    kinds = {"string": "string", "float64": "Float64", "Int64": "Int64", "boolean": "boolean"}
    types = {name: str(kind).partition("[")[0] for name, kind in read.dtypes.items()}
    assert types == {name: kinds[kind] for name, kind in COLUMNS.items()}
    # pandas makes no difference between a number that is missing and one that is NaN; Parquet does.
    same(read.astype(COLUMNS), rows)
    assert [repr(one) for one in pyarrow.parquet.read_table(parquet).to_pylist()] == [
        repr({name: one.get(name) for name in COLUMNS}) for one in rows
    ]
    assert dict(pd.read_parquet(parquet).dtypes.map(str)) == COLUMNS
    assert read["seed"].tolist()[1] == 2**62 + 1 and read["rise"].tolist()[2] == math.inf


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    finished(tmp_path / "run")
    file = tmp_path / "mine.csv"
    file.write_text("mine")
    for option in ("--csv", "--parquet"):
        refuses(
            tmp_path / "run",
            option,
            file,
            facts=(
                file,
                "--overwrite",
            ),
        )
        refuses(tmp_path / "run", option, tmp_path)
        refuses(tmp_path / "run", option, tmp_path / "no" / "x")
    both = ("--csv", tmp_path / "new", "--parquet", tmp_path / "run" / ".." / "new")
    refuses(tmp_path / "run", *both)
    assert not (tmp_path / "new").exists()
    # One of two is wrong: none is written.
    refuses(tmp_path / "run", "--csv", tmp_path / "new.csv", "--parquet", file)
    assert file.read_text() == "mine" and not (tmp_path / "new.csv").exists()
    assert command.main([str(tmp_path / "run"), "--csv", str(file), "--overwrite"]) == 0
    assert file.read_bytes() == (tmp_path / "run" / "rows.csv").read_bytes()
    base = tmp_path / "run" / "rows.sqlite"
    before = base.read_bytes()
    for option in ("--csv", "--parquet"):
        message = refuses(tmp_path / "run", option, base, "--overwrite")
        assert "is a database, possibly of a run; choose another name" in message
    assert base.read_bytes() == before


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(tmp_path / "run")
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    message = refuses(tmp_path / "run", "--csv", tmp_path / "x.csv", "--parquet", tmp_path / "x.parquet")
    assert 'pip install "rft-fast[huggingface]"' in message
    assert not list(tmp_path.glob("x.*"))


def test_the_command_line_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        [tmp_path],
        [tmp_path, "--recover"],
        [tmp_path / "none"],
        [tmp_path / "none", "--recover"],
    ):
        refuses(*arguments)
    text(tmp_path / "rows.sqlite")
    refuses(tmp_path)
    with results.Run(tmp_path / "new", CONFIG):
        assert command.main([str(tmp_path / "new")]) == 0
        said(capsys.readouterr().out)


# --- damage -------------------------------------------------------------------------------------------

BIG = {"finetuned": {f"model-{i}": {"sha256": f"{i}"} for i in range(30)}, "note": "configuration " * 40}
MEASURED = {("interpolation", model, number): number for model in BIG["finetuned"] for number in range(100)}


def big_rows(model: str, number: int) -> list[dict[str, object]]:
    return [{**one, "model": model, "gain": one["loss"]} for one in truth(number)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3,000 measurements with scores among them; ``killed`` is left by a killed process, most in its log."""
    folder = tmp_path_factory.mktemp("whole")

    def work(out: Path, leave: bool) -> None:
        run = results.Run(out, BIG)
        run._database.execute("PRAGMA synchronous = OFF")
        for count, (study, model, number) in enumerate(MEASURED):
            run.add(study, model, number, big_rows(model, number))
            if count % 600 == 0:
                run.scores("zeroshot")[f"d{count}", 0.0] = some_scores(count, 3000)
            if count == 1500:
                run._database.execute("PRAGMA wal_checkpoint")
                run._database.execute(f"PRAGMA wal_autocheckpoint = {0 if leave else 1000}")
        if leave:
            os._exit(9)
        run.close()

    assert child(lambda: work(folder / "closed", False)) == 0
    assert child(lambda: work(folder / "killed", True)) == 9
    for name in ("closed", "killed"):
        (folder / name / "rows.sqlite-shm").unlink(missing_ok=True)
    assert (folder / "killed" / "rows.sqlite-wal").stat().st_size > 1_000_000
    return folder


@pytest.fixture(scope="module")
def everything() -> pd.DataFrame:
    """The rows of those measurements."""
    return studies.frame(one for _, model, number in MEASURED for one in big_rows(model, number))


def begins_with(found: pd.DataFrame, whole: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(found, whole.iloc[: len(found)], check_exact=True)


def damage(content: bytearray, kind: str, draw: random.Random) -> bool:
    """Damages a file in place. Returns whether a leaf of a tree was hit, and nothing else."""
    if kind == "cut short":
        del content[draw.randrange(PAGE, len(content)) :]
        return False
    page = draw.randrange(len(content) // PAGE)
    at = slice(page * PAGE, (page + 1) * PAGE)
    leaf = page > 0 and content[at.start] in (10, 13)
    if kind == "zeros":
        content[at] = bytes(PAGE)
    elif kind == "random bytes":
        content[at] = draw.randbytes(PAGE)
    else:
        for _ in range(1 if kind == "one bit" else 20):
            content[draw.randrange(at.start, at.stop)] ^= 1 << draw.randrange(8)
    return leaf


def check_saved(file: Path) -> int:
    """Everything in there is as it was written, and whole. Returns how many measurements."""
    found = read_sqlite(file)
    for (study, model, number), rows in found.items():
        assert study == "interpolation" and model in BIG["finetuned"] and number in range(100)
        expected = [{name: one.get(name) for name in COLUMNS} for one in big_rows(model, number)]
        assert rows == [{**one, "ood": 1} for one in expected]  # of which none is NaN
    with closing(sqlite3.connect(file)) as base:
        query = 'SELECT "of", dataset, alpha, losses, correct FROM scores'
        for of, dataset, alpha, losses, correct in base.execute(query):
            assert of == "zeroshot" and alpha == 0.0
            kept = some_scores(int(dataset[1:]), 3000)
            assert losses == kept.losses.numpy().tobytes() and list(correct) == kept.correct.tolist()
    return len(found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zeros", "random bytes", "one bit", "some bits", "cut short"])
@pytest.mark.parametrize("base", ["closed", "killed", "killed, its log"])
def test_damage(tmp_path: Path, whole: Path, everything: pd.DataFrame, base: str, kind: str) -> None:
    refusals = 0
    for trial in range(4):
        draw = random.Random(f"{base} {kind} {trial}")
        out = tmp_path / str(trial)
        shutil.copytree(whole / base.partition(",")[0], out)
        hit = out / ("rows.sqlite-wal" if "log" in base else "rows.sqlite")
        content = bytearray(hit.read_bytes())
        leaf = damage(content, kind, draw)
        hit.write_bytes(content)
        before = files(out)
        database_files = {name: value for name, value in before.items() if name.startswith("rows.sqlite")}
        try:
            loaded = results.load(out)
        except ValueError:
            pass
        else:
            # Of a log, SQLite reads what comes before the damage; that is a state that there was.
            begins_with(loaded, everything)
            assert "log" in base or len(loaded) == len(everything)
        assert files(out) == before
        try:
            with results.Run(out, BIG) as run:
                begins_with(run.rows(), everything)
                assert run.resumed == len(MEASURED) or ("log" in base and run.resumed >= 1500)
            continue
        except ValueError as error:
            message = str(error)
        refusals += 1
        after = files(out)
        assert {name: after[name] for name in database_files} == database_files
        new = sorted(after.keys() - before.keys())
        assert new in (["rows.recovered.sqlite"], []) and "cannot be read" in message
        saved = check_saved(out / new[0]) if new else 0
        assert (
            f"{saved} complete measurements were saved to {out / 'rows.recovered.sqlite'}" in message
        ) or not new
        assert not leaf or saved >= 0.9 * len(MEASURED)
        if refusals > 1:
            continue
        # Again, to a file of another name.
        said = results.recover(out)
        assert {*files(out)} - {*after} == ({"rows.recovered-2.sqlite"} if new else set()), said
        if not new:
            assert "none of it could be read" in said
            continue
        # And the run goes on with it, although the log of the damaged file is still there.
        rows = sum(len(truth(number)) for *_, number in read_sqlite(out / new[0]))
        (out / new[0]).rename(out / "rows.sqlite")
        assert len(results.load(out)) == rows
        with results.Run(out, BIG) as run:
            assert run.resumed == saved
            done = {model: run.done("interpolation", model) for model in BIG["finetuned"]}
            left = [key for key in MEASURED if key[2] not in done[key[1]]]
            run._database.execute("PRAGMA synchronous = OFF")
            for study, model, number in left:
                run.add(study, model, number, big_rows(model, number))
        assert check_saved(out / "rows.sqlite") == len(MEASURED)
        pd.testing.assert_frame_equal(results.load(out), everything, check_exact=True)
    assert "log" in base or kind == "one bit" or refusals >= 2


def pages_of(file: Path, name: str) -> list[int]:
    """The leaves of a table or an index, which are all at the same depth."""
    content = file.read_bytes()
    with closing(sqlite3.connect(file)) as base:
        (root,) = base.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (name,)).fetchone()
    pages = [root]
    while content[(pages[0] - 1) * PAGE] in (2, 5):
        below = []
        for page in pages:
            start = (page - 1) * PAGE
            cells = int.from_bytes(content[start + 3 : start + 5], "big")
            for cell in range(cells):
                at = start + int.from_bytes(content[start + 12 + 2 * cell : start + 14 + 2 * cell], "big")
                below.append(int.from_bytes(content[at : at + 4], "big"))
            below.append(int.from_bytes(content[start + 8 : start + 12], "big"))
        pages = below
    return pages


@pytest.mark.parametrize("table", ["rows", "measurements"])
def test_what_lies_between_damaged_pages_is_saved(tmp_path: Path, whole: Path, table: str) -> None:
    shutil.copytree(whole / "closed", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "rows.sqlite"
    content = bytearray(file.read_bytes())
    pages = pages_of(file, table)
    for page in (pages[1], pages[-2]):
        content[(page - 1) * PAGE : page * PAGE] = bytes(PAGE)
    file.write_bytes(content)
    said = results.recover(tmp_path)
    saved = check_saved(tmp_path / "rows.recovered.sqlite")
    assert f"{saved} complete measurements" in said
    assert 0.9 * len(MEASURED) <= saved < len(MEASURED)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_the_beginning_of_a_file_is_saved(tmp_path: Path, whole: Path, part: float) -> None:
    shutil.copytree(whole / "closed", tmp_path, dirs_exist_ok=True)
    os.truncate(tmp_path / "rows.sqlite", int((tmp_path / "rows.sqlite").stat().st_size * part))
    results.recover(tmp_path)
    assert check_saved(tmp_path / "rows.recovered.sqlite") > 0.7 * part * len(MEASURED)


def test_what_a_log_has_of_a_file_that_was_cut_short_is_saved(tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole / "closed", tmp_path, dirs_exist_ok=True)

    def work() -> None:
        run = results.Run(tmp_path, BIG)
        for number in range(100, 104):
            run.add("interpolation", "model-0", number, big_rows("model-0", number))
        os._exit(9)

    assert child(work) == 9
    os.truncate(tmp_path / "rows.sqlite", 8 * PAGE)
    results.recover(tmp_path)
    found = read_sqlite(tmp_path / "rows.recovered.sqlite")
    there = [number for _, _, number in found if number >= 100]
    assert len(there) > 2
    for number in there:
        expected = [{name: one.get(name) for name in COLUMNS} for one in big_rows("model-0", number)]
        assert found["interpolation", "model-0", number] == expected


INDICES = ["rows_of_measurements", "sqlite_autoindex_measurements_1"]


@pytest.mark.slow
@pytest.mark.parametrize("index", INDICES)
def test_a_damaged_index_costs_nothing(tmp_path: Path, whole: Path, index: str) -> None:
    """SQLite would look for measurements there, and not find some, or others."""
    pages = pages_of(whole / "closed" / "rows.sqlite", index)
    assert len(pages) > 5
    for kind in ("one cell less", "zeros", "another page"):
        out = tmp_path / kind
        shutil.copytree(whole / "closed", out)
        content = bytearray((out / "rows.sqlite").read_bytes())
        at, other = ((page - 1) * PAGE for page in pages[2:4])
        if kind == "one cell less":
            content[at + 4] -= 1
        else:
            content[at : at + PAGE] = bytes(PAGE) if kind == "zeros" else content[other : other + PAGE]
        (out / "rows.sqlite").write_bytes(content)
        with refused(ValueError, len(MEASURED)):
            results.Run(out, BIG)
        remedy = f"python -m rft_fast.results {shlex.quote(str(out))} --recover"
        with refused(ValueError, remedy):
            results.load(out)
        assert check_saved(out / "rows.recovered.sqlite") == len(MEASURED)


@pytest.mark.parametrize("table", ["measurements", "rows", "scores"])
def test_a_page_that_is_another_one_is_noticed(tmp_path: Path, whole: Path, table: str) -> None:
    """As a disk leaves it that wrote to the wrong place: in itself, it is in order."""
    shutil.copytree(whole / "closed", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "rows.sqlite"
    content = bytearray(file.read_bytes())
    pages = pages_of(file, table)
    at, other = ((page - 1) * PAGE for page in (pages[0], pages[-1]))
    assert at != other
    content[at : at + PAGE] = content[other : other + PAGE]
    file.write_bytes(content)
    with refused(ValueError):
        results.Run(tmp_path, BIG)
    saved = check_saved(tmp_path / "rows.recovered.sqlite")
    assert saved >= 0.9 * len(MEASURED) and (saved < len(MEASURED) or table == "scores")


@pytest.mark.parametrize("column", ["loss", "model", "config", "losses"])
def test_a_changed_value_is_noticed(tmp_path: Path, column: str) -> None:
    """In a database that is in order, as far as SQLite can tell."""
    with results.Run(tmp_path, CONFIG) as run:
        for number in range(5):
            run.add("interpolation", "m", number, truth(number))
        run.scores("z")["d", 0.0] = some_scores(0)
    with closing(sqlite3.connect(tmp_path / "rows.sqlite", isolation_level=None)) as base:
        base.execute(
            {
                "loss": "UPDATE rows SET loss = loss * 1.0000001 WHERE measurement = 3",
                "model": "UPDATE measurements SET model = 'n' WHERE number = 2",
                "config": "UPDATE run SET config = replace(config, '2.9', '2.8')",
                "losses": "UPDATE scores SET losses = zeroblob(4000)",
            }[column]
        )
        assert base.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    kept = {"loss": 4, "model": 4}.get(column, 5)
    with refused(ValueError, kept, 5 - kept):
        results.Run(tmp_path, CONFIG)
    if column != "losses":  # which load does not read
        with refused(ValueError):
            results.load(tmp_path)
    assert len(read_sqlite(tmp_path / "rows.recovered.sqlite")) == kept


def test_a_damaged_configuration_is_taken_from_its_copy(tmp_path: Path, whole: Path) -> None:
    file = tmp_path / "rows.sqlite"
    shutil.copytree(whole / "closed", tmp_path, dirs_exist_ok=True)
    content = bytearray(file.read_bytes())
    content[content.index(b"configuration configuration")] ^= 1
    file.write_bytes(content)
    copy = (tmp_path / "config.json").read_bytes()
    with refused(ValueError, len(MEASURED)):
        results.Run(tmp_path, BIG)
    with closing(sqlite3.connect(tmp_path / "rows.recovered.sqlite")) as base:
        assert json.loads(base.execute("SELECT config FROM run").fetchone()[0]) == BIG
    (tmp_path / "config.json").write_text("[1")
    assert "none of it could be read" in results.recover(tmp_path)
    (tmp_path / "config.json").write_bytes(copy)
    (tmp_path / "rows.recovered.sqlite").rename(file)
    with results.Run(tmp_path, BIG) as run:
        assert run.resumed == len(MEASURED)


@pytest.mark.parametrize("size", [100, PAGE])
def test_a_damaged_first_page_costs_nothing(tmp_path: Path, whole: Path, size: int) -> None:
    """That which is written most often."""
    shutil.copytree(whole / "closed", tmp_path, dirs_exist_ok=True)
    content = (tmp_path / "rows.sqlite").read_bytes()
    (tmp_path / "rows.sqlite").write_bytes(bytes(size) + content[size:])
    said = results.recover(tmp_path)
    assert f"{len(MEASURED)} complete measurements were saved" in said
    assert check_saved(tmp_path / "rows.recovered.sqlite") == len(MEASURED)


def test_recovering_by_hand(
    tmp_path: Path, whole: Path, everything: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole / "killed", tmp_path, dirs_exist_ok=True)
    before = files(tmp_path)
    assert command.main([str(tmp_path), "--recover"]) == 0
    said = capsys.readouterr().out
    assert f"{len(MEASURED)} complete measurements were saved" in said
    assert "move that file over rows.sqlite, remove rows.sqlite-wal, and repeat the command" in said
    after = files(tmp_path)
    assert after.keys() - before.keys() == {"rows.recovered.sqlite"} and before.items() <= after.items()
    (tmp_path / "rows.recovered.sqlite").rename(tmp_path / "rows.sqlite")
    pd.testing.assert_frame_equal(results.load(tmp_path), everything, check_exact=True)


def test_no_room_for_what_is_saved(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(whole / "closed", tmp_path, dirs_exist_ok=True)
    before = files(tmp_path)
    make = database.connect

    def small(file: Path, *how: str, **more: Any) -> sqlite3.Connection:
        base = make(file, *how, **more)
        base.execute("PRAGMA max_page_count = 100")
        return base

    monkeypatch.setattr(database, "connect", small)
    with refused(OSError):
        results.recover(tmp_path)
    assert files(tmp_path) == before
