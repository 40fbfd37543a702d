"""Scores that several measurements share, under the keys that the studies use."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping

from ..evaluate import Scores

Table = MutableMapping[tuple[str, float], Scores]
"""(data set, alpha) -> scores."""


class ByDataset(MutableMapping[str, Scores]):
    """Data set -> scores at one end of the path, out of a table.

    Args:
        table: the table.
        alpha: the end, 0 or 1.
    """

    def __init__(self, table: Table, alpha: float = 0.0) -> None:
        self._table, self._alpha = table, alpha

    def __getitem__(self, name: str) -> Scores:
        return self._table[name, self._alpha]

    def __setitem__(self, name: str, scores: Scores) -> None:
        self._table[name, self._alpha] = scores

    def __delitem__(self, name: str) -> None:
        del self._table[name, self._alpha]

    def __iter__(self) -> Iterator[str]:
        return (name for name, alpha in self._table if alpha == self._alpha)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class ByAlpha(Table):
    """(data set, alpha) -> scores: at alpha = 0 of a table that models share, else of one model's own."""

    def __init__(self, zeroshot: Table, own: Table) -> None:
        self._zeroshot, self._own = zeroshot, own

    def _table(self, key: tuple[str, float]) -> Table:
        return self._own if key[1] else self._zeroshot

    def __getitem__(self, key: tuple[str, float]) -> Scores:
        return self._table(key)[key]

    def __setitem__(self, key: tuple[str, float], scores: Scores) -> None:
        self._table(key)[key] = scores

    def __delitem__(self, key: tuple[str, float]) -> None:
        del self._table(key)[key]

    def __iter__(self) -> Iterator[tuple[str, float]]:
        yield from (key for key in self._zeroshot if not key[1])
        yield from (key for key in self._own if key[1])

    def __len__(self) -> int:
        return sum(1 for _ in self)
