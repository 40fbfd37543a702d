"""Small models and data sets for the evaluator's tests, and scores of them by whole forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor, nn

from rft_fast.clip.classifier import ImageClassifier, ZeroShotClassifier
from rft_fast.datasets import Dataset
from rft_fast.evaluate import Scores

CLASSES = 6
State = dict[str, Tensor]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


class Toy(nn.Module):
    """Small, with what an evaluator could trip over: dropout, batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4 * 6 * 6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        features = self.drop(self.norm(self.conv(images)).relu()).flatten(1)
        logits: Tensor = self.head(features)
        return logits


class Opaque(Toy):
    """The same, but torch.fx cannot trace it."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) if len(images) else images


def toy(seed: int = 0, kind: type[Toy] = Toy) -> Toy:
    torch.manual_seed(seed)
    model = kind()
    for tensor in (*model.parameters(), model.norm.running_mean, model.norm.running_var):
        assert tensor is not None
        tensor.data = torch.rand_like(tensor) - 0.3 * (tensor.ndim > 1)
    return model


# The first module of each stage of `staged`: what has no weights goes with the stage before.
STARTS = (0, 1, 5)


def staged(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(144, CLASSES),
    )


def deep(width: int = 12, seed: int = 0) -> nn.Sequential:
    """Four stages with boundaries of three shapes, two of them the same."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(192, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, 8),
        nn.GELU(),
        nn.Linear(8, CLASSES),
    )


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def transformer(layers: int = 1) -> ImageClassifier:
    torch.manual_seed(0)
    tower = VisionTransformer(
        image_size=8, patch_size=4, width=8, layers=layers, heads=2, mlp_ratio=2.0, output_dim=6
    )
    model = ImageClassifier(tower, nn.Linear(6, CLASSES)).eval()
    return shaken(model)


def resnet() -> ImageClassifier:
    """CLIP's own kind, for images of 32 x 32: convolutions, then attention with its tokens first."""
    torch.manual_seed(0)
    model = ImageClassifier(ModifiedResNet([1, 1, 1, 1], 16, 4, 32, 8), nn.Linear(16, CLASSES)).eval()
    return shaken(model)


def two_towers(templates: int = 2) -> ZeroShotClassifier:
    torch.manual_seed(0)
    visual = VisionTransformer(
        image_size=8, patch_size=4, width=8, layers=2, heads=2, mlp_ratio=2.0, output_dim=6
    )
    text = TextTransformer(
        context_length=7, vocab_size=20, width=8, heads=2, layers=2, mlp_ratio=2.0, output_dim=6
    )
    prompts = torch.randint(1, 19, (CLASSES, templates, 7))
    prompts[..., 5] = 19  # the end of text, where features are taken
    model = ZeroShotClassifier(visual, text, prompts, nn.Parameter(torch.tensor(2.0))).eval()
    return shaken(model)


def shaken(model: Any, size: float = 0.3) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return model


def random_state(model: nn.Module, seed: int, size: float = 1.0) -> State:
    """Random weights and buffers; variances are positive, counts those of the model plus the seed."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in model.state_dict().items():
        value = size * torch.randn(tensor.shape, generator=generator)
        if not tensor.is_floating_point():
            value = tensor + seed
        elif name.endswith("running_var"):
            value = value.abs() + 0.5
        found[name] = value
    return found


def dataset(name: str = "set", count: int = 37, seed: int = 1, **changes: Any) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    fields = {
        "images": torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8),
        "labels": torch.randint(0, CLASSES, (count,), generator=generator),
        "mean": MEAN,
        "std": STD,
    }
    return Dataset(name, **{**fields, **changes})


def pictures(name: str, count: int, ood: bool, side: int = 2) -> Dataset:
    """Few pixels and four classes, for brute force."""
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (count,), generator=generator)
    return Dataset(name, images, labels, MEAN, STD, ood=ood)


def normalised(data: Dataset, part: slice = slice(None)) -> Tensor:
    """The images as a model takes them, but in float64."""
    mean, std = (torch.tensor(values).double().view(3, 1, 1) for values in (data.mean, data.std))
    return (data.images[part].double() / 255 - mean) / std


def plain(model: nn.Module, data: Dataset, batch: int = 1000) -> Tensor:
    """Losses from whole forwards, batch by batch, in float32."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    was, losses = model.training, []
    model.eval()
    with torch.inference_mode():
        for images, labels in zip(data.images.split(batch), data.labels.split(batch), strict=True):
            logits = model(images.float().div(255).sub(mean).div(std))
            losses.append(nn.functional.cross_entropy(logits, labels, reduction="none"))
    model.train(was)
    return torch.cat(losses)


def assert_plain(scores: dict[str, Scores], model: nn.Module, sets: Sequence[Dataset]) -> None:
    """Each set's losses are those of one whole forward pass of the model as it is now, up to rounding."""
    assert list(scores) == [data.name for data in sets]
    for data in sets:
        close(scores[data.name].losses, plain(model, data))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)


class Told:
    """A study's sink that keeps what it is told."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.rows: list[dict[str, object]] = []

    def __call__(self, number: int, rows: list[dict[str, object]]) -> None:
        self.numbers.append(number)
        self.rows += rows


@contextmanager
def counted(*modules: nn.Module) -> Iterator[list[list[int]]]:
    """For each module, the sizes of the batches that go through it."""
    sizes: list[list[int]] = [[] for _ in modules]

    def hook(seen: list[int]) -> Callable[..., None]:
        return lambda module, arguments, output: seen.append(len(arguments[0]))

    handles = [m.register_forward_hook(hook(seen)) for m, seen in zip(modules, sizes, strict=True)]
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()


class Recorder:
    """Keeps what it is to record, without running it; replaying runs it."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, body: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            body()

        return replay
