"""Checkpoint files -> dicts of tensors under one set of names. Nothing in a file is executed.

===================  =========================================================================
module               holds
===================  =========================================================================
``canonical``        names of tensors, whatever file they come from
``stored``           what files store, as they describe it, and tensors made of that
``pickled_tensors``  what pickles may call; their reader is :mod:`rft_fast.common.pickles`
``foreign``          files that hold no weights: what they are, and what to do
``torch_files``      files of torch.save, and TorchScript archives
``containers``       bytes of a file -> what it holds; safetensors
``activation``       QuickGELU or GELU: what a file says of its model
``layouts``          what it holds -> the format, and tensors under canonical names
``lineage``          two checkpoints side by side
``reading``          one file -> all of the above
``sources``          files, open_clip's pretrained tags and Hugging Face repositories -> a file
===================  =========================================================================

``python -m rft_fast.checkpoints FILE [FILE2]`` shows what is in a file, or whether two are ends of one path.
"""

from typing import TYPE_CHECKING

from rft_fast.common import lazy
from rft_fast.names import FORMATS

if TYPE_CHECKING:
    from .activation import Activation, Tensors
    from .foreign import SUPPORTED
    from .layouts import TRAINING_FIELDS
    from .lineage import Kinship, Lineage, compare, kinship, moved_rows
    from .reading import Checkpoint, load, load_head, read, sha256
    from .sources import cached, check_source, commit, fetch, in_cache
else:
    __getattr__, __dir__ = lazy.face(
        __name__,
        activation="Activation Tensors",
        foreign="SUPPORTED",
        layouts="TRAINING_FIELDS",
        lineage="Kinship Lineage compare kinship moved_rows",
        reading="Checkpoint load load_head read sha256",
        sources="cached check_source commit fetch in_cache",
    )

__all__ = [
    "FORMATS",
    "SUPPORTED",
    "TRAINING_FIELDS",
    "Activation",
    "Checkpoint",
    "Kinship",
    "Lineage",
    "Tensors",
    "cached",
    "check_source",
    "commit",
    "compare",
    "fetch",
    "in_cache",
    "kinship",
    "load",
    "load_head",
    "moved_rows",
    "read",
    "sha256",
]
