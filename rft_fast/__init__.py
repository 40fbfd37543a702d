"""Robust Fine-Tuning paths between CLIP models: interpolate, perturb, prune, in place and fast."""

__version__ = "0.1.0"

import importlib
from types import ModuleType

from rft_fast import program as _program  # noqa: F401  (first: refuses to start where torch would crash)
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


def __getattr__(name: str) -> ModuleType:
    """``rft_fast.results``, loaded when asked for: it brings image sets and models along, which those who
    want the kernels alone need not wait for."""
    if name == "results":
        return importlib.import_module("rft_fast.results")
    raise AttributeError(f"module 'rft_fast' has no attribute {name!r}")


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
