"""Fine-tuning, the first step of robust fine-tuning: ``python -m rft_fast.finetune``, or these names.

:func:`run` makes a zoo of models from a checkpoint and a folder of images; :func:`train` trains any
classifier on any batches.
"""

from .images import ImageBatches as ImageBatches
from .images import Images as Images
from .images import augmentation as augmentation
from .run import Outcome as Outcome
from .run import Request as Request
from .run import run as run
from .settings import Setting as Setting
from .settings import at_random as at_random
from .settings import grid as grid
from .training import Batch as Batch
from .training import Batches as Batches
from .training import Diverged as Diverged
from .training import adamw as adamw
from .training import freeze as freeze
from .training import learning_rate as learning_rate
from .training import train as train
