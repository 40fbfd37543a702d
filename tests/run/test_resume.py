"""A run that is killed, stopped or disturbed goes on, and ends with the rows of one that was left alone."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support import tiny_kills, tiny_zoo
from support.tiny_images import check_images
from support.tiny_kills import Tally, attempt, kill_until_done, rows_of
from support.tiny_zoo import BRIEF, own_models, sweep_refused
from support.wording import said

from rft_fast import results, sweep
from rft_fast.common.program import Stop
from rft_fast.evaluate import Evaluator
from rft_fast.run import ledger
from rft_fast.run.worker import Worker

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_zoo.make(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def undisturbed(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run in a process of its own, and how long it took."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert attempt(["--help"], out.with_suffix(".log"), None) == 0  # everything is imported
    start = time.monotonic()
    assert attempt(arguments(zoo, out), out.with_suffix(".log"), None) == 0
    return out, time.monotonic() - start


COPIED = 2 * 14  # of the models b and c: all weights, and 13 layers


def arguments(zoo: Path, out: Path) -> list[str]:
    return [*own_models(zoo, "abc"), *BRIEF, "--out", str(out)]


@pytest.mark.slow
def test_killed_at_random_moments(zoo: Path, undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    alone, seconds = undisturbed
    tally = Tally()
    for seed in range(12):
        if tally.runs >= 2 and tally.kills >= 6:
            break
        out = tmp_path / f"run-{seed}"
        own = arguments(zoo, out)[:-2]
        kill_until_done(own, out, seconds, random.Random(seed), tally, 5)
        pd.testing.assert_frame_equal(rows_of(out), rows_of(alone), check_exact=True)
        assert check_images(out) == check_images(alone)
        assert (out / "correlation.csv").read_bytes() == (alone / "correlation.csv").read_bytes()
        configs = [json.loads((place / "config.json").read_text()) for place in (out, alone)]
        # How much memory was free is another matter; a run that goes on keeps what it began with.
        for config in configs:
            config["settings"]["computed"]["memory_limit"] = 0
        assert results.differences(*configs) == []
    assert tally.kills >= 6


def on_each(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], object]) -> None:
    """Calls act(how many measurements were kept) after each."""
    add, count = results.Run.add, 0

    def then(run: results.Run, *measurement: Any) -> None:
        nonlocal count
        add(run, *measurement)
        count += 1
        act(count)

    monkeypatch.setattr(results.Run, "add", then)


@pytest.mark.slow
def test_stopped_after_every_study_and_in_the_midst(
    zoo: Path, undisturbed: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Nothing that is there is measured again: as many forward passes as in a run that is left alone, but for
    what a study begins with."""
    out, spent = tmp_path / "run", pd.Series(dtype=float)
    for stop in (1, 7, 31, 40, 100, 20, 1000):
        with monkeypatch.context() as patch:
            on_each(patch, lambda n, stop=stop: os.kill(os.getpid(), signal.SIGINT) if n == stop else None)
            before = tiny_kills.measurements(out) if out.exists() else 0
            status = sweep.main(arguments(zoo, out))
        made = tiny_kills.measurements(out) - before
        printed = capsys.readouterr()
        if status == 0:
            break
        # The one in flight when the signal came was the one just kept: no other was begun. What is the same
        # for all models at alpha = 0 is copied, not measured.
        assert status == 130 and stop <= made <= stop + COPIED
        assert "stopping after the current measurement" in printed.err
        assert f"--out {out}" in printed.err and "Traceback" not in printed.err
        assert len(pd.read_csv(out / "rows.csv")) == len(results.load(out))
        costs = pd.read_csv(out / "cost.csv").set_index("study")["seconds"]
        assert costs["interpolation"] > 0 and (costs >= spent.reindex(costs.index).fillna(0)).all()
        spent = costs
    assert status == 0
    pd.testing.assert_frame_equal(rows_of(out), rows_of(undisturbed[0]), check_exact=True)
    log = (out / "run.log").read_text()
    assert log.count("interrupted") == 6
    assert len(re.findall(r"; \d+ measurements? already made", log)) == 6


@pytest.mark.slow
def test_a_second_signal_stops_at_once(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = Evaluator.scores

    def twice(evaluator: Evaluator) -> Any:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)  # Python runs handlers between two instructions
        pytest.fail("went on")
        return scores(evaluator)

    out, before = tmp_path / "run", signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        on_each(patch, lambda n: patch.setattr(Evaluator, "scores", twice) if n == 5 else None)
        assert sweep.main(arguments(zoo, out)) == 130
    assert tiny_kills.measurements(out) >= 5
    assert signal.getsignal(signal.SIGTERM) == before
    assert sweep.main(arguments(zoo, out)) == 0


@pytest.mark.slow
def test_finished_runs_are_only_drawn_again(
    zoo: Path, undisturbed: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = Path(shutil.copytree(undisturbed[0], tmp_path / "run"))
    shutil.rmtree(out / "figures")
    costs = pd.read_csv(out / "cost.csv")
    monkeypatch.setattr(Worker, "measure", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(results.Run, "add", lambda *_: pytest.fail("added"))
    assert sweep.main(arguments(zoo, out)) == 0
    assert (out / "figures" / "layers.png").stat().st_size > 10_000
    pd.testing.assert_frame_equal(pd.read_csv(out / "cost.csv"), costs)
    assert "In short" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line", ["layers,1,nan,5", "layers,1,2.0,inf", "layers,1,-1,5", "layers,1,x,5", "\xff"]
)
def test_costs_that_are_no_numbers_are_left_out_and_said_to_be(tmp_path: Path, line: str) -> None:
    (tmp_path / "cost.csv").write_text("study,models,seconds,peak_memory\n" + line, "latin-1")
    said: list[str] = []
    run: Any = SimpleNamespace(resumed=1, table=lambda name: tmp_path / f"{name}.csv")
    progress: Any = SimpleNamespace(notice=said.append)
    book = ledger.Ledger(run, progress, Stop(said.append), {})
    book.models["layers"] = 1
    assert book.rows() == [{"study": "layers", "models": 1, "seconds": 0.0, "peak_memory": 0}]
    assert len(said) == 1 and "cost.csv" in said[0]


@pytest.mark.slow
def test_what_has_changed_is_told_and_nothing_is_touched(
    zoo: Path, undisturbed: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = Path(shutil.copytree(undisturbed[0], tmp_path / "run"))
    own = Path(shutil.copytree(zoo, tmp_path / "zoo"))

    def contents() -> dict[Path, bytes]:
        return {f: f.read_bytes() for f in out.rglob("*") if f.is_file() and f.name != ".lock"}

    before = contents()
    for more, facts in (
        (["--layer-alphas", "0", "1"], "--layer-alphas 0.0 0.25 0.5 0.75 1.0"),
        (["--draws", "6"], "--draws 4 6"),
        (["--seed", "1"], "--seed"),
        (["--batch-size", "5"], "--batch-size 5"),
        (["--noise", "uniform"], "--noise"),
        (["--models", "b"], "--models b"),
        (["layers"], ""),
    ):
        sweep_refused([*arguments(zoo, out), *more], *facts.split())
    # The same contents at another place are the same; other contents are not, whatever they are called.
    assert sweep.main(arguments(own, out)) == 0
    capsys.readouterr()
    shutil.copy(own / "a.safetensors", own / "b.safetensors")
    sweep_refused(arguments(own, out), "finetuned.b.sha256")
    shutil.copy(zoo / "b.safetensors", own / "b.safetensors")
    data = dict(np.load(own / "far.npz"))
    data["labels"] = (data["labels"] + 1) % 3
    np.savez(own / "far.npz", **data)
    sweep_refused(arguments(own, out), "data.far.sha256")
    with monkeypatch.context() as patch:
        patch.setattr("rft_fast.run.identity.version", lambda name: "0.1")
        sweep_refused(arguments(zoo, out), "versions.open_clip")
    newer = json.loads((out / "config.json").read_text())
    newer["versions"]["rft_fast"] = "99.0"
    with monkeypatch.context() as patch:
        patch.setattr("rft_fast.results.loading.__version__", "99.0")
        results.Run(tmp_path / "newer", newer).close()
    sweep_refused(arguments(zoo, tmp_path / "newer"), "rft_fast", "99.0")
    after = contents()
    assert {f: b for f, b in after.items() if f.suffix == ".png" or f.name == "rows.csv"} == {
        f: b for f, b in before.items() if f.suffix == ".png" or f.name == "rows.csv"
    }


@pytest.mark.slow
def test_a_damaged_run_is_saved_and_can_go_on(
    zoo: Path, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(undisturbed[0], tmp_path / "run"))
    file = out / "rows.sqlite"
    content = bytearray(file.read_bytes())
    place = len(content) // 2 // 4096 * 4096
    content[place : place + 4096] = bytes(4096)
    file.write_bytes(content)
    sweep_refused(arguments(zoo, out), "rows.recovered.sqlite")
    assert file.read_bytes() == bytes(content)
    (out / "rows.recovered.sqlite").replace(file)
    saved = tiny_kills.measurements(out)
    assert 100 < saved < tiny_kills.measurements(undisturbed[0])
    assert sweep.main(arguments(zoo, out)) == 0
    pd.testing.assert_frame_equal(rows_of(out), rows_of(undisturbed[0]), check_exact=True)


@pytest.mark.slow
def test_a_directory_that_vanishes(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "run"
    on_each(monkeypatch, lambda n: shutil.rmtree(out) if n == 12 else None)
    assert sweep.main(arguments(zoo, out)) == 1
    said(capsys.readouterr().err, out)
    assert not out.exists()


@pytest.mark.slow
def test_two_processes_on_one_run(zoo: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert sweep.main(["interpolation", *arguments(zoo, out)]) == 0
    config = json.loads((out / "config.json").read_text())
    with results.Run(out, config):
        sweep_refused(["interpolation", *arguments(zoo, out)], os.getpid())
        sweep_refused(["interpolation", *arguments(zoo, out), "--overwrite"])
    assert sweep.main(["interpolation", *arguments(zoo, out)]) == 0


@pytest.mark.slow
def test_json_lines_and_quiet(zoo: Path, tmp_path: Path, capsys: Any) -> None:
    brief = ["interpolation", *own_models(zoo), "--alphas", "0", "1", "--device", "cpu"]
    assert sweep.main([*brief, "--out", str(tmp_path / "json"), "--json"]) == 0
    printed = capsys.readouterr()
    events = [json.loads(line) for line in printed.out.splitlines()]
    assert [e["event"] for e in events][:1] == ["start"] and events[-1]["event"] == "end"
    measured = [e for e in events if e["event"] == "measured"]
    rows = results.load(tmp_path / "json")
    assert [row["accuracy"] for e in measured for row in e["rows"]] == rows["accuracy"].tolist()
    assert sweep.main([*brief, "--out", str(tmp_path / "quiet"), "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""
    assert (tmp_path / "quiet" / "figures" / "interpolation.png").exists()
    log = (tmp_path / "quiet" / "run.log").read_text()
    said("\n".join(line for line in log.splitlines() if "finished" in line or "in short" in line))
    sweep_refused([*brief, "--quiet", "--json"], "--json", "--quiet")


@pytest.mark.slow
def test_trackers_get_the_rows(zoo: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    brief = ["interpolation", *own_models(zoo), "--alphas", "0:1:3", "--device", "cpu", "--out", str(out)]
    assert sweep.main([*brief, "--track", "tensorboard"]) == 0
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    rows = results.load(out).query("model == 'a' and dataset == 'far'")
    (tag,) = (t for t in events.Tags()["scalars"] if t.startswith("interpolation/far/a/") and "accuracy" in t)
    assert [e.value for e in events.Scalars(tag)] == pytest.approx(rows["accuracy"].tolist())
