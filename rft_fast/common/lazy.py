"""Lazy package interfaces: public names import their module on first use.

A command parses its arguments before it imports torch, which takes seconds; a program that needs one package
does not load the others.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any


def face(package: str, **modules: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make ``__getattr__`` and ``__dir__`` of a package.

    Type checkers read the same names as imports::

        if TYPE_CHECKING:
            from .scores import Scores as Scores
        else:
            __getattr__, __dir__ = lazy.face(__name__, scores="Scores")
        __all__ = ["Scores"]

    Submodules are attributes as well, imported on first use. No module may have the name of a public object
    of another module, which its import would hide.

    Args:
        package: the package's ``__name__``.
        **modules: submodule -> the public names that it defines, separated by spaces.

    Returns:
        ``__getattr__``, which imports on first use and raises AttributeError for unknown names; and
        ``__dir__``, which lists ``__all__``.
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
