"""Several models over one live model: states by name, and paths between any two of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

from ..common.words import suggestion

if TYPE_CHECKING:
    from torch import Tensor

    from ..path import Path

State: TypeAlias = "Mapping[str, Tensor]"
"""Weights by the names of the live model."""


class Others:
    """Models by name, as ends of paths over the live model of another path.

    Memory: a state that is read is held by whoever asked for it, beside the two ends of the path at hand and
    the live model. Nothing is kept here.

    Args:
        states: name -> state dict, as :class:`rft_fast.Path` takes it. May read each when it is asked for.
    """

    def __init__(self, states: Mapping[str, State]) -> None:
        self._states = states

    @property
    def names(self) -> list[str]:
        """Names of the models."""
        return list(self._states)

    def check(self, names: Iterable[str], study: str) -> None:
        """Raise ValueError for a name that no model has, or that stands there twice."""
        seen = set[str]()
        for name in names:
            if name not in self._states:
                raise ValueError(f"{study}: there is no model {name!r}; {suggestion(name, self.names)}")
            if name in seen:
                raise ValueError(f"{study}: the model {name!r} is named twice; name each model once")
            seen.add(name)

    def state(self, name: str) -> State:
        """Return the weights of a model."""
        return self._states[name]

    @contextmanager
    def between(self, path: Path, first: State, last: State) -> Iterator[Path]:
        """Context manager: a path over the same live model between two other ends.

        On exit, the live model is restored as ``path`` has left it, bit for bit.

        Args:
            path: a path of the live model, which must not be written meanwhile.
            first: the end at alpha = 0.
            last: the end at alpha = 1.

        Yields:
            The other path.

        Raises:
            ValueError: the ends do not fit the live model.
            RuntimeError: as :meth:`rft_fast.Path.at`.
        """
        from ..path import Path as Other

        with path.at(0.0):
            yield Other(path.model, first, last, impl=path.impl)


def end(path: Path, alpha: int) -> State:
    """Return the state at an end of a path, 0 or 1; tensors are those of the path, not copies."""
    return {name: slot.ends[alpha] for slot in path.slots for name in slot.names}
