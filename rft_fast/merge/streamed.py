"""Soups and Model Stock of models that come one after the other, in memory: the bits of :mod:`.work`.

Merging files reads them run by run. A study has models in memory, of which there is room for few at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from . import formulas

State = Mapping[str, Tensor]
COUNTER = ".num_batches_tracked"


class Total:
    """The sum of some models in float32 (Wortsman et al. 2022). Integers are those of the first model.

    Args:
        first: the first model.
    """

    def __init__(self, first: State) -> None:
        self.count = 1
        self._sum = {
            name: tensor.to("cpu", torch.float32, copy=True) if tensor.is_floating_point() else tensor.cpu()
            for name, tensor in first.items()
        }

    def plus(self, model: State) -> Total:
        """Return the sum of these and one more.

        Raises:
            ValueError: an integer tensor differs, which is no counter of training steps.
        """
        found = object.__new__(Total)
        found.count, found._sum = self.count + 1, {}
        for name, tensor in self._sum.items():
            other = model[name].cpu()
            if tensor.is_floating_point():
                tensor = tensor + other
            elif not (name.endswith(COUNTER) or torch.equal(tensor, other)):
                raise ValueError(
                    f"merge: {name} differs between the models; integers are copied, so they must be equal"
                )
            found._sum[name] = tensor
        return found

    def mean(self) -> dict[str, Tensor]:
        """Return the mean."""
        return {
            name: tensor / self.count if tensor.is_floating_point() else tensor
            for name, tensor in self._sum.items()
        }


def mean(models: Iterable[State]) -> dict[str, Tensor]:
    """Return the mean of models, one or more; each is let go before the next is asked for."""
    total: Total | None = None
    for model in models:
        total = Total(model) if total is None else total.plus(model)
        del model
    if total is None:
        raise ValueError("merge: expected at least one model to average, got none")
    return total.mean()


def model_stock(base: State, models: Iterable[State]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the model of Model Stock (Jang et al. 2024, Eq. 6), and t of each tensor that moves.

    As :func:`rft_fast.merge.formulas.model_stock`, of models one after the other: with the unit vectors u_k
    of the K differences to ``base``, the sum of the cosines of all pairs is ``(|sum of u_k|^2 - K) / 2``. A
    tensor without a result, because its differences point against each other, has t = NaN and stays at its
    zero-shot value. Integers are those of the first model.

    Args:
        base: the zero-shot model.
        models: two or more; each is let go before the next is asked for.
    """
    units: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    moving: dict[str, int] = {}
    found: dict[str, Tensor] = {}
    count = 0
    for model in models:
        count += 1
        for name, tensor in model.items():
            if not tensor.is_floating_point():
                found.setdefault(name, tensor.cpu())
                continue
            change = (tensor.to("cpu", torch.float32) - base[name].to("cpu", torch.float32)).reshape(-1)
            norm = math.sqrt(formulas.dot(change, change))
            sums[name] = sums[name].add_(change) if name in sums else change.clone()
            if norm:
                unit = change.double() / norm
                units[name] = units[name].add_(unit) if name in units else unit
                moving[name] = moving.get(name, 0) + 1
    ratios: dict[str, float] = {}
    for name, total in sums.items():
        zeroshot = base[name].to("cpu", torch.float32)
        cosine = 0.0
        if name in units:
            # Of models that do not move the tensor, cosines count as 0.
            cosine = (formulas.dot(units[name], units[name]) - moving[name]) / (count * (count - 1))
            t = formulas.stock_ratio(cosine, count)
            ratios[name] = math.nan if t is None else t
        share = ratios.get(name, 0.0)
        scale = 0.0 if math.isnan(share) else share / count
        found[name] = zeroshot.add(total.view(zeroshot.shape), alpha=scale)
    return {name: found[name] for name in base if name in found}, ratios
