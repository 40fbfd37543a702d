"""The stack machine that reads pickles and executes nothing.

A pickle is a program for a small stack machine; it may import any name and call it. Here an import makes a
:class:`Global`, which is a name and is never resolved. Calls go to a few functions that the caller of the
reader provides by name; any other call is refused. An object of any class becomes a :class:`Shell`, which
stores what the pickle sets on it.

The work is bounded by the size of the pickle: nothing is allocated for a size that is only claimed,
operations that can be repeated on one value are paid from a budget of a few steps per byte, and keys of dicts
are plain values, so that no hash traverses a deep structure.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .objects import Global, Opaque, Refused, Shell, Unreadable, kind_of

Answers = Mapping[str, Callable[..., Any]]

_PLAIN: tuple[type, ...] = (str, int, float, bytes, type(None))


class Building(ABC):
    """An object that is created first and gets its state afterwards, as arrays do in pickles."""

    @abstractmethod
    def build(self, machine: Machine, state: Any) -> None:
        """Set the state.

        Args:
            machine: the machine that reads the pickle; pays for copies.
            state: as the pickle gives it.

        Raises:
            ValueError: it is not a state of such an object.
        """


class Machine:
    """State of the reader: stack, marks, memo, imported names, and the budget that copies are paid from.

    Args:
        budget: number of steps; see :meth:`spend`.
        answers: full name -> function called in its place, with the machine and the arguments.
        values: full name -> value of the import, for names that are not called; values are hashable.
        persistent: persistent id -> value; None: ids are refused.
    """

    def __init__(
        self,
        budget: int,
        answers: Answers,
        values: Mapping[str, Any],
        persistent: Callable[[Any], Any] | None,
    ) -> None:
        self.budget = budget
        self.answers = answers
        self.values = values
        self.plain = (*_PLAIN, Global, Shell, *{type(value) for value in values.values()})
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.globals: dict[str, Global] = {}

    def spend(self, steps: int) -> None:
        """Pay for work that is proportional to ``steps``.

        Raises:
            Unreadable: the budget is exhausted.
        """
        self.budget -= steps
        if self.budget < 0:
            raise Unreadable("is a pickle that expands to far more than its size; nothing was executed")

    def push(self, value: Any) -> None:
        """Push a value."""
        self.stack.append(value)

    def popped(self) -> list[Any]:
        """Pop everything above the last mark."""
        above, self.stack = self.stack, self.marks.pop()
        return above

    # --- imports, calls, objects ----------------------------------------------------------------

    def import_(self, module: Any, name: Any) -> None:
        """Push the value or the Global of an imported name."""
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("it imports something that is not a name")
        full = f"{module}.{name}"
        known = self.globals.setdefault(full, Global(full))
        self.stack.append(self.values.get(full, known))

    def call(self, function: Any, arguments: Any) -> Any:
        """Call the answer for a Global.

        Raises:
            Refused: there is none.
            ValueError: the arguments are not a tuple.
        """
        answer = self.answers.get(function.name) if isinstance(function, Global) else None
        if answer is None:
            raise Refused(kind_of(function))
        if not isinstance(arguments, tuple):
            raise ValueError(f"{function} is called without a tuple of arguments")
        return answer(self, *arguments)

    def reduce(self) -> None:
        """REDUCE: call a function with a tuple of arguments."""
        arguments = self.stack.pop()
        self.stack.append(self.call(self.stack.pop(), arguments))

    def new(self, arguments: Any) -> None:
        """NEWOBJ: make an object; of a class without an answer, a Shell."""
        kind = self.stack.pop()
        if not isinstance(kind, Global):
            raise ValueError(f"it creates an object of {kind_of(kind)}")
        # Arguments are ignored for shells, whose attributes come by BUILD.
        self.stack.append(self.call(kind, arguments) if kind.name in self.answers else Shell(kind))

    def new_with_keywords(self) -> None:
        """NEWOBJ_EX: as NEWOBJ; keyword arguments are ignored."""
        _, arguments = self.stack.pop(), self.stack.pop()
        self.new(arguments)

    def build(self) -> None:
        """BUILD: set the state of the object on top of the stack."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Shell):
            # From copyreg: a dict, or a pair of dicts for a class with slots.
            parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
            for part in parts:
                if isinstance(part, dict):
                    self.spend(len(part))
                    target.state.update(part)
        elif isinstance(target, Building):
            target.build(self, state)
        elif not isinstance(target, (dict, Opaque)):  # an OrderedDict's state is its metadata
            raise ValueError(f"it sets the state of a {kind_of(target)}")

    def called_at_once(self, argument: Any) -> None:
        """Refuse INST and OBJ, opcodes of Python 2 that call a class."""
        name = str(argument).replace(" ", ".") if argument else kind_of(next(iter(self.popped()), None))
        raise Refused(str(Global(name)))

    # --- containers -----------------------------------------------------------------------------

    def items(self, target: Any, pairs: Iterable[tuple[Any, Any]]) -> None:
        """Set items of a dict or a Shell; skip them for an Opaque."""
        if isinstance(target, Shell):
            target = target.items
        elif isinstance(target, Opaque):
            return
        if not isinstance(target, dict):
            raise ValueError(f"it sets items of a {kind_of(target)}")
        for key, value in pairs:
            target[self.key(key)] = value

    def extend(self, target: Any, values: list[Any]) -> None:
        """Append values to a list; skip them for a Shell or an Opaque."""
        if type(target) is list:
            target.extend(values)
        elif not isinstance(target, (Shell, Opaque)):
            raise ValueError(f"it appends to a {kind_of(target)}")

    def add(self, target: Any, values: list[Any]) -> None:
        """Add values to a set."""
        if type(target) is not set:
            raise ValueError(f"it adds to a {kind_of(target)}")
        target.update(map(self.key, values))

    def key(self, value: Any) -> Any:
        """Check that a value may be a key, and return it."""
        parts = value if type(value) is tuple else (value,)
        self.spend(len(parts))
        for part in parts:
            if type(part) is int and part.bit_length() > 64:
                raise ValueError("a key is too large a number")
            if not isinstance(part, self.plain):
                raise ValueError(f"a {kind_of(part)} is used as a key")
        return value

    def refer(self, value: Any) -> None:
        """Push the value of a persistent id."""
        if self.persistent is None:
            raise Unreadable("refers to data outside its pickle, which a plain pickle cannot do")
        self.stack.append(self.persistent(value))
