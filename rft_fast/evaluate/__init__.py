"""Loss and accuracy of the live model; only what a change affects is computed again."""

from typing import TYPE_CHECKING

from rft_fast.common import lazy

if TYPE_CHECKING:
    from .evaluator import Evaluator
    from .scores import Scores
    from .walk import Walk
else:
    __getattr__, __dir__ = lazy.face(__name__, evaluator="Evaluator", scores="Scores", walk="Walk")

__all__ = ["Evaluator", "Scores", "Walk"]
