"""The tensors of a live model, and the layers that they form."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from rft_fast.common.words import some
from rft_fast.kernels import Write
from rft_fast.path.layers import group, layer_of

# Noise reaches sqrt(-2 ln(2**-33)) = 6.8 at most.
_LARGEST_NOISE = 6.8
# Buffers that are variances or standard deviations, by the last part of their names.
_VARIANCE = re.compile(r"(?:^|[._])(?:var|variance|std|stddev|sigma)$")
_PIECE = 1 << 20
_SUMMED = 1 << 15  # torch adds so few numbers in one thread, so their sum is always the same


@dataclass(frozen=True, eq=False)
class Weight:
    """One float parameter on the path.

    Attributes:
        name: Its first name in the model.
        live: The live tensor.
        zeroshot: Its zero-shot end, of the same shape. The path reads it: do not change it.
        finetuned: Its fine-tuned end, likewise.
    """

    name: str
    live: Tensor
    zeroshot: Tensor
    finetuned: Tensor


@dataclass(eq=False)
class Slot:
    """One tensor of the live model, with all of its names.

    Attributes:
        tensor: The live tensor.
        is_parameter: Whether it is a parameter; else it is a buffer.
        names: Its names in the model; several if it is tied.
        homes: For the tensor under each name, and for the modules above it: the dictionary that holds it, its
            key, and the expected value.
        ends: The zero-shot and the fine-tuned tensor, once :func:`rft_fast.path.fit.fit` has checked them.
        largest: The largest magnitude at each end; of floats.
        shares: These two, and 1, as fractions of the largest number of the live dtype.
        row: Its row in its Plan.
    """

    tensor: Tensor
    is_parameter: bool
    names: list[str] = field(default_factory=list)
    homes: list[tuple[dict[str, Any], str, object]] = field(default_factory=list)
    ends: tuple[Tensor, ...] = ()  # zero-shot, fine-tuned
    largest: tuple[float, ...] = ()
    shares: tuple[float, float, float] = (0.0, 0.0, 0.0)
    row: int = -1

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def is_float(self) -> bool:
        return self.tensor.is_floating_point() or self.tensor.is_complex()

    def is_unchanged(self) -> bool:
        """Whether both ends have the same values; ends of two dtypes are compared in float32."""
        zeroshot, finetuned = self.ends
        if zeroshot.dtype == finetuned.dtype:
            return zeroshot.data_ptr() == finetuned.data_ptr() or torch.equal(zeroshot, finetuned)
        parts = (torch.split(end.reshape(-1), _PIECE) for end in self.ends)
        return all(torch.equal(a.float(), b.float()) for a, b in zip(*parts, strict=True))


def distance(slots: Iterable[Slot]) -> float:
    """Return the Euclidean distance of the ends over the float parameters, summed in float64."""
    ends = [slot.ends for slot in slots if slot.is_float and slot.is_parameter]
    parts = (
        (torch.split(end.reshape(-1), _SUMMED) for end in pair)
        for pair in ends
        if pair[0].data_ptr() != pair[1].data_ptr()
    )
    squares = (
        float((b.double() - a.double()).square().sum()) for pair in parts for a, b in zip(*pair, strict=True)
    )
    return math.sqrt(math.fsum(squares))


# Properties of live tensors that are compared before every write; with map, .1 us each.
_LIVE: tuple[Callable[[Tensor], object], ...] = (
    Tensor.data_ptr, Tensor.is_contiguous, attrgetter("nbytes"), attrgetter("dtype"),
)  # fmt: skip


class Rows:
    """Tensors that one write writes: rows of the two plans, and integers."""

    def __init__(self, slots: Iterable[Slot]) -> None:
        self.slots = list(slots)
        floats = [slot for slot in self.slots if slot.is_float]
        self.parameters = _runs(slot.row for slot in floats if slot.is_parameter)
        self.buffers = _runs(slot.row for slot in floats if not slot.is_parameter)
        self.integers = [slot for slot in self.slots if not slot.is_float]
        self.variances = [slot for slot in floats if not slot.is_parameter and _VARIANCE.search(slot.name)]

    @cached_property
    def sizes(self) -> tuple[int, int]:
        """The number of elements in parameters, and in buffers."""
        of = {True: 0, False: 0}
        for slot in self.slots:
            of[slot.is_parameter] += slot.tensor.numel()
        return of[True], of[False]

    @cached_property
    def _shares(self) -> tuple[float, ...]:
        """The maximum of ``Slot.shares`` over these tensors."""
        found = [(0.0, 0.0, 0.0), *(slot.shares for slot in self.slots if slot.is_float)]
        return tuple(map(max, zip(*found, strict=True)))

    def may_overflow(self, request: Write) -> bool:
        """Whether a write could exceed the range of a live dtype, by the largest magnitudes; rarely true."""
        zeroshot, finetuned, one = self._shares
        noise = request.rho * _LARGEST_NOISE
        reached = abs(1 - request.alpha) * zeroshot + abs(request.alpha) * finetuned
        reached += noise * (reached if request.adaptive else one * max(1.0, abs(request.alpha)))
        return max(reached, zeroshot + finetuned) > 0.99

    def not_finite(self) -> list[str]:
        """Return the names and dtypes of the live tensors that contain NaN or infinity."""
        lost = [s for s in self.slots if s.is_float and not bool(s.tensor.isfinite().all())]
        return [f"{slot.name} ({dtype_name(slot.tensor)})" for slot in lost]


class Part(Rows):
    """A layer or the whole model, and the memory that it must still occupy at each write."""

    def __init__(self, slots: Iterable[Slot], name: str = "") -> None:
        super().__init__(slots)
        self.name = name
        homes = {(id(home[0]), home[1]): home for slot in self.slots for home in slot.homes}
        self._homes = list(homes.values())
        self._live = [slot.tensor for slot in self.slots]
        self._ends = [[slot.ends[end].untyped_storage() for slot in self.slots] for end in (0, 1)]
        self._found = self._look()

    def _look(self) -> list[list[object]]:
        """Address and layout of the live tensors and their ends: one list for each property."""
        live = [list(map(question, self._live)) for question in _LIVE]
        return live + [list(map(torch.UntypedStorage.data_ptr, end)) for end in self._ends]

    def check(self) -> None:
        """Raise RuntimeError unless the live model still holds these tensors, at the same places."""
        for home, key, held in self._homes:
            if home.get(key) is not held:
                break
        else:
            if self._look() == self._found:
                return
        now, before = (zip(*answers, strict=True) for answers in (self._look(), self._found))
        moved = [
            slot.name
            for slot, answers, expected in zip(self.slots, now, before, strict=True)
            if answers != expected or any(home.get(key) is not held for home, key, held in slot.homes)
        ]
        raise RuntimeError(
            f"Path.write: {some(moved, 4)} of the live model, or of its ends, have moved or "
            "changed their layout since this Path was made (by model.to(), "
            "load_state_dict(assign=True), replacing a module, another .data, or FSDP freeing "
            "storages); move and change the models first, then make a Path"
        )


def join(parts: Sequence[Part]) -> Rows:
    """Return the tensors of several parts as one write."""
    return parts[0] if len(parts) == 1 else Rows({s: None for part in parts for s in part.slots})


def _runs(rows: Iterable[int]) -> list[tuple[int, int]]:
    """Group rows into half-open (first, last) runs."""
    runs: list[tuple[int, int]] = []
    for row in sorted(rows):
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return runs


def slots_of(model: nn.Module) -> list[Slot]:
    """Return the persistent tensors of a model: parameters in ``named_parameters`` order, then buffers."""
    parameters: dict[int, Slot] = {}
    buffers: dict[int, Slot] = {}
    above: dict[str, list[tuple[dict[str, Any], str, object]]] = {"": []}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for key, child in module._modules.items():
            above[prefix + key] = [*above[path], (module._modules, key, child)]
        for slots, held, skip in (
            (parameters, module._parameters, ()),
            (buffers, module._buffers, module._non_persistent_buffers_set),
        ):
            for key, tensor in held.items():
                if tensor is None or key in skip:
                    continue
                slot = slots.setdefault(id(tensor), Slot(tensor, slots is parameters))
                slot.names.append(prefix + key)
                slot.homes += [*above[path], (held, key, tensor)]
    return [*parameters.values(), *buffers.values()]


def layers_of(slots: Sequence[Slot], granularity: str) -> tuple[dict[str, list[Slot]], dict[str, str]]:
    """Group tensors into layers.

    Args:
        slots: All tensors of the model.
        granularity: How parameters form layers, see :mod:`rft_fast.path.layers`.

    Returns:
        Layer -> its tensors, buffers last; and name -> reason, for whatever belongs to no layer.

    Raises:
        ValueError: The model has no float parameters, or the granularity is invalid.
    """
    parameters = [slot for slot in slots if slot.is_parameter]
    if not any(slot.is_float for slot in parameters):
        raise ValueError("Path: the live model has no float parameters: there is nothing to write")
    layers: dict[str, list[Slot]] = {}
    inert: dict[str, str] = {}
    layer_at = {}  # index of a parameter -> its layer
    for layer, indices in group([slot.name for slot in parameters], granularity).items():
        layer_at.update(dict.fromkeys(indices, layer))
        members = [parameters[index] for index in indices]
        if any(slot.is_float for slot in members):
            layers[layer] = members
        else:
            inert[layer] = "it holds integers only; whole-model writes copy them"
    of_module: dict[str, str] = {}  # module -> layer of its first parameter
    for index, slot in enumerate(parameters):
        for name in slot.names:
            of_module.setdefault(name.rpartition(".")[0], layer_at[index])
    for slot in parameters:
        for name in slot.names[1:]:
            layer = layer_of(name, granularity)
            if layer not in layers:
                inert.setdefault(layer, f"it is {slot.name} by another name, written there")
    for slot in slots:
        if not slot.is_parameter:
            layer = of_module.get(slot.name.rpartition(".")[0], layer_of(slot.name, granularity))
            if layer in layers:
                layers[layer].append(slot)
            else:
                inert[slot.name] = "its module has no parameters; whole-model writes reach it"
    return layers, inert


def dtype_name(tensor: Tensor) -> str:
    """Return the dtype of a tensor without ``torch.``."""
    return str(tensor.dtype).removeprefix("torch.")
