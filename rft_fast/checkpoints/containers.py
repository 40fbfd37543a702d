"""A file -> what it holds, by its first bytes; reading of safetensors.

The bytes of a tensor are read when it is made, into new memory. Nothing is memory-mapped, so a file that is
truncated meanwhile causes an error and no signal. Sizes that a file claims are compared with its actual size
before use.
"""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any, BinaryIO

from ..common.files import Content
from ..common.pickles import Stream, Unreadable
from . import foreign, torch_files
from .pickled_tensors import unpickle
from .stored import MOST_DIMENSIONS, SAFETENSORS, Container, Span, Storage, Stored, natural

_MOST_HEADER = 100_000_000  # bytes; the limit of safetensors itself


def read(stream: BinaryIO, file: pathlib.Path) -> Container:
    """Read what a file holds; its first bytes decide the format, its name only if they do not.

    Args:
        stream: the file, open and unbuffered; must stay open until the last tensor is made.
        file: its path.

    Returns:
        Its content; the bytes of tensors are not read yet, except in old torch files and plain pickles.

    Raises:
        Unreadable: the file is empty, damaged, hostile or of an unknown format.
        rft_fast.common.files.Changed: it became shorter meanwhile.
    """
    data = Content(stream)
    size = len(data)
    if not size:
        raise Unreadable(
            "is empty, as after an interrupted download or on a full disk. Download or copy it again"
        )
    head = bytes(data[: foreign.FIRST])
    # A safetensors file starts with the length of its header; in text, these eight bytes are a huge number.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return _safetensors(data)
    if (reason := foreign.why(stream, file, head)) is not None:
        raise Unreadable(reason)
    if file.suffix == ".safetensors" and head[:2] not in (b"PK", b"\x80\x02"):
        return _safetensors(data)
    if head.startswith(b"PK"):
        return torch_files.read_archive(stream, data)
    if not head.startswith(b"\x80"):  # PROTO, the first opcode of every binary pickle
        raise Unreadable(
            f"has an unknown format (it starts with {head[:9]!r}). Supported: {foreign.SUPPORTED}"
        )
    position = Stream(data[:])
    value = unpickle(position, nested=torch_files.nested_storage)
    if isinstance(value, int) and value == torch_files.MAGIC:
        return Container(
            "old torch", torch_files.read_legacy(position, nested=torch_files.nested_storage), size
        )
    return Container("pickle", value, size)


def _safetensors(data: Content) -> Container:
    """Read safetensors: length of the header, header in JSON (name -> dtype, shape, offsets), tensors."""
    start = 8 + int.from_bytes(data[:8], "little")
    if start > min(len(data), 8 + _MOST_HEADER):
        raise _not_whole("the header is longer than the file, or than the format allows")
    try:
        header = json.loads(bytes(data[8:start]), object_pairs_hook=_distinct)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("the metadata are not strings")
        entries = [(*map(natural, entry["data_offsets"]), name, entry) for name, entry in header.items()]
        tensors, end = {}, 0
        for first, last, name, entry in sorted(entries, key=lambda entry: entry[:3]):
            shape = tuple(map(natural, entry["shape"]))
            if len(shape) > MOST_DIMENSIONS:
                raise ValueError(f"{name[:80]!r} has {len(shape)} dimensions")
            if entry["dtype"] not in SAFETENSORS:
                raise Unreadable(f"{name[:80]!r} has the unknown type {entry['dtype']!r}")
            dtype = SAFETENSORS[entry["dtype"]]
            if first != end or last - first != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name[:80]!r} has wrong offsets or a wrong size")
            steps = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
            kept = Storage(dtype, last - first, Span(data, start + first, start + last))
            tensors[name], end = Stored(kept, dtype, 0, shape, tuple(steps)), last
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _not_whole(f"{type(error).__name__}: {error}") from error
    if start + end != len(data):
        raise _not_whole(f"the tensors need {end:,} bytes, but the file has {len(data) - start:,} for them")
    return Container("safetensors", tensors, len(data), metadata=metadata)


def _not_whole(why: str) -> Unreadable:
    return Unreadable(
        f"is a damaged or incomplete safetensors file: {why}. If it was downloaded, download it again"
    )


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(table := dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice")
    return table
