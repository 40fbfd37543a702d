"""Models and images of the sweeps: CLIP's shapes with random weights, and structured images.

Random weights are enough for timing. To give losses and their curvature a realistic size, the head looks for
the patterns that the images are made of, and its scale gives logits the spread of CLIP's.
"""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor, nn

import rft_fast as rft
from rft_fast import checkpoints, datasets
from rft_fast.clip import architectures
from rft_fast.clip.classifier import ImageClassifier
from rft_fast.clip.endpoints import Ends, Setup
from rft_fast.config import zoo
from rft_fast.datasets import Dataset
from rft_fast.evaluate import Evaluator
from rft_fast.evaluate.precision import cast

ARCHS = ("ViT-B-32", "ViT-L-14", "tiny")
PATTERNS = 32  # classes that have images; tiny has 10
SPREAD = 3.0  # standard deviation of a CLIP's logits over ImageNet's classes, roughly
DISTANCE = 0.02  # of the fine-tuned weights from the zero-shot ones, relative to each weight
TUNED = 2**40  # seed of the fine-tuned weights, far from those of the draws

State = dict[str, Tensor]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Case:
    """Both ends as float32 state dicts on the device, and images to score.

    For each precision there is one live model, one path and one evaluator, shared by all contenders: every
    study, and every peer, writes the whole model before it reads it.

    patterns: classes that have images. batch: images per batch of an evaluator; None: it chooses.
    """

    arch: str
    zeroshot: State
    finetuned: State
    data: Dataset
    device: torch.device
    patterns: int
    batch: int | None = None
    # Precision -> seconds of cutting its model into stages, and why it was not cut.
    cut: dict[str, tuple[float, str | None]] = field(default_factory=dict)
    _made: dict[tuple[str, str], Any] = field(default_factory=dict, repr=False)

    def live(self, precision: str = "fp32") -> nn.Module:
        """Return the model of a precision; at the zero-shot end, unless it was written since."""
        return self._once(("live", precision), lambda: live(self.arch, self.zeroshot, precision))

    def path(self, precision: str = "fp32") -> rft.Path:
        def make() -> rft.Path:
            return rft.Path(self.live(precision), self.zeroshot, self.finetuned)

        return self._once(("path", precision), make)

    def evaluator(self, precision: str = "fp32") -> Evaluator:
        """Return the evaluator of all images in a precision."""

        def make() -> Evaluator:
            model, start = self.path(precision).model, perf_counter()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = Evaluator(model, [self.data], self.batch, precision)
            why = [str(warning.message) for warning in caught if len(found.stages.image) == 1]
            self.cut[precision] = perf_counter() - start, "; ".join(why) or None
            for warning in caught:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
            return found

        return self._once(("evaluator", precision), make)

    def _once(self, key: tuple[str, str], make: Callable[[], T]) -> T:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @cached_property
    def layers(self) -> dict[str, list[str]]:
        """All layers in execution order -> their parameters."""
        path = self.path()
        names = in_order(path, self.evaluator())
        return {name: [weight.name for weight in path.weights([name])] for name in names}

    def some_layers(self, count: int) -> dict[str, list[str]]:
        """Return ``count`` layers, evenly spread over the depth of the model."""
        return {name: self.layers[name] for name in spread(list(self.layers), count)}

    def batches(self, size: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
        """Return the images as peers take them: normalised on the device, once."""
        parts = zip(self.data.images.split(size), self.data.labels.split(size))
        return [
            (normalised(images.to(self.device), self.data).to(dtype), labels.to(self.device))
            for images, labels in parts
        ]


class Digits:
    """The digits zoo, which has trained weights: its data sets, and paths of its first models."""

    def __init__(self, device: torch.device, samples: int, models: int) -> None:
        source = zoo.digits()
        self.device, self.arch = device, source.arch
        self.zeroshot = checkpoints.load(source.zeroshot.source)
        self.finetuned = {
            name: checkpoints.load(weights.source)
            for name, weights in list(source.finetuned.items())[:models]
        }
        preprocess = architectures.preprocess(source.arch)
        self.data = [
            datasets.load(name, data.path, preprocess, samples, data.ood)
            for name, data in source.data.items()
        ]

    def path(self, model: str, precision: str = "fp32") -> rft.Path:
        ends = Ends(Setup(self.arch), self.zeroshot)
        return rft.Path(cast(ends.live.to(self.device), precision), *ends.pair(self.finetuned[model]))


def in_order(path: rft.Path, evaluator: Evaluator) -> list[str]:
    """Return the layers in execution order."""
    return sorted(path.layers, key=lambda name: evaluator.stage_of(path.tensors(name)))


def spread(names: Sequence[str], count: int) -> list[str]:
    """Return ``count`` of them, evenly spread; all if there are no more."""
    count = min(count, len(names))
    return [names[int((i + 0.5) * len(names) / count)] for i in range(count)]


def normalised(images: Tensor, data: Dataset) -> Tensor:
    mean, std, white = (torch.tensor(n, device=images.device) for n in (data.mean, data.std, 255.0))
    return images.float().div_(white).sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))


def cut(data: Dataset, samples: int) -> Dataset:
    """Return a data set of its first images."""
    return replace(data, images=data.images[:samples], labels=data.labels[:samples])


def make_case(arch: str, samples: int, device: torch.device, batch: int | None = None, seed: int = 0) -> Case:
    """Return the same weights and images on every call; everything large is made on the device.

    batch: images per batch of the evaluators; None: they choose.
    """
    classes = 10 if arch == "tiny" else 1000
    patterns = max(
        2, min(samples, 10 if arch == "tiny" else PATTERNS)
    )  # a single one cannot be distinguished from others
    preprocess = architectures.preprocess(file_of(arch))
    labels = torch.arange(samples) % patterns
    images = torch.stack([torch.from_numpy(p) for p in pictures(labels.tolist(), *preprocess.size)])
    data = Dataset("images", images.permute(0, 3, 1, 2).contiguous(), labels, preprocess.mean, preprocess.std)
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]), device:
        torch.manual_seed(seed)
        visual = tower(arch)
    # Clones, because tensors made in inference mode cannot be used by kernels outside of it.
    weight, bias = (tensor.clone().to(device) for tensor in head(visual, data, classes, patterns))
    zeroshot = {f"visual.{name}": tensor.detach() for name, tensor in visual.state_dict().items()}
    zeroshot |= {"classification_head.weight": weight, "classification_head.bias": bias}
    finetuned = {name: torch.empty_like(tensor) for name, tensor in zeroshot.items()}
    # Each weight times a normal number around one, like noise relative to the weights.
    ends = list(finetuned.values()), list(zeroshot.values()), list(zeroshot.values())
    rft.write_(*ends, alpha=1.0, rho=DISTANCE, seed=TUNED)
    return Case(arch, zeroshot, finetuned, data, device, patterns, batch)


def live(arch: str, state: State, precision: str) -> nn.Module:
    """Return a model in the type of a precision, on the device of these weights; no random ones are made."""
    weight = state["classification_head.weight"]
    with torch.device("meta"):
        model = ImageClassifier(architectures.visual(file_of(arch)), nn.Linear(*reversed(weight.shape)))
    lost = {name for name, _ in model.named_buffers()} - set(model.state_dict())
    if lost:
        raise ValueError(f"sweep_case: {arch} has buffers that no state dict holds: {sorted(lost)}")
    model = cast(model, precision).to_empty(device=weight.device)
    model.load_state_dict(state)
    return model.eval()


def file_of(arch: str) -> str:
    """Return the name for rft_fast.clip.endpoints; tiny is the model of the digits zoo."""
    return zoo.digits().arch if arch == "tiny" else arch


def tower(arch: str) -> nn.Module:
    """Return open_clip's image tower with its random weights."""
    config = architectures.config(file_of(arch))[1]
    text = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
    clip = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], text)
    return clip.visual.eval()


def attention_of(arch: str) -> tuple[int, int, int]:
    """Return number of heads, tokens and size of a head of the image tower."""
    vision = architectures.config(file_of(arch))[1]["vision_cfg"]
    size = vision.get("head_width", 64)
    return vision["width"] // size, (vision["image_size"] // vision["patch_size"]) ** 2 + 1, size


@torch.inference_mode()
def head(visual: nn.Module, data: Dataset, classes: int, patterns: int) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a linear head that distinguishes the patterns, on the CPU, the same on every
    call.

    Its rows are the patterns' features minus their mean, normalised to length one, and random mixtures of
    these for classes without images.
    """
    device = next(visual.parameters()).device
    height, width = data.images.shape[2:]
    clean = np.stack(list(pictures(list(range(patterns)), height, width, own=0.0)))
    inputs = normalised(torch.from_numpy(clean).permute(0, 3, 1, 2).to(device), data)
    features = nn.functional.normalize(visual(inputs), dim=-1).cpu()
    mean = features.mean(0)
    centred = nn.functional.normalize(features - mean, dim=-1)
    mixtures = torch.randn(classes - patterns, patterns, generator=torch.Generator().manual_seed(1))
    mixed = nn.functional.normalize(mixtures @ centred, dim=-1)
    rows = torch.cat([centred, mixed])
    scale = SPREAD / ((features - mean) @ rows.T).std()
    return scale * rows, -scale * (rows @ mean)


def pictures(labels: list[int], height: int, width: int, own: float = 0.3) -> Iterator[np.ndarray]:
    """Yield a picture per label, uint8 [height, width, 3]: its class's pattern, one of its own, and grain.

    own: strength of the picture's own pattern.
    """
    grain = np.random.default_rng(1).normal(0, 12, (height, width, 1)).astype(np.float32)
    for index, label in enumerate(labels):
        pattern = np.random.default_rng([2, label]).uniform(0, 255, (7, 7, 3))
        private = np.random.default_rng([3, index]).uniform(0, 255, (7, 7, 3))
        coarse = ((1 - own) * pattern + own * private).astype(np.uint8)
        picture = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        noisy = picture + (own > 0) * np.roll(grain, 17 * index, (0, 1))
        yield np.clip(noisy, 0, 255).astype(np.uint8)


def write_folder(folder: pathlib.Path, patterns: int, count: int, height: int, width: int) -> None:
    """Write a tree of JPEG files as an ImageFolder, of the size of photographs."""
    labels = [index % patterns for index in range(count)]
    for index, (label, picture) in enumerate(zip(labels, pictures(labels, height, width))):
        file = folder / f"class{label:02}" / f"{index:05}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file, quality=90)
