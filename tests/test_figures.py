"""What the figures show, read back from their artists."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rft_fast import figures, studies

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
    assert top.texts[0].get_text() == r"gain +10.0 $\pm$ 2.0 at $\alpha$ = 0.5"
    assert bottom.texts[0].get_text() == r"barrier +1.50 $\pm$ 0.20 at $\alpha$ = 0.5"


def test_bands_are_paired_intervals(figure: Figure) -> None:
    top, bottom = panels(figure)["far"]
    for panel, value, margin in ((top, 30, 100 * 0.02), (bottom, 2.0, 0.2)):
        second = [name for name in lines(panel) if name in ("good", "bad")].index("bad")
        corners = np.asarray(panel.collections[second].get_paths()[0].vertices)
        at_the_end = corners[corners[:, 0] == 1][:, 1]
        assert at_the_end.min() == pytest.approx(value - 1.959964 * margin, abs=1e-5)
        assert at_the_end.max() == pytest.approx(value + 1.959964 * margin, abs=1e-5)


def test_what_was_measured_is_stated(figure: Figure) -> None:
    whole = "\n".join(texts(figure))
    assert "far\n(1,234 images)" in whole and "near\n(in distribution, 1,234 images)" in whole
    assert r"3 positions $\alpha$ per curve" in whole and "paired over images" in whole
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
    assert bottom.texts[0].get_text() == "no barrier; 1 not finite"
    assert "2 losses that are not finite are not drawn" in "\n".join(texts(drawn))


def test_an_unfinished_path_is_refused(tmp_path: Path) -> None:
    rows = make_rows(CURVES)
    with pytest.raises(ValueError, match="'good' on 'far'"):
        figures.interpolation(rows[rows["alpha"] < 1], tmp_path / "no.png")
    assert not list(tmp_path.iterdir())
