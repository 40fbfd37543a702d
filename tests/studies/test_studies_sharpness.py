"""General and layer-wise sharpness against plain torch in float64, and near_zero against hand-made rows."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from open_clip.transformer import VisionTransformer
from support.tiny_models import MEAN, STD, State, Told, normalised, pictures, random_state
from support.wording import refused
from torch import Tensor, nn

from rft_fast import studies
from rft_fast.clip.classifier import ImageClassifier
from rft_fast.datasets import Dataset
from rft_fast.evaluate import Evaluator
from rft_fast.kernels import noise_like
from rft_fast.path import Path
from rft_fast.studies import ESTIMATORS, Protocol
from rft_fast.studies.sharpness import MARGIN, near_zero, student_t

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = ["1", "3", "5"]
ALPHAS = [0.0, 0.4, 1.0]


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 6), nn.Sigmoid(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)
    )


class Whole(nn.Module):
    """A model without known stages."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.inner(images)
        return out if len(out) else images  # a question that torch.fx cannot trace


class Setting:
    def __init__(self, model: nn.Module | None = None, **how: Any) -> None:
        self.model = network() if model is None else model
        self.zero, self.one = random_state(self.model, 1, 0.5), random_state(self.model, 2, 0.5)
        self.path = Path(self.model, self.zero, self.one)
        self.sets = [pictures("far", 23, True), pictures("near", 8, False)]
        self.normalize = how.get("normalize_logits", False)
        self.evaluator = Evaluator(self.model, self.sets, batch_size=6, **how)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.drawn: dict[tuple[int, int, str], State] = {}
        self.double = copy.deepcopy(self.model).double().eval()

    def at(self, alpha: float) -> State:
        return {
            n: (1 - alpha) * self.zero[n].double() + alpha * self.one[n].double()
            for n in self.zero
            if self.zero[n].is_floating_point()
        }

    def scale(self, alpha: float, on: str, adaptive: bool, layer: str | None) -> State:
        """By how much noise of size one moves each parameter; none outside of the layer, or of buffers."""
        of = self.at(alpha) if on == "interpolated" else {n: t.double() for n, t in self.one.items()}
        factor = 1.0 if on == "interpolated" else alpha
        return {
            n: factor * (of[n].abs() if adaptive else torch.ones_like(of[n]))
            for n in self.names
            if layer is None or n.rpartition(".")[0] == layer
        }

    def noise(self, seed: int, draw: int, kind: str) -> State:
        key = (seed, draw, kind)
        if key not in self.drawn:
            eps = noise_like([self.zero[n] for n in self.names], seed, draw, kind, impl="reference")
            self.drawn[key] = {n: e.double() for n, e in zip(self.names, eps, strict=True)}
        return self.drawn[key]

    def losses(self, w: State, data: Dataset, part: slice = slice(None)) -> tuple[Tensor, np.ndarray]:
        """Losses, which can be differentiated in w, and hits, of some of the images."""
        x = normalised(data, part)
        logits = torch.func.functional_call(self.double, w, (x,))
        labels = data.labels[part]
        hits = (logits.argmax(1) == labels).numpy()
        if self.normalize:
            logits = logits - logits.mean(1, keepdim=True)
            logits = logits / logits.norm(dim=1, keepdim=True).clamp_min(1e-10)
        return logits.logsumexp(1) - logits[torch.arange(len(x)), labels], hits

    def brute(
        self, data: Dataset, alpha: float, rho: float, draws: int, layer: str | None, protocol: Protocol
    ) -> dict[str, float]:
        """Every draw and every part anew, one after the other."""
        n = len(data.labels)
        size = protocol.noise_batch or n
        parts = [slice(first, min(first + size, n)) for first in range(0, n, size)]
        clean, scale = self.at(alpha), self.scale(alpha, protocol.on, protocol.adaptive, layer)
        values, hits = np.zeros(draws), np.zeros(draws)
        leaves = {k: w.clone().requires_grad_(k in scale) for k, w in clean.items()}
        before = [self.losses(leaves, data, part)[0].mean() for part in parts]
        slopes = [torch.autograd.grad(loss, [leaves[k] for k in scale]) for loss in before]
        for draw in range(draws):
            number, sign = draw, 1
            if protocol.estimator == "antithetic":
                number, sign = draw // 2, (1, -1)[draw % 2]
            for index, part in enumerate(parts):
                eps = self.noise(protocol.seed, number * len(parts) + index, protocol.noise)
                delta = {name: sign * rho * c * eps[name] for name, c in scale.items()}
                moved = {k: w + delta[k] if k in delta else w for k, w in clean.items()}
                losses, right = self.losses(moved, data, part)
                share = (part.stop - part.start) / n
                values[draw] += share * float((losses.mean() - before[index]).detach())
                hits[draw] += share * right.mean()
                if protocol.estimator == "gradient":
                    pairs = zip(slopes[index], delta.values(), strict=True)
                    values[draw] -= share * float(sum((g * d).sum() for g, d in pairs))
        if protocol.estimator == "antithetic":
            values, hits = (x.reshape(-1, 2).mean(1) for x in (values, hits))
        base = float(self.losses(clean, data)[0].mean())
        root = math.sqrt(len(values))
        return {
            "sharpness": values.mean(),
            "sharpness_se": values.std(ddof=1) / root if root > 1 else math.nan,
            "loss": base + values.mean(),
            "loss_se": values.std(ddof=1) / root if root > 1 else math.nan,
            "accuracy": hits.mean(),
            "accuracy_se": hits.std(ddof=1) / root if root > 1 else math.nan,
        }


def assert_rows_are_brute(s: Setting, rows: pd.DataFrame, protocol: Protocol, draws: int) -> None:
    for row in rows.to_dict("records"):
        data = next(data for data in s.sets if data.name == row["dataset"])
        layer = None if pd.isna(row["layer"]) else row["layer"]
        for name in ("estimator", "on", "noise", "adaptive", "seed"):
            assert row[name] == getattr(protocol, name)
        assert row["samples"] == len(data.labels) and row["ood"] == data.ood and row["nonfinite"] == 0
        assert pd.isna(row["reached"]) and row["keep"] == 1.0 and row["precision"] == "fp32"
        assert row["normalized"] == s.normalize
        batch = row["noise_batch"]
        assert pd.isna(batch) if protocol.noise_batch is None else batch == protocol.noise_batch
        if protocol.on == "finetuned" and row["alpha"] == 0:
            assert row["sharpness"] == row["sharpness_se"] == 0.0 and row["draws"] == 0
            assert row["loss"] == pytest.approx(float(s.losses(s.at(0.0), data)[0].mean()), abs=1e-6)
            continue
        assert row["draws"] == draws
        truth = s.brute(data, row["alpha"], row["rho"], draws, layer, protocol)
        for name, value in truth.items():
            assert row[name] == pytest.approx(value, abs=3e-6, nan_ok=True), (name, row["alpha"], layer)


# --- brute force ----------------------------------------------------------------------------------

CASES = [
    Protocol("plain", on="interpolated"),
    Protocol("antithetic", on="interpolated"),
    Protocol("gradient", on="interpolated"),
    Protocol("plain", on="finetuned", noise="uniform", seed=3),
    Protocol("antithetic", on="finetuned", adaptive=False, noise="rademacher"),
    Protocol("gradient", on="finetuned", adaptive=False, seed=2**40),
    Protocol("gradient", on="finetuned", noise="rademacher"),
    Protocol("plain", noise_batch=12, on="interpolated"),
    Protocol("antithetic", noise_batch=16, adaptive=False, noise="uniform", on="interpolated"),
    Protocol("gradient", noise_batch=9, on="finetuned"),
    Protocol("gradient", noise_batch=23, on="interpolated"),
]


@pytest.mark.parametrize("protocol", CASES, ids=lambda p: f"{p.estimator}-{p.on}-{p.noise}-{p.noise_batch}")
def test_general_sharpness_equals_brute_force(protocol: Protocol) -> None:
    s = Setting()
    told = Told()
    rows = studies.sharpness(
        s.path, s.evaluator, [1, 0, 0.4], [0.5, 0.1], 4, protocol=protocol, model="m", sink=told
    )
    assert list(rows.columns) == list(studies.COLUMNS)
    pd.testing.assert_frame_equal(rows, studies.frame(told.rows))
    keys = [(a, d, r) for a in ALPHAS for d in ("far", "near") for r in (0.1, 0.5)]
    assert list(zip(rows["alpha"], rows["dataset"], rows["rho"], strict=True)) == keys
    assert (
        told.numbers == list(range(6)) and set(rows["study"]) == {"sharpness"} and set(rows["model"]) == {"m"}
    )
    assert rows["layer"].isna().all() and (rows["seconds"] > 0).all()
    assert_rows_are_brute(s, rows, protocol, 4)


@pytest.mark.parametrize("protocol", CASES, ids=lambda p: f"{p.estimator}-{p.on}-{p.noise}-{p.noise_batch}")
def test_layerwise_sharpness_equals_brute_force(protocol: Protocol) -> None:
    s = Setting()
    told = Told()
    rows = studies.layerwise_sharpness(
        s.path, s.evaluator, [0.0, 0.4], [0.4], 4, protocol=protocol, model="m", sink=told
    )
    pd.testing.assert_frame_equal(rows, studies.frame(told.rows))
    keys = [(a, d, layer) for a in (0.0, 0.4) for d in ("far", "near") for layer in LAYERS]
    assert list(zip(rows["alpha"], rows["dataset"], rows["layer"], strict=True)) == keys
    assert told.numbers == list(range(12)) and set(rows["study"]) == {"layer-sharpness"}
    assert_rows_are_brute(s, rows, protocol, 4)


def test_defaults_are_those_of_the_paper() -> None:
    s = Setting()
    rows = studies.sharpness(s.path, s.evaluator, [0.4], [1.0])
    assert set(rows["on"]) == {"interpolated"} and set(rows["draws"]) == {20}  # Eq. 3
    assert set(rows["noise"]) == {"normal"} and rows["adaptive"].all()
    assert_rows_are_brute(s, rows, Protocol(on="interpolated"), 20)
    rows = studies.layerwise_sharpness(s.path, s.evaluator, [0.4], [1.0], layers=["3"])
    assert set(rows["on"]) == {"finetuned"} and set(rows["draws"]) == {20}  # Sec. 3.1
    assert_rows_are_brute(s, rows, Protocol(on="finetuned"), 20)
    # Also when the protocol says something else.
    rows = studies.layerwise_sharpness(
        s.path, s.evaluator, [0.4], [1.0], 4, ["3"], protocol=Protocol("plain")
    )
    assert_rows_are_brute(s, rows, Protocol("plain", on="finetuned"), 4)
    assert set(rows["on"]) == {"finetuned"}


@pytest.mark.parametrize("estimator", ["plain", "antithetic", "gradient"])
def test_normalized_logits(estimator: str) -> None:
    s = Setting(normalize_logits=True)
    protocol = Protocol(estimator, noise_batch=10, on="finetuned")
    rows = studies.layerwise_sharpness(s.path, s.evaluator, [0.0, 0.7], [0.4], 4, protocol=protocol)
    assert rows["normalized"].all()
    assert_rows_are_brute(s, rows, protocol, 4)


def test_a_single_draw_has_no_standard_error() -> None:
    s = Setting()
    rows = studies.sharpness(s.path, s.evaluator, [0.4], [0.3], 1)
    assert rows["sharpness_se"].isna().all() and rows["sharpness"].notna().all()
    assert_rows_are_brute(s, rows, Protocol(on="interpolated"), 1)


def test_draws_are_common_to_models_alphas_and_data() -> None:
    """The same seed is the same noise: a draw's rows do not depend on what else was asked for."""
    s = Setting()
    alone = studies.layerwise_sharpness(s.path, s.evaluator, [0.4], [0.3], 4, ["5"])
    among = studies.layerwise_sharpness(s.path, s.evaluator, ALPHAS, [0.1, 0.3], 4)
    found = among[(among["alpha"] == 0.4) & (among["layer"] == "5") & (among["rho"] == 0.3)]
    for name in ("sharpness", "sharpness_se", "loss", "accuracy"):
        assert found[name].tolist() == alone[name].tolist()


class Norms(nn.Module):
    """Batch statistics that lie on the path, too, and stay there while the layer is perturbed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.conv(images)).relu().flatten(1))
        return out


@pytest.mark.parametrize("on", ["finetuned", "interpolated"])
def test_batch_statistics_are_interpolated_and_not_perturbed(on: str) -> None:
    s = Setting(Norms())
    protocol = Protocol("gradient", on=on)
    rows = studies.layerwise_sharpness(s.path, s.evaluator, [0.4, 1.0], [0.5], 4, protocol=protocol)
    assert rows["layer"].unique().tolist() == ["conv", "norm", "head"]
    assert_rows_are_brute(s, rows, protocol, 4)
    assert_rows_are_brute(
        s, studies.sharpness(s.path, s.evaluator, [0.4], [0.5], 4, protocol=protocol), protocol, 4
    )


@pytest.mark.parametrize("estimator", ["plain", "gradient", "hessian", "apgd-l2"])
def test_stages_change_no_number(estimator: str) -> None:
    """The same weights with and without stages to reuse: the same numbers, layer by layer.

    Not the same bits: draws of a layer share batches, and products of larger batches round otherwise.
    """
    s, w = Setting(), Whole(network())
    zero, one = ({f"inner.{n}": t for n, t in end.items()} for end in (s.zero, s.one))
    path = Path(w, zero, one)
    evaluator = Evaluator(w, s.sets, batch_size=6)
    assert evaluator.stations == 1 and s.evaluator.stations == 3
    how: dict[str, Any] = {"protocol": Protocol(estimator, on="finetuned")}
    staged = studies.layerwise_sharpness(s.path, s.evaluator, [0.4], [0.3], 4, **how)
    whole = studies.layerwise_sharpness(path, evaluator, [0.4], [0.3], 4, **how)
    assert whole["layer"].tolist() == [f"inner.{layer}" for layer in staged["layer"]]
    for name in ("sharpness", "sharpness_se", "loss", "accuracy"):
        assert np.allclose(staged[name], whole[name], rtol=1e-4, atol=1e-6, equal_nan=True), name


def test_layers_by_name_and_by_pattern() -> None:
    s = Setting()
    rows = studies.layerwise_sharpness(s.path, s.evaluator, [1.0], [0.3], 2, ["5", "re:[13]"])
    assert rows["layer"].tolist() == LAYERS * 2


def vision_model() -> ImageClassifier:
    torch.manual_seed(0)
    tower = VisionTransformer(
        image_size=4, patch_size=2, width=8, layers=2, heads=2, mlp_ratio=2.0, output_dim=6
    )
    return ImageClassifier(tower, nn.Linear(6, 4)).eval()


@pytest.mark.slow
def test_layers_of_a_vision_transformer_come_in_the_order_in_which_it_runs() -> None:
    """``visual.proj`` is the third of its parameters, and the last to run before the head."""
    staged, whole = vision_model(), Whole(vision_model())
    sets = [Dataset("set", torch.randint(0, 256, (9, 3, 4, 4)).byte(), torch.arange(9) % 4, MEAN, STD)]
    zero, one = random_state(staged, 1, 0.5), random_state(staged, 2, 0.5)
    path, evaluator = Path(staged, zero, one), Evaluator(staged, sets, batch_size=4)
    assert path.layers.index("visual.proj") == 2 and evaluator.stations > 6
    for protocol in (Protocol(on="finetuned"), Protocol("plain", noise_batch=5)):
        rows = studies.layerwise_sharpness(path, evaluator, [0.4, 1.0], [0.2], 2, protocol=protocol)
        order = rows["layer"].unique().tolist()
        assert order[-3:] == ["visual.ln_post", "visual.proj", "classification_head"]
        assert sorted(order) == sorted(path.layers)
        blocks = [name for name in order if "resblocks" in name]
        first = [name for name in blocks if "resblocks.0." in name]
        assert blocks[: len(first)] == first and order[: len(order) - len(blocks) - 3] == [
            "visual.conv1", "visual.class_embedding", "visual.positional_embedding", "visual.ln_pre",
        ]  # fmt: skip
        # A stage too late would score the layer as if it had not changed; here all run from the start.
        other = Path(whole, *({f"inner.{n}": t for n, t in end.items()} for end in (zero, one)))
        names = [f"inner.{layer}" for layer in order]
        plain = studies.layerwise_sharpness(
            other, Evaluator(whole, sets, batch_size=4), [0.4, 1.0], [0.2], 2, names, protocol=protocol
        )
        plain["layer"] = plain["layer"].str.removeprefix("inner.")
        both = rows.merge(plain, on=["alpha", "layer"], suffixes=("", "_plain"))
        assert len(both) == len(rows) and (rows["sharpness"].abs() > 0).mean() > 0.9
        for name in ("sharpness", "sharpness_se", "loss", "accuracy"):
            assert np.allclose(both[name], both[f"{name}_plain"], rtol=1e-4, atol=1e-6), name


def test_no_layers_no_rows() -> None:
    s = Setting()
    for estimator in ESTIMATORS:
        rows = studies.layerwise_sharpness(
            s.path, s.evaluator, ALPHAS, [0.3], 2, [], protocol=Protocol(estimator, on="finetuned")
        )
        assert rows.empty and list(rows.columns) == list(studies.COLUMNS)


@pytest.mark.parametrize("reach", [True, False])
def test_rows_say_whether_the_goal_was_reached(reach: bool) -> None:
    s = Setting()
    protocol = Protocol(on="finetuned", goal=0.025 if reach else 1e-9, most=40 if not reach else 1000)
    rows = studies.layerwise_sharpness(s.path, s.evaluator, ALPHAS, [0.5], 4, protocol=protocol)
    assert len(rows) == 18
    noisy = rows[rows["alpha"] > 0]
    assert (noisy["reached"] == reach).all()
    assert rows.loc[rows["alpha"] == 0, "reached"].all()  # exactly zero
    if reach:
        assert (noisy["sharpness_se"] <= 0.025).all() and noisy["draws"].nunique() > 1
        for draws, part in noisy.groupby("draws"):
            assert_rows_are_brute(s, part.assign(reached=pd.NA), Protocol(on="finetuned"), int(draws))
    else:
        assert (noisy["draws"] == 40).all() and noisy["sharpness"].notna().all()


# --- weights come back ----------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_weights_come_back(estimator: str, error: type[BaseException] | None) -> None:
    s = Setting(Norms())
    s.path.write(0.37, 0.1, seed=4)
    s.path.write(0.2, layers=["head"])
    before = s.path.checksum()
    calls = 0

    def sink(number: int, rows: list[dict[str, object]]) -> None:
        nonlocal calls
        calls += 1
        if error is not None and calls == 2:
            raise error("full")

    for study in (studies.sharpness, studies.layerwise_sharpness):
        calls = 0
        arguments: Any = (s.path, s.evaluator, [0.4, 1.0], [0.3], 4)
        if error is None:
            study(*arguments, protocol=Protocol(estimator), sink=sink)
        else:
            with pytest.raises(error, match="full"):
                study(*arguments, protocol=Protocol(estimator), sink=sink)
        assert calls >= 2 and s.path.checksum() == before and s.path.alpha is None


# --- what is refused ------------------------------------------------------------------------------


def refuses(error: type[Exception], *facts: str, both: bool = True, **how: Any) -> None:
    s = Setting()
    before = s.path.checksum()
    arguments = {"alphas": [0.0, 1.0], "rhos": [0.1], "draws": 4, **how}
    for study in (studies.layerwise_sharpness, studies.sharpness) if both else (studies.layerwise_sharpness,):
        with refused(error, *facts):
            study(s.path, s.evaluator, sink=lambda *told: pytest.fail("a row"), **arguments)
    assert s.path.checksum() == before


@pytest.mark.parametrize("rhos", [[0.0], [-0.1, 0.1], [math.nan], [math.inf], [], [0.1, 0.1]])
def test_bad_rhos(rhos: list[float]) -> None:
    refuses(ValueError, rhos=rhos)


@pytest.mark.parametrize("alphas", [[], [math.nan], [0.5, math.inf], [0.5, 0.5], [0.0, -0.0]])
def test_bad_alphas(alphas: list[float]) -> None:
    refuses(ValueError, alphas=alphas)


def test_bad_draws() -> None:
    refuses(ValueError, draws=0)
    refuses(TypeError, draws=2.5)
    refuses(ValueError, "5", draws=5, protocol=Protocol("antithetic"))
    refuses(ValueError, "4", draws=3, protocol=Protocol(goal=1.0))


def test_bad_layers() -> None:
    refuses(ValueError, "11", "1", layers=["11"], both=False)
    refuses(TypeError, "1", layers="1", both=False)
    s = Setting()
    for end in (s.zero, s.one):
        end["5.bias"].zero_()
    path = Path(s.model, s.zero, s.one, granularity="tensor", inert=["1.weight"])
    for name, reason in (("5.bias", "zero at both ends"), ("1.weight", "left out by inert=")):
        with refused(ValueError, name, "path.layers", reason):
            studies.layerwise_sharpness(path, s.evaluator, [1.0], [0.1], 2, ["3.bias", name])
    rows = studies.layerwise_sharpness(path, s.evaluator, [1.0], [0.1], 2)
    assert rows["layer"].unique().tolist() == ["1.bias", "3.weight", "3.bias", "5.weight"]


def test_an_evaluator_of_another_model_is_refused() -> None:
    s, other = Setting(), Setting()
    for study, name in ((studies.sharpness, "sharpness"), (studies.layerwise_sharpness, "layer-sharpness")):
        with refused(ValueError, name):
            study(s.path, other.evaluator, [0.5], [0.1])


# --- near zero, by hand ---------------------------------------------------------------------------


def row(layer: str, alpha: float, s: float, se: float, draws: int = 5, **changes: Any) -> dict[str, object]:
    return {
        **{"study": "layer-sharpness", "model": "m", "dataset": "far", "layer": layer, "alpha": alpha},
        **{"rho": 1.0, "on": "finetuned", "estimator": "gradient", "draws": draws},
        **{"sharpness": s, "sharpness_se": se, **changes},
    }


def test_intervals_are_students() -> None:
    rows = studies.frame(
        [row("a", 1.0, 0.0, 1.0, draws, estimator=e) for e, draws in (
            ("gradient", 5), ("plain", 2), ("plain", 1), ("hessian", 21), ("antithetic", 4),
            ("antithetic", 2), ("antithetic", 40), ("gradient", 1000), ("plain", 0))]
    )  # fmt: skip
    freedom = [4, 1, None, 20, 1, None, 19, 999, None]
    expected = [math.nan if f is None else scipy.stats.t.ppf(0.975, f) for f in freedom]
    assert student_t(rows).tolist() == pytest.approx(expected, nan_ok=True)
    assert student_t(rows).iloc[0] == pytest.approx(2.776445)


def test_near_zero_by_threshold() -> None:
    t = float(scipy.stats.t.ppf(0.975, 4))
    inside, outside = (0.02 * (1 - 1e-9) - 0.015) / t, (0.02 * (1 + 1e-9) - 0.015) / t
    rows = studies.frame(
        [
            row("in", 0.5, 0.015, inside),
            row("in", 1.0, 0.001, 0.001),
            row("in-negative", 0.5, 0.001, 0.001),
            row("in-negative", 1.0, -0.015, inside),
            row("out", 0.5, 0.015, outside),
            row("out", 1.0, 0.001, 0.001),
            row("out-negative", 0.5, -0.015, outside),
            row("wide", 1.0, 0.0, 0.01),  # no evidence either way
            row("exact", 1.0, 0.0, 0.0),
            row("edge", 1.0, 0.02, 0.0),  # below the margin, not at it
            row("single", 1.0, 0.0, math.nan, draws=1),
            row("one-nan", 0.5, 0.0, 0.001),
            row("one-nan", 1.0, 0.0, math.nan),
            row("burst", 1.0, math.inf, math.nan),
            row("at-zero-shot", 0.0, 9.0, 9.0),  # alpha = 0 does not count
            row("at-zero-shot", 1.0, 0.0, 0.001),
        ]
    )
    facts = near_zero(rows).set_index("layer")
    assert facts["near_zero"].to_dict() == {
        "in": True, "in-negative": True, "out": False, "out-negative": False, "wide": False, "exact": True,
        "edge": False, "single": False, "one-nan": False, "burst": False, "at-zero-shot": True,
    }  # fmt: skip
    assert MARGIN == 0.02 and set(facts["margin"]) == {0.02}
    worst = facts.loc["in-negative"]
    assert (worst["alpha"], worst["sharpness"], worst["draws"]) == (1.0, -0.015, 5)
    assert worst["sharpness_se"] == inside and worst["bound"] == pytest.approx(0.015 + t * inside)
    assert facts.loc["in", "alpha"] == 0.5 and facts.loc["one-nan", "alpha"] == 1.0
    assert math.isnan(facts.loc["one-nan", "bound"]) and math.isnan(facts.loc["single", "bound"])
    assert near_zero(rows, margin=0.0201).set_index("layer").loc[["out", "edge"], "near_zero"].all()


def test_near_zero_keeps_apart_what_is_apart() -> None:
    keys = [
        {"model": "b"}, {"model": "a"}, {"dataset": "near"}, {"on": "interpolated"}, {"rho": 0.5},
        {"estimator": "plain"},
    ]  # fmt: skip
    big = [row("x", 1.0, 1.0, 0.001, **change) for change in keys]
    rows = studies.frame([row("x", 1.0, 0.0, 0.001), *big])
    other = rows.assign(study="sharpness", sharpness=5.0)
    facts = near_zero(pd.concat([other, rows]))
    assert facts["near_zero"].tolist() == [True] + [False] * 6
    assert facts["model"].tolist() == ["m", "b", "a", "m", "m", "m", "m"]  # in the order of measurement


def test_near_zero_of_what_was_measured() -> None:
    """A model whose middle layer no longer matters: its outgoing weights are zero in both ends."""
    s = Setting()
    for end in (s.zero, s.one):
        end["5.weight"].zero_()
    path = Path(s.model, s.zero, s.one)
    rows = studies.layerwise_sharpness(path, s.evaluator, [0.0, 0.5, 1.0], [1.0], 5)
    facts = near_zero(rows).set_index(["dataset", "layer"])["near_zero"]
    assert facts["far"].to_dict() == facts["near"].to_dict() == {"1": True, "3": True, "5": False}


def test_near_zero_refuses() -> None:
    rows = studies.frame([row("x", 1.0, 0.0, 0.001)])
    for margin in (0.0, -1.0, math.nan):
        with refused(ValueError):
            near_zero(rows, margin)
    for nothing in (rows.iloc[:0], rows.assign(study="sharpness"), rows.assign(alpha=0.0)):
        with refused(ValueError, "layer-sharpness"):
            near_zero(nothing)
