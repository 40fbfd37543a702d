"""Canonical names of tensors: image tower ``visual.*``, head ``classification_head.*``, text tower."""

from __future__ import annotations

HEAD = "classification_head."
HEAD_WEIGHT, HEAD_BIAS = f"{HEAD}weight", f"{HEAD}bias"
POSITIONS = "visual.positional_embedding"

# First components of the text tower's names in a standard CLIP; open_clip's custom-text models prefix
# `text.`.
TEXT = ("ln_final", "positional_embedding", "text_projection", "token_embedding", "transformer")
# Long-CLIP's second table of text positions, which no text tower here adds; the mask in a traced CLIP.
_BESIDE = ("positional_embedding_res", "attn_mask")
# First component of a name -> why it cannot change the output if the head is fixed.
INERT = {
    **dict.fromkeys((*TEXT, *_BESIDE, "text", "text_decoder"), "text tower: unused with a fixed head"),
    **dict.fromkeys(("logit_bias", "logit_scale"), "logit scale: already in the head"),
}


def is_visual(name: str) -> bool:
    """Return whether a tensor belongs to the image tower."""
    return name.startswith("visual.")
