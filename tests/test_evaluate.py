"""The evaluator against float64 by hand: losses, hits, class subsets, paired errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rft_fast.datasets import Dataset
from rft_fast.evaluate import Evaluator, Scores

CLASSES = 6
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


class Toy(nn.Module):
    """Small, with what an evaluator could trip over: dropout, batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4 * 6 * 6, CLASSES)
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        features = self.drop(self.norm(self.conv(images)).relu()).flatten(1)
        logits: Tensor = self.head(features)
        return logits


def toy(seed: int = 0) -> Toy:
    torch.manual_seed(seed)
    model = Toy()
    for tensor in (*model.parameters(), model.norm.running_mean, model.norm.running_var):
        assert tensor is not None
        tensor.data = torch.rand_like(tensor) - 0.3 * (tensor.ndim > 1)
    return model


def dataset(name: str = "set", count: int = 37, seed: int = 1, **changes: Any) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    fields = {
        "images": torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8),
        "labels": torch.randint(0, CLASSES, (count,), generator=generator),
        "mean": MEAN,
        "std": STD,
    }
    return Dataset(name, **{**fields, **changes})


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
        assert (scores.losses - losses).abs().max() < 1e-5
        assert torch.equal(scores.correct, hits)
        assert scores.samples == len(losses) and scores.nonfinite == 0
        assert scores.loss == pytest.approx(losses.mean().item(), rel=1e-6)
        assert scores.accuracy == pytest.approx(hits.double().mean().item())


def test_batches_cover_each_set_once() -> None:
    model = toy()
    evaluator = Evaluator(model, [dataset("a"), dataset("b", count=5)], batch_size=16)
    model.batches.clear()
    evaluator.scores()
    assert model.batches == [16, 16, 5, 5]


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
    assert (got.losses - losses).abs().max() < 1e-5
    assert torch.equal(got.correct, hits)
    assert not torch.allclose(truth(model, data)[0], losses)


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

    class Watching(Toy):
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
        Evaluator(Watching(), [dataset()]).scores()
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
        with pytest.raises(ValueError, match="same samples, got 1 and 4"):
            difference(one)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (dataset(labels=torch.full((37,), CLASSES)), "class 6 is beyond the head, which has 6"),
        (dataset(labels=torch.zeros(37).long(), classes=torch.tensor([0, 9])), "class 9 is beyond"),
        (dataset(images=torch.zeros(37, 3, 9, 9).byte()), "cannot take its 3x9x9 images"),
        (dataset(class_names=("a",) * 5), "5 class folders but 6 classes"),
    ],
)
def test_data_that_do_not_fit_are_refused_at_once(data: Dataset, words: str) -> None:
    with pytest.raises(ValueError, match=r"^Evaluator: data set 'set': ") as caught:
        Evaluator(toy(), [data])
    assert words in str(caught.value)


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
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"precision": "bf16"}, "precision must be one of"),
        ({"batch_size": 0}, "batch_size must be an int of at least 1"),
        ({"batch_size": 2.0}, "batch_size must be an int of at least 1"),
        ({"datasets": []}, "no data set"),
        ({"datasets": [dataset(), dataset()]}, "distinct names"),
        ({"model": toy().half()}, r"needs a float32 model, this one has \['torch.float16'\]"),
        ({"model": nn.Flatten()}, "no weights"),
        ({"model": Flat()}, r"must return logits \[n, classes\], for one image it gave \[1\]"),
    ]
    for changes, words in refusals:
        with pytest.raises(ValueError, match=words):
            Evaluator(**{**good, **changes})
    with pytest.raises(TypeError, match=r"^Evaluator: model must be an nn.Module, got function"):
        Evaluator(**{**good, "model": lambda images: images})
    with pytest.raises(TypeError, match=r"^Evaluator: datasets must hold Datasets, got str"):
        Evaluator(**{**good, "datasets": ["mnist"]})


def test_a_model_that_moved_is_refused() -> None:
    evaluator = Evaluator(model := toy(), [dataset()])
    model.to("meta")
    with pytest.raises(ValueError, match="moved from cpu to meta"):
        evaluator.scores()
