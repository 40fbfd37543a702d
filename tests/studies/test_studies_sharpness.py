"""General and layer-wise sharpness against plain torch in float64, and near_zero against hand-made rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from open_clip.transformer import VisionTransformer
from support.brute import Brute, moments
from support.tiny_models import MEAN, STD, Told, dataset, pictures, random_state, two_towers
from support.wording import refused
from torch import Tensor, nn

from rft_fast import studies
from rft_fast.clip.classifier import ImageClassifier
from rft_fast.datasets import Dataset
from rft_fast.evaluate import Evaluator
from rft_fast.names import SAMPLING
from rft_fast.path import Path
from rft_fast.studies import ESTIMATORS, Protocol
from rft_fast.studies.estimators import Estimate, Mean
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
        self.brute = {
            data.name: Brute(self.model, self.zero, self.one, data, self.normalize) for data in self.sets
        }

    def names(self, layer: str | None) -> list[str] | None:
        """The parameters of a layer; None: all."""
        if layer is None:
            return None
        return [n for n, _ in self.model.named_parameters() if n.rpartition(".")[0] == layer]

    def cost(self, layer: str | None) -> float:
        """Of a pass with the control, in passes without: the stages that read perturbed weights once more."""
        station = {"1": 0, "3": 1, "5": 2}
        first, last = (0, 2) if layer is None else (station[layer], station[layer])
        flipped, rest = last - first + 1, self.evaluator.stations - first
        return (rest + 2 * flipped) / (rest + flipped)


def assert_rows_are_brute(s: Setting, rows: pd.DataFrame, protocol: Protocol, draws: Sequence[int]) -> None:
    """Every row is what these draws give; auto has chosen by the first of them, in the first parts."""
    for row in rows.to_dict("records"):
        data = next(data for data in s.sets if data.name == row["dataset"])
        layer = None if pd.isna(row["layer"]) else row["layer"]
        for name in ("on", "noise", "adaptive", "seed"):
            assert row[name] == getattr(protocol, name)
        assert row["asked"] == protocol.estimator
        assert row["samples"] == len(data.labels) and row["ood"] == data.ood and row["nonfinite"] == 0
        assert pd.isna(row["reached"]) and row["keep"] == 1.0 and row["precision"] == "fp32"
        assert row["normalized"] == s.normalize and pd.isna(row["excluded"])
        batch = row["noise_batch"]
        assert pd.isna(batch) if protocol.noise_batch is None else batch == protocol.noise_batch
        if protocol.on == "finetuned" and row["alpha"] == 0:
            assert row["sharpness"] == row["sharpness_se"] == 0.0 and row["draws"] == 0
            assert row["loss"] == pytest.approx(s.brute[data.name].clean(0.0), abs=1e-6)
            continue
        assert row["draws"] == len(draws)
        how = (row["alpha"], row["rho"], draws, protocol, s.names(layer))
        truth = s.brute[data.name].draws(*how, estimator=row["estimator"])
        if protocol.estimator == "auto":
            wins = truth.control_wins(s.cost(layer), min(len(truth.sizes), math.ceil(20 / len(draws))))
            assert row["estimator"] == ("per-image-gradient" if wins else "per-image")
        else:
            assert row["estimator"] == protocol.estimator
        for name, value in truth.row().items():
            size = 3e-6 if name != "sharpness_df" else 0.02 * value
            assert row[name] == pytest.approx(value, abs=size, nan_ok=True), (name, row["alpha"], layer)


# --- brute force ----------------------------------------------------------------------------------

CASES = [
    Protocol("plain", on="interpolated", noise_batch=None),
    Protocol("gradient", on="interpolated"),
    Protocol("plain", on="finetuned", noise="uniform", seed=3),
    Protocol("gradient", on="finetuned", adaptive=False, seed=2**40, noise_batch=None),
    Protocol("gradient", on="finetuned", noise="rademacher"),
    Protocol("plain", noise_batch=12, on="interpolated"),
    Protocol("plain", noise_batch=4, on="finetuned"),
    Protocol("gradient", noise_batch=9, on="finetuned"),
    Protocol("gradient", noise_batch=23, on="interpolated"),
    Protocol("per-image", on="interpolated", noise_batch=None),
    Protocol("per-image", on="finetuned", noise_batch=9, noise="uniform", seed=7),
    Protocol("per-image-gradient", on="interpolated", noise_batch=12, adaptive=False),
    Protocol("per-image-gradient", on="finetuned", noise="rademacher"),
    Protocol("per-image-antithetic", on="finetuned", adaptive=False, noise="rademacher"),
    Protocol("per-image-antithetic", noise_batch=16, noise="uniform", on="interpolated"),
    Protocol("auto", noise_batch=9, on="interpolated"),
    Protocol("auto", on="finetuned"),
]


def named(protocol: Protocol) -> str:
    return f"{protocol.estimator}-{protocol.on}-{protocol.noise}-{protocol.noise_batch}"


@pytest.mark.parametrize("protocol", CASES, ids=named)
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
    assert_rows_are_brute(s, rows, protocol, range(4))


@pytest.mark.parametrize("protocol", CASES, ids=named)
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
    assert_rows_are_brute(s, rows, protocol, range(4))


def test_defaults_are_those_of_the_paper() -> None:
    s = Setting()
    rows = studies.sharpness(s.path, s.evaluator, [0.4], [1.0])
    assert set(rows["on"]) == {"interpolated"} and set(rows["draws"]) == {20}  # Eq. 3
    assert set(rows["noise"]) == {"normal"} and rows["adaptive"].all() and set(rows["noise_batch"]) == {128}
    assert_rows_are_brute(s, rows, Protocol(on="interpolated"), range(20))
    rows = studies.layerwise_sharpness(s.path, s.evaluator, [0.4], [1.0], layers=["3"])
    assert set(rows["on"]) == {"finetuned"} and set(rows["draws"]) == {20}  # Sec. 3.1
    assert_rows_are_brute(s, rows, Protocol(on="finetuned"), range(20))
    # Also when the protocol says something else.
    rows = studies.layerwise_sharpness(
        s.path, s.evaluator, [0.4], [1.0], 4, ["3"], protocol=Protocol("plain")
    )
    assert_rows_are_brute(s, rows, Protocol("plain", on="finetuned"), range(4))
    assert set(rows["on"]) == {"finetuned"}


@pytest.mark.slow
def test_auto_chooses_by_the_first_parts() -> None:
    """By as many as have 20 draws together: here one of six, with 20 draws."""
    s, rhos = Setting(), [1.0, 2.0, 3.0, 4.0]
    protocol = Protocol(on="interpolated", noise_batch=4)
    rows = studies.sharpness(s.path, s.evaluator.among(["far"]), [0.4], rhos, 20, protocol=protocol)
    assert_rows_are_brute(s, rows, protocol, range(20))
    by_all = [
        s.brute["far"]
        .draws(0.4, rho, range(20), protocol, estimator="per-image")
        .control_wins(s.cost(None), 6)
        for rho in rhos
    ]
    assert rows["estimator"].nunique() == 2
    assert (rows["estimator"] == "per-image-gradient").tolist() != by_all


@pytest.mark.parametrize("estimator", SAMPLING)
def test_normalized_logits(estimator: str) -> None:
    s = Setting(normalize_logits=True)
    protocol = Protocol(estimator, noise_batch=10, on="finetuned")
    rows = studies.layerwise_sharpness(s.path, s.evaluator, [0.0, 0.7], [0.4], 4, protocol=protocol)
    assert rows["normalized"].all()
    assert_rows_are_brute(s, rows, protocol, range(4))


def test_a_single_draw_has_no_standard_error() -> None:
    s = Setting()
    protocol = Protocol("per-image", on="interpolated")
    rows = studies.sharpness(s.path, s.evaluator, [0.4], [0.3], 1, protocol=protocol)
    assert rows[["sharpness_se", "sharpness_df"]].isna().all(axis=None)
    assert rows[["sharpness", "sharpness_se_images"]].notna().all(axis=None)
    assert_rows_are_brute(s, rows, protocol, range(1))


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
    for estimator in ("gradient", "per-image-gradient"):
        protocol = Protocol(estimator, on=on)
        rows = studies.layerwise_sharpness(s.path, s.evaluator, [0.4, 1.0], [0.5], 4, protocol=protocol)
        assert rows["layer"].unique().tolist() == ["conv", "norm", "head"]
        general = studies.sharpness(s.path, s.evaluator, [0.4], [0.5], 4, protocol=protocol)
        assert_rows_are_brute(s, pd.concat([rows, general]), protocol, range(4))


@pytest.mark.parametrize("estimator", ["plain", "per-image-gradient", "hessian", "apgd-l2"])
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
    for name in ("sharpness", "sharpness_se", "sharpness_se_images", "loss", "accuracy"):
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
    for protocol in (Protocol("gradient", on="finetuned"), Protocol("per-image", noise_batch=5)):
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


@pytest.mark.slow(but="^per-image-gradient")
@pytest.mark.parametrize("reach", [True, False])
@pytest.mark.parametrize(("estimator", "goal"), [("plain", 0.06), ("per-image-gradient", 0.01)])
def test_rows_say_whether_the_goal_was_reached(reach: bool, estimator: str, goal: float) -> None:
    """The result is made of draws after those of the pilot, which are numbered from 0."""
    s = Setting()
    protocol = Protocol(
        estimator,
        on="finetuned",
        noise_batch=None,
        goal=goal if reach else 1e-9,
        most=1000 if reach else 40,
    )
    rows = studies.layerwise_sharpness(s.path, s.evaluator, [0.0, 1.0], [0.5], 4, protocol=protocol)
    assert len(rows) == 12
    noisy = rows[rows["alpha"] > 0]
    assert (noisy["reached"] == reach).all() and noisy["draws"].nunique() > reach
    assert rows.loc[rows["alpha"] == 0, "reached"].all()  # exactly zero
    if not reach:
        assert (noisy["draws"] == 36).all() and noisy["sharpness"].notna().all()
        noisy = noisy.iloc[:1]
    for draws, part in noisy.groupby("draws"):
        of_second = range(4, 4 + int(draws))
        assert_rows_are_brute(s, part.assign(reached=pd.NA), replace(protocol, goal=None), of_second)


# --- layers that are left as they are -------------------------------------------------------------


@pytest.mark.parametrize("estimator", [*SAMPLING, "auto"])
@pytest.mark.parametrize("exclude", [["5"], ["3"], ["re:[13]"], ["1", "re:[5-9]"]])
def test_excluded_layers_are_not_perturbed(estimator: str, exclude: list[str]) -> None:
    s = Setting()
    protocol = Protocol(estimator, on="interpolated", noise_batch=12)
    rows = studies.sharpness(s.path, s.evaluator, [0.4], [0.5], 4, exclude=exclude, protocol=protocol)
    left = {"5": ["5"], "3": ["3"], "re:[13]": ["1", "3"], "1": ["1", "5"]}[exclude[0]]
    assert len(rows) == 2 and set(rows["excluded"]) == {", ".join(left)} and rows["layer"].isna().all()
    names = [n for n in s.brute["far"].names if n.partition(".")[0] not in left]
    for row in rows.to_dict("records"):
        brute = s.brute[row["dataset"]]
        truth = brute.draws(0.4, 0.5, range(4), protocol, names, row["estimator"]).row()
        for name, value in truth.items():
            assert row[name] == pytest.approx(value, abs=3e-6 if name != "sharpness_df" else 0.02 * value)


def test_the_worst_case_leaves_excluded_layers_as_they_are() -> None:
    s = Setting()
    how: Any = (s.path, s.evaluator, [0.4], [0.3], 4)
    protocol = Protocol("apgd-l2", on="finetuned")
    rest = studies.sharpness(*how, exclude=["1", "3"], protocol=protocol)
    alone = studies.layerwise_sharpness(*how, ["5"], protocol=protocol)
    for name in ("sharpness", "sharpness_se", "accuracy"):
        assert rest[name].tolist() == pytest.approx(alone[name].tolist(), rel=1e-5, nan_ok=True)
    nothing = studies.sharpness(*how, exclude=[])
    assert nothing["excluded"].isna().all()
    assert nothing["sharpness"].tolist() == studies.sharpness(*how)["sharpness"].tolist()


def test_what_cannot_be_excluded() -> None:
    s = Setting()
    for exclude, facts in (
        (LAYERS, LAYERS),
        (["re:.*"], ["re:.*"]),
        (["55"], ["55"]),
        (["re:x.*"], ["re:x"]),
    ):
        with refused(ValueError, *facts):
            studies.sharpness(s.path, s.evaluator, [0.4], [0.5], 4, exclude=exclude)
    with refused(TypeError, "5"):
        studies.sharpness(s.path, s.evaluator, [0.4], [0.5], 4, exclude="5")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:sharpness", "ignore:There is a performance drop")
@pytest.mark.parametrize(
    ("exclude", "estimator"),
    [
        (["text.token_embedding"], "plain"),
        (["text.token_embedding", "logit_scale"], "plain"),  # some of both towers
        (["re:visual.*"], "plain"),
        (["re:text.*", "logit_scale"], "per-image"),  # only of the image tower
    ],
)
def test_layers_of_two_towers_are_excluded(exclude: list[str], estimator: str) -> None:
    model, data = two_towers(), dataset(count=5)
    ends = [{n: t.clone() for n, t in model.state_dict().items()} for _ in range(2)]
    ends[1] = {n: t * 1.2 if t.is_floating_point() else t for n, t in ends[1].items()}
    path, protocol = Path(model, *ends), Protocol("per-image", on="interpolated")
    [row] = studies.sharpness(
        path, Evaluator(model, [data]), [0.4], [0.1], 2, exclude=exclude, protocol=protocol
    ).to_dict("records")
    assert row["estimator"] == estimator and pd.isna(row["noise_batch"])
    excluded = row["excluded"].split(", ")
    names = [w.name for layer in path.layers if layer not in excluded for w in path.weights([layer])]
    truth = Brute(model, *ends, data).draws(0.4, 0.1, range(2), protocol, names, row["estimator"]).row()
    assert row["sharpness"] == pytest.approx(truth["sharpness"], abs=2e-5)
    assert row["sharpness_se"] == pytest.approx(truth["sharpness_se"], abs=2e-5)


# --- changes from the zero-shot model -------------------------------------------------------------


@pytest.mark.parametrize("estimator", [*SAMPLING, "auto"])
def test_changes_are_paired_by_draws(estimator: str) -> None:
    s = Setting()
    protocol = Protocol(estimator, on="interpolated", noise_batch=10)
    rows = studies.sharpness(s.path, s.evaluator, ALPHAS, [0.1, 0.4], 4, protocol=protocol)
    at_zero = rows[rows["alpha"] == 0]
    assert (at_zero["sharpness_change"] == 0).all() and (at_zero["sharpness_change_se"] == 0).all()
    used, gaps = at_zero.set_index(["dataset", "rho"])["estimator"], []
    for row in rows[rows["alpha"] > 0].to_dict("records"):
        brute, data, rho = s.brute[row["dataset"]], row["dataset"], row["rho"]
        here = brute.draws(row["alpha"], rho, range(4), protocol, estimator=row["estimator"])
        there = brute.draws(0.0, rho, range(4), protocol, estimator=used[data, rho])
        change, error, _ = moments(here.values - there.values, here.sizes)
        assert row["sharpness_change"] == pytest.approx(change, abs=3e-6)
        assert row["sharpness_change_se"] == pytest.approx(error, abs=3e-6)
        apart = math.hypot(moments(here.values, here.sizes)[1], moments(there.values, here.sizes)[1])
        gaps.append(abs(error / apart - 1))
    assert max(gaps) > 0.02  # so pairs matter


def test_changes_with_a_goal_are_paired_where_draws_are_common() -> None:
    s = Setting()
    protocol = Protocol("per-image", on="interpolated", noise_batch=None, goal=0.05)
    rows = studies.sharpness(s.path, s.evaluator, [0.0, 1.0], [0.4], 4, protocol=protocol)
    for name in ("far", "near"):
        zero, one = rows[rows["dataset"] == name].to_dict("records")
        here, there = (
            s.brute[name].draws(row["alpha"], 0.4, range(4, 4 + row["draws"]), protocol).values[:, 0]
            for row in (one, zero)
        )
        assert one["sharpness_change"] == pytest.approx(one["sharpness"] - zero["sharpness"], abs=1e-12)
        common = min(len(here), len(there))
        covariance = np.cov(here[:common], there[:common])[0, 1] / max(len(here), len(there))
        variance = here.var(ddof=1) / len(here) + there.var(ddof=1) / len(there) - 2 * covariance
        assert one["sharpness_change_se"] == pytest.approx(math.sqrt(variance), rel=1e-3)
        assert one["sharpness_change_df"] == common - 1
    assert rows["draws"].nunique() > 1


def test_changes_of_noise_on_the_finetuned_weights_are_the_sharpness_itself() -> None:
    s = Setting()
    for estimator in ("auto", "hessian", "apgd-l2"):
        protocol = Protocol(estimator, on="finetuned", noise_batch=10)
        rows = studies.sharpness(s.path, s.evaluator, [0.0, 0.7], [0.4], 4, protocol=protocol)
        assert rows["sharpness_change"].tolist() == rows["sharpness"].tolist()
        pairs = zip(rows["sharpness_change_se"], rows["sharpness_se"], strict=True)
        assert all(change == error or math.isnan(error) for change, error in pairs)


def test_no_change_without_zero_shot_or_by_layer() -> None:
    s = Setting()
    columns = ["sharpness_change", "sharpness_change_se"]
    rows = studies.sharpness(s.path, s.evaluator, [0.4, 1.0], [0.4], 4)
    assert rows[columns].isna().all(axis=None)
    rows = studies.layerwise_sharpness(s.path, s.evaluator, [0.0, 1.0], [0.4], 4)
    assert rows[columns].isna().all(axis=None)


@pytest.mark.parametrize("estimator", ["plain", "auto", "hessian", "apgd-linf"])
def test_changes_do_not_depend_on_which_measurements_are_made(estimator: str) -> None:
    """Where alpha = 0 is not among them, the study measures it itself, or is given the estimates."""
    s = Setting()
    how: Any = {"protocol": Protocol(estimator, on="interpolated", noise_batch=10)}
    arguments: Any = (s.path, s.evaluator, [0.0, 0.4], [0.1, 0.4], 4)
    whole = studies.sharpness(*arguments, **how).drop(columns="seconds")
    kept: dict[tuple[str, float], Estimate] = {}
    alone = studies.sharpness(*arguments, only=[2, 3], zeroshot=kept, **how).drop(columns="seconds")
    pd.testing.assert_frame_equal(alone, whole.iloc[4:].reset_index(drop=True))
    assert set(kept) == {(data, rho) for data in ("far", "near") for rho in (0.1, 0.4)}
    for (data, rho), found in kept.items():
        [row] = whole[(whole["alpha"] == 0) & (whole["dataset"] == data) & (whole["rho"] == rho)].to_dict(
            "records"
        )
        assert found.sharpness.value == row["sharpness"]
    # Estimates that are given are used as they are.
    moved = {
        key: replace(
            found,
            values=found.values - 1.0,
            sharpness=replace(found.sharpness, value=found.sharpness.value - 1.0),
        )
        for key, found in kept.items()
    }
    given = studies.sharpness(*arguments, only=[2, 3], zeroshot=moved, **how)
    assert given["sharpness_change"].tolist() == pytest.approx((alone["sharpness_change"] + 1.0).tolist())
    started: dict[tuple[str, float], Estimate] = {}
    studies.sharpness(*arguments, only=[0, 1], zeroshot=started, **how)
    assert {key: found.sharpness for key, found in started.items()} == {
        key: found.sharpness for key, found in kept.items()
    }


def estimate_of(values: list[list[float]], estimator: Any = "plain", draws: int = 4) -> Estimate:
    shares = np.array([0.75, 0.25])
    value, se, df = moments(np.array(values), [3, 1]) if values else (0.0, 0.0, math.nan)
    sharpness, rest = Mean(value, se, df), (0.0, Mean(0.5, 0.0, 0.0), draws, 0, None, 1.0)
    return Estimate(sharpness, 0.0, *rest, estimator, np.array(values).reshape(-1, 2), shares)


def test_changes_by_hand() -> None:
    one, two = [[1.0, 4.0], [3.0, 2.0], [9.0, 9.0]], [[1.0, 2.0], [1.0, 4.0]]
    change = estimate_of(one).change(estimate_of(two))
    assert change.value == pytest.approx(0.75 * (13 / 3 - 1) + 0.25 * (5 - 3))
    # Variances of the means, less twice the covariance of the two common draws.
    parts = [52 / 3 / 3 + 0 - 0, 13 / 3 + 2 / 2 - 2 * -2 / 3]
    assert change.se == pytest.approx(math.sqrt(0.75**2 * parts[0] + 0.25**2 * parts[1]))
    paired = estimate_of(one[:2]).change(estimate_of(two))  # [[0, 2], [2, -2]]
    assert paired.value == pytest.approx(0.75 * 1.0 + 0.25 * 0.0)
    assert paired.se == pytest.approx(math.sqrt((0.75**2 * 2 + 0.25**2 * 8) / 2))
    nothing = estimate_of([], draws=0)
    assert estimate_of(two).change(nothing) == estimate_of(two).sharpness
    back = nothing.change(estimate_of(two))
    assert (back.value, back.se) == (-estimate_of(two).sharpness.value, estimate_of(two).sharpness.se)
    worst = estimate_of([[5.0, 1.0]], "apgd-l2").change(estimate_of([[1.0, 1.0]], "apgd-l2"))
    assert worst.value == 3.0  # of 4 and 0
    assert worst.se == pytest.approx(math.sqrt(2 * (0.75**2 * 1.0**2 + 0.25**2 * 3.0**2)))


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
    refuses(ValueError, "5", draws=5, protocol=Protocol("per-image-antithetic"))
    refuses(ValueError, "4", draws=3, protocol=Protocol(goal=1.0))
    refuses(ValueError, "8", "7", draws=4, protocol=Protocol(goal=1.0, most=7))


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
    counted = rows.assign(sharpness_df=pd.array([7.5, None] + [3.0] * 7, dtype="Float64"))
    expected = [float(scipy.stats.t.ppf(0.975, f)) for f in (7.5, 1, 3)]
    assert student_t(counted).tolist()[:3] == pytest.approx(expected)


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


def test_near_zero_keeps_together_what_auto_chose() -> None:
    changes = [{"asked": "auto", "estimator": e} for e in ("per-image", "per-image-gradient", "plain")]
    rows = studies.frame([row("x", a, 0.0, 0.001, **c) for a, c in zip((0.2, 0.5, 1), changes, strict=True)])
    facts = near_zero(pd.concat([rows, studies.frame([row("x", 1.0, 1.0, 0.001, estimator="plain")])]))
    assert facts["asked"].tolist() == ["auto", "plain"] and facts["near_zero"].tolist() == [True, False]


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
