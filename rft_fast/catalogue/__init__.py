"""The studies: one object each, listed once, in the paper's order.

A study is added by a file of its own, with a subclass of :class:`Study`, and a line in the table below.
Everything else, such as command line, plan, workers, figures, summary and report, reads the table.
"""

from __future__ import annotations

from ..common.fields import Tree
from .choice import Choice
from .claim import Claim
from .coefficients import Coefficients, Search
from .correlation import Correlation
from .cumulative import Cumulative
from .ensemble import Ensemble
from .interpolation import Interpolation
from .layers import Layers
from .pairs import Pairs
from .prune import Prune
from .sharpness import LayerSharpness, Pilot, Sharpness
from .soups import Greedy, Soups
from .study import Chosen, Images, Study, Task

_TABLE: dict[str, Study] = {
    study.name: study
    for study in (
        Interpolation(),
        Pilot(),
        Layers(),
        Sharpness(),
        LayerSharpness(),
        Prune(),
        Correlation(),
        Claim(),
        Ensemble(),
        Choice(),
        Cumulative(),
        Coefficients(),
        Search(),
        Pairs(),
        Soups(),
        Greedy(),
    )
}


def names() -> list[str]:
    """Names of all studies that people choose by, in order."""
    return [study.name for study in studies()]


def default() -> list[str]:
    """Names of the studies that a run makes for which none is named."""
    return [study.name for study in studies() if study.by_default]


def studies() -> list[Study]:
    """The studies that people choose by name."""
    return [study for study in _TABLE.values() if not study.hidden]


def study(name: str) -> Study:
    """The study of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in _TABLE:
        raise ValueError(f"study: there is no study {name!r}; there are {', '.join(names())}")
    return _TABLE[name]


def register(new: Study) -> None:
    """Adds a study behind the others, in this process.

    Raises:
        ValueError: the name is taken.
    """
    if new.name in _TABLE:
        raise ValueError(f"study: there is a study {new.name!r} already")
    _TABLE[new.name] = new


def measured(requested: list[str], tree: Tree) -> list[str]:
    """Those that are requested and those that they need, in order."""
    found, todo = set[str](), list(requested)
    while todo:
        if (name := todo.pop()) not in found:
            found.add(name)
            todo += study(name).needs(tree)
    return [name for name in _TABLE if name in found]


def phases() -> list[list[Study]]:
    """The studies that measure, by phase."""
    found: dict[int, list[Study]] = {}
    for each in _TABLE.values():
        if each.measures:
            found.setdefault(each.phase, []).append(each)
    return [found[phase] for phase in sorted(found)]


__all__ = [
    "Chosen",
    "Images",
    "Study",
    "Task",
    "default",
    "measured",
    "names",
    "phases",
    "register",
    "studies",
    "study",
]
