"""How a model and torch are set while scores or derivatives are taken; all is as it was afterwards."""

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
    """Eval mode and exact products, without gradients."""
    with evaluating(model), torch.inference_mode(), formats.exact(precision):
        yield


@contextmanager
def differentiating(model: nn.Module, precision: Precision, weights: Sequence[Tensor]) -> Iterator[None]:
    """Eval mode and exact products, with gradients at these weights.

    All others take part as well: which kernels torch takes depends on whether a weight asks for a gradient
    (those of a frozen nn.MultiheadAttention are others), and the bits must not depend on what is asked for.
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
