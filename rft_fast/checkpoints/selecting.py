"""The one set of weights in what trainers save, and its names without prefixes of wrappers.

A training checkpoint is a dict of dicts: weights, a moving average of them, the optimizer's state, options.
Every dict of tensors and every pickled module in it, up to eight levels deep, is a candidate; those that
belong to the training by their keys or content are not. One candidate is taken, several are refused by name;
a key chooses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..common.parametrised import factors
from ..common.pickles import Shell, Unreadable
from ..common.words import some
from .foreign import SUPPORTED
from .modules import LONGEST_NAME, TENSORS, Module, is_module, module, type_of
from .naming import CHOOSE, ROOT, prefixes, refuse_many, stripped, tower, under, unwrapped
from .stored import Container, Stored

_DEEPEST = 8
_MOST = 1_000  # candidates
# Words in a key that mean state of the training, not weights.
_TRAINING = frozenset(
    "optimizer optimizers optim scheduler schedulers sched scaler amp grad grads gradient gradients momentum "
    "rng random sampler loss losses criterion metric metrics callback callbacks loop loops dataloader "
    "history stats hparams hyper args options config cfg opt exp_avg exp_avg_sq".split()
)


@dataclass
class Selected:
    """The weights that were chosen.

    Attributes:
        state: name without prefixes -> tensor, as the file describes it.
        origin: the same names -> those in the file.
        path: keys of the dicts that hold them, outermost first.
        module: the pickled module that they are of; None for a dict of tensors.
        notes: what was left out, in words.
        key: first components of the names that were asked for, without the final dot; empty for all.
        prefixes: others that are dropped, with a final dot, longest first.
    """

    state: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    path: tuple[str, ...] = ()
    module: Module | None = None
    notes: list[str] = field(default_factory=list)
    key: str = ""
    prefixes: tuple[str, ...] = ()

    def renamed(self, stored: str) -> str:
        """Return a name of the file without prefixes; empty if it is of a part that was not chosen."""
        name = unwrapped(stored)
        if self.key and self.key != ROOT:
            name = under(name, self.key)
        return stripped(name, self.prefixes)

    def place(self, prefix: str) -> str:
        """Return the name of a module without prefixes.

        Args:
            prefix: its name in the file with a final dot; empty for the model itself.
        """
        return self.renamed(f"{prefix}x").rpartition(".")[0]


def select(container: Container, key: str | None) -> Selected:
    """Choose the weights of a file.

    Args:
        container: what the file holds.
        key: which of several: keys of dicts, or the first components of names, joined by dots; the last key
            alone if that is unique; None: there must be only one.

    Raises:
        Unreadable: there are no weights, or several and no key; the key is unknown; or two names become one.
    """
    found = _found(container)
    candidate, start = _choose(found, key, container) if found else _refuse(container.value)
    chosen = Selected(path=candidate.path, key=start)
    value = candidate.value
    if isinstance(value, Shell) and not value.items:
        chosen.module = module(value, container)
        state: Mapping[Any, Any] = chosen.module.state
    else:
        state = {name: one for name, one in _items(value).items() if not str(name).endswith("_extra_state")}
        if extra := [str(name) for name in _items(value) if name not in state]:
            chosen.notes.append(f"left out, extra state of modules: {some(extra, 3)}")
        _check_tensors(state)
    if candidate.path:
        label = candidate.label
        left = [name for name in _beside(container.value, candidate.path) if name not in candidate.same]
        same = f"; the same tensors are under {some(candidate.same)}" if candidate.same else ""
        rest = f"; left out: {some(left, 12)}" if left else ""
        chosen.notes.append(f"the weights under {label!r} are used{same}{rest}")
    _name(chosen, state)
    return chosen


# --- candidates ---------------------------------------------------------------------------------------


@dataclass
class _Candidate:
    """A dict of tensors or a module. ``training``: whether it belongs to the training, not to a model."""

    path: tuple[str, ...]
    value: Any
    training: bool
    same: list[str] = field(default_factory=list)  # where the same tensors are as well

    @property
    def label(self) -> str:
        return ".".join(self.path)

    def __str__(self) -> str:
        count = len(_items(self.value))
        what = f"{count} tensor{'' if count == 1 else 's'}" if count else str(self.value)
        return f"{self.label or ROOT!r} ({what})"


def _found(container: Container) -> list[_Candidate]:
    value = container.value
    if isinstance(value, Shell) and not value.items:  # a module, or an error that says what it is
        return [_Candidate((), value, False)]
    return _within(value, (), False, {})


def _within(value: Any, path: tuple[str, ...], training: bool, seen: dict[int, bool]) -> list[_Candidate]:
    """Find candidates in a value.

    Args:
        value: of a pickle.
        path: keys that lead to it.
        training: whether one of these belongs to the training.
        seen: id of a dict -> whether it has nothing but tensors; the others are entered once.
    """
    if is_module(value):
        return [_Candidate(path, value, training)]
    content = _items(value)
    if not content or len(path) > _DEEPEST or seen.get(id(value)) is False:
        return []
    # The tensors of a list have no names.
    named = isinstance(value, (Mapping, Shell))
    tensors = [n for n, one in content.items() if named and isinstance(n, str) and isinstance(one, TENSORS)]
    alone = seen[id(value)] = seen.get(id(value)) or len(tensors) == len(content)
    own = _Candidate(path, value, training or bool(path and not _is_weights(content)))
    if alone:
        return [own]
    training = training or "param_groups" in content
    inner = []
    for name, child in content.items():
        if isinstance(name, (str, int)):
            inner += _within(child, (*path, str(name)), training or _is_training(str(name)), seen)
        if len(inner) > _MOST:
            raise Unreadable(f"holds more than {_MOST} dicts of tensors, more than any training needs")
    # Weights beside something else are a candidate, to be named in an error; a few tensors in a container
    # are not.
    if tensors and (any("." in name for name in tensors) or all(one.training for one in inner)):
        inner.insert(0, own)
    return inner


def _items(value: Any) -> Mapping[Any, Any]:
    """Return the content of a dict, a list or a kind of dict; empty for other values."""
    if isinstance(value, Shell):
        return value.items
    if isinstance(value, (list, tuple)):
        return {str(place): one for place, one in enumerate(value)}
    return value if isinstance(value, Mapping) else {}


def _is_training(key: str) -> bool:
    words = re.split(r"[\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower())
    return key in _TRAINING or not _TRAINING.isdisjoint(words)


def _is_weights(content: Mapping[Any, Any]) -> bool:
    """Return whether a dict has a tensor of floats that is no single number."""
    return any(
        not isinstance(one, Stored) or (one.dtype.is_floating_point and math.prod(one.size) != 1)
        for one in content.values()
        if isinstance(one, TENSORS)
    )


def _choose(found: list[_Candidate], key: str | None, container: Container) -> tuple[_Candidate, str]:
    """Return the candidate, and the first components of its names that the key asks for."""
    if key is not None:
        return _keyed(found, key, container)
    weights = [one for one in found if not one.training]
    if not weights:
        listed = some(list(map(str, found)))
        raise Unreadable(
            f"holds no weights, only state of a training: {listed}. Name the file with the model's weights; "
            "--key NAME reads one of these all the same"
        )
    first, others = weights[0], weights[1:]
    first.same = [one.label for one in others if _same(first, one, container)]
    if several := [one for one in others if one.label not in first.same]:
        listed = some([str(one) for one in (first, *several)], 12)
        raise Unreadable(f"holds several sets of weights: {listed}. {CHOOSE}")
    return first, ""


def _keyed(found: list[_Candidate], key: str, container: Container) -> tuple[_Candidate, str]:
    exact = [one for one in found if one.path and one.label == key]
    ending = [one for one in found if one.label.endswith(f".{key}")]
    if len(fits := exact or ending) == 1:
        return fits[0], ""
    prefixed, starts = [], set()
    for one in [one for one in found if not one.training] or found:
        names = [unwrapped(name) for name in _state(one, container) if isinstance(name, str)]
        starts |= {name.partition(".")[0] for name in names if "." in name}
        for rest in dict.fromkeys((key.removeprefix(f"{one.label}."), key)):
            rest = unwrapped(f"{rest}.x").removesuffix(".x")
            if key == ROOT or any(under(name, rest) for name in names):
                prefixed.append((one, key if key == ROOT else rest))
                break
    if len(prefixed) == 1:
        return prefixed[0]
    labels = [str(one) for one in found if one.path]
    here = [f"dicts of tensors {some(labels, 12)}"] if labels else []
    here += [f"names that begin with {some(sorted(starts), 8)}"] if starts else []
    which = "several sets of weights" if len(fits) + len(prefixed) > 1 else "no weights"
    raise Unreadable(f"has {which} under the key {key!r}; it holds {' and '.join(here) or 'one dict'}")


def _state(candidate: _Candidate, container: Container) -> Mapping[Any, Any]:
    value = candidate.value
    return module(value, container).state if is_module(value) else _items(value)


def _same(one: _Candidate, other: _Candidate, container: Container) -> bool:
    """Return whether two candidates are the same tensors: the same places of the same storages."""

    def places(candidate: _Candidate) -> set[tuple[object, ...]] | None:
        values = list(_state(candidate, container).values())
        if not all(isinstance(value, Stored) for value in values):
            return None
        return {(id(v.storage), v.dtype, v.offset, v.size, v.stride) for v in values}

    return one.value is other.value or ((found := places(one)) is not None and found == places(other))


def _beside(value: Any, path: tuple[str, ...]) -> Iterator[str]:
    """Yield what the dicts on the way to the weights hold beside them, by dotted keys."""
    for depth, key in enumerate(path):
        content = {str(name): child for name, child in _items(value).items()}
        yield from (".".join((*path[:depth], name)) for name in content if name != key)
        value = content[key]


def _refuse(value: Any) -> tuple[_Candidate, str]:
    """Say what a file without any dict of tensors holds."""
    if not isinstance(value, (Mapping, Shell)):
        raise Unreadable(f"holds a {type_of(value)}. Supported: {SUPPORTED}")
    content = _items(value)
    if not content:
        raise Unreadable("holds no tensors")
    _check_tensors(content)
    raise Unreadable("holds no tensors")


def _check_tensors(content: Mapping[Any, Any]) -> None:
    foreign = [
        f"{name!r} ({type_of(value)})"
        for name, value in content.items()
        if not (isinstance(name, str) and isinstance(value, TENSORS))
    ]
    if not any(isinstance(value, (*TENSORS, Mapping)) for value in content.values()):
        raise Unreadable(
            f"holds no tensors, but {some(foreign)}, such as settings or state of a training. Name the file "
            "with the model's weights"
        )
    if foreign:
        raise Unreadable(
            f"must map names to tensors, but also holds {some(foreign)}; save the state dict without them"
        )


# --- names ----------------------------------------------------------------------------------------------


def _name(chosen: Selected, state: Mapping[str, Any]) -> None:
    """Drop prefixes from names, and what wrappers add beside the weights."""
    given = {stored: chosen.renamed(stored) for stored in state}
    names = [stored for stored, name in given.items() if name or not chosen.key]
    for stored in names:
        if len(stored) > LONGEST_NAME or not stored.isprintable():
            raise Unreadable(f"has a tensor with an invalid name: {stored[:40]!r}")
    if chosen.key and (others := [stored for stored, name in given.items() if not name]):
        chosen.notes.append(f"only tensors under {chosen.key!r} are used; left out: {some(others)}")
    _refuse_partitions(names, state)
    averaged = [stored for stored in names if stored.rpartition(".")[2] == "n_averaged"]
    if averaged and len(averaged) < len(names):
        chosen.notes.append(f"left out, the number of averaged models: {some(averaged)}")
        names = [stored for stored in names if stored.rpartition(".")[2] != "n_averaged"]
    if chosen.key == ROOT:
        towers = tuple(dict.fromkeys(start for stored in names if (start := tower(given[stored]))))
        refuse_many(towers)
        others = [stored for stored in names if given[stored].startswith(towers)]
        names = [stored for stored in names if not given[stored].startswith(towers)]
        if others:
            chosen.notes.append(f"left out, names with a prefix: {some(others)}")
    if not factors(names):  # an adapter keeps its own names
        chosen.prefixes = prefixes([given[stored] for stored in names], chosen.notes)
    for stored in names:
        name = chosen.renamed(stored)
        if name in chosen.state:
            raise Unreadable(
                f"has both {chosen.origin[name]!r} and {stored!r}, which are both called {name!r} "
                "without the prefix of the wrapper; keep one of them"
            )
        chosen.origin[name], chosen.state[name] = stored, state[stored]


_FLAT = ("flat_param", "_flat_param")


def _refuse_partitions(names: Collection[str], state: Mapping[str, Any]) -> None:
    """Refuse files that hold parts of a model which a sharded training leaves."""
    if flat := [stored for stored in names if stored.rpartition(".")[2] in _FLAT]:
        raise Unreadable(
            f"holds flattened parameters of FSDP ({some(flat, 3)}), whose shapes are unknown. "
            "Save the model with torch.distributed.checkpoint.state_dict.get_model_state_dict "
            "and full_state_dict=True"
        )
    if len(names) > 1 and all(isinstance(state[n], Stored) and 0 in state[n].size for n in names):
        raise Unreadable(
            "holds only empty tensors, as DeepSpeed ZeRO-3 writes beside its partitions. Run its "
            "zero_to_fp32.py in the folder of the checkpoint, and use the file that it writes"
        )
