"""First and second derivatives of the mean loss over all images, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..names import Precision
from .batches import Batches, Need
from .feed import Images, total
from .modes import differentiating

if TYPE_CHECKING:
    from .evaluator import Evaluator

T = TypeVar("T")

# What cannot change the loss has gradient zero.
_ZEROS: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}


def gradient(evaluator: Evaluator, weights: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
    """As :meth:`Evaluator.gradient`."""
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

    _differentiate(evaluator, evaluator._slopes, weights, slope, add)
    return total_loss, sums


def curvature(evaluator: Evaluator, weights: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
    """As :meth:`Evaluator.curvature`."""
    with torch.inference_mode(False):
        sums = torch.zeros(len(weights), dtype=torch.float64, device=evaluator.device)

    def product(loss: Tensor) -> Tensor:
        grads = torch.autograd.grad(loss, weights, create_graph=True, **_ZEROS)
        products = torch.autograd.grad(grads, weights, directions, **_ZEROS)
        pairs = zip(directions, products, strict=True)
        return torch.stack([(v.double() * h.double()).sum() for v, h in pairs])

    def add(found: Tensor, share: float) -> None:
        sums.add_(found, alpha=share)

    with _attention(2):
        _differentiate(evaluator, evaluator._curvatures, weights, product, add)
    return sums


def _differentiate(
    evaluator: Evaluator,
    batches: Batches,
    weights: Sequence[Tensor],
    of: Callable[[Tensor], T],
    take: Callable[[T, float], object],
) -> None:
    """Calls ``of`` with each batch's mean loss; ``take`` with the result and its share of all images."""
    feeds = evaluator._feeds
    images = total(feeds)

    def work(feed: Images, batch: slice) -> T:
        logits = evaluator.model(feed.prepare(batch))
        losses, _correct = feed.judge(logits, batch, evaluator.normalize_logits)
        return of(losses.mean())

    def share(feed: Images, batch: slice, found: T) -> None:
        take(found, (batch.stop - batch.start) / images)

    with differentiating(evaluator.model, evaluator.precision, weights):
        batches.map(feeds, work, share)


def _attention(order: int) -> AbstractContextManager[None]:
    """Only the plain kernel can be differentiated twice."""
    return sdpa_kernel(SDPBackend.MATH) if order == 2 else nullcontext()


def need(model: nn.Module, precision: Precision, example: Callable[[int], Tensor], order: int) -> Need:
    """What a batch takes for the gradient (order 1) or the curvature (2) at all weights.

    example: number of images -> something of their shape.
    """
    weights = [parameter for parameter in model.parameters() if parameter.is_floating_point()]

    def run(images: int) -> None:
        loss = model(example(images)).float().logsumexp(1).mean()
        grads = torch.autograd.grad(loss, weights, create_graph=order == 2, **_ZEROS)
        if order == 2:
            torch.autograd.grad(grads, weights, [torch.empty_like(w) for w in weights], **_ZEROS)

    with differentiating(model, precision, weights), _attention(order):
        return Need.of(run)
