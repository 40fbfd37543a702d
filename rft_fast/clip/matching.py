"""Checks that weights are those of an architecture, and guesses which architecture weights are of."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Collection, Mapping
from os import PathLike
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from ..checkpoints.activation import NAMES, TOWERS, Activation, of_model_cfg
from ..checkpoints.canonical import POSITIONS
from ..common.words import some
from .architectures import config, image_size

_QUICK = "-quickgelu"


def check_activation(arch: str | PathLike[str], pretrained: str) -> None:
    """Check that an open_clip model name has the activation of its pretrained weights.

    OpenAI's weights, and some others, were trained with QuickGELU, which the weights do not show: under a
    name without it, open_clip warns and computes worse features.

    Args:
        arch: a model name of open_clip; others are not checked.
        pretrained: a pretrained tag; one that is unknown to the name and its QuickGELU variant is not
            checked.

    Raises:
        ValueError: the activations differ; the message has the right name.
    """
    name = str(arch)
    other = name.removesuffix(_QUICK) if name.endswith(_QUICK) else name + _QUICK
    quick = {n: open_clip.get_model_config(n).get("quick_gelu", False) for n in (name, other) if _known(n)}
    tags = {n: tag for n in quick if (tag := open_clip.get_pretrained_cfg(n, pretrained))}
    if len(quick) < 2 or not tags or quick[name] == quick[other]:
        return
    trained = next(iter(tags.values())).get("quick_gelu", False)
    if trained != quick[name]:
        was = "with" if trained else "without"
        raise ValueError(
            f"arch: {pretrained!r} was trained {was} QuickGELU, unlike {name}; use {other} instead"
        )


def _known(name: str) -> bool:
    return name in open_clip.list_models()


def check_evidence(
    arch: str | PathLike[str], activation: Mapping[str, Activation], towers: Collection[str] = TOWERS
) -> None:
    """Check an architecture against the activations that a checkpoint's file shows.

    Args:
        arch: as for :func:`rft_fast.clip.architectures.config`.
        activation: tower -> its activation (:class:`rft_fast.checkpoints.Tensors`).
        towers: those that are used; others are not checked.

    Raises:
        ValueError: the activations differ; the message has the right architecture.
    """
    label, model_cfg, _ = config(arch)
    for tower, quick in of_model_cfg(model_cfg).items():
        known = activation.get(tower)
        if known is None or known.quick == quick or tower not in towers:
            continue
        other = label.removesuffix(_QUICK) if label.endswith(_QUICK) else label + _QUICK
        if _known(other):
            remedy = f"use --arch {other} instead"
        else:
            remedy = f'set "quick_gelu": {json.dumps(known.quick)} in its model_cfg'
            if not pathlib.Path(label).is_file():
                remedy = f"write its configuration to a JSON file, {remedy}, and use that file (--arch)"
        raise ValueError(
            f"arch: the {tower} tower was trained with {known}, but {label} computes {NAMES[quick]}; {remedy}"
        )


def shapes_of(prefix: str, tower: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of a tower's tensors by name.

    Args:
        prefix: first component of the names, without a dot.
        tower: on any device.
    """
    return {f"{prefix}.{name}": tensor.shape for name, tensor in tower.state_dict().items()}


def likely(state: Mapping[str, Tensor]) -> list[str]:
    """Return the open_clip names whose shapes weights have, best first.

    Compared are the sizes of features, width, depth, patches, images, pooling and text tower. If the file
    shows the activation (:class:`rft_fast.checkpoints.Tensors`), only names with it are returned. timm's
    image towers are not recognised. No model is built.

    Args:
        state: weights by canonical name.

    Returns:
        Names of open_clip; empty if none fits.
    """
    seen = _facts_of_weights(state)
    if "width" not in seen:
        return []
    activation = {tower: known.quick for tower, known in getattr(state, "activation", {}).items()}
    fits = []
    for name in open_clip.list_models():
        model_cfg = open_clip.get_model_config(name)
        facts = _facts_of_config(model_cfg)
        quick = of_model_cfg(model_cfg)
        contradicts = any(quick.get(tower, value) != value for tower, value in activation.items())
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
    """Check the names and shapes of weights against an architecture.

    Args:
        arch: as for :func:`rft_fast.clip.architectures.config`.
        shapes: name -> shape in the architecture.
        state: the weights, by the same names.
        whole: the whole checkpoint by canonical name, by which the message suggests architectures.

    Raises:
        ValueError: names are missing, unexpected or have other shapes.
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
        advice = f"They fit {' or '.join(fits[:4])}" if known else "Use their own architecture"
        if _differ_in_number(state.get(POSITIONS), shapes.get(POSITIONS)):
            here, expected = len(state[POSITIONS]) - 1, shapes[POSITIONS][0] - 1
            advice += (
                f". The position embeddings are for another image size ({here} cells instead of "
                f"{expected}): --resize-positions resamples them for {arch} (in Python: "
                "Setup(resize_positions=True), or open_clip.model.resize_pos_embed beforehand)"
            )
        raise ValueError(f"arch: the weights do not fit {arch}: {found}. {advice}")


def _differ_in_number(table: Tensor | None, expected: torch.Size | None) -> bool:
    """Return whether two tables of positions have different lengths and the same width."""
    if table is None or expected is None or not table.ndim == len(expected) == 2:
        return False
    return table.shape[1] == expected[1] and table.shape[0] != expected[0]


def resized(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample the position embeddings of an image tower for another image size, by open_clip's function.

    Args:
        positions: float [1 + cells, width], that of the class token first; the cells form a square.
        grid: rows and columns of cells that are needed.

    Returns:
        Position embeddings [1 + rows * columns, width] in the same dtype, resampled in float32 by bicubic
        interpolation with antialiasing, except that of the class token; ``positions`` itself if the number
        fits.

    Raises:
        ValueError: the cells do not form a square.
    """
    if positions.ndim != 2 or len(positions) == 1 + grid[0] * grid[1]:
        return positions
    cells = len(positions) - 1
    if cells < 1 or math.isqrt(cells) ** 2 != cells:
        raise ValueError(
            f"arch: {POSITIONS!r} has {cells} cells, which do not form a square, so that they "
            "cannot be resampled"
        )
    if positions.is_meta:
        return positions.new_empty(1 + grid[0] * grid[1], positions.shape[1])
    state = {POSITIONS: positions.detach().float()}
    open_clip.model.resize_pos_embed(state, SimpleNamespace(visual=SimpleNamespace(grid_size=grid)))
    return state[POSITIONS].to(positions.dtype)


def _facts_of_config(model_cfg: Mapping[str, Any]) -> dict[str, object]:
    """Return the sizes that a configuration shows."""
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
    rows, columns = (side // (patch or 32) for side in image_size(model_cfg))
    facts |= {"width": width, "layers": layers, "cells": rows * columns}
    if isinstance(layers, int):
        facts |= {
            "patch": patch,
            "hidden": int(width * vision.get("mlp_ratio", 4.0)),
            "ln_pre": not vision.get("no_ln_pre", False),
            "pooler": bool(vision.get("attentional_pool", False)),
        }
    return facts


def _facts_of_weights(state: Mapping[str, Tensor]) -> dict[str, object]:
    """Return the sizes that weights show; some may be missing."""
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
