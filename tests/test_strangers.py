"""Nothing in other people's zoos, architecture files and run directories runs, writes, or moves a cursor."""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from tqdm import tqdm

from rft_fast import disk, figures, results, terminal, words
from rft_fast.studies.rows import COLUMNS

# --- files --------------------------------------------------------------------------------------------

WRITTEN = "rows.sqlite rows.sqlite-wal rows.sqlite-shm rows.sqlite-journal .lock run.log".split()
REPLACED = "rows.csv config.json cost.csv correlation.csv figures/interpolation.png figures/prune.png".split()
PLANTED: dict[str, Callable[[Path, Path], object]] = {
    "symbolic link": lambda name, victim: name.symlink_to(victim),
    "to nothing": lambda name, victim: name.symlink_to(victim.with_name("new")),
    "FIFO": lambda name, _: os.mkfifo(name),
    "hard link": lambda name, victim: name.hardlink_to(victim),
}


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("name", [*WRITTEN, *REPLACED])
def test_nothing_is_written_through_what_lies_in_a_run(tmp_path: Path, name: str, planted: str) -> None:
    if planted == "hard link" and name in REPLACED:
        pytest.skip("a new file takes its place, so that the other name keeps the old one")
    with results.Run(tmp_path / "run", {"a": 1}):
        pass
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    file = tmp_path / "run" / name
    file.unlink(missing_ok=True)
    PLANTED[planted](file, victim)
    there = {path.name for path in tmp_path.rglob("*")}
    for call in (
        lambda: results.check(tmp_path / "run"),
        lambda: results.Run(tmp_path / "run", {"a": 1}),
        lambda: results.Run(tmp_path / "run", {"a": 2}, overwrite=True),
    ):
        with pytest.raises(ValueError, match=Path(name).name + " is a "):
            call()
    assert victim.read_bytes() == b"precious" and {path.name for path in tmp_path.rglob("*")} == there


def test_figures_that_are_a_link_are_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "figures").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="figures is a symbolic link"):
        results.check(tmp_path / "run")


def test_parts_cannot_be_foreseen(tmp_path: Path) -> None:
    file, seen = tmp_path / "rows.csv", set()
    for number in range(20):
        with disk.replacing(file) as part:
            assert part.parent == tmp_path and not part.is_symlink() and part.read_bytes() == b""
            seen.add(part.name)
            part.write_text(str(number))
    assert len(seen) == 20 and file.read_text() == "19" and os.listdir(tmp_path) == ["rows.csv"]


def test_parts_that_are_left_are_removed_and_those_in_use_are_not(tmp_path: Path) -> None:
    file, victim = tmp_path / "a", tmp_path / "victim"
    victim.write_text("precious")
    left, link, other = (tmp_path / f".a.{c * 16}.part" for c in "123")
    left.touch()
    link.symlink_to(victim)
    other = tmp_path / ".ab.3333333333333333.part"
    other.touch()
    with disk.replacing(file) as outer:
        outer.write_text("outer")
        disk.replace(file, b"inner")
        assert outer.exists() and file.read_text() == "inner"
    assert file.read_text() == "outer" and victim.read_text() == "precious"
    assert not left.exists() and link.is_symlink() and other.exists()


@pytest.mark.parametrize("planted", ["symbolic link", "to nothing", "FIFO"])
def test_locks_do_not_follow_links(tmp_path: Path, planted: str) -> None:
    PLANTED[planted](tmp_path / ".lock", tmp_path / "victim")
    with pytest.raises(OSError, match=r"\.lock"), disk.locked(tmp_path / ".lock"):
        pass
    assert not (tmp_path / "victim").exists() and not (tmp_path / "new").exists()


# --- the terminal -------------------------------------------------------------------------------------

EVIL = [
    *(chr(c) for c in range(0x20)),
    *(chr(c) for c in range(0x7F, 0xA0)),
    *"\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\udc80\udcff",
]
FINE = "abc ÅÉ 漢字 \u00a0 👩\u200d🔬 ~ \\x1b $x$ <b> — e\u0301"


def test_visible_text() -> None:
    for one in EVIL:
        text = words.visible(f"a{one}b")
        assert text.isprintable() and text[0] == "a" and text[-1] == "b" and len(text) > 3
        assert json.loads(f'"{words.visible(f"a{one}b", lines=True)}"' if one not in "\n\t" else '"x"')
    assert words.visible(FINE) == words.visible(FINE, lines=True) == FINE
    assert words.visible("a\nb\tc", lines=True) == "a\nb\tc"
    assert words.some(["a\nb", "c"]) == "a\\nb, c"


@terminal.escaped
def _speak(text: str) -> None:
    print(text)
    print("error:", text, file=sys.stderr)
    tqdm.write(f"note: {text}")


def test_streams_escape_whoever_writes(capsys: pytest.CaptureFixture[str]) -> None:
    for one in EVIL:
        _speak(f"a{one}b")
    out, err = capsys.readouterr()
    assert not set(EVIL) - {"\n", "\t"} & set(out + err), "these went through"
    _speak(FINE)
    out, err = capsys.readouterr()
    assert out == f"{FINE}\nnote: {FINE}\n" and err.startswith(f"error: {FINE}\n")
    assert not isinstance(sys.stdout, terminal.Escaping) and not isinstance(sys.stderr, terminal.Escaping)


def test_progress_bars_draw_as_without() -> None:
    def drawn(stream: io.StringIO, file: object) -> str:
        with tqdm(total=3, desc="a", file=file, mininterval=0, leave=False, ncols=60) as outer:
            for _ in range(3):
                for _ in tqdm(range(2), desc="b", file=file, mininterval=0, leave=False, ncols=60):
                    pass
                tqdm.write("a line", file=file)
                outer.update()
        return "".join(c for c in stream.getvalue() if not c.isdigit())

    plain, stream = io.StringIO(), io.StringIO()
    assert drawn(stream, terminal.Escaping(stream)) == drawn(plain, plain) and "\x1b[A" in plain.getvalue()


# --- pictures -----------------------------------------------------------------------------------------


def test_any_name_can_be_drawn(tmp_path: Path) -> None:
    names = ["$", "$\\frac{$", "a\x1b[31m\nb", "\u202egnp", "漢字", "</script><img onerror=x>"]
    rows = [
        {"study": "interpolation", "model": name, "dataset": f"{name} data", "ood": True, "alpha": alpha}
        | {"loss": 1.0 + alpha, "loss_se": 0.1, "accuracy": 0.5, "accuracy_se": 0.1, "samples": 10}
        | {"loss_change_se": 0.1, "accuracy_change_se": 0.1}
        for name in names
        for alpha in (0.0, 1.0)
    ]
    table = pd.DataFrame([{c: row.get(c) for c in COLUMNS} for row in rows]).astype(
        {c: k for c, k in COLUMNS.items()}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = figures.interpolation(table, tmp_path / "a.png")
    texts = " ".join(t.get_text() for legend in figure.legends for t in legend.get_texts())
    assert "\\u001b" in texts and r"\$" in texts and not {"\x1b", "\u202e"} & set(texts)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and len(os.listdir(tmp_path)) == 1
