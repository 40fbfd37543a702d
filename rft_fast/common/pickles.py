"""A reader of pickles that runs nothing: the stack machine that checkpoints and data sets share.

A pickle is a program for a small stack machine: it may import any name and call it. Here an import makes a
:class:`Global`, which is a name and no more; nothing is ever looked up. Calls are answered by the few
functions that whoever reads hands in, by name; a call of anything else is refused by its name. An object of
any class becomes a :class:`Shell`, which collects what the pickle sets on it.

The work is bounded by the size of the pickle: nothing is allocated for a size that is merely claimed, what
can be done again and again to one value is paid from a budget of a few steps per byte, and keys
of dicts are plain, so that no hash walks a deep structure. Opcodes are read by the standard library's
pickletools, which decodes them without running them.
"""

from __future__ import annotations

import pickletools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# No honest pickle comes near: a whole module takes some hundred opcodes per tensor.
MOST_OPCODES = 2_000_000

Answers = Mapping[str, Callable[..., Any]]

_LARGE = 1 << 12
_LONGEST_LINE = 1 << 16
_PLAIN: tuple[type, ...] = (str, int, float, bytes, type(None))


class Unreadable(Exception):
    """Why a file cannot be read, as the end of a sentence that its name begins."""


@dataclass(frozen=True, eq=False)
class Global:
    """A name that a pickle imports. Nothing stands behind it. name: raw; str() is fit to print."""

    name: str

    def __str__(self) -> str:
        return re.sub(r"[^\w.<>]", "?", self.name)[:200]


class Refused(Unreadable):
    """That a pickle asks to call something that is not answered. name: fit to print."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"asks to call {name} while it is read, which could run any code. Nothing was executed"
        )


class Shell:
    """What remains of an object. kind: its class. state: its attributes. items: if it is a kind of dict."""

    __slots__ = ("items", "kind", "state")

    def __init__(self, kind: Global) -> None:
        self.kind = kind
        self.state: dict[Any, Any] = {}
        self.items: dict[Any, Any] = {}

    def __str__(self) -> str:
        return str(self.kind)


@dataclass(frozen=True, eq=False)
class Opaque:
    """A value that was read past: an option of an image transform, a sparse tensor. what: in words."""

    what: str

    def __str__(self) -> str:
        return self.what


class Building(ABC):
    """What is made first and filled by its state afterwards, as pickles do with arrays."""

    @abstractmethod
    def build(self, machine: Machine, state: Any) -> None:
        """Takes the state that the pickle gives it."""


class Stream:
    """What pickletools reads, from ``position`` on. Never copies or claims more than there is.

    data: bytes; or a memoryview, of which long parts are given as views.
    """

    def __init__(self, data: bytes | memoryview, position: int = 0) -> None:
        self.data: Any = data
        self.position = position

    def read(self, count: int) -> Any:
        part = self.data[self.position : self.position + max(0, count)]
        self.position += len(part)
        # A large part of a view is a tensor's bytes: they stay where they are.
        return part if len(part) >= _LARGE else bytes(part)

    def readline(self) -> bytes:
        line = bytes(self.data[self.position : self.position + _LONGEST_LINE])
        line = line[: line.find(b"\n") + 1]
        self.position += len(line)
        return line

    def tell(self) -> int:
        return self.position


def kind_of(value: Any) -> str:
    """What a value is, for messages: its own text may be long or hostile."""
    return str(value) if isinstance(value, (Global, Shell, Opaque)) else type(value).__name__


def unpickle(
    stream: Stream,
    answers: Answers,
    values: Mapping[str, Any] | None = None,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The value that a pickle describes, of plain values, the classes here and those of the answers.

    stream: is left behind the pickle.
    answers: by name, what is called in the place of a function or a class: with the machine and the
        arguments.
    values: by name, what other imports stand for: values that compare and hash at once.
    persistent: what a persistent id stands for; without it, ids are refused.

    Raises Unreadable for a pickle that is damaged, that calls anything unknown, or that does more than a
    file of its size could need.
    """
    # Honest pickles touch a byte twice at most: text that becomes bytes that become a storage.
    machine = Machine(4 * (len(stream.data) - stream.position), answers, values or {}, persistent)
    try:
        return machine.run(stream)
    except Unreadable:
        raise
    except Exception as error:  # a damaged pickle surfaces as almost any exception
        reason = str(error) or type(error).__name__
        raise Unreadable(f"is damaged or truncated: {reason[:200]}; nothing was executed") from error


class Machine:
    """The stack, and the budget from which answers pay for what they copy (:meth:`spend`)."""

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

    def run(self, stream: Stream) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):  # type: ignore[arg-type]
            if count > MOST_OPCODES:
                raise Unreadable(f"is a pickle of more than {MOST_OPCODES:,} steps, which none needs")
            name = opcode.name
            if name in _PUSH:
                self.stack.append(argument)
            elif name == "STOP":
                return self.stack.pop()
            elif (step := _STEPS.get(name)) is not None:
                step(self, argument)
            elif name == "BYTEARRAY8":
                self.stack.append(bytes(argument or b""))
            else:
                raise Unreadable(f"is a pickle with the opcode {name}, which no honest one needs")
        raise ValueError("it has no end")

    def spend(self, steps: int) -> None:
        self.budget -= steps
        if self.budget < 0:
            raise Unreadable("is a pickle that unfolds to far more than its size; nothing was executed")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def popped(self) -> list[Any]:
        """What stands above the last mark."""
        above, self.stack = self.stack, self.marks.pop()
        return above

    # --- imports, calls, objects ----------------------------------------------------------------

    def import_(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("it imports something that is no name")
        full = f"{module}.{name}"
        known = self.globals.setdefault(full, Global(full))
        self.stack.append(self.values.get(full, known))

    def call(self, function: Any, arguments: Any) -> Any:
        answer = self.answers.get(function.name) if isinstance(function, Global) else None
        if answer is None:
            raise Refused(kind_of(function))
        if not isinstance(arguments, tuple):
            raise ValueError(f"{function} is called without a tuple of arguments")
        return answer(self, *arguments)

    def reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack.append(self.call(self.stack.pop(), arguments))

    def new(self, arguments: Any) -> None:
        kind = self.stack.pop()
        if not isinstance(kind, Global):
            raise ValueError(f"it makes an object of {kind_of(kind)}")
        # Arguments of other classes are left aside: a shell's attributes come by BUILD.
        self.stack.append(self.call(kind, arguments) if kind.name in self.answers else Shell(kind))

    def new_with_keywords(self) -> None:
        _, arguments = self.stack.pop(), self.stack.pop()
        self.new(arguments)

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Shell):
            # What copyreg makes: a dict, or a pair of dicts when there are slots.
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
        """INST and OBJ, opcodes of Python 2 that make an object by calling its class."""
        name = str(argument).replace(" ", ".") if argument else kind_of(next(iter(self.popped()), None))
        raise Refused(str(Global(name)))

    # --- containers -----------------------------------------------------------------------------

    def items(self, target: Any, pairs: Iterable[tuple[Any, Any]]) -> None:
        if isinstance(target, Shell):
            target = target.items
        elif isinstance(target, Opaque):
            return
        if not isinstance(target, dict):
            raise ValueError(f"it sets items of a {kind_of(target)}")
        for key, value in pairs:
            target[self.key(key)] = value

    def extend(self, target: Any, values: list[Any]) -> None:
        if type(target) is list:
            target.extend(values)
        elif not isinstance(target, (Shell, Opaque)):
            raise ValueError(f"it appends to a {kind_of(target)}")

    def add(self, target: Any, values: list[Any]) -> None:
        if type(target) is not set:
            raise ValueError(f"it adds to a {kind_of(target)}")
        target.update(map(self.key, values))

    def key(self, value: Any) -> Any:
        parts = value if type(value) is tuple else (value,)
        self.spend(len(parts))
        for part in parts:
            if type(part) is int and part.bit_length() > 64:
                raise ValueError("a key is too large a number")
            if not isinstance(part, self.plain):
                raise ValueError(f"a {kind_of(part)} is used as a key")
        return value

    def refer(self, value: Any) -> None:
        if self.persistent is None:
            raise Unreadable("refers to data outside of its pickle, which a plain pickle has not")
        self.stack.append(self.persistent(value))


# --- answers that are needed for more than one kind of file -----------------------------------------


def encode(machine: Machine, text: str, encoding: str = "latin1") -> bytes:
    """``_codecs.encode``, by which bytes are written for Python 2."""
    machine.spend(len(text))
    if encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes are written in an unknown encoding")
    return text.encode("latin1")


def made_set(machine: Machine, values: Any = ()) -> set[Any]:
    """``set`` and ``frozenset``."""
    machine.spend(len(values))
    return {machine.key(value) for value in values}


def ordered_dict(machine: Machine, pairs: Any = (), *_: Any) -> dict[Any, Any]:
    """``OrderedDict`` and ``Counter``."""
    result: dict[Any, Any] = {}
    pairs = list(pairs.items()) if isinstance(pairs, dict) else pairs
    machine.spend(len(pairs))
    machine.items(result, ((key, value) for key, value in pairs))
    return result


# --- opcodes ------------------------------------------------------------------------------------

_PUSH = frozenset(
    {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
    | {"STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
    | {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
)


def _marked(machine: Machine, _: Any) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []


def _short_tuple(count: int) -> Callable[[Machine, Any], None]:
    def step(machine: Machine, _: Any) -> None:
        if len(machine.stack) < count:
            raise ValueError("the stack is too short")
        machine.stack[-count:] = [tuple(machine.stack[-count:])]

    return step


def _pairs(machine: Machine, _: Any) -> None:
    above = machine.popped()
    if len(above) % 2:
        raise ValueError("a key has no value")
    machine.items(machine.stack[-1], zip(above[::2], above[1::2], strict=True))


def _dict(machine: Machine, _: Any) -> None:
    above = machine.popped()
    made: dict[Any, Any] = {}
    machine.items(made, zip(above[::2], above[1::2], strict=True))
    machine.push(made)


def _pair(machine: Machine, _: Any) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.items(machine.stack[-1], [(key, value)])


def _list_items(machine: Machine, _: Any) -> None:
    above = machine.popped()
    machine.extend(machine.stack[-1], above)


def _set_items(machine: Machine, _: Any) -> None:
    above = machine.popped()
    machine.add(machine.stack[-1], above)


def _one_item(machine: Machine, _: Any) -> None:
    value = machine.stack.pop()
    machine.extend(machine.stack[-1], [value])


def _stack_global(machine: Machine, _: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.import_(module, name)


def _pop(machine: Machine, _: Any) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.popped()


def _get(machine: Machine, index: int) -> None:
    if index not in machine.memo:
        raise ValueError("a value is used that was never stored")
    machine.push(machine.memo[index])


def _put(machine: Machine, index: int) -> None:
    machine.memo[index] = machine.stack[-1]


_STEPS: Mapping[str, Callable[[Machine, Any], object]] = {
    "PROTO": lambda m, a: None,
    "FRAME": lambda m, a: None,
    "NONE": lambda m, a: m.push(None),
    "NEWTRUE": lambda m, a: m.push(True),
    "NEWFALSE": lambda m, a: m.push(False),
    "MARK": _marked,
    "POP": _pop,
    "POP_MARK": lambda m, a: m.popped(),
    "DUP": lambda m, a: m.push(m.stack[-1]),
    "PUT": _put,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": lambda m, a: _put(m, len(m.memo)),
    **{name: _get for name in ("GET", "BINGET", "LONG_BINGET")},
    "EMPTY_TUPLE": lambda m, a: m.push(()),
    "TUPLE1": _short_tuple(1),
    "TUPLE2": _short_tuple(2),
    "TUPLE3": _short_tuple(3),
    "TUPLE": lambda m, a: m.push(tuple(m.popped())),
    "EMPTY_LIST": lambda m, a: m.push([]),
    "LIST": lambda m, a: m.push(m.popped()),
    "APPEND": _one_item,
    "APPENDS": _list_items,
    "EMPTY_DICT": lambda m, a: m.push({}),
    "DICT": _dict,
    "SETITEM": _pair,
    "SETITEMS": _pairs,
    "EMPTY_SET": lambda m, a: m.push(set()),
    "ADDITEMS": _set_items,
    "FROZENSET": lambda m, a: m.push(made_set(m, m.popped())),
    "GLOBAL": lambda m, a: m.import_(*a.split(" ", 1)),
    "STACK_GLOBAL": _stack_global,
    "REDUCE": lambda m, a: m.reduce(),
    "NEWOBJ": lambda m, a: m.new(m.stack.pop()),
    "NEWOBJ_EX": lambda m, a: m.new_with_keywords(),
    "BUILD": lambda m, a: m.build(),
    "INST": lambda m, a: m.called_at_once(a),
    "OBJ": lambda m, a: m.called_at_once(None),
    "PERSID": lambda m, a: m.refer(a),
    "BINPERSID": lambda m, a: m.refer(m.stack.pop()),
}
