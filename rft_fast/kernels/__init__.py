"""Fused in-place interpolation, perturbation and masking. Knows tensors, not models."""

from rft_fast.kernels.contract import Write
from rft_fast.kernels.functions import (
    interpolate_,
    keep_mask_like,
    noise_like,
    perturb_,
    write_,
)
from rft_fast.kernels.plan import Plan

__all__ = [
    "Plan",
    "Write",
    "interpolate_",
    "keep_mask_like",
    "noise_like",
    "perturb_",
    "write_",
]
