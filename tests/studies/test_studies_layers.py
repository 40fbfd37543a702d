"""Layer-wise interpolation against plain torch in float64, and stragglers against hand-made rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from open_clip.transformer import VisionTransformer
from support.tiny_models import MEAN, STD, Told, counted, normalised, pictures, random_state
from support.wording import refused, warned
from torch import Tensor, nn

from rft_fast import studies
from rft_fast.clip.classifier import ImageClassifier
from rft_fast.datasets import Dataset
from rft_fast.evaluate import Evaluator
from rft_fast.path import Path
from rft_fast.studies.layers import MARGIN, stragglers
from rft_fast.studies.verdicts import layer_shape

pytestmark = pytest.mark.usefixtures("one_thread")

ALPHAS = [0.0, 0.3, 0.8, 1.0]


class Norms(nn.Module):
    """Batch statistics, which follow their layer, and a count."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.conv(images)).relu().flatten(1))
        return out


def staged() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)
    )


class Setting:
    def __init__(self, model: nn.Module, side: int = 2, shared: Sequence[tuple[str, str]] = ()) -> None:
        self.model = model
        self.zero, self.one = random_state(model, 1), random_state(model, 2)
        for name, other in shared:
            self.zero[other], self.one[other] = self.zero[name], self.one[name]
        self.path = Path(model, self.zero, self.one)
        self.sets = [pictures("far", 41, True, side), pictures("near", 15, False, side)]
        self.evaluator = Evaluator(model, self.sets, batch_size=16)
        self.double = copy.deepcopy(model).double().eval()

    def brute(
        self, layer: str | set[str], alpha: float, rest: float, data: Dataset
    ) -> tuple[np.ndarray, np.ndarray]:
        """Losses and hits in float64, every weight mixed by hand. layer: its name, or its weights' names."""
        w = {}
        for name, zero in self.zero.items():
            at = alpha if self.belongs(name, layer) else rest
            if zero.is_floating_point():
                w[name] = (1 - at) * zero.double() + at * self.one[name].double()
        with torch.no_grad():
            logits = torch.func.functional_call(self.double, w, (normalised(data),))
        losses = logits.logsumexp(1) - logits[torch.arange(len(logits)), data.labels]
        return losses.numpy(), (logits.argmax(1) == data.labels).numpy().astype(float)

    @staticmethod
    def belongs(name: str, layer: str | set[str]) -> bool:
        if isinstance(layer, set):
            return name in layer
        module = name.rpartition(".")[0]
        return layer in (name, module, name.removesuffix("_weight"), name.removesuffix("_bias"))


def assert_brute(s: Setting, rows: pd.DataFrame, others: str, reference: str = "own") -> None:
    rest = {"zeroshot": 0.0, "finetuned": 1.0}[others]
    known: dict[tuple[str, float, str], Any] = {}

    def brute(layer: str, alpha: float, data: Dataset) -> tuple[np.ndarray, np.ndarray]:
        key = (layer if alpha != rest else "", alpha, data.name)  # at rest all layers are the same
        if key not in known:
            known[key] = s.brute(layer, alpha, rest, data)
        return known[key]

    for row in rows.to_dict("records"):
        data = next(data for data in s.sets if data.name == row["dataset"])
        n = len(data.labels)
        (losses, hits), (losses0, hits0), (losses1, hits1) = (
            brute(row["layer"], alpha, data) for alpha in (row["alpha"], 0.0, 1.0)
        )

        def paired(values: np.ndarray, root: float = math.sqrt(n)) -> tuple[float, float]:
            return values.mean(), values.std(ddof=1) / root

        ends = [s.brute(set(s.zero), alpha, rest, data) for alpha in (0.0, 1.0)]  # of the whole models
        if reference == "own":
            ends = [(losses0, hits0), (losses1, hits1)]
        (start, start_hits), (end, end_hits) = ends
        chord = (1 - row["alpha"]) * losses0 + row["alpha"] * losses1
        truth = {
            "loss": paired(losses),
            "accuracy": paired(hits),
            "gain": paired(hits - hits0),
            "rise": paired(losses - losses0),
            "instability": paired(losses - (start + end) / 2),
            "instability_accuracy": paired((start_hits + end_hits) / 2 - hits),
            "bump": paired(losses - chord),
        }
        for name, (value, error) in truth.items():
            assert row[name] == pytest.approx(value, abs=5e-6), (name, row)
            assert row[f"{name}_se"] == pytest.approx(error, abs=5e-6), (name, row)
        assert row["samples"] == n and row["ood"] == data.ood and row["nonfinite"] == 0
        assert (
            row["reference"] == reference
            and row["others"] == others
            and (row["rho"], row["keep"]) == (0.0, 1.0)
        )


# --- the study ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Norms, staged])
@pytest.mark.parametrize("others", ["zeroshot", "finetuned"])
def test_rows_equal_brute_force(make: Any, others: str) -> None:
    s = Setting(make())
    told = Told()
    rows = studies.layerwise_interpolation(
        s.path, s.evaluator, [1, 0.3, 0, 0.8], others=others, model="m", sink=told
    )
    assert list(rows.columns) == list(studies.COLUMNS)
    pd.testing.assert_frame_equal(rows, studies.frame(told.rows))
    keys = [(d, layer, a) for d in ("far", "near") for layer in s.path.layers for a in ALPHAS]
    assert list(zip(rows["dataset"], rows["layer"], rows["alpha"], strict=True)) == keys
    assert told.numbers == list(range(2 * len(s.path.layers)))
    assert set(rows["study"]) == {"layers"} and set(rows["model"]) == {"m"}
    assert (rows["seconds"] >= 0).all() and rows["sharpness"].isna().all()
    assert_brute(s, rows, others)


@pytest.mark.parametrize("others", ["zeroshot", "finetuned"])
def test_instability_is_measured_from_the_original_models_on_request(others: Any) -> None:
    s = Setting(staged())
    known: dict[str, Any] = {}
    rows = studies.layerwise_interpolation(
        s.path, s.evaluator, [0, 0.3, 1], others=others, reference="models", finetuned=known
    )
    assert_brute(s, rows, others, "models")
    assert set(known) == {"far", "near"}
    own = studies.layerwise_interpolation(s.path, s.evaluator, [0, 0.3, 1], others=others)
    shift = (rows["instability"] - own["instability"]).groupby([own["dataset"], own["layer"]])
    assert (shift.std() < 1e-6).all() and (shift.mean().abs() > 1e-3).any()
    assert list(stragglers(rows)["reference"].unique()) == ["models"]
    with refused(ValueError, "own", "models", "end"):
        studies.layerwise_interpolation(s.path, s.evaluator, ALPHAS, reference="end")  # type: ignore[arg-type]


def test_layers_differ_from_each_other_and_from_the_whole_path() -> None:
    """What brute force compares is not all one number."""
    s = Setting(staged())
    rows = studies.layerwise_interpolation(s.path, s.evaluator, ALPHAS)
    for alpha in (0.3, 1.0):
        losses = rows[(rows["alpha"] == alpha) & (rows["dataset"] == "far")]["loss"]
        assert losses.nunique() == 4
    assert rows[(rows["alpha"] == 0) & (rows["dataset"] == "far")]["loss"].nunique() == 1


def test_layers_of_a_vision_transformer_that_run_late_but_are_listed_early() -> None:
    torch.manual_seed(0)
    tower = VisionTransformer(
        image_size=4, patch_size=2, width=8, layers=2, heads=2, mlp_ratio=2.0, output_dim=6
    )
    s = Setting(ImageClassifier(tower, nn.Linear(6, 4)).eval(), side=4)
    assert s.evaluator.stations > 6
    for others in ("zeroshot", "finetuned"):
        rows = studies.layerwise_interpolation(s.path, s.evaluator, [0, 0.4, 1], others=others)
        order = rows["layer"].unique().tolist()
        assert order != s.path.layers and sorted(order) == sorted(s.path.layers)
        assert order[-3:] == ["visual.ln_post", "visual.proj", "classification_head"]
        assert_brute(s, rows, others)


def test_layers_that_span_stages_start_at_their_first() -> None:
    """A weight that two modules of a Sequential share belongs to the first: from there on all runs anew."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Linear(12, 4))
    model[3].weight = model[1].weight
    s = Setting(model, shared=[("1.weight", "3.weight")])
    assert s.path.layers == ["1", "3", "4"] and s.evaluator.stations == 3
    assert s.evaluator.span(s.path.tensors("1")) == (0, 1)
    rows = studies.layerwise_interpolation(s.path, s.evaluator, ALPHAS, ["1"])
    for row in rows[rows["dataset"] == "far"].to_dict("records"):
        a, data = row["alpha"], s.sets[0]
        mixed = {n: (1 - a) * s.zero[n].double() + a * s.one[n].double() for n in s.zero}
        w = {n: mixed[n] if n in ("1.weight", "1.bias") else s.zero[n].double() for n in s.zero}
        w["3.weight"] = mixed["1.weight"]
        x = normalised(data).flatten(1)
        x = torch.tanh(x @ w["1.weight"].T + w["1.bias"]) @ w["3.weight"].T + w["3.bias"]
        logits = x @ w["4.weight"].T + w["4.bias"]
        losses = logits.logsumexp(1) - logits[torch.arange(len(x)), data.labels]
        assert row["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)


def test_a_coarse_layer_from_both_ends_of_the_model() -> None:
    s = Setting(staged())
    path = Path(s.model, s.zero, s.one, granularity=r"re:[05]\.(weight)")
    assert path.layers == ["weight", "0", "1", "3", "5"]
    rows = studies.layerwise_interpolation(path, s.evaluator, ALPHAS)
    assert rows["layer"].unique().tolist() == ["0", "weight", "1", "3", "5"]
    for row in rows[rows["layer"] == "weight"].to_dict("records"):
        data = next(data for data in s.sets if data.name == row["dataset"])
        losses, _ = s.brute({"0.weight", "5.weight"}, row["alpha"], 0.0, data)
        assert row["loss"] == pytest.approx(losses.mean(), abs=5e-6)


def test_layers_by_name_and_by_pattern() -> None:
    s = Setting(staged())
    rows = studies.layerwise_interpolation(s.path, s.evaluator, ALPHAS, ["5", "re:[01]"])
    assert rows["layer"].unique().tolist() == ["0", "1", "5"]
    assert_brute(s, rows, "zeroshot")
    assert studies.layerwise_interpolation(s.path, s.evaluator, ALPHAS, []).empty


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["sink", "forward"])
def test_weights_come_back(error: Any, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s = Setting(Norms())
    s.path.write(0.37, 0.2, seed=3)
    s.path.write(0.6, layers=["norm"])
    before, calls = s.path.checksum(), 0

    def count(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if error is not None and calls == needed:
            raise error("stop")
        return forward(*arguments) if where == "forward" else None

    needed = 2 if where == "sink" else 6
    forward = nn.Linear.forward
    if where == "forward":
        monkeypatch.setattr(nn.Linear, "forward", count)
    how: Any = {} if where == "forward" else {"sink": count}
    if error is None:
        studies.layerwise_interpolation(s.path, s.evaluator, ALPHAS, others="finetuned", **how)
        assert calls >= needed
    else:
        with pytest.raises(error, match="stop"):
            studies.layerwise_interpolation(s.path, s.evaluator, ALPHAS, others="finetuned", **how)
    assert s.path.checksum() == before and s.path.alpha is None


def test_bad_requests() -> None:
    s, other = Setting(staged()), Setting(staged())
    before = s.path.checksum()
    refusals: list[tuple[dict[str, Any], tuple[object, ...]]] = [
        ({"alphas": [0.0, 0.5]}, ("[1.0]",)),
        ({"alphas": [0.0, 1.0, 1.5]}, ("[1.5]",)),
        ({"alphas": [0.0, 0.0, 1.0]}, ("alphas",)),
        ({"evaluator": other.evaluator}, ()),
        ({"others": "pretrained"}, ("others", "pretrained")),
        ({"layers": ["55"]}, ("'55'", "'5'")),
    ]
    for change, facts in refusals:
        arguments: dict[str, Any] = {"evaluator": s.evaluator, "alphas": ALPHAS, **change}
        with refused(ValueError, *facts):
            studies.layerwise_interpolation(s.path, sink=lambda *told: pytest.fail("a row"), **arguments)
    path = Path(s.model, s.zero, s.one, inert=["0"])
    with refused(ValueError, "0", "path.layers"):
        studies.layerwise_interpolation(path, s.evaluator, ALPHAS, ["0"])
    assert s.path.checksum() == before


# --- stragglers, by hand --------------------------------------------------------------------------


def curve(
    layer: str, instability: list[float], se: float, rise: list[float] | None = None, **changes: Any
) -> list[dict[str, object]]:
    alphas = np.linspace(0, 1, len(instability)).tolist()
    rises = rise or [1.0] * len(alphas)
    return [
        {
            **{"study": "layers", "model": "m", "dataset": "far", "ood": True, "layer": layer},
            **{"others": "zeroshot", "alpha": a, "samples": 100, "instability": i, "instability_se": se},
            **{"rise": r, "rise_se": 0.0, "instability_accuracy": i / 10, "instability_accuracy_se": 0.5},
            **changes,
        }
        for a, i, r in zip(alphas, instability, rises, strict=True)
    ]


def test_stragglers_by_threshold() -> None:
    """Three layers at three positions: nine chances, so t is the quantile of Student's at 1 - .05 / 9."""
    t = float(scipy.stats.t.ppf(1 - 0.05 / 9, 100 - 1))  # of 100 images
    above, below = (0.5 - 0.1 - 1e-9) / t, (0.5 - 0.1 + 1e-9) / t
    rows = studies.frame(
        curve("yes", [0.0, 0.5, 0.0], above)
        + curve("no", [0.0, 0.5, 0.0], below)
        + curve("calm", [0.0, 0.05, 0.0], 0.001)
    )
    assert MARGIN == 0.1
    facts = stragglers(rows).set_index("layer")
    assert facts["straggler"].to_dict() == {"yes": True, "no": False, "calm": False}
    fact = facts.loc["yes"]
    assert (fact["instability"], fact["alpha"], fact["samples"], fact["alphas"]) == (0.5, 0.5, 100, 3)
    assert fact["instability_se"] == above and fact["instability_low"] == pytest.approx(0.1, abs=1e-8)
    assert (fact["rise"], fact["rise_se"], fact["ood"], fact["margin"]) == (1.0, 0.0, True, 0.1)
    assert fact["instability_accuracy"] == 0.05 and fact["instability_accuracy_se"] == 0.5
    assert stragglers(rows, margin=0.0999).set_index("layer").loc["no", "straggler"]
    assert not stragglers(rows, margin=0.1001)["straggler"].any()
    # With one layer alone there are fewer chances, so the same curve suffices.
    assert stragglers(rows[rows["layer"] == "no"])["straggler"].all()


def test_a_straggler_must_be_worse_than_zero_shot_too() -> None:
    """Between ends of unequal loss, half of the improvement passes for instability."""
    t = float(scipy.stats.t.ppf(1 - 0.05 / 12, 100 - 1))
    edge = {"rise_se": 0.3}
    rows = studies.frame(
        curve("better", [0.5, -0.1, -0.5], 0.0, [0.0, -0.6, -1.0])
        + curve("worse", [-0.1, 0.5, -0.1], 0.0, [0.0, 0.3 * t + 1e-9, 0.0], **edge)
        + curve("unsure", [-0.1, 0.5, -0.1], 0.0, [0.0, 0.3 * t - 1e-9, 0.0], **edge)
        + curve("finetuned is worse", [-1.0, 0.5, 1.0], 0.0, [0.0, 1.5, 2.0])
    )
    facts = stragglers(rows).set_index("layer")
    assert facts["straggler"].to_dict() == {
        "better": False, "worse": True, "unsure": False, "finetuned is worse": True,
    }  # fmt: skip
    assert facts.loc["finetuned is worse", "alpha"] == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_not_finite_make_a_straggler(bad: float) -> None:
    rows = studies.frame(curve("burst", [0.0, bad, 0.0], 0.01) + curve("calm", [0.0, 0.0, 0.0], 0.01))
    facts = stragglers(rows).set_index("layer")
    assert facts["straggler"].to_dict() == {"burst": True, "calm": False}
    assert str(facts.loc["burst", "instability"]) == str(bad) and facts.loc["burst", "alpha"] == 0.5


@pytest.mark.slow
def test_few_images_seldom_make_a_straggler() -> None:
    """Layers of true instability at the margin: 5 % of the families may have one, however few the images."""
    rng = np.random.default_rng(0)
    families = 80
    for images in (3, 8):
        wrong = 0
        for _ in range(families):
            values = MARGIN + rng.normal(size=(10, images))
            rows: list[dict[str, object]] = []
            for k, own in enumerate(values):
                error = own.std(ddof=1) / images**0.5
                peak = [0.0, own.mean(), 0.0]
                rows += curve(f"layer {k}", peak, error, samples=images)
            wrong += bool(stragglers(studies.frame(rows))["straggler"].any())
        assert wrong / families < 0.15, images


def test_bumps_of_stragglers_are_corrected_like_their_instability() -> None:
    """Two layers at three positions: six tests, although only the position between can have a bump."""
    t = float(scipy.stats.t.ppf(1 - 0.05 / 6, 99))
    rows = studies.frame(
        [row | {"bump": bump, "bump_se": 0.1 * (row["alpha"] == 0.5)}
         for name, peak in (("hill", 0.4), ("flank", 0.2))
         for row, bump in zip(curve(name, [-0.5, 0.5, 0.5], 0.01), (0.0, peak, 0.0), strict=True)]
    )  # fmt: skip
    facts = stragglers(rows).set_index("layer")
    assert facts["straggler"].all() and facts["bump"].to_dict() == {"hill": 0.4, "flank": 0.2}
    assert facts["bump_low"].to_dict() == pytest.approx({"hill": 0.4 - 0.1 * t, "flank": 0.2 - 0.1 * t})
    assert list(facts["bump_alpha"]) == [0.5, 0.5] and list(facts["reference"]) == ["own", "own"]
    assert [layer_shape(fact) for fact in facts.to_dict("records")] == ["bump", "slope"]


def test_one_image_tells_no_straggler() -> None:
    rows = studies.frame(curve("x", [0.0, 9.0, 0.0], math.nan, instability_accuracy_se=math.nan))
    assert stragglers(rows)["straggler"].tolist() == [False]


def test_stragglers_keep_apart_what_is_apart_in_the_order_of_measurement() -> None:
    calm, wild = [0.0, 0.0, 0.0], [0.0, 0.5, 0.0]
    rows = studies.frame(
        curve("x", calm, 0.001)
        + curve("x", wild, 0.001, model="b")
        + curve("x", wild, 0.001, model="a")
        + curve("x", wild, 0.001, dataset="near", ood=False)
        + curve("x", wild, 0.001, others="finetuned")
        + curve("a", wild, 0.001)
    )
    noise = studies.frame(curve("x", [9.0, 9.0, 9.0], 0.0, study="interpolation"))
    backwards = stragglers(pd.concat([noise, rows]).iloc[::-1])
    assert backwards["straggler"].sum() == 5 and backwards["layer"].tolist() == ["a", *["x"] * 5]
    facts = stragglers(pd.concat([noise, rows]))
    found = list(
        facts[["model", "dataset", "others", "layer", "straggler"]].itertuples(index=False, name=None)
    )
    assert found == [
        ("m", "far", "zeroshot", "x", False),
        ("m", "far", "zeroshot", "a", True),
        ("b", "far", "zeroshot", "x", True),
        ("a", "far", "zeroshot", "x", True),
        ("m", "near", "zeroshot", "x", True),
        ("m", "far", "finetuned", "x", True),
    ]
    assert facts["ood"].tolist() == [True] * 4 + [False, True]


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square()


def test_stragglers_of_what_was_measured() -> None:
    """A layer of opposite signs at its ends, squared: both compute the same, and halfway nothing is left."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), Square(), nn.Linear(8, 4))
    s = Setting(model)
    one = {**s.zero, "1.weight": -s.zero["1.weight"], "1.bias": -s.zero["1.bias"]}
    one["3.bias"] = s.zero["3.bias"] + 0.01
    images = s.sets[0].images
    with torch.no_grad():
        labels = model((images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))
    data = Dataset("own", images, labels.argmax(1), MEAN, STD)
    path = Path(model, s.zero, one)
    rows = studies.layerwise_interpolation(path, Evaluator(model, [data]), [0, 0.25, 0.5, 1])
    facts = stragglers(rows).set_index("layer")
    assert facts["straggler"].to_dict() == {"1": True, "3": False}
    fact = facts.loc["1"]
    losses = rows[rows["layer"] == "1"].set_index("alpha")["loss"]
    assert losses[1.0] == losses[0.0] < 0.2 < 0.5 < losses[0.5]
    assert fact["alpha"] == 0.5 and fact["instability"] == pytest.approx(losses[0.5] - losses[0.0])
    assert fact["rise"] == pytest.approx(fact["instability"])


def test_what_holds_no_stragglers_is_refused() -> None:
    rows = studies.frame(curve("x", [0.0, 0.5, 0.0], 0.001))
    for margin in (-0.1, math.nan):
        with refused(ValueError):
            stragglers(rows, margin)
    for nothing in (rows.iloc[:0], rows.assign(study="interpolation")):
        with refused(ValueError, "layers"):
            stragglers(nothing)
    with refused(ValueError, "x", "m", "far", "1.0"):
        stragglers(rows.iloc[:-1])  # a run that was stopped
    with refused(ValueError):
        stragglers(pd.concat([rows, rows]))


# --- layers that are the same at both ends ------------------------------------------------------------


@pytest.mark.parametrize("others", ["zeroshot", "finetuned"])
def test_layers_that_are_the_same_at_both_ends_take_no_forward_pass(others: str) -> None:
    model = Norms()
    zero, one = random_state(model, 1), random_state(model, 2)
    one = {name: one[name] if name.startswith("head") else tensor for name, tensor in zero.items()}
    path = Path(model, zero, one)
    assert path.unchanged == ("conv", "norm")
    evaluator = Evaluator(model, [pictures("far", 41, True), pictures("near", 15, False)], batch_size=16)
    with warned(UserWarning, "2", "3"):
        found = studies.layerwise_interpolation(path, evaluator, ALPHAS, others=others, model="m")
    assert list(found["layer"].unique()) == ["conv", "norm", "head"]
    still = found[found["layer"] != "head"]
    assert (still[["rise", "rise_se", "gain", "instability", "instability_se"]] == 0).all(axis=None)
    # Numbers stay those of all layers, so that runs can be resumed, and each measurement alone is the same.
    told = Told()
    with counted(model.conv) as (passes,):  # the warning is said once
        studies.layerwise_interpolation(
            path, evaluator, ALPHAS, others=others, model="m", only=[1, 3], sink=told
        )
    assert told.numbers == [1, 3] and sum(passes) == 41 + 15  # of the model where all are at one end
    expected = found.iloc[[*range(4, 8), *range(12, 16)]]
    assert [row["loss"] for row in told.rows] == list(expected["loss"])
    facts = stragglers(found, margin=0.0).set_index(["dataset", "layer"])
    assert list(facts["unchanged"]) == [True, True, False] * 2
    assert not facts["straggler"][facts["unchanged"]].any()
    # They are no tests that the correction has to count.
    alone = stragglers(found[found["layer"] == "head"], margin=0.0)
    assert list(alone["instability_low"]) == list(facts["instability_low"][~facts["unchanged"]])
    # What does change is measured as ever.
    every = studies.layerwise_interpolation(path, evaluator, ALPHAS, ["head"], others=others, model="m")
    same = [name for name in every if name != "seconds"]
    pd.testing.assert_frame_equal(every[same], found[found["layer"] == "head"][same].reset_index(drop=True))


def test_statistics_that_move_make_a_layer_move() -> None:
    model = Norms()
    zero = random_state(model, 1)
    moved = {**zero, "norm.running_mean": zero["norm.running_mean"] + 1}
    assert Path(model, zero, moved).unchanged == ("conv", "head")
    counted_on = {**zero, "norm.num_batches_tracked": zero["norm.num_batches_tracked"] + 1}
    assert Path(model, zero, counted_on).unchanged == ("conv", "head")
    half = {name: t.half().to(t.dtype if "conv" in name else t.half().dtype) if t.is_floating_point() else t
            for name, t in zero.items()}  # fmt: skip
    rounded = {name: t.float() if t.is_floating_point() else t for name, t in half.items()}
    with warned(UserWarning):
        assert Path(model, half, rounded).unchanged == ("conv", "norm", "head")
