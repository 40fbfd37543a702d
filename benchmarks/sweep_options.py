"""The sizes of a measured sweep, and their defaults on a device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from rft_fast.evaluate.precision import PRECISIONS
from rft_fast.studies import Protocol

PUBLISHED_DRAWS = 20
OURS = "per-image-gradient"  # noise per image with its control: the default where a gradient helps
FIRST = ("fp32", "bf16")  # precisions that are measured first, in case the time runs out


@dataclass(frozen=True)
class Options:
    """The sizes of a measured sweep.

    Attributes:
        samples: Images that are scored.
        batch: Images per batch of the peers; ours uses batches of that size on the CPU, and chooses on a GPU.
        draws, rho, alpha: Of the sharpness.
        layers: Number of layers, evenly spread over the model.
        alphas: Positions of the interpolations.
        noise_batch: New noise for every batch of the peers, as published.
        files: JPEG images of each size for the interpolation.
        precisions: fp32 first.
        few: Images of the part graphs, where launches matter.
    """

    arch: str = "ViT-B-32"
    device: str = "cpu"
    samples: int = 128
    batch: int = 128
    draws: int = 4
    layers: int = 2
    rounds: int = 2
    alphas: int = 11
    alpha: float = 0.5
    rho: float = 1.0
    noise_batch: bool = True
    files: int = 32
    precisions: tuple[str, ...] = ("fp32",)
    few: int = 8

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def grid(self) -> list[float]:
        """Return the positions of the interpolations."""
        return [i / (self.alphas - 1) for i in range(self.alphas)]

    @property
    def positions(self) -> list[float]:
        """Return the positions of layer-wise sharpness: scaling takes several."""
        return [self.alpha] if self.alpha else [(i + 1) / self.alphas for i in range(self.alphas)]

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Sizes of the image files: ImageNet's, and photographs such as ObjectNet's (12 megapixels)."""
        tiny = {"60x45": (45, 60), "400x300": (300, 400)}
        return tiny if self.arch == "tiny" else {"500x375": (375, 500), "4000x3000": (3000, 4000)}

    @property
    def types(self) -> list[str]:
        """One precision per type of weights, for what does not depend on how products are taken."""
        return [precision for precision in FIRST if precision in self.precisions]

    @property
    def batch_size(self) -> int | None:
        """Size of our batches; None: the evaluator chooses."""
        return None if self.on_gpu else self.batch

    def protocol(self, estimator: str, seed: int) -> Protocol:
        return Protocol(estimator, seed=seed, noise_batch=self.batch if self.noise_batch else None)


def defaults(device: str, arch: str) -> Options:
    """Return sizes that take an idle machine a quarter of an hour for sharpness, and a GPU minutes.

    On the CPU one batch of the published size is scored. Other parts than layer-sharpness and
    general-sharpness need no such batch: ``--samples 16 --batch 8`` is enough for them.
    """
    base = Options(arch, device)
    if arch == "tiny":
        base = replace(base, samples=40, batch=16, draws=4, layers=3, rounds=2, alphas=3, files=12)
    if not base.on_gpu:
        return base
    base = replace(base, precisions=(*FIRST, *(p for p in PRECISIONS if p not in FIRST)))
    if arch == "tiny":
        return base
    base = replace(base, samples=1024, draws=8, layers=6, rounds=3, files=128)
    return replace(base, samples=512, layers=3) if arch == "ViT-L-14" else base
