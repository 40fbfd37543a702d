"""A reader of pickles that executes nothing, shared by checkpoints and data sets.

===========  ==================================================================
module       holds
===========  ==================================================================
``objects``  stand-ins for imported names and objects; errors
``machine``  the stack machine, and the budget that bounds its work
``answers``  replacements of calls that several kinds of files need
``opcodes``  the effect of each opcode, and :func:`unpickle`
===========  ==================================================================

Which calls are allowed is up to the caller: :mod:`rft_fast.checkpoints.pickled_tensors` for checkpoints,
:mod:`rft_fast.datasets.pickled_arrays` for data sets.
"""

from .answers import encode, made_set, ordered_dict
from .machine import Answers, Building, Machine
from .objects import Global, Opaque, Refused, Shell, Unreadable, kind_of
from .opcodes import Stream, unpickle

__all__ = [
    "Answers",
    "Building",
    "Global",
    "Machine",
    "Opaque",
    "Refused",
    "Shell",
    "Stream",
    "Unreadable",
    "encode",
    "kind_of",
    "made_set",
    "ordered_dict",
    "unpickle",
]
