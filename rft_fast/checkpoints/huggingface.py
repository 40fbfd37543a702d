"""CLIP's weights under the names of Hugging Face transformers <-> canonical names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..common.pickles import Unreadable
from ..common.words import some
from .canonical import is_visual
from .entries import Entries, Entry

TOWERS = ("vision_model", "text_model")
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

# Models of transformers that share CLIP's names and compute something else: (name of a tensor, what it is and
# what to do).
_OTHERS: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"vision_model\.(?:head\.probe|embeddings\.patch_embedding\.bias)|logit_bias"),
        "is a SigLIP model of transformers, not a CLIP: it has no class token and pools by "
        "attention. open_clip has the same weights under its own names: --arch "
        "ViT-B-16-SigLIP with --zeroshot webli or hf-hub:timm/ViT-B-16-SigLIP "
        "(open_clip.list_pretrained() lists the others)",
    ),
    (
        re.compile(r"classifier\.(?:weight|bias)"),
        "is a CLIPForImageClassification of transformers: its classifier uses the mean of "
        "the patch tokens, without CLIP's last LayerNorm and projection, which is not "
        "supported. Fine-tune a CLIPVisionModelWithProjection with a linear layer on its "
        "normalised image_embeds instead, and save that layer as classification_head.weight "
        "and .bias",
    ),
)


def entries(state: Mapping[str, Any], origin: Mapping[str, str], notes: list[str]) -> Entries:
    """Convert names of transformers: q, k and v become one tensor, projections are transposed.

    Args:
        state: tensors by the names of transformers, without prefixes.
        origin: the same names -> those in the file.
        notes: takes what was left out.

    Returns:
        Entries under open_clip's names.

    Raises:
        Unreadable: it is another model of transformers, or has names that its CLIP does not have.
    """
    if ids := [name for name in _IDS if name in state]:
        notes.append(f"left out, position ids: {', '.join(ids)}")
    for pattern, what in _OTHERS:
        if found := next((name for name in state if pattern.fullmatch(name)), None):
            raise Unreadable(f"{what} (it has {origin[found]!r})")
    result: Entries = {}
    unknown = []
    for stored in state:
        for name, entry in _converted(stored, state, origin) if stored not in ids else ():
            if name is None:
                unknown.append(origin[stored])
            elif name in result:
                raise Unreadable(
                    f"has both {origin[stored]!r} and another name that means {name!r}; keep one of them"
                )
            else:
                result[name] = entry
    if unknown:
        raise Unreadable(
            f"holds {some(unknown)}, which CLIP of transformers does not have; "
            f"format='state-dict' reads it under its own names{_alone(origin)}"
        )
    if any(map(is_visual, result)) and "visual.proj" not in result:
        notes.append(
            "the image tower has no projection (visual_projection): the features of a CLIPVisionModel "
            "are not in CLIP's embedding space"
        )
    return result


def _alone(origin: Mapping[str, str]) -> str:
    """Tell how the CLIP within another model is read alone."""
    for name, stored in origin.items():
        if name.startswith(TOWERS) and stored != name:
            prefix = stored.removesuffix(name).rstrip(".")
            return f". The CLIP alone, under the prefix {prefix!r}: --key {prefix}"
    return ""


def _converted(
    stored: str, state: Mapping[str, Any], origin: Mapping[str, str]
) -> Iterator[tuple[str | None, Entry]]:
    """Yield (canonical name, entry) for a name of transformers; None as the name if it is unknown."""

    def entry(name: str, transposed: bool = False) -> Entry:
        return Entry.of(origin[name], state[name], transposed)

    if stored in _NAMES:
        yield _NAMES[stored], entry(stored)
    elif stored in _PROJECTIONS:
        if len(shape := entry(stored).shape) != 2:
            raise Unreadable(
                f"has {origin[stored]!r} of shape {shape}; a projection must have two dimensions"
            )
        yield _PROJECTIONS[stored], entry(stored, transposed=True)
    elif (match := _LAYER.fullmatch(stored)) is not None:
        tower, number, part, kind = match.groups()
        block = f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.{number}"
        if part in _PARTS:
            yield f"{block}.{_PARTS[part]}.{kind}", entry(stored)
        elif part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            trio = [stored.replace(part, f"self_attn.{letter}_proj") for letter in "qkv"]
            pieces = [entry(name).pieces[0] for name in trio if name in state]
            kinds = {(piece.stored.size, piece.stored.dtype) for piece in pieces}
            if len(pieces) < 3 or len(kinds) > 1 or not pieces[0].stored.size:
                raise Unreadable(
                    f"needs {', '.join(trio)} with one shape and dtype, because they become one tensor"
                )
            if part == "self_attn.q_proj":
                yield f"{block}.attn.in_proj_{kind}", Entry(tuple(pieces))
        else:
            yield None, entry(stored)
    else:
        module, _, kind = stored.rpartition(".")
        fits = module in _NORMS and kind in ("weight", "bias")
        yield f"{_NORMS[module]}.{kind}" if fits else None, entry(stored)


# --- and back -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where transformers keeps a tensor.

    Attributes:
        names: one; or those of q, k and v, which follow each other in the first dimension.
        transposed: whether it is transposed there.
    """

    names: tuple[str, ...]
    transposed: bool = False


def target(stored: str) -> tuple[str, int | None, bool] | None:
    """Return what a tensor of transformers is; None if its CLIP has no such tensor.

    Args:
        stored: its name, without prefixes.

    Returns:
        Canonical name; which third of the rows it is (q, k and v: 0, 1, 2), or None for all; and whether it
        is transposed.
    """
    if stored in _NAMES or stored in _PROJECTIONS:
        return (_NAMES | _PROJECTIONS)[stored], None, stored in _PROJECTIONS
    if match := _LAYER.fullmatch(stored):
        tower, number, part, kind = match.groups()
        block = f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.{number}"
        if part in _PARTS:
            return f"{block}.{_PARTS[part]}.{kind}", None, False
        if third := _THIRD.fullmatch(part):
            return f"{block}.attn.in_proj_{kind}", "qkv".index(third[1]), False
        return None
    module, _, kind = stored.rpartition(".")
    return (f"{_NORMS[module]}.{kind}", None, False) if module in _NORMS else None


_THIRD = re.compile(r"self_attn\.([qkv])_proj")


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
