"""One figure per study, drawn from its rows; legible in print and to readers with colour deficiencies."""

from __future__ import annotations

from .correlation import correlation
from .interpolation import interpolation
from .layer_sharpness import layer_sharpness
from .layers import layers
from .look import look
from .prune import prune
from .sharpness import sharpness

__all__ = ["correlation", "interpolation", "layer_sharpness", "layers", "look", "prune", "sharpness"]
