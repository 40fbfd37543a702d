"""Cumulative paths against models whose state dicts are put together by hand, and against closed forms."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Collection
from pathlib import Path as Folder
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from support import tiny_models
from support.tiny_models import Told, normalised, pictures, random_state
from support.wording import refused, warned
from torch import Tensor, nn

from rft_fast import catalogue, figures, results, studies
from rft_fast.catalogue.cumulative import Directions
from rft_fast.common.fields import Tree
from rft_fast.datasets import Dataset
from rft_fast.evaluate import Evaluator
from rft_fast.path import Path
from rft_fast.report import cumulative as said
from rft_fast.report import glossary, matching
from rft_fast.run import cost, trackers
from rft_fast.studies.facts import Facts

pytestmark = pytest.mark.usefixtures("one_thread")

ALPHAS = [0.0, 0.3, 0.8, 1.0]
BOTH = ("first", "last")


def staged() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)
    )


class Setting:
    """A model between two random ends."""

    def __init__(self, model: nn.Module, same: Collection[str] = (), side: int = 2, **how: Any) -> None:
        self.zero, self.one = random_state(model, 1), random_state(model, 2)
        self.one |= {name: self.zero[name] for name in same}
        self.path = Path(model, self.zero, self.one, **how)
        self.sets = [pictures("far", 41, True, side), pictures("near", 15, False, side)]
        self.evaluator = Evaluator(model, self.sets, batch_size=16)
        self.double = copy.deepcopy(model).double().eval()

    def run(self, alphas: Any = ALPHAS, layers: Any = None, **how: Any) -> pd.DataFrame:
        return studies.cumulative_interpolation(self.path, self.evaluator, alphas, layers, **how)

    def brute(self, names: Collection[str], alpha: float, data: Dataset) -> tuple[np.ndarray, np.ndarray]:
        """Losses and hits of a state dict in float64 with these tensors at alpha, all others zero-shot."""
        state = dict(self.zero)
        for name in names:
            state[name] = (1 - alpha) * self.zero[name].double() + alpha * self.one[name].double()
        self.double.load_state_dict({name: tensor.double() for name, tensor in state.items()})
        with torch.no_grad():
            logits = self.double(normalised(data))
        losses = logits.logsumexp(1) - logits[torch.arange(len(logits)), data.labels]
        return losses.numpy(), (logits.argmax(1) == data.labels).numpy().astype(float)


def assert_brute(s: Setting, rows: pd.DataFrame, order: list[str], of: Callable[[str], list[str]]) -> None:
    """order: the layers that move. of: layer -> names of its tensors."""
    for row in rows.to_dict("records"):
        at = order.index(row["layer"])
        inside = order[: at + 1] if row["cumulative"] == "first" else order[at:]
        names = [name for layer in inside for name in of(layer)]
        data = next(data for data in s.sets if data.name == row["dataset"])
        (losses, hits), (losses0, hits0), (losses1, hits1) = (
            s.brute(names, alpha, data) for alpha in (row["alpha"], 0.0, 1.0)
        )
        chord = (1 - row["alpha"]) * losses0 + row["alpha"] * losses1
        truth = {
            "loss": losses,
            "accuracy": hits,
            "gain": hits - hits0,
            "rise": losses - losses0,
            "bump": losses - chord,
            "instability": losses - (losses0 + losses1) / 2,
            "instability_accuracy": (hits0 + hits1) / 2 - hits,
        }
        for name, values in truth.items():
            assert row[name] == pytest.approx(values.mean(), abs=5e-6), (name, row)
            error = values.std(ddof=1) / math.sqrt(len(values))
            assert row[f"{name}_se"] == pytest.approx(error, abs=5e-6), (name, row)
        assert row["samples"] == len(losses) and row["ood"] == data.ood


def in_module(s: Setting) -> Callable[[str], list[str]]:
    return lambda layer: [name for name in s.zero if name.rpartition(".")[0] == layer]


# --- the study --------------------------------------------------------------------------------------------


def test_rows_equal_brute_force() -> None:
    s, told, kept = Setting(staged()), Told(), {}
    rows = s.run([1, 0.3, 0, 0.8], directions=["last", "first"], model="m", sink=told, images=kept)
    order = ["0", "1", "3", "5"]
    keys = itertools.product(BOTH, ("far", "near"), order, ALPHAS)
    assert list(rows[["cumulative", "dataset", "layer", "alpha"]].itertuples(index=False)) == list(keys)
    assert set(rows["study"]) == {"cumulative"} and set(rows["model"]) == {"m"}
    assert set(rows["others"]) == {"zeroshot"} and sorted(told.numbers) == list(range(16))
    assert_brute(s, rows, order, in_module(s))
    for data in ("far", "near"):
        own = studies.image_results(rows, kept, data)
        assert (own.hits.mean(1) == rows.loc[rows["dataset"] == data, "accuracy"]).all()


def test_layers_that_are_named_are_counted_alone() -> None:
    s = Setting(staged())
    rows = s.run(layers=["5", "re:[03]"], directions=BOTH)
    assert_brute(s, rows, ["0", "3", "5"], in_module(s))
    assert s.run(layers=[]).empty


def test_blocks() -> None:
    s = Setting(tiny_models.transformer(2), side=8, granularity="block")
    rows = s.run([0, 0.4, 1], directions=BOTH)
    order = list(rows["layer"].unique())
    assert len(order) < 10 and "visual.transformer.resblocks.1" in order

    def of(layer: str) -> list[str]:
        return [name for name in s.zero if name == layer or name.startswith(f"{layer}.")]

    assert sorted(name for layer in order for name in of(layer)) == sorted(s.zero)
    assert_brute(s, rows, order, of)


def test_the_ends_are_layers_alone_and_the_whole_model() -> None:
    """Layer 1 is the study layers', layers 1 to L are the interpolation's, bit for bit in one stage."""
    for make in (staged, lambda: tiny_models.transformer(1)):
        s = Setting(make(), side=2 if make is staged else 8)
        rows = s.run(directions=BOTH).drop(columns=["seconds", "study", "cumulative"])
        order = list(rows["layer"].unique())
        half = len(rows) // 2
        first, last = rows[:half], rows[half:]
        alone = studies.layerwise_interpolation(s.path, s.evaluator, ALPHAS)
        whole = studies.interpolation(s.path, s.evaluator, ALPHAS)
        for own, layer, other in (
            (first, order[0], alone[alone["layer"] == order[0]]),
            (last, order[-1], alone[alone["layer"] == order[-1]]),
            (first, order[-1], whole.sort_values(["dataset", "alpha"])),
            (last, order[0], whole.sort_values(["dataset", "alpha"])),
        ):
            columns = ["dataset", "alpha", "loss", "loss_se", "accuracy", "gain", "rise", "bump", "bump_se"]
            pair = (table[columns].reset_index(drop=True) for table in (own[own["layer"] == layer], other))
            pd.testing.assert_frame_equal(*pair, rtol=0, atol=1e-6)


class Offset(nn.Module):
    """What is in no layer: a buffer of a module without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


@pytest.mark.parametrize("way", BOTH)
def test_tensors_in_no_layer_move_with_the_first_one(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and behind the layers; the largest set has the weights of the whole model, bit for bit."""
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(12, 4), Offset(), nn.Linear(4, 4), Offset(), nn.Linear(4, 4)
    )
    s = Setting(model, inert=["3"])
    assert s.path.layers == ["1", "5"] and set(s.path.inert) == {"3", "2.shift", "4.shift"}
    states: dict[str, set[int]] = {}
    current = s.path.checksum()
    model[5].register_forward_pre_hook(lambda *_: states.setdefault(here, set()).add(s.path.checksum()))
    expected = {}
    for alpha in ALPHAS[1:]:
        with s.path.at(alpha):
            expected[alpha] = s.path.checksum()
    all_but_last = [name for name in s.zero if name.partition(".")[0] != "5"]
    small, large = ("1", "5") if way == "first" else ("5", "1")
    inside = {small: all_but_last if way == "first" else ["5.weight", "5.bias"], large: [*s.zero]}
    for number, here in enumerate(s.path.layers):  # on the first data set
        for row in s.run(only=[number], directions=[way]).to_dict("records"):
            losses, _ = s.brute(inside[here], row["alpha"], s.sets[0])
            assert row["layer"] == here and row["loss"] == pytest.approx(losses.mean(), abs=5e-6)
    assert s.path.checksum() == current
    assert states[large] >= {*expected.values()} and not states[small] & {*expected.values()}


def test_layers_with_equal_ends_cost_nothing() -> None:
    s = Setting(staged(), same=["0.weight", "0.bias", "3.weight", "3.bias"])
    whole = Setting(staged(), same=["0.weight", "0.bias", "3.weight", "3.bias"])
    with warned(UserWarning, 2, 4, "0, 3"):
        rows = s.run(directions=BOTH)
    assert_brute(whole, rows, ["0", "1", "3", "5"], in_module(whole))
    first = rows[(rows["cumulative"] == "first") & (rows["dataset"] == "far")]
    assert (first.loc[first["layer"] == "0", "rise"] == 0).all()
    losses = {layer: own["loss"].tolist() for layer, own in first.groupby("layer")}
    assert losses["1"] == losses["3"] != losses["5"]
    sizes = {data.name: (len(data.labels), data.ood) for data in s.sets}
    work = cost.count(lambda p, e: studies.cumulative_interpolation(p, e, ALPHAS), s.path, s.evaluator, sizes)
    assert work.scorings == 2 * (1 + 2 * 3)  # data sets: zero-shot, and two sets of layers at three positions


@pytest.mark.parametrize("way", BOTH)
@pytest.mark.parametrize("make", [tiny_models.staged, lambda: tiny_models.transformer(2)])
def test_it_takes_no_more_forward_passes_than_single_layers(make: Any, way: Any) -> None:
    """At the same points, stage by stage."""
    model = make()
    path = Path(model, random_state(model, 1), random_state(model, 2))
    evaluator = Evaluator(model, [tiny_models.dataset("a", 37)], batch_size=16)
    assert len(evaluator.stages.image) > 2

    def work(study: Callable[..., Any], **how: Any) -> cost.Work:
        return cost.count(lambda p, e: study(p, e, ALPHAS, **how), path, evaluator, {"a": (37, True)})

    cumulative = work(studies.cumulative_interpolation, directions=[way])
    single = work(studies.layerwise_interpolation)
    assert cumulative.scorings == single.scorings  # the same points
    pairs = zip(cumulative.images, single.images, strict=True)
    assert all(ours <= theirs for ours, theirs in pairs)
    if way == "last":
        assert cumulative.images == single.images


@pytest.mark.parametrize("way", BOTH)
def test_any_part_of_it_gives_the_same_bits(way: Any) -> None:
    s = Setting(tiny_models.transformer(1), side=8)
    whole = s.run([0, 0.5, 1], directions=[way])
    count = len(whole) // 3
    told = Told()
    for part in (range(1, count, 2), range(0, count, 2)):
        s.run([0, 0.5, 1], directions=[way], only=part, sink=told)
    found = studies.frame(told.rows).sort_values(["dataset", "layer", "alpha"], ignore_index=True)
    expected = whole.sort_values(["dataset", "layer", "alpha"], ignore_index=True)
    pd.testing.assert_frame_equal(found.drop(columns="seconds"), expected.drop(columns="seconds"))


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 60_000])
def test_two_towers(limit: int | None) -> None:
    """Sets that end in the text leave the images zero-shot; sets that begin there have them at alpha."""
    model = tiny_models.two_towers()
    zero = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    draw = torch.Generator().manual_seed(0)
    one = {name: t + 0.3 * torch.randn(t.shape, generator=draw) for name, t in zero.items()}
    path = Path(model, zero, one)
    evaluator = Evaluator(model, [tiny_models.dataset("a", 21)], batch_size=16, memory_limit=limit)
    before = path.checksum()
    rows = studies.cumulative_interpolation(path, evaluator, [0, 0.5, 1], directions=BOTH)
    assert path.checksum() == before
    order = list(rows["layer"].unique())
    assert order[0].startswith("text") and order[-2].startswith("visual")
    for row in rows.to_dict("records"):
        at = order.index(row["layer"])
        with path.at(0.0):
            path.write(row["alpha"], layers=order[: at + 1] if row["cumulative"] == "first" else order[at:])
            assert row["loss"] == pytest.approx(evaluator.scores()["a"].loss, abs=1e-6)


@pytest.mark.parametrize("way", BOTH)
def test_weights_come_back(way: Any) -> None:
    s = Setting(staged())
    s.path.write(0.37, 0.2, seed=3)
    s.path.write(0.6, layers=["1"])
    before = s.path.checksum()
    s.run(directions=[way])
    assert s.path.checksum() == before

    def stop(number: int, _: object) -> None:
        if number == 2:
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        s.run(directions=[way], sink=stop)
    assert s.path.checksum() == before and s.path.alpha is None


def test_bad_requests() -> None:
    s, other = Setting(staged()), Setting(staged())
    for change, facts in (
        ({"directions": ["middle"]}, ("first", "last", "middle")),
        ({"directions": []}, ("first", "last")),
        ({"directions": "first"}, ("first", "last")),
        ({"alphas": [0.0, 0.5]}, ("[1.0]",)),
        ({"layers": ["55"]}, ("'55'", "'5'")),
        ({"only": [8]}, (7, 8)),
    ):
        with refused(ValueError, *facts):
            s.run(**change, sink=lambda *_: pytest.fail("a row"))  # type: ignore[arg-type]
    with refused(ValueError):
        studies.cumulative_interpolation(s.path, other.evaluator, ALPHAS)


# --- a closed form ----------------------------------------------------------------------------------------


class Add(nn.Module):
    """Adds to the logits: the label's one grows by the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :3], x[:, 3:] + self.weight * x[:, :3]], 1)


class Logits(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 3:]


class Start(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.flatten(1), torch.zeros_like(x.flatten(1))], 1)


ZERO, ONE = [0.5, 0.5, 0.5], [2.0, -5.0, 4.0]


def closed() -> tuple[pd.DataFrame, list[float]]:
    """Three layers that add to the margin of the right class; images are their labels."""
    model = nn.Sequential(Start(), Add(), Add(), Add(), Logits())
    ends = [{f"{k}.weight": torch.tensor([value]) for k, value in enumerate(end, 1)} for end in (ZERO, ONE)]
    labels = torch.arange(60) % 3
    images = (255 * nn.functional.one_hot(labels, 3)).to(torch.uint8).view(60, 3, 1, 1)
    path = Path(model, *ends)
    evaluator = Evaluator(model, [Dataset("far", images, labels, (0.0,) * 3, (1.0,) * 3)])
    assert len(evaluator.stages.image) >= 3
    alphas = [0, 0.25, 0.5, 1]
    return studies.cumulative_interpolation(path, evaluator, alphas, directions=BOTH, model="m"), alphas


def test_layers_that_add_to_the_logits() -> None:
    rows, _ = closed()
    for row in rows.to_dict("records"):
        at = int(row["layer"]) - 1
        inside = range(at + 1) if row["cumulative"] == "first" else range(at, 3)
        margin = [1.5 + alpha * sum(ONE[i] - ZERO[i] for i in inside) for alpha in (row["alpha"], 0, 1)]
        here, start, end = (math.log(1 + 2 * math.exp(-m)) for m in margin)
        assert row["loss"] == pytest.approx(here, abs=1e-6) and row["accuracy"] == (margin[0] > 0)
        assert row["rise"] == pytest.approx(here - start, abs=1e-6) and row["rise_se"] < 1e-7
        chord = (1 - row["alpha"]) * start + row["alpha"] * end
        assert row["bump"] == pytest.approx(here - chord, abs=1e-6)


def test_where_the_accuracy_falls() -> None:
    """With layer 2 and without layer 3: margin 1.5 - 4 alpha; or, from 2 on: 1.5 - 2 alpha."""
    rows, _ = closed()
    effects = studies.cumulative_effects(rows.sample(frac=1, random_state=0).sort_values("layer"))
    ways = {way: own.set_index("layer") for way, own in effects.groupby("cumulative")}
    assert ways["first"]["falls"].to_dict() == {"1": False, "2": True, "3": False}
    assert ways["last"]["falls"].to_dict() == {"3": False, "2": True, "1": False}
    assert (
        ways["first"]["moved"].to_dict() == {"1": 1, "2": 2, "3": 3} and ways["last"].loc["3", "moved"] == 1
    )
    # No image changes sides alone, so the error is that of one more; nine positions above 0.
    t = float(scipy.stats.t.ppf(1 - 0.05 / 9, 59))
    fact = ways["first"].loc["2"]
    assert fact["change"] == -1 and fact["change_high"] == pytest.approx(-1 + t / math.sqrt(60 * 59))
    assert fact["alpha"] == 0.5 and not effects["bumps"].any()  # the loss is convex in the margin


def test_bumps_and_unknown_errors() -> None:
    rows, _ = closed()
    hill = ((rows["layer"] == "2") & (rows["alpha"] == 0.5)).astype(float)
    t = float(scipy.stats.t.ppf(1 - 0.05 / 9, 59))
    for above in (True, False):
        told = rows.assign(bump=0.2 * hill, bump_se=0.2 * hill / t * (0.99 if above else 1.01))
        effects = studies.cumulative_effects(told)
        assert (effects["bumps"] == (above & (effects["layer"] == "2"))).all()
        assert (effects.loc[effects["layer"] == "2", "bump_alpha"] == 0.5).all()
    effects = studies.cumulative_effects(rows.assign(gain_se=np.nan, bump_se=np.nan))
    assert not effects[["falls", "bumps"]].any(axis=None) and effects["change_high"].isna().all()


def test_effects_of_bad_rows() -> None:
    rows, _ = closed()
    with refused(ValueError, "cumulative"):
        studies.cumulative_effects(rows.assign(study="layers"))
    with refused(ValueError, "'2'", "[1.0]"):
        studies.cumulative_effects(rows[(rows["layer"] != "2") | (rows["alpha"] < 1)])
    with refused(TypeError, "list"):
        studies.cumulative_effects([])  # type: ignore[arg-type]


# --- figure, words, page ----------------------------------------------------------------------------------


@pytest.fixture
def facts() -> Facts:
    rows, _ = closed()
    path = rows[(rows["layer"] == "3") & (rows["cumulative"] == "first")]
    return Facts(pd.concat([path.assign(study="interpolation", layer=None), rows], ignore_index=True))


def test_the_figure_has_a_map_for_each_direction(facts: Facts, tmp_path: Folder) -> None:
    drawn = figures.cumulative(facts, tmp_path / "a.png")
    first, last, _ = drawn.axes
    part = facts.part("cumulative")
    for panel, way in ((first, "first"), (last, "last")):
        own = part[part["cumulative"] == way].pivot(index="layer", columns="alpha", values="rise")
        values = np.asarray(panel.collections[0].get_array())
        assert values == pytest.approx(own.loc[["1", "2", "3"]].to_numpy())
        assert [line.get_ydata().tolist() for line in panel.lines] == [[1]]  # layer 2 is marked
    assert "up to" in first.get_title() and "from" in last.get_title() and "m\nfar\n60" in first.get_title()
    with refused(ValueError, "other"):
        figures.cumulative(facts, tmp_path / "a.png", models=["m", "other"])


def test_losses_that_are_not_finite_and_odd_names(facts: Facts, tmp_path: Folder) -> None:
    """Crossed out and counted in the figure; named in words and page as they are."""
    rows = facts.rows.copy()
    burst = (rows["study"] == "cumulative") & (rows["layer"] == "3") & (rows["alpha"] == 1)
    rows.loc[burst, ["loss", "rise", "bump"]] = math.inf
    rows = rows.assign(model="a$b$<i>", layer=rows["layer"].replace("3", "$x_<b>"))
    odd = facts.but(rows)
    drawn = figures.cumulative(odd, tmp_path / "a.png")
    first, last, _ = drawn.axes
    crosses = [line.get_xydata().tolist() for line in first.lines if line.get_marker() == "x"]
    assert crosses == [[[1.0, 2.0]]] and "a\\$b\\$<i>" in last.get_title()
    assert "2 of 24 losses are not finite" in drawn.legends[0].get_title().get_text().replace("\n", " ")
    (first_text, _) = (finding.text for finding in said.findings(odd))
    assert "a$b$<i>" in first_text and not odd.cumulative["bumps"].any()
    assert len(said.section(odd).picture.charts) == 2


def test_words_say_what_the_bounds_support(facts: Facts) -> None:
    first, last = (finding.text for finding in said.findings(facts))
    for text, size in ((first, "2 of 3 layers (up to 2)"), (last, "2 of 3 layers (from 2)")):
        assert size in text and "-100.0 points" in text and "none was shown to have a bump" in text
    printed = " ".join("\n".join(said.lines(facts)).split())
    assert "60 images of far" in printed and "2 of 3 layers (from 2)" in printed
    calm = facts.but(facts.rows.assign(gain=0.0))
    assert all("no set was shown to lower" in finding.text for finding in said.findings(calm))


def test_the_section_of_the_page(facts: Facts) -> None:
    section = said.section(facts)
    assert [chart.name for chart in section.picture.charts] == ["first", "last"]
    (table,) = section.tables
    assert len(table.rows) == 6 and sum(row[5].look == "bad" for row in table.rows) == 2
    assert all(
        glossary.words_of(heading) for heading in table.headings if heading not in ("model", "data set")
    )


# --- the entry of the catalogue ---------------------------------------------------------------------------


def test_it_runs_only_if_it_is_named() -> None:
    assert "cumulative" in catalogue.names() and "cumulative" not in catalogue.default()
    assert Tree().of(Directions).cumulative == ("first",) and "cumulative" in results.COLUMNS


def test_both_directions_of_a_layer_are_told_apart(facts: Facts) -> None:
    """In the curves of trackers, and in the comparison of two runs."""
    rows = facts.part("cumulative")
    tags = [tag for row in rows.to_dict("records") for tag in trackers._read("cumulative", "m", row)[1]]
    assert "cumulative/far/m/first/2/accuracy" in tags and len(set(tags)) == len(tags) / 4  # positions
    both = matching.matched(rows, rows)
    assert len(both) == 2 * len(rows) and set(both["cumulative"]) == {*BOTH}
