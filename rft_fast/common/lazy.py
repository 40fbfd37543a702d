"""Faces of packages: public names that load the module they come from when they are first used.

A command reads its arguments before torch is imported, which takes seconds, and a program that needs one
package does not wait for the others.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any


def face(package: str, **modules: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package. Type checkers read the same names as imports::

        if TYPE_CHECKING:
            from .scores import Scores as Scores
        else:
            __getattr__, __dir__ = lazy.face(__name__, scores="Scores")
        __all__ = ["Scores"]

    No module may have the name of something public in another: importing it would hide that. Modules of the
    package are attributes as well, imported when first used. ``dir()`` shows ``__all__``.

    Args:
        package: its ``__name__``.
        modules: module of the package -> the public names that it defines, separated by spaces.
    """
    homes = {name: module for module, names in modules.items() for name in names.split()}

    def __getattr__(name: str) -> Any:
        if name in homes:
            value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
            setattr(sys.modules[package], name, value)
            return value
        if not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted(sys.modules[package].__all__)

    return __getattr__, __dir__
