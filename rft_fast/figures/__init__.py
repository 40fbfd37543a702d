"""One figure per study, drawn from its rows; legible in print and to readers with colour deficiencies.

``python -m rft_fast.figures RUN`` draws those of a run again. See docs/figures.md.
"""

from typing import TYPE_CHECKING

from rft_fast.common import lazy

if TYPE_CHECKING:
    from .draw_choice import choice
    from .draw_claim import claim
    from .draw_coefficients import coefficients
    from .draw_correlation import correlation
    from .draw_cumulative import cumulative
    from .draw_ensemble import ensemble
    from .draw_interpolation import interpolation
    from .draw_layer_sharpness import layer_sharpness
    from .draw_layers import layers
    from .draw_pairs import pairs
    from .draw_prune import prune
    from .draw_sharpness import sharpness
    from .draw_soups import soups
    from .looks import look
else:
    __getattr__, __dir__ = lazy.face(
        __name__,
        draw_choice="choice",
        draw_ensemble="ensemble",
        draw_claim="claim",
        draw_coefficients="coefficients",
        draw_correlation="correlation",
        draw_cumulative="cumulative",
        draw_interpolation="interpolation",
        draw_layer_sharpness="layer_sharpness",
        draw_layers="layers",
        draw_pairs="pairs",
        draw_prune="prune",
        draw_sharpness="sharpness",
        draw_soups="soups",
        looks="look",
    )

__all__ = [
    "choice",
    "claim",
    "coefficients",
    "correlation",
    "cumulative",
    "ensemble",
    "interpolation",
    "layer_sharpness",
    "layers",
    "look",
    "pairs",
    "prune",
    "sharpness",
    "soups",
]
