"""A sweep that is killed at random moments, again and again, until it comes to its end: is anything lost?

As a program, ``python -m support.tiny_kills --runs 50`` in the folder tests, it prints a tally.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import random
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch

from rft_fast import results, sweep
from support import tiny_zoo

# tiny_zoo.BRIEF, but most of the time goes into measurements, and not into loading and drawing.
LONGER = ["--alphas", "0:1:21", "--sharpness-alphas", "0:1:21", "--layer-samples", "39", "--draws", "4",
          "--rhos", "0.5", "1", "--straggler-margin", "1e-4", "--mask-seeds", "6", "--methods", "zero",
          "magnitude", "--device", "cpu"]  # fmt: skip


@dataclass
class Tally:
    """What happened in so many runs."""

    runs: int = 0
    kills: int = 0
    when: Counter[str] = field(default_factory=Counter)
    measurements: int = 0  # of a run

    def __str__(self) -> str:
        when = ", ".join(f"{count} {where}" for where, count in self.when.most_common())
        return (
            f"{self.runs} runs of {self.measurements} measurements, killed {self.kills} times ({when}): "
            "all ended with the undisturbed run's rows, bit for bit"
        )


def attempt(arguments: Sequence[str], log: Path, after: float | None) -> int | None:
    """Runs a sweep in a process of its own; killed after so many seconds, if it still runs then.

    Returns its exit status, negative for the signal that ended it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rft_fast.sweep", "support.tiny_zoo"])
    process = context.Process(target=_sweep, args=(list(arguments), log))
    process.start()
    process.join(after)
    if process.is_alive():
        process.kill()
    process.join()
    return process.exitcode


def _sweep(arguments: list[str], log: Path) -> None:
    torch.set_num_threads(1)
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        raise SystemExit(sweep.main(arguments))


def kill_until_done(
    arguments: Sequence[str], out: Path, seconds: float, random_: random.Random, tally: Tally, most: int
) -> None:
    """A run that is killed at random moments, ``most`` times at the most, and is left alone then.

    seconds: how long an undisturbed run takes.
    """
    log = out.with_suffix(".log")
    for kill in range(most + 1):
        after = None if kill == most else random_.random() * seconds
        status = attempt([*arguments, "--out", str(out)], log, after)
        if status == 0:
            break
        if status != -9:
            raise AssertionError(f"ended with {status}, not killed:\n{log.read_text()}")
        tally.kills += 1
        tally.when[_stage(out)] += 1
    tally.runs += 1


def _stage(out: Path) -> str:
    """How far a killed run had come, by its log: the rows alone do not tell loading and drawing."""
    if not (out / "run.log").is_file():
        return "before anything was measured"
    last = (out / "run.log").read_text().splitlines()[-1][21:]
    if last.startswith("start"):
        return "before it went on"
    if last.startswith(("end", "in short")):
        return "while it drew"
    return f"in {last.partition(':')[0].split()[0]}"


def rows_of(out: Path) -> pd.DataFrame:
    """What must not depend on how often a run was killed."""
    return results.load(out).drop(columns="seconds")


def measurements(out: Path) -> int:
    """How many measurements a run has."""
    with contextlib.closing(sqlite3.connect(out / "rows.sqlite")) as database:
        return int(database.execute("SELECT count(*) FROM measurements").fetchone()[0])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--runs", type=int, default=50)
    options.add_argument("--kills", type=int, default=20, help="of each run, at the most")
    options.add_argument("--seed", type=int, default=0)
    asked = options.parse_args()
    random_, tally = random.Random(asked.seed), Tally()
    with tempfile.TemporaryDirectory() as folder:
        zoo = tiny_zoo.make(Path(folder))
        arguments = [*tiny_zoo.own_models(zoo, "abc"), *LONGER, "--cache", f"{folder}/cache"]
        attempt(["--help"], Path(folder, "alone.log"), None)  # everything is imported
        start = time.monotonic()
        if attempt([*arguments, "--out", f"{folder}/alone"], Path(folder, "alone.log"), None):
            raise SystemExit(Path(folder, "alone.log").read_text())
        seconds = time.monotonic() - start
        truth = rows_of(Path(folder, "alone"))
        tally.measurements = measurements(Path(folder, "alone"))
        for number in range(asked.runs):
            out = Path(folder, f"run-{number}")
            kill_until_done(arguments, out, seconds, random_, tally, asked.kills)
            pd.testing.assert_frame_equal(rows_of(out), truth, check_exact=True)
            print(f"{number + 1}: {tally.kills} kills", flush=True)
    print(tally)


if __name__ == "__main__":
    main()
