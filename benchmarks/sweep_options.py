"""The sizes of a measured sweep, and their defaults on a device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from rft_fast.evaluate.precision import PRECISIONS
from rft_fast.studies import Protocol

PUBLISHED_DRAWS = 20
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
        noise_batch: New noise for every batch, as published.
        files: JPEG images of each size for the interpolation.
        precisions: fp32 first.
        few: Images of the part graphs, where launches matter.
    """

    arch: str = "ViT-B-32"
    device: str = "cpu"
    samples: int = 16
    batch: int = 8
    draws: int = 20
    layers: int = 6
    rounds: int = 3
    alphas: int = 11
    alpha: float = 0.5
    rho: float = 0.05
    noise_batch: bool = False
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
    """Return sizes that an idle machine measures in a quarter of an hour, and a GPU in minutes."""
    base = Options(arch, device)
    if arch == "tiny":
        base = replace(base, samples=40, batch=16, draws=4, layers=3, rounds=2, alphas=3, files=12)
    if not base.on_gpu:
        return base
    base = replace(base, noise_batch=True, precisions=(*FIRST, *(p for p in PRECISIONS if p not in FIRST)))
    if arch == "tiny":
        return base
    base = replace(base, samples=1024, batch=128, draws=8, files=128)
    return replace(base, samples=512, layers=3) if arch == "ViT-L-14" else base
