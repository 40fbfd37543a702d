"""Calls that pickles of checkpoints may make, and the descriptions that replace their results.

The reader, which executes nothing, is :mod:`rft_fast.common.pickles`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ..common import pickles
from ..common.pickles import (
    Global,
    Machine,
    Opaque,
    Refused,
    Shell,
    Stream,
    Unreadable,
    encode,
    kind_of,
    made_set,
    ordered_dict,
)
from .stored import DTYPES, Special, Storage, Stored, natural


def unpickle(
    stream: Stream,
    persistent: Callable[[Any], Any] | None = None,
    nested: Callable[[memoryview], Storage] | None = None,
) -> Any:
    """Read the value that a pickle of a checkpoint describes.

    Args:
        stream: as for :func:`rft_fast.common.pickles.unpickle`.
        persistent: as there.
        nested: bytes of a torch file inside the pickle -> its storage; None: such files are refused.

    Returns:
        Plain values, and objects of :mod:`.stored` and :mod:`rft_fast.common.pickles`.

    Raises:
        Unreadable: as there.
    """
    answers: pickles.Answers = {**_ANSWERS, "torch.storage._load_from_bytes": partial(_nested, nested)}
    try:
        return pickles.unpickle(stream, answers, DTYPES, persistent)
    except Refused as error:
        raise Unreadable(
            f"{error}. If you trust the file, load it with the program that wrote it and save it "
            "with torch.save(model.state_dict(), ...)"
        ) from error


# --- replacements of calls --------------------------------------------------------------------------


def _nested(read: Callable[[memoryview], Storage] | None, machine: Machine, data: Any) -> Storage:
    if read is None or not isinstance(data, (bytes, memoryview)):
        raise Unreadable("holds torch files nested more deeply than any model needs")
    machine.spend(len(data))
    # Short bytes are copied: the memory of tensors must be writable.
    return read(data if isinstance(data, memoryview) else memoryview(bytearray(data)))


def _tensor(machine: Machine, source: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Stored:
    if not isinstance(source, Storage):
        raise ValueError("a tensor is built from something other than a storage")
    return _typed_tensor(machine, source, offset, size, stride, None, None, source.dtype or torch.uint8)


def _typed_tensor(
    machine: Machine,
    source: Any,
    offset: Any,
    size: Any,
    stride: Any,
    _grad: Any,
    _hooks: Any,
    dtype: Any,
    *_: Any,
) -> Stored:
    if not isinstance(source, Storage) or not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor has no storage, or an unknown dtype")
    if (
        not isinstance(size, (tuple, list))
        or not isinstance(stride, (tuple, list))
        or len(size) != len(stride)
    ):
        raise ValueError("the shape and the strides of a tensor do not fit")
    machine.spend(len(size))
    return Stored(source, dtype, natural(offset), tuple(map(natural, size)), tuple(map(natural, stride)))


def _parameter(machine: Machine, data: Any = None, *_: Any) -> Any:
    if not isinstance(data, (Stored, Opaque)):
        raise ValueError("a parameter has no tensor")
    return data


def _with_attributes(machine: Machine, function: Any, _kind: Any, arguments: Any, *_: Any) -> Any:
    if not isinstance(function, Global) or function.name not in _TENSORS:
        raise Refused(kind_of(function))
    return machine.call(function, arguments)


def _reconstructor(machine: Machine, kind: Any, *_: Any) -> Shell:
    if not isinstance(kind, Global):
        raise ValueError("an object has no class")
    return Shell(kind)


def _first(machine: Machine, value: Any, *_: Any) -> Any:
    return value


def _tuple(machine: Machine, values: Any = ()) -> tuple[Any, ...]:
    machine.spend(len(values))
    return tuple(values)


def _opaque(what: str, kind: type[Opaque] = Opaque) -> Callable[..., Any]:
    def answer(machine: Machine, *_: Any) -> Opaque:
        return kind(what)

    return answer


_TENSORS: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
    "torch._utils._rebuild_wrapper_subclass": _opaque(
        "shard of a DTensor: save whole tensors, with get_model_state_dict of "
        "torch.distributed.checkpoint.state_dict and full_state_dict=True",
        Special,
    ),
    "torch._utils._rebuild_sparse_tensor": _opaque("sparse tensor", Special),
    "torch._utils._rebuild_sparse_csr_tensor": _opaque("sparse tensor", Special),
    "torch._utils._rebuild_nested_tensor": _opaque("nested tensor", Special),
    "torch._utils._rebuild_qtensor": _opaque("quantized tensor", Special),
    "torch._utils._rebuild_meta_tensor_no_storage": _opaque("meta tensor", Special),
}

# Used in image transforms, tokenizers and options, never for weights.
_VALUES = (
    "PIL.Image.Resampling",
    "PIL.Image.Transpose",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "re._compile",
    "regex._regex.compile",
    "timm.layers.format.Format",
    "torch.device",
    "torch.serialization._get_layout",
    "torchvision.transforms.functional.InterpolationMode",
)

_ANSWERS: Mapping[str, Callable[..., Any]] = {
    **_TENSORS,
    **{name: _opaque(name) for name in _VALUES},
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
    "torch.Size": _tuple,
    "torch.jit._pickle.build_boollist": _first,
    "torch.jit._pickle.build_doublelist": _first,
    "torch.jit._pickle.build_intlist": _first,
    "torch.jit._pickle.build_tensorlist": _first,
    "torch.jit._pickle.restore_type_tag": _first,
    "collections.Counter": ordered_dict,
    "collections.OrderedDict": ordered_dict,
    "collections.defaultdict": lambda machine, *_: {},
    "_codecs.encode": encode,
    **{f"{module}.set": made_set for module in ("builtins", "__builtin__")},
    **{f"{module}.frozenset": made_set for module in ("builtins", "__builtin__")},
    **{f"{module}._reconstructor": _reconstructor for module in ("copyreg", "copy_reg")},
}
