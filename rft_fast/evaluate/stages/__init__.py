"""A model in stages, so that a change late in the model need not compute its beginning again.

Any model that ``torch.fx`` can trace is cut wherever all that goes on is one activation. Nothing here
knows an architecture: where a block ends follows from what the forward pass does.
"""

from __future__ import annotations

from torch import Tensor, nn

from ...clip.classifier import ZeroShotClassifier
from .chains import TOLERANCE, UNITS, chain, evaluating
from .contract import Stage, Stages

__all__ = ["TOLERANCE", "UNITS", "Stage", "Stages", "evaluating", "stages"]


def stages(model: nn.Module, images: Tensor, exact: bool = False) -> Stages:
    """The model in stages that, run one after the other, compute what ``model(images)`` computes.

    images: an example of the model's input, float [2 or more, 3, h, w]; at most three are looked at.
    exact: the same bits as the forward pass on the same batch; on a GPU, whose libraries may round the same
        products differently, within ``UNITS`` in the last place. Otherwise, where a transformer's last
        block is pooled by taking one token, only that token is computed as far as possible: the same
        numbers up to rounding (checked: within ``TOLERANCE`` of the largest output; for types of lower
        precision than float32, within eight of their steps).

    The model is traced as it is in eval mode, and the stages are meant for eval mode; its training flags
    stay as they were. That the stages compute what the model computes is checked on two and on three
    images. A model that cannot be cut is one stage, with a warning that says why.

    Raises what the model raises on these images, and ValueError for an example without a batch.
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
