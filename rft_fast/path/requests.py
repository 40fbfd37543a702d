"""Which layers a write writes, and with which numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from rft_fast.kernels import Write
from rft_fast.names import Names
from rft_fast.path.coefficients import Alpha, spread
from rft_fast.path.slots import Part, Rows, Slot, join

Requests: TypeAlias = Mapping[str | None, Write]
"""Layer -> the numbers that it is written with; None -> those of all tensors of no other key."""

Groups: TypeAlias = Sequence[tuple[Write, Rows]]
"""Tensors by the numbers that they are written with."""


def requests_of(
    alpha: Alpha, layers: Names | None, select: Callable[[Names | None], list[str]], *numbers: Any
) -> Requests:
    """Return the requests of a write.

    Args:
        alpha: One position, or those of layers, as :meth:`rft_fast.Path.write` takes them.
        layers: Layers to write; None: the whole model.
        select: Names of such layers; of all for None.
        numbers: The other arguments of a ``Write``.

    Raises:
        TypeError: A number has the wrong type, or a name.
        ValueError: A number is out of range; or a layer has no position, or several.
    """
    if not isinstance(alpha, Mapping):
        request = Write(alpha, *numbers)
        return {None: request} if layers is None else dict.fromkeys(select(layers), request)
    select([name for name in alpha if name is not None])  # refuses those that are inert by their reason
    table = spread(alpha.items(), select(layers), "Path.write: alpha", "the key None with a number")
    pairs: list[tuple[str | None, float]] = [*table.items()]
    if layers is None:
        pairs += [(None, value) for name, value in alpha.items() if name is None]
    found: dict[str | None, Write] = {}
    for name, value in pairs:
        try:
            found[name] = Write(value, *numbers)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} (of {'the rest' if name is None else name})") from None
    return found


def layers_in(requests: Requests) -> list[str] | None:
    """Return the layers of requests; None: the whole model."""
    return None if None in requests else [name for name in requests if name is not None]


def grouped(whole: Part, parts: Mapping[str, Part], requests: Requests) -> Groups:
    """Group tensors by the numbers that they are written with.

    Args:
        whole: All tensors of the model.
        parts: Layer -> its tensors.
        requests: The numbers.
    """
    named = [parts[name] for name in requests if name is not None]
    different = set(requests.values())
    if len(different) == 1:
        return [(different.pop(), whole if None in requests else join(named))]
    groups: dict[Write, list[Slot]] = {}
    for name, request in requests.items():
        slots = groups.setdefault(request, [])
        if name is not None:
            slots += parts[name].slots
        else:
            taken = {slot for part in named for slot in part.slots}
            slots += [slot for slot in whole.slots if slot not in taken]
    return [(request, Rows(slots)) for request, slots in groups.items()]
