"""The operators of torch, ``rft_fast::write_`` and ``rft_fast::add_``, for code that traces or fakes tensors.

torch.compile, torch.export, make_fx and fake tensors cannot look into the backends. For them ``write_``,
``add_`` and ``Plan.write`` call these operators, whose schemas declare what they read, change and refuse. All
other calls go straight to a backend, because an operator costs more. (``noise_like``, ``keep_mask_like``,
``perturb_`` and ``interpolate_`` are writes.)

A source that is None is the output itself: an operator must not receive one tensor both to change and to
read. The seed is two 32-bit words, because integers of a schema are signed. On meta tensors the operator
only checks its arguments, as torch's own operators do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rft_fast.kernels import registry
from rft_fast.kernels.contract import (
    PER_TENSOR,
    WRITE_ARGUMENTS,
    Add,
    Each,
    Write,
    is_list,
    requests,
    spread,
)
from rft_fast.kernels.rows import lay_out, make_rows
from rft_fast.kernels.shards import PLAIN, is_sharded
from rft_fast.names import Impl, Weight

# The arguments of a Write, in order.
Numbers = tuple[Any, ...]

# The tensors; the numbers of a Write, the seed as two words; the backend; where each tensor's noise starts;
# the numbers of each tensor, which replace the single ones; what errors call the tensors.
_SCHEMA = (
    "(Tensor(a0!)[] out, Tensor?[] zeroshot, Tensor?[] finetuned, "
    "float alpha, float rho, str on, float keep, str fill, str noise, bool adaptive, "
    "SymInt seed_high, SymInt seed_low, SymInt draw, SymInt sign, str impl, SymInt[]? blocks=None, "
    "float[]? alphas=None, float[]? rhos=None, float[]? keeps=None, str[]? names=None) -> ()"
)
_OTHERS = len(WRITE_ARGUMENTS) + 2  # arguments between the tensors and ``blocks``
_ADD = (
    "(Tensor(a0!)[] out, Tensor?[] w, Tensor?[] b, float[] scale, str weight, str impl, "
    "str[]? names=None) -> ()"
)

# Numbers whose values are not known while tracing.
SYMBOLS = (torch.SymInt, torch.SymFloat)


def is_tracing() -> bool:
    """Whether torch records the calls of this thread, and therefore must see a write.

    ``is_in_torch_dispatch_mode`` tells it of all threads at once.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def is_traced(tensors: Sequence[Tensor]) -> bool:
    """Whether torch records calls, or the tensors may be fake."""
    if is_tracing():
        return True
    for tensor in tensors:  # half the time of any()
        if type(tensor) not in PLAIN and not is_sharded(tensor):
            return True
    return False


def _refuse_sharded(tensors: Sequence[Tensor]) -> None:
    for place, tensor in enumerate(tensors):
        if is_sharded(tensor):
            raise RuntimeError(
                f"write: tensor {place} is a DTensor, which compiled code cannot write; call this outside of "
                "the compiled function, which then sees the new weights"
            )


def _refuse_tensors(numbers: Mapping[str, object]) -> None:
    """Refuse numbers in tensors whose values are not known while tracing."""
    for name, value in numbers.items():
        if isinstance(value, Tensor) and (torch.compiler.is_dynamo_compiling() or type(value) not in PLAIN):
            raise TypeError(
                f"write: {name} is a tensor, whose value is not known while code is traced; pass a number to "
                f"the compiled function: {name}.item() outside of it"
            )


def write_(
    out: Sequence[Tensor],
    zeroshot: Sequence[Tensor],
    finetuned: Sequence[Tensor],
    numbers: Numbers,
    impl: Impl,
    blocks: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Write through the operator. ``blocks``, ``names``: as for ``rows.make_rows``."""
    _refuse_sharded(out)
    _refuse_tensors(dict(zip(WRITE_ARGUMENTS, numbers, strict=True)))
    if not torch.compiler.is_dynamo_compiling():  # cannot trace Write; _refuse checks there
        numbers = _checked(numbers, len(out))
    named = dict(zip(WRITE_ARGUMENTS, numbers, strict=True))
    lists: list[list[Any] | None] = []
    for name in PER_TENSOR:
        lists.append(spread(name, named[name], len(out)) if is_list(named[name]) else None)
        if lists[-1] is not None:
            named[name] = 0.0
    *others, seed, draw, sign = named.values()
    with torch.no_grad():
        _write(
            out, _apart(zeroshot, out), _apart(finetuned, out),
            *others, seed // 2**32, seed % 2**32, draw, sign, impl, blocks, *lists, names,
        )  # fmt: skip


def add_(
    out: Sequence[Tensor],
    w: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: Each,
    weight: Weight,
    impl: Impl,
    names: Sequence[str] | None = None,
) -> None:
    """``rft_fast.add_`` through its operator."""
    _refuse_sharded(out)
    _refuse_tensors({"scale": scale})
    scales = spread("scale", scale, len(out))
    with torch.no_grad():
        _add(out, _apart(w, out), _apart(b, out), scales, weight, impl, names)


def _checked(numbers: Numbers, count: int) -> Numbers:
    """Return the numbers as a ``Write`` has them, validated; symbols and lists as they are."""
    named = dict(zip(WRITE_ARGUMENTS, numbers, strict=True))
    known = {name: number for name, number in named.items() if not isinstance(number, SYMBOLS)}
    requests(Write, {"alpha": 0.0, **known}, [name for name in PER_TENSOR if name in known], count)
    known = {name: number for name, number in known.items() if not is_list(number)}
    request = Write(**{"alpha": 0.0, **known})
    return tuple(getattr(request, name) if name in known else named[name] for name in named)


def _apart(sources: Sequence[Tensor], out: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Replace sources that are the output by None. Lists of other lengths pass, and are refused later."""
    if len(sources) != len(out):
        return sources
    return [None if source is own else source for source, own in zip(sources, out, strict=True)]


def _together(sources: Sequence[Tensor | None], out: Sequence[Tensor]) -> list[Tensor]:
    """The reverse of ``_apart``."""
    if len(sources) != len(out):
        return [source for source in sources if source is not None]
    return [own if source is None else source for source, own in zip(sources, out, strict=True)]


# A call builds a table, which a CUDA graph cannot capture: the tag makes the compiler keep it outside.
@torch.library.custom_op(
    "rft_fast::write_", mutates_args=("out",), schema=_SCHEMA, tags=(torch.Tag.cudagraph_unsafe,)
)
def _write(
    out: Sequence[Tensor], zeroshot: Sequence[Tensor | None], finetuned: Sequence[Tensor | None], *others: Any
) -> None:
    numbers, impl, blocks, names = _parsed(others)
    request = requests(Write, dict(zip(WRITE_ARGUMENTS, numbers, strict=True)), PER_TENSOR, len(out))
    rows = make_rows(out, _together(zeroshot, out), _together(finetuned, out), names, blocks)
    if rows:
        registry.pick(impl, rows[0].out.device).write(rows, request)


@_write.register_fake
def _refuse(
    out: Sequence[Tensor], zeroshot: Sequence[Tensor | None], finetuned: Sequence[Tensor | None], *others: Any
) -> None:
    """Refuse what ``_write`` would refuse, as far as it is known while tracing."""
    numbers, impl, blocks, names = _parsed(others)
    _checked(numbers, len(out))
    registry.check_name(impl)
    lay_out(out, _together(zeroshot, out), _together(finetuned, out), names, blocks)


@torch.library.custom_op(
    "rft_fast::add_", mutates_args=("out",), schema=_ADD, tags=(torch.Tag.cudagraph_unsafe,)
)
def _add(
    out: Sequence[Tensor],
    w: Sequence[Tensor | None],
    b: Sequence[Tensor | None],
    scale: Sequence[float],
    weight: Weight,
    impl: Impl,
    names: Sequence[str] | None = None,
) -> None:
    request = requests(Add, {"scale": list(scale), "weight": weight}, ("scale",), len(out))
    rows = make_rows(out, _together(b, out), _together(w, out), names, roles=("out", "b", "w"))
    if rows:
        registry.pick(impl, rows[0].out.device).write(rows, request)


@_add.register_fake
def _refuse_add(
    out: Sequence[Tensor],
    w: Sequence[Tensor | None],
    b: Sequence[Tensor | None],
    scale: Sequence[float],
    weight: Weight,
    impl: Impl,
    names: Sequence[str] | None = None,
) -> None:
    known = [0.0 if isinstance(number, SYMBOLS) else number for number in scale]
    requests(Add, {"scale": known, "weight": weight}, ("scale",), len(out))
    registry.check_name(impl)
    lay_out(out, _together(b, out), _together(w, out), names, roles=("out", "b", "w"))


def _parsed(
    others: Sequence[Any],
) -> tuple[Numbers, Impl, Sequence[int] | None, Sequence[str] | None]:
    """The arguments after the tensors: numbers, backend, blocks, names (torch omits trailing Nones)."""
    *numbers, seed_high, seed_low, draw, sign, impl = others[:_OTHERS]
    blocks, *lists, names = [*others[_OTHERS:], *[None] * 5][:5]
    named = dict(zip(WRITE_ARGUMENTS, numbers, strict=False))
    named |= {name: given for name, given in zip(PER_TENSOR, lists, strict=True) if given is not None}
    return (*named.values(), seed_high * 2**32 + seed_low, draw, sign), impl, blocks, names
