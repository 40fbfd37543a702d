"""A model in stages, so that after a change late in the model the earlier stages need not run again.

Any model that ``torch.fx`` can trace is cut wherever its state is one activation. Nothing here depends on an
architecture: the forward pass shows where a block ends.
"""

from __future__ import annotations

from torch import Tensor, nn

from ...clip.classifier import ZeroShotClassifier
from .chains import TOLERANCE, UNITS, chain, evaluating
from .contract import Stage, Stages

__all__ = ["TOLERANCE", "UNITS", "Stage", "Stages", "evaluating", "stages"]


def stages(model: nn.Module, images: Tensor, exact: bool = False) -> Stages:
    """Cut a model into stages that, run one after the other, compute ``model(images)``.

    The model is traced in eval mode, and the stages are for eval mode; its training flags are restored. The
    stages are compared with the model on two and on three images. A model that cannot be cut is one stage,
    with a warning that names the reason.

    Args:
        model: The model.
        images: Example of its input, float [2 or more, 3, h, w]; at most three images are used.
        exact: Require the bits of the forward pass on the same batch; on a GPU, whose libraries may round the
            same products differently, differences of at most ``UNITS`` in the last place. Otherwise, if the
            last block of a transformer is pooled by selecting one token, only that token is computed as far
            as possible: the same numbers up to rounding (within ``TOLERANCE`` of the largest output; for
            dtypes less precise than float32, within eight of their steps).

    Returns:
        The stages.

    Raises:
        ValueError: The example has no batch dimension.
        Exception: Whatever the model raises on these images.
    """
    if not isinstance(images, Tensor) or images.ndim == 0 or len(images) == 0:
        got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"stages: expected an example batch [2, 3, h, w], got {got}")
    if type(model) is ZeroShotClassifier:
        prompts = model.prompts.flatten(0, 1)
        image = chain(model.visual, images, exact)
        text = chain(model.text, prompts, exact)
        return Stages(image, text, model.head, model.classify, (model.logit_scale,), prompts)
    return Stages(chain(model, images, exact))
