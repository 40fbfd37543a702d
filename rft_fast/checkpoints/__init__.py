"""Checkpoint files of many formats -> dicts of tensors under one set of names. Nothing in a file is executed.

===================  =========================================================================
module               holds
===================  =========================================================================
``canonical``        names of tensors, whatever file they come from
``stored``           tensors as files describe them, and making torch tensors of these
``pickled_tensors``  calls that pickles may make; their reader is :mod:`rft_fast.common.pickles`
``foreign``          recognising files that hold no weights
``torch_files``      files of torch.save, and TorchScript archives
``containers``       a file -> what it holds, by its first bytes; safetensors
``activation``       evidence of QuickGELU or GELU
``layouts``          what a file holds -> its format, and tensors under canonical names
``huggingface``      names of transformers -> canonical names, and back
``lineage``          comparison of two checkpoints
``reading``          all of the above: ``read``, ``load``, ``load_head``
``sources``          pretrained tags and Hugging Face repositories -> a local file
===================  =========================================================================

``python -m rft_fast.checkpoints FILE [FILE2]`` describes a file, or says whether two are ends of one path.
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
