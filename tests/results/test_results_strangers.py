"""Run directories of somebody else: nothing in them runs, is written to, or is waited for."""

from __future__ import annotations

import csv
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.wording import refused

from rft_fast import results
from rft_fast.common.words import cell, from_cell
from rft_fast.results import records

CONFIG: dict[str, Any] = {"finetuned": {"m": {"sha256": "1"}}}
Change = Callable[[sqlite3.Connection], object]


def row(number: int) -> dict[str, object]:
    return {"study": "interpolation", "model": "m", "dataset": "d", "alpha": number / 8, "loss": 0.5}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    with results.Run(tmp_path / "run", CONFIG) as run:
        for number in range(8):
            run.add("interpolation", "m", number, [row(number)])
    return tmp_path / "run"


def changed(out: Path, change: Change) -> None:
    with closing(sqlite3.connect(out / "rows.sqlite", isolation_level=None)) as base:
        change(base)


def state(out: Path) -> dict[str, tuple[bytes, int]]:
    found = {}
    for name in sorted(os.listdir(out)):
        if name != ".lock" and (out / name).is_file():
            found[name] = ((out / name).read_bytes(), (out / name).stat().st_mtime_ns)
    return found


def sql(*statements: str) -> Change:
    return lambda base: [base.execute(statement) for statement in statements]


def with_rows_like(change: Callable[[str], str]) -> Change:
    """The table of rows is made otherwise, with the same content."""

    def act(base: sqlite3.Connection) -> None:
        (made,) = base.execute("SELECT sql FROM sqlite_master WHERE name = 'rows'").fetchone()
        held = base.execute("SELECT * FROM rows").fetchall()
        base.execute("DROP TABLE rows")
        base.execute(change(made))
        columns = f"measurement, {records.NAMES}"
        for values in held:
            base.execute(f"INSERT INTO rows ({columns}) VALUES (?{', ?' * (len(values) - 1)})", values)
        base.execute("CREATE INDEX rows_of_measurements ON rows (measurement)")

    return act


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
SCHEMAS: dict[str, Change] = {
    "a view for the rows": sql("ALTER TABLE rows RENAME TO kept", f"CREATE VIEW rows AS {ENDLESS}"),
    "a view for the run": sql(
        "ALTER TABLE run RENAME TO kept", "CREATE VIEW run (config, begun, crc) AS SELECT 1, 2, 3",
    ),
    "another view": sql("CREATE VIEW more AS SELECT 1"),
    "a trigger": sql("CREATE TRIGGER t AFTER INSERT ON rows BEGIN DELETE FROM measurements; END"),
    "a virtual table": sql("CREATE VIRTUAL TABLE more USING fts5(x)"),
    "another table": sql("CREATE TABLE more (x CHECK (length(randomblob(1000000000)) > 0))"),
    "an index of an expression": sql("CREATE INDEX more ON rows (abs(loss))"),
    "a generated column": with_rows_like(lambda made: made[:-1] + ", x AS (zeroblob(1000000000)))"),
    "a constraint": with_rows_like(lambda made: made[:-1] + ", CHECK (length(zeroblob(1000000000)) > 0))"),
    "a default": with_rows_like(lambda made: made.replace("TEXT,", "TEXT DEFAULT (random()),", 1)),
    "a collation": with_rows_like(lambda made: made.replace("TEXT,", "TEXT COLLATE NOCASE,", 1)),
}  # fmt: skip


@pytest.mark.parametrize("what", SCHEMAS)
def test_only_the_tables_of_a_run_are_read(what: str, out: Path) -> None:
    try:
        changed(out, SCHEMAS[what])
    except sqlite3.OperationalError as error:
        pytest.skip(f"this SQLite cannot make it: {error}")
    before = state(out)
    for read in (results.load, results.recorded, results.check):
        with refused(results.Damaged):
            read(out)
    assert state(out) == before
    with pytest.raises(ValueError):
        results.Run(out, CONFIG)
    assert (out / "rows.sqlite").read_bytes() == before["rows.sqlite"][0]


def test_a_recovered_run_holds_tables_alone(out: Path) -> None:
    changed(out, sql("CREATE TRIGGER t AFTER INSERT ON rows BEGIN DELETE FROM measurements; END"))
    assert "8 complete measurements" in results.recover(out)
    (out / "rows.recovered.sqlite").rename(out / "rows.sqlite")
    assert len(results.load(out)) == 8


def set_column(name: str, value: Any) -> Change:
    """One measurement whose checksum fits a value that rft_fast would not write."""

    def act(base: sqlite3.Connection) -> None:
        base.execute(f"UPDATE rows SET {name} = ? WHERE measurement = 1", (value,))
        measured = base.execute(
            "SELECT study, model, number, finished FROM measurements WHERE id = 1"
        ).fetchone()
        crc = records.crc(*measured, *records.rows_of(base, 1))
        base.execute("UPDATE measurements SET crc = ? WHERE id = 1", (crc,))

    return act


def set_config(text: Any) -> Change:
    def act(base: sqlite3.Connection) -> None:
        (begun,) = base.execute("SELECT begun FROM run").fetchone()
        base.execute("UPDATE run SET config = ?, crc = ?", (text, records.crc(text, begun)))

    return act


VALUES: dict[str, Change] = {
    **{f"{name} {value!r:.20}": set_column(name, value) for name, value in (
        ("dataset", b"\xff\x00"), ("loss", "high"), ("loss", b"nan"), ("samples", "many"), ("samples", 1.5),
        ("ood", b"yes"), ("alpha", "inf"), ("noise", b"x" * 100_000),
    )},
    **{f"config {text!r:.20}": set_config(text) for text in (
        "[]", "1", "nonsense", "[" * 100_000, '"text"', "null", b"{}", "", "NaN", "\x00{}",
    )},
}  # fmt: skip


@pytest.mark.parametrize("what", VALUES)
def test_values_that_no_run_has_are_refused(what: str, out: Path) -> None:
    changed(out, VALUES[what])
    before = state(out)
    with pytest.raises(results.Damaged):
        results.load(out)
    assert state(out) == before


@pytest.mark.parametrize("name", ["rows.sqlite", "rows.sqlite-wal", "rows.sqlite-journal", "rows.sqlite-shm"])
@pytest.mark.parametrize("kind", ["fifo", "link"])
def test_what_is_no_file_is_not_opened(name: str, kind: str, out: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"not yours")
    with suppress(FileNotFoundError):
        (out / name).unlink()
    os.mkfifo(out / name) if kind == "fifo" else (out / name).symlink_to(victim)
    with pytest.raises((ValueError, OSError)):
        results.load(out)
    with pytest.raises((ValueError, OSError)):
        results.Run(out, CONFIG)
    assert victim.read_bytes() == b"not yours"


@pytest.mark.parametrize("shared", [True, False])
def test_reading_writes_nothing(shared: bool, out: Path, tmp_path: Path) -> None:
    """Of a process that was killed, the log and its index stay as they are."""
    kept = tmp_path / "killed"
    with results.Run(out, CONFIG) as run:
        run.add("interpolation", "m", 9, [row(9)])
        shutil.copytree(out, kept)  # as a kill would leave it
    if not shared:
        (kept / "rows.sqlite-shm").unlink()
    before = state(kept)
    assert "rows.sqlite-wal" in before
    assert len(results.load(kept)) == 9 and results.recorded(kept) == CONFIG
    assert state(kept) == before


def test_pages_in_disorder_end(out: Path) -> None:
    """Random bytes anywhere, also in the tree of pages: an error, or the rows as they were."""
    whole = (out / "rows.sqlite").read_bytes()
    rows = results.load(out)
    draw = random.Random(0)
    refused = 0
    for trial in range(150):
        data = bytearray(whole)
        page = 4096 * draw.randrange(len(data) // 4096)
        for _ in range(draw.choice((1, 4, 64))):
            # The heads of pages, cells and numbers of pages are where it hurts.
            place = page + (draw.randrange(16) if trial % 2 else draw.randrange(4096))
            data[place] = draw.randrange(256)
        (out / "rows.sqlite").write_bytes(data)
        try:
            assert results.load(out).equals(rows)
        except (ValueError, OSError):
            refused += 1
    assert 30 < refused < 150


NAMES = ["=1+1", "+1", "-1.5", "@SUM(A1)", "\t=1", "\r\n", "'=1", "''@x", " =1", "\uff1d1", "plain", "'plain",
         "a=1", "", "-", "nan", "é=", "=cmd|' /C calc'!A0", '"=1"', "'", "\n-2"]  # fmt: skip


def test_no_name_is_a_formula_in_a_spreadsheet(tmp_path: Path) -> None:
    with results.Run(tmp_path / "run", {"finetuned": {}}) as run:
        for number, name in enumerate(NAMES):
            found = {"study": "interpolation", "model": name, "dataset": name, "alpha": -1.5, "loss": -0.25}
            run.add("interpolation", name, number, [found])
    with (tmp_path / "run" / "rows.csv").open(newline="", encoding="utf-8") as stream:
        lines = list(csv.DictReader(stream))
    cells = [line["model"] for line in lines]
    assert [from_cell(text) for text in cells] == NAMES == results.load(tmp_path / "run")["model"].tolist()
    for name, text in zip(NAMES, cells, strict=True):
        assert not text.lstrip(" \t\r\n'").startswith(("=", "+", "-", "@", "\uff1d")) or text.startswith("'")
        assert text[:1] not in ("\t", "\r", "\n", "=", "+", "-", "@", " ") and (
            text == name or text[0] == "'"
        )
    assert cells[10:14] == NAMES[10:14]
    assert {(line["alpha"], line["loss"]) for line in lines} == {("-1.5", "-0.25")}


def test_tables_of_numbers_are_as_before() -> None:
    table = pd.DataFrame({
        "model": pd.Series(["a", pd.NA], dtype="string"), "r": [-0.1, float("nan")], "n": [-3, 1 << 60],
        "few": pd.Series([-1, pd.NA], dtype="Int64"), "yes": pd.Series([True, pd.NA], dtype="boolean"),
    })  # fmt: skip
    assert table.map(cell).to_csv(index=False) == table.to_csv(index=False)
