"""What the zoos of tiny CLIP models share: grey images of 28x28 pixels, their styles, words, and the model.

`make_digits_zoo.py` and `make_fashion_zoo.py` import this. What is random is torch's global generator's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PREPROCESS: dict[str, Any] = {
    "size": 28,
    "mean": [0.25, 0.25, 0.25],
    "std": [0.4, 0.4, 0.4],
    "interpolation": "bilinear",
    "resize_mode": "squash",
}


def architecture(context_length: int, vocab_size: int) -> dict[str, Any]:
    """The model, as arguments of `open_clip.CLIP`: 149 thousand parameters in image encoder and head."""
    return {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": 28,
            "patch_size": 7,
            "layers": 4,
            "width": 64,
            "head_width": 32,
            "mlp_ratio": 2.0,
        },
        "text_cfg": {
            "context_length": context_length,
            "vocab_size": vocab_size,
            "width": 32,
            "heads": 2,
            "layers": 1,
        },
        "quick_gelu": False,
    }


# ----------------------------------------------------------------------------------------- images


class Labelled(NamedTuple):
    """Grey images, float32 [n, 28, 28] in [0, 1], and their classes, int64 [n]."""

    images: Tensor
    labels: Tensor

    def part(self, first: int, last: int) -> Labelled:
        return Labelled(self.images[first:last], self.labels[first:last])


def shuffled_in_rounds(data: Labelled, seed: int) -> Labelled:
    """Shuffle into rounds of one image of each of ten classes, so that any long run is balanced."""
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed))
    labels = data.labels[order]
    round_of = F.one_hot(labels).cumsum(0).gather(1, labels[:, None])[:, 0]
    order = order[torch.argsort(round_of * 10 + labels)]
    return Labelled(data.images[order], data.labels[order])


def uniform(n: int, bound: float) -> Tensor:
    """float32 [n], uniform in [-bound, bound]."""
    return (2 * torch.rand(n) - 1) * bound


def warped(
    images: Tensor,
    degrees: Tensor,
    scale: Tensor | float = 1.0,
    shear: Tensor | float = 0.0,
    shift: Tensor | float = 0.0,
) -> Tensor:
    """Images [n, 28, 28] turned by `degrees` [n], scaled, sheared and shifted (in half frames)."""
    n = len(images)
    scale, shear = torch.as_tensor(scale).expand(n), torch.as_tensor(shear).expand(n)
    shift = torch.as_tensor(shift).expand(2, n)
    cos, sin = torch.cos(torch.deg2rad(degrees)), torch.sin(torch.deg2rad(degrees))
    rows = (
        torch.stack([cos / scale, (cos * shear - sin) / scale, shift[0]], 1),
        torch.stack([sin / scale, (sin * shear + cos) / scale, shift[1]], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), [n, 1, 28, 28], align_corners=False)
    moved: Tensor = F.grid_sample(images[:, None], grid, align_corners=False)
    return moved[:, 0].clamp(0, 1)


def jittered(images: Tensor, degrees: float, turned: Tensor | float = 0.0) -> Tensor:
    """The affine augmentation: up to `degrees` about `turned`, scale and shear .1, shift .08.

    The shift is in half frames, as `warped` takes it: .08 is about one pixel.
    """
    n = len(images)
    shift = torch.stack([uniform(n, 0.08), uniform(n, 0.08)])
    angles = uniform(n, degrees) + turned
    return warped(images, angles, 1 + uniform(n, 0.1), uniform(n, 0.1), shift)


def turn(n: int, least: float = 20, most: float = 45) -> Tensor:
    """Angles [n] of the rotated style: 20 to 45 degrees, either way."""
    angles: Tensor = (least + (most - least) * torch.rand(n)) * (2 * torch.randint(2, (n,)) - 1)
    return angles


def noised(images: Tensor, deviation: float = 0.4) -> Tensor:
    """The noisy style: Gaussian noise of standard deviation .4, clamped to [0, 1]."""
    return (images + deviation * torch.randn_like(images)).clamp(0, 1)


def to_bytes(images: Tensor) -> Tensor:
    """float32 in [0, 1] -> uint8, to nearest."""
    return (images * 255).round().to(torch.uint8)


def normalized(images: Tensor) -> Tensor:
    """Grey float32 [n, 28, 28] in [0, 1] -> what the model reads, [n, 3, 28, 28]."""
    mean, std = float(PREPROCESS["mean"][0]), float(PREPROCESS["std"][0])
    return ((images - mean) / std)[:, None].expand(-1, 3, -1, -1)


# ------------------------------------------------------------------------------------------ words


def vocabulary(text: str) -> dict[str, int]:
    """One token for each word of a text.

    Padding is 0; the end of a text needs the largest id, since CLIP finds the place to read its text
    features from by argmax.
    """
    return {word: i for i, word in enumerate(["", *dict.fromkeys(text.split()), "<end>"])}


def tokenized(texts: list[str], tokens: dict[str, int], length: int) -> Tensor:
    """Texts -> int64 [n, length]."""
    found = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in zip(found, texts, strict=True):
        ids = [tokens[word] for word in [*text.split(), "<end>"]]
        row[: len(ids)] = torch.tensor(ids)
    return found
