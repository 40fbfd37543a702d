"""The effect of each opcode on the machine, and the loop that reads them.

Opcodes are decoded, not executed, by pickletools of the standard library.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any

from .answers import made_set
from .machine import Answers, Machine
from .objects import Unreadable

# Far above any real pickle: a whole module needs about a hundred opcodes per tensor.
MOST_OPCODES = 2_000_000

_LARGE = 1 << 12
_LONGEST_LINE = 1 << 16


class Stream:
    """The input of pickletools, which never copies more bytes than exist.

    Args:
        data: the bytes; of a memoryview, long parts are returned as views.
        position: where to start; afterwards, where the next read starts.
    """

    def __init__(self, data: bytes | memoryview, position: int = 0) -> None:
        self.data: Any = data
        self.position = position

    def read(self, count: int) -> Any:
        """Read at most ``count`` bytes."""
        part = self.data[self.position : self.position + max(0, count)]
        self.position += len(part)
        # Large parts are the bytes of tensors: not copied.
        return part if len(part) >= _LARGE else bytes(part)

    def readline(self) -> bytes:
        """Read up to the next line end; empty if there is none nearby."""
        line = bytes(self.data[self.position : self.position + _LONGEST_LINE])
        line = line[: line.find(b"\n") + 1]
        self.position += len(line)
        return line

    def tell(self) -> int:
        """Return the position."""
        return self.position


def unpickle(
    stream: Stream,
    answers: Answers,
    values: Mapping[str, Any] | None = None,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Read the value that a pickle describes.

    Args:
        stream: the pickle; left behind its end.
        answers: full name -> function that is called in the place of an imported function or class, with the
            machine and the arguments.
        values: full name -> value of other imports; values are hashable and cheap to compare.
        persistent: persistent id -> value; None: ids are refused.

    Returns:
        Plain values, objects of :mod:`.objects`, and what the answers return.

    Raises:
        Unreadable: the pickle is damaged, calls something without an answer (Refused), or needs more work
            than a file of its size can.
    """
    # Real pickles use a byte twice at most: text becomes bytes, bytes become a storage.
    machine = Machine(4 * (len(stream.data) - stream.position), answers, values or {}, persistent)
    try:
        return _run(machine, stream)
    except Unreadable:
        raise
    except Exception as error:  # a damaged pickle can raise almost anything
        reason = str(error) or type(error).__name__
        raise Unreadable(f"is damaged or truncated: {reason[:200]}; nothing was executed") from error


def _run(machine: Machine, stream: Stream) -> Any:
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):  # type: ignore[arg-type]
        if count > MOST_OPCODES:
            raise Unreadable(
                f"is a pickle of more than {MOST_OPCODES:,} steps, more than any checkpoint needs"
            )
        name = opcode.name
        if name in _PUSH:
            machine.push(argument)
        elif name == "STOP":
            return machine.stack.pop()
        elif (step := _STEPS.get(name)) is not None:
            step(machine, argument)
        elif name == "BYTEARRAY8":
            machine.push(bytes(argument or b""))
        else:
            raise Unreadable(f"is a pickle with the opcode {name}, which is not supported")
    raise ValueError("it does not end")


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
