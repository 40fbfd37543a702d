"""Names of Hugging Face transformers -> canonical names, and back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.pickles import Unreadable
from ..common.words import some
from .canonical import is_visual

_NAMES = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "logit_scale": "logit_scale",
}
_NORMS = {
    "vision_model.pre_layrnorm": "visual.ln_pre",  # sic
    "vision_model.pre_layernorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "text_model.final_layer_norm": "ln_final",
}
_PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_PROJECTIONS = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
_LAYER = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_IDS = ("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids")


def converted(state: Mapping[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Convert CLIP's weights to open_clip's names: q, k and v in one tensor, projections transposed.

    Args:
        state: tensors by their names in transformers.
        notes: gets what was left out.

    Raises:
        Unreadable: a name is unknown, or two become one.
    """
    state = without(state, _IDS, "position ids", notes)
    result: dict[str, Tensor] = {}
    unknown = []
    for stored, tensor in state.items():
        for name, value in _converted(stored, tensor, state):
            if name is None:
                unknown.append(stored)
            elif name in result:
                raise Unreadable(f"has {stored!r} and another name that both mean {name!r}; keep one of them")
            else:
                result[name] = value
    if unknown:
        raise Unreadable(
            f"holds {some(unknown)}, which transformers' CLIP does not have; format='state-dict' keeps "
            "its names"
        )
    if any(map(is_visual, result)) and "visual.proj" not in result:
        notes.append(
            "the image tower has no projection (visual_projection): the features of a CLIPVisionModel "
            "are not in CLIP's embedding space"
        )
    return result


def _converted(
    stored: str, tensor: Tensor, state: Mapping[str, Tensor]
) -> Iterator[tuple[str | None, Tensor]]:
    """Yield (canonical name, tensor) for a tensor of transformers; None as the name if it is unknown."""
    if stored in _NAMES:
        yield _NAMES[stored], tensor
    elif stored in _PROJECTIONS:
        if tensor.ndim != 2:
            raise Unreadable(
                f"has {stored!r} of shape {tuple(tensor.shape)}; a projection has two dimensions"
            )
        yield _PROJECTIONS[stored], tensor.T.contiguous()
    elif (match := _LAYER.fullmatch(stored)) is not None:
        tower, number, part, kind = match.groups()
        block = f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.{number}"
        if part in _PARTS:
            yield f"{block}.{_PARTS[part]}.{kind}", tensor
        elif part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            trio = [stored.replace(part, f"self_attn.{letter}_proj") for letter in "qkv"]
            parts = [state[name] for name in trio if name in state]
            if len(parts) < 3 or len({(p.shape, p.dtype) for p in parts}) > 1 or tensor.ndim == 0:
                raise Unreadable(
                    f"needs {', '.join(trio)}, all of one shape and dtype: they become one tensor"
                )
            if part == "self_attn.q_proj":
                yield f"{block}.attn.in_proj_{kind}", torch.cat(parts)
        else:
            yield None, tensor
    else:
        module, _, kind = stored.rpartition(".")
        fits = module in _NORMS and kind in ("weight", "bias")
        yield f"{_NORMS[module]}.{kind}" if fits else None, tensor


def without(state: Mapping[str, Any], names: tuple[str, ...], what: str, notes: list[str]) -> dict[str, Any]:
    """Drop some names, with a note.

    Args:
        state: values by name.
        names: to drop, where they occur.
        what: what they are, for the note.
        notes: gets it.
    """
    if dropped := [name for name in names if name in state]:
        notes.append(f"left out, {what}: {', '.join(dropped)}")
    return {name: value for name, value in state.items() if name not in dropped}


@dataclass(frozen=True)
class Place:
    """Where transformers keeps a tensor.

    Attributes:
        names: one; or those of q, k and v, which follow each other in the first dimension.
        transposed: whether it is transposed there.
    """

    names: tuple[str, ...]
    transposed: bool = False


def place(name: str) -> Place | None:
    """Return where transformers keeps the tensor of a canonical name; None: CLIP has no such tensor there."""
    if name in _PLACES:
        return _PLACES[name]
    module, _, kind = name.rpartition(".")
    if module in _NORM_PLACES and kind in ("weight", "bias"):
        return Place((f"{_NORM_PLACES[module]}.{kind}",))
    if (match := _BLOCK.fullmatch(name)) is None:
        return None
    tower, number, part = match.groups()
    layer = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}"
    if part.startswith("attn.in_proj_"):
        kind = part.removeprefix("attn.in_proj_")
        return Place(tuple(f"{layer}.self_attn.{letter}_proj.{kind}" for letter in "qkv"))
    part, _, kind = part.rpartition(".")
    return Place((f"{layer}.{_PART_PLACES[part]}.{kind}",))


_PLACES = {
    **{name: Place((stored,)) for stored, name in _NAMES.items()},
    **{name: Place((stored,), transposed=True) for stored, name in _PROJECTIONS.items()},
}
# "pre_layrnorm" comes before "pre_layernorm", which only some converters write.
_NORM_PLACES = {name: stored for stored, name in reversed(_NORMS.items())}
_PART_PLACES = {name: stored for stored, name in _PARTS.items()}
_BLOCK = re.compile(
    rf"(visual\.)?transformer\.resblocks\.(\d+)\."
    rf"(attn\.in_proj_(?:weight|bias)|(?:{'|'.join(map(re.escape, _PART_PLACES))})\.(?:weight|bias))"
)
