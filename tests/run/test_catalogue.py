"""The catalogue: what is added to it runs as the paper's studies do, from the command line to the page."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pandas as pd
import pytest
from support import tiny_zoo, toy_study
from support.tiny_zoo import own_models
from support.wording import refused

from rft_fast import catalogue, names, report, results, sweep
from rft_fast.catalogue import Study
from rft_fast.config.request import read

BRIEF = ["--alphas", "0:1:5", "--device", "cpu"]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_zoo.make(tmp_path_factory.mktemp("zoo"))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Study:
    """A study more, for this test."""
    monkeypatch.setattr(catalogue, "_TABLE", dict(catalogue._TABLE))
    study = toy_study.Halfway()
    catalogue.register(study)
    return study


def rows_of(out: Path) -> pd.DataFrame:
    return results.load(out).drop(columns="seconds")


def test_the_papers_studies_come_first_in_its_order() -> None:
    assert tuple(catalogue.names()[: len(names.STUDIES)]) == names.STUDIES


def test_a_name_is_taken_once(toy: Study) -> None:
    with refused(ValueError, "halfway"):
        catalogue.register(toy_study.Halfway())
    with refused(ValueError, "halfways"):
        catalogue.study("halfways")


def test_a_study_beyond_the_paper_runs_where_it_is_named(
    toy: Study, zoo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(toy, "by_default", False)
    assert set(names.STUDIES) < {*catalogue.default()} and "halfway" not in catalogue.default()
    with pytest.raises(SystemExit):
        sweep.main(["--help"])
    paper, _, beyond = capsys.readouterr().out.partition("beyond the paper")
    assert "layer-sharpness" in paper and "halfway" not in paper
    assert f"halfway {toy.help}" in " ".join(beyond.split())
    for named, wanted in ([], False), (["halfway"], True):
        request = read([*named, *own_models(zoo, "abc")])
        assert ("halfway" in request.studies) == wanted and request.everything != wanted


def test_a_study_that_shows_nothing_is_refused_before_it_measures() -> None:
    class Mute(Study):
        name = "mute"

    with pytest.raises(TypeError, match=r"draw.*say.*section"):  # Python's words
        Mute()  # type: ignore[abstract]


def test_a_study_more_needs_one_file(
    toy: Study, zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Help, plan, rows, figure, words, page, and a second run that finds nothing to do."""
    command = ["halfway", *own_models(zoo, "abc"), *BRIEF]
    with pytest.raises(SystemExit):
        sweep.main(["--help"])
    assert f"halfway          {toy.help}" in capsys.readouterr().out

    assert sweep.main([*command, "--plan"]) == 0
    plan = capsys.readouterr().out
    line = next(line.split() for line in plan.splitlines() if line.startswith("halfway"))
    assert line[:4] == ["halfway", "2", "6", "312"]  # models, settings of the weights, forward passes
    assert "- Halfway: 3 positions." in plan

    out = tmp_path / "run"
    assert sweep.main([*command, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    rows = rows_of(out)
    assert list(rows["study"].unique()) == ["interpolation", "halfway"]
    # The interpolation measured the same at the same places.
    keys = ["model", "dataset", "alpha"]
    both = rows[rows["study"] == "halfway"].merge(
        rows[rows["study"] == "interpolation"], on=keys, suffixes=("", "_there")
    )
    assert len(both) == 2 * 2 * 3  # models, data sets, positions
    assert (both["loss"] == both["loss_there"]).all() and (both["accuracy"] == both["accuracy_there"]).all()
    assert f"halfway: at most {100 * both['accuracy'].max():.1f} %" in printed
    assert "- Halfway was measured." in printed.partition("\n\n")[0]
    assert "in short: Halfway was measured." in (out / "run.log").read_text()
    assert matplotlib.image.imread(out / "figures" / "halfway.png").std() > 0
    assert list(pd.read_csv(out / "cost.csv")["study"]) == ["interpolation", "halfway"]

    page = report.write(out).read_text()
    assert "Halfway there" in page and "Halfway was measured." in page

    before = (out / "rows.csv").read_bytes()
    assert sweep.main([*command, "--out", str(out)]) == 0
    assert (out / "rows.csv").read_bytes() == before


@pytest.mark.slow
def test_an_analysis_that_fails_costs_no_other(
    toy: Study, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All else is written and printed, the study is named with its error, and the status is 1."""

    def fails(*_: object) -> Any:
        raise KeyError("no such column")

    for method in ("table", "draw", "say", "findings"):
        monkeypatch.setattr(toy_study.Halfway, method, fails)
    out = tmp_path / "run"
    command = ["halfway", *own_models(zoo, "ab"), *BRIEF, "--out", str(out)]
    assert sweep.main(command) == 1
    printed = capsys.readouterr()
    assert "far: out of distribution" in printed.out and "rows     " in printed.out
    first = " ".join(printed.out.partition("\n\n")[0].split())
    assert "halfway: KeyError: 'no such column'" in first and "zero-shot accuracy" in first
    assert "halfway was measured, but its analysis failed: KeyError" in printed.err
    assert (out / "figures" / "interpolation.png").exists() and len(rows_of(out))
    assert "in short: Parts of the results are missing" in (out / "run.log").read_text()
    monkeypatch.undo()
    catalogue.register(toy_study.Halfway())
    try:
        assert sweep.main(command) == 0  # measured already
    finally:
        del catalogue._TABLE["halfway"]


WITH_OPTIONS = {"halfway": [], "cumulative": ["--cumulative", "first", "last"], "pairs": [], "soups": []}


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_it_is_resumed(
    name: str, toy: Study, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after its second measurement, it makes the others, and the rows are the same."""
    command = [name, *own_models(zoo, "abc"), *BRIEF, *WITH_OPTIONS[name]]
    added: list[tuple[str, int]] = []
    add: Callable[..., None] = results.Run.add
    with monkeypatch.context() as patch:
        patch.setattr(results.Run, "add", lambda *args: added.append(args[1:4]) or add(*args))
        assert sweep.main([*command, "--out", str(tmp_path / "whole")]) == 0
    whole = [study for study, *_ in added].count(name)
    added.clear()

    def then(run: results.Run, study: str, model: str, number: int, *rows: Any) -> None:
        add(run, study, model, number, *rows)
        added.append((study, number))
        if [study for study, _ in added][-2:] == [name] * 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(results.Run, "add", then)
        assert sweep.main([*command, "--out", str(tmp_path / "parts")]) == 130
    kept = len(added)
    assert len(rows_of(tmp_path / "parts")) < len(rows_of(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(results.Run, "add", lambda *args: added.append(args[1:4]) or add(*args))
        assert sweep.main([*command, "--out", str(tmp_path / "parts")]) == 0
    assert len(added) - kept == whole - 2 > 3
    pd.testing.assert_frame_equal(rows_of(tmp_path / "parts"), rows_of(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_workers_measure_it(
    name: str, toy: Study, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other processes have it in their catalogue, too: here it is registered as Python starts."""
    code = "from rft_fast import catalogue\nimport toy_study\ncatalogue.register(toy_study.Halfway())\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    (tmp_path / "toy_study.py").write_text(Path(toy_study.__file__).read_text())
    monkeypatch.syspath_prepend(tmp_path)

    path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    command = [name, *own_models(zoo, "abc"), *BRIEF, *WITH_OPTIONS[name]]
    assert sweep.main([*command, "--out", str(tmp_path / "alone")]) == 0
    assert sweep.main([*command, "--out", str(tmp_path / "two"), "--workers", "2"]) == 0
    pd.testing.assert_frame_equal(rows_of(tmp_path / "two"), rows_of(tmp_path / "alone"))
