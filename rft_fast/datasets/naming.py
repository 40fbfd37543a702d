"""How class names are compared: folders, label maps and lists of classes alike."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence


def fold(name: str) -> str:
    """The form in which names are equal.

    Unicode NFKC and case folding; spaces and underscores count only between digits; numbers lose leading
    zeros.

    Args:
        name: a class name as a folder, a file or a person writes it.
    """
    text = composed(composed(name).casefold()).casefold()
    text = re.sub(r"[_\s]+", " ", composed(text)).strip()
    text = re.sub(r"(?<!\d) | (?!\d)", "", text)
    return _digits(text) if text.isdecimal() else text


def composed(name: str) -> str:
    """A name in Unicode NFKC: as a Mac and as a keyboard write it are one."""
    return unicodedata.normalize("NFKC", name)


def loose(name: str) -> str:
    """Letters and digits of a name alone, for a vocabulary that is known: exports write commas and hyphens
    in many ways."""
    return "".join(letter for letter in fold(name) if letter.isalnum())


def numbers(names: Sequence[str]) -> list[int]:
    """The numbers that class names are, where all are consecutive ones; else an empty list."""
    folded = [fold(name) for name in names]
    if not folded or not all(name.isdecimal() and len(name) <= 9 for name in folded):
        return []
    found = [int(name) for name in folded]
    return found if sorted(found) == list(range(min(found), min(found) + len(found))) else []


def places(names: Iterable[str]) -> dict[str, list[int]]:
    """Folded name -> the places where it stands."""
    found: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        found.setdefault(fold(name), []).append(place)
    return found


def _digits(text: str) -> str:
    return "".join(str(unicodedata.decimal(letter)) for letter in text).lstrip("0") or "0"
