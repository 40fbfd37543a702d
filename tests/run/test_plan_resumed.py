"""``--plan`` of a run that would be resumed: what is left, and what the run itself would refuse."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from support import tiny_zoo
from support.tiny_zoo import BRIEF, own_models, sweep_refused

from rft_fast import names, results, sweep
from rft_fast.run import cost
from rft_fast.run.ledger import Ledger
from rft_fast.run.pieces import Piece

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_zoo.make(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(autouse=True)
def no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second for each GFLOP: the same time for the same work, without measuring it."""

    def rates(evaluator: object, path: object, costs: cost.Flops, *_: object) -> cost.Rates:
        return cost.Rates([1e-9 * flops for flops in costs.stages], [0.0] * len(costs.stages), *[0.0] * 8)

    monkeypatch.setattr(cost, "calibrate", rates)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def planned(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> tuple[dict[str, list[str]], dict[str, int]]:
    """First word of each line of the table -> its words; study -> how many measurements are left."""
    capsys.readouterr()
    assert sweep.main([*words, "--plan"]) == 0
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in printed.splitlines() if line[:1].isalpha()}
    told = re.findall(r"(\S+) ([\d,]+) of (?:about )?([\d,]+) measured", " ".join(printed.split()))
    counts = [(study, *(int(text.replace(",", "")) for text in texts)) for study, *texts in told]
    return lines, {study: of - done for study, done, of in counts}


def interrupted(words: list[str], after: int) -> None:
    """A run whose disk fails after so many measurements."""
    with pytest.MonkeyPatch.context() as patch:
        add, count = results.Run.add, iter(range(after))

        def full(*arguments: object) -> None:
            if next(count, None) is None:
                raise OSError("no space left")
            add(*arguments)  # type: ignore[arg-type]

        patch.setattr(results.Run, "add", full)
        assert sweep.main(words) == 1


def resumed(words: list[str]) -> dict[str, int]:
    """Study -> how many measurements the run makes."""
    made = Counter[str]()
    with pytest.MonkeyPatch.context() as patch:
        measured = Ledger.measured

        def counted(self: Ledger, piece: Piece, *rest: object) -> None:
            made[piece.study] += 1
            measured(self, piece, *rest)  # type: ignore[arg-type]

        patch.setattr(Ledger, "measured", counted)
        assert sweep.main(words) == 0
    return made


@pytest.mark.slow(but="interpolation-2")
@pytest.mark.parametrize(
    ("study", "after"),
    [("interpolation", 2), ("layers", 20), ("layer-sharpness", 25), ("prune", 10), ("prune", 125)],
)
def test_what_is_left_is_what_the_run_then_makes(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], study: str, after: int
) -> None:
    out = tmp_path / "run"
    words = [study, *own_models(zoo, "abc"), *BRIEF, "--out", str(out)]
    fresh, none = planned(words, capsys)
    assert not out.exists() and not none
    interrupted(words, after)
    before = contents(out)
    _, left = planned(words, capsys)
    assert contents(out) == before
    assert left[study] > 0 and [*left] == [name for name in fresh if name in names.STUDIES]
    made = resumed(words)
    guessed = {"prune"} if after < 125 else set()  # its layers depend on rows that are missing
    assert {name: count for name, count in left.items() if count and name not in guessed} == {
        name: count for name, count in made.items() if name not in guessed
    }
    finished, left = planned(words, capsys)
    assert set(left.values()) == {0} and finished[study][2:4] == ["0", "0"]
    again, none = planned([*words, "--overwrite"], capsys)
    assert again[study][:4] == fresh[study][:4] and not none


def test_what_the_run_would_refuse(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, out = tmp_path / "own", tmp_path / "run"
    shutil.copytree(zoo, own)
    words = ["interpolation", *own_models(own), *BRIEF, "--out", str(out)]
    interrupted(words, 2)
    before = contents(out)
    sweep_refused([*words, "--plan", "--seed", "1"], "--seed")
    shutil.copy(own / "a.safetensors", own / "b.safetensors")
    sweep_refused([*words, "--plan"], "finetuned.b.sha256")  # of a file, before any image is decoded
    shutil.copy(zoo / "b.safetensors", own / "b.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr("rft_fast.run.identity.version", lambda name: "0.1")
        sweep_refused([*words, "--plan"], "versions.open_clip")
    newer = json.loads((out / "config.json").read_text())
    newer["versions"]["rft_fast"] = "99.0"
    with monkeypatch.context() as patch:
        patch.setattr("rft_fast.results.loading.__version__", "99.0")
        results.Run(tmp_path / "newer", newer).close()
    sweep_refused([*words[:-1], str(tmp_path / "newer"), "--plan"], "rft_fast", "99.0")
    with results.Run(out, json.loads((out / "config.json").read_text())):
        sweep_refused([*words, "--plan"], f"process {os.getpid()}")
    assert {*contents(out)} == {*before}
    assert all(contents(out)[name][0] == data for name, (data, _) in before.items() if "rows.sq" not in name)


def test_a_damaged_run_is_not_touched(zoo: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["interpolation", *own_models(zoo), *BRIEF, "--out", str(out)]
    interrupted(words, 4)
    file = out / "rows.sqlite"
    data = bytearray(file.read_bytes())
    for damage in (data[:4096] + b"\0" * (len(data) - 4096), data[:100] + b"\xff" * 900 + data[1000:]):
        file.write_bytes(damage)
        before = contents(out)
        sweep_refused([*words, "--plan"], f"python -m rft_fast.results {out} --recover")
        assert contents(out) == before
