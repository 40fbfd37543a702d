"""From a model to a chain of stages that is checked against the model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .contract import Stage
from .cutting import build, run
from .tokens import sink
from .tracing import Root, Uncut, trace
from .traits import Facts, version

TOLERANCE = 1e-4
"""Largest difference of logits from those of the forward pass if only the pooled token is computed in the
last block, relative to the largest logit (float32; see :func:`stages`)."""

EXACT = ("cpu",)
"""Types of devices on which the same operations give the same bits."""

UNITS = {1: 8, 2: 8, 4: 64, 8: 64}
"""Largest difference of the stages from the forward pass on devices other than CPUs, by the bytes of the
least precise dtype: in units in the last place (``finfo.eps``), relative to the largest output.

On a CPU the bits must be the same. The libraries of a GPU (cuBLASLt, cuDNN) select kernels by the alignment
of memory, too, so the same operations may be rounded differently. In ViT-B/32 a CPU's kernels for other batch
sizes differ by up to 7 units in float32, and by 1 in bfloat16, whose sums are float32. Errors of tracing are
far larger.
"""


def chain(model: nn.Module, example: Tensor, exact: bool) -> tuple[Stage, ...]:
    """Cut a model into stages; one stage, with a warning, if it cannot be cut.

    Args:
        model: The model.
        example: Example of its input, [2 or more, ...].
        exact: As for :func:`rft_fast.evaluate.stages.stages`.
    """
    with evaluating(model), torch.inference_mode(False), torch.no_grad():
        # Copies: tensors of inference mode have no version counter, which is compared here.
        batches = [example[[i % len(example) for i in order]].clone() for order in ((0, 1), (0, 1, 0))]
        # First, so that a model that does not accept its input raises its own error.
        expected = [model(batch.clone()) for batch in batches]
        try:
            return _cut_model(model, batches, expected, exact)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # forward passes may raise anything, and so may tracing
            words = str(error).strip().splitlines()
            reason = (words[0] if words else "") if isinstance(error, Uncut) else _describe(error)
    warnings.warn(
        f"stages: this {type(model).__name__} is not divided into stages, because {reason}; every score "
        "takes "
        "a whole forward pass, with the same numbers",
        stacklevel=3,
    )
    return (Stage(lambda x, inputs: model(x)),)


def _describe(error: Exception) -> str:
    words = str(error).strip().splitlines()
    return f"torch.fx cannot trace it ({type(error).__name__}: {words[0] if words else ''})"


def _cut_model(
    model: nn.Module, batches: Sequence[Tensor], expected: Sequence[Any], exact: bool
) -> tuple[Stage, ...]:
    pairs = list(zip(batches, expected, strict=True))
    # Also of the weights: heads, and so logits, stay in float32.
    dtypes = {tensor.dtype for tensor in (*model.parameters(), *expected) if isinstance(tensor, Tensor)}
    floats = [dtype for dtype in dtypes if dtype.is_floating_point]
    tolerance = max([TOLERANCE, *(8 * torch.finfo(dtype).eps for dtype in floats)])
    rounding = 0.0
    if batches[0].device.type not in EXACT:
        rounding = max((UNITS[dtype.itemsize] * torch.finfo(dtype).eps for dtype in floats), default=0.0)
    if not all(isinstance(y, Tensor) and y.shape[:1] == x.shape[:1] for x, y in pairs):
        raise Uncut("it does not return one tensor [n, ...]")
    weights = [*model.parameters(), *model.buffers()]
    versions = [version(weight) for weight in weights]
    graph, opaque = trace(root := Root(model))
    facts = Facts(root, graph, batches)
    found = build(facts, compact=False)
    if [version(weight) for weight in weights] != versions:
        raise Uncut("its forward pass changes its own weights or buffers")
    # The same bits, on devices that give them: a small difference may be an error.
    if not all(_same(run(found, x), y, rounding) for x, y in pairs):
        raise Uncut("its traced forward pass computes other numbers")
    if len(found) == 1 and opaque is not None:
        raise Uncut(_describe(opaque))
    if exact:
        return found
    try:
        if sink(facts):
            facts = Facts(root, graph, batches)
        shorter = build(facts, compact=True)
        if all(_same(run(shorter, x), y, tolerance) for x, y in pairs):
            return shorter
    except torch.OutOfMemoryError:
        raise
    except Exception:  # only the shortcut is lost
        pass
    return found


def _same(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    got, expected = got.double(), expected.double()
    agree = (got == expected) | (got.isnan() & expected.isnan())
    if not tolerance:
        return bool(agree.all())
    size = expected[expected.isfinite()].abs().max() if expected.isfinite().any() else 0
    return bool((agree | ((got - expected).abs() <= tolerance * size)).all())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context manager: all modules in eval mode; training flags are restored."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
