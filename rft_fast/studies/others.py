"""Several models over one live model: states by name, and paths between any two of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

    def mean(self, names: Iterable[str]) -> State:
        """Return the mean of models in float32: the soup of them, as ``python -m rft_fast.merge`` writes it.

        Models are read one after the other: two sums and a model are in memory. Integers are those of the
        first model.

        Raises:
            ValueError: an integer tensor differs, which is no counter of training steps.
        """
        from ..merge import streamed

        return streamed.mean(map(self.state, names))

    def model_stock(self, base: State, names: Iterable[str]) -> tuple[State, dict[str, float]]:
        """Return the model of Model Stock of some models, and its t of each tensor that they move.

        Models are read one after the other: a model and three times its size in float32 are in memory.

        Args:
            base: the zero-shot end.
            names: the models, two or more.
        """
        from ..merge import streamed

        return streamed.model_stock(base, map(self.state, names))

    def search(
        self, names: Iterable[str], accuracy: Mapping[str, float], measure: Callable[[str, State], float]
    ) -> tuple[str, ...]:
        """Return the models of a greedy soup (Wortsman et al. 2022, Recipe 1), in the order of the choice.

        Args:
            names: the models.
            accuracy: of each by itself.
            measure: called with the name of the model that is tried, and the mean of those kept and it;
                returns the accuracy of that mean.
        """
        from ..merge.greedy import greedy_soup
        from ..merge.streamed import Total

        totals: dict[tuple[str, ...], Total] = {}  # of the models that were kept, and with the last one tried

        def measured(some: Sequence[str]) -> float:
            if len(some) == 1:
                return accuracy[some[0]]
            before, last = tuple(some[:-1]), some[-1]
            total = totals.get(before) or Total(self.state(before[0]))
            trial = total.plus(self.state(last))
            totals.clear()
            totals.update({before: total, tuple(some): trial})
            return measure(last, trial.mean())

        return greedy_soup([*names], measured).kept

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
