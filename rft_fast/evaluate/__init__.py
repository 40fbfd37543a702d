"""Loss and accuracy of the live model, fast: what a change left as it was is not computed again."""

from .evaluator import Evaluator
from .scores import Scores
from .walk import Walk

__all__ = ["Evaluator", "Scores", "Walk"]
