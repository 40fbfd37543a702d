"""Cuts a model into stages, and checks on every data set that they compute what the model computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..clip.classifier import ZeroShotClassifier
from ..names import Precision
from . import modes
from . import precision as formats
from .feed import Images
from .stages import Stage, Stages, stages


@dataclass(frozen=True)
class Staged:
    """A model in stages.

    Attributes:
        chains: The stages.
        image: Bytes of held activations per image, at most.
        prompts: Bytes of held activations of all prompts, at most.
    """

    chains: Stages
    image: int = 0
    prompts: int = 0


def staged(
    model: nn.Module, precision: Precision, feeds: Sequence[Images], known: Stages | None = None
) -> Staged:
    """Cut a model into stages, and check them with one image of every data set, since image sizes may differ.

    Args:
        model: The model.
        precision: Its precision.
        feeds: The data sets, at least one.
        known: Its stages; None: cut the model, with images of the first data set.

    Raises:
        ValueError: The model cannot score a data set.
        RuntimeError: The stages do not compute what the model computes.
    """
    image = prompts = 0
    for feed in feeds:
        with modes.scoring(model, precision):
            expected = feed.check(lambda images: _answer(model, images))
        if known is None:
            with modes.scoring(model, "fp32"):  # no rounding to tf32 in the comparison, and nothing split
                images = feed.prepare(slice(0, 2))
                known = stages(model, images if len(images) == 2 else torch.cat([images, images]))
        if len(known.image) > 1 or known.text:
            with modes.scoring(model, precision):
                held, prompts = _verify(known, precision, feed, expected)
            image = max(image, held)
    return Staged(known or Stages(()), image, prompts)


def _answer(model: nn.Module, images: Tensor) -> Any:
    """Return the model's logits, or whatever it returns.

    With two towers, only one prompt is encoded and used for all classes: thousands would take long.
    """
    if not isinstance(model, ZeroShotClassifier):
        return model(images)
    prompts = model.prompts.flatten(0, 1)
    return model.join(model.visual(images), model.text(prompts[:1]).expand(len(prompts), -1))


def _verify(chains: Stages, precision: Precision, feed: Images, expected: Tensor) -> tuple[int, int]:
    """Raise RuntimeError if stages and model differ; return ``image`` and ``prompts`` of :class:`Staged`."""
    logits, image = _watched(chains.image, feed.prepare(slice(0, 1)))
    prompts = 0
    if chains.head is not None and chains.join is not None and chains.prompts is not None:
        features, held = _watched(chains.text, chains.prompts[:1])
        prompts = held * len(chains.prompts)
        logits = chains.join(logits, chains.head(features.expand(len(chains.prompts), -1)))
    error = (logits - expected).float().abs().max()
    tolerance = 1e-3 if precision in ("fp32", "ieee", "bf16x3") else 0.05
    if error > tolerance * expected.float().abs().max():
        raise RuntimeError(
            f"Evaluator: on {feed.name!r} the stages of the model compute other numbers than its forward "
            "pass; please report this"
        )
    return image, prompts


def _watched(stages: tuple[Stage, ...], sample: Tensor) -> tuple[Tensor, int]:
    """Return the result of one sample, and the most bytes that a walk holds of it.

    While activations change their shape, both shapes are held.
    """
    x, sizes = sample, {}
    for stage in stages:
        x = stage.run(x, sample)
        sizes[x.shape, x.dtype] = x.nbytes
    return x, sum(sorted(sizes.values())[-2:])


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model.

    Raises:
        ValueError: It has no weights, or is on several devices.
    """
    tensors = _floats(model)
    if not tensors:
        raise ValueError("Evaluator: the model has no weights to score")
    if len(devices := sorted({str(tensor.device) for tensor in tensors})) > 1:
        raise ValueError(f"Evaluator: the model must be on one device, it is on {devices}")
    return tensors[0].device


def check_weights(model: nn.Module, precision: Precision) -> None:
    """Raise ValueError if the weights do not have the dtype of the precision."""
    wanted = formats.PRECISIONS[precision]
    dtypes = {tensor.dtype for tensor in _floats(model)}
    if wanted not in dtypes or not dtypes <= {wanted, torch.float32}:
        raise ValueError(
            f"Evaluator: precision {precision!r} needs a model in {_short(wanted)}, this one has "
            f"{', '.join(sorted(map(_short, dtypes)))}; call rft_fast.evaluate.precision.cast(model, "
            f"{precision!r}) before you make a Path of it (the two ends may keep their dtype)"
        )


def _floats(model: nn.Module) -> list[Tensor]:
    return [t for t in chain(model.parameters(), model.buffers()) if t.is_floating_point()]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
