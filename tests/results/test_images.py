"""Results of single images: they come back, are written with their rows, and damage is noticed."""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import sqlite3
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support.tiny_images import images_of
from support.wording import refused

from rft_fast import results, studies
from rft_fast.evaluate import Scores
from rft_fast.results import __main__ as command
from rft_fast.results import records
from rft_fast.studies import ImageScores
from rft_fast.studies.images import NO_CLASS

FORK = multiprocessing.get_context("fork")

CONFIG: dict[str, Any] = {"finetuned": {"a": {"sha256": "1"}, "b": {"sha256": "2"}}}
ALPHAS = [0.0, 0.5, 1.0]
SIZES = {"near": 21, "far": 1000}


def child(work: Callable[[], object]) -> int:
    """Runs this in a process of its own; returns its exit status."""
    process = FORK.Process(target=work, daemon=True)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def scores(seed: int, count: int) -> Scores:
    draw = np.random.default_rng(seed)
    losses = torch.from_numpy(draw.lognormal(0, 3, count).astype(np.float32))
    odd = torch.tensor([math.nan, math.inf, 1e6, 65504.0, 1e-9, 0.0])[:count]
    losses[: len(odd)] = odd
    predictions = torch.from_numpy(draw.integers(-1, NO_CLASS, count, dtype=np.int32))
    return Scores(losses, torch.from_numpy(draw.random(count) < 0.7), predictions)


def measured(
    model: str, number: int, study: str = "interpolation"
) -> tuple[list[dict[str, Any]], list[Scores]]:
    """A row, and what it is the mean of."""
    dataset = list(SIZES)[number % 2]
    found = scores(number + 100 * ord(model), SIZES[dataset])
    row = {
        **{"study": study, "model": model, "dataset": dataset, "alpha": ALPHAS[number // 2]},
        **{"samples": found.samples, "loss": found.loss, "accuracy": found.accuracy},
    }
    return [row], [found]


def add(run: results.Run, model: str, number: int, study: str = "interpolation") -> None:
    rows, found = measured(model, number, study)
    run.add(study, model, number, rows, [ImageScores.of(each) for each in found])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    with results.Run(tmp_path / "run", CONFIG) as run:
        for number in (5, 0, 3, 4, 1, 2):
            for model in "ba":
                add(run, model, number)
    return tmp_path / "run"


def same(found: studies.ImageResults, model: str, dataset: str) -> None:
    """Bit for bit what was added."""
    numbers = range(list(SIZES).index(dataset), 6, 2)
    wanted = [measured(model, number) for number in numbers]
    assert found.alphas.tolist() == ALPHAS and found.rows["model"].unique().tolist() == [model]
    pd.testing.assert_frame_equal(found.rows, studies.frame(row for rows, _ in wanted for row in rows))
    assert found.hits.dtype == bool and found.losses.dtype == np.float16
    assert found.predictions is not None and found.predictions.dtype == np.uint16
    assert found.hits.shape == found.losses.shape == found.predictions.shape == (3, SIZES[dataset])
    for k, (_, (kept,)) in enumerate(wanted):
        losses = kept.losses.numpy().astype(float)
        assert found.hits[k].tolist() == kept.correct.tolist()
        assert found.hits[k].mean() == found.rows["accuracy"][k]
        large = losses >= 65520  # rounds to more than the largest number of 16 bits
        assert np.isinf(found.losses[k][large]).all() and np.isnan(found.losses[k][np.isnan(losses)]).all()
        kept_losses, exact = (
            found.losses[k][np.isfinite(losses) & ~large],
            losses[np.isfinite(losses) & ~large],
        )
        assert (np.abs(kept_losses - exact) <= np.maximum(exact * 2**-11, 2**-25)).all()
        classes = [NO_CLASS if p < 0 else p for p in kept.predictions.tolist()]
        assert found.predictions[k].tolist() == classes


def test_what_was_added_comes_back(out: Path) -> None:
    for model in "ab":
        for dataset in SIZES:
            same(results.images(out, model=model, dataset=dataset), model, dataset)
    both = results.images(out, dataset="far")
    assert both.rows["model"].tolist() == ["a"] * 3 + ["b"] * 3 and both.hits.shape == (6, 1000)
    stored = results.Stored(out)
    for model, dataset in (("a", "far"), ("a", "near"), ("b", "far")):
        found = stored.of("interpolation", model, dataset)
        assert found is not None
        same(found, model, dataset)
    assert stored.of("interpolation", "b", "other") is None and stored.of("layers", "b", "far") is None
    assert {key: value[0] for key, value in images_of(out).items()} == {
        ("interpolation", model, number, 0): measured(model, number)[1][0].correct.tolist()
        for model in "ab"
        for number in range(6)
    }


def test_the_command_says_how_many_there_are(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(out)]) == 0
    assert "12, all with results of single images" in capsys.readouterr().out
    (out / "rows.sqlite").write_bytes(b"")
    with refused(ValueError, "interpolation"):
        results.images(out)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9])
def test_any_number_of_images(tmp_path: Path, count: int) -> None:
    kept = scores(1, count)
    row = {"study": "prune", "model": "a", "dataset": "d", "alpha": 0.0, "samples": count}
    without = ImageScores.of(Scores(kept.losses, kept.correct))
    with results.Run(tmp_path, CONFIG) as run:
        run.add("prune", "a", 0, [row, row], [ImageScores.of(kept), without])
        assert [len(each) for each in run.images("prune", "a", 0)] == [count, count]
    found = results.images(tmp_path, study="prune")
    assert found.hits.tolist() == [kept.correct.tolist()] * 2 and found.predictions is None


def test_results_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    (row,), (kept,) = measured("a", 0)
    with results.Run(tmp_path, CONFIG) as run:
        with refused(ValueError, 2, 1):
            run.add("interpolation", "a", 0, [row, row], [ImageScores.of(kept)])
        assert run.done("interpolation", "a") == set()
    with refused(ValueError, NO_CLASS):
        ImageScores.of(Scores(kept.losses[:1], kept.correct[:1], torch.tensor([NO_CLASS], dtype=torch.int32)))


def test_they_are_committed_with_their_rows_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> None:
        run = results.Run(tmp_path, CONFIG)
        for number in range(3):
            add(run, "a", number)
        records.INSERT_IMAGES = "INSERT INTO nowhere VALUES (?, ?, ?, ?, ?, ?)"
        with pytest.raises(OSError, match="nowhere"):
            add(run, "a", 3)
        os._exit(9)

    assert child(work) == 9
    assert len(images_of(tmp_path)) == len(results.load(tmp_path)) == 3
    with results.Run(tmp_path, CONFIG) as run:
        assert run.done("interpolation", "a") == {0, 1, 2}
        add(run, "a", 3)
        add(run, "b", 3)
        assert run.withdraw("interpolation", "a") == 1
    assert sorted(images_of(tmp_path)) == [
        ("interpolation", m, n, 0) for m, n in [*(("a", n) for n in range(3)), ("b", 3)]
    ]


# --- damage -------------------------------------------------------------------------------------------

WHERE = "WHERE measurement = (SELECT id FROM measurements WHERE model = 'a' AND number = 3)"
DAMAGE = {
    "losses": f"UPDATE images SET losses = zeroblob(length(losses)) {WHERE}",
    "a hit": f"UPDATE images SET hits = x'00' || substr(hits, 2) {WHERE}",
    "no predictions": f"UPDATE images SET predictions = NULL {WHERE}",
    "checksum": f"UPDATE images SET crc = crc + 1 {WHERE}",
    "a text": f"UPDATE images SET hits = 'hits' {WHERE}",
    "place": f"UPDATE images SET place = 7 {WHERE}",
    "another place": f"UPDATE images SET place = 'x' {WHERE}",
    "missing": f"DELETE FROM images {WHERE}",
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_noticed_and_the_rest_is_saved(out: Path, what: str) -> None:
    with closing(sqlite3.connect(out / "rows.sqlite", isolation_level=None)) as base:
        base.execute(DAMAGE[what])
    with refused(results.Damaged):
        results.images(out, model="a", dataset="far")
    same(results.images(out, model="b", dataset="far"), "b", "far")
    with refused(results.Damaged, 11, 1):
        results.Run(out, CONFIG)
    (out / "rows.recovered.sqlite").rename(out / "rows.sqlite")
    assert ("interpolation", "a", 3, 0) not in images_of(out) and len(images_of(out)) == 11
    with results.Run(out, CONFIG) as run:
        assert run.resumed == 11
        add(run, "a", 3)
    same(results.images(out, model="a", dataset="far"), "a", "far")


def test_any_damaged_page_costs_whole_measurements_only(out: Path, tmp_path: Path) -> None:
    content = (out / "rows.sqlite").read_bytes()
    whole = {key: repr(found) for key, found in images_of(out).items()}  # NaN differs from itself
    saved = []
    for start in range(4096, len(content), 2 * 4096):  # every second one
        hurt = tmp_path / f"hurt-{start}"
        shutil.copytree(out, hurt)
        (hurt / "rows.sqlite").write_bytes(content[:start] + bytes(4096) + content[start + 4096 :])
        with pytest.raises(results.Damaged):
            results.Run(hurt, CONFIG)
        if (file := hurt / "rows.recovered.sqlite").exists():
            file.rename(hurt / "rows.sqlite")
            found = {key: repr(value) for key, value in images_of(hurt).items()}
            assert found.items() <= whole.items() and len(found) == len(results.load(hurt))
            saved.append(len(found))
        shutil.rmtree(hurt)
    assert saved.count(11) >= 3 and saved.count(12) >= 1  # a page of results, or of an index


def test_results_of_no_measurement_are_damage(out: Path) -> None:
    with closing(sqlite3.connect(out / "rows.sqlite", isolation_level=None)) as base:
        base.execute("UPDATE images SET measurement = 77 WHERE measurement = 1")
        columns = "place, crc, hits, losses, predictions"
        base.execute(f"INSERT INTO images SELECT 1, {columns} FROM images WHERE measurement = 77")
    with refused(results.Damaged, 12, 0):
        results.Run(out, CONFIG)


FORGED = {
    "a byte of hits too few": ("hits", b"\x00"),
    "half a loss": ("losses", b"\x00" * 1999),
    "too few predictions": ("predictions", b"\x00" * 8),
    "numbers": ("predictions", 8),
}


@pytest.mark.parametrize("what", FORGED)
def test_values_that_no_run_has_are_refused(out: Path, what: str) -> None:
    """Whose checksums fit."""
    column, value = FORGED[what]
    with closing(sqlite3.connect(out / "rows.sqlite", isolation_level=None)) as base:
        base.execute(f"UPDATE images SET {column} = ? {WHERE}", (value,))
        packed = base.execute(f"SELECT hits, losses, predictions FROM images {WHERE}").fetchone()
        base.execute(f"UPDATE images SET crc = ? {WHERE}", (records.crc(0, *packed),))
        records.checksum_again(base)
    with refused(results.Damaged):
        results.images(out, model="a", dataset="far")


def test_results_of_other_images_are_refused(tmp_path: Path) -> None:
    (row,), (kept,) = measured("a", 0)
    with results.Run(tmp_path, CONFIG) as run:
        run.add("interpolation", "a", 0, [row | {"samples": 20}], [ImageScores.of(kept)])
    with refused(results.Damaged):
        results.images(tmp_path)


# --- where there are none -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["study", "model", "dataset"])
def test_several_names_are_refused(out: Path, name: str) -> None:
    with refused(TypeError, name, "list"):
        results.images(out, **{name: ["a"]})


def test_a_table_is_no_name_of_one() -> None:
    with refused(TypeError, "describe", "DataFrame"):
        results.describe(results.describe())  # type: ignore[arg-type]


def test_why_there_are_none(out: Path, tmp_path: Path) -> None:
    with refused(FileNotFoundError, "rows.sqlite"):
        results.images(tmp_path)
    with refused(results.NoImages, "sharpness"):
        results.images(out, study="sharpness")
    with refused(ValueError, "layers", "a", "b"):
        results.images(out, study="layers")
    with refused(ValueError, "c", "a", "b"):
        results.images(out, model="c")
    with refused(ValueError, "near", "far"):
        results.images(out)
    with refused(ValueError, "other", "near", "far"):
        results.images(out, dataset="other")
    with results.Run(out, CONFIG) as run:
        run.add("layers", "a", 0, measured("a", 0, "layers")[0])
        add(run, "a", 2, "layers")
    with refused(results.NoImages, "--no-image-results", 1, 2):
        results.images(out, study="layers")
    assert results.Stored(out).of("layers", "a", "near") is None
    with results.Run(tmp_path / "off", {**CONFIG, "run": {"image_results": False}}) as run:
        run.add("layers", "a", 0, measured("a", 0, "layers")[0])
    with refused(results.NoImages, "--no-image-results"):
        results.images(tmp_path / "off", study="layers")
    with results.Run(tmp_path / "empty", CONFIG):
        with refused(ValueError, "interpolation"):
            results.images(tmp_path / "empty")


# --- runs of earlier versions -------------------------------------------------------------------------

OLD = ["model", "study", "dataset", "alpha", "loss", "accuracy", "samples"]  # fewer, in another order
OLD_SCHEMA = """
CREATE TABLE run (config TEXT NOT NULL, begun TEXT NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE measurements (
    id INTEGER PRIMARY KEY, study TEXT NOT NULL, model TEXT NOT NULL, number INTEGER NOT NULL,
    finished TEXT NOT NULL, crc INTEGER NOT NULL, UNIQUE (study, model, number));
CREATE TABLE rows (
    measurement INTEGER NOT NULL REFERENCES measurements (id),
    "model" TEXT, "study" TEXT, "dataset" TEXT, "alpha" REAL, "loss" REAL, "accuracy" REAL,
    "samples" INTEGER);
CREATE INDEX rows_of_measurements ON rows (measurement);
CREATE TABLE scores (
    "of" TEXT NOT NULL, dataset TEXT NOT NULL, alpha REAL NOT NULL, losses BLOB NOT NULL,
    correct BLOB NOT NULL, crc INTEGER NOT NULL, UNIQUE ("of", dataset, alpha));
PRAGMA application_id = 1919317087;
PRAGMA user_version = 1;
"""


def checksum(*values: object) -> int:
    found = 0
    for value in values:
        found = zlib.crc32(value if isinstance(value, bytes) else ascii(value).encode(), found)
    return found


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A run as an earlier version left it, with fewer columns and no table of image results."""
    out = tmp_path / "old"
    (out / "figures").mkdir(parents=True)
    with closing(sqlite3.connect(out / "rows.sqlite", isolation_level=None)) as base:
        base.executescript(OLD_SCHEMA)
        config = '{"finetuned": {"a": {"sha256": "1"}, "b": {"sha256": "2"}}}'
        base.execute("INSERT INTO run VALUES (?, ?, ?)", (config, "then", checksum(config, "then")))
        for number in range(4):
            (row,), _ = measured("a", number)
            values = tuple(None if row[name] != row[name] else row[name] for name in OLD)
            key = ("interpolation", "a", number, "then")
            base.execute(
                "INSERT INTO measurements VALUES (?, ?, ?, ?, ?, ?)",
                (number + 1, *key, checksum(*key, values)),
            )
            base.execute(f"INSERT INTO rows VALUES ({number + 1}{', ?' * len(OLD)})", values)
        packed = ("all images", "near", 0.0, np.float32([0.5, 2]).tobytes(), b"\1\0")
        base.execute("INSERT INTO scores VALUES (?, ?, ?, ?, ?, ?)", (*packed, checksum(*packed)))
    return out


def rows_of(numbers: range) -> pd.DataFrame:
    rows = [dict(measured("a", number)[0][0]) for number in numbers]
    for row in rows:
        row["loss"] = None if row["loss"] != row["loss"] else row["loss"]
    return studies.frame(rows)


def test_runs_of_earlier_versions_are_read_and_resumed(old: Path) -> None:
    before = (old / "rows.sqlite").read_bytes()
    pd.testing.assert_frame_equal(results.load(old), rows_of(range(4)), check_exact=True)
    with refused(results.NoImages, 2):
        results.images(old, dataset="far")
    assert (old / "rows.sqlite").read_bytes() == before
    for _ in range(2):
        with results.Run(old, CONFIG) as run:
            known = run.scores("all images")["near", 0.0]
            assert known.losses.tolist() == [0.5, 2] and known.correct.tolist() == [True, False]
            assert known.predictions is None
            pd.testing.assert_frame_equal(run.rows().iloc[:4], rows_of(range(4)), check_exact=True)
            for number in {4, 5} - run.done("interpolation", "a"):
                add(run, "a", number)
    whole = rows_of(range(6))
    whole.loc[4:, "loss"] = math.nan
    pd.testing.assert_frame_equal(results.load(old), whole, check_exact=True)
    assert len(images_of(old)) == 2
    with refused(results.NoImages, 2, 3):
        results.images(old, dataset="far")


@pytest.mark.parametrize("resumed", [False, True])
def test_a_damaged_run_of_an_earlier_version_is_saved(old: Path, resumed: bool) -> None:
    if resumed:
        with results.Run(old, CONFIG) as run:
            add(run, "a", 4)
    with closing(sqlite3.connect(old / "rows.sqlite", isolation_level=None)) as base:
        base.execute("UPDATE rows SET accuracy = accuracy + 1 WHERE measurement = 3")
    assert f"{3 + resumed} complete measurements were saved" in results.recover(old)
    shutil.move(old / "rows.recovered.sqlite", old / "rows.sqlite")
    found = results.load(old)
    assert found["alpha"].tolist() == [0.0, 0.0, 0.5, *([1.0] if resumed else [])]
    assert found["samples"].tolist() == [21, 1000, 1000, *([21] if resumed else [])]
    assert len(images_of(old)) == resumed


def test_an_upgrade_that_is_killed_changes_nothing(old: Path) -> None:
    before = results.load(old)

    def work() -> None:
        records.checksum_again = lambda base: os._exit(9)  # type: ignore[assignment]
        from rft_fast.results import schema

        schema.checksum_again = records.checksum_again
        results.Run(old, CONFIG)

    assert child(work) == 9
    pd.testing.assert_frame_equal(results.load(old), before)
    with results.Run(old, CONFIG) as run:
        assert run.resumed == 4


@pytest.mark.parametrize("call", [results.load, results.images, lambda out: results.Run(out, CONFIG)])
def test_columns_of_a_later_version_are_not_ignored(out: Path, call: Callable[[Path], object]) -> None:
    with closing(sqlite3.connect(out / "rows.sqlite", isolation_level=None)) as base:
        base.execute('ALTER TABLE rows ADD COLUMN "flatness" REAL')
        records.checksum_again(base)
    with refused(ValueError, "later version"):
        call(out)
