"""What may hold the tensors of a call: lists, modules, named tensors, parameter groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor, nn

from rft_fast.kernels.shards import check_sharded

# A tensor or several, a module, named tensors (a mapping or pairs), parameter groups of an optimizer.
Tensors: TypeAlias = (
    Tensor
    | nn.Module
    | Mapping[str, Tensor]
    | Iterable[Tensor]
    | Iterable[tuple[str, Tensor]]
    | Iterable[Mapping[str, Any]]
)

# Tensors in order, and their names where they have any.
Listed: TypeAlias = tuple[list[Tensor], list[str] | None]

_OFFERED = "a tensor, a list of tensors, a module, named tensors (a dict or pairs), or parameter groups"


def listed(argument: str, given: object) -> Listed:
    """Return the tensors of a container, in its order, and their names if they have any.

    A module stands for ``module.named_parameters()``, a parameter group for its "params".

    Args:
        argument: Name of the function's argument, for errors.
        given: The container.

    Raises:
        TypeError: It holds something else; the message names the place and the cure.
        ValueError: Two tensors have the same name, or FSDP has gathered the parameters of a module.
    """
    if isinstance(given, Tensor):
        return [given], None
    if isinstance(given, nn.Module):
        check_sharded(given)
        given = list(given.named_parameters())
    elif isinstance(given, Mapping):
        if _is_group(given):
            given = [given]
        else:
            return _named(argument, list(given.items()))
    elif not isinstance(given, Iterable) or isinstance(given, (str, bytes, np.ndarray)):
        raise TypeError(
            f"write: {argument} must be {_OFFERED}; got {_what(given)}"
            + ("" if given is None else _cure(given))
        )
    items = list(given)
    for item in items:  # the usual list, in a quarter of the time
        if not isinstance(item, Tensor):
            break
    else:
        return items, None
    if all(isinstance(item, (tuple, list)) and len(item) == 2 for item in items):
        return _named(argument, items)
    tensors: list[Tensor] = []
    for place, item in enumerate(items):
        where = f"{argument}[{place}]"
        if isinstance(item, Mapping) and _is_group(item):
            tensors += listed(f"{where}['params']", item["params"])[0]
        else:
            tensors.append(_tensor(where, item))
    return tensors, None


def matched(first: Listed, role: str, other: Listed) -> list[Tensor]:
    """Return the tensors of ``other`` in the order of ``first``: by name where both have names.

    Args:
        first: The tensors that decide the order.
        role: Name of the other's argument, for errors.
        other: The tensors to order.

    Raises:
        ValueError: The names differ; the message names those that only one has.
    """
    (_, names), (tensors, others) = first, other
    if names is None or others is None or names == others:
        return tensors
    own, given = set(names), set(others)
    if missing := [name for name in names if name not in given]:
        raise ValueError(f"write: {role} lacks {some(missing)}; pass the same names for all tensors")
    if extra := [name for name in others if name not in own]:
        raise ValueError(
            f"write: {role} has {some(extra)}, which the tensors to write lack (a module stands for its "
            "parameters, each once, without buffers); pass "
            f"{{name: {role}[name] for name in the names to write}}"
        )
    found = dict(zip(others, tensors, strict=True))
    return [found[name] for name in names]


def sources(
    out: object, zeroshot: object, finetuned: object, roles: tuple[str, str, str]
) -> tuple[Listed, list[Tensor], list[Tensor]]:
    """Return the tensors to write and, in their order, those of the two sources; ``roles``: for errors."""
    first = listed(roles[0], out)
    return (
        first,
        matched(first, roles[1], listed(roles[1], zeroshot)),
        matched(first, roles[2], listed(roles[2], finetuned)),
    )


def as_given(given: object, tensors: Sequence[Tensor], names: Sequence[str] | None) -> Any:
    """Return results in the form of the argument: a tensor, a dict by name, or a list."""
    if isinstance(given, Tensor):
        return tensors[0]
    return list(tensors) if names is None else dict(zip(names, tensors, strict=True))


def _named(argument: str, pairs: Sequence[Sequence[object]]) -> Listed:
    names, tensors = [], []
    for place, (name, value) in enumerate(pairs):
        if not isinstance(name, str):
            raise TypeError(
                f"write: {argument}[{place}] must be a tensor or a pair (name, tensor); its name is "
                f"{_what(name)}"
            )
        names.append(name)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"write: {argument}[{name!r}] must be a torch.Tensor; got {_what(value)}"
                + (_cure(value) or f"; pass {{k: v for k, v in {argument}.items() if torch.is_tensor(v)}}")
            )
        tensors.append(value)
    if len(set(names)) < len(names):
        double = [name for place, name in enumerate(names) if name in names[:place]]
        raise ValueError(f"write: {argument} has {some(double)} twice; name each tensor once")
    return tensors, names


def _is_group(given: Mapping[Any, Any]) -> bool:
    return "params" in given and not isinstance(given["params"], Tensor)


def _tensor(where: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"write: {where} must be a torch.Tensor; got {_what(value)}{_cure(value)}")
    return value


def _what(value: object) -> str:
    return "None" if value is None else f"an object of type {type(value).__name__}"


def _cure(value: object) -> str:
    if value is None:
        return " (is it a gradient that was never computed? leave its parameter out, too)"
    if isinstance(value, np.ndarray):
        return "; pass torch.from_numpy(array), which shares its memory"
    if isinstance(value, nn.Module):
        return "; pass model.parameters()"
    if hasattr(value, "param_groups"):
        return "; pass optimizer.param_groups"
    if isinstance(value, Mapping):
        return "; pass one mapping of names to tensors, such as model.state_dict()"
    return ""


def some(names: Sequence[str]) -> str:
    """Return up to three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
