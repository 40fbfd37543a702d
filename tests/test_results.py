"""A run's directory: nothing is lost, nothing that is not ours is touched."""

from __future__ import annotations

import csv
import json
import math
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rft_fast import results, studies


def row(alpha: float, **more: object) -> dict[str, object]:
    return {"study": "interpolation", "model": "m", "dataset": "d", "ood": True, "alpha": alpha,
            "samples": 7, "loss": 1 / 3 + alpha, "accuracy": 0.1 + alpha, **more}  # fmt: skip


def read_csv(directory: Path) -> pd.DataFrame:
    """The CSV through the standard library, which reads every float exactly."""
    read: dict[str, Any] = {
        "string": str,
        "float64": float,
        "Int64": int,
        "boolean": lambda text: text == "True",
    }
    with (directory / "rows.csv").open(newline="", encoding="utf-8") as file:
        return studies.frame(
            {name: read[kind](line[name]) if line[name] else None for name, kind in studies.COLUMNS.items()}
            for line in csv.DictReader(file)
        )


def test_rows_are_on_disk_at_once_and_csv_equals_sqlite(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    rows = [row(0.1), row(0.2, layer='a "quoted", layer\nü', seed=2**63 - 1, draws=3), row(0.3)]
    with results.Run(out, {"alphas": [0.1], "name": "ü"}) as run:
        for n, one in enumerate(rows, start=1):
            run.add(one)
            pd.testing.assert_frame_equal(results.load(out), studies.frame(rows[:n]))
            assert [file.name for file in out.glob("rows.*")] == ["rows.sqlite"]
        assert run.figure("interpolation") == out / "figures" / "interpolation.png"
        pd.testing.assert_frame_equal(run.rows(), studies.frame(rows))
    pd.testing.assert_frame_equal(results.load(out), studies.frame(rows))
    pd.testing.assert_frame_equal(read_csv(out), studies.frame(rows))
    assert json.loads((out / "config.json").read_text()) == {"alphas": [0.1], "name": "ü"}
    names = {file.name for file in out.iterdir()}
    assert names == {"rows.sqlite", "rows.csv", "config.json", "figures"}


def test_losses_that_are_not_finite_survive(tmp_path: Path) -> None:
    losses = [math.nan, math.inf, -math.inf, 5e-324, 0.1 + 0.2]
    with results.Run(tmp_path / "run", {}) as run:
        for loss in losses:
            run.add(row(0.0, loss=loss, loss_se=None))
    loaded = results.load(tmp_path / "run")
    assert [str(x) for x in loaded["loss"]] == [str(x) for x in losses]
    assert loaded["loss_se"].isna().all()
    pd.testing.assert_frame_equal(read_csv(tmp_path / "run"), loaded)
    # A measured NaN and a value that does not exist stay apart on disk.
    with sqlite3.connect(tmp_path / "run" / "rows.sqlite") as database:
        stored = database.execute("SELECT loss, loss_se FROM rows").fetchone()
    assert stored == ("nan", None)
    line = (tmp_path / "run" / "rows.csv").read_text().splitlines()[1].split(",")
    header = list(studies.COLUMNS)
    assert (line[header.index("loss")], line[header.index("loss_se")]) == ("nan", "")


def test_values_of_other_libraries_are_stored_as_numbers(tmp_path: Path) -> None:
    numpy_row = pd.Series({"alpha": 0.25, "loss": 2.0})
    with results.Run(tmp_path / "run", {}) as run:
        run.add(row(numpy_row["alpha"], loss=numpy_row["loss"], samples=pd.Series([9])[0]))
    loaded = results.load(tmp_path / "run").iloc[0]
    assert (loaded["alpha"], loaded["loss"], loaded["samples"]) == (0.25, 2.0, 9)


def test_a_run_that_fails_keeps_its_rows(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), results.Run(tmp_path / "run", {}) as run:
        run.add(row(0.5))
        raise KeyboardInterrupt
    assert len(results.load(tmp_path / "run")) == len(read_csv(tmp_path / "run")) == 1


def test_a_killed_run_keeps_its_rows(tmp_path: Path) -> None:
    code = f"""
import os
from rft_fast import results
run = results.Run({str(tmp_path / "run")!r}, {{}})
for alpha in range(5):
    run.add({{"study": "s", "alpha": alpha}})
os._exit(9)  # no cleanup, as after kill -9
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert results.load(tmp_path / "run")["alpha"].tolist() == [0, 1, 2, 3, 4]


def test_rows_of_another_run_are_replaced_only_on_purpose(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with results.Run(out, {"run": 1}) as run:
        run.add(row(0.1))
        run.figure("interpolation").write_bytes(b"old")
    (out / "figures" / "mine.png").write_bytes(b"mine")
    (out / "notes.txt").write_text("mine")
    (out / "report.html").write_text("of the old rows")
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    for refuse in (lambda: results.check(out), lambda: results.Run(out, {"run": 2})):
        with pytest.raises(ValueError, match="already holds 1 rows"):
            refuse()
    results.check(out, overwrite=True)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before

    with results.Run(out, {"run": 2}, overwrite=True) as run:
        assert not run.figure("interpolation").exists() and not (out / "rows.csv").exists()
        assert not (out / "report.html").exists()
        run.add(row(0.2))
    assert results.load(out)["alpha"].tolist() == [0.2]
    assert read_csv(out)["alpha"].tolist() == [0.2]
    assert json.loads((out / "config.json").read_text()) == {"run": 2}
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "figures" / "mine.png").read_bytes() == b"mine"


def test_a_run_without_rows_may_begin_again(tmp_path: Path) -> None:
    results.Run(tmp_path / "run", {}).close()
    with results.Run(tmp_path / "run", {}) as run:
        run.add(row(0.5))
    assert len(results.load(tmp_path / "run")) == 1


@pytest.mark.parametrize("name", ["config.json", "rows.csv", "figures"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_under_our_names_are_left_alone(tmp_path: Path, name: str, overwrite: bool) -> None:
    (tmp_path / name).write_text("theirs")
    with pytest.raises(ValueError, match=f"holds {name} but no rows.sqlite"):
        results.Run(tmp_path, {}, overwrite=overwrite)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "theirs"


def test_other_files_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("theirs")
    with results.Run(tmp_path, {}) as run:
        run.add(row(0.5))
    assert (tmp_path / "README.md").read_text() == "theirs"


@pytest.mark.parametrize("content", [b"no database at all, but long enough to be one" * 30, b""])
def test_a_file_that_is_no_table_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows.sqlite").write_bytes(content)
    for refuse in (
        lambda: results.load(tmp_path),
        lambda: results.Run(tmp_path, {}, overwrite=True),
    ):
        with pytest.raises(ValueError, match="not a readable table of rows"):
            refuse()
    assert (tmp_path / "rows.sqlite").read_bytes() == content


def test_places_that_cannot_be_written_to_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("theirs")
    for place in (file, file / "run"):
        with pytest.raises(ValueError, match="expected a directory, got the file"):
            results.Run(place, {})
    # Root may write anywhere, so permissions are pretended.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    (tmp_path / "there").mkdir()
    for place in (tmp_path / "there", tmp_path / "new"):
        with pytest.raises(PermissionError, match="not writable"):
            results.Run(place, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "there"]


def test_nothing_is_made_before_the_request_is_known_to_be_json(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="JSON"):
        results.Run(tmp_path / "run", {"path": tmp_path})
    assert not (tmp_path / "run").exists()


def test_unknown_columns_are_refused(tmp_path: Path) -> None:
    with results.Run(tmp_path / "run", {}) as run:
        with pytest.raises(ValueError, match=r"got \['accurcy'\]"):
            run.add({"accurcy": 0.5})
        assert run.rows().empty


def test_a_full_disk_is_told_and_the_rows_before_are_kept(tmp_path: Path) -> None:
    with results.Run(tmp_path / "run", {}) as run:
        run.add(row(0.1))
        database = run._database
        pages = database.execute("PRAGMA page_count").fetchone()[0]
        database.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own full disk
        with pytest.raises(OSError, match="full"):
            for _ in range(1000):
                run.add(row(0.2))
    loaded = results.load(tmp_path / "run")
    assert loaded["alpha"].tolist()[:1] == [0.1] and len(loaded) == len(read_csv(tmp_path / "run"))


def test_loading_from_nowhere_is_refused_and_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a run's directory"):
        results.load(tmp_path)
    assert not list(tmp_path.iterdir())
