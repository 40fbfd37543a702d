"""Robust Fine-Tuning paths between CLIP models: interpolate, perturb, prune, in place and fast."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING

from rft_fast.common import lazy as _lazy
from rft_fast.common import program as _program  # noqa: F401  (refuses to start where torch would crash)

if TYPE_CHECKING:
    from rft_fast import results, studies
    from rft_fast.kernels import (
        Plan,
        interpolate_,
        keep_mask_like,
        noise_like,
        perturb_,
        write_,
    )
    from rft_fast.path import Path
else:
    __getattr__, __dir__ = _lazy.face(
        __name__, kernels="Plan interpolate_ keep_mask_like noise_like perturb_ write_", path="Path"
    )

__all__ = [
    "Path",
    "Plan",
    "__version__",
    "interpolate_",
    "keep_mask_like",
    "noise_like",
    "perturb_",
    "results",
    "studies",
    "write_",
]
