"""Every command that ends well says on its last line what to run next."""

from __future__ import annotations

import importlib
import shlex
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from support import tiny_zoo

from rft_fast.common import again, program

# Command -> arguments of each way in which it ends well, with the command that follows. `{run}` is a run,
# `{zoo}` a folder of models and data, `{out}` a new folder.
MODELS = "--arch {zoo}/tiny.json --zeroshot {zoo}/zeroshot.safetensors"
SWEEP = f"interpolation {MODELS} --finetuned {{zoo}}/a.safetensors --data far={{zoo}}/far.npz --alphas 0:1:3"
TRAIN = f"{MODELS} --train {{zoo}}/near --out {{out}} --batch-size 12 --epochs 1 --warm-up 0 --device cpu"
MERGE = "interpolate --zeroshot {zoo}/zeroshot.safetensors --finetuned {zoo}/a.safetensors --alpha 0.5"
FILL = "sweep --arch NAME --zeroshot SOURCE --finetuned FILE"
ENDS: dict[str, dict[str, str]] = {
    "sweep": {
        f"{SWEEP} --device cpu --out {{out}}": "report {out}",
        f"{SWEEP} --device cpu --out {{out}} --plan": f"sweep {SWEEP} --device cpu --out {{out}}",
    },
    "finetune": {TRAIN: "sweep {out}", f"--dry-run {TRAIN}": f"finetune {TRAIN}"},
    "merge": {f"{MERGE} --out {{out}}.pt": "checkpoints {zoo}/zeroshot.safetensors {out}.pt"},
    "checkpoints": {
        "{zoo}/a.safetensors": "checkpoints {zoo}/a.safetensors FILE2",
        "{zoo}/zeroshot.safetensors {zoo}/a.safetensors": MERGE.join(("merge ", " --out merged.safetensors")),
    },
    "datasets": {
        "{zoo}/far.npz --rows 3": f"{FILL} --data far={{zoo}}/far.npz",
        "{zoo}/near --rows 3 --labels order --kind folder": f"{FILL} "
        "--data near={zoo}/near --data-kind near=folder --data-labels near=order",
        "{zoo}/far.npz --rows 3 --quick": "datasets {zoo}/far.npz --rows 3",
    },
    "results": {"{run}": "report {run}"},
    "figures": {"{run} --figure-format svg": "report {run}"},
    "report": {"{run}": ""},
    "cache": {"": "sweep", "--clear": "sweep"},
    "env": {"": ""},
}
# No such line: output for programs (--json), none at all (--quiet), --help and --version, a status other than
# 0, and `results --recover` where nothing of a run can be read, so that there is nothing to resume.


def run_command(name: str, words: list[str]) -> int:
    package = Path(program.__file__).parents[1] / name
    module = f"rft_fast.{name}.__main__" if package.is_dir() else f"rft_fast.{name}"
    main: Callable[[list[str]], int] = importlib.import_module(module).main
    return main(words)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    zoo = tiny_zoo.make(tmp_path_factory.mktemp("next"))
    run = zoo / "run"
    words = shlex.split(SWEEP.format(zoo=zoo))
    assert run_command("sweep", [*words, "--device", "cpu", "--out", str(run), "--overwrite", "--quiet"]) == 0
    return {"zoo": zoo, "run": run}


def test_all_commands_are_here() -> None:
    assert set(ENDS) == set(program.COMMANDS)


@pytest.mark.parametrize(("name", "given"), [(name, given) for name, all_ in ENDS.items() for given in all_])
def test_the_last_line_is_the_next_command(
    name: str,
    given: str,
    places: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> None:
    monkeypatch.setenv("RFT_CACHE", str(tmp_path / "cache"))
    where = {key: str(place) for key, place in {**places, "out": tmp_path / "out"}.items()}
    assert run_command(name, shlex.split(given.format(**where))) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if line.startswith("next: ")]
    assert found and lines[-len(found) :] == found
    expected, words = shlex.split(ENDS[name][given].format(**where)), shlex.split(found[0])[1:]
    if words[:2] == ["python", "-m"]:
        words = [words[2].removeprefix("rft_fast."), *words[3:]]
    if name == "report":
        assert words[0] == "webbrowser" and words[1].startswith("file://")
    elif name == "env":
        assert words == ["sweep"] or words[:2] == ["pip", "install"]
    else:
        assert words == expected


@pytest.mark.parametrize("option", ["--quiet", "--json"])
def test_output_for_programs_has_no_such_line(
    option: str, places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(SWEEP.format(zoo=places["zoo"]))
    assert run_command("sweep", [*words, "--device", "cpu", "--out", str(tmp_path / "out"), option]) == 0
    assert "next:" not in capsys.readouterr().out


def test_the_next_lines_of_a_recovered_run_resume_it(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Although the run was begun with --overwrite."""
    run = tmp_path / "run"
    shutil.copytree(places["run"], run)
    (run / "rows.sqlite-shm").write_bytes(b"")  # as a killed process leaves it
    assert run_command("results", [str(run), "--recover"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
    assert [line[1] for line in lines] == ["rm", "mv", "python"] and "--overwrite" not in lines[2]
    assert lines[0][2:] == [str(run / "rows.sqlite-shm")]
    Path(lines[0][2]).unlink()
    assert lines[1][2:] == [str(run / "rows.recovered.sqlite"), str(run / "rows.sqlite")]
    Path(lines[1][2]).replace(lines[1][3])

    def dates() -> list[object]:
        with sqlite3.connect(run / "rows.sqlite") as base:
            return base.execute("SELECT finished FROM measurements").fetchall()

    before = dates()
    assert lines[2][1:4] == ["python", "-m", "rft_fast.sweep"] and str(places["run"]) in lines[2]
    moved = [str(run) if word == str(places["run"]) else word for word in lines[2][4:]]
    assert run_command("sweep", moved) == 0
    assert before and dates() == before, "nothing is measured again"


def test_a_run_with_nothing_readable_has_no_next_line(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(places["run"], run)
    (run / "rows.sqlite").write_bytes(b"x" * 100)
    assert run_command("results", [str(run), "--recover"]) == 0
    out = capsys.readouterr().out
    assert "next:" not in out and "none of it could be read" in out


def test_arguments_that_resume_a_sweep() -> None:
    words = ["zoo", "--overwrite", "--alphas", "0:1:3"]
    assert again.resuming(words, Path("runs/1")) == ["zoo", "--alphas", "0:1:3", "--out", "runs/1"]
    for out in (["--out", "here"], ["--out=here"]):
        assert again.resuming([*words, *out], Path("runs/1")) == ["zoo", "--alphas", "0:1:3", *out]
    assert again.without(["--plan", "x", "--plan"], "--plan") == ["x"]
