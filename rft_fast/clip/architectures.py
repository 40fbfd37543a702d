"""Architectures of open_clip: configuration, preprocessing of images, and the two towers."""

from __future__ import annotations

import difflib
import json
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import huggingface_hub
import open_clip
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import nn

from ..checkpoints.sources import commit, in_cache, repository
from ..common import files
from ..common.words import some
from . import allowed

HUB = "hf-hub:"
_CONFIG = "open_clip_config.json"  # of a repository
MOST_JSON = 1 << 20  # bytes of an architecture file; open_clip's have some hundred

_PREPROCESS_KEYS = ("fill_color", "interpolation", "mean", "mode", "resize_mode", "size", "std")
_PREPROCESS_VALUES = {
    "mode": ("RGB",),
    "interpolation": ("bicubic", "bilinear", "random"),
    "resize_mode": ("shortest", "longest", "squash"),
}
# Towers of some hundred bytes, for when only the other one is needed.
_NO_VISION = {"image_size": 1, "patch_size": 1, "width": 1, "head_width": 1, "layers": 1}
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}


@dataclass(frozen=True)
class Preprocess:
    """How images become the model's input: open_clip's evaluation transform, in numbers.

    Attributes:
        size: (height, width) in pixels.
        mean: per RGB channel, of images in [0, 1].
        std: per RGB channel, of images in [0, 1].
        interpolation: as in ``open_clip.image_transform``.
        resize_mode: as there.
        fill_color: as there, 0 to 255.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float] = OPENAI_DATASET_MEAN
    std: tuple[float, float, float] = OPENAI_DATASET_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0


def config(arch: str | PathLike[str]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return the configuration of an architecture.

    Args:
        arch: a model name of open_clip; a JSON file, ``{"model_cfg": ..., "preprocess_cfg": ...}`` or a bare
            model_cfg; or ``hf-hub:org/name[@revision]``, whose ``open_clip_config.json`` is taken from the
            local cache of huggingface_hub or downloaded.

    Returns:
        A label for messages; the model_cfg; the preprocess_cfg, empty for open_clip's defaults.

    Raises:
        ValueError: it is none of these (the message lists the nearest names), cannot be downloaded, or has an
            entry or a value that is not allowed.
    """
    if arch in open_clip.list_models():
        return str(arch), open_clip.get_model_config(arch), {}
    label = str(arch)
    file = _from_hub(label) if label.startswith(HUB) else pathlib.Path(arch)
    if not file.is_file():
        near = difflib.get_close_matches(label, open_clip.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "open_clip.list_models() has names"
        raise ValueError(
            f"arch: {label!r} is neither an open_clip model, nor a JSON file, nor 'hf-hub:org/name'; {hint}"
        )
    if file.stat().st_size > MOST_JSON:
        raise ValueError(
            f"arch: {label} has {file.stat().st_size:,} bytes, more than any architecture's file"
        )
    try:
        content = json.loads(files.read_text(file))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"arch: {label} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"arch: {label} must hold an object, got {type(content).__name__}")
    if "model_cfg" in content:
        allowed.known(content, ("model_cfg", "preprocess_cfg"), f"arch: {label}:")
        model_cfg, preprocess_cfg = content["model_cfg"], content.get("preprocess_cfg", {})
    else:
        model_cfg, preprocess_cfg = content, {}
    if not isinstance(model_cfg, dict) or not isinstance(preprocess_cfg, dict):
        raise ValueError(f"arch: {label}: model_cfg and preprocess_cfg must be objects")
    allowed.check(model_cfg, f"arch: {label}:")
    if not isinstance(model_cfg.get("embed_dim"), int):
        raise ValueError(f"arch: {label}: model_cfg needs an integer embed_dim")
    if not isinstance(model_cfg.get("vision_cfg"), dict):
        raise ValueError(f"arch: {label}: model_cfg needs a vision_cfg")
    return label, model_cfg, preprocess_cfg


def preprocess(arch: str | PathLike[str], pretrained: str | None = None) -> Preprocess:
    """Return how images of an architecture are preprocessed.

    Args:
        arch: as for :func:`config`. What the ``preprocess_cfg`` of a file does not set has open_clip's
            defaults: OpenAI's mean and standard deviation, the shortest edge resized (bicubic), centre crop.
        pretrained: for a model name, the pretrained tag of the weights or of their start, whose settings are
            used. None: the settings that all tags of that name share (SigLIP's all use a mean of .5, say), or
            open_clip's defaults if they differ.

    Raises:
        ValueError: an unknown architecture or tag, or settings that do not fit it.
    """
    label, model_cfg, cfg = config(arch)
    if label in open_clip.list_models():
        cfg = _of_tags(label, pretrained)
    elif pretrained is not None:
        raise ValueError(
            f"preprocess: only model names of open_clip have pretrained tags, and {label} is not "
            f"one; leave the tag {pretrained!r} out, and write its settings into preprocess_cfg"
        )
    allowed.known(cfg, _PREPROCESS_KEYS, f"preprocess: {label}: preprocess_cfg")
    expected = image_size(model_cfg)
    size = _pair(cfg.get("size", expected))
    if size != expected:
        raise ValueError(f"preprocess: {label}: size {size} differs from the model's, {expected}")
    for key, values in _PREPROCESS_VALUES.items():
        if cfg.get(key, values[0]) not in values:
            raise ValueError(f"preprocess: {label}: {key} must be one of {values}, got {cfg[key]!r}")
    fill_color = cfg.get("fill_color", 0)
    if not isinstance(fill_color, int) or not 0 <= fill_color <= 255:
        raise ValueError(f"preprocess: {label}: fill_color must be an integer, 0 to 255, got {fill_color!r}")
    mean = _triple(cfg.get("mean", OPENAI_DATASET_MEAN), f"preprocess: {label}: mean")
    std = _triple(cfg.get("std", OPENAI_DATASET_STD), f"preprocess: {label}: std")
    if min(std) <= 0:
        raise ValueError(f"preprocess: {label}: std must be positive, got {std}")
    interpolation = cfg.get("interpolation", "bicubic")
    return Preprocess(
        size,
        mean,
        std,
        # "random" is for training; open_clip evaluates with bicubic.
        "bicubic" if interpolation == "random" else interpolation,
        cfg.get("resize_mode", "shortest"),
        fill_color,
    )


def visual(arch: str | PathLike[str]) -> nn.Module:
    """Build the image tower with random weights: images [n, 3, h, w] -> features [n, embed_dim].

    Args:
        arch: as for :func:`config`.

    Raises:
        ValueError: as :func:`config`, or open_clip cannot build the tower.
    """
    label, model_cfg, _ = config(arch)
    vision_cfg = {**model_cfg["vision_cfg"], "output_tokens": False}  # pooled features only
    vision_cfg["timm_model_pretrained"] = False  # never download
    tower: nn.Module = _make(label, model_cfg, vision_cfg, _NO_TEXT).visual
    return tower


def text(arch: str | PathLike[str]) -> nn.Module:
    """Build the text tower with random weights: tokens int64 [n, context] -> features [n, embed_dim].

    Args:
        arch: as for :func:`config`.

    Returns:
        open_clip's ``TextTransformer``, also for a standard CLIP.

    Raises:
        ValueError: as :func:`config`; or the architecture has no text_cfg, or a text tower of Hugging Face.
    """
    label, model_cfg, _ = config(arch)
    text_cfg = text_config(label, model_cfg)
    if name := text_cfg.get("hf_model_name"):
        raise ValueError(
            f"arch: the text tower of {label} is {name} of Hugging Face, which is not supported; "
            "make the head with that model, and give it with --zeroshot-head FILE"
        )
    tower: nn.Module = _make(label, model_cfg, _NO_VISION, {**text_cfg, "output_tokens": False}).text
    return tower


def text_config(label: str, model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the text_cfg of a model_cfg.

    Args:
        label: of the architecture, for the message.
        model_cfg: in open_clip's format.

    Raises:
        ValueError: there is none.
    """
    text_cfg = model_cfg.get("text_cfg")
    if not isinstance(text_cfg, dict):
        raise ValueError(f"arch: {label}: model_cfg needs a text_cfg to encode prompts")
    return text_cfg


def image_size(model_cfg: Mapping[str, Any]) -> tuple[int, int]:
    """Return the height and width of input images in pixels.

    Args:
        model_cfg: in open_clip's format.

    Raises:
        ValueError: the image_size is not one or two positive integers.
    """
    return _pair(model_cfg["vision_cfg"].get("image_size", 224))


def pin(arch: str, network: bool) -> str:
    """Pin a repository to the commit of its configuration: ``hf-hub:org/name@commit``.

    Args:
        arch: ``hf-hub:org/name[@revision]``.
        network: whether to ask Hugging Face for the current commit; otherwise only the local cache is used.

    Returns:
        ``arch`` itself if the cache does not show the commit; empty if it is not cached and ``network`` is
        false.

    Raises:
        ValueError: it cannot be downloaded.
    """
    name, revision = _repository(arch)
    file = _from_hub(arch) if network else in_cache(name, [_CONFIG], revision)
    if file is None:
        return ""
    pinned = commit(file)
    return f"{HUB}{name}@{pinned}" if pinned else arch


def _repository(arch: str) -> tuple[str, str | None]:
    if (parts := repository(arch)) is None:
        raise ValueError(f"arch: {arch!r} must be hf-hub:org/name or hf-hub:org/name@revision")
    return parts


def _from_hub(arch: str) -> pathlib.Path:
    name, revision = _repository(arch)
    try:
        return pathlib.Path(huggingface_hub.hf_hub_download(name, _CONFIG, revision=revision))
    except Exception as error:  # of the network, the hub, or an invalid name
        raise ValueError(
            f"arch: the open_clip_config.json of {arch} could not be downloaded: {error}. "
            "Offline: download it once while online, and give that file as --arch"
        ) from error


def _of_tags(name: str, pretrained: str | None) -> dict[str, Any]:
    """Return the preprocessing of a pretrained tag, or what all tags of a model name share."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is not None:
        if not open_clip.get_pretrained_cfg(name, pretrained):
            near = difflib.get_close_matches(pretrained, tags, n=3) or tags
            raise ValueError(
                f"preprocess: {name} has no pretrained tag {pretrained!r}; it has {some(near) or 'none'}"
            )
        tags = [pretrained]
    configs = []
    for tag in tags:
        tag_cfg = open_clip.get_pretrained_cfg(name, tag)
        configs.append({key: tag_cfg[key] for key in _PREPROCESS_KEYS if key in tag_cfg})
    return configs[0] if configs and all(cfg == configs[0] for cfg in configs) else {}


def _make(
    label: str, model_cfg: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any]
) -> Any:
    """Build both towers.

    open_clip has no public function for one tower, and its ``_build_vision_tower`` may change; the classes
    have kept their arguments, so the tower that is not needed is made tiny.
    """
    quick_gelu = model_cfg.get("quick_gelu", False)
    try:
        return open_clip.CustomTextCLIP(model_cfg["embed_dim"], {**vision}, {**text}, quick_gelu=quick_gelu)
    except Exception as error:  # open_clip and timm raise asserts and many kinds of errors
        what = str(error) or type(error).__name__  # an assert has no message
        raise ValueError(f"arch: open_clip cannot build the tower of {label}: {what}") from error


def _pair(size: Any) -> tuple[int, int]:
    pair = size if isinstance(size, (list, tuple)) else (size, size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"preprocess: a size must be one or two positive integers, got {size!r}")
    return (pair[0], pair[1])


def _triple(value: Any, where: str) -> tuple[float, float, float]:
    values = value if isinstance(value, (list, tuple)) else (value,) * 3
    if len(values) != 3 or not all(isinstance(v, (int, float)) and -1e30 < v < 1e30 for v in values):
        raise ValueError(f"{where} must be one or three finite numbers, got {value!r}")
    return (float(values[0]), float(values[1]), float(values[2]))
