"""How a model and torch are set while scores or derivatives are taken; all is as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..stages import evaluating
from . import precision as formats


@contextmanager
def scoring(model: nn.Module, precision: str) -> Iterator[None]:
    """Eval mode and exact products, without gradients."""
    with evaluating(model), torch.inference_mode(), formats.exact(precision):
        yield


@contextmanager
def differentiating(model: nn.Module, precision: str, weights: Sequence[Tensor]) -> Iterator[None]:
    """Eval mode and exact products, with gradients at these weights."""
    before = [weight.requires_grad for weight in weights]
    with (
        evaluating(model),
        torch.inference_mode(False),
        torch.enable_grad(),
        formats.exact(precision),
    ):
        try:
            for weight in weights:
                weight.requires_grad_(True)
            yield
        finally:
            for weight, flag in zip(weights, before, strict=True):
                weight.requires_grad_(flag)
