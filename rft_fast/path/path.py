"""``Path``: a live model on the straight line between its zero-shot and fine-tuned weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import NoReturn

from torch import Tensor, nn

from rft_fast.common.words import some
from rft_fast.kernels import Write
from rft_fast.names import Fill, Impl, Names, Noise, On
from rft_fast.path.checksum import checksum
from rft_fast.path.coefficients import Alpha
from rft_fast.path.fit import fit, refuse_negative, state
from rft_fast.path.layers import select
from rft_fast.path.requests import Requests, grouped, layers_in, requests_of
from rft_fast.path.slots import Part, Slot, Weight, distance, join, layers_of, slots_of
from rft_fast.path.writer import InPlace, Writer


class Path:
    """A live model at ``theta(alpha) = (1 - alpha) * theta_0 + alpha * theta_1``, written in place.

    The paper's formulas write the mirrored ``alpha * theta_0 + (1 - alpha) * theta_1``. Its figures and the
    WiSE-FT code agree with this class: alpha = 0 is zero-shot, alpha = 1 is fine-tuned.

    Args:
        model: The live module. Its weights are overwritten, first with alpha = 0. Their storage never moves,
            so CUDA graphs, compiled models and optimizers that refer to them stay valid.
        zeroshot: State dict of the zero-shot end, or a module that has it. Names and shapes are those of the
            model's own state dict; float tensors are float32, bfloat16 or float16. An end on another device
            is copied to that of the live model. An end on the same device is used as it is: do not change it.
        finetuned: State dict of the fine-tuned end, or a module that has it, as for ``zeroshot``.
        granularity: How parameters form layers, see :mod:`rft_fast.path.layers`.
        impl: The kernel backend, see :class:`rft_fast.Plan`.
        inert: Layers to leave out of ``layers``: names, or ``re:`` patterns of whole names.

    A write treats each kind of tensor as follows:

    - Float parameters are interpolated, and perturbed or pruned as requested. A parameter tied to several
      names is one tensor, written once, with the layer of its first name.
    - Float buffers are interpolated, never perturbed or pruned. They are written with the layer of their
      module's first parameter, so BatchNorm statistics follow their layer.
    - Integer and bool tensors are copied from the nearer end (zero-shot for alpha < 0.5), since a number
      between two counts or two indices has no meaning.
    - Non-persistent buffers, which state dicts do not contain, are not written.

    Noise depends on the seed, the draw and a weight's position among the model's float parameters, not on
    which layers are written together. Memory holds the two ends and the live model, and no further copy. A
    Path must not be used by several threads at once, since they would share one model.

    Attributes:
        model: The live module.
        impl: Name of the backend in use.
        layers: Layer names, in the order of the parameters.
        inert: Layers and buffers that are not in ``layers`` -> the reason. Writes of the whole model include
            them.
        slots: The tensors that a write of the whole model writes, with their ends.
        writer: Carries out the writes, see :class:`rft_fast.path.writer.Writer`.

    Raises:
        TypeError: An argument has the wrong type; or a Path is copied or pickled.
        ValueError: The ends do not fit the model. One message lists all problems: missing or unexpected
            names, shapes, dtypes, NaN or infinite weights, values beyond the live dtype, tied names that
            differ, memory shared between the live model and an end, tensors that are not contiguous or have
            no data, unmerged adapters (LoRA) and parametrised weights.
        RuntimeError: The backend does not work here.

    Warns:
        UserWarning: The two ends are the same weights.
    """

    layers: list[str]
    inert: dict[str, str]
    slots: tuple[Slot, ...]
    writer: Writer

    def __init__(
        self,
        model: nn.Module,
        zeroshot: Mapping[str, Tensor] | nn.Module,
        finetuned: Mapping[str, Tensor] | nn.Module,
        granularity: str = "module",
        impl: Impl = "auto",
        inert: Names = (),
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Path: model must be an nn.Module, got {type(model).__name__}")
        named = {"zeroshot": zeroshot, "finetuned": finetuned}
        ends = {label: state(end, label) for label, end in named.items()}
        slots = slots_of(model)
        layers, self.inert = layers_of(slots, granularity)
        unwanted = select([*layers, *self.inert], inert, operation="Path: inert")
        fit(slots, ends)
        for name, members in layers.items():
            if all(slot.largest == (0, 0) for slot in members if slot.is_float):
                self.inert[name] = "it is zero at both ends, and so is its adaptive noise"
        self.inert.update(dict.fromkeys(unwanted, "left out by inert="))

        self.model = model
        writer = InPlace(slots, impl)
        self.writer, self.impl = writer, writer.impl
        self.slots = tuple(slots)
        self._whole = Part(slots)
        self._parts = {
            name: Part(members, name) for name, members in layers.items() if name not in self.inert
        }
        self.layers = list(self._parts)
        self._rest = len(slots) > sum(len(part.slots) for part in self._parts.values())

        # The state of the live weights: the last write of the whole model, and the layers that have been
        # written differently since. None: a write began and did not end.
        self._base: Write | None = None
        self._apart: dict[str, Write | None] = {}
        self.write(0.0)
        if all(slot.is_unchanged() for slot in slots):
            warnings.warn(
                "Path: both ends have the same weights, so nothing changes along the path; is the "
                "fine-tuned end the right file?",
                stacklevel=2,
            )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "Path: it writes to the memory of one live model, so it cannot be copied or pickled; copy the "
            "model (copy.deepcopy(path.model)), then make a Path of the copy and the two ends"
        )

    @property
    def alpha(self) -> float | None:
        """Position of the live model; None if its layers, inert ones included, differ in alpha."""
        writes = list(self._apart.values())
        if self._rest or len(self._apart) < len(
            self._parts
        ):  # some tensors are as the last write of the whole model left them
            writes.append(self._base)
        alphas = {None if write is None else write.alpha for write in writes}
        return alphas.pop() if len(alphas) == 1 else None

    @cached_property
    def unchanged(self) -> tuple[str, ...]:
        """The layers whose tensors, buffers included, have the same values at both ends.

        Interpolation does not change them; noise and pruning do.
        """
        return tuple(
            name for name, part in self._parts.items() if all(slot.is_unchanged() for slot in part.slots)
        )

    @cached_property
    def distance(self) -> float:
        """Euclidean distance of the two ends, over the float parameters of :attr:`layers`."""
        return distance(slot for part in self._parts.values() for slot in part.slots)

    def warn(self, text: str) -> None:
        """Issue a UserWarning about this path, for the caller of a study, each text once."""
        self.writer.warn(text)

    def written_by(self, writer: Writer) -> Path:
        """Return this path in its present state with another writer, whose writes this one does not know."""
        other = object.__new__(Path)
        vars(other).update(vars(self))
        other.writer, other._apart = writer, dict(self._apart)
        return other

    def write(
        self,
        alpha: Alpha,
        rho: float = 0.0,
        layers: Names | None = None,
        seed: int = 0,
        draw: int = 0,
        on: On = "finetuned",
        keep: float = 1.0,
        fill: Fill = "zero",
        noise: Noise = "normal",
        adaptive: bool = True,
        sign: int = 1,
        *,
        buffers: bool = True,
    ) -> None:
        """Write the live weights from the two ends.

        Args:
            alpha: Position on the path, any finite number: 0 is zero-shot, 1 is fine-tuned. Or a table, name
                or ``re:`` pattern of layers -> position, with None -> that of all others; each layer to write
                needs one, and one only. What is in no layer (:attr:`inert`) takes that of None, and keeps its
                values without it. Still one launch, and equal numbers give the bits of the single number.
            rho: Noise scale, at least 0; relative to each weight if ``adaptive``.
            layers: Layers to write, as names or ``re:`` patterns; the other layers keep their values. None:
                the whole model. An empty list writes nothing.
            seed: Key of the random generator, in [0, 2**64).
            draw: Number of the noise draw, in [0, 2**32).
            on: Weights that the noise is added to: "finetuned" (Sec. 3.1) or "interpolated" (Eq. 3).
            keep: Probability, in [0, 1], that a fine-tuned weight survives the mask of Algorithm 1.
            fill: Value of a masked fine-tuned weight: "zero" or "zeroshot".
            noise: Distribution of the noise: "normal", "uniform" on (-1, 1) or "rademacher".
            adaptive: Scale the noise by the magnitude of each weight; False: by rho alone.
            sign: 1, or -1 for the opposite noise (antithetic pairs).
            buffers: False leaves all buffers unchanged, for an alpha beyond the ends that is meant for
                weights only. Until these layers are written again with buffers, ``alpha`` is None, and
                :meth:`at` and :meth:`perturbed` have no state to restore.

        Raises:
            TypeError: A number has the wrong type, or ``layers`` is not a list of names. Nothing is written.
            ValueError: A number is out of range; a layer is unknown (the message names the nearest) or inert
                (it names the reason), or has no position in a table, or several; a variance (``running_var``)
                would be negative at this alpha outside [0, 1]. Nothing is written. Also: the result exceeds
                the range of a live dtype; the weights are restored.
            RuntimeError: A tensor of the live model or of an end has moved, or has another layout, since this
                Path was made.
        """
        numbers = (rho, on, keep, fill, noise, adaptive, seed, draw, sign)
        self._write(requests_of(alpha, layers, self.select, *numbers), buffers)

    @contextmanager
    def perturbed(
        self,
        alpha: Alpha,
        rho: float,
        layers: Names | None = None,
        seed: int = 0,
        draw: int = 0,
        on: On = "finetuned",
        keep: float = 1.0,
        fill: Fill = "zero",
        noise: Noise = "normal",
        adaptive: bool = True,
        sign: int = 1,
    ) -> Iterator[Path]:
        """Context manager: :meth:`write` with the same arguments; the exit restores the weights, bit for bit.

        Restores after exceptions and after further writes inside; contexts nest to any depth. Nothing is
        stored or subtracted: ``layers`` and all layers that were written inside are written again from the
        two ends. So changes of ``layers`` that are not writes are undone, too (BatchNorm statistics in
        training, for example), but such changes of other layers are not: pass ``layers=None`` where they may
        occur.

        Args:
            alpha, rho, layers, seed, draw, on, keep, fill, noise, adaptive, sign: As for :meth:`write`.

        Yields:
            This path.

        Raises:
            TypeError, ValueError: As :meth:`write` does.
            RuntimeError: As :meth:`write` does; or there is no state to restore, because weights are borrowed
                or a write was interrupted.
        """
        numbers = (rho, on, keep, fill, noise, adaptive, seed, draw, sign)
        requests = requests_of(alpha, layers, self.select, *numbers)
        with self._restored(layers_in(requests)):
            self._write(requests)
            yield self

    def at(self, alpha: Alpha, layers: Names | None = None) -> AbstractContextManager[Path]:
        """Context manager: the model, or only ``layers``, at alpha; restored on exit.

        Same as :meth:`perturbed` with rho = 0.

        Args:
            alpha, layers: As for :meth:`write`.
        """
        return self.perturbed(alpha, 0.0, layers)

    @contextmanager
    def borrowed(self, layers: Names | None = None) -> Iterator[list[Weight]]:
        """Context manager: float parameters whose live tensors may be changed in place, in any way.

        For changes that :meth:`write` cannot express. On exit the live model is restored, bit for bit. Until
        then ``alpha`` is None, and :meth:`at` and :meth:`perturbed` have no state to restore.

        Args:
            layers: Layers to change; None: all.

        Yields:
            The weights, as :meth:`weights` returns them.

        Raises:
            TypeError, ValueError, RuntimeError: As :meth:`perturbed` does.
        """
        names = None if layers is None else self.select(layers)
        with self._restored(names):
            self._forget(names)
            yield self.writer.borrowed(self._floats(layers))

    def weights(self, layers: Names | None = None) -> list[Weight]:
        """Return the float parameters of ``layers`` in the model's order; None: all, inert ones included.

        That is the order of their noise: ``noise_like([w.live for w in path.weights()], ...)`` is the noise
        of a write with the same seed and draw. Raises as :meth:`write` does.
        """
        return self.writer.weights(self._floats(layers))

    def _floats(self, layers: Names | None) -> list[Slot]:
        """Return the float parameters of ``layers`` in the model's order."""
        rows = self._whole if layers is None else join(self._select(layers))
        return sorted((s for s in rows.slots if s.is_float and s.is_parameter), key=lambda s: s.row)

    def select(self, layers: Names | None) -> list[str]:
        """Return the names of ``layers`` (names or ``re:`` patterns; None: all) as :meth:`write` reads them.

        Raises TypeError or ValueError as :meth:`write` does.
        """
        if layers is None:
            return list(self.layers)
        return list(dict.fromkeys(part.name for part in self._select(layers)))

    def tensors(self, layer: str) -> list[Tensor]:
        """Return all live tensors that are written with a layer, including the buffers of its modules."""
        return [slot.tensor for slot in self._select([layer])[0].slots]

    def checksum(self) -> int:
        """Return a 64-bit hash of the names, dtypes, shapes and bits of all live parameters and buffers.

        It is the same on every device. Any change of one value changes it, and so do swapped and moved
        values. Takes less than 1 MB of temporary memory.
        """
        return checksum(self.model)

    def _select(self, layers: Sequence[str]) -> list[Part]:
        if isinstance(layers, str) or not isinstance(layers, Iterable):
            raise TypeError(f"Path.write: layers must be a list of names, got {layers!r}")
        layers = list(layers)
        try:
            return [self._parts[name] for name in layers]
        except (KeyError, TypeError):  # a pattern or an error
            for name, reason in self.inert.items():
                if name in layers:
                    raise ValueError(f"Path.write: {name!r} is left out of path.layers: {reason}") from None
        return [self._parts[name] for name in select(self.layers, layers, operation="Path.write")]

    def _write(self, requests: Requests, buffers: bool = True) -> None:
        layers = layers_in(requests)
        self.writer.check(self._among(layers))
        groups = grouped(self._whole, self._parts, requests)
        for request, rows in groups:
            if buffers and not 0 <= request.alpha <= 1:
                refuse_negative(rows.variances, request.alpha)
        before = self._base, dict(self._apart)
        # An interrupted write must not count as complete, so the state is unknown during the write.
        self._forget(layers)

        if lost := self.writer.write(groups, buffers) if groups else []:
            base, apart = before
            if base is not None and None not in apart.values():
                self._restore(base, apart)
            alphas = ", ".join(f"{alpha:g}" for alpha in sorted({request.alpha for request, _ in groups}))
            raise ValueError(
                f"Path.write: alpha = {alphas} and rho = {groups[0][0].rho:g} move "
                f"{some(lost, 4)} beyond the range of their dtypes; choose smaller ones, or a wider "
                "dtype"
            )
        if not buffers:
            return  # these layers are at no single alpha now

        self._base = requests.get(None, self._base)
        self._apart |= {name: request for name, request in requests.items() if name is not None}
        self._apart = {name: write for name, write in self._apart.items() if write != self._base}

    def _among(self, layers: Sequence[str] | None) -> list[Part]:
        return [self._whole] if layers is None else [self._parts[name] for name in layers]

    def _forget(self, layers: Sequence[str] | None) -> None:
        """Mark the weights of ``layers`` (None: all) as not known to come from a write."""
        if layers is None:
            self._base, self._apart = None, {}
        else:
            self._apart.update(dict.fromkeys(layers))

    @contextmanager
    def _restored(self, layers: Sequence[str] | None) -> Iterator[None]:
        """On exit, restore ``layers`` (None: all) and whatever was written inside."""
        self.writer.check(self._among(layers))
        base, apart = self._base, dict(self._apart)
        if base is None or None in apart.values():
            raise RuntimeError(
                "Path: an earlier write was interrupted, or weights are borrowed, so the state to "
                "restore is unknown; write the whole model first"
            )
        try:
            yield
        finally:
            self._forget(layers)  # they may have been changed since their last write
            self._restore(base, apart)

    def _restore(self, base: Write, apart: Mapping[str, Write | None]) -> None:
        whole = self._base != base
        back: dict[str | None, Write] = {None: base} if whole else {}
        for name in {**self._apart, **apart}:
            was, now = apart.get(name, base), base if whole else self._apart.get(name, base)
            if was is not None and was != now:
                back[name] = was
        if back:
            self._write(back)
