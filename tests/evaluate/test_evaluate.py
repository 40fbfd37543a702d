"""The evaluator against float64 by hand: losses, hits, class subsets, paired errors."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_models import (
    CLASSES,
    MEAN,
    STD,
    Opaque,
    assert_plain,
    counted,
    dataset,
    staged,
    toy,
    transformer,
)
from support.wording import refused, warned
from torch import Tensor, nn

from rft_fast.datasets import Dataset
from rft_fast.evaluate import Evaluator, Scores
from rft_fast.evaluate import staging as home
from rft_fast.evaluate.precision import PRECISIONS
from rft_fast.evaluate.stages import Stage, Stages

pytestmark = pytest.mark.usefixtures("one_thread")


def truth(model: nn.Module, data: Dataset, classes: Sequence[int] | None = None) -> Any:
    """Losses and hits in float64, in one forward, with the softmax written out."""
    double = toy().double().eval()
    double.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    with torch.no_grad():
        rows = double((data.images.double() / 255 - mean) / std).tolist()
    classes = range(CLASSES) if classes is None else classes
    losses, hits = [], []
    for logits, label in zip(rows, data.labels.tolist(), strict=True):
        total = sum(math.exp(logits[c]) for c in classes)
        losses.append(math.log(total) - logits[label])
        hits.append(max(classes, key=logits.__getitem__) == label)
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(hits)


@pytest.mark.parametrize("batch_size", [1, 10, 37, 512])
def test_losses_and_hits_equal_float64_by_hand(batch_size: int) -> None:
    model = toy()
    sets = [dataset("a"), dataset("b", count=5, seed=2)]
    evaluator = Evaluator(model, sets, batch_size)
    got = evaluator.scores()
    assert list(got) == ["a", "b"] and evaluator.datasets == sets
    for data in sets:
        losses, hits = truth(model, data)
        scores = got[data.name]
        assert scores.losses.dtype == torch.float32 and scores.correct.dtype == torch.bool
        assert (scores.losses - losses).abs().max() < 2e-5
        assert torch.equal(scores.correct, hits)
        assert scores.predictions is not None and scores.predictions.dtype == torch.int32
        assert scores.predictions.tolist() == logits_of(model, data).argmax(1).tolist()
        assert scores.samples == len(losses) and scores.nonfinite == 0
        assert scores.loss == pytest.approx(losses.mean().item(), rel=1e-6)
        assert scores.accuracy == pytest.approx(hits.double().mean().item())


def test_batches_cover_each_set_once() -> None:
    model = toy()
    evaluator = Evaluator(model, [dataset("a"), dataset("b", count=5)], batch_size=16)
    evaluator.scores()  # the first time, the meter looks at the model, too
    with counted(model.conv) as (batches,):
        evaluator.scores()
    assert sorted(batches) == [5, 5, 16, 16]  # with several threads in any order


def test_a_model_that_cannot_be_traced_is_scored_as_a_whole() -> None:
    model, sets = toy(kind=Opaque), [dataset("a"), dataset("b", count=5)]
    with warned(UserWarning, "Opaque", "torch.fx") as caught:
        evaluator = Evaluator(model, sets, batch_size=10)
    assert len(caught) == 1 and evaluator.stations == len(evaluator.stages.image) == 1
    assert evaluator.span(model.parameters()) == (0, 0)
    with counted(model.conv) as (batches,):
        scores = evaluator.scores()
    assert batches == [10, 10, 10, 7, 5]
    assert_plain(scores, model, sets)
    assert evaluator.pieces() == [evaluator]


def test_the_live_model_is_scored_as_it_is_now() -> None:
    model = toy()
    evaluator = Evaluator(model, [data := dataset()])
    before = evaluator.scores()["set"]
    with torch.no_grad():
        model.head.weight.mul_(-1)
    after = evaluator.scores()["set"]
    assert (after.losses - truth(model, data)[0]).abs().max() < 1e-5
    assert not torch.equal(before.losses, after.losses)


def test_a_class_subset_is_scored_among_its_logits_alone() -> None:
    classes = [4, 1, 5]
    labels = torch.tensor([1, 4, 5, 4, 1] * 6)
    data = dataset(count=30, labels=labels, classes=torch.tensor(classes))
    model = toy()
    got = Evaluator(model, [data], batch_size=7).scores()["set"]
    losses, hits = truth(model, data, classes)
    assert (got.losses - losses).abs().max() < 2e-5
    assert torch.equal(got.correct, hits)
    assert got.predictions is not None
    rows = logits_of(model, data).tolist()
    assert got.predictions.tolist() == [max(classes, key=logits.__getitem__) for logits in rows]
    assert not torch.allclose(truth(model, data)[0], losses)


# Classes 4 and 1 are one group; its labels are 1. Row 2 is not scored.
GROUPS = {4: 1, 1: 1, 5: 5, 0: 0, 3: 0}


def grouped(count: int = 30, seed: int = 0) -> Dataset:
    data = dataset(count=count, seed=seed, labels=torch.tensor([1, 5, 0, 5, 1] * (count // 5)))
    return replace(data, classes=torch.tensor(list(GROUPS)), groups=torch.tensor(list(GROUPS.values())))


@pytest.mark.parametrize("batch", [4, 512])
def test_groups_of_rows_are_scored_as_one(batch: int) -> None:
    model, data = toy(), grouped()
    rows = logits_of(model, data).tolist()
    losses, hits = [], []
    for logits, label in zip(rows, data.labels.tolist(), strict=True):
        members = [row for row, group in GROUPS.items() if group == label]
        total = sum(math.exp(logits[row]) for row in GROUPS)
        losses.append(-math.log(sum(math.exp(logits[row]) for row in members) / total))
        hits.append(GROUPS[max(GROUPS, key=logits.__getitem__)] == label)
    got = Evaluator(model, [data], batch).scores()["set"]
    torch.testing.assert_close(got.losses.double(), torch.tensor(losses).double(), rtol=1e-5, atol=1e-5)
    assert got.correct.tolist() == hits and 0 < sum(hits) < 30
    assert got.predictions is not None
    assert got.predictions.tolist() == [GROUPS[max(GROUPS, key=logits.__getitem__)] for logits in rows]
    both = Evaluator(model, [data, replace(data, name="b", groups=None)], batch).scores()
    assert torch.equal(both["set"].losses, got.losses)
    assert not torch.equal(both["b"].losses, got.losses) and (both["b"].losses >= got.losses - 1e-6).all()


def logits_of(model: nn.Module, data: Dataset) -> Tensor:
    double = toy().double().eval()
    double.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    with torch.no_grad():
        logits: Tensor = double((data.images.double() / 255 - mean) / std)
    return logits


@pytest.mark.parametrize("normalize", [False, True])
def test_groups_of_one_row_change_no_bit(normalize: bool) -> None:
    classes = torch.tensor([4, 1, 5])
    data = dataset(count=30, labels=torch.tensor([1, 4, 5, 4, 1] * 6), classes=classes)
    model = toy()
    alone = Evaluator(model, [data], normalize_logits=normalize).scores()["set"]
    same = Evaluator(model, [replace(data, groups=classes)], normalize_logits=normalize).scores()["set"]
    assert torch.equal(alone.losses, same.losses) and torch.equal(alone.correct, same.correct)


def test_losses_of_groups_that_are_not_finite_stay_visible() -> None:
    model = toy()
    evaluator = Evaluator(model, [data := grouped()])
    with torch.no_grad():
        assert model.head.bias is not None
        model.head.bias[3] = math.nan  # of another group than most labels
    scores = evaluator.scores()["set"]
    assert scores.nonfinite == len(data.labels) and scores.accuracy == 0.0


def test_gradient_and_curvature_of_groups() -> None:
    torch.manual_seed(0)
    model, data = staged().eval(), grouped()
    weights = [p for p in model.parameters()]
    directions = [torch.randn_like(w) for w in weights]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    images = (data.images.float() / 255 - mean) / std
    member = torch.tensor(
        [[GROUPS.get(row, -1) == label for row in range(CLASSES)] for label in data.labels.tolist()]
    )
    scored = torch.tensor([row in GROUPS for row in range(CLASSES)])

    def loss() -> Tensor:
        powers = model(images).double().exp()
        return -(((powers * member).sum(1) / (powers * scored).sum(1)).log()).mean()

    slopes = torch.autograd.grad(loss(), weights, create_graph=True)
    products = torch.autograd.grad(slopes, weights, directions)
    evaluator = Evaluator(model, [data], batch_size=7)
    value, got = evaluator.gradient(weights)
    assert value == pytest.approx(loss().item(), rel=1e-5)
    for slope, truth_slope in zip(got, slopes, strict=True):
        torch.testing.assert_close(slope, truth_slope.detach(), rtol=1e-4, atol=1e-6)
    expected = [float((v.double() * h.double()).sum()) for v, h in zip(directions, products, strict=True)]
    curvature = evaluator.curvature(weights, directions).tolist()
    assert curvature == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_training_flags_and_statistics_survive() -> None:
    model = toy().train()
    model.norm.eval()  # a frozen part stays frozen
    statistics = {name: t.clone() for name, t in model.state_dict().items()}
    evaluator = Evaluator(model, [dataset()])
    first, second = evaluator.scores()["set"], evaluator.scores()["set"]
    assert torch.equal(first.losses, second.losses)  # no dropout
    flags = {name: module.training for name, module in model.named_modules()}
    assert flags == {"": True, "conv": True, "norm": False, "drop": True, "head": True}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, statistics[name]), name


def test_flags_are_restored_after_an_error() -> None:
    model = toy().train()
    evaluator = Evaluator(model, [dataset()])
    model.head = nn.Linear(3, CLASSES).train()
    matmul = torch.get_float32_matmul_precision()
    with pytest.raises(RuntimeError):
        evaluator.scores()
    assert all(module.training for module in model.modules())
    assert torch.get_float32_matmul_precision() == matmul
    assert not torch.is_inference_mode_enabled()


def test_full_precision_is_forced_and_given_back() -> None:
    conv: Any = torch.backends.cudnn
    new = hasattr(conv, "conv")
    seen: list[Any] = []

    class Watching(Opaque):
        def forward(self, images: Tensor) -> Tensor:
            matmul: Any = torch.backends.cuda.matmul
            seen.append(
                (matmul.fp32_precision, conv.conv.fp32_precision)
                if new
                else (torch.get_float32_matmul_precision(), conv.allow_tf32)
            )
            return super().forward(images)

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with warned(UserWarning, "Watching"):
            evaluator = Evaluator(Watching(), [dataset()])
        evaluator.scores()
        assert set(seen) == {("ieee", "ieee") if new else ("highest", False)}
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_results_are_ordinary_tensors() -> None:
    scores = Evaluator(toy(), [dataset()]).scores()["set"]
    assert not scores.losses.is_inference() and scores.losses.device.type == "cpu"
    scores.losses.clone().requires_grad_().sum().backward()  # type: ignore[no-untyped-call]


def test_losses_that_are_not_finite_stay_visible() -> None:
    model = toy()
    evaluator = Evaluator(model, [data := dataset()])
    with torch.no_grad():
        assert model.head.bias is not None
        model.head.bias[0] = math.nan
    scores = evaluator.scores()["set"]
    assert scores.nonfinite == scores.samples == len(data.labels)
    assert math.isnan(scores.loss) and scores.accuracy == 0.0
    mixed = Scores(torch.tensor([1.0, math.inf]), torch.tensor([True, False]))
    assert mixed.nonfinite == 1 and mixed.loss == math.inf and mixed.accuracy == 0.5


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_logit_that_is_infinite_can_be_the_largest(normalize: bool, grouped: bool) -> None:
    """The loss is NaN there, but which class is predicted is plain; only NaN predicts none."""
    labels = torch.arange(CLASSES).repeat(7)[:37]
    data = dataset(labels=labels)
    if grouped:
        data = replace(data, classes=torch.arange(CLASSES), groups=torch.arange(CLASSES))
    model = toy()
    evaluator = Evaluator(model, [data], normalize_logits=normalize)
    for largest, expected in ((math.inf, labels == 2), (math.nan, labels == CLASSES)):
        with torch.no_grad():
            model.head.weight.zero_()
            model.head.bias.copy_(torch.tensor([0.0, 1.0, largest, 2.0, -math.inf, 3.0]))
        scores = evaluator.scores()["set"]
        assert torch.equal(scores.correct, expected) and scores.losses[2].isnan()
        assert scores.predictions is not None
        assert set(scores.predictions.tolist()) == {-1 if math.isnan(largest) else 2}


def test_standard_errors_by_hand() -> None:
    one = Scores(torch.tensor([1.0, 2.0, 4.0, 5.0]), torch.tensor([True, True, False, True]))
    two = Scores(torch.tensor([1.0, 3.0, 4.0, 8.0]), torch.tensor([True, False, False, False]))
    assert one.loss == 3.0
    # deviations -2, -1, 1, 2: variance 10/3 over n-1, divided by n
    assert one.loss_se == pytest.approx(math.sqrt(10 / 3 / 4))
    assert one.accuracy == 0.75
    assert one.accuracy_se == pytest.approx(math.sqrt(0.75 / 3 / 4))
    gain, gain_se = two.gain_over(one)  # differences 0, -1, 0, -1
    assert gain == -0.5 and gain_se == pytest.approx(math.sqrt(1 / 3 / 4))
    rise, rise_se = two.rise_over(one)  # differences 0, 1, 0, 3; mean 1, squares 1 + 0 + 1 + 4
    assert rise == 1.0 and rise_se == pytest.approx(math.sqrt(6 / 3 / 4))
    assert one.gain_over(one) == one.rise_over(one) == (0.0, 0.0)
    single = Scores(torch.tensor([1.0]), torch.tensor([True]))
    assert (single.loss, single.accuracy) == (1.0, 1.0)
    assert math.isnan(single.loss_se) and math.isnan(single.accuracy_se)
    for difference in (single.gain_over, single.rise_over):
        with refused(ValueError, 1, 4):
            difference(one)


@pytest.mark.parametrize(
    ("data", "facts"),
    [
        (dataset(labels=torch.full((37,), CLASSES)), [CLASSES]),
        (dataset(labels=torch.zeros(37).long(), classes=torch.tensor([0, 9])), [9, CLASSES]),
        (dataset(images=torch.zeros(37, 3, 9, 9).byte()), ["3x9x9"]),
        (dataset(class_names=("a",) * 5), [5, CLASSES]),
    ],
    ids=["label", "class", "images", "folders"],
)
def test_data_that_do_not_fit_are_refused_at_once(data: Dataset, facts: list[Any]) -> None:
    with refused(ValueError, "Evaluator", "set", *facts):
        Evaluator(toy(), [data])


def test_fewer_folders_are_fine_with_a_class_map() -> None:
    names, labels = ("a", "b"), torch.tensor([3, 5] * 10)
    data = dataset(count=20, labels=labels, classes=torch.tensor([3, 5]), class_names=names)
    assert Evaluator(toy(), [data]).scores()["set"].samples == 20


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        return images.sum((1, 2, 3)) * self.weight


def test_bad_arguments() -> None:
    good: dict[str, Any] = {"model": toy(), "datasets": [dataset()]}
    refusals: list[tuple[dict[str, Any], list[str]]] = [
        ({"batch_size": 0}, ["batch_size", "0"]),
        ({"batch_size": 2.0}, ["batch_size", "2.0"]),
        ({"datasets": []}, []),
        ({"datasets": [dataset(), dataset()]}, []),
        ({"precision": "int8"}, [*PRECISIONS, "int8"]),
        ({"precision": "bf16"}, ["bfloat16", "float32", "cast(model, 'bf16')"]),
        ({"precision": "tf32"}, ["tf32", "cpu"]),
        ({"model": toy().half()}, ["fp32", "float32", "float16"]),
        ({"memory_limit": 0}, ["memory_limit", "0"]),
        ({"model": nn.Flatten()}, []),
        ({"model": Flat()}, ["[1]"]),
    ]
    for changes, facts in refusals:
        with refused(ValueError, *facts):
            Evaluator(**{**good, **changes})
    with refused(TypeError, "nn.Module", "function"):
        Evaluator(**{**good, "model": lambda images: images})
    with refused(TypeError, "str"):
        Evaluator(**{**good, "datasets": ["mnist"]})


def test_a_model_that_moved_is_refused() -> None:
    evaluator = Evaluator(model := toy(), [dataset()])
    model.to("meta")
    with refused(ValueError, "cpu", "meta"):
        evaluator.scores()


def test_instability_by_hand() -> None:
    first = Scores(torch.tensor([1.0, 2.0, 4.0, 5.0]), torch.tensor([True, True, False, True]))
    last = Scores(torch.tensor([3.0, 0.0, 2.0, 1.0]), torch.tensor([True, False, False, False]))
    middle = Scores(torch.tensor([2.5, 1.0, 7.0, 4.0]), torch.tensor([False, True, False, False]))
    loss, accuracy = middle.instability(first, last)
    differences = np.array([0.5, 0.0, 4.0, 1.0])  # less the ends' means 2, 1, 3, 3
    misses = np.array([1.0, -0.5, 0.0, 0.5])  # the ends' mean hits 1, .5, 0, .5 less its own
    assert loss == pytest.approx((differences.mean(), differences.std(ddof=1) / 2))
    assert accuracy == pytest.approx((misses.mean(), misses.std(ddof=1) / 2))
    single = Scores(torch.tensor([1.0]), torch.tensor([True]))
    for ends in ((single, last), (first, single)):
        with refused(ValueError, "instability", 4, 1):
            middle.instability(*ends)
    burst = Scores(torch.tensor([math.inf, 1.0, 7.0, 4.0]), middle.correct)
    assert burst.instability(first, last)[0][0] == math.inf
    assert math.isnan(first.instability(burst, last)[0][0]) or first.instability(burst, last)[0][0] < 0


# --- normalised logits ----------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [None, [4, 1, 5]])
def test_normalized_logits_equal_float64_by_hand(classes: list[int] | None) -> None:
    labels = torch.tensor([1, 4, 5, 4, 1] * 6)
    data = dataset(count=30, labels=labels, classes=None if classes is None else torch.tensor(classes))
    model = toy()
    got = Evaluator(model, [data], batch_size=7, normalize_logits=True).scores()["set"]
    plain = Evaluator(model, [data], batch_size=7).scores()["set"]
    assert torch.equal(got.correct, plain.correct) and not torch.allclose(got.losses, plain.losses)
    double = copy.deepcopy(model).double().eval()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    with torch.no_grad():
        logits = double((data.images.double() / 255 - mean) / std)
    columns = list(range(CLASSES)) if classes is None else classes
    for row, label, loss in zip(logits.tolist(), labels.tolist(), got.losses.tolist(), strict=True):
        scored = [row[c] for c in columns]
        centred = [x - sum(scored) / len(scored) for x in scored]
        norm = math.sqrt(sum(x * x for x in centred))
        total = sum(math.exp(x / norm) for x in centred)
        assert loss == pytest.approx(math.log(total) - centred[columns.index(label)] / norm, abs=1e-5)
    with torch.no_grad():  # the scale of the logits does not matter, nor what is added to all of them
        model.head.weight.mul_(7)
        model.head.bias.mul_(7).add_(3)
    again = Evaluator(model, [data], batch_size=7, normalize_logits=True).scores()["set"]
    torch.testing.assert_close(again.losses, got.losses, rtol=1e-5, atol=1e-5)


def test_normalized_logits_that_are_all_equal() -> None:
    model = toy()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.fill_(2.0)
    got = Evaluator(model, [dataset()], normalize_logits=True).scores()["set"]
    torch.testing.assert_close(got.losses, torch.full((37,), math.log(CLASSES)))


# --- stages ---------------------------------------------------------------------------------------


def test_tensors_belong_to_the_stages_that_read_them() -> None:
    model = staged()
    evaluator = Evaluator(model, [dataset()])
    assert evaluator.stations == 3
    conv, norm, head = model[0], model[1], model[5]
    assert [evaluator.stage_of([t]) for t in (conv.bias, norm.running_mean, head.weight)] == [0, 1, 2]
    assert evaluator.stage_of([head.bias, norm.bias]) == 1
    assert evaluator.span([head.bias, norm.bias]) == (1, 2) and evaluator.span([norm.bias]) == (1, 1)
    # What no stage is known to read may be read by any.
    assert evaluator.span([torch.zeros(1), head.bias]) == evaluator.span([torch.zeros(1)]) == (0, 2)
    assert evaluator.span([]) == (0, 2) and evaluator.span(model.parameters()) == (0, 2)
    shared = nn.Sequential(nn.Flatten(), nn.Linear(192, 192), nn.Linear(192, 192), nn.Linear(192, CLASSES))
    shared[2].weight = shared[1].weight
    evaluator = Evaluator(shared, [dataset()])
    assert evaluator.span([shared[2].weight]) == (0, 1) and evaluator.span([shared[2].bias]) == (1, 1)


@pytest.mark.parametrize("lie", [lambda x, _: x + 1, lambda x, _: x * 1.2], ids=["added", "scaled"])
def test_stages_that_lie_are_refused(lie: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sets = toy(), [dataset("a"), dataset("b", count=5)]

    def made(model: nn.Module, images: Tensor) -> Stages:
        return Stages((Stage(lambda x, _: model(x)), Stage(lie)))

    monkeypatch.setattr(home, "stages", made)
    with refused(RuntimeError, "'a'"):
        Evaluator(model, sets)
    lie = lambda x, _: x.clone()  # noqa: E731
    assert Evaluator(model, sets).stations == 2  # honest ones are used


# --- parts of a data set --------------------------------------------------------------------------


def test_among_are_the_named_sets_in_the_given_order_with_the_same_bits() -> None:
    model = transformer()
    sets = [dataset("a"), dataset("b", count=5, seed=2), dataset("c", count=20, seed=3, ood=False)]
    evaluator = Evaluator(model, sets, batch_size=8, memory_limit=10**9, normalize_logits=True)
    whole = evaluator.scores()
    for names in ("a", "b", "ca", "bac"):
        some = evaluator.among(names)
        assert [data.name for data in some.datasets] == list(names)
        assert some.model is model and some.stations == evaluator.stations and some.normalize_logits
        for got, name in zip(some.feeds, names, strict=True):
            assert got is evaluator.feeds["abc".index(name)]  # no copy of the images
        scores = some.scores()
        assert list(scores) == list(names)
        for name in names:
            assert torch.equal(scores[name].losses, whole[name].losses)
            assert torch.equal(scores[name].correct, whole[name].correct)
    assert evaluator.datasets == sets and evaluator.among(["b"]).among(["b"]).datasets == sets[1:2]
    with pytest.raises(KeyError, match="d"):
        evaluator.among(["a", "d"])


@pytest.mark.parametrize("size", [1, 10, 36, 37, 40, None])
def test_parts_cover_a_set_in_order_and_share_its_memory(size: int | None) -> None:
    model = staged()
    data = dataset("b", labels=torch.tensor([1, 4, 5, 4] * 9 + [1]), classes=torch.tensor([5, 4, 1]))
    evaluator = Evaluator(model, [dataset("a", count=9), data], batch_size=7, normalize_logits=True)
    parts = evaluator.parts(size, "b")
    sizes = [len(part.datasets[0].labels) for part in parts]
    assert sizes == ([37] if size is None else [min(size, 37 - i) for i in range(0, 37, size)])
    whole = evaluator.scores()["b"]
    losses = torch.cat([part.scores()["b"].losses for part in parts])
    torch.testing.assert_close(losses, whole.losses, rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.cat([part.scores()["b"].correct for part in parts]), whole.correct)
    assert all(part.model is model and part.normalize_logits for part in parts)
    first = [part.feeds[0].images.data_ptr() for part in parts]
    step = 3 * 8 * 8 * (size or 37)
    assert first == [evaluator.feeds[1].images.data_ptr() + i * step for i in range(len(parts))]
    assert [d.name for d in evaluator.datasets] == ["a", "b"]  # itself unchanged


# --- gradient and curvature -----------------------------------------------------------------------


class Idle(nn.Sequential):
    """With a weight that nothing reads."""

    def __init__(self) -> None:
        super().__init__(*staged())
        self.register_parameter("unused", nn.Parameter(torch.ones(3)))

    def forward(self, images: Tensor) -> Tensor:
        for module in list(self)[:6]:
            images = module(images)
        return images


@pytest.mark.parametrize("batch", [10, 64])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_gradient_is_that_of_the_mean_loss_over_all_images(batch: int, normalize: bool) -> None:
    model = Idle().train()
    model[5].bias.requires_grad_(False)
    sets = [dataset("a"), dataset("b", count=8)]
    evaluator = Evaluator(model, sets, batch, normalize_logits=normalize)
    weights = list(model.parameters())
    loss, slopes = evaluator.gradient(weights)
    double = copy.deepcopy(model).double().eval().requires_grad_(True)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    images, labels = (torch.cat([getattr(d, k) for d in sets]) for k in ("images", "labels"))
    logits = double((images.double() / 255 - mean) / std)
    if normalize:
        logits = logits - logits.mean(1, keepdim=True)
        logits = logits / logits.norm(dim=1, keepdim=True)
    truth = nn.functional.cross_entropy(logits, labels)
    expected = torch.autograd.grad(truth, list(double.parameters()), allow_unused=True)
    assert loss == pytest.approx(float(truth.detach()), rel=1e-6)
    for got, slope in zip(slopes, expected, strict=True):
        slope = torch.zeros_like(got).double() if slope is None else slope
        torch.testing.assert_close(got.double(), slope, rtol=1e-4, atol=1e-6)
        assert not got.requires_grad
    assert not slopes[0].any() and sum(bool(s.any()) for s in slopes) == 6  # the unused one comes first
    assert [w.requires_grad for w in weights] == [w is not model[5].bias for w in weights]
    assert all(w.grad is None for w in weights) and all(m.training for m in model.modules())
    torch.testing.assert_close(evaluator.gradient(weights[3:4])[1][0], slopes[3], rtol=1e-5, atol=1e-7)
    _, part = evaluator.parts(None, "b")[0].gradient(weights)
    assert not torch.allclose(part[1], slopes[1])


@pytest.mark.parametrize("call", ["gradient", "curvature"])
def test_flags_are_restored_when_a_gradient_fails(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = staged().train().requires_grad_(False)
    evaluator = Evaluator(model, [dataset()], batch_size=10)
    calls = 0

    def fail(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return x.relu()

    monkeypatch.setattr(model[2], "forward", fail)
    weights = list(model.parameters())
    arguments = [weights] if call == "gradient" else [weights, [torch.ones_like(w) for w in weights]]
    with pytest.raises(KeyboardInterrupt):
        getattr(evaluator, call)(*arguments)
    assert not any(w.requires_grad for w in weights) and all(w.grad is None for w in weights)
    assert all(m.training for m in model.modules())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_gradients_need_no_gradients_enabled() -> None:
    model = staged()
    evaluator = Evaluator(model, [dataset()])
    weights = list(model.parameters())
    expected = evaluator.gradient(weights)
    with torch.no_grad():
        loss, slopes = evaluator.gradient(weights)
        assert not torch.is_grad_enabled()
    assert loss == expected[0] and all(map(torch.equal, slopes, expected[1]))


def test_curvature_is_that_of_the_exact_hessian() -> None:
    model, data = staged(), dataset(count=23)
    model[0] = nn.Conv2d(3, 4, 3, stride=3)
    model[2] = nn.Tanh()
    model[5] = nn.Linear(16, CLASSES)
    evaluator = Evaluator(model, [data], batch_size=9)
    weights = list(model.parameters())
    double = copy.deepcopy(model).double().eval()
    names = [name for name, _ in double.named_parameters()]
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    images = (data.images.double() / 255 - mean) / std

    def loss(*values: Tensor) -> Tensor:
        logits = torch.func.functional_call(double, dict(zip(names, values, strict=True)), (images,))
        return nn.functional.cross_entropy(logits, data.labels)

    values = tuple(p.detach() for p in double.parameters())
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(w.shape, generator=generator) for w in weights]
    _, products = torch.autograd.functional.hvp(loss, values, tuple(v.double() for v in directions))
    expected = [float((v * h).sum()) for v, h in zip(directions, products, strict=True)]
    got = evaluator.curvature(weights, directions)
    assert got.dtype == torch.float64 and not got.requires_grad
    assert got.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-5)
    # Of some weights alone: without the terms that couple them with the rest.
    (alone,) = evaluator.curvature(weights[:1], directions[:1]).tolist()
    only = (directions[0].double(), *(torch.zeros_like(v) for v in values[1:]))
    _, products = torch.autograd.functional.hvp(loss, values, only)
    assert alone == pytest.approx(float((directions[0] * products[0]).sum()), rel=1e-3)
    assert abs(alone - expected[0]) > 1e-2 * abs(alone)
    assert all(w.grad is None and w.requires_grad for w in weights)


@pytest.mark.slow(only="^2$")
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_batches_side_by_side_change_no_bit(threads: int) -> None:
    """Also where there are more threads than batches, and more than one thread for each."""
    model = transformer()
    weights = list(model.parameters())
    signs = [torch.where(torch.rand_like(w) < 0.5, -1.0, 1.0) for w in weights]
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            evaluator = Evaluator(model, [dataset("a", 37), dataset("b", 11)], batch_size=10)
            walk = evaluator.walk()
            walk.advance(2)
            scores = [evaluator.scores(), walk.scores()]
            losses = [part[name].losses for part in scores for name in ("a", "b")]
            loss, gradient = evaluator.gradient(weights)
            found.append([*losses, torch.tensor(loss), *gradient, evaluator.curvature(weights, signs)])
            assert torch.get_num_threads() == count
        assert all(torch.equal(one, many) for one, many in zip(*found, strict=True))
        with pytest.raises(ZeroDivisionError), evaluator.runtime.scoring():
            evaluator.runtime.images.map(evaluator.feeds, lambda *_: 1 / 0, lambda *_: None)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_curvature_goes_through_attention() -> None:
    """Fused attention kernels cannot be differentiated twice; by differences of gradients they can."""
    model = transformer()
    evaluator = Evaluator(model, [dataset(count=16)])
    weights = list(model.parameters())
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(w.shape, generator=generator) for w in weights]
    got = evaluator.curvature(weights, directions)
    slopes, step = [], 2e-3
    for sign in (1, -1):
        with torch.no_grad():
            for weight, v in zip(weights, directions, strict=True):
                weight.add_(v, alpha=sign * step)
        slopes.append(evaluator.gradient(weights)[1])
        with torch.no_grad():
            for weight, v in zip(weights, directions, strict=True):
                weight.sub_(v, alpha=sign * step)
    expected = torch.stack(
        [
            (v.double() * (a - b).double()).sum() / (2 * step)
            for v, a, b in zip(directions, *slopes, strict=True)
        ]
    )
    assert (got - expected).abs().max() < 0.02 * expected.abs().max()
    assert expected.abs().max() > 0.1


def test_an_evaluator_on_other_data_knows_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sets = staged(), [dataset("a"), dataset("b", count=7)]
    first, alone = Evaluator(model, sets[:1], batch_size=10), Evaluator(model, sets[1:], 10, "fp32", True)
    monkeypatch.setattr(home, "stages", lambda *_: pytest.fail("traced again"))
    other = first.on(sets[1:], normalize_logits=True)
    assert other.stages is first.stages and other.model is model and other.batch_size == 10
    assert not first.normalize_logits and [data.name for data in first.datasets] == ["a"]
    assert_plain(first.scores(), model, sets[:1])
    assert torch.equal(other.scores()["b"].losses, alone.scores()["b"].losses)
    with refused(ValueError, "'c'", 99, CLASSES):
        first.on([dataset("c", labels=torch.full((37,), 99))])
