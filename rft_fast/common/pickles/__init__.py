"""A reader of pickles that runs nothing, shared by checkpoints and data sets.

===========  ================================================================================
module       holds
===========  ================================================================================
``objects``  what takes the place of imported names and objects; how reading fails
``machine``  the stack, and the budget that bounds the work
``answers``  answers to calls that several kinds of files need
``opcodes``  what each opcode does, and :func:`unpickle`
===========  ================================================================================

The calls that files may make: :mod:`rft_fast.checkpoints.pickled_tensors` (checkpoints) and
:mod:`rft_fast.datasets.pickled_arrays` (data sets).
"""

from .answers import encode, made_set, ordered_dict
from .machine import Answers, Machine
from .objects import Building, Global, Opaque, Refused, Shell, Unreadable, kind_of
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
