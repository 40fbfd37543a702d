"""Fine-tuning, the first step of robust fine-tuning: ``python -m rft_fast.finetune``, or these names.

:func:`run` makes a zoo of models from a checkpoint and a folder of images; :func:`train` trains any
classifier on any batches.
"""

from typing import TYPE_CHECKING

from rft_fast.common import lazy

if TYPE_CHECKING:
    from .freezing import freeze
    from .images import ImageBatches, Images, augmentation
    from .losses import Batch
    from .settings import Request, Setting, at_random, grid
    from .training import Batches, Diverged, adamw, learning_rate, train
    from .work import Outcome, run
else:
    __getattr__, __dir__ = lazy.face(
        __name__,
        freezing="freeze",
        images="ImageBatches Images augmentation",
        losses="Batch",
        settings="Request Setting at_random grid",
        training="Batches Diverged adamw learning_rate train",
        work="Outcome run",
    )

__all__ = [
    "Batch",
    "Batches",
    "Diverged",
    "ImageBatches",
    "Images",
    "Outcome",
    "Request",
    "Setting",
    "adamw",
    "at_random",
    "augmentation",
    "freeze",
    "grid",
    "learning_rate",
    "run",
    "train",
]
