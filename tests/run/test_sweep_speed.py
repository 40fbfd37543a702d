"""The command line's options of speed: precision, memory, caches, unreadable images, the plan."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support import tiny_zoo
from support.tiny_zoo import own_models, sweep_refused
from support.wording import said

import rft_fast
from rft_fast import results, studies, sweep
from rft_fast.common import meter
from rft_fast.run import cost

SHORT = ["--alphas", "0", "0.5", "1", "--sharpness-alphas", "0", "0.5", "1", "--draws", "3"]
SHORT += ["--device", "cpu"]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_zoo.make(tmp_path_factory.mktemp("zoo"))


def run(zoo: Path, out: Path, *options: str) -> pd.DataFrame:
    assert sweep.main([*options, *own_models(zoo), *SHORT, "--out", str(out)]) == 0
    return results.load(out)


@pytest.mark.slow
def test_other_precisions_are_near_and_said(zoo: Path, tmp_path: Path) -> None:
    exact = run(zoo, tmp_path / "fp32", "interpolation", "layers")
    for name, most in (("bf16", 0.1), ("fp16", 0.01), ("bf16x3", 1e-4)):
        rows = run(zoo, tmp_path / name, "interpolation", "layers", "--precision", name)
        assert set(rows["precision"]) == {name}
        difference = (rows["loss"] - exact["loss"]).abs()
        assert 0 < difference.max() < most
        assert (
            json.loads((tmp_path / name / "config.json").read_text())["settings"]["computed"]["precision"]
            == name
        )


@pytest.mark.slow
def test_a_memory_limit_changes_no_number(zoo: Path, tmp_path: Path) -> None:
    options = ["interpolation", "layers", "sharpness", "layer-sharpness"]
    free = run(zoo, tmp_path / "free", *options)
    # 20 kB: images in pieces of a few, batches of a few.
    tight = run(zoo, tmp_path / "tight", *options, "--memory-limit", "0.00002")
    pd.testing.assert_frame_equal(
        tight.drop(columns="seconds"), free.drop(columns="seconds"), rtol=1e-4, atol=2e-6
    )


@pytest.mark.slow
def test_images_are_decoded_once(
    zoo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from PIL import Image

    opened: list[str] = []
    plain = Image.open

    def counted(file: object, *rest: object, **more: object) -> object:
        opened.append(str(file))
        return plain(file, *rest, **more)

    monkeypatch.setattr(Image, "open", counted)
    kept = tmp_path / "cache"
    first = run(zoo, tmp_path / "a", "interpolation", "--cache", str(kept))
    count = len(opened)
    assert count >= 12 and any(kept.rglob("*"))
    again = run(zoo, tmp_path / "b", "interpolation", "--cache", str(kept))
    assert len(opened) == count
    run(zoo, tmp_path / "c", "interpolation", "--no-cache")
    assert len(opened) == 2 * count
    pd.testing.assert_frame_equal(first.drop(columns="seconds"), again.drop(columns="seconds"))


@pytest.mark.slow
def test_unreadable_images_are_refused_or_counted(
    zoo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(zoo, tmp_path / "zoo")
    bad = tmp_path / "zoo" / "near" / "1" / "4.png"
    bad.write_bytes(bad.read_bytes()[:40])
    sweep_refused(["interpolation", *own_models(tmp_path / "zoo")], "12")
    rows = run(tmp_path / "zoo", tmp_path / "out", "interpolation", "sharpness", "--skip-unreadable")
    printed = capsys.readouterr()
    titles = [line for line in printed.out.splitlines() if line.startswith(("near:", "far:"))]
    said("\n".join(titles), "11 images", "without 1", "40 images", "3 alphas")
    assert "4.png" in printed.err  # as any other notice
    assert re.search(r"  notice: UserWarning: .*4\.png", (tmp_path / "out" / "run.log").read_text())
    run(tmp_path / "zoo", tmp_path / "quiet", "interpolation", "--skip-unreadable", "--quiet")
    assert capsys.readouterr() == ("", "")
    assert "4.png" in (tmp_path / "quiet" / "run.log").read_text()
    counts = rows.groupby("dataset")[["samples", "skipped"]].first()
    assert counts.loc["near"].tolist() == [11, 1] and counts.loc["far"].tolist() == [40, 0]
    assert rows["skipped"].notna().all()


@pytest.mark.slow
def test_what_a_run_took(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(zoo, tmp_path / "out", "interpolation", "layers")
    took = pd.read_csv(tmp_path / "out" / "cost.csv")
    assert took["study"].tolist() == ["interpolation", "layers"] and took["models"].tolist() == [2, 2]
    assert (took["seconds"] > 0).all()
    # The models are tiny: it is this process, now as then. Tells other units apart.
    assert (took["peak_memory"] / meter.resident()).between(0.5, 4).all()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("cost"))
    said(line, "interpolation", "layers")


@pytest.mark.slow
def test_out_of_memory_ends_a_run_and_keeps_its_rows(
    zoo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = studies.layerwise_interpolation

    def full(path: rft_fast.Path, *more: Any, **options: Any) -> pd.DataFrame:
        if isinstance(path.writer, cost.CountingWriter):  # what it costs is told before
            return real(path, *more, **options)
        raise MemoryError("Evaluator: not even one image fits")

    monkeypatch.setattr(studies, "layerwise_interpolation", full)
    options = ["interpolation", "layers", *own_models(zoo), *SHORT, "--out", str(tmp_path / "out")]
    assert sweep.main(options) == 1
    said(capsys.readouterr().err, "12 rows", tmp_path / "out")
    assert len(results.load(tmp_path / "out")) == 12


@pytest.mark.slow
def test_zero_shot_points_are_measured_once_per_run(
    zoo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows at alpha = 0 are the same for every model, and all but the first cost nothing."""
    rows = run(zoo, tmp_path / "out", "interpolation", "layers", "sharpness", "layer-sharpness")
    start = rows[rows["alpha"] == 0]
    # Instability compares with the other end of the path, which is the model's own.
    drop = ["model", "seconds", *rows.columns[rows.columns.str.startswith("instability")]]
    one, two = (start[start["model"] == model].reset_index(drop=True) for model in "ab")
    for study in ("sharpness", "layer-sharpness"):
        again = two[two["study"] == study]
        assert len(again) and (again["seconds"] == 0).all()
        assert (one.loc[one["study"] == study, "seconds"] > 0).all()
    pd.testing.assert_frame_equal(one.drop(columns=drop), two.drop(columns=drop))


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        (["--precision", "fp8"], "--precision fp8"),
        (["--precision", "tf32", "--device", "cpu"], "tf32"),
        (["--memory-limit", "0"], "--memory-limit"),
        (["--cache", "x", "--no-cache"], "--no-cache --cache"),
    ],
)
def test_bad_options(options: list[str], facts: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sweep_refused(["interpolation", *options], *facts.split())


@pytest.mark.slow
def test_a_plan_counts_and_measures_nothing(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "cache"
    options = [*own_models(zoo, "abc"), *SHORT, "--seed", "1", "--cache", str(kept)]
    assert sweep.main([*options, "--plan"]) == 0
    planned = capsys.readouterr().out
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []  # no run, no cache
    notes = planned[planned.index("\n- ") : planned.index("\nnext: ")]
    said(" ".join(notes.split()).replace(" - ", "\n- "), "12 images")
    lines = {line.split()[0]: line.split() for line in planned.splitlines() if line[:1].isalpha()}
    assert [lines[s][1] for s in ("interpolation", "layers", "sharpness", "layer-sharpness", "prune")] == [
        "3",
        "2",
        "3",
        "3",
        "2",
    ]
    # Settings of the weights that a run scores, for each study: counted from the rows that it leaves.
    assert sweep.main([*options, "--out", str(tmp_path / "out")]) == 0
    rows = results.load(tmp_path / "out")
    fitted = rows[(rows["study"] == "interpolation") & (rows["alpha"] > 0)]
    # Every model at two positions on both sets at once, and all of them together at zero-shot.
    assert int(lines["interpolation"][2]) == fitted.groupby(["model", "alpha"]).ngroups + 1
    layered = rows[(rows["study"] == "layers") & (rows["alpha"] > 0)]
    assert int(lines["layers"][2]) == len(layered) + 1
    assert "peak memory: " in planned
