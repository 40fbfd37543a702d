"""What messages share."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any


def some(names: Sequence[object], shown: int = 5) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(str(name) for name in names[:shown]) + more


def differences(there: Mapping[str, Any], now: Mapping[str, Any], but: Collection[str] = ()) -> list[str]:
    """How two nested tables differ, in words: one sentence for each entry. but: names that do not matter,
    of tables at any depth and of their entries."""
    a, b = dict(_flat(there, but)), dict(_flat(now, but))
    nothing = "nothing"
    return [
        f"{key} {a.get(key, nothing)} there, {b.get(key, nothing)} now"
        for key in dict.fromkeys([*a, *b])
        if a.get(key, nothing) != b.get(key, nothing)
    ]


def _flat(table: Mapping[str, Any], but: Collection[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if key in but or prefix + key in but:
            continue
        if isinstance(value, Mapping) and value:
            yield from _flat(value, but, f"{prefix}{key}.")
        else:
            yield prefix + key, value
