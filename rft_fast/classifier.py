"""An image classifier as robust fine-tuning knows it: CLIP's image tower, then a linear head."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn

HEAD_WEIGHT = "classification_head.weight"
HEAD_BIAS = "classification_head.bias"

# The first word of a name -> why it cannot change the output, given that the head is fixed.
_TEXT = "text tower: unused beside a fixed head"
_SCALE = "logit scale: already in the head"
INERT = {
    "ln_final": _TEXT,
    "logit_bias": _SCALE,
    "logit_scale": _SCALE,
    "positional_embedding": _TEXT,
    "text": _TEXT,
    "text_decoder": _TEXT,
    "text_projection": _TEXT,
    "token_embedding": _TEXT,
    "transformer": _TEXT,
}

_MODEL_KEYS = (
    "custom_text",
    "embed_dim",
    "init_logit_bias",
    "init_logit_scale",
    "multimodal_cfg",
    "nonscalar_logit_scale",
    "quick_gelu",
    "text_cfg",
    "vision_cfg",
)
_PREPROCESS_KEYS = ("fill_color", "interpolation", "mean", "mode", "resize_mode", "size", "std")
_PREPROCESS_VALUES = {
    "mode": ("RGB",),
    "interpolation": ("bicubic", "bilinear", "random"),
    "resize_mode": ("shortest", "longest", "squash"),
}


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
        normalised = text_features / text_features.norm(dim=-1, keepdim=True)
        means = normalised.unflatten(0, self.prompts.shape[:2]).mean(1)
        head: Tensor = self.logit_scale.exp() * (means / means.norm(dim=-1, keepdim=True))
        return head

    def classify(self, features: Tensor, head: Tensor) -> Tensor:
        """features: [n, d], of images. head: [classes, d]. Returns logits [n, classes]."""
        features = features.to(head.dtype)
        logits: Tensor = features / features.norm(dim=-1, keepdim=True) @ head.T
        return logits


@dataclass(frozen=True)
class Preprocess:
    """How images become the model's input: open_clip's evaluation transform, in numbers.

    size: (height, width) in pixels. mean, std: per RGB channel, of images in [0, 1].
    interpolation, resize_mode, fill_color: as in ``open_clip.image_transform``.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float] = OPENAI_DATASET_MEAN
    std: tuple[float, float, float] = OPENAI_DATASET_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0


def build(arch: str | PathLike[str], state: Mapping[str, Tensor]) -> tuple[ImageClassifier, dict[str, str]]:
    """The classifier that these weights belong to, on the CPU, in float32 and in eval mode.

    arch: an open_clip model name, or a JSON file in one of open_clip's formats:
        ``{"model_cfg": ..., "preprocess_cfg": ...}``, or a bare model_cfg. QuickGELU is part of
        the architecture, as in open_clip: weights that descend from OpenAI's need a name that
        ends in ``-quickgelu``.
    state: a checkpoint under canonical names (:func:`rft_fast.checkpoints.load`). Only its names
        and shapes are read; the returned weights are random until :class:`rft_fast.Path` or
        ``load_state_dict(split(state)[0])`` writes them.

    Returns the classifier, and why each name in ``state`` that it does not use cannot change its
    output. Only the image tower is made. The global random state is left as it was.

    Raises ValueError for an unknown architecture, and for weights of another one: names that are
    missing, unexpected or of another shape are told before anything large is allocated.
    """
    label, model_cfg, _ = _config(arch)
    used, inert = split(state)
    with torch.device("meta"):  # names and shapes without memory
        visual = _visual(label, model_cfg)
    classes = used[HEAD_WEIGHT].shape[0]
    shapes = {f"visual.{name}": tensor.shape for name, tensor in visual.state_dict().items()}
    shapes |= {HEAD_WEIGHT: torch.Size((classes, model_cfg["embed_dim"]))}
    shapes |= {HEAD_BIAS: torch.Size((classes,))}
    _compare(label, shapes, used)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        head = nn.Linear(model_cfg["embed_dim"], classes)
        return ImageClassifier(_visual(label, model_cfg), head).eval(), inert


def split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What of a checkpoint the classifier uses, and why the rest cannot change its output.

    Returns (used, inert): image tower and head, name -> tensor as given; and name -> reason. A head
    without a bias gets a zero one. Both ends of a path go through here.

    Raises ValueError for a checkpoint without an image tower or head, or with a name unknown here.
    """
    owner = {name: name.partition(".")[0] for name in state}
    used = {n: t for n, t in state.items() if owner[n] in ("visual", "classification_head")}
    inert = {name: INERT[first] for name, first in owner.items() if first in INERT}
    if unknown := [name for name in state if name not in used and name not in inert]:
        raise ValueError(
            f"split: {_some(unknown)} belong neither to an image tower ('visual.*'), a head "
            "('classification_head.*') nor a text tower; is this a CLIP image classifier?"
        )
    if HEAD_WEIGHT not in used:
        raise ValueError(
            f"split: the checkpoint has no {HEAD_WEIGHT!r}; expected image tower and head in one "
            "file, as model-soups and WiSE-FT write them"
        )
    if "visual" not in owner.values():
        raise ValueError("split: the checkpoint has a head but no image tower ('visual.*')")
    weight = used[HEAD_WEIGHT]
    if weight.ndim != 2 or 0 in weight.shape:
        shape = tuple(weight.shape)
        raise ValueError(f"split: {HEAD_WEIGHT!r} must be [classes, features], got {shape}")
    if HEAD_BIAS not in used:
        used[HEAD_BIAS] = weight.new_zeros(weight.shape[0])
    return used, inert


def preprocess(arch: str | PathLike[str]) -> Preprocess:
    """How the images of an architecture are prepared (arch: as in :func:`build`).

    A JSON file's ``preprocess_cfg`` counts; what it leaves open, and a model name, means
    open_clip's defaults: OpenAI's mean and standard deviation, the shortest edge resized (bicubic),
    centre crop.

    Raises ValueError for an unknown architecture, and for settings that do not fit it.
    """
    label, model_cfg, cfg = _config(arch)
    _known(cfg, _PREPROCESS_KEYS, f"preprocess: {label}: preprocess_cfg")
    image_size = _pair(model_cfg["vision_cfg"].get("image_size", 224))
    size = _pair(cfg.get("size", image_size))
    if size != image_size:
        raise ValueError(f"preprocess: {label}: size {size} is not the model's, {image_size}")
    for key, values in _PREPROCESS_VALUES.items():
        if cfg.get(key, values[0]) not in values:
            raise ValueError(f"preprocess: {label}: {key} must be one of {values}, got {cfg[key]!r}")
    fill_color = cfg.get("fill_color", 0)
    if not isinstance(fill_color, int):
        raise ValueError(f"preprocess: {label}: fill_color must be an integer, got {fill_color!r}")
    mean = _triple(cfg.get("mean", OPENAI_DATASET_MEAN), f"preprocess: {label}: mean")
    std = _triple(cfg.get("std", OPENAI_DATASET_STD), f"preprocess: {label}: std")
    if min(std) <= 0:
        raise ValueError(f"preprocess: {label}: std must be positive, got {std}")
    interpolation = cfg.get("interpolation", "bicubic")
    return Preprocess(
        size,
        mean,
        std,
        # "random" is for training; open_clip evaluates such models with bicubic.
        "bicubic" if interpolation == "random" else interpolation,
        cfg.get("resize_mode", "shortest"),
        fill_color,
    )


def _config(arch: str | PathLike[str]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A label for messages, open_clip's model_cfg, and its preprocess_cfg (empty: defaults)."""
    if arch in open_clip.list_models():
        return str(arch), open_clip.get_model_config(arch), {}
    file = Path(arch)
    if not file.is_file():
        near = difflib.get_close_matches(str(arch), open_clip.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "open_clip.list_models() has names"
        raise ValueError(f"build: {str(arch)!r} is neither an open_clip model nor a file; {hint}")
    label = str(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"build: {label} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"build: {label} must hold an object, got {type(content).__name__}")
    if "model_cfg" in content:
        _known(content, ("model_cfg", "preprocess_cfg"), f"build: {label}:")
        model_cfg, preprocess_cfg = content["model_cfg"], content.get("preprocess_cfg", {})
    else:
        model_cfg, preprocess_cfg = content, {}
    if not isinstance(model_cfg, dict) or not isinstance(preprocess_cfg, dict):
        raise ValueError(f"build: {label}: model_cfg and preprocess_cfg must be objects")
    _known(model_cfg, _MODEL_KEYS, f"build: {label}: model_cfg")
    if not isinstance(model_cfg.get("embed_dim"), int):
        raise ValueError(f"build: {label}: model_cfg needs an integer embed_dim")
    if not isinstance(model_cfg.get("vision_cfg"), dict):
        raise ValueError(f"build: {label}: model_cfg needs a vision_cfg")
    return label, model_cfg, preprocess_cfg


def _visual(label: str, model_cfg: Mapping[str, Any]) -> nn.Module:
    """The image tower alone.

    open_clip offers no public way to make only that, and its ``_build_vision_tower`` may change any
    day; the ``CLIP`` class has kept its arguments, so it is made with the smallest text tower there
    is (some hundred bytes), which is dropped at once.
    """
    vision_cfg = {**model_cfg["vision_cfg"], "output_tokens": False}  # pooled features alone
    if vision_cfg.get("timm_model_name"):
        vision_cfg["timm_model_pretrained"] = False  # never download
    text_cfg = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
    quick_gelu = model_cfg.get("quick_gelu", False)
    try:
        clip = open_clip.CLIP(model_cfg["embed_dim"], vision_cfg, text_cfg, quick_gelu=quick_gelu)
    except Exception as error:  # open_clip and timm check with asserts and errors of all kinds
        raise ValueError(f"build: open_clip cannot make the tower of {label}: {error}") from error
    visual: nn.Module = clip.visual
    return visual


def _compare(label: str, shapes: Mapping[str, torch.Size], used: Mapping[str, Tensor]) -> None:
    problems = {
        "of another shape": [
            f"{name} {tuple(used[name].shape)} instead of {tuple(shape)}"
            for name, shape in shapes.items()
            if name in used and used[name].shape != shape
        ],
        "missing": [name for name in shapes if name not in used],
        "unexpected": [f"{name} {tuple(t.shape)}" for name, t in used.items() if name not in shapes],
    }
    if any(problems.values()):
        found = "; ".join(f"{what}: {_some(names)}" for what, names in problems.items() if names)
        raise ValueError(f"build: the weights are not those of {label}: {found}. Name their own arch")


def _known(table: Iterable[str], names: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"
            raise ValueError(f"{where} has no entry {key!r}; {hint}")


def _pair(size: Any) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"preprocess: a size must be one or two positive integers, got {size!r}")
    return pair


def _triple(value: Any, where: str) -> tuple[float, float, float]:
    values = (value,) * 3 if isinstance(value, (int, float)) else tuple(value)
    if len(values) != 3 or not all(isinstance(v, (int, float)) for v in values):
        raise ValueError(f"{where} must be one or three numbers, got {value!r}")
    return (float(values[0]), float(values[1]), float(values[2]))


def _some(names: list[str], shown: int = 6) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
