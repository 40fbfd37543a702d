"""An image classifier as robust fine-tuning knows it: CLIP's image tower, then a linear head."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ImageClassifier(nn.Module):
    """Image tower and linear head, with the features normalised in between.

    visual: maps images to features [n, features]. head: the linear layer that follows.
    """

    def __init__(self, visual: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.visual = visual
        self.classification_head = head

    def forward(self, images: Tensor) -> Tensor:
        """images: float [n, 3, h, w], normalised. Returns logits [n, classes]."""
        return self.classify(self.visual(images))

    def classify(self, features: Tensor) -> Tensor:
        """features: [n, features], as the image tower gives them. Returns logits [n, classes]."""
        # In the head's own type, float32, whatever the tower computes in.
        features = features.to(self.classification_head.weight.dtype)
        features = features / features.norm(dim=-1, keepdim=True)
        logits: Tensor = self.classification_head(features)
        return logits


class ZeroShotClassifier(nn.Module):
    """Both towers of CLIP: the head is what the text tower makes of the prompts.

    visual: maps images [n, 3, h, w] to features [n, d].
    text: maps tokens int64 [p, context] to features [p, d], as open_clip's ``TextTransformer`` does.
    prompts: int64 [classes, templates, context], every class in every template.
    logit_scale: a parameter of one element; the logarithm of the factor of the logits.

    Raises TypeError and ValueError for arguments of another kind or shape.
    """

    prompts: Tensor

    def __init__(
        self, visual: nn.Module, text: nn.Module, prompts: Tensor, logit_scale: nn.Parameter
    ) -> None:
        super().__init__()
        for name, tower in (("visual", visual), ("text", text)):
            if not isinstance(tower, nn.Module):
                kind = type(tower).__name__
                raise TypeError(f"ZeroShotClassifier: {name} must be an nn.Module, got {kind}")
        for name, tensor in (("prompts", prompts), ("logit_scale", logit_scale)):
            if not isinstance(tensor, Tensor):
                kind = type(tensor).__name__
                raise TypeError(f"ZeroShotClassifier: {name} must be a tensor, got {kind}")
        if prompts.dtype != torch.int64 or prompts.ndim != 3 or prompts.numel() == 0:
            raise ValueError(
                "ZeroShotClassifier: prompts must be int64 [classes, templates, context], none of them 0; "
                f"got {prompts.dtype} {list(prompts.shape)}"
            )
        if not isinstance(logit_scale, nn.Parameter):
            raise TypeError("ZeroShotClassifier: logit_scale must be an nn.Parameter, got a plain tensor")
        if not logit_scale.is_floating_point() or logit_scale.ndim > 1 or logit_scale.numel() != 1:
            raise ValueError(
                "ZeroShotClassifier: logit_scale must be one float, 0-d or [1]; "
                f"got {logit_scale.dtype} {list(logit_scale.shape)}"
            )
        self.visual = visual
        self.text = text
        self.register_buffer("prompts", prompts, persistent=False)
        self.logit_scale = logit_scale

    def forward(self, images: Tensor) -> Tensor:
        """images: float [n, 3, h, w], normalised. Returns logits [n, classes]."""
        # In parts: with many classes and templates, all at once would need a lot of memory.
        parts = torch.split(self.prompts.flatten(0, 1), 256)
        return self.join(self.visual(images), torch.cat([self.text(part) for part in parts]))

    def join(self, features: Tensor, text_features: Tensor) -> Tensor:
        """features: [n, d], of images. text_features: [classes * templates, d], of the prompts in order.

        Returns logits [n, classes].
        """
        return self.classify(features, self.head(text_features))

    def head(self, text_features: Tensor) -> Tensor:
        """text_features: [classes * templates, d]. Returns the weights of the head, [classes, d].

        For each class, the normalised mean over its templates of the normalised features, times
        ``exp(logit_scale)``.
        """
        # In the scale's own type, float32, whatever the tower computes in: the head is what logits hang on.
        text_features = text_features.to(self.logit_scale.dtype)
        head: Tensor = self.logit_scale.exp() * directions(text_features, self.prompts.shape[1])
        return head

    def classify(self, features: Tensor, head: Tensor) -> Tensor:
        """features: [n, d], of images. head: [classes, d]. Returns logits [n, classes]."""
        features = features.to(head.dtype)
        logits: Tensor = features / features.norm(dim=-1, keepdim=True) @ head.T
        return logits


def directions(text_features: Tensor, templates: int) -> Tensor:
    """Where each class's prompts point: the normalised mean of their normalised features.

    text_features: [classes * templates, d], the prompts of a class one after the other. Returns [classes, d].
    """
    normalised = text_features / text_features.norm(dim=-1, keepdim=True)
    means = normalised.unflatten(0, (-1, templates)).mean(1)
    unit: Tensor = means / means.norm(dim=-1, keepdim=True)
    return unit
