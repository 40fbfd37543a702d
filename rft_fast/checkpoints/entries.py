"""Tensors of a file by canonical name, not read yet: where each comes from, and how it is written back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.pickles import Unreadable
from .stored import Maker, Stored


@dataclass(frozen=True)
class Piece:
    """A tensor of a file that is a canonical tensor, or some of its rows.

    Attributes:
        name: its name in the file.
        stored: its description.
        transposed: whether the canonical tensor is its transpose.
    """

    name: str
    stored: Stored
    transposed: bool = False


@dataclass(frozen=True)
class Entry:
    """A canonical tensor in a file.

    Attributes:
        pieces: the tensors of the file that it consists of: one, or several of one shape and dtype, whose
            rows follow one another.
    """

    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, name: str, value: Any, transposed: bool = False) -> Entry:
        """Return the entry that is one tensor of a file.

        Args:
            name: of the tensor in the file.
            value: what the file holds under that name.
            transposed: as in :class:`Piece`.

        Raises:
            Unreadable: it is no dense tensor.
        """
        if not isinstance(value, Stored):
            raise Unreadable(f"has {name!r}, which must be a dense tensor; it is a {value}")
        return cls((Piece(name, value, transposed),))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the canonical tensor, as the file claims it."""
        size = self.pieces[0].stored.size
        size = size[::-1] if self.pieces[0].transposed else size
        return (len(self.pieces) * size[0], *size[1:]) if len(self.pieces) > 1 else size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in the file."""
        return self.pieces[0].stored.dtype

    def make(self, maker: Maker) -> Tensor:
        """Read the canonical tensor.

        Args:
            maker: makes the tensors of the file.

        Raises:
            Unreadable: the file is damaged; the message has the name.
        """
        parts = []
        for piece in self.pieces:
            try:
                part = maker.tensor(piece.stored)
            except Unreadable as error:
                raise Unreadable(f"has {piece.name!r}, which {error}") from error
            parts.append(part.T.contiguous() if piece.transposed else part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def split(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield (name in the file, tensor) for a new value of the tensor; the reverse of :meth:`make`.

        Args:
            tensor: of the shape :attr:`shape`.
        """
        parts = tensor.chunk(len(self.pieces)) if len(self.pieces) > 1 else (tensor,)
        for piece, part in zip(self.pieces, parts, strict=True):
            yield piece.name, part.T.contiguous() if piece.transposed else part


Entries = dict[str, Entry]
"""Canonical name -> where its tensor is."""
