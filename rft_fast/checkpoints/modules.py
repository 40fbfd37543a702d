"""Modules that were pickled or scripted whole -> their tensors by name, and the classes of their parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..common.pickles import Global, Shell, Unreadable, kind_of
from .foreign import SUPPORTED
from .stored import Container, Special, Stored

TENSORS = (Tensor, Stored, Special)
# Limits far above any model: a module that is shared unfolds at every place.
_DEEPEST = 100
_MOST_ENTRIES = 1_000_000
LONGEST_NAME = 1_000
# Class of a wrapper -> the name of the module inside.
_WRAPPERS = {
    **dict.fromkeys(("DataParallel", "DistributedDataParallel", "AveragedModel"), "module"),
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "OptimizedModule": "_orig_mod",
}
_TABLES = ("_parameters", "_buffers", "_modules")


@dataclass
class Module:
    """A module of a file.

    Attributes:
        kind: its class; of a wrapper such as DataParallel, that of the module inside.
        state: name -> tensor: parameters and persistent buffers, and those of its submodules.
        classes: (class or function, name of the module that has it), in the order of the modules.
        unnormalised: names of modules with ``normalize=False``.
    """

    kind: str
    state: dict[str, Any] = field(default_factory=dict)
    classes: list[tuple[str, str]] = field(default_factory=list)
    unnormalised: list[str] = field(default_factory=list)


def is_module(value: Any) -> bool:
    """Return whether a value of a pickle is a torch module."""
    return isinstance(value, Shell) and all(isinstance(value.state.get(name), dict) for name in _TABLES)


def module(root: Shell, container: Container) -> Module:
    """Collect the state dict of a module.

    Args:
        root: the module.
        container: the file.

    Raises:
        Unreadable: it is no module, or holds more modules than any model.
    """
    script = container.kind == "torchscript"
    result = Module(_inner_kind(root))
    entries = 0
    waiting: list[tuple[str, Shell, int]] = [("", root, 0)]
    while waiting:
        prefix, shell, depth = waiting.pop()
        own, children = _script_parts(shell, container.own) if script else _module_parts(shell)
        entries += 1 + len(own) + len(children) + len(shell.state)
        if depth > _DEEPEST or entries > _MOST_ENTRIES or len(prefix) > LONGEST_NAME:
            raise Unreadable("holds too deeply nested modules; nothing was executed")
        if shell.state.get("normalize") is False:
            result.unnormalised.append(prefix.removesuffix(".") or str(shell))
        for named in (shell, *(value for value in shell.state.values() if isinstance(value, Global))):
            result.classes.append((str(named), prefix))
        result.state.update((prefix + name, value) for name, value in own if value is not None)
        # A stack: reversed, so that modules keep their order.
        waiting += [(f"{prefix}{name}.", child, depth + 1) for name, child in reversed(children)]
    return result


def _inner_kind(shell: Shell) -> str:
    """Return the class of a module; of a wrapper such as DataParallel, that of the module inside."""
    while (place := _WRAPPERS.get(str(shell).rpartition(".")[2])) is not None:
        inner = shell.state.get("_modules")
        if not isinstance(inner, dict) or not isinstance(inner.get(place), Shell):
            break
        shell = inner[place]
    return str(shell)


def _module_parts(shell: Shell) -> tuple[list[tuple[str, Any]], list[tuple[str, Shell]]]:
    """Return the tensors and the submodules of a pickled module."""
    tables = [shell.state.get(name) for name in _TABLES]
    parameters, buffers, modules = (table if isinstance(table, dict) else None for table in tables)
    if parameters is None or buffers is None or modules is None:
        raise Unreadable(f"holds a {shell}, which is not a torch module. Supported: {SUPPORTED}")
    passing = shell.state.get("_non_persistent_buffers_set")
    passing = passing if isinstance(passing, set) else ()
    own = [*parameters.items(), *((name, value) for name, value in buffers.items() if name not in passing)]
    children = [(name, child) for name, child in modules.items() if child is not None]
    for name, value in own:
        if not isinstance(name, str) or not isinstance(value, (*TENSORS, type(None))):
            raise Unreadable(f"has {name!r} in a {shell}, which should be a tensor; it is a {type_of(value)}")
    for name, child in children:
        if not isinstance(name, str) or not isinstance(child, Shell):
            raise Unreadable(f"has {name!r} in a {shell}, which should be a module; it is a {type_of(child)}")
    return own, children


def _script_parts(
    shell: Shell, names: Mapping[str, frozenset[str]]
) -> tuple[list[tuple[str, Any]], list[tuple[str, Shell]]]:
    """Return the tensors and the submodules of a TorchScript module, which keeps all attributes in one table.

    ``names``: class -> its parameters and buffers.
    """
    known = names.get(shell.kind.name)
    named = [(name, value) for name, value in shell.state.items() if isinstance(name, str)]
    own = [
        (name, value)
        for name, value in named
        if isinstance(value, Stored) and (known is None or name in known)
    ]
    return own, [(name, value) for name, value in named if isinstance(value, Shell)]


def type_of(value: Any) -> str:
    """Name the type of a value of a file in messages."""
    return "Tensor" if isinstance(value, (Stored, Tensor)) else kind_of(value)
