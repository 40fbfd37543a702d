"""A reader of pickles that builds descriptions of tensors and modules, and runs nothing.

A pickle is a program for a small stack machine: it may import any name and call it. Here an import makes a
:class:`.values.Global`, which is a name and no more; nothing is ever looked up. Calls are answered by
``_ANSWERS``, the few functions of torch and of the standard library that tensors are pickled with, each
written anew below; a call of anything else is refused by its name. An object of any class becomes a
:class:`.values.Shell`, which collects what the pickle sets on it.

The work is bounded by the size of the pickle: nothing is allocated for a size that is merely claimed, what
can be done again and again to one value is paid from a budget of a few steps per byte, and keys
of dicts are plain, so that no hash walks a deep structure. Opcodes are read by the standard library's
pickletools, which decodes them without running them.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from .values import (
    DTYPES,
    Global,
    Opaque,
    Shell,
    Special,
    Storage,
    Stored,
    Stream,
    Unreadable,
    kind_of,
    natural,
)

# No model's pickle comes near: a whole module takes some hundred opcodes per tensor.
MOST_OPCODES = 2_000_000


def unpickle(
    stream: Stream,
    persistent: Callable[[Any], Any] | None = None,
    nested: Callable[[memoryview], Storage] | None = None,
) -> Any:
    """The value that a pickle describes, of plain values and the classes in values.py.

    stream: is left behind the pickle.
    persistent: what a persistent id stands for; without it, ids are refused.
    nested: the storage in the bytes of a torch file within the pickle; without it, they are refused.

    Raises Unreadable for a pickle that is damaged, that calls anything unknown, or that does more than a
    file of its size could need.
    """
    # Honest pickles touch a byte twice at most: text that becomes bytes that become a storage.
    machine = _Machine(4 * (len(stream.data) - stream.position), persistent, nested)
    try:
        return machine.run(stream)
    except Unreadable:
        raise
    except Exception as error:  # a damaged pickle surfaces as almost any exception
        reason = str(error) or type(error).__name__
        raise Unreadable(f"is damaged or truncated: {reason[:200]}; nothing was executed") from error


class _Machine:
    def __init__(
        self,
        budget: int,
        persistent: Callable[[Any], Any] | None,
        nested: Callable[[memoryview], Storage] | None,
    ) -> None:
        self.budget = budget
        self.persistent = persistent
        self.nested = nested
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.globals: dict[str, Global] = {}

    def run(self, stream: Stream) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):  # type: ignore[arg-type]
            if count > MOST_OPCODES:
                raise Unreadable(f"is a pickle of more than {MOST_OPCODES:,} steps; no model needs so many")
            name = opcode.name
            if name in _PUSH:
                self.stack.append(argument)
            elif name == "STOP":
                return self.stack.pop()
            elif (step := _STEPS.get(name)) is not None:
                step(self, argument)
            else:
                raise Unreadable(f"is a pickle with the opcode {name}, which no model needs")
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
        self.stack.append(DTYPES.get(full) or self.globals.setdefault(full, Global(full)))

    def call(self, function: Any, arguments: Any) -> Any:
        answer = _ANSWERS.get(function.name) if isinstance(function, Global) else None
        if answer is None:
            raise _refusal(kind_of(function))
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
        self.stack.append(self.call(kind, arguments) if kind.name in _ANSWERS else Shell(kind))

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
        elif not isinstance(target, (dict, Opaque)):  # an OrderedDict's state is its metadata
            raise ValueError(f"it sets the state of a {kind_of(target)}")

    def called_at_once(self, argument: Any) -> None:
        """INST and OBJ, opcodes of Python 2 that make an object by calling its class."""
        name = str(argument).replace(" ", ".") if argument else kind_of(next(iter(self.popped()), None))
        raise _refusal(str(Global(name)))

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
            if not isinstance(part, (str, int, float, bytes, type(None), torch.dtype, Global, Shell)):
                raise ValueError(f"a {kind_of(part)} is used as a key")
        return value

    def storage(self, value: Any) -> None:
        if self.persistent is None:
            raise Unreadable("refers to data outside of its pickle, which a plain pickle has not")
        self.stack.append(self.persistent(value))


def _refusal(name: str) -> Unreadable:
    return Unreadable(
        f"asks to call {name} while it is read, which could run any code. Nothing was executed. If you trust "
        "its origin, open it where it was made and torch.save(model.state_dict(), ...) from there"
    )


# --- what calls are answered with ---------------------------------------------------------------


def _ordered_dict(machine: _Machine, pairs: Any = (), *_: Any) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    pairs = list(pairs.items()) if isinstance(pairs, dict) else pairs
    machine.spend(len(pairs))
    machine.items(result, ((key, value) for key, value in pairs))
    return result


def _set(machine: _Machine, values: Any = ()) -> set[Any]:
    machine.spend(len(values))
    return {machine.key(value) for value in values}


def _encode(machine: _Machine, text: str, encoding: str = "latin1") -> bytes:
    machine.spend(len(text))
    if encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes are written in an unknown encoding")
    return text.encode("latin1")


def _nested(machine: _Machine, data: Any) -> Storage:
    if machine.nested is None or not isinstance(data, (bytes, memoryview)):
        raise Unreadable("holds a torch file within a torch file, deeper than any model needs")
    machine.spend(len(data))
    # Short bytes are copied: what tensors are made of must be writable.
    return machine.nested(data if isinstance(data, memoryview) else memoryview(bytearray(data)))


def _tensor(machine: _Machine, source: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Stored:
    if not isinstance(source, Storage):
        raise ValueError("a tensor is made of no storage")
    return _typed_tensor(machine, source, offset, size, stride, None, None, source.dtype or torch.uint8)


def _typed_tensor(
    machine: _Machine,
    source: Any,
    offset: Any,
    size: Any,
    stride: Any,
    _grad: Any,
    _hooks: Any,
    dtype: Any,
    *_: Any,
) -> Stored:
    if not isinstance(source, Storage) or not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor is made of no storage, or of an unknown type")
    if (
        not isinstance(size, (tuple, list))
        or not isinstance(stride, (tuple, list))
        or len(size) != len(stride)
    ):
        raise ValueError("a tensor's shape and strides do not fit")
    machine.spend(len(size))
    return Stored(source, dtype, natural(offset), tuple(map(natural, size)), tuple(map(natural, stride)))


def _parameter(machine: _Machine, data: Any = None, *_: Any) -> Any:
    if not isinstance(data, (Stored, Opaque)):
        raise ValueError("a parameter is made of no tensor")
    return data


def _with_attributes(machine: _Machine, function: Any, _kind: Any, arguments: Any, *_: Any) -> Any:
    if not isinstance(function, Global) or function.name not in _TENSORS:
        raise _refusal(kind_of(function))
    return machine.call(function, arguments)


def _reconstructor(machine: _Machine, kind: Any, *_: Any) -> Shell:
    if not isinstance(kind, Global):
        raise ValueError("an object has no class")
    return Shell(kind)


def _first(machine: _Machine, value: Any, *_: Any) -> Any:
    return value


def _tuple(machine: _Machine, values: Any = ()) -> tuple[Any, ...]:
    machine.spend(len(values))
    return tuple(values)


def _opaque(what: str, kind: type[Opaque] = Opaque) -> Callable[..., Any]:
    def answer(machine: _Machine, *_: Any) -> Opaque:
        return kind(what)

    return answer


_TENSORS: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
    "torch._utils._rebuild_sparse_tensor": _opaque("sparse tensor", Special),
    "torch._utils._rebuild_sparse_csr_tensor": _opaque("sparse tensor", Special),
    "torch._utils._rebuild_nested_tensor": _opaque("nested tensor", Special),
    "torch._utils._rebuild_qtensor": _opaque("quantized tensor", Special),
    "torch._utils._rebuild_meta_tensor_no_storage": _opaque("meta tensor", Special),
}

# What stands in image transforms, tokenizers and options; nothing of a model's weights hangs on it.
_VALUES = (
    "PIL.Image.Resampling",
    "PIL.Image.Transpose",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "re._compile",
    "regex._regex.compile",
    "torch.device",
    "torch.serialization._get_layout",
    "torchvision.transforms.functional.InterpolationMode",
)

_ANSWERS: Mapping[str, Callable[..., Any]] = {
    **_TENSORS,
    **{name: _opaque(name) for name in _VALUES},
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
    "torch.storage._load_from_bytes": _nested,
    "torch.Size": _tuple,
    "torch.jit._pickle.build_boollist": _first,
    "torch.jit._pickle.build_doublelist": _first,
    "torch.jit._pickle.build_intlist": _first,
    "torch.jit._pickle.build_tensorlist": _first,
    "torch.jit._pickle.restore_type_tag": _first,
    "collections.Counter": _ordered_dict,
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": lambda machine, *_: {},
    "_codecs.encode": _encode,
    **{f"{module}.set": _set for module in ("builtins", "__builtin__")},
    **{f"{module}.frozenset": _set for module in ("builtins", "__builtin__")},
    **{f"{module}._reconstructor": _reconstructor for module in ("copyreg", "copy_reg")},
}

# --- opcodes ------------------------------------------------------------------------------------

_PUSH = frozenset(
    {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
    | {"STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
    | {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
)


def _marked(machine: _Machine, _: Any) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []


def _short_tuple(count: int) -> Callable[[_Machine, Any], None]:
    def step(machine: _Machine, _: Any) -> None:
        if len(machine.stack) < count:
            raise ValueError("the stack is too short")
        machine.stack[-count:] = [tuple(machine.stack[-count:])]

    return step


def _pairs(machine: _Machine, _: Any) -> None:
    above = machine.popped()
    if len(above) % 2:
        raise ValueError("a key has no value")
    machine.items(machine.stack[-1], zip(above[::2], above[1::2], strict=True))


def _dict(machine: _Machine, _: Any) -> None:
    above = machine.popped()
    made: dict[Any, Any] = {}
    machine.items(made, zip(above[::2], above[1::2], strict=True))
    machine.push(made)


def _pair(machine: _Machine, _: Any) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.items(machine.stack[-1], [(key, value)])


def _list_items(machine: _Machine, _: Any) -> None:
    above = machine.popped()
    machine.extend(machine.stack[-1], above)


def _set_items(machine: _Machine, _: Any) -> None:
    above = machine.popped()
    machine.add(machine.stack[-1], above)


def _one_item(machine: _Machine, _: Any) -> None:
    value = machine.stack.pop()
    machine.extend(machine.stack[-1], [value])


def _stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.import_(module, name)


def _pop(machine: _Machine, _: Any) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.popped()


def _get(machine: _Machine, index: int) -> None:
    if index not in machine.memo:
        raise ValueError("a value is used that was never stored")
    machine.push(machine.memo[index])


def _put(machine: _Machine, index: int) -> None:
    machine.memo[index] = machine.stack[-1]


_STEPS: Mapping[str, Callable[[_Machine, Any], object]] = {
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
    "FROZENSET": lambda m, a: m.push(_set(m, m.popped())),
    "GLOBAL": lambda m, a: m.import_(*a.split(" ", 1)),
    "STACK_GLOBAL": _stack_global,
    "REDUCE": lambda m, a: m.reduce(),
    "NEWOBJ": lambda m, a: m.new(m.stack.pop()),
    "NEWOBJ_EX": lambda m, a: m.new_with_keywords(),
    "BUILD": lambda m, a: m.build(),
    "INST": lambda m, a: m.called_at_once(a),
    "OBJ": lambda m, a: m.called_at_once(None),
    "PERSID": lambda m, a: m.storage(a),
    "BINPERSID": lambda m, a: m.storage(m.stack.pop()),
}
