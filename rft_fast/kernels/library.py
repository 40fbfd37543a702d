"""The write as an operator of torch, ``rft_fast::write_``, for code that traces or fakes tensors.

torch.compile, torch.export, make_fx and fake tensors cannot look into the backends. For them ``write_`` and
``Plan.write`` call this operator, whose schema declares what it reads, changes and refuses. All other calls
go straight to a backend, because an operator costs more.

A source that is None is the output itself: an operator must not receive one tensor both to change and to
read. The seed is two 32-bit words, because integers of a schema are signed. On meta tensors the operator
only checks its arguments, as torch's own operators do.
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

# Types that hold their own data; another subclass of Tensor may be anything.
PLAIN = (Tensor, nn.Parameter)

# The arguments of a Write, in order.
Numbers = tuple[Any, ...]

# The tensors; the numbers of a Write, the seed as two words; the backend; where each tensor's noise starts.
_SCHEMA = (
    "(Tensor(a0!)[] out, Tensor?[] zeroshot, Tensor?[] finetuned, "
    "float alpha, float rho, str on, float keep, str fill, str noise, bool adaptive, "
    "SymInt seed_high, SymInt seed_low, SymInt draw, SymInt sign, str impl, SymInt[]? blocks=None) -> ()"
)
_OTHERS = len(WRITE_ARGUMENTS) + 2  # arguments between the tensors and ``blocks``

# Numbers whose values are not known while tracing.
SYMBOLS = (torch.SymInt, torch.SymFloat)


def is_tracing() -> bool:
    """Whether torch records calls, and therefore must see a write."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def is_traced(tensors: Sequence[Tensor]) -> bool:
    """Whether torch records calls, or the tensors may be fake."""
    if is_tracing():
        return True
    for tensor in tensors:  # half the time of any()
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
    """Write through the operator. ``blocks``: as for ``contract.make_rows``."""
    if not torch.compiler.is_dynamo_compiling():  # cannot trace Write; _refuse checks there
        numbers = _checked(numbers)
    *others, seed, draw, sign = numbers
    with torch.no_grad():
        _write(
            out, _apart(zeroshot, out), _apart(finetuned, out),
            *others, seed // 2**32, seed % 2**32, draw, sign, impl, blocks,
        )  # fmt: skip


def _checked(numbers: Numbers) -> Numbers:
    """Return the numbers as a ``Write`` has them, validated; symbols as they are."""
    named = dict(zip(WRITE_ARGUMENTS, numbers, strict=True))
    known = {name: number for name, number in named.items() if not isinstance(number, SYMBOLS)}
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
    numbers, impl, blocks = _parsed(others)
    request = Write(*numbers)
    rows = make_rows(out, _together(zeroshot, out), _together(finetuned, out), blocks=blocks)
    if rows:
        registry.pick(impl, rows[0].out.device).write(rows, request)


@_write.register_fake
def _refuse(
    out: Sequence[Tensor], zeroshot: Sequence[Tensor | None], finetuned: Sequence[Tensor | None], *others: Any
) -> None:
    """Refuse what ``_write`` would refuse, as far as it is known while tracing."""
    numbers, impl, blocks = _parsed(others)
    _checked(numbers)
    registry.check_name(impl)
    lay_out(out, _together(zeroshot, out), _together(finetuned, out), blocks=blocks)


def _parsed(others: Sequence[Any]) -> tuple[Numbers, Impl, Sequence[int] | None]:
    """The operator's arguments after the tensors: numbers, backend, blocks (which torch omits if None)."""
    *numbers, seed_high, seed_low, draw, sign, impl = others[:_OTHERS]
    blocks = others[_OTHERS] if len(others) > _OTHERS else None
    return (*numbers, seed_high * 2**32 + seed_low, draw, sign), impl, blocks
