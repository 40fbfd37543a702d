"""Names of tensors, whatever file they come from: ``visual.*``, ``classification_head.*``, a text tower."""

from __future__ import annotations

HEAD = "classification_head."
HEAD_WEIGHT, HEAD_BIAS = f"{HEAD}weight", f"{HEAD}bias"
POSITIONS = "visual.positional_embedding"

# The first words of a standard CLIP's text tower, which open_clip's custom-text models have below `text`.
TEXT = ("ln_final", "positional_embedding", "text_projection", "token_embedding", "transformer")
# The first word of a name -> why it cannot change the output, given that the head is fixed.
INERT = {
    **dict.fromkeys((*TEXT, "text", "text_decoder"), "text tower: unused beside a fixed head"),
    **dict.fromkeys(("logit_bias", "logit_scale"), "logit scale: already in the head"),
}


def is_visual(name: str) -> bool:
    """Whether a tensor is of the image tower."""
    return name.startswith("visual.")
