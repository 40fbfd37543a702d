"""Fonts: which of a style's families are installed, and which others have the characters of names."""

from __future__ import annotations

import functools
from collections import ChainMap
from collections.abc import Iterable, Mapping
from typing import Any

import matplotlib
from matplotlib.font_manager import FontEntry, FontProperties, fontManager
from matplotlib.ft2font import FT2Font

_GENERIC = {"serif", "sans-serif", "cursive", "fantasy", "monospace"}
_EMPTY = "Last Resort"  # a font of boxes


def installed(changed: Mapping[str, Any]) -> list[str]:
    """Return the installed families of ``font.family``; of a generic one, the first that is installed.

    Args:
        changed: settings that differ from matplotlib's defaults.
    """
    defaults: Any = matplotlib.rcParamsDefault
    settings = ChainMap(dict(changed), defaults)
    names = {font.name.lower(): font.name for font in fontManager.ttflist}
    found = []
    for family in settings["font.family"]:
        chain = settings[f"font.{family}"] if family in _GENERIC else [family]
        found += [names[name.lower()] for name in chain if name.lower() in names][:1]
    return found


def covering(text: Iterable[str], families: Iterable[str]) -> tuple[list[str], list[str]]:
    """Find fonts for the characters that some families lack.

    Args:
        text: characters.
        families: installed families.

    Returns:
        Further families, in the order of the search, and the characters that no installed font has.
    """
    files = [fontManager.findfont(FontProperties(family=[family])) for family in families]
    missing = set(text).difference(*map(_characters, files))
    more = []
    for font in _plain() if missing else ():
        if found := missing & _characters(font.fname):
            more.append(font.name)
            missing -= found
        if not missing:
            break
    return more, sorted(missing)


def _plain() -> list[FontEntry]:
    """The upright fonts of normal weight, those without serifs first; the same order at each call."""
    fonts = [
        font for font in fontManager.ttflist if font.style == "normal" and font.weight in (400, "normal")
    ]
    fonts = [font for font in fonts if not font.name.startswith(_EMPTY)]
    return sorted(fonts, key=lambda font: ("Sans" not in font.name, font.name, font.fname))


@functools.cache
def _characters(file: str) -> frozenset[str]:
    return frozenset(map(chr, FT2Font(file).get_charmap()))
