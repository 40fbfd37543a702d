"""Checkpoint files that are read run by run of elements, under canonical names."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rft_fast.checkpoints import activation, folders, layouts, sharded
from rft_fast.checkpoints.canonical import is_visual
from rft_fast.checkpoints.entries import Entry
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
        key: which weights of the file; None: it has one set.
        format: of the file, a key of ``rft_fast.names.FORMATS``.
        items: canonical name -> tensor, in the file's order.
        activation: tower -> activation that the file shows.
        notes: what the reader says of the file.
    """

    def __init__(self, file: pathlib.Path, container: Container, key: str | None) -> None:
        evidence = activation.Evidence()
        found = layouts.layout(container, None, evidence, key)
        self.file, self.key, self.format = file, key, found.format
        evidence.add_all(activation.beside(file, self.format == "huggingface"))
        self.activation, contradictions = evidence.judged()
        self.notes = (*found.doubts, *found.notes, *contradictions)
        self._container, self._entries = container, found.entries
        self._made: tuple[Stored, Tensor] | None = None
        maker = Maker(container.size, meta=True)  # checks that the file has what it claims
        self.items = {name: _item(entry, entry.make(maker)) for name, entry in found.entries.items()}

    def read(self, name: str, out: Tensor, start: int = 0) -> None:
        """Read consecutive elements of a tensor.

        Args:
            name: its canonical name.
            out: one-dimensional, of the dtype as stored; filled.
            start: index of the first element.

        Raises:
            Changed, OSError: the file became shorter, or cannot be read.
            ValueError: the tensor ends before ``out`` is full.
        """
        item = self.items[name]
        if item.transposed:
            stored = self._entries[name].pieces[0].stored
            out.copy_(self._whole(stored).T.reshape(-1)[start : start + len(out)])
            return
        done = 0
        for piece in self._entries[name].pieces:
            size = math.prod(piece.stored.size)
            if start < size and done < len(out):
                count = min(size - start, len(out) - done)
                self._read(piece.stored, out[done : done + count], start)
                done, start = done + count, start + count
            start -= size
        if done < len(out):
            raise ValueError(f"read: {name} ends after {done} of the {len(out)} elements requested")

    def _read(self, stored: Stored, out: Tensor, start: int) -> None:
        data = stored.storage.data
        if not isinstance(data, Span) or not _is_contiguous(stored):
            out.copy_(self._whole(stored).reshape(-1)[start : start + len(out)])
            return
        first = data.start + (stored.offset + start) * stored.dtype.itemsize
        data.content.read_into(first, view(out))

    def _whole(self, stored: Stored) -> Tensor:
        """Return a tensor that cannot be read in runs; the last one is kept."""
        if self._made is None or self._made[0] is not stored:
            self._made = None
            self._made = stored, Maker(self._container.size, keep=False).tensor(stored)
        return self._made[1]


def _item(entry: Entry, tensor: Tensor) -> Item:
    names = tuple(piece.name for piece in entry.pieces)
    return Item(tensor.shape, tensor.dtype, names, entry.pieces[0].transposed)


def view(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor, which share its memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def opened(file: pathlib.Path, inputs: files.Inputs, key: str | None = None) -> Iterator[Source]:
    """Open a checkpoint file.

    Args:
        file: its path.
        inputs: gets the file, which must not change from now on.
        key: which weights, where the file has several, as for :func:`rft_fast.checkpoints.read`.

    Raises:
        ValueError: as of :func:`rft_fast.checkpoints.read`.
        Changed: the file changed while it was open.
    """
    with ExitStack() as stack:
        file = folders.located(file, "merge")
        for part in folders.parts(file):
            inputs.add(part)
            stack.enter_context(inputs.unchanged(part))
        try:
            source = Source(file, stack.enter_context(sharded.opened(file)), key)
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
