"""The write as an operator of torch, ``rft_fast::write_``: what compiled and fake code sees of the kernels.

torch.compile, torch.export, make_fx and fake tensors cannot look into the backends. For them ``write_`` and
``Plan.write`` call this operator, which says what it reads, what it changes and what it refuses. Every
other call goes straight to its backend: an operator costs more.

In its schema a source that is None is the output itself, because an operator must not be handed one tensor
both to change and to read; and the seed is two words of 32 bits, because integers there are signed. On meta
tensors it checks its arguments and does nothing else, as torch's own operators do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from rft_fast.kernels import registry
from rft_fast.kernels.contract import WRITE_ARGUMENTS, Write, lay_out, make_rows
from rft_fast.names import Impl

# What holds its own data; a subclass of Tensor may be anything.
PLAIN = (Tensor, nn.Parameter)

# The arguments of a Write, in their order.
Numbers = tuple[Any, ...]

# A Write's numbers, the seed as two words; the backend; and where each tensor's noise starts.
_SCHEMA = (
    "(Tensor(a0!)[] out, Tensor?[] zeroshot, Tensor?[] finetuned, "
    "float alpha, float rho, str on, float keep, str fill, str noise, bool adaptive, "
    "SymInt seed_high, SymInt seed_low, SymInt draw, SymInt sign, str impl, SymInt[]? blocks=None) -> ()"
)
_OTHERS = len(WRITE_ARGUMENTS) + 2  # its arguments between the tensors and ``blocks``

# Numbers that get their values later.
SYMBOLS = (torch.SymInt, torch.SymFloat)


def is_tracing() -> bool:
    """Whether torch records what is called, and so must see a write."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def is_traced(tensors: Sequence[Tensor]) -> bool:
    """As ``is_tracing``, or whether the tensors may be fake."""
    if is_tracing():
        return True
    for tensor in tensors:  # as any() would, in half the time
        if type(tensor) not in PLAIN:
            return True
    return False


def write_(
    out: Sequence[Tensor],
    zeroshot: Sequence[Tensor],
    finetuned: Sequence[Tensor],
    numbers: Numbers,
    impl: Impl,
    blocks: Sequence[int] | None = None,
) -> None:
    """The write by way of the operator. blocks: as for ``contract.make_rows``."""
    if not torch.compiler.is_dynamo_compiling():  # which cannot look into Write; there _refuse checks
        numbers = _checked(numbers)
    *others, seed, draw, sign = numbers
    with torch.no_grad():
        _write(
            out, _apart(zeroshot, out), _apart(finetuned, out),
            *others, seed // 2**32, seed % 2**32, draw, sign, impl, blocks,
        )  # fmt: skip


def _checked(numbers: Numbers) -> Numbers:
    """The numbers as a ``Write`` has them, which refuses what no write may have; symbols as they are."""
    named = dict(zip(WRITE_ARGUMENTS, numbers, strict=True))
    known = {name: number for name, number in named.items() if not isinstance(number, SYMBOLS)}
    request = Write(**{"alpha": 0.0, **known})
    return tuple(getattr(request, name) if name in known else named[name] for name in named)


def _apart(sources: Sequence[Tensor], out: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """None for sources that are the output. (Lists of other lengths are left to be refused.)"""
    if len(sources) != len(out):
        return sources
    return [None if source is own else source for source, own in zip(sources, out, strict=True)]


def _together(sources: Sequence[Tensor | None], out: Sequence[Tensor]) -> list[Tensor]:
    """The reverse of ``_apart``."""
    if len(sources) != len(out):
        return [source for source in sources if source is not None]
    return [own if source is None else source for source, own in zip(sources, out, strict=True)]


# A call makes a table, which a CUDA graph cannot capture: the compiler keeps it outside.
@torch.library.custom_op(
    "rft_fast::write_", mutates_args=("out",), schema=_SCHEMA, tags=(torch.Tag.cudagraph_unsafe,)
)
def _write(
    out: Sequence[Tensor], zeroshot: Sequence[Tensor | None], finetuned: Sequence[Tensor | None], *others: Any
) -> None:
    numbers, impl, blocks = _parsed(others)
    request = Write(*numbers)
    rows = make_rows(out, _together(zeroshot, out), _together(finetuned, out), blocks=blocks)
    if rows:
        registry.pick(impl, rows[0].out.device).write(rows, request)


@_write.register_fake
def _refuse(
    out: Sequence[Tensor], zeroshot: Sequence[Tensor | None], finetuned: Sequence[Tensor | None], *others: Any
) -> None:
    """What ``_write`` would refuse, as far as it can be known."""
    numbers, impl, blocks = _parsed(others)
    _checked(numbers)
    registry.check_name(impl)
    lay_out(out, _together(zeroshot, out), _together(finetuned, out), blocks=blocks)


def _parsed(others: Sequence[Any]) -> tuple[Numbers, Impl, Sequence[int] | None]:
    """What the operator is given beside tensors: torch leaves ``blocks`` out where it is None."""
    *numbers, seed_high, seed_low, draw, sign, impl = others[:_OTHERS]
    blocks = others[_OTHERS] if len(others) > _OTHERS else None
    return (*numbers, seed_high * 2**32 + seed_low, draw, sign), impl, blocks
