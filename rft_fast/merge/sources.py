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

from rft_fast.checkpoints import activation, adapters, folders, layouts, sharded
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
        items: canonical name -> tensor, in the file's order.
        activation: tower -> activation that the file shows.
    """

    def __init__(self, file: pathlib.Path, container: Container, key: str | None) -> None:
        evidence = activation.Evidence()
        found = layouts.layout(container, None, evidence, key)
        self.file, self.key = file, key
        evidence.add_all(activation.beside(file, found.format == "huggingface"))
        self.activation, _ = evidence.judged()
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

    def tensor(self, name: str) -> Tensor:
        """Read a whole tensor into memory of its own."""
        item = self.items[name]
        out = torch.empty(item.numel, dtype=item.dtype)
        self.read(name, out)
        return out.view(item.shape)

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


class Adapted(Source):
    """The model that a LoRA adapter makes of its base. Tensors that it changes are in memory.

    Args:
        file: of the adapter.
        base: the model that it is added to.

    Raises:
        Unreadable: as of :func:`rft_fast.checkpoints.adapters.merged`.
    """

    def __init__(self, file: pathlib.Path, base: Source) -> None:
        whole = {name: base.tensor(name) for name in base.items}
        made, _ = adapters.merged(file, whole)
        self.file, self.key, self.activation, self._base = file, None, base.activation, base
        self._changed = {name: tensor for name, tensor in made.items() if tensor is not whole.get(name)}
        self.items = {
            name: base.items.get(name) or Item(tensor.shape, tensor.dtype, (name,), False)
            for name, tensor in made.items()
        }

    def read(self, name: str, out: Tensor, start: int = 0) -> None:
        if name in self._changed:
            out.copy_(self._changed[name].reshape(-1)[start : start + len(out)])
        else:
            self._base.read(name, out, start)


def _item(entry: Entry, tensor: Tensor) -> Item:
    names = tuple(piece.name for piece in entry.pieces)
    return Item(tensor.shape, tensor.dtype, names, entry.pieces[0].transposed)


def view(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor, which share its memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def opened(
    file: pathlib.Path, inputs: files.Inputs, key: str | None = None, base: Source | None = None
) -> Iterator[Source]:
    """Open a checkpoint file.

    Args:
        file: its path.
        inputs: gets the file, which must not change from now on.
        key: which weights, where the file has several, as for :func:`rft_fast.checkpoints.read`.
        base: what a LoRA adapter is added to; None: adapters are refused.

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
            if adapters.is_adapter(file):
                source: Source = _adapted(file, key, base)
            else:
                source = Source(file, stack.enter_context(sharded.opened(file)), key)
        except (Unreadable, OSError) as error:
            raise ValueError(f"merge: {file} {error}") from error
        yield source


def _adapted(file: pathlib.Path, key: str | None, base: Source | None) -> Adapted:
    if base is None:
        raise Unreadable(
            "is a LoRA adapter of peft, which needs the model that it was trained on. Make a model of both "
            "first: interpolate --alpha 1 --zeroshot BASE --finetuned ADAPTER --out FILE"
        )
    if key is not None:
        raise Unreadable(f"is a LoRA adapter of peft, of which no key {key!r} chooses a part; leave it out")
    return Adapted(file, base)


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
