"""Robust Fine-Tuning paths between CLIP models: interpolate, perturb, prune, in place and fast."""

from rft_fast import studies
from rft_fast.kernels import (
    Plan,
    interpolate_,
    keep_mask_like,
    noise_like,
    perturb_,
    write_,
)
from rft_fast.path import Path

__version__ = "0.1.0"

__all__ = [
    "Path",
    "Plan",
    "__version__",
    "interpolate_",
    "keep_mask_like",
    "noise_like",
    "perturb_",
    "studies",
    "write_",
]
