"""Image classifiers of robust fine-tuning: CLIP's image tower with a linear head, or both towers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ImageClassifier(nn.Module):
    """Image tower and linear head, with normalised features in between.

    Args:
        visual: images -> features [n, features].
        head: linear layer on the features.
    """

    def __init__(self, visual: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.visual = visual
        self.classification_head = head

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits.

        Args:
            images: float [n, 3, h, w], preprocessed.

        Returns:
            Logits [n, classes].
        """
        return self.classify(self.visual(images))

    def classify(self, features: Tensor) -> Tensor:
        """Compute logits of features.

        Args:
            features: [n, features], as the image tower returns them.

        Returns:
            Logits [n, classes], in the dtype of the head.
        """
        # In the dtype of the head, float32, whatever the tower computes in.
        features = features.to(self.classification_head.weight.dtype)
        features = features / features.norm(dim=-1, keepdim=True)
        logits: Tensor = self.classification_head(features)
        return logits


class ZeroShotClassifier(nn.Module):
    """Both towers of CLIP: the text tower makes the head from the prompts.

    Args:
        visual: images [n, 3, h, w] -> features [n, d].
        text: tokens int64 [p, context] -> features [p, d], such as open_clip's ``TextTransformer``.
        prompts: int64 [classes, templates, context], every class in every template.
        logit_scale: parameter of one element, the logarithm of the factor of the logits.

    Raises:
        TypeError: an argument is not a module, a tensor or a parameter.
        ValueError: a tensor has another dtype or shape.
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
                "ZeroShotClassifier: prompts must be int64 [classes, templates, context], with no "
                f"dimension 0; got {prompts.dtype} {list(prompts.shape)}"
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
        """Compute logits.

        Args:
            images: float [n, 3, h, w], preprocessed.

        Returns:
            Logits [n, classes].
        """
        # In parts, to limit memory with many classes and templates.
        parts = torch.split(self.prompts.flatten(0, 1), 256)
        return self.join(self.visual(images), torch.cat([self.text(part) for part in parts]))

    def join(self, features: Tensor, text_features: Tensor) -> Tensor:
        """Compute logits of features of images and prompts.

        Args:
            features: [n, d], of images.
            text_features: [classes * templates, d], of the prompts in order.

        Returns:
            Logits [n, classes].
        """
        return self.classify(features, self.head(text_features))

    def head(self, text_features: Tensor) -> Tensor:
        """Compute the weights of the head.

        Per class: the normalised mean over its templates of the normalised features, times
            ``exp(logit_scale)``.

        Args:
            text_features: [classes * templates, d], of the prompts in order.

        Returns:
            [classes, d], in the dtype of the scale.
        """
        # In the dtype of the scale, float32, whatever the tower computes in: all logits depend on the head.
        text_features = text_features.to(self.logit_scale.dtype)
        head: Tensor = self.logit_scale.exp() * directions(text_features, self.prompts.shape[1])
        return head

    def classify(self, features: Tensor, head: Tensor) -> Tensor:
        """Compute logits of features of images.

        Args:
            features: [n, d], of images.
            head: [classes, d].

        Returns:
            Logits [n, classes], in the dtype of the head.
        """
        features = features.to(head.dtype)
        logits: Tensor = features / features.norm(dim=-1, keepdim=True) @ head.T
        return logits


def directions(text_features: Tensor, templates: int) -> Tensor:
    """Compute the direction of each class: the normalised mean of its prompts' normalised features.

    Args:
        text_features: [classes * templates, d], the prompts of a class in sequence.
        templates: number of prompts per class.

    Returns:
        Unit vectors [classes, d].
    """
    normalised = text_features / text_features.norm(dim=-1, keepdim=True)
    means = normalised.unflatten(0, (-1, templates)).mean(1)
    unit: Tensor = means / means.norm(dim=-1, keepdim=True)
    return unit
