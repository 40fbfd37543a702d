"""Settings of the model and of torch while scores or derivatives are computed; all are restored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..names import Precision
from . import precision as formats
from .stages import evaluating


@contextmanager
def scoring(model: nn.Module, precision: Precision) -> Iterator[None]:
    """Context manager: eval mode and exact products, without gradients."""
    with evaluating(model), torch.inference_mode(), formats.exact(precision):
        yield


@contextmanager
def differentiating(model: nn.Module, precision: Precision, weights: Sequence[Tensor]) -> Iterator[None]:
    """Context manager: eval mode and exact products, with gradients at these weights.

    All other float parameters require gradients as well: torch selects kernels by whether a weight requires a
    gradient (``nn.MultiheadAttention`` uses others for frozen weights), and the bits must not depend on which
    gradients are requested.
    """
    floats = [p for p in model.parameters() if p.is_floating_point()]
    tensors = list({id(tensor): tensor for tensor in (*weights, *floats)}.values())
    before = [tensor.requires_grad for tensor in tensors]
    with (
        evaluating(model),
        torch.inference_mode(False),
        torch.enable_grad(),
        formats.exact(precision),
    ):
        try:
            for tensor in tensors:
                tensor.requires_grad_(True)
            yield
        finally:
            for tensor, flag in zip(tensors, before, strict=True):
                tensor.requires_grad_(flag)
