"""Comparison of class names, for folders, label maps and lists of classes."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence


def fold(name: str) -> str:
    """Fold a class name to the form in which equal names agree.

    Unicode NFKC and case folding; spaces and underscores count only between digits; numbers lose leading
    zeros.
    """
    text = composed(composed(name).casefold()).casefold()
    text = re.sub(r"[_\s]+", " ", composed(text)).strip()
    text = re.sub(r"(?<!\d) | (?!\d)", "", text)
    return _digits(text) if text.isdecimal() else text


def composed(name: str) -> str:
    """Unicode NFKC of a name, in which macOS and keyboards agree."""
    return unicodedata.normalize("NFKC", name)


def loose(name: str) -> str:
    """Letters and digits of a folded name, for known vocabularies: exports differ in commas and hyphens."""
    return "".join(letter for letter in fold(name) if letter.isalnum())


def numbers(names: Sequence[str]) -> list[int]:
    """The numbers in class names, if all are consecutive numbers; otherwise an empty list."""
    folded = [fold(name) for name in names]
    if not folded or not all(name.isdecimal() and len(name) <= 9 for name in folded):
        return []
    found = [int(name) for name in folded]
    return found if sorted(found) == list(range(min(found), min(found) + len(found))) else []


def places(names: Iterable[str]) -> dict[str, list[int]]:
    """Folded name -> positions at which it occurs."""
    found: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        found.setdefault(fold(name), []).append(place)
    return found


def _digits(text: str) -> str:
    return "".join(str(unicodedata.decimal(letter)) for letter in text).lstrip("0") or "0"
