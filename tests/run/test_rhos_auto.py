"""``--rhos auto`` in a run: one rho for all models, resumed, on workers, in the plan; what is refused."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from support import tiny_zoo
from support.tiny_zoo import own_models, sweep_refused

from rft_fast import results, sweep
from rft_fast.config import request
from rft_fast.settings import Sharpness
from rft_fast.studies import pilot

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_zoo.make(tmp_path_factory.mktemp("zoo"))


def words(zoo: Path) -> list[str]:
    return ["sharpness", "layer-sharpness", *own_models(zoo, "ab"), "--rhos", "auto", "--alphas", "0", "0.5",
            "1", "--draws", "4", "--sharpness-data", "far", "--layers", "visual.conv1", "--device", "cpu",
            "--quiet"]  # fmt: skip


@pytest.fixture(scope="module")
def alone(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    assert sweep.main([*words(zoo), "--out", str(out)]) == 0
    return out


def rows_of(out: Path) -> pd.DataFrame:
    return results.load(out).drop(columns="seconds")


@pytest.mark.slow
def test_all_models_take_the_rho_whose_median_is_the_target(alone: Path) -> None:
    rows = rows_of(alone)
    ahead = rows[rows["study"] == "pilot"]
    assert len(ahead) == 2 * (len(pilot.GRID) + pilot.STEPS) and set(ahead["alpha"]) == {1.0}
    (rho,) = rows.loc[rows["study"].isin(["sharpness", "layer-sharpness"]), "rho"].unique()
    medians = ahead.groupby("rho")["sharpness"].median()
    assert medians[rho] == pytest.approx(0.1, rel=0.05)
    below, above = medians[medians.index < rho * 0.98], medians[medians.index > rho * 1.02]
    assert (below < 0.1).all() and (above > 0.1).all()
    # The same draws as of the study itself, which makes as many here.
    there = rows[(rows["study"] == "sharpness") & (rows["alpha"] == 1)].set_index("model")["sharpness"]
    assert ahead[ahead["rho"] == rho].set_index("model")["sharpness"].to_dict() == pytest.approx(
        there.to_dict()
    )
    log = (alone / "run.log").read_text()
    assert f"rho = {rho:g}" in log and all(f"{name} {value:.3g}" in log for name, value in there.items())
    assert not (alone / "figures" / "pilot.png").exists() and "pilot" in (alone / "cost.csv").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 1, 3, 7])
def test_it_is_resumed(zoo: Path, alone: Path, tmp_path: Path, left: int) -> None:
    """With some rounds of the pilot: one model's of the last of them, nothing measured after it."""
    out = tmp_path / "run"
    assert sweep.main([*words(zoo), "--out", str(out)]) == 0
    with sqlite3.connect(out / "rows.sqlite") as database:
        gone = [
            number
            for number, study, model, turn in database.execute(
                "SELECT id, study, model, number FROM measurements"
            )
            if study in ("sharpness", "layer-sharpness")
            or (study == "pilot" and (turn >= left or (turn == left - 1 and model == "b")))
        ]
        marks = ", ".join("?" * len(gone))
        database.execute(f"DELETE FROM rows WHERE measurement IN ({marks})", gone)
        database.execute(f"DELETE FROM measurements WHERE id IN ({marks})", gone)
    database.close()
    assert sweep.main([*words(zoo), "--out", str(out)]) == 0
    pd.testing.assert_frame_equal(rows_of(out), rows_of(alone))


@pytest.mark.slow
def test_it_is_resumed_without_the_interpolation_of_a_model(
    zoo: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As workers may leave it: the grid of another model, which crosses nothing by itself, is complete."""
    rows = rows_of(alone)
    grid = rows[(rows["study"] == "pilot") & rows["rho"].isin(pilot.GRID)]
    table = grid.pivot(index="model", columns="rho", values="sharpness")
    low, median = table.max(axis=1).min(), table.median().max()
    assert low < median
    monkeypatch.setattr(pilot, "TARGET", (low + median) / 2)
    out, high = tmp_path / "run", table.max(axis=1).idxmax()
    asked = [*words(zoo), "--no-image-results", "--out", str(out)]
    assert sweep.main(asked) == 0
    whole = rows_of(out)
    with sqlite3.connect(out / "rows.sqlite") as database:
        query = "SELECT id FROM measurements WHERE model = ? OR study <> 'interpolation' AND number > 0"
        gone = [number for (number,) in database.execute(query, [high])]
        marks = ", ".join("?" * len(gone))
        database.execute(f"DELETE FROM rows WHERE measurement IN ({marks})", gone)
        database.execute(f"DELETE FROM measurements WHERE id IN ({marks})", gone)
    database.close()
    assert sweep.main(asked) == 0
    pd.testing.assert_frame_equal(rows_of(out), whole)


@pytest.mark.slow
@pytest.mark.ray
def test_workers_find_the_same(zoo: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    # In a process of its own: Ray does not start where the same process was a client of another cluster.
    command = [sys.executable, "-m", "rft_fast.sweep", *words(zoo), "--workers", "2", "--out", str(out)]
    subprocess.run(command, check=True, timeout=600)
    pd.testing.assert_frame_equal(rows_of(out), rows_of(alone))


@pytest.mark.slow
def test_the_plan_counts_it(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main([*(word for word in words(zoo) if word != "--quiet"), "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line.split() for line in lines if line.startswith("pilot"))
    # Two models; a write for each of 13 rhos and 4 draws, and seven clean ones; 40 images.
    assert line[1:3] == ["2", str(2 * (13 * 4 + 7))] and int(line[3].replace(",", "")) >= 2 * 40 * 13 * 4
    assert any("7 rhos and 6" in line for line in lines if "--rhos auto" in line)


@pytest.mark.slow
def test_no_crossing_ends_the_run_with_what_was_found(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pilot, "TARGET", 1e9)
    assert sweep.main([*words(zoo), "--out", str(tmp_path / "run")]) == 1
    printed = capsys.readouterr().err
    assert "--rhos auto: expected a rho from 0.01 to 10" in printed and "at rho = 3.16" in printed
    assert set(rows_of(tmp_path / "run")["study"]) == {"interpolation", "pilot"}


def test_what_is_refused(zoo: Path) -> None:
    sweep_refused(["sharpness", "--rhos", "auto", "0.1"], "auto", 0.1)
    sweep_refused(["interpolation", "--rhos", "auto"], "--rhos", "auto", "sharpness")
    sweep_refused(["sharpness", *own_models(zoo, "a"), "--rhos", "auto"], "--rhos", "a", 2)
    sweep_refused(["pilot"], "pilot")


def test_it_is_empty_in_the_settings_and_nobody_s_study() -> None:
    asked = request.read(["layer-sharpness", "--rhos", "auto"])
    assert asked.of(Sharpness).rhos == () and asked.measured == ["interpolation", "pilot", "layer-sharpness"]
    assert "pilot" not in request.read(["layer-sharpness"]).measured
    assert "pilot" in request.read(["--rhos", "auto", "--paper"]).measured
