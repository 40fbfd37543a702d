"""What messages share."""

from __future__ import annotations

from collections.abc import Sequence


def some(names: Sequence[object], shown: int = 5) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(str(name) for name in names[:shown]) + more
