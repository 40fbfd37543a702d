"""One module per question of the paper. Every study returns tidy rows, one per measurement (:mod:`.rows`)."""

from __future__ import annotations

from .chance import Chance, against_chance, zeroshot_chances
from .choice import choice, choice_means
from .claim import claim, claim_tests
from .coefficients import coefficients
from .correlation import correlation
from .cumulative import cumulative_effects, cumulative_interpolation
from .effects import coefficient_effects
from .ensemble import ensemble, ensemble_difference
from .estimators import ESTIMATORS, Protocol
from .gains import gain_bounds, id_alphas
from .images import ImageResults, ImageScores, image_results
from .interpolate import XI, best_gains, check_alphas, interpolation, summarize
from .layers import layerwise_interpolation, stragglers
from .others import Others
from .pairs import pair_effects, pairs
from .points import soup_points, stock_ratios
from .pruning import prune_stragglers, pruning_effect
from .rows import COLUMNS, frame
from .search import search_coefficients
from .sharpness import layerwise_sharpness, near_zero, sharpness
from .soups import greedy_search, soups

__all__ = [
    "COLUMNS",
    "ESTIMATORS",
    "XI",
    "Chance",
    "ImageResults",
    "ImageScores",
    "Others",
    "Protocol",
    "against_chance",
    "best_gains",
    "check_alphas",
    "choice",
    "choice_means",
    "claim",
    "claim_tests",
    "coefficient_effects",
    "coefficients",
    "correlation",
    "cumulative_effects",
    "cumulative_interpolation",
    "ensemble",
    "ensemble_difference",
    "frame",
    "gain_bounds",
    "greedy_search",
    "id_alphas",
    "image_results",
    "interpolation",
    "layerwise_interpolation",
    "layerwise_sharpness",
    "near_zero",
    "pair_effects",
    "pairs",
    "prune_stragglers",
    "pruning_effect",
    "search_coefficients",
    "sharpness",
    "soup_points",
    "soups",
    "stock_ratios",
    "stragglers",
    "summarize",
    "zeroshot_chances",
]
