"""Fused in-place interpolation, perturbation and masking. Knows tensors, not models."""

from rft_fast.kernels.contract import Write
from rft_fast.kernels.functions import (
    add_,
    interpolate_,
    norm,
    perturb_,
    write_,
)
from rft_fast.kernels.likes import keep_mask_like, noise_like
from rft_fast.kernels.places import offsets
from rft_fast.kernels.plan import Plan

__all__ = [
    "Plan",
    "Write",
    "add_",
    "interpolate_",
    "keep_mask_like",
    "noise_like",
    "norm",
    "offsets",
    "perturb_",
    "write_",
]
