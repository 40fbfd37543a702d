"""Coefficients of layers: rows against plain torch in float64, and effects by numbers worked out by hand."""

from __future__ import annotations

import copy
import itertools
import math
import re
from pathlib import Path as File
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text
from scipy.stats import t as student
from support.tiny_models import State, Told, counted, normalised, pictures, random_state
from support.tiny_zoo import make, own_models, sweep_refused
from support.wording import refused, said, warned
from torch import nn

from rft_fast import catalogue, figures, report, results, studies, sweep
from rft_fast.catalogue.coefficients import Tables
from rft_fast.common.fields import Tree
from rft_fast.datasets import Dataset
from rft_fast.evaluate import Evaluator
from rft_fast.names import FigureWidth
from rft_fast.path import Path
from rft_fast.report import coefficients as words
from rft_fast.report import glossary
from rft_fast.run import trackers
from rft_fast.studies.coefficients import coefficient_effects
from rft_fast.studies.facts import Facts
from rft_fast.studies.images import ImageResults, ImageScores

pytestmark = pytest.mark.usefixtures("one_thread")

ALPHAS = [0.0, 0.4, 1.0]
TABLE = {"0": 0.5, "re:[13]": 0.25, None: 2.0}
BY_HAND = {"0": 0.5, "1": 0.25, "3": 0.25, "5": 2.0, "7": 2.0}


class Setting:
    """A net with batch statistics, which are beside the layer "1"."""

    def __init__(self) -> None:
        self.model = nn.Sequential(
            nn.Conv2d(3, 5, 2), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6),
            nn.Tanh(), nn.Linear(6, 4),
        )  # fmt: skip
        self.zero, self.one = random_state(self.model, 1), random_state(self.model, 2)
        self.path = Path(self.model, self.zero, self.one)
        self.sets = [pictures("far", 61, True), pictures("near", 23, False)]
        self.evaluator = Evaluator(self.model, self.sets, batch_size=16)
        self.double = copy.deepcopy(self.model).double().eval()

    def brute(self, alpha: float, table: dict[str, float], data: Dataset) -> tuple[np.ndarray, np.ndarray]:
        weights: State = {}
        for name, w0 in self.zero.items():
            if w0.is_floating_point():
                a = alpha * table.get(name.partition(".")[0], 1.0)
                weights[name] = (1 - a) * w0.double() + a * self.one[name].double()
        with torch.no_grad():
            logits = torch.func.functional_call(self.double, weights, (normalised(data),))
        losses = logits.logsumexp(1) - logits[torch.arange(len(logits)), data.labels]
        return losses.numpy(), (logits.argmax(1) == data.labels).numpy().astype(float)


def paired(values: np.ndarray) -> tuple[float, float]:
    return values.mean(), values.std(ddof=1) / math.sqrt(len(values))


# --- the study ------------------------------------------------------------------------------------


def test_rows_equal_brute_force() -> None:
    """Of a table, of layers that are held, and of their controls."""
    s, told = Setting(), Told()
    before = s.path.checksum()
    rows = studies.coefficients(
        s.path, s.evaluator, [1, 0, 0.4], {"mine": TABLE}, {"three held": ["3", "re:7"]}, seeds=[0, 5],
        model="m", sink=told,
    )  # fmt: skip
    assert s.path.checksum() == before
    pd.testing.assert_frame_equal(rows, studies.frame(told.rows))
    assert told.numbers == list(range(15)) and len(rows) == 30  # alphas, tables; data sets
    assert rows["alpha"].tolist() == [alpha for alpha in ALPHAS for _ in range(10)]
    assert set(rows["study"]) == {"coefficients"} and set(rows["model"]) == {"m"}
    for row in rows.to_dict("records"):
        table = {} if pd.isna(row["coefficients"]) else BY_HAND
        if row["coefficients"] == "three held":
            held = row["layer"].split(", ")
            assert (held == ["3", "7"]) != row["control"] and len(held) == 2
            assert not row["control"] or {*held} <= {"0", "1", "5"}
            table = dict.fromkeys(held, 0.0)
        else:
            assert pd.isna(row["layer"]) and pd.isna(row["control"]) and pd.isna(row["seed"])
        data = next(data for data in s.sets if data.name == row["dataset"])
        losses, hits = s.brute(row["alpha"], table, data)
        zero, plain = s.brute(0.0, {}, data), s.brute(row["alpha"], {}, data)
        truth = {
            "loss": paired(losses),
            "accuracy": paired(hits),
            "gain": paired(hits - zero[1]),
            "rise": paired(losses - zero[0]),
            "change": paired(hits - plain[1]),
            "change_loss": paired(losses - plain[0]),
        }
        for name, (value, error) in truth.items():
            assert row[name] == pytest.approx(value, abs=1e-5), (name, row)
            assert row[f"{name}_se"] == pytest.approx(error, abs=1e-5), (name, row)


def test_coefficients_of_one_are_the_path_to_the_bit() -> None:
    s = Setting()
    along = studies.interpolation(s.path, s.evaluator, ALPHAS)
    rows = studies.coefficients(s.path, s.evaluator, ALPHAS, {"ones": {"re:.*": 1.0}})
    for table in rows["coefficients"].unique():
        own = rows[rows["coefficients"].fillna("") == ("" if pd.isna(table) else table)]
        for name in ("loss", "loss_se", "accuracy", "gain", "rise", "rise_se"):
            assert own[name].tolist() == along[name].tolist(), name
    assert not rows[["change", "change_se", "change_loss", "change_loss_se"]].any(axis=None)


def test_a_closed_form() -> None:
    """Two layers of one weight, a and b, from 0 to 1: loss ln(1 + exp(-x)) with x = alpha**2 c_a c_b."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            one = images.flatten(1)[:, :1] * 0 + 1
            logit = self.b(self.a(one))
            return torch.cat([logit, torch.zeros_like(logit)], 1)

    model = Product()
    names = ["a.weight", "b.weight"]
    path = Path(model, *({name: torch.full((1, 1), value) for name in names} for value in (0.0, 1.0)))
    images = torch.zeros(7, 3, 1, 1, dtype=torch.uint8)
    evaluator = Evaluator(model, [Dataset("d", images, torch.zeros(7).long(), (0.5,) * 3, (0.5,) * 3)])
    tables: dict[str, Any] = {
        "x": {"a": 0.5, "b": 2.0},
        "y": {"a": 0.5, None: 1.0},
        "z": {"a": 3.0, "b": -1.0},
    }
    rows = studies.coefficients(path, evaluator, [0, 0.5, 1], tables, {"held": ["b"]}, seeds=[])
    products = {"x": 1.0, "y": 0.5, "z": -3.0, "held": 0.0}
    for row in rows.to_dict("records"):
        c = 1.0 if pd.isna(row["coefficients"]) else products[row["coefficients"]]
        loss, plain = (math.log1p(math.exp(-(row["alpha"] ** 2) * x)) for x in (c, 1.0))
        assert row["loss"] == pytest.approx(loss, abs=1e-6)
        assert row["change_loss"] == pytest.approx(loss - plain, abs=1e-6)


def test_measurements_one_by_one_and_their_passes() -> None:
    """At most one pass of the images for each, and none at alpha = 0 beyond that of zero-shot."""
    s = Setting()
    how: dict[str, Any] = {"tables": {"mine": TABLE}, "hold": {"held": ["5"]}, "seeds": [1]}
    with counted(s.model[0]) as (sizes,):
        whole = studies.coefficients(s.path, s.evaluator, ALPHAS, **how)
    images = sum(len(data.labels) for data in s.sets)
    assert sum(sizes) == images * (1 + 2 * 4)  # alphas above 0, and four curves there
    found: dict[int, Any] = {}
    for number in reversed(range(12)):
        studies.coefficients(s.path, s.evaluator, ALPHAS, only=[number], sink=found.__setitem__, **how)
    rows = studies.frame(row for number in sorted(found) for row in found[number])
    pd.testing.assert_frame_equal(rows.drop(columns="seconds"), whole.drop(columns="seconds"))
    known: dict[Any, Any] = {}
    studies.coefficients(s.path, s.evaluator, ALPHAS, plain=known, **how)
    assert set(known) == {(data.name, alpha) for data in s.sets for alpha in ALPHAS}
    with counted(s.model[0]) as (sizes,):
        studies.coefficients(s.path, s.evaluator, ALPHAS, plain=known, **how)
    assert sum(sizes) == images * 2 * 3


@pytest.mark.parametrize(
    ("tables", "hold", "facts"),
    [
        pytest.param({"mine": {"9": 0.5, None: 1.0}}, {}, ["mine", "9"], id="unknown"),
        pytest.param({"mine": {"3": 0.5, "re:3|5": 0.1, None: 1}}, {}, ["mine", "3", "re:3|5"], id="twice"),
        pytest.param({"mine": {"3": 0.5}}, {}, ["mine", 4], id="missing"),
        pytest.param({}, {"held": ["9"]}, ["9"], id="held"),
    ],
)
def test_refused_before_anything_is_scored(tables: Any, hold: Any, facts: list[object]) -> None:
    s = Setting()
    with counted(s.model[0]) as (sizes,), refused(ValueError, *facts):
        studies.coefficients(s.path, s.evaluator, ALPHAS, tables, hold)
    assert not sizes


def test_few_others_to_hold_are_all_of_them() -> None:
    s = Setting()
    with warned(UserWarning, 3, 2):
        rows = studies.coefficients(s.path, s.evaluator, [0, 1], {}, {"held": ["0", "1", "3"]}, seeds=[0])
    assert set(rows["layer"].dropna()) == {"0, 1, 3", "5, 7"}


def test_controls_are_drawn_from_layers_that_move() -> None:
    s = Setting()
    one = {name: s.zero[name] if name[0] in "57" else tensor for name, tensor in s.one.items()}
    path = Path(s.model, s.zero, one)
    hold = {"held": ["0", "7"], "still": ["5"]}
    rows = studies.coefficients(path, s.evaluator, [0, 1], {}, hold, seeds=range(4))
    controls = rows[rows["control"].fillna(False).astype(bool)]
    assert set(controls["layer"]) == {"1", "3"} and set(controls["coefficients"]) == {"held"}


# --- effects --------------------------------------------------------------------------------------

N = 50
# Hits of 50 images, in distribution and out of it, at alpha = 0, 0.5 and 1.
CURVES = {
    ("", None): ([40, 44, 46], [30, 33, 28]),
    ("LiNeS", None): ([40, 43, 43], [30, 36, 39]),  # best at 0.5, the first of equals: nearest to 44
    ("held", None): ([40, 41, 45], [30, 31, 32]),  # 45 is as near to 44 as to 46: the smaller alpha
    ("held", 0): ([40, 39, 38], [30, 29, 28]),  # best at 0, with 40 as zero-shot
    ("held", 1): ([40, 46, 45], [30, 35, 32]),
}


class Stored:
    """Results of single images: the first ones are hits."""

    def __init__(self, rows: pd.DataFrame) -> None:
        self.rows = rows

    def of(self, study: str, model: str, dataset: str) -> ImageResults | None:
        assert study == "coefficients"
        same = (self.rows[["study", "model", "dataset"]] == [study, model, dataset]).all(axis=1)
        own = self.rows[same]
        hits = [np.arange(N) < round(N * accuracy) for accuracy in own["accuracy"]]
        return ImageResults.stack(own, [ImageScores(h, np.zeros(N, np.float16), None) for h in hits])


def by_hand(model: str = "m") -> pd.DataFrame:
    rows = []
    for at, alpha in enumerate([0.0, 0.5, 1.0]):
        for (name, seed), curves in CURVES.items():
            for dataset, curve in zip(("near", "far"), curves, strict=True):
                accuracy, plain = curve[at] / N, CURVES["", None][dataset == "far"][at] / N
                row: dict[str, object] = {
                    "study": "coefficients", "model": model, "dataset": dataset, "ood": dataset == "far",
                    "alpha": alpha, "samples": N, "accuracy": accuracy, "gain": accuracy - curve[0] / N,
                    "coefficients": name or None, "loss": 1.0, "change": accuracy - plain,
                }  # fmt: skip
                if name == "held":
                    held = "a, b" if seed is None else f"c, {'de'[seed]}"
                    row |= {"layer": held, "control": seed is not None, "seed": seed}
                rows.append(row)
    return studies.frame(rows)


def test_effects_by_hand() -> None:
    rows = by_hand()
    facts = coefficient_effects(rows, Stored(rows))
    assert facts["coefficients"].tolist() == ["LiNeS", "held", "held"] * 2 and not facts["ood"][:3].any()
    far = facts[facts["ood"]].set_index(["coefficients", "control"])
    expected = {
        ("LiNeS", False): (0.5, 43, 0.5, 44, 36 - 33),
        ("held", False): (1.0, 45, 0.5, 44, 32 - 33),
        ("held", True): (0.0, (40 + 46) / 2, 0.0, (40 + 46) / 2, ((30 - 30) + (35 - 28)) / 2),
    }
    for key, (alpha, near, plain, plain_near, difference) in expected.items():
        fact = far.loc[key]
        assert (fact["alpha"], fact["plain_alpha"]) == (alpha, plain)
        assert fact["near"] == pytest.approx(near / N) and fact["plain_near"] == pytest.approx(plain_near / N)
        assert fact["difference"] == pytest.approx(difference / N)
    # Three of 50 images differ, all in one direction; two tables are judged.
    value = np.array([1.0] * 3 + [0.0] * 47)
    error = value.std(ddof=1) / math.sqrt(N)
    half = student.ppf(1 - 0.025 / 2, N - 1) * error
    lines = far.loc["LiNeS", False]
    assert lines["difference_se"] == pytest.approx(error)
    assert lines["difference_low"] == pytest.approx(0.06 - half)
    assert lines["difference_high"] == pytest.approx(0.06 + half)
    assert lines["verdict"] == "unclear" and lines["layers"] == [] and lines["draws"] == 1
    assert far.loc["held", True]["draws"] == 2 and far.loc["held", True]["layers"] == ["c", "d"]
    # Mean over draws, image by image: the second draw has seven hits more.
    value = np.array([0.5] * 7 + [0.0] * 43)
    assert far.loc["held", True]["difference_se"] == pytest.approx(value.std(ddof=1) / math.sqrt(N))
    near = facts[~facts["ood"]].set_index(["coefficients", "control"])
    assert near.loc["LiNeS", False]["difference"] == pytest.approx(-1 / N)
    assert near["difference_low"].isna().all() and set(near["verdict"]) == {"unknown"}  # they choose alpha

    without = coefficient_effects(rows)
    assert without["difference"].tolist() == facts["difference"].tolist()
    assert without["difference_se"].isna().all() and set(without["verdict"]) == {"unknown"}


def test_effects_need_data_in_distribution() -> None:
    rows = by_hand()
    with refused(ValueError, "in distribution"):
        coefficient_effects(rows[rows["ood"]])
    with refused(ValueError, "coefficients"):
        coefficient_effects(rows[rows["alpha"] > 2])


# --- what is shown --------------------------------------------------------------------------------


def facts_of(rows: pd.DataFrame, stored: bool = True) -> Facts:
    return Facts(rows, Tree(), images=Stored(rows) if stored else None)


def clear(rows: pd.DataFrame) -> pd.DataFrame:
    """LiNeS has 47 hits out of distribution at 0.5: 14 more."""
    better = (rows["coefficients"].fillna("") == "LiNeS") & rows["ood"] & (rows["alpha"] == 0.5)
    return rows.assign(accuracy=rows["accuracy"].mask(better, 47 / N))


def test_words_say_what_intervals_allow() -> None:
    rows = by_hand()
    texts = {
        "unclear": facts_of(rows),
        "clear": facts_of(clear(rows)),
        "no intervals": facts_of(rows, stored=False),
        "held": facts_of(rows[rows["coefficients"].isna() | (rows["coefficients"] == "held")]),
        "nothing": facts_of(rows[rows["coefficients"].isna()]),
    }
    found = {name: [one.text for one in words.findings(facts)] for name, facts in texts.items()}
    said("\n".join(itertools.chain(*found.values())))
    assert "higher accuracy than the plain path in 0 and clearly lower in 0 of 2 cases" in found["unclear"][0]
    assert "in 1 and clearly lower in 0 of 2" in found["clear"][0] and "LiNeS" in found["clear"][0]
    assert "+28.0 points" in found["clear"][0] and "no interval" in found["no intervals"][0]
    assert "-2.0 points" in found["held"][0] and "against +7.0 points" in found["held"][0]
    assert len(found["nothing"]) == 1
    said("\n".join(words.lines(texts["clear"])))


def test_data_that_chose_the_layers_are_named() -> None:
    rows = by_hand().replace({"coefficients": {"held": "stragglers held"}})
    rows = rows[rows["coefficients"].isna() | (rows["coefficients"] == "stragglers held")]
    for dataset, named in (("far", True), ("near", False)):
        layer = {"study": "layers", "model": "m", "dataset": dataset, "layer": "a", "alpha": 0.0}
        facts = facts_of(pd.concat([rows, studies.frame([layer])], ignore_index=True))
        (finding,) = words.findings(facts)
        assert ("chosen by losses on the same data set" in finding.text) is named
        text = " ".join(" ".join(words.lines(facts)).split())
        assert ("chosen by losses on far" in text) is named
        assert ("chosen by losses on far" in words.section(facts).lead) is named


def test_the_section_has_a_row_for_each_table() -> None:
    section = words.section(facts_of(clear(by_hand())))
    (table,) = section.tables
    assert [row[2].text for row in table.rows] == ["LiNeS", "held", "held: control"] * 2
    assert [row[4].look for row in table.rows][3:] == ["good", "wide", "good"]
    assert all(len(row) == len(table.headings) for row in table.rows)
    unexplained = {heading for heading in table.headings if not glossary.words_of(heading)}
    assert unexplained <= {"model", "data set"}


def test_the_chart_has_a_curve_for_each_table() -> None:
    (chart,) = words.section(facts_of(by_hand())).picture.charts
    lines, plain, held, control = (chart.traces[place] for place in (1, 0, 2, 3))
    assert plain["x"] == pytest.approx([80, 88, 92]) and plain["y"] == pytest.approx([60, 66, 56])
    assert lines["x"] == pytest.approx([80, 86, 86]) and lines["y"] == pytest.approx([60, 72, 78])
    assert control["x"] == pytest.approx([80, 85, 83]) and control["y"] == pytest.approx([60, 64, 60])
    assert control["line"] == held["line"] | {"dash": "dot"}
    assert all(trace["show"] == {"model": ["m"], "dataset": ["far"]} for trace in chart.traces)


def test_trackers_keep_the_curves_apart() -> None:
    rows = by_hand()
    names = [name for row in rows.to_dict("records") for name in trackers._read("coefficients", "m", row)[1]]
    curves = rows[["dataset", "coefficients", "seed"]].drop_duplicates()
    assert len({name for name in names if name.endswith("/accuracy")}) == len(curves) == 10


def test_the_figure_has_a_curve_for_each_table(tmp_path: File) -> None:
    rows = pd.concat([by_hand("m"), by_hand("n")], ignore_index=True)
    drawn = figures.coefficients(facts_of(rows), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert len(drawn.axes) == 2
    for panel in drawn.axes:
        curves = {line.get_label(): line for line in panel.get_lines() if len(line.get_xdata()) == 3}
        held, control = "held (2): \N{MINUS SIGN}2.00", "as many others held (2): +7.00"
        assert list(curves) == ["plain path", "LiNeS: +6.00", held, control]
        across, up = (np.asarray(values) for values in curves["LiNeS: +6.00"].get_data())
        assert across.tolist() == pytest.approx([80, 86, 86]) and up.tolist() == pytest.approx([60, 72, 78])
        assert np.asarray(curves[control].get_data()[1]).tolist() == pytest.approx([60, 64, 60])
    with refused(ValueError, "in distribution"):
        figures.coefficients(Facts(rows[rows["ood"]]), tmp_path / "y.png")


@pytest.mark.parametrize("width", ["one", "two"])
@pytest.mark.parametrize("names", ["short", "long"])
def test_nothing_of_the_figure_is_cut_off(width: FigureWidth, names: str, tmp_path: File) -> None:
    rows = pd.concat([by_hand("m"), by_hand("n")], ignore_index=True)
    if names == "long":
        rows["model"] = rows["model"] + "/$a/" + "runs of-seeds/lr1e-3_wd" * 4
        rows["coefficients"] = rows["coefficients"] + " of " + "some table with a name of its own " * 3
    with figures.look(width=width, captions="none"):
        drawn = figures.coefficients(facts_of(rows), tmp_path / "x.png")
    edge = 0.02 * drawn.dpi
    axes = [axis for panel in drawn.axes for axis in (panel.xaxis, panel.yaxis)]
    ticks = {id(text) for axis in axes for text in axis.get_ticklabels()}
    for text in drawn.findobj(Text):
        if text.get_text() and id(text) not in ticks:
            box = text.get_window_extent()
            assert box.x0 >= -edge and box.x1 <= drawn.bbox.x1 + edge, text.get_text()
            assert box.y0 >= -edge and box.y1 <= drawn.bbox.y1 + edge, text.get_text()


# --- the sweep ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> File:
    folder = make(tmp_path_factory.mktemp("zoo"))
    (folder / "half.toml").write_text("rest = 1.0\nvisual.conv1 = 0.5\n")
    (folder / "ends.toml").write_text("'re:visual.*' = 0.5\nclassification_head = 1\n")
    return folder


BRIEF = ["--alphas", "0:1:3", "--layer-samples", "20", "--device", "cpu", "--slopes", "none"]
BRIEF += ["--hold-draws", "2"]


def command(zoo: File, *more: str) -> list[str]:
    tables = [word for name in ("half", "ends") for word in ("--alpha-table", str(zoo / f"{name}.toml"))]
    return ["coefficients", *own_models(zoo), *BRIEF, *tables, *more]


def rows_of(out: File) -> pd.DataFrame:
    return results.load(out).drop(columns="seconds")


@pytest.mark.slow
def test_a_sweep_from_plan_to_page(zoo: File, tmp_path: File, capsys: pytest.CaptureFixture[str]) -> None:
    held = command(zoo, "--hold", "instability", "--straggler-margin", "1e-6")
    assert sweep.main([*held, "--plan"]) == 0
    plan = capsys.readouterr().out
    line = next(line.split() for line in plan.splitlines() if line.startswith("coefficients"))
    # Of 52 images: two alphas of six curves, and the fine-tuned model is the interpolation's.
    assert line[1] == "2" and int(line[3].replace(",", "")) == 52 * 2 * (2 * 6 - 1)
    out = tmp_path / "run"
    assert sweep.main([*held, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    rows = rows_of(out)
    assert list(rows["study"].unique()) == ["interpolation", "layers", "coefficients"]
    own = rows[rows["study"] == "coefficients"]
    assert {"table half", "table ends"} <= {*own["coefficients"].dropna()}
    # The plain path is the interpolation, and so say the images.
    keys = ["model", "dataset", "alpha"]
    both = own[own["coefficients"].isna()].merge(rows[rows["study"] == "interpolation"], on=keys)
    assert len(both) == 2 * 2 * 3 and (both["loss_x"] == both["loss_y"]).all()
    facts = coefficient_effects(rows, results.Stored(out))
    for fact in facts.to_dict("records"):
        images = results.Stored(out).of("coefficients", fact["model"], fact["dataset"])
        assert images is not None
        table = images.rows["coefficients"].fillna("")
        if fact["coefficients"].startswith("table"):
            ours = (table == fact["coefficients"]) & (images.rows["alpha"] == fact["alpha"])
            plain = (table == "") & (images.rows["alpha"] == fact["plain_alpha"])
            value, error = paired(images.hits[ours][0].astype(float) - images.hits[plain][0])
            assert fact["difference"] == pytest.approx(value) and fact["difference_se"] == pytest.approx(
                error
            )
    assert "At about the same accuracy in distribution" in " ".join(printed.split())
    assert (out / "figures" / "coefficients.png").exists()
    page = report.write(out).read_text()
    assert "A coefficient for each layer" in page and "table half" in page
    before = (out / "rows.csv").read_bytes()
    assert sweep.main([*held, "--out", str(out)]) == 0
    assert (out / "rows.csv").read_bytes() == before
    # Another content of the file is another request.
    text = (zoo / "half.toml").read_text()
    try:
        (zoo / "half.toml").write_text(text.replace("0.5", "0.25"))
        sweep_refused([*held, "--out", str(out)], "--alpha-table", "half")
    finally:
        (zoo / "half.toml").write_text(text)


@pytest.mark.slow
@pytest.mark.ray
def test_workers_and_a_resumed_run_make_the_same_rows(zoo: File, tmp_path: File, monkeypatch: Any) -> None:
    words = command(zoo, "--hold", "none")
    assert sweep.main([*words, "--out", str(tmp_path / "whole")]) == 0
    assert sweep.main([*words, "--out", str(tmp_path / "two"), "--workers", "2"]) == 0
    pd.testing.assert_frame_equal(rows_of(tmp_path / "two"), rows_of(tmp_path / "whole"))
    add = results.Run.add
    added: list[str] = []

    def then(run: results.Run, study: str, *rest: Any) -> None:
        add(run, study, *rest)
        added.append(study)
        if added.count("coefficients") == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(results.Run, "add", then)
        assert sweep.main([*words, "--out", str(tmp_path / "parts")]) == 130
    assert sweep.main([*words, "--out", str(tmp_path / "parts")]) == 0
    pd.testing.assert_frame_equal(rows_of(tmp_path / "parts"), rows_of(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("more", "facts"),
    [
        pytest.param(["--slopes", "0.5"], ["--slopes", "visual.transformer.resblocks"], id="one block"),
        pytest.param(["--slopes", "0"], ["--slopes", "0"], id="slope"),
        pytest.param(["--slopes", "none", "1"], ["--slopes", "none 1.0"], id="none and a slope"),
        pytest.param(["--hold", "none", "sharpness"], ["--hold", "none sharpness"], id="none and layers"),
        pytest.param(["--alpha-table", "no.toml"], ["--alpha-table", "no.toml"], id="no file"),
        pytest.param(["--alpha-table", "bad.toml"], ["bad", "visual.conv"], id="no layer"),
        pytest.param(["--alpha-table", "some.toml"], ["some", "rest = NUMBER"], id="not all layers"),
        pytest.param(["--alpha-table", "twice.toml"], ["twice", "visual.conv1"], id="a layer twice"),
        pytest.param(["--alpha-table", "half.toml", "more/half.toml"], ["half"], id="a name twice"),
    ],
)
def test_requests_that_make_no_sense(
    zoo: File, more: list[str], facts: list[object], tmp_path: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = {
        "bad": "visual.conv = 0.5\nrest = 1.0", "some": "visual.conv1 = 0.5",
        "twice": "rest = 1.0\nvisual.conv1 = 0.5\n're:visual.conv.*' = 0.5",
        "half": "rest = 1\nvisual.conv1 = 0", "more/half": "rest = 1\nvisual.conv1 = 0",
    }  # fmt: skip
    for name, text in texts.items():
        file = tmp_path / f"{name}.toml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    brief = ["--alphas", "0", "1", "--device", "cpu", "--out", str(tmp_path / "run")]
    hold = [] if "--hold" in more else ["--hold", "none"]
    slopes = [] if "--slopes" in more else ["--slopes", "none"]
    sweep_refused(["coefficients", *own_models(zoo), *brief, *hold, *slopes, *more], *facts)
    assert not (tmp_path / "run").exists()


def test_data_in_and_out_of_distribution_are_needed(zoo: File) -> None:
    words = own_models(zoo)
    for without, facts in (("--id-data", ["--id-data"]), ("--data", ["out-of-distribution"])):
        at = words.index(without)
        sweep_refused(["coefficients", *words[:at], *words[at + 2 :], "--alphas", "0", "1"], *facts)


def test_options_without_the_study_have_no_effect(
    zoo: File, tmp_path: File, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["interpolation", *own_models(zoo), "--alphas", "0", "1", "--device", "cpu", "--slopes", "0.5"]
    assert sweep.main([*words, "--plan"]) == 0
    assert re.search(r"--slopes has no effect.*coefficients", " ".join(capsys.readouterr().out.split()))


def test_a_bare_sweep_leaves_it_out() -> None:
    assert "coefficients" in catalogue.names() and "coefficients" not in catalogue.default()
    assert Tables().hold == ("instability",)
    assert catalogue.study("coefficients").needs(Tree()) == ["interpolation", "layers"]
