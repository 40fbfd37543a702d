"""Checkpoint files that are read run by run of elements, under canonical names."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rft_fast.checkpoints import activation, containers, huggingface, layouts
from rft_fast.checkpoints.canonical import is_visual
from rft_fast.checkpoints.stored import Container, Maker, Span, Stored
from rft_fast.common import files
from rft_fast.common.pickles import Unreadable


@dataclass(frozen=True, eq=False)
class Item:
    """A tensor of a file.

    Attributes:
        shape: under its canonical name.
        dtype: as stored.
        names: in the file: one, or those of q, k and v, whose elements follow each other.
        transposed: whether the file holds it transposed.
    """

    shape: torch.Size
    dtype: torch.dtype
    names: tuple[str, ...]
    transposed: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Source:
    """A checkpoint file whose tensors are read when they are needed.

    Attributes:
        file: its path.
        format: of the file, a key of ``rft_fast.names.FORMATS``.
        items: canonical name -> tensor, in the file's order.
        activation: tower -> activation that the file shows.
        notes: what the reader says of the file.
    """

    def __init__(self, file: pathlib.Path, container: Container) -> None:
        evidence = activation.Evidence()
        found = layouts.describe(container, None, evidence)
        self.file, self.format = file, found.format
        evidence.add_all(activation.beside(file, self.format == "huggingface"))
        self.activation, contradictions = evidence.judged()
        self.notes = (*found.doubts, *found.notes, *contradictions)
        self._container, self._state, self._origin = container, found.state, found.origin
        self._made: tuple[str, Tensor] | None = None
        _, shapes, *_ = layouts.tensors(container, None, activation.Evidence(), meta=True)
        self.items = {name: self._item(name, tensor) for name, tensor in shapes.items()}

    def _item(self, name: str, tensor: Tensor) -> Item:
        where = huggingface.place(name) if self.format == "huggingface" else None
        names, transposed = ((name,), False) if where is None else (where.names, where.transposed)
        if names[0] not in self._state:  # converters spell it in two ways
            names = tuple(each.replace("pre_layrnorm", "pre_layernorm") for each in names)
        return Item(tensor.shape, tensor.dtype, names, transposed)

    def stored_names(self, name: str) -> tuple[str, ...]:
        """Return the names in the file of the tensor of a canonical name."""
        return tuple(self._origin[each] for each in self.items[name].names)

    def read(self, name: str, out: Tensor, start: int = 0) -> None:
        """Read consecutive elements of a tensor.

        Args:
            name: its canonical name.
            out: one-dimensional, of the dtype as stored; filled.
            start: index of the first element.

        Raises:
            Changed, OSError: the file became shorter, or cannot be read.
        """
        item = self.items[name]
        if item.transposed:
            out.copy_(self._whole(item.names[0]).T.reshape(-1)[start : start + len(out)])
            return
        done = 0
        for each in item.names:
            size = math.prod(self._state[each].size)
            if start < size and done < len(out):
                count = min(size - start, len(out) - done)
                self._read(each, out[done : done + count], start)
                done, start = done + count, start + count
            start -= size
        assert done == len(out)

    def _read(self, name: str, out: Tensor, start: int) -> None:
        stored: Stored = self._state[name]
        data = stored.storage.data
        if not isinstance(data, Span) or not _is_contiguous(stored):
            out.copy_(self._whole(name).reshape(-1)[start : start + len(out)])
            return
        first = data.start + (stored.offset + start) * stored.dtype.itemsize
        data.content.read_into(first, view(out))

    def _whole(self, name: str) -> Tensor:
        """Return a tensor that cannot be read in runs; the last one is kept."""
        if self._made is None or self._made[0] != name:
            self._made = None
            stored: Stored = self._state[name]
            data = stored.storage.data
            self._made = name, Maker(self._container.size).tensor(stored)
            stored.storage.data = data  # not the bytes that were read
        return self._made[1]


def view(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor, which share its memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def opened(file: pathlib.Path, inputs: files.Inputs) -> Iterator[Source]:
    """Open a checkpoint file.

    Args:
        file: its path.
        inputs: gets the file, which must not change from now on.

    Raises:
        ValueError: as of :func:`rft_fast.checkpoints.read`.
        Changed: the file changed while it was open.
    """
    if kind := files.special(file):
        raise ValueError(f"merge: {file} is {kind}, expected a checkpoint file")
    if not file.is_file():
        raise ValueError(f"merge: there is no file {file}")
    inputs.add(file)
    with inputs.unchanged(file), files.opened(file) as stream:
        try:
            source = Source(file, containers.read(stream, file))
        except (Unreadable, OSError) as error:
            raise ValueError(f"merge: {file} {error}") from error
        yield source


def _is_contiguous(stored: Stored) -> bool:
    step = 1
    for side, stride in zip(reversed(stored.size), reversed(stored.stride), strict=True):
        if side != 1 and stride != step:
            return 0 in stored.size
        step *= side
    return True


def towers(items: Mapping[str, Any]) -> list[str]:
    """Return the names of the image tower; of a file without one, all names."""
    return list(filter(is_visual, items)) or list(items)
