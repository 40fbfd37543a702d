"""What the figures show, read back from their artists."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection, QuadMesh
from matplotlib.colors import AsinhNorm
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy import stats
from support.tiny_report import make_rows as make_run_rows
from support.wording import refused, said

from rft_fast import figures, studies
from rft_fast.figures import captions, heat, style
from rft_fast.figures.looks import in_points
from rft_fast.names import STUDIES
from rft_fast.studies.facts import Facts

ALPHAS = np.array([0.0, 0.5, 1.0])
# model, data set -> accuracy and loss at ALPHAS
CURVES = {
    ("good", "far"): ([0.50, 0.60, 0.55], [1.0, 0.8, 0.9]),
    ("bad", "far"): ([0.50, 0.40, 0.30], [1.0, 2.5, 2.0]),
    ("good", "near"): ([0.80, 0.85, 0.90], [0.5, 0.4, 0.3]),
    ("bad", "near"): ([0.80, 0.85, 0.95], [0.5, 0.7, 0.2]),
}


def make_rows(curves: dict[tuple[str, str], tuple[list[float], list[float]]]) -> pd.DataFrame:
    rows = []
    for (model, dataset), (accuracy, loss) in curves.items():
        for i, alpha in enumerate(ALPHAS):
            rows.append({
                "study": "interpolation", "model": model, "dataset": dataset, "alpha": alpha,
                "ood": dataset != "near", "samples": 1234, "loss": loss[i],
                "accuracy": accuracy[i], "gain": accuracy[i] - accuracy[0], "gain_se": 0.01 * i,
                "rise": loss[i] - loss[0], "rise_se": 0.1 * i,
                "bump": loss[i] - float(1 - alpha) * loss[0] - float(alpha) * loss[2],
                "bump_se": 0.1 * (i == 1),
            })  # fmt: skip
    return studies.frame(rows)


def lines(panel: Axes) -> dict[str, Any]:
    return {str(line.get_label()): line for line in panel.lines}


def one(panel: Axes, **style: str) -> Any:
    """The only line of a panel that is drawn so."""
    (found,) = (x for x in panel.lines if style.items() <= {
        "linestyle": x.get_linestyle(), "marker": x.get_marker()}.items())  # fmt: skip
    return found


def texts(figure: Figure) -> Iterator[str]:
    for panel in figure.axes:
        yield panel.get_title()
        yield from (text.get_text() for text in panel.texts)
    for legend in figure.legends:
        yield legend.get_title().get_text()
        yield from (text.get_text() for text in legend.get_texts())


@pytest.fixture(scope="module")
def figure(tmp_path_factory: pytest.TempPathFactory) -> Figure:
    file = tmp_path_factory.mktemp("figure") / "interpolation.png"
    shuffled = make_rows(CURVES).sample(frac=1, random_state=0)
    drawn = figures.interpolation(pd.concat([shuffled, shuffled.assign(study="layers")]), file)
    assert file.read_bytes().startswith(b"\x89PNG")
    return drawn


def panels(figure: Figure) -> dict[str, tuple[Axes, Axes]]:
    """Data set -> its panels of accuracy and loss."""
    half = len(figure.axes) // 2
    columns = zip(figure.axes[:half], figure.axes[half:], strict=True)
    return {top.get_title().partition("\n")[0]: (top, bottom) for top, bottom in columns}


def test_curves_are_the_rows(figure: Figure) -> None:
    assert set(panels(figure)) == {"far", "near"}
    for (model, dataset), (accuracy, loss) in CURVES.items():
        for panel, values in zip(
            panels(figure)[dataset], (100 * np.array(accuracy), np.array(loss)), strict=True
        ):
            line = lines(panel)[model]
            np.testing.assert_array_equal(line.get_xdata(), ALPHAS)
            np.testing.assert_allclose(line.get_ydata(), values)


def test_one_colour_per_model_and_failures_look_different(figure: Figure) -> None:
    colours = {
        model: {lines(panel)[model].get_color() for pair in panels(figure).values() for panel in pair}
        for model in ("good", "bad")
    }
    assert all(len(colour) == 1 for colour in colours.values())
    assert colours["good"] != colours["bad"]
    for panel in panels(figure)["far"]:
        assert lines(panel)["good"].get_linestyle() == "-"
        assert lines(panel)["bad"].get_linestyle() == "--"
        assert lines(panel)["bad"].get_markerfacecolor() == "white"
    assert lines(panels(figure)["near"][0])["bad"].get_linestyle() == "-"


def test_zero_shot_gain_and_barrier_are_marked(figure: Figure) -> None:
    top, bottom = panels(figure)["far"]
    for panel, level in ((top, 50), (bottom, 1)):
        dotted = one(panel, linestyle=":")
        assert list(dotted.get_ydata()) == [level, level]
    star = one(top, marker="*")
    assert [*star.get_xdata(), *star.get_ydata()] == pytest.approx([0.5, 60])
    triangle = one(bottom, marker="v")
    assert [*triangle.get_xdata(), *triangle.get_ydata()] == pytest.approx([0.5, 2.5])
    for panel, span in ((top, [50, 60]), (bottom, [1, 2.5])):
        measure = one(panel, marker="_")
        assert list(measure.get_xdata()) == [0.5, 0.5]
        assert list(measure.get_ydata()) == pytest.approx(span)
    # Two positions of 1,234 images without results of their own: t of 1 - .05 / 2, times .01.
    assert top.texts[0].get_text() == r"gain +10.0 [+8.0, +12.0] at $\alpha$ = 0.5"
    assert bottom.texts[0].get_text() == r"barrier +1.50 $\pm$ 0.20 at $\alpha$ = 0.5"


def test_bands_are_paired_intervals(figure: Figure) -> None:
    top, bottom = panels(figure)["far"]
    t = stats.t.ppf(1 - 0.05 / 2, 1233)
    bound = 100 * t * math.sqrt(0.02**2 + 1 / (1234 * 1233))  # for both positions at once
    for panel, value, margin in ((top, 30, bound), (bottom, 2.0, 1.959964 * 0.2)):
        second = [name for name in lines(panel) if name in ("good", "bad")].index("bad")
        corners = np.asarray(panel.collections[second].get_paths()[0].vertices)
        at_the_end = corners[corners[:, 0] == 1][:, 1]
        assert at_the_end.min() == pytest.approx(value - margin, abs=1e-5)
        assert at_the_end.max() == pytest.approx(value + margin, abs=1e-5)


def test_what_was_measured_is_stated(figure: Figure) -> None:
    said(
        "\n".join(texts(figure)),
        "far\n(1,234 images)",
        "near\n(in distribution, 1,234 images)",
        r"3 positions $\alpha$",
    )
    assert {"good", "bad", "zero-shot"} <= set(texts(figure))


def test_nothing_overlaps_or_is_cut_off(figure: Figure) -> None:
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    boxes: list[Any] = [panel.get_tightbbox(renderer) for panel in figure.axes]
    boxes += [legend.get_window_extent(renderer) for legend in figure.legends]
    page = figure.bbox
    for i, box in enumerate(boxes):
        assert box.x0 >= page.x0 - 1 and box.y0 >= page.y0 - 1
        assert box.x1 <= page.x1 + 1 and box.y1 <= page.y1 + 1
        for other in boxes[:i]:
            width = min(box.x1, other.x1) - max(box.x0, other.x0)
            height = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert width < 1 or height < 1


def test_more_models_than_colours_still_fit(tmp_path: Path) -> None:
    rows = make_rows({(f"model {i:02}", "far"): CURVES["good", "far"] for i in range(30)})
    drawn = figures.interpolation(rows, tmp_path / "many.png")
    (top, _) = panels(drawn)["far"]
    names = [f"model {i:02}" for i in range(30)]
    assert len({tuple(lines(top)[name].get_color()) for name in names}) == 30
    test_nothing_overlaps_or_is_cut_off(drawn)


def test_losses_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    curves = {**CURVES, ("bad", "far"): ([0.5, 0.1, 0.3], [1.0, math.nan, math.inf])}
    drawn = figures.interpolation(make_rows(curves), tmp_path / "lost.png")
    _, bottom = panels(drawn)["far"]
    assert bottom.texts[0].get_text() == "no rise; 1 not finite"
    said(note(drawn), "2 of 12 losses")


def test_an_unfinished_path_is_refused(tmp_path: Path) -> None:
    rows = make_rows(CURVES)
    with refused(ValueError, "good", "far"):
        figures.interpolation(rows[rows["alpha"] < 1], tmp_path / "no.png")
    assert not list(tmp_path.iterdir())


# --- what all figures share ------------------------------------------------------------------------


def layer_names(count: int) -> list[str]:
    parts = "ln_1 attn.in_proj attn.out_proj ln_2 mlp.c_fc mlp.c_proj".split()
    blocks = [f"visual.transformer.resblocks.{i}.{part}" for i in range(count) for part in parts]
    return ["visual.conv1", *blocks][:count]


def test_names_of_layers_are_shortened_only_while_they_differ() -> None:
    assert captions.short([*layer_names(3), "visual.proj"]) == {
        "visual.conv1": "conv1",
        "visual.transformer.resblocks.0.ln_1": "0.ln_1",
        "visual.transformer.resblocks.0.attn.in_proj": "0.attn.in_proj",
        "visual.proj": "proj",
    }
    stages = ["m.layer1.0.conv1", "m.layer2.0.conv1"]
    assert list(captions.short(stages).values()) == ["layer1.0.conv1", "layer2.0.conv1"]
    assert captions.short(["head"]) == {"head": "head"}
    mixed = ["visual.conv1", "visual.blocks.3.mlp", "head"]
    assert list(captions.short(mixed).values()) == ["conv1", "3.mlp", "head"]
    assert list(captions.short(["a.proj", "a.b", "c.proj", "c.b"]).values()) == [
        "a.proj",
        "a.b",
        "c.proj",
        "c.b",
    ]


@pytest.mark.parametrize("count", [1, 36, 76, 80, 150, 400])
def test_labels_of_many_layers_do_not_overlap(count: int) -> None:
    names = list(captions.short(layer_names(count)).values())
    drawn = style.canvas(5, heat.height(count) + 1)
    panel = drawn.subplots()
    heat.draw(panel, pd.DataFrame(np.zeros((count, 2)), names, [0.0, 1.0]), AsinhNorm(1, -1, 1))
    heat.label(panel, names)
    drawn.draw_without_rendering()
    labels = [label for label in panel.get_yticklabels() if label.get_text()]
    assert [label.get_text() for label in labels] == names[:: 1 if count <= 160 else 3]
    assert min(label.get_fontsize() for label in labels) >= 5
    # Top to bottom; a height of letters without the room that a font leaves above and below them.
    places = [72 / drawn.dpi * label.get_window_extent().y0 for label in labels]
    assert all(a - b > 0.95 * labels[0].get_fontsize() for a, b in pairwise(places))


@pytest.mark.parametrize("name", ["layers", "sharpness", "layer_sharpness", "prune", "correlation"])
def test_rows_of_no_such_study_are_refused(name: str, tmp_path: Path) -> None:
    table = studies.frame([]) if name != "correlation" else pd.DataFrame()
    with refused(ValueError):
        getattr(figures, name)(table, tmp_path / "no.png")
    assert not list(tmp_path.iterdir())


def note(figure: Figure) -> str:
    return figure.legends[0].get_title().get_text().replace("\n", " ")


def cells(panel: Axes) -> np.ndarray:
    (mesh,) = (x for x in panel.collections if isinstance(x, QuadMesh))
    return np.ma.filled(mesh.get_array(), np.nan).reshape(-1, len(ALPHAS))


def places(panel: Axes, marker: str, lines: str = "None") -> list[tuple[float, float]]:
    return [
        (float(x), float(y))
        for line in panel.lines
        if line.get_marker() == marker and line.get_linestyle() == lines
        for x, y in zip(*line.get_data(), strict=True)
    ]


def band(panel: Axes, which: int, alpha: float) -> tuple[float, float]:
    """The ends of one of the panel's bands."""
    bands = [x for x in panel.collections if isinstance(x, PolyCollection)]
    corners = np.asarray(bands[which].get_paths()[0].vertices)
    here = corners[corners[:, 0] == alpha][:, 1]
    return float(here.min()), float(here.max())


def whole_paths(gains: dict[str, float], sets: tuple[str, ...] = ("far",)) -> list[dict[str, Any]]:
    """Interpolations from 50 % that gain so much at 0.5 (lose, when negative), and nothing at 1."""
    curves = {(m, s): ([0.5, 0.5 + g, 0.5], [1.0] * 3) for s in sets for m, g in gains.items()}
    return records(make_rows(curves))


def records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in row.items() if not pd.isna(v)} for row in rows.to_dict("records")]


# --- Figure 2 --------------------------------------------------------------------------------------


def layer_curves(model: str, rises: list[list[float]], **other: Any) -> list[dict[str, Any]]:
    """One layer per curve of rises at ALPHAS; accuracy falls by a tenth of the rise."""
    return [
        {
            "study": "layers", "model": model, "dataset": "far", "ood": True, "layer": name, "alpha": alpha,
            "others": "zeroshot", "samples": 1234, "loss": 1 + rise, "accuracy": 0.5 - rise / 10,
            "gain": -rise / 10, "gain_se": 0.01 * alpha, "rise": rise, "rise_se": 0.02 * alpha,
            "instability": rise - curve[-1] / 2, "instability_se": 0.01,
            "instability_accuracy": 0.0, "instability_accuracy_se": 0.01, **other,
        }
        for name, curve in zip(layer_names(len(rises)), rises, strict=True)
        for alpha, rise in zip(ALPHAS, curve, strict=True)
    ]  # fmt: skip


RISES = [[0, 0.9, 0.1], [0, -0.3, -0.6], [0, 0.05, 0.1], [0, 0.2, 0.0], [0, 0.0, 0.0]]


@pytest.fixture(scope="module")
def layers_figure(tmp_path_factory: pytest.TempPathFactory) -> Figure:
    calm = [[0, 0.01, 0.02]] * 4 + [[0, math.nan, 0.0]]
    rows = [
        *whole_paths({"calm": 0.1, "middling": 0.05, "stormy": -0.2}),
        *layer_curves("stormy", RISES),
        *layer_curves("middling", RISES),
        *layer_curves("calm", calm),
    ]
    return figures.layers(studies.frame(rows), tmp_path_factory.mktemp("figure") / "layers.png")


def test_maps_are_the_rises_of_a_gain_and_a_failure_model(layers_figure: Figure) -> None:
    calm, stormy = layers_figure.axes[:2]
    assert calm.get_title(loc="left").split("\n")[:2] == ["calm", "gain +10.0 points"]
    assert stormy.get_title(loc="left").split("\n")[:2] == ["stormy", "gain 0.0 points"]
    np.testing.assert_allclose(cells(stormy), RISES)
    assert np.isnan(cells(calm)[4]).tolist() == [False, True, False]
    assert places(calm, "x") == [(0.5, 4)]
    labels = [label.get_text() for label in calm.get_yticklabels()]
    assert labels == ["conv1", "0.ln_1", "0.attn.in_proj", "0.attn.out_proj", "0.ln_2"]
    assert stormy.get_ylim() == (4.5, -0.5)  # the first layer on top
    for panel in (calm, stormy):
        (mesh,) = (x for x in panel.collections if isinstance(x, QuadMesh))
        assert (mesh.norm.vmin, mesh.norm.vmax) == (-0.9, 0.9) and mesh.norm(0) == 0.5
    said(note(layers_figure), "3 models", "1 highest", "1 lowest", "1 of 30 losses")


def test_models_that_are_named_are_all_shown(tmp_path: Path) -> None:
    rows = [row for model in "abc" for row in layer_curves(model, RISES)]
    table, file = studies.frame(rows), tmp_path / "layers.png"
    drawn = figures.layers(table, file, models=["c", "b", "a"])
    assert [axis.get_title(loc="left").split("\n")[0] for axis in drawn.axes[:3]] == ["a", "b", "c"]
    said(note(drawn))  # nothing of a choice
    with refused(ValueError):
        figures.layers(table, file, models=["a", "d"])


def test_stragglers_and_the_worst_layers_are_shown(layers_figure: Figure) -> None:
    calm, stormy, _, loss, _, accuracy = layers_figure.axes[:6]
    assert [y for _, y in places(stormy, "<")] == [0, 3]  # instabilities .85 and .2 above .1
    assert [y for _, y in places(calm, "<")] == [4]  # what is not finite is no evidence of calm
    assert stormy.get_title() == "far\n1,234 images\nothers zero-shot\n2 stragglers"
    shown = set(lines(loss)) & set(layer_names(5))
    # Instability: stormy .85, 0 (-.3 + .3), .05 - .05, .2, 0; calm's NaN first, then its first two.
    names = layer_names(5)
    assert shown == {names[0], names[3], names[1], names[4]}
    for panel, scale, value, se in ((loss, 1, 1.9, 0.02), (accuracy, 100, 0.41, 0.01)):
        line = lines(panel)[names[0]]
        assert line.get_ydata()[1] == pytest.approx(scale * value)
        which = [name for name in lines(panel) if name in names].index(names[0])
        low, high = band(panel, which, 0.5)
        assert (high + low) / 2 == pytest.approx(scale * value, abs=1e-6)
        assert (high - low) / 2 == pytest.approx(scale * 1.959964 * se / 2, abs=1e-6)
    drawn = [lines(loss)[name] for name in shown]
    assert len({line.get_marker() for line in drawn}) == len({line.get_color() for line in drawn}) == 4


def test_layers_without_rows_of_a_model_are_left_blank_not_crossed_out(tmp_path: Path) -> None:
    rows = [*layer_curves("a", RISES), *layer_curves("b", RISES[:2])]
    drawn = figures.layers(studies.frame(rows), tmp_path / "layers.png")
    assert np.isnan(cells(drawn.axes[1])[2:]).all() and not places(drawn.axes[1], "x")
    said(note(drawn))  # nothing of losses that are not finite
    test_nothing_overlaps_or_is_cut_off(drawn)


# --- Figure 3 --------------------------------------------------------------------------------------


def sharp(model: str, values: list[float], **other: Any) -> list[dict[str, Any]]:
    return [
        {
            "study": "sharpness", "model": model, "dataset": "near", "ood": False, "alpha": alpha, "rho": 0.5,
            "on": "interpolated", "noise": "normal", "adaptive": True, "estimator": "plain",
            "normalized": False, "seed": 7, "draws": 20, "samples": 2000, "sharpness": value,
            "sharpness_se": 0.01, **other,
        }
        for alpha, value in zip(ALPHAS, values, strict=True)
    ]  # fmt: skip


T19 = 2.093024  # two-sided 95 %, 19 degrees of freedom


@pytest.fixture(scope="module")
def sharpness_figure(tmp_path_factory: pytest.TempPathFactory) -> Figure:
    rows = whole_paths({"up": 0.1, "down": -0.2})
    for row in rows:
        row |= {"accuracy_se": 0.02, "gain_se": 0.005}
    rows += sharp("up", [1, 2, 4]) + sharp("down", [1, 3, math.inf])
    rows += sharp("up", [10, 20, 40], rho=2.0, noise_batch=128) + sharp("down", [10, 30, 50], rho=2.0)
    return figures.sharpness(studies.frame(rows), tmp_path_factory.mktemp("figure") / "sharpness.png")


def test_general_sharpness_along_the_path(sharpness_figure: Figure) -> None:
    panels = sharpness_figure.axes
    # A row of panels for each of rho = .5, rho = 2, and rho = 2 with noise anew per batch.
    titles = [panel.get_title() for panel in panels[::2]]
    assert [title.split(" on ")[0] for title in titles] == [f"ρ = {rho}" for rho in ("0.5", 2, 2)]
    drawn = {bars.get_label(): bars for bars in panels[0].containers}
    for model, values, linestyle in (("up", [1, 2, 4], "-"), ("down", [1, 3], "--")):
        line, _, (bars,) = drawn[model].lines
        x, y = np.array(line.get_data(), dtype=float)
        assert y[np.isfinite(y)].tolist() == values
        np.testing.assert_allclose(x, ALPHAS, atol=0.1)  # shifted a little
        assert line.get_linestyle() == linestyle
        for middle, bar in zip(values, bars.get_segments(), strict=False):
            assert bar[:, 1].tolist() == pytest.approx([middle - T19 * 0.01, middle + T19 * 0.01])
    facts = ("1 of 12 values", r"$\rho$ = 0.5 or 2", "20 draws", "2,000 images", "seed 7", "plain", "128")
    said(note(sharpness_figure), *facts)
    test_nothing_overlaps_or_is_cut_off(sharpness_figure)


def test_one_position_has_one_tick_and_one_draw_is_singular(tmp_path: Path) -> None:
    """Models that are shifted sideways are at no other position."""
    rows = [
        row | {"alpha": 1.0, "draws": 1} for row in sharp("up", [1, 2, 4])[:1] + sharp("down", [2, 2, 2])[:1]
    ]
    drawn = figures.sharpness(studies.frame(rows), tmp_path / "a.png")
    ticks = drawn.axes[0].get_xticklabels()
    assert [tick.get_text() for tick in ticks] == ["1"]
    assert drawn.axes[0].get_ylabel() == "general sharpness (nats)"
    said(note(drawn), "1 draw,")


def test_accuracy_against_sharpness(sharpness_figure: Figure) -> None:
    panel = sharpness_figure.axes[1]
    assert panel.get_title() == "far"
    drawn = {bars.get_label(): bars for bars in panel.containers}
    line, _, (across, up) = drawn["up"].lines
    np.testing.assert_allclose(np.array(line.get_data(), dtype=float), [[1, 2, 4], [50, 60, 50]])
    assert across.get_segments()[1][:, 0].tolist() == pytest.approx([2 - T19 * 0.01, 2 + T19 * 0.01])
    half = 1.959964 * 2
    assert up.get_segments()[1][:, 1].tolist() == pytest.approx([60 - half, 60 + half], abs=1e-5)
    assert drawn["up"].lines[0].get_markerfacecolor() != "white"
    assert drawn["down"].lines[0].get_markerfacecolor() == "white"
    assert places(panel, "+") == [(1, 50), (1, 50)]
    assert places(panel, "s")[0] == (4, 50)


def test_sharpness_alone_says_what_is_missing(tmp_path: Path) -> None:
    rows = sharp("m", [1, 2, 3], sharpness_se=math.nan, estimator="apgd-l2", draws=10)
    drawn = figures.sharpness(studies.frame(rows), tmp_path / "sharpness.png")
    assert len(drawn.axes) == 1
    said(note(drawn), "interpolation", "3 of 3", "apgd-l2", "10 steps")
    some = [*whole_paths({"m": 0.1})[::2], *whole_paths({"m": 0.1})[1:1], *rows]
    drawn = figures.sharpness(studies.frame(some), tmp_path / "sharpness.png")
    said(note(drawn), "1 position ")


# --- Figure 4 --------------------------------------------------------------------------------------


def layer_sharp(model: str, values: list[list[float]], **other: Any) -> list[dict[str, Any]]:
    rows = []
    for name, curve in zip(layer_names(len(values)), values, strict=True):
        rows += sharp(model, curve, study="layer-sharpness", layer=name, on="finetuned", **other)
    for row in rows[:: len(ALPHAS)]:
        row |= {"draws": 0, "sharpness_se": 0.0}
    return rows


SHARP = [[0, 0.5, 2.0], [0, 0.001, 0.002], [0, -0.01, 0.3], [0, math.nan, 0.1]]


@pytest.fixture(scope="module")
def layer_sharpness_figure(tmp_path_factory: pytest.TempPathFactory) -> Figure:
    gains = {"a": 0.1, "b": 0.4, "c": -0.3, "d": 0.05, "e": 0.0, "f": 0.2}
    rows = whole_paths(gains)
    for model in gains:
        rows += layer_sharp(model, SHARP, sharpness_se=0.006)
    rows += layer_curves("b", RISES[:4])
    return figures.layer_sharpness(studies.frame(rows), tmp_path_factory.mktemp("figure") / "layers.png")


@pytest.mark.slow
def test_four_of_many_models_are_chosen_by_gain(layer_sharpness_figure: Figure) -> None:
    titles = [panel.get_title() for panel in layer_sharpness_figure.axes[:4]]
    gains = {"b": "+40.0", "f": "+20.0", "c": "0.0", "e": "0.0"}
    assert titles == [f"{name}\ngain {gain} points" for name, gain in gains.items()]
    gone = pd.concat([studies.frame(layer_sharp(m, SHARP[:1])) for m in "vwxyz"])
    with TemporaryDirectory() as folder:
        drawn = figures.layer_sharpness(gone, Path(folder) / "x.png")
    assert [panel.get_title() for panel in drawn.axes[:4]] == ["v", "w", "x", "y"]
    said(note(drawn), "4 of 5 models")


def test_layer_sharpness_and_its_marks(layer_sharpness_figure: Figure) -> None:
    best, *_, worst = layer_sharpness_figure.axes[:4]
    expected = np.array(SHARP)
    np.testing.assert_allclose(cells(best), expected)
    assert places(best, "x") == [(0.5, 3)]
    # t * se = .0126: within it are both of layer 1 and the first of layer 2, but nothing at alpha = 0.
    assert sorted(places(best, ".")) == [(0.5, 1), (0.5, 2), (1, 1)]
    # Near zero, within .02, is layer 1 alone.
    assert [y for _, y in places(best, "o")] == [1] == [y for _, y in places(worst, "o")]
    assert [y for _, y in places(best, "<")] == [0, 3] and not places(worst, "<")
    for panel, alpha in ((best, 0.5), (worst, 0.0)):
        assert [x for x, _ in places(panel, "*", "--")] == [alpha]
        assert [x for x, _ in places(panel, "None", "--")] == [alpha, alpha]  # from bottom to top
    facts = ("6 models", "2 highest", "2 lowest", "20 draws", "2,000 images", "seed 7", "fine-tuned")
    said(note(layer_sharpness_figure), *facts, "4 of 48 values")
    test_nothing_overlaps_or_is_cut_off(layer_sharpness_figure)


# --- Figure 5 --------------------------------------------------------------------------------------


def pruned(model: str, dataset: str, changes: dict[bool, list[float]]) -> list[dict[str, Any]]:
    """An unpruned path, and one path per seed changed so much at 0.5 and 1; control is the key."""
    base = {"study": "prune", "model": model, "dataset": dataset, "ood": True, "samples": 1234}
    rows = []
    for alpha, accuracy in zip(ALPHAS, [0.5, 0.6, 0.4], strict=True):
        gain = {"gain": accuracy - 0.5, "gain_se": 0.01}
        rows.append({**base, "alpha": alpha, "keep": 1.0, "accuracy": accuracy, "change": 0.0, **gain})
        for control, found in changes.items():
            for seed, change in enumerate(found):
                change = change if alpha else 0.0
                rows.append({
                    **base, "alpha": alpha, "keep": 0.5, "method": "zero", "criterion": "sharpness",
                    "control": control, "layer": "x.1, x.2", "seed": seed, "accuracy": accuracy + change,
                    "gain": gain["gain"] + change, "change": change,
                })  # fmt: skip
    return rows


def test_pruned_paths_are_means_over_seeds_beside_the_control(tmp_path: Path) -> None:
    rows = pruned("m", "far", {False: [0.02, 0.03, 0.07], True: [-0.1, -0.2, -0.3]})
    rows += pruned("m", "near", {False: [0.01], True: [math.nan, 0.0]}) + pruned("n", "far", {})
    rows += pruned("n", "near", {})
    shuffled = studies.frame(rows + whole_paths({"m": 0.1, "n": -0.1})).sample(frac=1, random_state=0)
    drawn = figures.prune(shuffled, tmp_path / "prune.png")
    panels = {
        (model, dataset): drawn.axes[2 * i + j]
        for i, dataset in enumerate(panel.get_ylabel().split("\n")[0] for panel in drawn.axes[::2])
        for j, model in enumerate(panel.get_title().split("\n")[0] for panel in drawn.axes[:2])
    }
    panel = panels["m", "far"]
    unpruned, *curves = panel.lines
    np.testing.assert_allclose(unpruned.get_ydata(), [50, 60, 40])
    assert band(panel, 0, 1.0) == pytest.approx((40 - 1.959964, 40 + 1.959964), abs=1e-5)
    found = {curve.get_label(): i for i, curve in enumerate(curves, 1)}
    # Standard errors of 2, 3, 7 and of 10, 20, 30: sqrt(7 / 3) and sqrt(100 / 3).
    expected = {
        r"2 flat layers: +4.00 $\pm$ 1.53 points": ([50, 64, 44], (42, 47)),
        "2 at random: \N{MINUS SIGN}20.00 $\\pm$ 5.77 points": ([50, 40, 20], (10, 30)),
    }
    assert set(found) == set(expected)
    for label, (values, ends) in expected.items():
        np.testing.assert_allclose(curves[found[label] - 1].get_ydata(), values)
        assert band(panel, found[label], 1.0) == pytest.approx(ends)
    assert len({curve.get_linestyle() for curve in curves}) == 2
    assert [text.get_text() for text in panel.get_legend().get_texts()] == list(found)
    labels = [line.get_label() for line in panels["m", "near"].lines]
    assert "2 flat layers: +1.00 points (one seed)" in labels
    assert len(panels["n", "far"].lines) == 1 and panels["n", "far"].get_legend() is None
    assert {panel.get_title() for panel in drawn.axes[:2]} == {"m\ngain +10.0 points", "n\ngain 0.0 points"}
    said(note(drawn), "0.5", "0 or 1 or 2", "2 of 39 accuracies")
    test_nothing_overlaps_or_is_cut_off(drawn)


def test_nothing_pruned_is_said(tmp_path: Path) -> None:
    drawn = figures.prune(studies.frame(pruned("m", "far", {})), tmp_path / "prune.png")
    said(note(drawn))


def test_saturated_sharpness_has_diamonds(tmp_path: Path) -> None:
    """Of one model at 0.5 and 1, by the rows themselves; of others nothing is known."""
    rows = whole_paths({"up": 0.1, "down": -0.2}) + sharp("up", [1, 2, 4]) + sharp("down", [1, 3, 5])
    rows += [
        row | {"study": "layer-sharpness", "layer": "conv"} for row in rows if row["study"] == "sharpness"
    ]
    frame = studies.frame(rows)
    frame.loc[(frame["model"] == "up") & (frame["alpha"] > 0), "saturated"] = True
    drawn = figures.sharpness(frame, tmp_path / "all.png")
    for panel, column, values in zip(drawn.axes[:2], (1, 0), ([2, 4], [2, 4]), strict=True):
        assert [place[column] for place in places(panel, "D")] == values
    assert "saturated" in [text.get_text() for text in drawn.legends[0].get_texts()]
    said(note(drawn), "Saturated")
    layers = figures.layer_sharpness(frame, tmp_path / "layers.png")
    up = next(panel for panel in layers.axes if panel.get_title().startswith("up"))
    assert places(up, "D") == [(0.5, 0), (1.0, 0)]
    assert "saturated" in [text.get_text() for text in layers.legends[0].get_texts()]


# --- the correlation -------------------------------------------------------------------------------


def correlations(measure: str, layer: str | None, taus: list[float], **other: Any) -> list[dict[str, Any]]:
    """Kendall so, Spearman .1 above, intervals .3 to both sides, at alphas 0.5 and 1."""
    general = measure == "general"
    rows: list[dict[str, Any]] = []
    for dataset, outcome, sign in (("far", "accuracy", 1), ("far", "gain", -1)):
        for alpha, tau in zip(ALPHAS[1:], sign * np.array(taus), strict=True):
            rows.append({
                "dataset": dataset, "outcome": outcome, "measured_on": "near", "measure": measure,
                "layer": layer, "alpha": alpha, "rho": 0.5, "on": "interpolated" if general else "finetuned",
                "estimator": "gradient", "noise": "normal", "adaptive": True, "noise_batch": None,
                "normalized": False, "draws": 20, "samples": 2000, "seed": 7, "models": 9, "nonfinite": 0,
                "kendall": tau, "kendall_low": tau - 0.3, "kendall_high": tau + 0.3,
                "spearman": tau + 0.1, "spearman_low": tau - 0.2, "spearman_high": tau + 0.4,
                "saturated": 0, "p_max": 0.04 if tau < -0.5 else 0.3, **other,
            })  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    one, two, three = layer_names(3)
    rows = correlations("general", None, [0.1, -0.2])
    rows += correlations("general", None, [0.5, 0.4], rho=2.0, saturated=9, p_max=math.nan)
    rows += correlations("stragglers", f"{one}, {two}", [-0.5, -0.6])
    rows += correlations("layer", one, [0.0, 0.3]) + correlations("layer", two, [0.2, 0.1])
    gone = dict.fromkeys(
        [f"{name}{end}" for name in ("kendall", "spearman") for end in ("", "_low", "_high")]
    )
    rows += correlations("layer", three, [0.0, 0.0], **dict.fromkeys(gone, math.nan), nonfinite=1)
    exact = correlations("layer", "visual.proj", [1.0, 1.0], kendall_low=math.nan, kendall_high=math.nan)
    return pd.DataFrame(rows + exact)


def test_forest_of_correlations(table: pd.DataFrame, tmp_path: Path) -> None:
    drawn = figures.correlation(table, tmp_path / "correlation.png")
    over, _, forest, other = drawn.axes
    assert over.get_title() == "accuracy on\nfar\n9 models"
    names = [label.get_text() for label in forest.get_yticklabels()]
    assert names == [r"general, $\rho$ = 0.5", r"general, $\rho$ = 2", "stragglers", "conv1", "0.ln_1",
                     "0.attn.in_proj", "proj"]  # fmt: skip
    assert forest.get_ylim() == (6.5, -0.5)
    taus = [-0.2, 0.4, -0.6, 0.3, 0.1, math.nan, 1.0]
    for panel, sign in ((forest, 1), (other, -1)):
        kendall, spearman = lines(panel)["kendall"], lines(panel)["spearman"]
        np.testing.assert_allclose(kendall.get_xdata(), sign * np.array(taus))
        np.testing.assert_allclose(spearman.get_xdata(), sign * np.array(taus) + 0.1)
        np.testing.assert_allclose(kendall.get_ydata(), np.arange(7), atol=0.3)
        assert lines(panel)["saturated"].get_xdata() == pytest.approx([sign * 0.4])
    assert lines(forest)["significant"].get_xdata() == pytest.approx([-0.6])
    assert lines(other)["significant"].get_xdata() == pytest.approx([-1.0])  # of the exact row
    bars = next(x for x in forest.collections if isinstance(x, LineCollection)).get_segments()
    assert bars[0][:, 0].tolist() == pytest.approx([-0.5, 0.1])
    assert one(forest, linestyle=":").get_xdata() == [0, 0]
    assert lines(over)["stragglers"].get_ydata().tolist() == [-0.5, -0.6]
    assert band(over, 0, 1.0) == pytest.approx((-0.5, 0.1))
    facts = ("4 of 28 correlations", "(4 for", "4 have no interval", r"$\alpha$ = 1", r"$\rho$ = 0.5 or 2")
    said(note(drawn), *facts, "20 draws", "2,000 images", "seed 7")
    test_nothing_overlaps_or_is_cut_off(drawn)


def test_the_alpha_of_the_forest_is_settable(table: pd.DataFrame, tmp_path: Path) -> None:
    layers = table[table["measure"] == "layer"]
    (forest, _) = figures.correlation(layers, tmp_path / "half.png", alpha=0.5).axes
    np.testing.assert_allclose(lines(forest)["kendall"].get_xdata()[:2], [0.0, 0.2])
    with refused(ValueError, "0.5", "1.0", "0.3"):
        figures.correlation(table, tmp_path / "no.png", alpha=0.3)


# --- long names -----------------------------------------------------------------------------------

LONG = {"bad": "$/a/" + "runs of-seeds/lr1e-3_wd" * 8 + "/end-00", "fog": "x" * 200}


@pytest.fixture(scope="module")
def long_names() -> Facts:
    rows = ({key: LONG.get(str(value), value) for key, value in row.items()} for row in make_run_rows())
    return Facts(studies.frame(rows), measured=["correlation"])


@pytest.mark.parametrize("study", STUDIES)
def test_long_names_stand_whole_within_the_figure(study: str, long_names: Facts, tmp_path: Path) -> None:
    about = long_names.correlation if study == "correlation" else long_names
    drawn = getattr(figures, study.replace("-", "_"))(about, tmp_path / "x.png")
    ticks = {
        id(text)
        for panel in drawn.axes
        for axis in (panel.xaxis, panel.yaxis)
        for text in axis.get_ticklabels()
    }  # some are not drawn
    found = [text for text in drawn.findobj(Text) if text.get_text() and id(text) not in ticks]
    edge = 2  # pixels
    for text in found:
        box = text.get_window_extent()
        assert box.x0 >= -edge and box.x1 <= drawn.bbox.x1 + edge, text.get_text()
        assert box.y0 >= -edge and box.y1 <= drawn.bbox.y1 + edge, text.get_text()
    shown = [text.get_text().replace("\n", "").replace(r"\$", "$") for text in found]
    expected = {"correlation": ["fog"], "interpolation": ["bad", "fog"], "sharpness": ["bad", "fog"]}
    for name in expected.get(study, ["bad"]):
        assert any(LONG[name] in text for text in shown)


def test_folding_leaves_nothing_out() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        signs = rng.choice(["a", "W", "/", " ", "-", ".", r"\$", "\\", "é"], rng.integers(0, 90))
        text, inches = "".join(signs), float(rng.uniform(0, 3))
        lines = style.fold(text, inches).split("\n")
        assert "".join(lines) == text and not any(line.startswith("$") for line in lines)
        assert max(len(line.replace(r"\$", "$")) for line in lines) <= max(
            8, 110 * inches / in_points("small")
        )
    assert style.fold("runs/one/two", 0) == "runs/\none/two"
