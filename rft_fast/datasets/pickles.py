"""Pickled arrays, read without unpickling: the few instructions that arrays need are carried out here.

Nothing is imported or called by name, no object other than numbers, texts, lists, tuples, dicts and arrays is
made, and nothing takes more memory than the file holds. Python's own unpickler, even when it is restricted to
numpy's names, hands numpy types and buffers of the file's choosing.
"""

from __future__ import annotations

import math
import pickletools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

_MARK = object()
_FIXED = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_PLAIN = re.compile(r"[iuf][1248]|b1|[SU]\d{1,6}")


@dataclass
class Type:
    """An element type as numpy spells it, such as ``u1``, and its byte order."""

    code: str
    order: str = "|"

    def numpy(self) -> np.dtype[Any]:
        if not _PLAIN.fullmatch(self.code) or self.order not in ("|", "<", ">", "="):
            raise ValueError(f"an array of type {self.order}{self.code}, expected numbers or texts")
        return np.dtype(self.order + self.code)


@dataclass
class Array:
    """An array as it was pickled. raw: its elements' bytes, or a list of them where they are objects."""

    shape: tuple[int, ...] = ()
    type: Type | None = None
    fortran: bool = False
    raw: bytes | list[Any] | None = None

    def numpy(self) -> np.ndarray[Any, Any]:
        """Raises ValueError for objects, and for a shape that the bytes do not fill."""
        if self.type is None or not isinstance(self.raw, bytes):
            raise ValueError("an array without contents, or of objects, expected numbers")
        dtype = self.type.numpy()
        if math.prod(self.shape) * dtype.itemsize != len(self.raw):
            raise ValueError(f"an array {dtype} {list(self.shape)} of {len(self.raw)} bytes")
        return np.frombuffer(self.raw, dtype).reshape(self.shape, order="F" if self.fortran else "C")


@dataclass(frozen=True)
class _Name:
    """What a pickle asks for by name: never looked up, only compared."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


def _names(*known: str) -> set[_Name]:
    return {_Name(*name.rsplit(".", 1)) for name in known}


_NDARRAY, _DTYPE = _names("numpy.ndarray"), _names("numpy.dtype")
_ENCODE = _names("_codecs.encode")
_RECONSTRUCT = _names("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_SCALAR = _names("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
_FROMBUFFER = _names("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")
_KNOWN = _NDARRAY | _DTYPE | _ENCODE | _RECONSTRUCT | _SCALAR | _FROMBUFFER


def read(data: bytes) -> Any:
    """What a pickle holds, of any protocol: arrays as :class:`Array`, Python 2's strings as latin-1 texts.

    Raises ValueError for damage, and for anything that asks for more than arrays, by its name.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                (result,) = stack
                return result
            _step(opcode.name, argument, stack, memo)
    except (IndexError, KeyError, TypeError, UnicodeError) as error:
        raise ValueError(f"a damaged pickle ({type(error).__name__}: {error})") from error
    raise ValueError("a pickle without an end")


def _step(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    if name in _VALUES:
        stack.append(bytes(argument) if isinstance(argument, bytearray) else argument)
    elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
        memo[argument] = stack[-1]
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET", "GET"):
        stack.append(memo[argument])
    elif name in _FIXED:
        stack.append(_FIXED[name])
    elif name in ("EMPTY_LIST", "EMPTY_DICT"):
        stack.append([] if name == "EMPTY_LIST" else {})
    elif name in ("LIST", "DICT", "TUPLE"):
        items = _above_mark(stack)
        stack.append(items if name == "LIST" else tuple(items) if name == "TUPLE" else _pairs(items))
    elif name in _TUPLES:
        count = _TUPLES[name]
        stack[-count:] = [tuple(stack[-count:])]
    elif name in ("APPEND", "APPENDS"):
        items = [stack.pop()] if name == "APPEND" else _above_mark(stack)
        _expect(stack[-1], list).extend(items)
    elif name in ("SETITEM", "SETITEMS"):
        items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else _above_mark(stack)
        _expect(stack[-1], dict).update(_pairs(items))
    elif name == "GLOBAL":
        stack.append(_known(*argument.split(" ", 1)))
    elif name == "STACK_GLOBAL":
        stack[-2:] = [_known(*stack[-2:])]
    elif name == "REDUCE":
        arguments = _expect(stack.pop(), tuple)
        stack.append(_make(stack.pop(), arguments))
    elif name == "BUILD":
        _fill(stack, _expect(stack.pop(), tuple))
    elif name not in ("PROTO", "FRAME"):
        raise ValueError(f"a pickle with the instruction {name}, which no arrays need")


def _known(module: object, name: object) -> _Name:
    asked = _Name(str(module), str(name))
    if asked not in _KNOWN:
        raise ValueError(f"a pickle that asks for {asked}, which no arrays need; nothing was run")
    return asked


def _make(called: object, arguments: tuple[Any, ...]) -> object:
    """What calling a known name would have made."""
    name = _expect(called, _Name)
    if name in _RECONSTRUCT:
        return Array()
    if name in _DTYPE:
        return Type(_expect(arguments[0], str))
    if name in _ENCODE and arguments[1:] == ("latin1",):
        return _bytes(arguments[0])
    if name in _SCALAR:
        kind, raw = arguments
        return Array((), _expect(kind, Type), False, _bytes(raw)).numpy().item()
    if name in _FROMBUFFER:
        raw, kind, shape, order = arguments
        return Array(_shape(shape), _expect(kind, Type), order == "F", _bytes(raw))
    raise ValueError(f"a pickle that calls {name} in a way that no arrays need; nothing was run")


def _fill(stack: list[Any], state: tuple[Any, ...]) -> None:
    made = stack[-1]
    if isinstance(made, Type):
        made.order = _expect(state[1], str)
        return
    _, shape, kind, fortran, raw = state
    made = _expect(made, Array)
    made.shape, made.type, made.fortran = _shape(shape), _expect(kind, Type), bool(fortran)
    made.raw = raw if isinstance(raw, list) else _bytes(raw)


def _shape(value: object) -> tuple[int, ...]:
    shape = _expect(value, tuple)
    if len(shape) > 8 or not all(type(extent) is int and 0 <= extent < 2**48 for extent in shape):
        raise ValueError("an array whose shape is no list of lengths")
    return tuple(shape)


def _bytes(value: object) -> bytes:
    return value.encode("latin-1") if isinstance(value, str) else bytes(_expect(value, bytes))


def _above_mark(stack: list[Any]) -> list[Any]:
    at = len(stack) - 1
    while stack[at] is not _MARK:  # below the bottom: IndexError
        at -= 1
        if at < 0:
            raise IndexError("no mark")
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _pairs(items: list[Any]) -> dict[Any, Any]:
    # Hashing tuples in tuples without end would overflow the stack.
    if not all(isinstance(key, str | bytes | int) for key in items[::2]):
        raise ValueError("a pickle with a dict whose keys are no texts")
    return dict(zip(items[::2], items[1::2], strict=True))


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"a pickle with {type(value).__name__} where {kind.__name__} was expected")
    return value
