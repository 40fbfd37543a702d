"""The kernel contract: what one write means, and which requests are refused.

Every backend computes, for each element, in float32 whatever the storage types::

    w1  = finetuned if kept else fill              kept: mask word < round(keep * 2**32)
    on = finetuned:     w1 += (sign * rho) * (|w1| or 1) * eps ;  out = lerp(w0, w1, alpha)
    on = interpolated:  v = lerp(w0, w1, alpha) ;  out = v + (sign * rho) * (|v| or 1) * eps

and nothing else; ``add_`` is the same formula with ``eps`` read from memory, at alpha = 1::

    out = w + (w*w or |w| or 1) * scale * b

``Write`` and ``Add`` hold the numbers of one such request, ``rows.Row`` the three tensors of one table entry.
All are validated when they are made, so that backends check nothing. A request may also be a list, one for
each row of the table: they then differ in alpha, rho and keep, or in scale, only.

The ends of lerp are exact: alpha = 0 gives the bits of zeroshot, alpha = 1 those of finetuned. A NaN in half
precision stays a NaN; its other bits may change on the way through float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float
from dataclasses import dataclass, field, fields
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from rft_fast.names import FILL, NOISE, ON, WEIGHT, Fill, Noise, On, Weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The last word of the Philox counter: noise, mask and signs of images never share a random bit.
PURPOSE_NOISE = 0
PURPOSE_MASK = 1
PURPOSE_SIGN = 2

# Consecutive elements served by one Philox block of four words.
BLOCK = 4

# A seed has 64 bits, a draw number 32. Blocks are counted by signed 64-bit integers.
SEEDS, DRAWS, BLOCKS = 2**64, 2**32, 2**63

FLOAT32_MAX = float(np.finfo(np.float32).max)


def _choice(name: str, value: object, offered: Sequence[str]) -> None:
    if value not in offered:
        raise ValueError(f"write: {name} must be one of {', '.join(offered)}; got {value!r}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def whole(name: str, value: object, limit: int) -> int:
    """Return an integer in [0, limit); raises TypeError or ValueError for anything else."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, (int, np.integer))):
        raise TypeError(
            f"write: {name} must be an integer; got {_short(value)} of type {type(value).__name__}"
        )
    if not 0 <= value < limit:
        raise ValueError(f"write: {name} must lie in [0, 2**{limit.bit_length() - 1}); got {value}")
    return int(value)


def _float32(number: float) -> float:
    """Same as ``float(np.float32(number))`` in a quarter of the time; every write needs two of these."""
    return c_float(number).value


def _finite(name: str, value: object) -> float:
    try:
        if isinstance(value, (str, bytes, bytearray)):  # float() would read "0.5"
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(
            f"write: {name} must be a number; got {_short(value)} of type {type(value).__name__}"
        ) from None
    except OverflowError:  # an integer or a fraction, perhaps with too many digits to show
        raise ValueError(f"write: {name} must be finite in float32; got a number beyond float64") from None
    # Beyond float32 the kernels would compute with infinity.
    if not abs(number) <= FLOAT32_MAX:
        raise ValueError(f"write: {name} must be finite in float32; got {number}")
    return number


@dataclass(frozen=True)
class Write:
    """The numbers of one write, validated. All functions that write take these.

    Args:
        alpha: Position on the path: 0 is zero-shot, 1 is fine-tuned. Any finite number; outside [0, 1] the
            write extrapolates. (The paper's formulas write the mirrored alpha, its figures this one.)
        rho: Noise scale, finite and >= 0; 0 adds no noise (rho of Eq. 3).
        on: Weights that the noise is added to: "finetuned", before they are interpolated (Sec. 3.1), or
            "interpolated", after it (Eq. 3).
        keep: Probability, in [0, 1], that a fine-tuned weight survives the Bernoulli mask of Algorithm 1; 1
            masks nothing.
        fill: Value of a masked fine-tuned weight: "zero", or "zeroshot" for its zero-shot value.
        noise: Distribution of the noise: "normal" (mean 0, variance 1), "uniform" on (-1, 1), or "rademacher"
            (-1 or 1).
        adaptive: Scale the noise by the magnitude of each weight; False: by rho alone.
        seed: Key of the random generator, an integer in [0, 2**64). Decides the noise and the mask.
        draw: Number of the noise draw, an integer in [0, 2**32). All draws of a seed have the same mask.
        sign: 1, or -1 for the opposite noise (antithetic pairs).

    Raises:
        TypeError: A number has the wrong type; the message names it.
        ValueError: A number is out of range; the message names it.
    """

    alpha: float
    rho: float = 0.0
    on: On = "finetuned"
    keep: float = 1.0
    fill: Fill = "zero"
    noise: Noise = "normal"
    adaptive: bool = True
    seed: int = 0
    draw: int = 0
    sign: int = 1

    # Derived once, so that all backends start from the same float32 values.

    scale: float = field(init=False, repr=False)
    """sign * rho, rounded to float32."""

    threshold: int = field(init=False, repr=False)
    """A weight is kept when its mask word is below this (2**32: always)."""

    base: int = field(init=False, repr=False)
    k: float = field(init=False, repr=False)
    """``lerp(w0, w1) = (w1 if base else w0) + (w1 - w0) * k``, k rounded to float32.

    The nearer end is the base, as in torch.lerp, which makes both ends exact: base 0 with k = alpha below
    1/2, else base 1 with k = alpha - 1. k = 0 copies the bits of the base.
    """

    noisy: bool = field(init=False, repr=False)
    """Whether noise reaches the output; at alpha = 0, noise on the fine-tuned weights does not."""

    masked: bool = field(init=False, repr=False)
    """Whether any weight can be masked and the mask reaches the output."""

    def __post_init__(self) -> None:
        alpha, rho = _finite("alpha", self.alpha), _finite("rho", self.rho)
        keep = _finite("keep", self.keep)
        if rho < 0:
            raise ValueError(f"write: rho must be >= 0; got {rho} (for the opposite draw pass sign=-1)")
        if not 0 <= keep <= 1:
            raise ValueError(f"write: keep is a probability in [0, 1]; got {keep}")
        _choice("on", self.on, ON)
        _choice("fill", self.fill, FILL)
        _choice("noise", self.noise, NOISE)
        if not isinstance(self.adaptive, (bool, np.bool_)):
            raise TypeError(f"write: adaptive must be True or False; got {self.adaptive!r}")
        if self.sign not in (1, -1):
            raise ValueError(f"write: sign must be +1 or -1; got {self.sign!r}")
        threshold = round(keep * 2**32)
        base = 0 if alpha < 0.5 else 1
        self.__dict__.update(  # faster than object.__setattr__ for each: a layer-wise study makes thousands
            alpha=alpha,
            rho=rho,
            keep=keep,
            adaptive=bool(self.adaptive),
            sign=int(self.sign),
            seed=whole("seed", self.seed, SEEDS),
            draw=whole("draw", self.draw, DRAWS),
            scale=_float32(self.sign * rho),
            threshold=threshold,
            base=base,
            k=_float32(alpha - base),
            noisy=rho > 0 and not (self.on == "finetuned" and alpha == 0),
            masked=threshold < 2**32 and alpha != 0,
        )


# In the order of every function's arguments.
WRITE_ARGUMENTS = tuple(f.name for f in fields(Write) if f.init)


@dataclass(frozen=True)
class Add:
    """The numbers of one ``out = w + scale * factor(w) * b``, validated.

    Args:
        scale: Factor of b, finite; 0 copies w.
        weight: "none": factor(w) = 1; "abs": ``|w|``; "square": ``w * w``.

    Raises:
        TypeError: ``scale`` is not a number.
        ValueError: A value is out of range; the message names it.
    """

    scale: float
    weight: Weight = "none"

    def __post_init__(self) -> None:
        _choice("weight", self.weight, WEIGHT)
        self.__dict__["scale"] = _float32(_finite("scale", self.scale))


# What a table is written with: the same numbers for all rows, or those of each row.
Request: TypeAlias = Write | Add
Requests: TypeAlias = Request | Sequence[Request]

# A number for all tensors, or one for each.
Each: TypeAlias = float | Sequence[float]

# The numbers of a write that may differ from tensor to tensor.
PER_TENSOR = ("alpha", "rho", "keep")

R = TypeVar("R", Write, Add)


def is_list(value: object) -> bool:
    """Whether a number was given for each tensor: a list, a tuple, or an array of one dimension."""
    return isinstance(value, (list, tuple)) or (
        isinstance(value, (np.ndarray, Tensor)) and len(value.shape) == 1
    )


def as_list(value: object) -> list[object]:
    """Return what :func:`is_list` accepts as a list of Python's numbers."""
    return value.tolist() if isinstance(value, (np.ndarray, Tensor)) else list(value)  # type: ignore[call-overload]


def spread(name: str, value: object, count: int) -> list[object]:
    """Return one number, or a list of ``count`` of them, as a list; raises ValueError for other lengths."""
    if not is_list(value):
        return [value] * count
    listed = as_list(value)
    if len(listed) != count:
        raise ValueError(
            f"write: {name} must be one number for all tensors, or a list with one for each of the {count}; "
            f"got {len(listed)} numbers"
        )
    return listed


def requests(make: type[R], numbers: dict[str, object], listed: Sequence[str], count: int) -> R | list[R]:
    """Make the request of ``numbers``, or one for each tensor where one of ``listed`` is a list.

    Args:
        make: ``Write`` or ``Add``.
        numbers: Its arguments.
        listed: Those that may be a list.
        count: Tensors.

    Raises:
        TypeError: A number has the wrong type; the message names it, and its tensor.
        ValueError: A number is out of range, or a list has another length; the message names it.
    """
    listed = [name for name in listed if is_list(numbers[name])]
    if not listed:
        return make(**numbers)  # type: ignore[arg-type]
    # The other numbers first: what is wrong with them is wrong with no tensor.
    none = make(**{**numbers, **dict.fromkeys(listed, 0.0)})  # type: ignore[arg-type]
    columns = [spread(name, numbers[name], count) for name in listed]
    known: dict[tuple[object, ...], R] = {}  # a layer's tensors mostly have equal numbers
    found = []
    for place, values in enumerate(zip(*columns, strict=True)):
        try:
            key = tuple(map(_finite, listed, values))
            if key not in known:
                known[key] = make(**{**numbers, **dict(zip(listed, key, strict=True))})  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} (of tensor {place})") from None
        found.append(known[key])
    if not found:  # lists of no tensors
        return none
    return found[0] if len(known) == 1 else found
