"""Losses of a batch, and their gradients: cross-entropy, and CLIP's contrastive loss (FLYP)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rft_fast.clip.classifier import ImageClassifier, ZeroShotClassifier
from rft_fast.names import MIXED, Mixed

from .settings import Setting

AUTOCAST = dict(zip(MIXED, (None, None, torch.bfloat16, torch.float16), strict=True))
PROMPTS = 256  # that are encoded together


@dataclass(frozen=True, eq=False)
class Batch:
    """The images of one optimizer step.

    Attributes:
        images: float [n, ...], the model's inputs; under mixup already mixed.
        labels: int64 [n].
        others: int64 [n], labels of the images mixed in; None without mixup.
        share: Weight of ``labels``; ``others`` weigh 1 - share.
        texts: int64 [n, context], the tokens of each image's prompt, for the contrastive loss; None: the loss
            is cross-entropy.
    """

    images: Tensor
    labels: Tensor
    others: Tensor | None = None
    share: float = 1.0
    texts: Tensor | None = None

    def parts(self, count: int) -> Iterator[Batch]:
        """Yield up to ``count`` parts of nearly equal size."""
        others: Sequence[Tensor | None] = [None] * count
        if self.others is not None:
            others = self.others.tensor_split(count)
        pieces = zip(self.images.tensor_split(count), self.labels.tensor_split(count), others, strict=True)
        for images, labels, other in pieces:
            if len(labels):
                yield Batch(images, labels, other, self.share)


def backward(
    model: nn.Module,
    batch: Batch,
    setting: Setting,
    precision: Mixed,
    device: torch.device,
    scaler: torch.amp.GradScaler,
) -> float:
    """Add the gradients of the batch's mean loss, part by part; return that loss.

    Raises:
        ValueError: The batch has texts, and the setting has what the contrastive loss does not.
        TypeError: It has texts, and the model is no :class:`rft_fast.clip.classifier.ZeroShotClassifier`.
    """
    if batch.texts is not None:
        return _backward_of_pairs(model, batch, setting, precision, device, scaler)
    found = torch.zeros((), device=device)
    for part in batch.parts(setting.accumulate):
        labels = part.labels.to(device)
        scores = logits(model, part.images.to(device), precision)
        loss = F.cross_entropy(scores, labels, label_smoothing=setting.label_smoothing)
        if part.others is not None:
            others = part.others.to(device)
            second = F.cross_entropy(scores, others, label_smoothing=setting.label_smoothing)
            loss = part.share * loss + (1 - part.share) * second
        loss = loss * (len(labels) / len(batch.labels))
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        found += loss.detach()
    return float(found)


def _backward_of_pairs(
    model: nn.Module,
    batch: Batch,
    setting: Setting,
    precision: Mixed,
    device: torch.device,
    scaler: torch.amp.GradScaler,
) -> float:
    """Add the gradients of the contrastive loss of a batch with texts; return the loss."""
    check_contrastive(setting)
    if not isinstance(model, ZeroShotClassifier) or batch.texts is None:
        raise TypeError(
            "finetune: batches with texts need a ZeroShotClassifier (rft_fast.clip.classifier), "
            f"got {type(model).__name__}"
        )
    with autocast(precision, device):
        images, texts = model.visual(batch.images.to(device)), model.text(batch.texts.to(device))
    loss = contrastive(images.float(), texts.float(), model.logit_scale.exp())
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def contrastive(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Compute CLIP's loss of pairs, with which FLYP fine-tunes.

    The mean of two cross-entropies: of each image among the texts, and of each text among the images. Texts
    of the same class count as different ones, as in FLYP's code.

    Source: Radford et al. 2021, Figure 3; Goyal et al. 2023, Section 3.

    Args:
        images: Features of the images [n, d].
        texts: Features of their texts [n, d].
        scale: Factor of the cosines, exp(logit_scale).

    Returns:
        The loss, a scalar.
    """
    images = images / images.norm(dim=-1, keepdim=True)
    texts = texts / texts.norm(dim=-1, keepdim=True)
    cosines, pairs = scale * images @ texts.T, torch.arange(len(images), device=images.device)
    return (F.cross_entropy(cosines, pairs) + F.cross_entropy(cosines.T, pairs)) / 2


def check_contrastive(setting: Setting) -> None:
    """Raise ValueError for options that the contrastive loss does not have."""
    for name, option, fine, why in (
        ("mixup", "--mixup", 0.0, "a mixed image has no text"),
        ("label_smoothing", "--label-smoothing", 0.0, "its labels are pairs, not classes"),
        ("probe_epochs", "--probe-epochs", 0, "there is no head to train"),
        (
            "accumulate",
            "--accumulate",
            1,
            "it compares all pairs of a batch; use --grad-checkpointing to save memory",
        ),
    ):
        if (value := getattr(setting, name)) != fine:
            raise ValueError(
                f"finetune: {option} {value} cannot be combined with the contrastive loss: {why}; use "
                f"{option} {fine}"
            )
    if setting.batch_size < 2:
        raise ValueError(
            "finetune: the contrastive loss of a single pair is always 0; use a --batch-size of "
            f"at least 2, got {setting.batch_size}"
        )


@torch.no_grad()
def classifier(model: nn.Module) -> ImageClassifier:
    """Return the model itself, or its image tower with the head that its text tower makes of the prompts."""
    if isinstance(model, ImageClassifier):
        return model
    if not isinstance(model, ZeroShotClassifier):
        raise TypeError(
            f"finetune: expected an image classifier of rft_fast.clip, got {type(model).__name__}"
        )
    parts = torch.split(model.prompts.flatten(0, 1), PROMPTS)
    weight = model.head(torch.cat([model.text(part) for part in parts]))
    head = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
    head.weight.copy_(weight)
    head.bias.zero_()
    return ImageClassifier(model.visual, head).eval()


def logits(model: nn.Module, images: Tensor, precision: Mixed) -> Tensor:
    """Return float32 logits [n, classes] of a model with float32 weights."""
    if AUTOCAST[precision] is None:
        found: Tensor = model(images)
        return found
    with autocast(precision, images.device):
        if not isinstance(model, ImageClassifier):
            found = model(images)
            return found.float()
        features = model.visual(images)
    # The head stays in float32: near 30, bfloat16 has steps of 1/8.
    return model.classify(features)


def autocast(precision: Mixed, device: torch.device) -> torch.autocast:
    """Return torch's autocast; disabled for fp32 and tf32."""
    kind = AUTOCAST[precision]
    return torch.autocast(device.type, kind, enabled=kind is not None)


def check_precision(precision: Mixed, device: torch.device) -> None:
    """Raise ValueError for a precision that is unknown, or that the device lacks."""
    if precision not in AUTOCAST:
        raise ValueError(f"finetune: precision must be one of {', '.join(AUTOCAST)}; got {precision!r}")
    if precision in ("tf32", "fp16") and device.type != "cuda":
        raise ValueError(
            f"finetune: precision {precision!r} needs CUDA, but the device is {device}; use bf16"
        )
