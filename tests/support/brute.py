"""Sharpness by brute force: every draw, part and image anew, in float64, with the weights written out."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from rft_fast.datasets import Dataset
from rft_fast.evaluate.flipped import COPIES
from rft_fast.kernels import noise_like
from rft_fast.kernels.signs import signs
from rft_fast.names import Estimator
from rft_fast.studies import Protocol
from support.tiny_models import State, normalised

# --- means and errors -----------------------------------------------------------------------------


def moments(values: np.ndarray, sizes: Sequence[int]) -> tuple[float, float, float]:
    """The mean, its error and degrees of freedom, from independent draws of parts of so many images.

    Args:
        values: [draws, parts].
        sizes: images of each part.
    """
    draws, total = len(values), sum(sizes)
    mean = sum(n / total * column.mean() for n, column in zip(sizes, values.T, strict=True))
    if draws < 2:
        return mean, np.nan, np.nan
    each = [(n / total) ** 2 * column.var(ddof=1) / draws for n, column in zip(sizes, values.T, strict=True)]
    if not sum(each):
        return mean, 0.0, len(sizes) * (draws - 1.0)
    freedom = sum(each) ** 2 / sum(v**2 / (draws - 1) for v in each)  # Welch and Satterthwaite
    return mean, np.sqrt(sum(each)), freedom


@dataclass(frozen=True)
class Draws:
    """Draws by one estimator.

    Attributes:
        estimator: what is made of them.
        rises: [draws, images]: losses less those of the clean model.
        controls: [draws, images]: <gradient of the image's loss, its perturbation>.
        hits: [draws, images].
        sizes: images of each part.
        clean: mean loss of the clean model.
    """

    estimator: Estimator
    rises: np.ndarray
    controls: np.ndarray
    hits: np.ndarray
    sizes: list[int]
    clean: float

    @property
    def values(self) -> np.ndarray:
        """Sharpness by draw, or pair of draws, and part."""
        return self._by_part(self.rises - self.controls if "gradient" in self.estimator else self.rises)

    def _by_part(self, values: np.ndarray) -> np.ndarray:
        parts = np.split(values, np.cumsum(self.sizes)[:-1], axis=1)
        means = np.stack([part.mean(1) for part in parts], 1)
        if self.estimator == "per-image-antithetic":
            means = means.reshape(-1, 2, len(self.sizes)).mean(1)
        return means

    def row(self) -> dict[str, float]:
        """The numbers of a row."""
        sharpness, error, freedom = moments(self.values, self.sizes)
        accuracy, accuracy_error, _ = moments(self._by_part(self.hits), self.sizes)
        own = self.rises - self.controls if self.estimator == "per-image-gradient" else self.rises
        own = own.mean(0)
        return {
            "sharpness": sharpness,
            "sharpness_se": error,
            "sharpness_df": freedom,
            "sharpness_se_images": own.std(ddof=1) / np.sqrt(len(own)),
            "loss": self.clean + sharpness,
            "loss_se": error,
            "accuracy": accuracy,
            "accuracy_se": accuracy_error,
        }

    def control_wins(self, cost: float, parts: int) -> bool:
        """Whether the control lowers the product of variance and cost, by the draws of the first parts."""
        with_control, without = (
            moments(self._by_part(values)[:, :parts], self.sizes[:parts])[1]
            for values in (self.rises - self.controls, self.rises)
        )
        return bool(with_control**2 * cost <= without**2)


# --- weights of single images ---------------------------------------------------------------------


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


def of_images(
    model: nn.Module, name: str, base: Tensor, seed: int, draw: int, images: Sequence[int], block: int
) -> Tensor:
    """D o (r s^T) of each image as written out: [n, *shape].

    base: [COPIES, *shape]; image n takes number n mod COPIES where each element has a sign, else the first.
    """
    rows, columns = shape_of_signs(model, name)
    found = signs(seed, draw, torch.tensor(list(images)), block, rows + columns)
    shape = len(images), *base.shape[1:]
    if not columns:
        return torch.stack([base[image % COPIES] for image in images]) * found.view(shape)
    base = base[0]
    r, s = found[:, :rows], found[:, rows:]
    if base.ndim == 2 or columns == base[0].numel():
        return base * (r[:, :, None] * s[:, None, :]).view(shape)
    signed = torch.empty(shape, dtype=base.dtype)
    per_group = base.shape[1]
    groups = columns // per_group
    for o in range(len(base)):
        first = (o // (len(base) // groups)) * per_group
        for i in range(per_group):
            signs_of_entry = r[:, o] * s[:, first + i]
            signed[:, o, i] = base[o, i] * signs_of_entry.view(-1, *[1] * (base.ndim - 2))
    return signed


def first_blocks(sizes: Sequence[int]) -> list[int]:
    """Philox blocks at which the noise of tensors of so many elements starts."""
    return np.cumsum([0, *(-(-size // 4) for size in sizes)])[:-1].tolist()


# --- draws ----------------------------------------------------------------------------------------


class Brute:
    """A model between two ends as a function of its weights.

    Args:
        model: the model; it is copied.
        zero: its weights and buffers at alpha = 0.
        one: those at alpha = 1.
        data: the images.
        normalize: logits are centred and divided by their norm.
    """

    def __init__(
        self, model: nn.Module, zero: State, one: State, data: Dataset, normalize: bool = False
    ) -> None:
        self.model, self.normalize = copy.deepcopy(model).double().eval(), normalize
        self.zero, self.one = (
            {n: t.double() for n, t in end.items() if t.is_floating_point()} for end in (zero, one)
        )
        self.names = [name for name, _ in model.named_parameters()]
        self.blocks = dict(
            zip(self.names, first_blocks([zero[name].numel() for name in self.names]), strict=True)
        )
        self.x, self.labels = normalised(data), data.labels
        self._eps: dict[tuple[int, int, str], State] = {}

    def at(self, alpha: float) -> State:
        return {n: (1 - alpha) * self.zero[n] + alpha * self.one[n] for n in self.zero}

    def scale(self, alpha: float, on: str, adaptive: bool, names: Collection[str] | None = None) -> State:
        """By how much noise of size one moves each parameter of these names; None: of all."""
        of, factor = (self.at(alpha), 1.0) if on == "interpolated" else (self.one, alpha)
        return {
            n: factor * (of[n].abs() if adaptive else torch.ones_like(of[n]))
            for n in self.names
            if names is None or n in names
        }

    def noise(self, seed: int, number: int, kind: str) -> State:
        """[COPIES, *shape] each: the first of the model, the others of as many models behind it."""
        key = (seed, number, kind)
        if key not in self._eps:
            like = [self.zero[n].float() for n in self.names] * COPIES
            eps = noise_like(like, seed, number, kind, impl="reference")  # type: ignore[arg-type]
            size = len(self.names)
            self._eps[key] = {n: torch.stack(eps[i::size]).double() for i, n in enumerate(self.names)}
        return self._eps[key]

    def scored(self, w: State, x: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of one image, which can be differentiated in w, and whether it is a hit."""
        (logits,) = torch.func.functional_call(self.model, w, (x[None],))
        hit = logits.argmax() == label
        if self.normalize:
            logits = logits - logits.mean()
            logits = logits / logits.norm().clamp_min(1e-10)
        return torch.nn.functional.cross_entropy(logits, label), hit

    def losses(self, w: State, images: Sequence[int], own: State | None = None) -> tuple[Tensor, Tensor]:
        """Losses and hits of some images.

        Args:
            w: weights and buffers.
            images: their numbers.
            own: weights of each image, [n, ...], instead of those of w.
        """
        own = own or {}
        chosen = list(images)
        shared = {name: tensor for name, tensor in w.items() if name not in own}
        each = torch.func.vmap(lambda own, x, label: self.scored({**shared, **own}, x, label))
        found: tuple[Tensor, Tensor] = each(own, self.x[chosen], self.labels[chosen])
        return found

    def clean(self, alpha: float) -> float:
        """Mean loss without noise."""
        return float(self.losses(self.at(alpha), range(len(self.labels)))[0].mean())

    def parts(self, size: int | None) -> list[range]:
        n = len(self.labels)
        return [range(first, min(first + (size or n), n)) for first in range(0, n, size or n)]

    def draws(
        self,
        alpha: float,
        rho: float,
        draws: Sequence[int],
        protocol: Protocol,
        names: Collection[str] | None = None,
        estimator: Estimator | None = None,
    ) -> Draws:
        """Draws of these numbers.

        Args:
            alpha: position on the path.
            rho: size of the noise.
            draws: their numbers; those of antithetic pairs 2 i and 2 i + 1.
            protocol: what is drawn.
            names: parameters that are perturbed; None: all.
            estimator: instead of that of the protocol.
        """
        estimator = estimator or protocol.estimator  # type: ignore[assignment]
        clean, scale = self.at(alpha), self.scale(alpha, protocol.where, protocol.adaptive, names)
        before, _ = self.losses(clean, range(len(self.labels)))
        slope = torch.func.grad(lambda moved, x, label: self.scored({**clean, **moved}, x, label)[0])
        slopes = torch.func.vmap(slope, in_dims=(None, 0, 0))(
            {k: clean[k] for k in scale}, self.x, self.labels
        )
        parts = self.parts(protocol.noise_batch)
        rises, controls, hits = (np.empty((len(draws), len(self.labels))) for _ in range(3))
        for place, draw in enumerate(draws):
            number, sign = draw, 1
            if estimator == "per-image-antithetic":
                number, sign = draw // 2, (1, -1)[draw % 2]
            for index, part in enumerate(parts):
                eps = self.noise(protocol.seed, number * len(parts) + index, protocol.noise)
                deltas = {}  # [n, ...]
                for name, c in scale.items():
                    base = sign * rho * c * eps[name]
                    if estimator.startswith("per-image"):
                        how = (protocol.seed, number, part, self.blocks[name])
                        deltas[name] = of_images(self.model, name, base, *how)
                    else:
                        deltas[name] = base[0].expand(len(part), *c.shape)
                losses, right = self.losses(clean, part, {k: clean[k] + d for k, d in deltas.items()})
                rises[place, part] = losses - before[list(part)]
                hits[place, part] = right
                along = [(slopes[k][list(part)] * d).reshape(len(part), -1).sum(1) for k, d in deltas.items()]
                controls[place, part] = sum(along)
        return Draws(estimator, rises, controls, hits, list(map(len, parts)), float(before.mean()))
