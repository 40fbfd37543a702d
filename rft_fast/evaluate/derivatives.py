"""First and second derivatives of the mean loss over all images, accumulated over batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..names import Precision
from .batches import Batches
from .feed import Images, total
from .modes import differentiating

T = TypeVar("T")

# Weights that cannot change the loss have gradient zero.
_ZEROS: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}


def gradient(
    model: nn.Module,
    precision: Precision,
    batches: Batches,
    feeds: Sequence[Images],
    weights: Sequence[Tensor],
) -> tuple[float, list[Tensor]]:
    """Compute the mean loss and its gradient, see :meth:`rft_fast.evaluate.Evaluator.gradient`.

    Args:
        model: Maps images to logits.
        precision: Its precision.
        batches: How the images are cut into batches.
        feeds: The data sets.
        weights: Weights of the model.
    """
    total_loss = 0.0
    with torch.inference_mode(False):
        sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]

    def slope(loss: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        return loss.detach(), torch.autograd.grad(loss, weights, **_ZEROS)

    def add(found: tuple[Tensor, Sequence[Tensor]], share: float) -> None:
        nonlocal total_loss
        total_loss += share * found[0].item()
        for s, g in zip(sums, found[1], strict=True):
            s.add_(g, alpha=share)

    with differentiating(model, precision, weights):
        _differentiate(model, batches, feeds, slope, add)
    return total_loss, sums


def curvature(
    model: nn.Module,
    precision: Precision,
    batches: Batches,
    feeds: Sequence[Images],
    weights: Sequence[Tensor],
    directions: Sequence[Tensor],
) -> Tensor:
    """Compute v_i . (H v)_i, see :meth:`rft_fast.evaluate.Evaluator.curvature`.

    Args:
        model, precision, batches, feeds, weights: As for :func:`gradient`.
        directions: v, with the shapes of the weights.
    """
    with torch.inference_mode(False):
        sums = torch.zeros(len(weights), dtype=torch.float64, device=feeds[0].device)

    def product(loss: Tensor) -> Tensor:
        grads = torch.autograd.grad(loss, weights, create_graph=True, **_ZEROS)
        products = torch.autograd.grad(grads, weights, directions, **_ZEROS)
        pairs = zip(directions, products, strict=True)
        return torch.stack([(v.double() * h.double()).sum() for v, h in pairs])

    def add(found: Tensor, share: float) -> None:
        sums.add_(found, alpha=share)

    with _attention(2), differentiating(model, precision, weights):
        _differentiate(model, batches, feeds, product, add)
    return sums


def _differentiate(
    model: nn.Module,
    batches: Batches,
    feeds: Sequence[Images],
    of: Callable[[Tensor], T],
    take: Callable[[T, float], object],
) -> None:
    """Call ``of`` with the mean loss of each batch, ``take`` with the result and the share of all images."""
    images = total(feeds)

    def work(feed: Images, batch: slice) -> T:
        losses, _predictions = feed.judge(model(feed.prepare(batch)), batch)
        return of(losses.mean())

    def share(feed: Images, batch: slice, found: T) -> None:
        take(found, (batch.stop - batch.start) / images)

    batches.map(feeds, work, share)


def _attention(order: int) -> AbstractContextManager[None]:
    """Select the plain attention kernel for order 2: only that can be differentiated twice."""
    return sdpa_kernel(SDPBackend.MATH) if order == 2 else nullcontext()


def trial(
    model: nn.Module,
    precision: Precision,
    example: Callable[[int], Tensor],
    order: int,
    measure: Callable[[Callable[[int], None]], T],
) -> T:
    """Measure the derivatives of one batch at all weights.

    Args:
        model: Maps images to logits.
        precision: Its precision.
        example: Number of images -> input of that shape, of any values.
        order: 1 for the gradient, 2 for the curvature.
        measure: Called with a function that computes the derivatives of so many images.

    Returns:
        The result of ``measure``.
    """
    weights = [parameter for parameter in model.parameters() if parameter.is_floating_point()]

    def run(images: int) -> None:
        loss = model(example(images)).float().logsumexp(1).mean()
        grads = torch.autograd.grad(loss, weights, create_graph=order == 2, **_ZEROS)
        if order == 2:
            torch.autograd.grad(grads, weights, [torch.empty_like(w) for w in weights], **_ZEROS)

    with differentiating(model, precision, weights), _attention(order):
        return measure(run)
