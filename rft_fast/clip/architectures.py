"""What open_clip knows of an architecture: its configuration, its two towers, how its images are prepared."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn

from ..checkpoints.activation import NAMES, TOWERS, Activation, of_model_cfg
from ..checkpoints.sources import commit, in_cache, repository
from ..common import files
from ..common.words import some
from . import allowed

HUB = "hf-hub:"
_CONFIG = "open_clip_config.json"  # of a repository
QUICK = "-quickgelu"
MOST_JSON = 1 << 20  # bytes of an architecture's file; open_clip's take some hundred
POSITIONS = "visual.positional_embedding"

_PREPROCESS_KEYS = ("fill_color", "interpolation", "mean", "mode", "resize_mode", "size", "std")
_PREPROCESS_VALUES = {
    "mode": ("RGB",),
    "interpolation": ("bicubic", "bilinear", "random"),
    "resize_mode": ("shortest", "longest", "squash"),
}
# A tower of some hundred bytes, for when only the other one is wanted.
_NO_VISION = {"image_size": 1, "patch_size": 1, "width": 1, "head_width": 1, "layers": 1}
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}


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


def config(arch: str | PathLike[str]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """What open_clip knows of an architecture.

    arch: an open_clip model name; or a JSON file in one of open_clip's formats,
        ``{"model_cfg": ..., "preprocess_cfg": ...}`` or a bare model_cfg; or
        ``hf-hub:org/name[@revision]``, whose ``open_clip_config.json`` is taken from the local cache of
        huggingface_hub or downloaded.

    Returns a label for messages, the model_cfg, and the preprocess_cfg (empty: open_clip's defaults).

    Raises ValueError for an architecture that is none of these (with the nearest names), that cannot be
    had without a network, or whose configuration has entries unknown here.
    """
    if arch in open_clip.list_models():
        return str(arch), open_clip.get_model_config(arch), {}
    label = str(arch)
    file = _from_hub(label) if label.startswith(HUB) else Path(arch)
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
    """How the images of an architecture are prepared.

    arch: as in :func:`config`. A file's ``preprocess_cfg`` counts; what it leaves open means open_clip's
        defaults: OpenAI's mean and standard deviation, the shortest edge resized (bicubic), centre crop.
    pretrained: for a model name, the pretrained tag whose weights are used or were fine-tuned: its own
        settings count. None: what all tags of that name agree on (SigLIP's all use a mean of .5, say),
        and open_clip's defaults where they do not agree.

    Raises ValueError for an unknown architecture or tag, and for settings that do not fit it.
    """
    label, model_cfg, cfg = config(arch)
    if label in open_clip.list_models():
        cfg = _of_tags(label, pretrained)
    elif pretrained is not None:
        raise ValueError(
            f"preprocess: pretrained tags belong to open_clip's model names, and {label} is none; "
            f"leave the tag {pretrained!r} out, and write its settings into preprocess_cfg"
        )
    allowed.known(cfg, _PREPROCESS_KEYS, f"preprocess: {label}: preprocess_cfg")
    image_size = _pair(model_cfg["vision_cfg"].get("image_size", 224))
    size = _pair(cfg.get("size", image_size))
    if size != image_size:
        raise ValueError(f"preprocess: {label}: size {size} is not the model's, {image_size}")
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
        # "random" is for training; open_clip evaluates such models with bicubic.
        "bicubic" if interpolation == "random" else interpolation,
        cfg.get("resize_mode", "shortest"),
        fill_color,
    )


def visual(arch: str | PathLike[str]) -> nn.Module:
    """The image tower alone, with random weights: images [n, 3, h, w] -> features [n, embed_dim].

    arch: as in :func:`config`. Raises ValueError for a tower that open_clip cannot make.
    """
    label, model_cfg, _ = config(arch)
    vision_cfg = {**model_cfg["vision_cfg"], "output_tokens": False}  # pooled features alone
    vision_cfg["timm_model_pretrained"] = False  # never download
    tower: nn.Module = _make(label, model_cfg, vision_cfg, _NO_TEXT).visual
    return tower


def text(arch: str | PathLike[str]) -> nn.Module:
    """The text tower alone, with random weights: tokens int64 [n, context] -> features [n, embed_dim].

    arch: as in :func:`config`. The tower is open_clip's ``TextTransformer``, of a standard CLIP as well.

    Raises ValueError for an architecture without a text_cfg, or with a text tower of Hugging Face.
    """
    label, model_cfg, _ = config(arch)
    text_cfg = _text_cfg(label, model_cfg)
    if name := text_cfg.get("hf_model_name"):
        raise ValueError(
            f"arch: the text tower of {label} is Hugging Face's {name}, which is not supported here; "
            "make the head with that model and give it (--zeroshot-head FILE)"
        )
    tower: nn.Module = _make(label, model_cfg, _NO_VISION, {**text_cfg, "output_tokens": False}).text
    return tower


class NotHere(ValueError):
    """A tokenizer that is not on this machine, where nothing may be downloaded."""


def tokenizer(arch: str | PathLike[str], network: bool | None = None) -> Any:
    """open_clip's tokenizer of an architecture: strings -> int64 [n, context].

    Args:
        arch: as in :func:`config`.
        network: whether a tokenizer of Hugging Face may be downloaded. None: that of an open_clip model name,
            and one in the repository that ``arch`` is, but not one that only a file names.

    Raises:
        NotHere: it would have to be downloaded, and may not.
        ValueError: it is not to be had (Hugging Face's need the package transformers), is not the one of the
            model's vocabulary, or is not one that a file may name (:func:`rft_fast.clip.allowed.tokenizer`).
    """
    label, model_cfg, _ = config(arch)
    text_cfg = _text_cfg(label, model_cfg)
    context = text_cfg.get("context_length", 77)
    options = text_cfg.get("tokenizer_kwargs") or {}
    if name := text_cfg.get("hf_tokenizer_name"):
        return _of_hugging_face(label, name, context, text_cfg.get("tokenizer_mode"), options, network)
    try:
        simple = open_clip.SimpleTokenizer(context_length=context, **options)
    except Exception as error:  # whatever a configuration's words do to it
        raise ValueError(f"arch: open_clip cannot make the tokenizer of {label}: {error}") from error
    vocabulary = text_cfg.get("vocab_size", 49408)
    if vocabulary != simple.vocab_size:
        raise ValueError(
            f"arch: {label} has a vocabulary of {vocabulary} tokens and names no tokenizer, but CLIP's own "
            f"has {simple.vocab_size}, so its prompts cannot be tokenised here; give a head that was made "
            "elsewhere (--zeroshot-head FILE)"
        )
    return simple


def _of_hugging_face(
    label: str, name: str, context: int, mode: str | None, options: Mapping[str, Any], network: bool | None
) -> Any:
    """A tokenizer of transformers, from the local cache first."""
    of, revision = repository(label) or ("", None)
    own, local = label in open_clip.list_models(), False
    if not own:
        beside = None if label.startswith(HUB) else Path(label).parent
        name, local = allowed.tokenizer(name, beside, f"arch: {label}:")
        own = name == of
    if local:
        network = False
    elif network is None:
        network = own
    pinned = {"revision": revision} if revision and name == of else {}
    problem: Exception | None = None
    for offline in (True, False) if network else (True,):
        try:
            return open_clip.tokenizer.HFTokenizer(
                name,
                context,
                tokenizer_mode=mode,
                **options,
                **pinned,
                local_files_only=offline,
                trust_remote_code=False,
            )
        except Exception as error:  # of the network, of the hub, of transformers, or that it is missing
            problem = error
    reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
    said = f"arch: {label} needs the tokenizer {name!r} of Hugging Face, which could not be had: {reason}."
    other = "or give a head that was made elsewhere (--zeroshot-head FILE)"
    if local:
        raise ValueError(f"{said} Install transformers, {other}") from problem
    if network:
        remedy = "Install transformers and download it once while online"
        raise ValueError(f"{said} {remedy}, {other}") from problem
    raise NotHere(
        f"{said} Nothing downloads it unless you say so: install transformers, then hf download {name}, or "
        f"--fetch, {other}"
    ) from problem


def check_activation(arch: str | PathLike[str], pretrained: str) -> None:
    """Refuses an open_clip model name that has the other activation than its pretrained weights.

    OpenAI's weights, and some others, were trained with QuickGELU, which cannot be seen in them: under a
    name without it, open_clip warns and gives worse features.

    Raises ValueError naming the right architecture. A tag unknown to both names is not judged here.
    """
    name = str(arch)
    other = name.removesuffix(QUICK) if name.endswith(QUICK) else name + QUICK
    quick = {n: open_clip.get_model_config(n).get("quick_gelu", False) for n in _names((name, other))}
    tags = {n: tag for n in quick if (tag := open_clip.get_pretrained_cfg(n, pretrained))}
    if len(quick) < 2 or not tags or quick[name] == quick[other]:
        return
    trained = next(iter(tags.values())).get("quick_gelu", False)
    if trained != quick[name]:
        was = "with" if trained else "without"
        raise ValueError(
            f"arch: {pretrained!r} was trained {was} QuickGELU, and {name} is not; name {other} instead"
        )


def check_evidence(
    arch: str | PathLike[str], activation: Mapping[str, Activation], towers: Collection[str] = TOWERS
) -> None:
    """Refuses an architecture with the other activation than what a checkpoint's file says of itself.

    Args:
        arch: as in :func:`config`.
        activation: tower -> its activation (:class:`rft_fast.checkpoints.Tensors`).
        towers: those that are used; others are not judged.

    Raises:
        ValueError: a contradiction, with the architecture to name instead.
    """
    label, model_cfg, _ = config(arch)
    for tower, quick in of_model_cfg(model_cfg).items():
        known = activation.get(tower)
        if known is None or known.quick == quick or tower not in towers:
            continue
        other = label.removesuffix(QUICK) if label.endswith(QUICK) else label + QUICK
        if _names([other]):
            cure = f"name --arch {other} instead"
        else:
            cure = f'set "quick_gelu": {json.dumps(known.quick)} in its model_cfg'
            if not Path(label).is_file():
                cure = f"write its configuration to a JSON file, {cure}, and name that file (--arch)"
        raise ValueError(
            f"arch: the {tower} tower was trained with {known}, but {label} computes {NAMES[quick]}; {cure}"
        )


# --- which architecture are these weights of? ---------------------------------------------------------


def likely(state: Mapping[str, Tensor]) -> list[str]:
    """The open_clip names that weights under canonical names fit, best first; empty when none is known.

    Judged by what shapes tell: feature size, width, depth, patches, image size, pooling, text tower.
    Whether QuickGELU was used is known where the file says so (:class:`rft_fast.checkpoints.Tensors`); else
    both names are given. timm's image towers are not
    recognised. No model is made.
    """
    seen = _seen(state)
    if "width" not in seen:
        return []
    told = {tower: known.quick for tower, known in getattr(state, "activation", {}).items()}
    fits = []
    for name in open_clip.list_models():
        model_cfg = open_clip.get_model_config(name)
        facts = _facts(model_cfg)
        quick = of_model_cfg(model_cfg)
        contradicts = any(quick.get(tower, value) != value for tower, value in told.items())
        if not contradicts and all(facts.get(key) == value for key, value in seen.items()):
            exotic = "hf_model_name" in model_cfg["text_cfg"] or "multimodal_cfg" in model_cfg
            fits.append((exotic, len(name), name))
    return [name for *_, name in sorted(fits)]


def compare(
    arch: str | PathLike[str],
    shapes: Mapping[str, torch.Size],
    state: Mapping[str, Tensor],
    whole: Mapping[str, Tensor],
) -> None:
    """Refuses weights whose names and shapes are not these of the architecture, and names theirs.

    state: the weights in question. whole: the checkpoint that they are of, which tells more.

    Raises ValueError: which names are missing, unexpected or of another shape.
    """
    problems = {
        "of another shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}"
            for name, shape in shapes.items()
            if name in state and state[name].shape != shape
        ],
        "missing": [name for name in shapes if name not in state],
        "unexpected": [f"{name} {tuple(t.shape)}" for name, t in state.items() if name not in shapes],
    }
    if any(problems.values()):
        found = "; ".join(f"{what}: {some(names)}" for what, names in problems.items() if names)
        fits = likely(whole)
        known = fits and str(arch) not in fits
        advice = f"They fit {' or '.join(fits[:4])}" if known else "Name their own arch"
        if _differ_in_number(state.get(POSITIONS), shapes.get(POSITIONS)):
            here, wanted = len(state[POSITIONS]) - 1, shapes[POSITIONS][0] - 1
            advice += (
                f". The positions are those of another image size ({here} cells instead of {wanted}): "
                f"--resize-positions resamples them to that of {arch}, at either end (in Python: "
                "Setup(resize_positions=True), or open_clip.model.resize_pos_embed beforehand)"
            )
        raise ValueError(f"arch: the weights are not those of {arch}: {found}. {advice}")


def _differ_in_number(table: Tensor | None, wanted: torch.Size | None) -> bool:
    """Whether a table of positions has another number of them, of the same width."""
    if table is None or wanted is None or not table.ndim == len(wanted) == 2:
        return False
    return table.shape[1] == wanted[1] and table.shape[0] != wanted[0]


def resized(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """The positions of an image tower resampled for another image size, by open_clip's own function.

    Args:
        positions: float [1 + cells, width], that of the class token first; the cells form a square.
        grid: rows and columns of cells that are wanted.

    Returns:
        The positions [1 + rows * columns, width], in the same dtype: resampled in float32, bicubic with
        antialiasing, but for that of the class token; the very same where their number is as wanted.

    Raises:
        ValueError: cells that form no square.
    """
    if positions.ndim != 2 or len(positions) == 1 + grid[0] * grid[1]:
        return positions
    cells = len(positions) - 1
    if cells < 1 or math.isqrt(cells) ** 2 != cells:
        raise ValueError(
            f"arch: {POSITIONS!r} has {cells} cells, which form no square: they cannot be resampled"
        )
    if positions.is_meta:
        return positions.new_empty(1 + grid[0] * grid[1], positions.shape[1])
    state = {POSITIONS: positions.detach().float()}
    open_clip.model.resize_pos_embed(state, SimpleNamespace(visual=SimpleNamespace(grid_size=grid)))
    return state[POSITIONS].to(positions.dtype)


def _facts(model_cfg: Mapping[str, Any]) -> dict[str, object]:
    """What an architecture's configuration says of its shapes."""
    vision, text_cfg = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    facts: dict[str, object] = {"embed_dim": model_cfg["embed_dim"]}
    if "hf_model_name" not in text_cfg:
        context = text_cfg.get("context_length", 77) + text_cfg.get("embed_cls", False)
        layers = text_cfg.get("layers", 12)
        facts |= {"vocabulary": text_cfg.get("vocab_size", 49408), "text layers": layers}
        facts |= {"context": (context, text_cfg.get("width", 512))}
    if vision.get("timm_model_name"):
        return facts
    width, layers, patch = vision.get("width", 768), vision.get("layers", 12), vision.get("patch_size", 16)
    # A ModifiedResNet halves the image five times, so it has cells of 32 pixels.
    rows, columns = (side // (patch or 32) for side in _pair(vision.get("image_size", 224)))
    facts |= {"width": width, "layers": layers, "cells": rows * columns}
    if isinstance(layers, int):
        facts |= {
            "patch": patch,
            "hidden": int(width * vision.get("mlp_ratio", 4.0)),
            "ln_pre": not vision.get("no_ln_pre", False),
            "pooler": bool(vision.get("attentional_pool", False)),
        }
    return facts


def _seen(state: Mapping[str, Tensor]) -> dict[str, object]:
    """The same, of weights: as much as they have."""
    seen: dict[str, object] = {}

    def see(fact: str, name: str, dim: int) -> None:
        if name in state and state[name].ndim > dim:
            seen[fact] = state[name].shape[dim]

    def depth(prefix: str) -> int:
        return len({name[len(prefix) :].partition(".")[0] for name in state if name.startswith(prefix)})

    see("vocabulary", "token_embedding.weight", 0)
    see("vocabulary", "text.token_embedding.weight", 0)
    for prefix in ("", "text."):
        if (name := f"{prefix}positional_embedding") in state:
            seen["context"] = tuple(state[name].shape)
        if blocks := depth(f"{prefix}transformer.resblocks."):
            seen["text layers"] = blocks
    if "visual.layer1.0.conv1.weight" in state:
        see("width", "visual.layer1.0.conv1.weight", 0)
        see("embed_dim", "visual.attnpool.c_proj.weight", 0)
        see("cells", "visual.attnpool.positional_embedding", 0)
        seen["layers"] = [depth(f"visual.layer{stage}.") for stage in (1, 2, 3, 4)]
    elif "visual.conv1.weight" in state:
        see("width", "visual.conv1.weight", 0)
        see("patch", "visual.conv1.weight", 3)
        see("embed_dim", "visual.proj", 1)
        see("cells", "visual.positional_embedding", 0)
        see("hidden", "visual.transformer.resblocks.0.mlp.c_fc.weight", 0)
        seen["layers"] = depth("visual.transformer.resblocks.")
        seen["ln_pre"] = "visual.ln_pre.weight" in state
        seen["pooler"] = "visual.attn_pool.query" in state
    if isinstance(cells := seen.get("cells"), int):
        seen["cells"] = cells - 1  # the class token's
    return seen


# --- helpers ------------------------------------------------------------------------------------------


def _repository(arch: str) -> tuple[str, str | None]:
    if (found := repository(arch)) is None:
        raise ValueError(f"arch: {arch!r} must be hf-hub:org/name or hf-hub:org/name@revision")
    return found


def _from_hub(arch: str) -> Path:
    name, revision = _repository(arch)
    try:
        return Path(huggingface_hub.hf_hub_download(name, _CONFIG, revision=revision))
    except Exception as error:  # of the network, of the hub, or a bad name
        raise ValueError(
            f"arch: the open_clip_config.json of {arch} could not be had: {error}. Offline, fetch it once "
            "where there is a network, and name that file as the arch"
        ) from error


def pin(arch: str, network: bool) -> str:
    """A repository with the commit that its configuration is of: ``hf-hub:org/name@commit``.

    Args:
        network: ask Hugging Face for the newest one; otherwise the local cache alone.

    Returns:
        ``arch`` itself where the cache does not tell the commit; empty where nothing is in it and nothing may
        be downloaded.

    Raises:
        ValueError: it cannot be had.
    """
    name, revision = _repository(arch)
    file = _from_hub(arch) if network else in_cache(name, [_CONFIG], revision)
    if file is None:
        return ""
    found = commit(file)
    return f"{HUB}{name}@{found}" if found else arch


def _of_tags(name: str, pretrained: str | None) -> dict[str, Any]:
    """The preprocessing of a model name's pretrained tag, or what all its tags share."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is not None:
        if not open_clip.get_pretrained_cfg(name, pretrained):
            near = difflib.get_close_matches(pretrained, tags, n=3) or tags
            raise ValueError(
                f"preprocess: {name} has no pretrained tag {pretrained!r}; it has {some(near) or 'none'}"
            )
        tags = [pretrained]
    found = []
    for tag in tags:
        tag_cfg = open_clip.get_pretrained_cfg(name, tag)
        found.append({key: tag_cfg[key] for key in _PREPROCESS_KEYS if key in tag_cfg})
    return found[0] if found and all(cfg == found[0] for cfg in found) else {}


def _make(
    label: str, model_cfg: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any]
) -> Any:
    """Both towers. open_clip offers no public way to make one alone, and its ``_build_vision_tower`` may
    change any day; the classes have kept their arguments, so the unwanted tower is made tiny."""
    quick_gelu = model_cfg.get("quick_gelu", False)
    try:
        return open_clip.CustomTextCLIP(model_cfg["embed_dim"], {**vision}, {**text}, quick_gelu=quick_gelu)
    except Exception as error:  # open_clip and timm check with asserts and errors of all kinds
        what = str(error) or type(error).__name__  # an assert says nothing
        raise ValueError(f"arch: open_clip cannot make the tower of {label}: {what}") from error


def _text_cfg(label: str, model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    text_cfg = model_cfg.get("text_cfg")
    if not isinstance(text_cfg, dict):
        raise ValueError(f"arch: {label}: model_cfg needs a text_cfg where prompts are encoded")
    return text_cfg


def _names(candidates: Iterable[str]) -> list[str]:
    return [name for name in candidates if name in open_clip.list_models()]


def _pair(size: Any) -> tuple[int, int]:
    pair = size if isinstance(size, (list, tuple)) else (size, size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"preprocess: a size must be one or two positive integers, got {size!r}")
    return (pair[0], pair[1])


def _triple(value: Any, where: str) -> tuple[float, float, float]:
    values = value if isinstance(value, (list, tuple)) else (value,) * 3
    if len(values) != 3 or not all(isinstance(v, (int, float)) and -1e30 < v < 1e30 for v in values):
        raise ValueError(f"{where} must be one or three numbers, finite ones, got {value!r}")
    return (float(values[0]), float(values[1]), float(values[2]))
