"""Checkpoints of several files: the shards that an index names, as one dict of tensors."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from ..common import files
from ..common.pickles import Shell, Unreadable
from ..common.words import some
from . import containers, folders
from .stored import Container

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|bin)")


@contextmanager
def opened(file: pathlib.Path) -> Iterator[Container]:
    """Open a checkpoint of one file or several.

    Args:
        file: the file, or the index.

    Yields:
        What it holds; of a sharded checkpoint the tensors of all shards. They can be read until it is closed.

    Raises:
        Unreadable: as :func:`rft_fast.checkpoints.containers.read`; it is one shard of several; or a shard
            has other tensors than the index says.
    """
    if (match := _SHARD.fullmatch(file.name)) and int(match[3]) > 1:
        start, number, count, ending = match.groups()
        where = file.with_name(f"{start}.{ending}.index.json")
        cure = f"read its index, {where.name}" if where.is_file() else f"get the others and {where.name}"
        raise Unreadable(
            f"is only one shard, {int(number)} of {int(count)}; {cure}, or name the folder that "
            "has all of them"
        )
    with ExitStack() as stack:

        def one(path: pathlib.Path) -> Container:
            return containers.read(stack.enter_context(files.opened(path)), path)

        shards = folders.index(file)
        yield one(file) if shards is None else _joined(shards, one)


def _joined(shards: Mapping[str, pathlib.Path], read: Callable[[pathlib.Path], Container]) -> Container:
    """Join the tensors of shards."""
    result: dict[str, Any] = {}
    read_so_far: list[Container] = []
    for shard in sorted(set(shards.values())):
        try:
            container = read(shard)
        except Unreadable as error:
            raise Unreadable(f"has the shard {shard.name!r}, which {error}") from error
        content = container.value.items if isinstance(container.value, Shell) else container.value
        if not isinstance(content, Mapping):
            raise Unreadable(f"has the shard {shard.name!r}, which holds no dict of tensors")
        expected = {name for name, place in shards.items() if place == shard}
        if expected != set(content):
            other = sorted(map(str, expected ^ set(content)))
            raise Unreadable(
                f"has the shard {shard.name!r}, whose tensors differ from those in the index: "
                f"{some(other, 3)}"
            )
        result.update(content)
        read_so_far.append(container)
    size = sum(container.size for container in read_so_far)
    metadata = {key: value for container in read_so_far for key, value in container.metadata.items()}
    # In the order of the index, which is that of the model.
    ordered = {name: result[name] for name in shards}
    return replace(read_so_far[0], value=ordered, size=size, metadata=metadata)
