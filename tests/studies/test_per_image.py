"""Noise of its own for each image against brute force: the model with each image's own weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from support.tiny_models import (
    CLASSES,
    MEAN,
    STD,
    dataset,
    deep,
    resnet,
    shaken,
    staged,
    transformer,
    two_towers,
)
from support.wording import refused, warned
from torch import Tensor, nn
from torch.nn import functional as F

from rft_fast import studies
from rft_fast.datasets import Dataset
from rft_fast.evaluate import Evaluator, flips
from rft_fast.evaluate.flipped import Flipped, NoRule
from rft_fast.evaluate.flipping import Perturbation
from rft_fast.kernels import noise_like
from rft_fast.kernels.signs import signs
from rft_fast.path import Path
from rft_fast.run.cost.counting import count
from rft_fast.studies import Protocol

IMAGE = Protocol(coupling="image", noise_batch=4)


def timm_model(name: str, **options: object) -> nn.Module:
    model: nn.Module = timm.create_model(name, num_classes=CLASSES, **options)
    return model


SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}
# Name -> the model, the side of its images.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "sequential": (deep, 8),
    "convolution": (staged, 8),
    "open_clip vit": (lambda: transformer(2), 8),
    "open_clip resnet": (resnet, 32),
    "timm vit": (lambda: timm_model("vit_tiny_patch16_224", img_size=32, **SMALL), 32),
    "timm beit": (lambda: timm_model("beit_base_patch16_224", img_size=32, **SMALL), 32),
    "timm eva02": (lambda: timm_model("eva02_tiny_patch14_224", img_size=28, depth=2), 28),
    "timm convnext": (lambda: timm_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)), 64),
    "timm resnet": (lambda: timm_model("test_resnet"), 32),
    "timm swin": (
        lambda: timm_model(
            "swin_tiny_patch4_window7_224", img_size=56, embed_dim=8, depths=(1, 1), num_heads=(2, 2)
        ),
        56,
    ),
}


def pictures(count: int, side: int) -> Dataset:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    return Dataset("set", images, torch.randint(0, CLASSES, (count,), generator=generator), MEAN, STD)


def prepared(data: Dataset) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (data.images.float() / 255 - mean) / std


def setting(model: nn.Module, data: Dataset) -> tuple[Path, Evaluator]:
    """The path from the model's weights to some nearby."""
    model.eval()
    zero = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    one = {
        name: tensor * (1 + 0.1 * torch.randn(tensor.shape, generator=generator))
        if tensor.is_floating_point() and "running" not in name
        else tensor
        for name, tensor in zero.items()
    }
    return Path(model, zero, one), Evaluator(model, [data])


# --- brute force ----------------------------------------------------------------------------------


def shape_of_signs(model: nn.Module, name: str) -> tuple[int, int]:
    """Signs along the first dimension of a weight, and along the rest; the latter 0: one for each element."""
    home, _, own = name.rpartition(".")
    module, weight = model.get_submodule(home), model.get_parameter(name)
    if isinstance(module, nn.Conv2d) and own == "weight":
        if module.stride == module.kernel_size and module.padding in ((0, 0), 0) and module.groups == 1:
            return len(weight), weight[0].numel()
        return len(weight), module.in_channels
    linear = isinstance(module, nn.Linear) and own == "weight"
    if linear or own == "in_proj_weight" or (own == "proj" and weight.ndim == 2):
        return weight.shape[0], weight.shape[1]
    return weight.numel(), 0


def of_image(
    model: nn.Module, name: str, base: Tensor, seed: int, draw: int, image: int, block: int
) -> Tensor:
    """D o (r s^T) as written out."""
    rows, columns = shape_of_signs(model, name)
    found = signs(seed, draw, torch.tensor([image]), block, rows + columns)[0]
    if not columns:
        return base * found.view(base.shape)
    r, s = found[:rows], found[rows:]
    signed = torch.empty_like(base)
    if base.ndim == 2 or columns == base[0].numel():
        return base * torch.outer(r, s).view(base.shape)
    per_group = base.shape[1]
    groups = columns // per_group
    for o in range(len(base)):
        first = (o // (len(base) // groups)) * per_group
        for i in range(per_group):
            signed[o, i] = base[o, i] * r[o] * s[first + i]
    return signed


def loss_of(model: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(model(image[None]), label[None])


class Brute:
    """Losses of each image with the weights that are its own."""

    def __init__(self, path: Path, data: Dataset) -> None:
        self.model = copy.deepcopy(path.model)
        self.names = [weight.name for weight in path.weights()]
        sizes = [-(-weight.live.numel() // 4) for weight in path.weights()]
        self.blocks = dict(zip(self.names, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
        self.images, self.labels = prepared(data), data.labels

    def change(
        self, image: int, bases: dict[str, Tensor], seed: int, draw: int
    ) -> tuple[float, float, list[float]]:
        """One image's loss, that less its loss without noise, and <gradient, perturbation> by weight."""
        weights = {name: self.model.get_parameter(name) for name in bases}
        clean = loss_of(self.model, self.images[image], self.labels[image])
        gradients = torch.autograd.grad(
            clean, list(weights.values()), allow_unused=True, materialize_grads=True
        )
        own = {
            name: of_image(self.model, name, base, seed, draw, image, self.blocks[name])
            for name, base in bases.items()
        }
        slopes = [float((g.double() * own[n].double()).sum()) for g, n in zip(gradients, own, strict=True)]
        with torch.no_grad():
            before = {name: weight.clone() for name, weight in weights.items()}
            for name, weight in weights.items():
                weight.add_(own[name])
            moved = loss_of(self.model, self.images[image], self.labels[image])
            for name, weight in weights.items():
                weight.copy_(before[name])
        return float(moved), float(moved) - float(clean.detach()), slopes


@pytest.mark.slow(but="sequential|convolution|open_clip vit")
@pytest.mark.parametrize("name", FAMILIES)
def test_each_image_has_its_own_weights(name: str) -> None:
    torch.manual_seed(0)
    make, side = FAMILIES[name]
    data = pictures(3, side)
    model = make()
    path, evaluator = setting(model if name.startswith("open_clip") else shaken(model, 0.05), data)
    with path.at(0.6):
        brute = Brute(path, data)
        generator = torch.Generator().manual_seed(4)
        bases = {
            w.name: 0.1 * w.live.detach().abs() * torch.randn(w.live.shape, generator=generator)
            for w in path.weights()
        }
        layers = path.layers if len(path.layers) < 8 else path.layers[:: len(path.layers) // 8]
        changed = False
        for layer in [None, *layers]:
            chosen = path.weights(None if layer is None else [layer])
            weights = [Flipped(w.live, w.name, brute.blocks[w.name]) for w in chosen]
            first, last = (0, evaluator.stations - 1)
            if layer is not None:
                first, last = evaluator.span(path.tensors(layer))
            walk = evaluator.walk()
            walk.advance(first)
            perturbation = Perturbation([bases[w.name] for w in chosen], 7, 5)
            [(scores, controls)] = walk.flipped(weights, last, lambda _, p=perturbation: p, 1, True)
            for image in range(len(data.labels)):
                own = {w.name: bases[w.name] for w in chosen}
                loss, rise, slopes = brute.change(image, own, 7, 5)
                assert float(scores.losses[image]) == pytest.approx(loss, rel=2e-5, abs=2e-5), layer
                size = 1e-4 * (1 + sum(map(abs, slopes)))
                assert float(controls[image]) == pytest.approx(sum(slopes), abs=size), layer
                changed = changed or abs(rise) > 1e-3
        assert changed


@pytest.mark.parametrize("on", ["finetuned", "interpolated"])
@pytest.mark.parametrize("estimator", ["plain", "antithetic", "gradient"])
def test_rows_are_those_of_the_stated_numbering(estimator: str, on: str) -> None:
    torch.manual_seed(0)
    data, seed, rho, alpha, adaptive = dataset(count=6), 11, 0.3, 0.6, on == "finetuned"
    path, evaluator = setting(deep(), data)
    protocol = replace(
        IMAGE, estimator=estimator, on=on, seed=seed, noise="uniform", adaptive=adaptive, noise_batch=4
    )
    row = studies.sharpness(path, evaluator, [alpha], [rho], 4, protocol=protocol).iloc[0]
    ends = {w.name: (w.zeroshot.clone(), w.finetuned.clone()) for w in path.weights()}
    with path.at(alpha):
        brute = Brute(path, data)
    values = np.zeros((4, 2))
    for draw in range(4):
        number, sign = (draw // 2, 1 - 2 * (draw % 2)) if estimator == "antithetic" else (draw, 1)
        for part, images in enumerate((range(4), range(4, 6))):
            eps = noise_like(
                [w.live for w in path.weights()], seed, number * 2 + part, "uniform", "reference"
            )
            bases = {}
            for e, (name, (zero, one)) in zip(eps, ends.items(), strict=True):
                at = zero.lerp(one, alpha)
                size = (at.abs() if on == "interpolated" else alpha * one.abs()) if adaptive else 1.0
                if not adaptive and on == "finetuned":
                    size = alpha
                bases[name] = sign * rho * size * e
            changes = [brute.change(image, bases, seed, number) for image in images]
            rises = [rise - (sum(slopes) if estimator == "gradient" else 0) for _, rise, slopes in changes]
            values[draw, part] = np.mean(rises)
    shares = np.array([4, 2]) / 6
    assert row["sharpness"] == pytest.approx(float(values.mean(0) @ shares), abs=2e-5)
    if estimator == "antithetic":
        values = values.reshape(2, 2, 2).mean(1)
    error = math.sqrt(values.var(0, ddof=1) @ shares**2 / len(values))
    assert row["sharpness_se"] == pytest.approx(error, rel=0.01, abs=1e-6)
    assert (row["estimator"], row["draws"], row["noise_batch"]) == (f"{estimator}-image", 4, 4)


# --- signs ----------------------------------------------------------------------------------------


def philox(counter: Sequence[int], seed: int) -> list[int]:
    """Philox4x32-10 in whole numbers (Salmon et al., SC 2011)."""
    c, key = list(counter), [seed % 2**32, seed >> 32]
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return c


def test_signs_are_bits_of_philox() -> None:
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox(pi, 0x299F31D0A4093822) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    seed, draw, first, count = 0x123456789ABCDEF, 9, 77, 300
    images = torch.tensor([0, 5, 2**32 - 1])
    found = signs(seed, draw, images, first, count)
    assert found.shape == (3, count)
    for row, image in zip(found, images.tolist(), strict=True):
        for i in range(count):
            word = philox((first + i // 128, image, draw, 2), seed)[i % 128 // 32]
            assert row[i] == (1 if word >> i % 32 & 1 else -1)


def test_signs_are_balanced_and_independent() -> None:
    found = signs(3, 0, torch.arange(500), 0, 1024)
    other = signs(3, 1, torch.arange(500), 0, 1024)
    bound = 4.5 / math.sqrt(found.numel())
    for pairs in (found, found * other, found[1:] * found[:-1], found[:, 1:] * found[:, :-1]):
        assert abs(float(pairs.mean())) < bound
    assert float(found.mean(0).abs().max()) < 4.5 / math.sqrt(500)
    assert float(found.mean(1).abs().max()) < 4.5 / math.sqrt(1024)


def test_signs_do_not_depend_on_the_batch() -> None:
    whole = signs(3, 2, torch.arange(20), 5, 200)
    parts = [signs(3, 2, images, 5, 200) for images in torch.arange(20).split(7)]
    assert torch.equal(torch.cat(parts), whole)


def test_perturbations_of_images_are_uncorrelated_and_have_the_moments_of_the_noise() -> None:
    rho, draws = 0.4, 1500
    w = torch.tensor([[0.5, -2.0], [1.0, 3.0]])
    images = torch.arange(2)
    found = torch.empty(draws, 2, 2, 2)
    for draw in range(draws):
        base = rho * w.abs() * noise_like(w, 1, draw, impl="reference")
        s = signs(1, draw, images, 0, 4)
        found[draw] = base * s[:, :2, None] * s[:, None, 2:]
    unit = found / (rho * w.abs())
    assert float(unit.mean(0).abs().max()) < 4.5 / math.sqrt(draws)
    assert float((unit.pow(2).mean(0) - 1).abs().max()) < 4.5 * math.sqrt(2 / draws)
    assert float((unit.pow(4).mean(0) - 3).abs().max()) < 4.5 * math.sqrt(96 / draws)
    assert float((unit[:, 0] * unit[:, 1]).mean(0).abs().max()) < 4.5 / math.sqrt(draws)
    flat = unit.flatten(2)  # weights of one image
    for i, j in ((0, 1), (0, 3), (1, 2), (2, 3)):
        assert float((flat[..., i] * flat[..., j]).mean(0).abs().max()) < 4.5 / math.sqrt(draws)


# --- what decides the numbers, and what does not --------------------------------------------------


def layer_rows(protocol: Protocol = IMAGE, **how: object) -> dict[str, list[float]]:
    torch.manual_seed(0)
    path, evaluator = setting(transformer(1), dataset(count=11))
    chosen = {"batch_size", "memory_limit"} & set(how)
    if chosen:
        evaluator = Evaluator(path.model, evaluator.datasets, **{k: how.pop(k) for k in chosen})  # type: ignore[arg-type]
    rows = studies.layerwise_sharpness(path, evaluator, [0.6], [0.2, 0.5], 2, protocol=protocol, **how)  # type: ignore[arg-type]
    return {
        layer: group[["sharpness", "sharpness_se"]].to_numpy().ravel().tolist()
        for layer, group in rows.groupby("layer")
    }


def test_a_layer_alone_and_other_thread_counts_give_the_same_bits() -> None:
    whole = layer_rows()
    one = layer_rows(layers=["visual.transformer.resblocks.0.mlp.c_fc"])
    assert one == {name: whole[name] for name in one}
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            assert layer_rows() == whole
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("how", [{"batch_size": 3}, {"memory_limit": 40_000}])
def test_batches_and_pieces_change_no_more_than_roundings(how: dict[str, object]) -> None:
    whole, other = layer_rows(), layer_rows(**how)
    for layer, numbers in whole.items():
        assert other[layer] == pytest.approx(numbers, abs=2e-6), layer


def test_the_model_is_as_before() -> None:
    path, evaluator = setting(transformer(1), dataset(count=5))
    frozen = next(path.model.parameters())
    frozen.requires_grad_(False)
    before = path.checksum()
    studies.layerwise_sharpness(path, evaluator, [0.6], [0.2], 2, protocol=IMAGE)
    assert path.checksum() == before
    assert [p.requires_grad for p in path.model.parameters()].count(False) == 1
    assert not frozen.requires_grad


# --- the mean and its error -----------------------------------------------------------------------


def linear(n: int = 24) -> tuple[Path, Evaluator]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 1, 1), dtype=torch.uint8, generator=generator)
    data = Dataset("set", images, torch.randint(0, 2, (n,), generator=generator), MEAN, STD)
    return setting(shaken(model, 1.0), data)


@pytest.mark.parametrize("estimator", ["plain", "gradient"])
def test_the_mean_is_that_of_shared_noise(estimator: str) -> None:
    path, evaluator = linear()
    how = {"estimator": estimator, "on": "interpolated"}
    shared = studies.sharpness(path, evaluator, [0.6], [0.8], 1000, protocol=Protocol(**how)).iloc[0]  # type: ignore[arg-type]
    protocol = Protocol(**how, coupling="image", noise_batch=8)  # type: ignore[arg-type]
    image = studies.sharpness(path, evaluator, [0.6], [0.8], 100, protocol=protocol).iloc[0]
    error = math.hypot(shared["sharpness_se"], image["sharpness_se"])
    assert abs(shared["sharpness"] - image["sharpness"]) < 4 * error
    assert error < shared["sharpness"] / 4  # so that was a test


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["plain", "antithetic", "gradient"])
def test_standard_errors_cover_what_seeds_show(estimator: str) -> None:
    path, evaluator = linear()
    found = []
    for seed in range(100):
        protocol = replace(IMAGE, estimator=estimator, seed=seed, on="interpolated", noise_batch=8)
        row = studies.sharpness(path, evaluator, [0.6], [0.8], 8, protocol=protocol).iloc[0]
        found.append((row["sharpness"], row["sharpness_se"]))
    values, errors = np.array(found).T
    assert values.std(ddof=1) == pytest.approx(math.sqrt((errors**2).mean()), rel=0.25)
    truth = values.mean()
    assert np.mean(np.abs(values - truth) < 2.1 * errors) >= 0.88


def test_a_goal_is_reached() -> None:
    path, evaluator = linear()
    protocol = replace(IMAGE, goal=0.02, on="interpolated")
    row = studies.sharpness(path, evaluator, [0.6], [0.8], 4, protocol=protocol).iloc[0]
    assert row["reached"] and row["draws"] > 4 and row["sharpness_se"] <= 0.02
    fixed = studies.sharpness(
        path, evaluator, [0.6], [0.8], int(row["draws"]), protocol=replace(protocol, goal=None)
    )
    assert fixed.iloc[0]["sharpness"] == pytest.approx(row["sharpness"], abs=1e-12)


def test_no_noise_at_zeroshot() -> None:
    path, evaluator = linear()
    row = studies.layerwise_sharpness(path, evaluator, [0.0], [0.8], 4, protocol=IMAGE).iloc[0]
    assert (row["sharpness"], row["sharpness_se"], row["estimator"]) == (0, 0, "gradient-image")


# --- what cannot have noise per image -------------------------------------------------------------


def test_text_towers_share_noise_per_batch() -> None:
    path, evaluator = setting(two_towers(), dataset(count=6))
    with warned(UserWarning, "the model"):
        image = studies.sharpness(path, evaluator, [0.6], [0.1], 2, protocol=IMAGE)
    shared = studies.sharpness(path, evaluator, [0.6], [0.1], 2, protocol=replace(IMAGE, coupling="shared"))
    assert image.drop(columns="seconds").equals(shared.drop(columns="seconds"))
    assert image["estimator"].tolist() == ["gradient"]


class Odd(nn.Module):
    """Reads its matrix by an operation without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Parameter(torch.randn(192, CLASSES))
        self.last = nn.Linear(CLASSES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(torch.einsum("ni,io->no", x.flatten(1), self.odd)))
        return out


def test_a_large_weight_without_a_rule_has_noise_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flips, "LARGEST", 1000)
    path, evaluator = setting(Odd(), dataset(count=6))
    with warned(UserWarning, "odd"):
        rows = studies.layerwise_sharpness(path, evaluator, [0.6], [0.1], 2, protocol=IMAGE)
    assert dict(zip(rows["layer"], rows["estimator"], strict=True)) == {
        "odd": "gradient",
        "last": "gradient-image",
    }


def test_a_small_weight_without_a_rule_has_signs_by_element() -> None:
    path, evaluator = setting(Odd(), dataset(count=6))
    with path.at(0.6):
        weight = Flipped(path.weights(["odd"])[0].live, "odd", 0)
        base = 0.3 * torch.ones_like(weight.live)
        [(scores, _)] = evaluator.walk().flipped([weight], 0, lambda _: Perturbation([base], 1, 2), 1, False)
        s = signs(1, 2, torch.arange(6), 0, weight.live.numel()).view(6, *weight.live.shape)
        x = prepared(evaluator.datasets[0]).flatten(1)
        hidden = torch.einsum("ni,nio->no", x, weight.live + base * s)
        logits = path.model.last(torch.tanh(hidden))
    losses = F.cross_entropy(logits, evaluator.datasets[0].labels, reduction="none")
    torch.testing.assert_close(scores.losses, losses.detach(), rtol=1e-5, atol=1e-5)


class Blind(nn.Module):
    """Hands its weight to what rules cannot look into."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(CLASSES))
        self.last = nn.Linear(192, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(x.flatten(1)) * torch.tensor(self.scale.tolist())
        return out


class Hidden(Blind):
    """Hides its weight from rules."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(x.flatten(1))
        with torch._C.DisableTorchFunction():
            return out * self.scale


@pytest.mark.filterwarnings("ignore:stages")
@pytest.mark.parametrize(("kind", "why"), [(Blind, "vmap"), (Hidden, "scale")])
def test_a_weight_that_no_rule_sees_cannot_differ(kind: type[nn.Module], why: str) -> None:
    path, evaluator = setting(kind(), dataset(count=6))
    walk = evaluator.walk()
    scale = Flipped(path.weights(["scale"])[0].live, "scale", 0)
    with pytest.raises(NoRule, match=why):
        walk.flipped([scale], 0, lambda _: Perturbation([], 0, 0), 1, False)


@pytest.mark.parametrize("estimator", ["hessian", "apgd-l2", "apgd-linf"])
def test_estimators_without_draws_are_refused(estimator: str) -> None:
    with refused(ValueError, estimator, "image"):
        Protocol(estimator, coupling="image")  # type: ignore[arg-type]


def test_other_couplings_are_refused() -> None:
    with refused(ValueError, "coupling", "twin"):
        Protocol(coupling="twin")  # type: ignore[arg-type]


# --- what it will cost ----------------------------------------------------------------------------


def test_work_is_counted() -> None:
    path, evaluator = setting(transformer(1), dataset(count=5))
    sizes = {"set": (300, False)}

    def study(path: Path, evaluator: Evaluator) -> object:
        return studies.sharpness(path, evaluator, [0.6], [0.1], 3, protocol=Protocol(coupling="image"))

    work = count(study, path, evaluator, sizes)
    assert work.images[0] == 300 * (1 + 2 * 3)  # the clean model, and two products for each draw
    assert sum(work.gradients) == 300
    assert work.noisy == 3 * 3 * sum(w.live.numel() for w in path.weights())  # draws, parts
