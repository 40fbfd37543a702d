"""How figures are presented: bytes, formats, widths, captions, styles and fonts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from support.tiny_report import make_rows
from support.wording import refused, said

from rft_fast import figures, studies
from rft_fast.figures import fonts, heat, style, stylefile
from rft_fast.figures.looks import MUTED
from rft_fast.names import FIGURE_FORMATS, STUDIES, FigureWidth
from rft_fast.studies.facts import Facts

ROWS = [row for row in make_rows() if row["study"] == "interpolation" and row["dataset"] == "fog"]


def named(names: dict[str, str]) -> pd.DataFrame:
    return studies.frame([{k: names.get(str(v), v) for k, v in row.items()} for row in ROWS])


def draw(folder: Path, name: str = "a.png", rows: pd.DataFrame | None = None, **look: Any) -> Figure:
    with figures.look(**look):
        return figures.interpolation(studies.frame(ROWS) if rows is None else rows, folder / name)


def write(folder: Path, text: str) -> Path:
    file = folder / "my.mplstyle"
    file.write_text(text)
    return file


# --- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FIGURE_FORMATS)
def test_the_same_rows_give_the_same_bytes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path, f"a.{kind}")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")  # of which matplotlib makes dates
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "pdf.fonttype": 3}):
        draw(tmp_path, f"b.{kind}")
        assert matplotlib.rcParams["font.size"] == 20
    assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


@pytest.mark.slow
def test_another_process_gives_the_same_bytes(tmp_path: Path) -> None:
    """With other hashes of strings, and a matplotlibrc in its folder."""
    studies.frame(ROWS).to_pickle(tmp_path / "rows.pickle")
    code = (
        "import pandas, sys; from rft_fast import figures\n"
        "for kind in ('png', 'pdf', 'svg'):\n"
        "    figures.interpolation(pandas.read_pickle('../rows.pickle'), f'x.{kind}')"
    )
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        (folder / "matplotlibrc").write_text(f"font.size: {seed}0\n")
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code], check=True, cwd=folder, env=environment)
    for kind in FIGURE_FORMATS:
        assert (tmp_path / "1" / f"x.{kind}").read_bytes() == (tmp_path / "2" / f"x.{kind}").read_bytes()


def test_text_stays_text(tmp_path: Path) -> None:
    for kind in ("pdf", "svg"):
        draw(tmp_path, f"a.{kind}")
    pdf = (tmp_path / "a.pdf").read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf and b"CreationDate" not in pdf
    svg = (tmp_path / "a.svg").read_text()
    assert re.search(r"<text[^>]*>good</text>", svg) and "<dc:date>" not in svg


def test_captions_are_beside_the_figure_in_it_or_nowhere(tmp_path: Path) -> None:
    where = {how: draw(tmp_path, f"{how}.png", captions=how) for how in ("file", "in", "none")}
    inside = where["in"].legends[0].get_title().get_text().replace("\n", " ")
    text = (tmp_path / "file.txt").read_text()
    assert text == inside.replace(r"$\alpha$", "α") + "\n"
    said(text, "α = 0", "3 positions α")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file.png", "file.txt", "in.png", "none.png"]
    assert not where["file"].legends[0].get_title().get_text()
    assert where["file"].get_figheight() == where["none"].get_figheight() < where["in"].get_figheight()


def test_a_caption_in_a_file_has_no_formulas() -> None:
    assert style.plain_text(r"$\rho$ = 1, $|\tau|$ > 0, $\pm$ 2 of \$x\$") == "ρ = 1, |τ| > 0, ± 2 of $x$"


# --- widths ----------------------------------------------------------------------------------------

LONG = {"bad": "$/a/" + "runs of-seeds/lr1e-3_wd" * 4 + "/end-00", "fog": "x" * 60}


@pytest.fixture(scope="module")
def facts() -> dict[bool, Facts]:
    """Of short names, and of long ones."""
    rows = list(make_rows())
    long = [{k: LONG.get(str(v), v) for k, v in row.items()} for row in rows]
    return {is_long: Facts(studies.frame(own), measured=["correlation"])
            for is_long, own in ((False, rows), (True, long))}  # fmt: skip


@pytest.mark.slow(but="one-interpolation-short")
@pytest.mark.parametrize("names", ["short", "long"])
@pytest.mark.parametrize("study", [*STUDIES, "claim", "choice"])
@pytest.mark.parametrize(("width", "inches"), [("one", 3.4), ("two", 7.0)], ids=["one", "two"])
def test_figures_have_the_width_of_columns_and_nothing_is_cut_off(
    width: FigureWidth, inches: float, study: str, names: str, facts: dict[bool, Facts], tmp_path: Path
) -> None:
    known = facts[names == "long"]
    with figures.look(width=width, captions="none"):
        of_tables = {"correlation": ["correlation"], "claim": ["claim"], "choice": ["choice", "choice_means"]}
        shown = [getattr(known, table) for table in of_tables.get(study, [])] or [known]
        drawn = getattr(figures, study.replace("-", "_"))(*shown, tmp_path / "a.png")
    assert drawn.get_figwidth() == inches
    ticks = {id(text) for panel in drawn.axes for axis in (panel.xaxis, panel.yaxis)
             for text in axis.get_ticklabels()}  # fmt: skip
    edge = 0.02 * drawn.dpi
    for text in drawn.findobj(Text):
        if text.get_text() and id(text) not in ticks:
            box = text.get_window_extent()
            assert box.x0 >= -edge and box.x1 <= drawn.bbox.x1 + edge, text.get_text()
            assert box.y0 >= -edge and box.y1 <= drawn.bbox.y1 + edge, text.get_text()


# --- axes ------------------------------------------------------------------------------------------


def accuracy_panels(low: float, high: float, folder: Path) -> list[Axes]:
    """One data set with accuracies 0.3 to 0.9, and one with these."""
    rows = []
    for dataset, ends in (("wide", (0.3, 0.9)), ("other", (low, high))):
        for row in ROWS[:3]:
            alpha = float(str(row["alpha"]))
            accuracy = ends[0] + alpha * (ends[1] - ends[0])
            rows.append(
                {**row, "dataset": dataset, "accuracy": accuracy, "gain": accuracy - ends[0], "gain_se": 0.0}
            )
    return figures.interpolation(studies.frame(rows), folder / "a.png").axes[:2]


def test_panels_of_a_row_have_the_same_axis(tmp_path: Path) -> None:
    first, second = accuracy_panels(0.4, 0.8, tmp_path)
    assert first.get_ylim() == second.get_ylim() and first.get_ylabel() == "accuracy (%)"
    assert not any(label.get_visible() and label.get_text() for label in second.get_yticklabels())


def test_a_row_whose_axes_differ_says_so(tmp_path: Path) -> None:
    first, second = accuracy_panels(0.5, 0.52, tmp_path)
    assert first.get_ylim()[0] < 31 and second.get_ylim()[0] > 49
    assert first.get_ylabel() == "accuracy (%)\n(scales differ)"


def test_a_scale_that_is_not_linear_says_so(facts: dict[bool, Facts], tmp_path: Path) -> None:
    drawn = figures.layer_sharpness(facts[False], tmp_path / "a.png")
    bar = drawn.axes[-1]
    assert bar.get_ylabel() == "layer-wise sharpness\n(nats, asinh scale)"
    norm = heat.scale([pd.DataFrame([[0.0, 2.0]])], 0.1)
    assert norm([2.0, -2.0, 0.0]).tolist() == [1.0, 0.0, 0.5]


def test_models_keep_their_colours(tmp_path: Path) -> None:
    some = named({"bad": "$bad$"})
    two = some[some["model"] != "good"]
    for models, places in ((("good", "$bad$", "<b>c&amp;%{x}"), (1, 2)), ((), (0, 1)), (("good",), (0, 1))):
        top = draw(tmp_path, rows=two, models=models).axes[0]
        found = {line.get_label(): line.get_color() for line in top.lines}
        assert [found[name] for name in (r"\$bad\$", "<b>c&amp;%{x}")] == [MUTED[place] for place in places]


# --- style files -----------------------------------------------------------------------------------

STYLE = """\
# comment
font.size: 7        # of all text
font.family: serif
font.serif: No Such Font, DejaVu Serif
axes.prop_cycle: cycler('color', ['0072B2', 'D55E00', '009E73']) + cycler(ls=['-', '--', ':'])
axes.spines.top: True
axes.labelcolor: "#112233"
legend.frameon: True
lines.linewidth: 0.5
savefig.dpi: 100
"""


def test_a_style_file_is_read_as_matplotlib_reads_it(tmp_path: Path) -> None:
    file = write(tmp_path, STYLE)
    expected = matplotlib.rc_params_from_file(file, use_default_template=False)
    assert dict(stylefile.read(file)) == dict(expected)


def test_a_style_changes_the_figure(tmp_path: Path) -> None:
    drawn = draw(tmp_path, style=write(tmp_path, STYLE))
    top = drawn.axes[0]
    lines = {line.get_label(): line for line in top.lines}
    assert lines["good"].get_color() == "#0072B2" and lines["bad"].get_color() == "#D55E00"
    assert lines["good"].get_linewidth() == 0.5
    assert top.spines["top"].get_visible() and not top.spines["right"].get_visible()
    assert top.yaxis.label.get_fontsize() == 7 and top.yaxis.label.get_fontname() == "DejaVu Serif"
    assert drawn.legends[0].get_frame_on()
    width, height = (round(100 * inches) for inches in drawn.get_size_inches())
    assert matplotlib.image.imread(tmp_path / "a.png").shape[:2] == pytest.approx((height, width), abs=1)
    draw(tmp_path, "plain.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "plain.png").read_bytes()


@pytest.mark.parametrize(
    ("line", "facts"),
    [
        ("font.sise: 8", ["font.sise", "font.size"]),
        ("font.size 8", ["line 1"]),
        ("font.size: large-ish", ["line 1", "large-ish"]),
        ("font.size: 8\nfont.size: 9", ["line 2", "font.size"]),
        ("figure.figsize: 3, 2", ["figure.figsize", "--figure-width"]),
        ("savefig.format: pdf", ["savefig.format", "--figure-format"]),
        ("text.usetex: True", ["text.usetex"]),
        ("text.latex.preamble: \\input{/etc/passwd}", ["text.latex.preamble"]),
        ("backend: module://evil", ["backend"]),
        ("figure.hooks: evil:run", ["figure.hooks"]),
        ("animation.ffmpeg_path: /tmp/evil", ["animation.ffmpeg_path"]),
        ("svg.hashsalt: x", ["svg.hashsalt"]),
        ("savefig.dpi: 100000", ["savefig.dpi", "100000"]),
        ("axes.prop_cycle: cycler('lw', [1, 2])", ["axes.prop_cycle"]),
        ("axes.prop_cycle: cycler('color', ['no colour'])", ["no colour"]),
        ("axes.prop_cycle: cycler('color', [", ["line 1"]),
        ("font.family: No Such Font", ["No Such Font"]),
        ("font.sise: 8\nbackend: Agg\nfont.size: 8\nx", ["line 1", "line 2", "line 4"]),
    ],
)
def test_what_a_style_file_may_not_say_is_refused(line: str, facts: list[str], tmp_path: Path) -> None:
    with refused(ValueError, "my.mplstyle", *facts):
        draw(tmp_path, style=write(tmp_path, line + "\n"))
    assert [file.name for file in tmp_path.iterdir()] == ["my.mplstyle"]


@pytest.mark.parametrize(
    ("line", "facts"),
    [
        ("axes.prop_cycle: cycler('color', [])", ["axes.prop_cycle", "1 to 1000", "got 0"]),
        ("axes.prop_cycle: cycler('color', ['r']) + cycler('lw', [float])", ["float"]),
        ("axes.prop_cycle: cycler('color', ['r']) + cycler('lw', [1e9])", ["0.05 to 20", "1e+09"]),
        ("axes.prop_cycle: cycler('color', ['r']) + cycler('ls', [(0, (1e-9, 1e-9))])", ["1e-09"]),
        ("font.size: 1e9", ["2 to 24", "1e+09"]),
        ("font.size: nan", ["2 to 24", "nan"]),
        ("font.size: -3", ["2 to 24", "-3"]),
        ("font.size: 400", ["2 to 24", "400"]),
        ("legend.title_fontsize: 0", ["2 to 24"]),
        ("font.weight: -3", ["0 to 1000", "-3"]),
        ("lines.linewidth: nan", ["0.05 to 20", "nan"]),
        ("lines.markersize: inf", ["0 to 50", "inf"]),
        ("lines.dashed_pattern: 0, 0", ["lines.dashed_pattern", "pairs"]),
        ("lines.dotted_pattern: 1, nan", ["0 to 100", "nan"]),
        ("xtick.minor.width: -1", ["0 to 50", "-1"]),
        ("grid.alpha: 2", ["0 to 1", "2"]),
        ("figure.constrained_layout.w_pad: 1e9", ["0 to 0.25", "1e+09"]),
        ("legend.columnspacing: -inf", ["0 to 20", "-inf"]),
        ("savefig.dpi: nan", ["36 to 2400", "nan"]),
    ],
)
def test_numbers_of_a_style_file_have_ranges(line: str, facts: list[str], tmp_path: Path) -> None:
    with refused(ValueError, "my.mplstyle: line 2", line.partition(":")[0], *facts):
        stylefile.read(write(tmp_path, f"# comment\n{line}\n"))


def test_an_unknown_key_names_the_nearest_ones(tmp_path: Path) -> None:
    with refused(ValueError, "zzz") as error:
        stylefile.read(write(tmp_path, "zzz: 1\n"))
    assert str(error.value).count(",") == 2


def test_the_defaults_of_matplotlib_are_in_range(tmp_path: Path) -> None:
    """Those of sizes, widths, distances and opacity."""
    ours = re.compile(
        r"axes\.(\w+(pad|size)|linewidth|[xy]margin)|(font|grid|legend|lines|patch|.tick)\..*|errorbar\.capsize"
        r"|figure\.constrained.*(pad|space)"
    )
    known = [
        f"{key}: {value}"
        for key, value in matplotlib.rcParamsDefault.items()
        if isinstance(value, float) and ours.fullmatch(key)
    ]
    assert stylefile.read(write(tmp_path, "\n".join(known))).keys() >= {"font.size", "legend.borderpad"}


@pytest.mark.parametrize(
    "lines",
    [
        "font.size: 24\nlines.linewidth: 20\nlines.markersize: 50\nfigure.constrained_layout.w_pad: 0.25",
        "font.size: 2\nlines.linewidth: 0.05\nlines.markersize: 0\nlines.dashed_pattern: 0.5, 0.5",
    ],
)
def test_the_ends_of_the_ranges_can_be_drawn(lines: str, tmp_path: Path) -> None:
    draw(tmp_path, style=write(tmp_path, lines + "\n"))
    assert (tmp_path / "a.png").is_file()


@pytest.mark.parametrize(
    ("name", "value", "kind", "facts"),
    [
        ("width", "three", ValueError, ["auto, one, two", "'three'"]),
        ("captions", True, ValueError, ["file, in, none", "True"]),
        ("style", 3, TypeError, ["style file", "3"]),
    ],
)
def test_a_look_that_does_not_exist_is_refused(
    name: str, value: Any, kind: type[Exception], facts: list[str]
) -> None:
    with refused(kind, f"figures.look: {name}", *facts), figures.look(**{name: value}):
        pytest.fail("the block ran")


@pytest.mark.parametrize(
    "value",
    [
        "__import__('pathlib').Path({!r}).touch()",
        "cycler('color', __import__('pathlib').Path({!r}).touch() or ['r'])",
        "[c for c in (cycler('color', ['r']), open({!r}, 'w'))][0]",
        "cycler('color', ['r']).__class__.__init__.__globals__",
        "(lambda: open({!r}, 'w'))()",
    ],
)
def test_nothing_in_a_style_file_is_executed(value: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    with pytest.raises(ValueError, match="line 1"):
        stylefile.read(write(tmp_path, f"axes.prop_cycle: {value.format(str(made))}\n"))
    assert not made.exists()


def test_a_style_file_is_a_small_text_file(tmp_path: Path) -> None:
    file = tmp_path / "my.mplstyle"
    with pytest.raises(OSError, match=r"my\.mplstyle"):
        stylefile.read(file)
    os.mkfifo(file)
    with pytest.raises(OSError, match="FIFO"):  # without waiting for a writer
        stylefile.read(file)
    file.unlink()
    file.write_bytes(b"#" * (1 << 20) + b"\n")
    with refused(ValueError, "my.mplstyle", "1,048,576"):
        stylefile.read(file)
    file.write_bytes(b"font.size: \xff\n")
    with refused(ValueError, "my.mplstyle", "UTF-8"):
        stylefile.read(file)


# --- fonts -----------------------------------------------------------------------------------------


def test_characters_of_names_come_from_any_font_that_has_them() -> None:
    """The sum sign is in DejaVu; a letter of Tifinagh is in DejaVu Sans, and not in its monospaced one."""
    assert fonts.covering("a∑", ["DejaVu Sans"]) == ([], [])
    more, missing = fonts.covering("aⵣ", ["DejaVu Sans Mono"])
    assert more[:1] == ["DejaVu Sans"] and not missing
    assert fonts.covering("a\U0010fffd", ["DejaVu Sans"])[1] == ["\U0010fffd"]


def test_characters_that_no_font_has_are_said_to_be_boxes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(fonts, "covering", lambda text, families: ([], sorted(set(text) - {"a"})))
    drawn = draw(tmp_path, rows=named({"good": "模型a"}))
    text = drawn.legends[0].get_title().get_text().replace("\n", " ")
    said(text, "characters 型模")
    assert not recwarn.list
    assert "boxes" not in draw(tmp_path).legends[0].get_title().get_text()


def test_a_pdf_of_names_in_other_scripts_is_whole(tmp_path: Path) -> None:
    draw(tmp_path, "a.pdf", named({"good": "модель ⵣ λ"}))
    pdf = (tmp_path / "a.pdf").read_bytes()
    streams = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.DOTALL)
    assert pdf.rstrip().endswith(b"%%EOF") and any(b"BT" in unpacked(stream) for stream in streams)


def unpacked(stream: bytes) -> bytes:
    try:
        return zlib.decompress(stream)
    except zlib.error:
        return stream
