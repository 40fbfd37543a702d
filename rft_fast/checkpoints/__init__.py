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
``folders``          where the files of a checkpoint are: folders, indices of shards
``sharded``          shards as one dict of tensors
``modules``          pickled modules -> their tensors by name
``naming``           names without what wrappers add, and without prefixes
``selecting``        the one set of weights in a training checkpoint
``huggingface``      names of transformers <-> canonical names
``entries``          tensors by canonical name that are not read yet, and their names in the file
``layouts``          what a file holds -> its format, and its entries
``adapters``         LoRA adapters of peft, added to their base
``lineage``          comparison of two checkpoints
``reading``          all of the above: ``read``, ``load``, ``load_head``, ``opened``
``sources``          pretrained tags and Hugging Face repositories -> a local file
===================  =========================================================================

``python -m rft_fast.checkpoints FILE [FILE2]`` describes a file, or says whether two are ends of one path.
"""

from typing import TYPE_CHECKING

from rft_fast.common import lazy
from rft_fast.names import FORMATS

if TYPE_CHECKING:
    from .activation import Activation, Tensors
    from .adapters import is_adapter
    from .folders import digest, located, parts
    from .foreign import SUPPORTED
    from .lineage import Kinship, Lineage, compare, kinship, moved_rows
    from .reading import Checkpoint, Opened, load, load_head, opened, read, sha256
    from .sources import cached, check_source, commit, fetch, in_cache
else:
    __getattr__, __dir__ = lazy.face(
        __name__,
        activation="Activation Tensors",
        adapters="is_adapter",
        folders="digest located parts",
        foreign="SUPPORTED",
        lineage="Kinship Lineage compare kinship moved_rows",
        reading="Checkpoint Opened load load_head opened read sha256",
        sources="cached check_source commit fetch in_cache",
    )

__all__ = [
    "FORMATS",
    "SUPPORTED",
    "Activation",
    "Checkpoint",
    "Kinship",
    "Lineage",
    "Opened",
    "Tensors",
    "cached",
    "check_source",
    "commit",
    "compare",
    "digest",
    "fetch",
    "in_cache",
    "is_adapter",
    "kinship",
    "load",
    "load_head",
    "located",
    "moved_rows",
    "opened",
    "parts",
    "read",
    "sha256",
]
