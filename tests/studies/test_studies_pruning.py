"""Pruning against plain torch in float64, and its effect against numbers worked out by hand."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support.tiny_models import State, Told, normalised, pictures, random_state
from support.wording import refused, warned
from torch import nn

from rft_fast import studies
from rft_fast.datasets import Dataset
from rft_fast.evaluate import Evaluator
from rft_fast.kernels import keep_mask_like
from rft_fast.path import Path
from rft_fast.studies import Protocol
from rft_fast.studies.pruning import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")

ALPHAS = [0.0, 0.3, 0.7, 1.0]
LAYERS = ["0", "1", "3", "5", "7"]


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 5, 2),
        nn.BatchNorm2d(5),
        nn.Flatten(),
        nn.Linear(5, 6),
        nn.Tanh(),
        nn.Linear(6, 6),
        nn.Tanh(),
        nn.Linear(6, 4),
    )


class Setting:
    def __init__(self) -> None:
        self.model = network()
        self.zero, self.one = random_state(self.model, 1), random_state(self.model, 2)
        self.path = Path(self.model, self.zero, self.one)
        self.sets = [pictures("far", 61, True), pictures("near", 23, False)]
        self.evaluator = Evaluator(self.model, self.sets, batch_size=16)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.double = copy.deepcopy(self.model).double().eval()
        self.known: dict[tuple[str, float], tuple[np.ndarray, np.ndarray]] = {}

    def weights(
        self, alpha: float, keep: float, method: str | None, layers: Sequence[str], seed: int
    ) -> State:
        """Algorithm 1 in float64: mask, then interpolate. Buffers stay where the path has them."""
        kept = keep_mask_like([self.one[n] for n in self.names], keep, seed, impl="reference")
        w = {}
        for name, zero in self.zero.items():
            if not zero.is_floating_point():
                continue
            w0, w1 = zero.double(), self.one[name].double()
            if name in self.names and name.rpartition(".")[0] in layers:
                mask = kept[self.names.index(name)]
                if method == "zero":
                    w1 = torch.where(mask, w1, 0.0)
                elif method == "zeroshot":
                    w1 = torch.where(mask, w1, w0)
                elif method == "rescale":
                    w1 = torch.where(mask, w0 + (w1 - w0) / keep, w0)
                elif method == "magnitude":
                    ordered = w1.abs().flatten().sort(descending=True).values
                    count = round(keep * w1.numel())
                    least = ordered[count - 1] if count else math.inf
                    w1 = torch.where(w1.abs() >= least, w1, 0.0)
            w[name] = (1 - alpha) * w0 + alpha * w1
        return w

    def brute(self, w: State, data: Dataset) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            logits = torch.func.functional_call(self.double, w, (normalised(data),))
        losses = logits.logsumexp(1) - logits[torch.arange(len(logits)), data.labels]
        return losses.numpy(), (logits.argmax(1) == data.labels).numpy().astype(float)

    def unpruned(self, alpha: float, data: Dataset) -> tuple[np.ndarray, np.ndarray]:
        if (data.name, alpha) not in self.known:
            self.known[data.name, alpha] = self.brute(self.weights(alpha, 1.0, None, [], 0), data)
        return self.known[data.name, alpha]


def paired(values: np.ndarray) -> tuple[float, float]:
    return values.mean(), values.std(ddof=1) / math.sqrt(len(values))


def assert_brute(s: Setting, rows: pd.DataFrame) -> None:
    for row in rows.to_dict("records"):
        data = next(data for data in s.sets if data.name == row["dataset"])
        method = None if pd.isna(row["method"]) else row["method"]
        layers = [] if method is None else row["layer"].split(", ")
        seed = 0 if method is None else int(row["seed"])
        losses, hits = s.brute(s.weights(row["alpha"], row["keep"], method, layers, seed), data)
        plain, zero = s.unpruned(row["alpha"], data), s.unpruned(0.0, data)
        truth = {
            "loss": paired(losses),
            "accuracy": paired(hits),
            "gain": paired(hits - zero[1]),
            "rise": paired(losses - zero[0]),
            "change": paired(hits - plain[1]),
        }
        for name, (value, error) in truth.items():
            assert row[name] == pytest.approx(value, abs=1e-5), (name, row)
            assert row[f"{name}_se"] == pytest.approx(error, abs=1e-5), (name, row)
        assert row["samples"] == len(data.labels) and row["ood"] == data.ood and row["nonfinite"] == 0


# --- the study ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [0.5, 0.25, 0.9])
def test_rows_equal_brute_force(method: str, keep: float) -> None:
    """The layer with batch statistics among them: these stay at alpha, whatever becomes of the weights."""
    s = Setting()
    told = Told()
    rows = studies.prune_stragglers(
        s.path, s.evaluator, [1, 0, 0.3, 0.7], keep, layers=["1", "3"], methods=[method], seeds=[0, 5],
        model="m", sink=told,
    )  # fmt: skip
    assert list(rows.columns) == list(studies.COLUMNS)
    pd.testing.assert_frame_equal(rows, studies.frame(told.rows))
    count = 4 if method == "magnitude" else 5  # magnitudes are not random: one curve tells all
    assert len(rows) == count * 8 and told.numbers == list(range(count * 4))
    assert rows["alpha"].tolist() == [a for _ in range(count) for a in ALPHAS for _ in s.sets]
    assert set(rows["study"]) == {"prune"} and set(rows["model"]) == {"m"}

    plain, pruned = rows[rows["method"].isna()], rows[rows["method"].notna()]
    assert (plain["keep"] == 1).all() and (plain["change"] == 0).all() and (plain["change_se"] == 0).all()
    assert plain[["layer", "criterion", "control", "seed"]].isna().all(axis=None)
    assert (pruned["keep"] == keep).all() and set(pruned["criterion"]) == {"named"}
    mine, control = pruned[~pruned["control"]], pruned[pruned["control"]]
    assert set(mine["layer"]) == {"1, 3"}
    assert mine["seed"].unique().tolist() == ([0] if method == "magnitude" else [0, 5])
    assert control["seed"].unique().tolist() == [0, 5]
    for _, curve in control.groupby("seed"):
        (layers,) = curve["layer"].unique()
        assert len(layers.split(", ")) == 2 and set(layers.split(", ")) <= {"0", "5", "7"}
    assert_brute(s, rows)
    # It does something, and the ends are as they must be.
    assert (pruned[pruned["alpha"] == 1]["loss"].to_numpy() != plain["loss"].iloc[-1]).all()
    at_zero = rows[(rows["alpha"] == 0) & (rows["dataset"] == "far")]
    assert at_zero["loss"].nunique() == 1 and (at_zero["gain"] == 0).all() and (at_zero["change"] == 0).all()


def test_masks_and_control_layers_are_those_of_the_seed_for_good() -> None:
    s = Setting()

    def pruned(seeds: Sequence[int]) -> pd.DataFrame:
        rows = studies.prune_stragglers(s.path, s.evaluator, [0, 1], layers=["5"], seeds=seeds)
        return rows[rows["method"].notna()].set_index(["seed", "control", "alpha", "dataset"])["loss"]

    together, alone = pruned([3, 8]), pruned([8])
    assert together.loc[8].tolist() == alone.loc[8].tolist()
    assert together.loc[8].tolist() != together.loc[3].tolist()
    rows = studies.prune_stragglers(s.path, s.evaluator, [0, 1], layers=["5"], seeds=list(range(30)))
    control = rows[rows["control"].fillna(False) & (rows["alpha"] == 1) & (rows["dataset"] == "far")]
    assert len(control) == 30 and set(control["layer"]) == {"0", "1", "3", "7"}  # any of the others
    expected = [sorted(np.random.RandomState(seed).permutation(4)[:1]) for seed in range(30)]
    assert control["layer"].tolist() == [["0", "1", "3", "7"][i] for (i,) in expected]


def test_several_methods_without_control() -> None:
    s = Setting()
    rows = studies.prune_stragglers(
        s.path, s.evaluator, [0, 0.7, 1], layers=["7"], methods=METHODS, seeds=[1], control=False
    )
    assert rows["method"].dropna().unique().tolist() == list(METHODS)
    assert not rows["control"].dropna().any()
    assert_brute(s, rows)
    assert rows[(rows["alpha"] == 1) & (rows["dataset"] == "far")]["loss"].nunique() == 5


def test_several_choices_of_layers_each_with_its_control() -> None:
    s = Setting()
    choice = {"by sharpness": ["5"], "by hand": ["re:[01]"], "nobody": []}
    with warned(UserWarning):
        rows = studies.prune_stragglers(s.path, s.evaluator, [0, 0.7, 1], layers=choice, seeds=[1, 2])
    assert rows["method"].isna().sum() == 6  # one unpruned path for all
    pruned = rows[rows["method"].notna()]
    mine = pruned[~pruned["control"]].groupby("criterion", sort=False)["layer"].unique()
    assert {name: list(layers) for name, layers in mine.items()} == {
        "by sharpness": ["5"],
        "by hand": ["0, 1"],
    }
    for name, size in (("by sharpness", 1), ("by hand", 2)):
        control = pruned[pruned["control"] & (pruned["criterion"] == name)]
        assert len(control) == 12 and set(control["layer"].str.split(", ").map(len)) == {size}
    assert_brute(s, rows)
    assert studies.pruning_effect(rows)["criterion"].unique().tolist() == ["by sharpness", "by hand"]


def test_a_control_of_fewer_layers_is_said_and_of_none_left_out() -> None:
    s = Setting()
    with warned(UserWarning, "3", "2"):
        rows = studies.prune_stragglers(s.path, s.evaluator, [0, 1], layers=["0", "1", "3"], seeds=[1, 2])
    control = rows[rows["control"].fillna(False)]
    assert set(control["layer"]) == {"5, 7"} and len(control) == 8
    assert_brute(s, rows)
    with warned(UserWarning, "5"):
        rows = studies.prune_stragglers(s.path, s.evaluator, [0, 1], layers=LAYERS, seeds=[1])
    assert not rows["control"].fillna(False).any() and len(rows) == 8
    assert_brute(s, rows)


def test_half_precision_ends() -> None:
    s = Setting()
    s.one = {n: t.bfloat16() if t.is_floating_point() else t for n, t in s.one.items()}
    s.path = Path(s.model, s.zero, s.one)
    rows = studies.prune_stragglers(
        s.path, s.evaluator, [0, 0.4, 1], layers=["3"], methods=["magnitude", "rescale"], control=False
    )
    assert_brute(s, rows)


def tricky() -> tuple[Setting, Path]:
    """Hidden units of which layer 7 reads none, so that noise on 0, 1, 3 and 5 changes nothing."""
    s = Setting()
    for end in (s.zero, s.one):
        end["7.weight"].zero_()
    s.path = Path(s.model, s.zero, s.one)
    return s, s.path


def test_stragglers_by_sharpness_are_those_of_the_rule_on_every_data_set() -> None:
    s, path = tricky()
    rows = studies.prune_stragglers(path, s.evaluator, [0, 0.5, 1], seeds=[0], control=False)
    facts = studies.near_zero(
        studies.layerwise_sharpness(
            path, s.evaluator, [0, 0.5, 1], [1.0], 5, protocol=Protocol(on="finetuned")
        )
    )
    everywhere = facts.groupby("layer")["near_zero"].all()
    assert everywhere.to_dict() == {"0": True, "1": True, "3": True, "5": True, "7": False}
    pruned = rows[rows["method"].notna()]
    assert set(pruned["layer"]) == {"0, 1, 3, 5"} and set(pruned["criterion"]) == {"sharpness"}
    assert_brute(s, rows)


def test_near_zero_on_one_data_set_alone_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    from rft_fast.studies import pruning

    s = Setting()
    found = pd.DataFrame(
        [(d, layer, near) for d, layer, near in (
            ("far", "0", True), ("near", "0", True), ("far", "3", True), ("near", "3", False),
            ("far", "7", False), ("near", "7", True), ("far", "5", True), ("near", "5", True))],
        columns=["dataset", "layer", "near_zero"],
    )  # fmt: skip
    monkeypatch.setattr(pruning, "near_zero", lambda rows: found)
    rows = studies.prune_stragglers(s.path, s.evaluator, [0, 1], seeds=[0], control=False)
    assert set(rows["layer"].dropna()) == {"0, 5"}
    unstable = pd.DataFrame(
        [("far", "5", False), ("near", "5", True), ("far", "3", False), ("near", "3", False),
         ("far", "1", True), ("near", "1", True)],
        columns=["dataset", "layer", "straggler"],
    )  # fmt: skip
    monkeypatch.setattr(pruning, "stragglers", lambda rows: unstable)
    rows = studies.prune_stragglers(
        s.path, s.evaluator, [0, 1], criterion="instability", seeds=[0], control=False
    )
    assert set(rows["layer"].dropna()) == {"5, 1"} and set(rows["criterion"].dropna()) == {"instability"}


def test_without_stragglers_the_path_alone_is_left_and_it_is_said() -> None:
    s = Setting()
    with warned(UserWarning):
        rows = studies.prune_stragglers(s.path, s.evaluator, ALPHAS, rho=5.0, model="m")
    assert rows["method"].isna().all() and len(rows) == 8
    assert_brute(s, rows)
    assert studies.pruning_effect(rows).empty
    assert list(studies.pruning_effect(rows).columns)[:3] == ["model", "dataset", "criterion"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        studies.prune_stragglers(s.path, s.evaluator, [0, 1], layers=["3"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["sink", "forward"])
def test_weights_come_back(method: str, error: Any, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s = Setting()
    s.path.write(0.37, 0.2, seed=3)
    s.path.write(0.6, layers=["3"])
    before, calls, last = s.path.checksum(), 0, s.model[7]

    def count(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if error is not None and calls == stop:
            raise error("stop")
        return nn.functional.linear(*arguments, last.weight, last.bias) if where == "forward" else None

    if where == "forward":
        monkeypatch.setattr(last, "forward", count)
    how: Any = {"sink": count} if where == "sink" else {}
    # The first lies among the unpruned positions, the last among the pruned ones.
    for stop in (5, 20, 40) if where == "forward" else (3, 10, 17):
        calls = 0
        arguments: Any = (s.path, s.evaluator, ALPHAS)
        if error is None:
            studies.prune_stragglers(*arguments, layers=["1", "5"], methods=[method], **how)
        else:
            with pytest.raises(error, match="stop"):
                studies.prune_stragglers(*arguments, layers=["1", "5"], methods=[method], **how)
        assert calls >= stop and s.path.checksum() == before and s.path.alpha is None


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"alphas": [0.0, 0.5]},
        {"keep": 0.0},
        {"keep": 1.0},
        {"keep": math.nan},
        {"criterion": "loudness"},
        {"methods": ["zero", "one"]},
        {"methods": "zero"},
        {"methods": []},
        {"seeds": []},
        {"seeds": [1, 1]},
        {"seeds": [-1]},
        {"seeds": [2**32]},
        {"seeds": [0, 2**63]},
        {"seeds": [0.5]},
        {"seeds": [True]},
        {"layers": ["33"]},
        {"layers": None, "draws": 0},
        {"layers": None, "rho": 0.0},
    ],
)
def test_bad_requests(change: dict[str, Any]) -> None:
    s = Setting()
    before = s.path.checksum()
    arguments: dict[str, Any] = {"alphas": ALPHAS, "layers": ["3"], **change}
    with refused(ValueError):
        studies.prune_stragglers(s.path, s.evaluator, sink=lambda *told: pytest.fail("a row"), **arguments)
    assert s.path.checksum() == before


@pytest.mark.slow
def test_inert_layers_and_other_evaluators_are_refused() -> None:
    s, other = Setting(), Setting()
    path = Path(s.model, s.zero, s.one, inert=["5"])
    with refused(ValueError, "5", "path.layers"):
        studies.prune_stragglers(path, s.evaluator, ALPHAS, layers=["5"])
    with refused(ValueError):
        studies.prune_stragglers(s.path, other.evaluator, ALPHAS, layers=["5"])
    rows = studies.prune_stragglers(path, s.evaluator, [0, 1], layers=["3"], seeds=list(range(20)))
    assert "5" not in set(rows["layer"].dropna())  # nor is it a control


# --- the effect, by hand --------------------------------------------------------------------------


def curve(
    method: str | None, gains: list[float], changes: list[float], **more: Any
) -> list[dict[str, object]]:
    alphas = [0.0, 0.5, 1.0]
    shared: dict[str, Any] = {"study": "prune", "model": "m", "dataset": "far", "method": method}
    if method is not None:
        shared |= {"criterion": "sharpness", "keep": 0.5, "control": False, "seed": 0, "layer": "a, b"}
    return [
        {**shared, "alpha": a, "gain": g, "change": c, **more}
        for a, g, c in zip(alphas, gains, changes, strict=True)
    ]


def test_the_effect_by_hand() -> None:
    rows = studies.frame(
        curve(None, [0.0, 0.2, -0.4], [0.0] * 3)
        + curve("zero", [0.0, 0.3, 0.1], [0.0, 0.1, 0.5])
        + curve("zero", [0.0, 0.1, 0.7], [0.0, -0.1, 1.1], seed=1)
        + curve("zero", [0.0, 0.2, -0.2], [0.0, 0.0, 0.2], seed=2, layer="c, d")
        + curve("zero", [0.0, -0.1, -0.5], [0.0, -0.3, -0.1], control=True, layer="x, y")
        + curve("magnitude", [0.0, 0.4, 0.4], [0.0, 0.2, 0.8])
        + curve(None, [0.0, -0.1, -0.2], [0.0] * 3, model="n")
        + curve("zero", [0.0, -0.2, -0.1], [0.0, -0.1, 0.1], model="n")
    )
    other = rows.assign(study="interpolation", gain=9.0)
    facts = studies.pruning_effect(pd.concat([other, rows]))
    keys = ["model", "dataset", "criterion", "method", "keep", "control"]
    assert list(facts[keys].itertuples(index=False, name=None)) == [
        ("m", "far", "sharpness", "zero", 0.5, False),
        ("m", "far", "sharpness", "zero", 0.5, True),
        ("m", "far", "sharpness", "magnitude", 0.5, False),
        ("n", "far", "sharpness", "zero", 0.5, False),
    ]
    zero, control, magnitude, failed = facts.to_dict("records")
    # Mean changes over alpha > 0: .3, .5 and .1 of three seeds: mean .3, variance .04, error sqrt(.04 / 3).
    assert zero["change"] == pytest.approx(0.3) and zero["change_se"] == pytest.approx(math.sqrt(0.04 / 3))
    assert zero["seeds"] == 3 and zero["layers"] == ["a", "b"]
    assert zero["gain"] == pytest.approx(0.2) and zero["unpruned_gain"] == 0.2
    assert zero["best_alpha"] == 0.5 or facts.loc[0, "best_alpha"] == 1.0  # means .2 and .2
    assert control["change"] == pytest.approx(-0.2) and math.isnan(control["change_se"])
    assert (control["gain"], control["best_alpha"], control["layers"]) == (0.0, 0.0, ["x", "y"])
    assert (magnitude["gain"], magnitude["best_alpha"], magnitude["seeds"]) == (0.4, 0.5, 1)
    assert (failed["gain"], failed["best_alpha"], failed["unpruned_gain"]) == (0.0, 0.0, 0.0)


def test_keeps_and_criteria_are_told_apart() -> None:
    rows = studies.frame(
        curve(None, [0.0, 0.2, -0.4], [0.0] * 3)
        + curve("zero", [0.0, 0.3, 0.1], [0.0, 0.1, 0.5])
        + curve("zero", [0.0, 0.3, 0.1], [0.0, 0.3, 0.5], keep=0.9)
        + curve("zero", [0.0, 0.3, 0.1], [0.0, 0.5, 0.5], criterion="instability")
        + curve("zero", [0.0, 0.3, 0.1], [0.0, 0.7, 0.5], dataset="near")
        + curve(None, [0.0, 0.1, -0.4], [0.0] * 3, dataset="near")
    )
    facts = studies.pruning_effect(rows)
    assert facts["change"].tolist() == pytest.approx([0.3, 0.4, 0.5, 0.6])
    assert facts["unpruned_gain"].tolist() == [0.2, 0.2, 0.2, 0.1]
    with refused(ValueError, "prune"):
        studies.pruning_effect(rows.assign(study="layers"))


def test_the_effect_of_what_was_measured() -> None:
    s = Setting()
    rows = studies.prune_stragglers(s.path, s.evaluator, ALPHAS, layers=["3"], seeds=[0, 1, 2])
    facts = studies.pruning_effect(rows)
    assert len(facts) == 4  # two data sets, with and without control
    for fact in facts.to_dict("records"):
        data = next(data for data in s.sets if data.name == fact["dataset"])
        mine = rows[(rows["dataset"] == fact["dataset"]) & (rows["control"] == fact["control"])]
        gains, changes = np.zeros((3, 4)), np.zeros((3, 3))
        for seed in (0, 1, 2):
            layers = mine[mine["seed"] == seed]["layer"].iloc[0].split(", ")
            for column, alpha in enumerate(ALPHAS):
                hits = s.brute(s.weights(alpha, 0.5, "zero", layers, seed), data)[1].mean()
                gains[seed, column] = hits - s.unpruned(0.0, data)[1].mean()
                if column:
                    changes[seed, column - 1] = hits - s.unpruned(alpha, data)[1].mean()
        assert fact["change"] == pytest.approx(changes.mean())
        assert fact["change_se"] == pytest.approx(changes.mean(1).std(ddof=1) / math.sqrt(3))
        assert fact["gain"] == pytest.approx(gains.mean(0).max())
