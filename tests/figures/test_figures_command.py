"""``python -m rft_fast.figures``: the figures of a run again, and nothing else of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import matplotlib.image
import pytest
from support import tiny_zoo
from support.tiny_report import CONFIG, FAR, MODELS, SHORT, make_rows, make_run
from support.tiny_zoo import own_models, sweep_refused
from support.wording import command_refused, said

from rft_fast import report, results, sweep
from rft_fast.figures.__main__ import main
from rft_fast.names import STUDIES


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_figures_are_drawn_again_and_nothing_else_changes(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(run)
    assert main([str(run), "interpolation", "--figure-format", "png,svg", "--figure-width", "one"]) == 0
    after = files(run)
    new = {"figures/interpolation.png", "figures/interpolation.svg", "figures/interpolation.txt"}
    assert after.keys() - before.keys() == new and {name: after[name] for name in before} == before
    assert matplotlib.image.imread(run / "figures" / "interpolation.png").shape[1] == 680  # 3.4 inches
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        *(f"figure   {run / 'figures' / name}" for name in ("interpolation.png", "interpolation.svg")),
        f"next: python -m rft_fast.report {run}",
    ]
    assert main([str(run), "interpolation", "--figure-format", "png", "svg", "--figure-width", "one"]) == 0
    assert files(run) == after
    results.check(run, overwrite=True)


def test_a_folder_of_figures_that_is_missing_is_made(run: Path) -> None:
    shutil.rmtree(run / "figures")
    assert main([str(run), "interpolation", "--figure-format", "svg"]) == 0
    assert (run / "figures" / "interpolation.svg").is_file()


@pytest.mark.slow
def test_all_figures_of_a_run(run: Path) -> None:
    assert main([str(run)]) == 0
    names = {f"{study}.{end}" for study in STUDIES for end in ("png", "txt")}
    assert {file.name for file in (run / "figures").iterdir()} == names


def test_models_are_chosen(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(run), "interpolation", "layers", "--figure-format", "svg", "--models", "bad", MODELS[2]]
    assert main(command) == 0
    said(capsys.readouterr().out, "layers", MODELS[2])
    for study in ("interpolation", "layers"):
        text = (run / "figures" / f"{study}.svg").read_text()
        assert ">bad<" in text and ">good<" not in text


@pytest.mark.slow
def test_figures_of_all_models_together_are_left_out_of_a_choice(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), "--models", "good", "bad"]) == 0
    said(capsys.readouterr().out, "correlation")
    assert not (run / "figures" / "correlation.png").exists()
    assert (run / "figures" / "sharpness.png").is_file()


def test_a_study_without_the_chosen_models_is_left_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--models", MODELS[2], "--figure-format", "svg"]) == 0
    said(capsys.readouterr().out, "layers", "prune", "correlation", MODELS[2])
    names = {file.stem for file in (run / "figures").iterdir()}
    assert names == {"interpolation", "sharpness", "layer-sharpness"}
    command_refused(main, [run, "layers", "--models", MODELS[2]], "layers", silent=False)


def test_captions_go_where_they_are_wanted(run: Path) -> None:
    caption = run / "figures" / "interpolation.txt"
    assert main([str(run), "interpolation"]) == 0 and caption.is_file()
    assert main([str(run), "interpolation", "--captions", "in"]) == 0 and not caption.exists()


@pytest.mark.parametrize("stays", [True, False])
def test_the_caption_of_a_figure_that_stays_stays(stays: bool, run: Path) -> None:
    folder = run / "figures"
    folder.mkdir(exist_ok=True)
    for name in ["interpolation.txt", "interpolation.svg", *["interpolation.png"] * stays]:
        (folder / name).write_text("earlier")
    assert main([str(run), "interpolation", "--captions", "in", "--figure-format", "svg"]) == 0
    assert (folder / "interpolation.txt").exists() == stays
    assert (folder / "interpolation.svg").read_text() != "earlier"


def test_a_run_in_progress_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its rows so far, of the models that a study has finished, while another process writes."""
    config = {**CONFIG, "measured": ["interpolation", "layers"]}
    with results.Run(tmp_path / "run", config) as run:
        for number, row in enumerate(SHORT[:-1]):
            run.add("interpolation", str(row["model"]), number, [row])
        (tmp_path / "run" / "config.json").stat()
        assert main([str(tmp_path / "run")]) == 0
        said(capsys.readouterr().out, "layers", MODELS[2])
        run.add("interpolation", MODELS[2], 99, [SHORT[-1]])
    assert (tmp_path / "run" / "figures" / "interpolation.png").is_file()
    assert len(results.load(tmp_path / "run")) == len(SHORT)


def test_the_correlation_of_a_run_in_progress(tmp_path: Path) -> None:
    """Before any layer was measured alone."""
    rows = [row for row in make_rows() if row["study"] in ("interpolation", "sharpness")]
    make_run(
        tmp_path / "run", rows, measured=["interpolation", "sharpness", "layer-sharpness", "correlation"]
    )
    assert main([str(tmp_path / "run"), "correlation"]) == 0


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (["interpolaton"], ["interpolaton", "interpolation"]),
        (["--figure-format", "jpg"], ["jpg", "png", "pdf", "svg"]),
        (["--figure-format", "png,,svg"], ["png,,svg"]),
        (["--figure-width", "3"], ["--figure-width", "one", "two"]),
        (["--captions", "beside"], ["--captions", "file"]),
        (["--style", "nowhere.mplstyle"], ["nowhere.mplstyle"]),
        (["--models", "nobody"], ["nobody", "good"]),
        (["correlation", "--models", "good"], ["correlation", "--models"]),
        (["interpolation", "interpolation"], ["interpolation"]),
    ],
)
def test_what_cannot_be_drawn_is_refused(words: list[str], facts: list[str], run: Path) -> None:
    before = files(run)
    command_refused(main, [run, *words], *facts)
    assert files(run) == before


def test_a_style_file_is_checked_first(run: Path, tmp_path: Path) -> None:
    style = tmp_path / "my.mplstyle"
    style.write_text("font.size: 8\nfont.sise: 8\n")
    before = files(run)
    command_refused(main, [run, "--style", style], "line 2", "font.sise")
    assert files(run) == before
    style.write_text("font.size: 6\n")
    assert main([str(run), "interpolation", "--style", str(style)]) == 0


def test_a_run_without_rows_is_refused(tmp_path: Path) -> None:
    with results.Run(tmp_path / "empty", CONFIG):
        pass
    command_refused(main, [tmp_path / "empty"], "empty")
    command_refused(main, [tmp_path / "nowhere"], "nowhere")
    make_run(tmp_path / "short", SHORT, measured=["interpolation", "layers"])
    command_refused(main, [tmp_path / "short", "layers"], "layers", "interpolation", silent=False)
    assert not list((tmp_path / "short" / "figures").iterdir())


def test_links_are_not_followed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    (run / "figures" / "interpolation.txt").symlink_to(tmp_path / "mine.txt")
    command_refused(main, [run, "interpolation"], "interpolation.txt")
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_files_of_all_formats_belong_to_the_run(run: Path) -> None:
    """They are replaced with it, and make no run where there is none."""
    ours = [f"interpolation.{end}" for end in ("png", "pdf", "svg", "txt")]
    for name in [*ours, "mine.pdf"]:
        (run / "figures" / name).write_bytes(b"x")
    with results.Run(run, CONFIG, overwrite=True):
        assert [file.name for file in (run / "figures").iterdir()] == ["mine.pdf"]


@pytest.mark.slow
def test_the_page_has_the_captions(run: Path) -> None:
    pytest.importorskip("plotly")
    caption = "Colour: <b>loss</b> minus that at α = 0"
    (run / "figures" / "layers.txt").write_text(caption + "\n")
    page = report.write(run).read_text()
    assert "Colour: &lt;b&gt;loss&lt;/b&gt; minus that at α = 0</p>" in page
    assert page.count('class="figure-text"') == 1 and FAR not in page


def test_how_figures_are_presented_is_no_difference(tmp_path: Path) -> None:
    config = {**CONFIG, "run": {"figures": {"formats": ["png"], "width": "auto"}}}
    rows = list(make_rows())[:1]
    make_run(tmp_path / "run", rows, **config)
    other = {**config, "run": {"figures": {"formats": ["pdf"], "width": "one"}}}
    assert results.differences(config, other) == []
    with results.Run(tmp_path / "run", other) as run:
        assert run.resumed == 1


@pytest.mark.slow
def test_a_sweep_presents_its_figures(tmp_path: Path) -> None:
    (tmp_path / "zoo").mkdir()
    zoo, out = tiny_zoo.make(tmp_path / "zoo"), tmp_path / "run"
    style = tmp_path / "my.mplstyle"
    style.write_text("font.sise: 8\n")
    command = ["interpolation", *own_models(zoo), "--alphas", "0", "1", "--device", "cpu", "--quiet",
               "--out", str(out)]  # fmt: skip
    sweep_refused([*command, "--style", str(style)], "font.sise")
    assert not out.exists()  # before anything was measured
    style.write_text("font.size: 6\n")
    first = ["--figure-format", "pdf", "svg", "--figure-width", "one", "--style", str(style)]
    assert sweep.main([*command, *first]) == 0
    names = {"interpolation.pdf", "interpolation.svg", "interpolation.txt"}
    assert {file.name for file in (out / "figures").iterdir()} == names
    recorded = json.loads((out / "config.json").read_text())["run"]["figures"]
    assert recorded == {
        "formats": ["pdf", "svg"], "width": "one", "captions": "file", "style": str(style)
    }  # fmt: skip
    rows = (out / "rows.csv").read_bytes()
    assert sweep.main([*command, "--captions", "none"]) == 0  # resumed: nothing is measured again
    assert (out / "rows.csv").read_bytes() == rows
    # The pictures of before keep their caption.
    names = {"interpolation.pdf", "interpolation.svg", "interpolation.png", "interpolation.txt"}
    assert {file.name for file in (out / "figures").iterdir()} == names
    assert sweep.main([*command, "--overwrite"]) == 0
    assert {file.name for file in (out / "figures").iterdir()} == {"interpolation.png", "interpolation.txt"}
