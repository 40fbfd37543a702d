"""Pickled arrays, read without executing anything (:mod:`rft_fast.common.pickles`).

The result consists of numbers, texts, lists, tuples, dicts, arrays and inert names. Python's own unpickler,
even if restricted to numpy's names, would pass types and buffers of the file's choosing to numpy.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from rft_fast.common.pickles import Answers, Building, Machine, Stream, Unreadable, encode, unpickle

_PLAIN = re.compile(r"[iuf][1248]|b1|[SU]\d{1,6}")


def read(data: bytes) -> Any:
    """Read a pickle of any protocol: arrays as :class:`Array`, strings of Python 2 as latin-1 text.

    Raises:
        ValueError: the pickle is damaged, or needs anything but arrays; the message names it.
    """
    try:
        return unpickle(Stream(data), _ANSWERS)
    except Unreadable as error:
        raise ValueError(f"it {error}") from error


@dataclass
class Type(Building):
    """A dtype: numpy's code, such as ``u1``, and its byte order."""

    code: str
    order: str = "|"

    def build(self, machine: Machine, state: Any) -> None:
        self.order = _expect(state[1], str)

    def numpy(self) -> np.dtype[Any]:
        if not _PLAIN.fullmatch(self.code) or self.order not in ("|", "<", ">", "="):
            raise ValueError(f"an array of type {self.order}{self.code[:40]}, expected numbers or texts")
        return np.dtype(self.order + self.code)


@dataclass
class Array(Building):
    """A pickled array; ``raw`` has the bytes of its elements, or a list if they are objects."""

    shape: tuple[int, ...] = ()
    type: Type | None = None
    fortran: bool = False
    raw: bytes | list[Any] | None = None

    def build(self, machine: Machine, state: Any) -> None:
        _, shape, kind, fortran, raw = state
        self.shape, self.type, self.fortran = _shape(shape), _expect(kind, Type), bool(fortran)
        self.raw = raw if isinstance(raw, list) else _bytes(machine, raw)

    def numpy(self) -> np.ndarray[Any, Any]:
        """Convert to a numpy array.

        Raises:
            ValueError: the elements are objects, or their bytes do not fill the shape.
        """
        if self.type is None or not isinstance(self.raw, bytes):
            raise ValueError("an array without data, or of objects, expected numbers")
        dtype = self.type.numpy()
        if math.prod(self.shape) * dtype.itemsize != len(self.raw):
            raise ValueError(f"an array {dtype} {list(self.shape)} of {len(self.raw)} bytes")
        return np.frombuffer(self.raw, dtype).reshape(self.shape, order="F" if self.fortran else "C")


# --- results of calls in a pickle -----------------------------------------------------------------


def _reconstruct(machine: Machine, *_: Any) -> Array:
    return Array()


def _dtype(machine: Machine, code: Any, *_: Any) -> Type:
    return Type(_expect(code, str))


def _scalar(machine: Machine, kind: Any, raw: Any) -> Any:
    return Array((), _expect(kind, Type), False, _bytes(machine, raw)).numpy().item()


def _from_buffer(machine: Machine, raw: Any, kind: Any, shape: Any, order: Any) -> Array:
    return Array(_shape(shape), _expect(kind, Type), order == "F", _bytes(machine, raw))


_ANSWERS: Answers = {
    "_codecs.encode": encode,
    "numpy.dtype": _dtype,
    **{f"numpy.{core}.multiarray._reconstruct": _reconstruct for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
}


def _shape(value: object) -> tuple[int, ...]:
    shape = _expect(value, tuple)
    if len(shape) > 8 or not all(type(extent) is int and 0 <= extent < 2**48 for extent in shape):
        raise ValueError("an array whose shape is not a tuple of lengths")
    return tuple(shape)


def _bytes(machine: Machine, value: object) -> bytes:
    return encode(machine, value) if isinstance(value, str) else bytes(_expect(value, bytes))


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"a {type(value).__name__} where {kind.__name__} was expected")
    return value
