"""The stages of a model with perturbed weights of its own for each image, and the control variate of that.

See :mod:`rft_fast.evaluate.flips` for what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from ..kernels.signs import BITS, blocks_of, check_blocks, signs_of_blocks
from .flipped import SHARED, Conflict, Flipped, NoRule, Shift, Signs, Site
from .flips import Rules
from .replays import Replays
from .stages import TOLERANCE, Stage

# By how many units of the type's last place, relative to the largest, two ways of computing may differ.
_UNITS = 64


@dataclass(frozen=True)
class Perturbation:
    """One draw of noise: base perturbations D of the weights, in their order, and where the signs come from.

    Attributes:
        bases: Tensors of the shapes and dtypes of the weights; of those with a sign for every element,
            ``COPIES`` of them, [copies, ...].
        seed: Key of the random generator.
        draw: Number of the draw, for the signs.
    """

    bases: Sequence[Tensor]
    seed: int
    draw: int

    def copy(self) -> Perturbation:
        """Return the same with bases in memory of its own."""
        return Perturbation([base.clone() for base in self.bases], self.seed, self.draw)


# (number of a perturbation, the weights) -> the perturbation.
Perturb = Callable[[int, Sequence[Flipped]], Perturbation]


@dataclass(frozen=True)
class _Site:
    """A :class:`Site` of a stage without its input."""

    weight: int
    shift: Shift
    shape: torch.Size
    input: torch.Size | None


@dataclass(frozen=True, eq=False)
class Record:
    """What control variates take of the unperturbed model, for n images.

    Attributes:
        lives: Of each site, the model's weight that is read there.
        inputs: Of each site, the inputs of the operation, [n, ...]; None where the weight itself is shifted.
        gradients: Of each site, the gradients of each image's loss at the operation's result, [n, ...].
    """

    lives: list[Tensor]
    inputs: list[Tensor | None]
    gradients: list[Tensor]

    def of(self, images: slice) -> Record:
        """Return that of some of the images."""
        inputs = [None if x is None else x[images] for x in self.inputs]
        return Record(self.lives, inputs, [g[images] for g in self.gradients])

    def at(self, weights: Sequence[Flipped]) -> Record:
        """Return that of the sites which read some of the weights."""
        read = {id(weight.live) for weight in weights}
        some = [number for number, live in enumerate(self.lives) if id(live) in read]
        lives, inputs, gradients = (
            [values[number] for number in some] for values in (self.lives, self.inputs, self.gradients)
        )
        return Record(lives, inputs, gradients)  # type: ignore[arg-type]

    def empty(self, images: int) -> Record:
        """Return room for that of so many images."""
        inputs = [None if x is None else x.new_empty((images, *x.shape[1:])) for x in self.inputs]
        gradients = [g.new_empty((images, *g.shape[1:])) for g in self.gradients]
        return Record(self.lives, inputs, gradients)

    def put(self, images: slice, part: Record) -> None:
        """Copies a record of some of the images to its place."""
        for kept, new in zip((*self.inputs, *self.gradients), (*part.inputs, *part.gradients), strict=True):
            if kept is not None and new is not None:
                kept[images] = new


class Flips:
    """Stages of which some read perturbed weights.

    Args:
        stages: All stages of the model.
        first: First stage that may read the weights.
        end: The stage after the last that may.
        weights: The perturbed weights. Their layouts become known here.
        sample: Activations of some images before stage ``first``, [n, ...].
        inputs: Inputs of the model for these images.
        replays: Recordings of what is computed.

    Raises:
        NoRule: The weights cannot differ between images.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        first: int,
        end: int,
        weights: Sequence[Flipped],
        sample: Tensor,
        inputs: Tensor,
        replays: Replays,
    ) -> None:
        self.stages, self.first, self.weights, self._replays = stages, first, weights, replays
        live = {id(weight.live) for weight in weights}
        named = {id(tensor) for stage in stages for tensor in stage.tensors}
        reading = [
            number
            for number in range(first, end)
            if not stages[number].tensors or live & {id(t) for t in stages[number].tensors}
        ]
        try:
            self.sites = self._find(reading, sample, inputs)
        except NoRule:
            raise
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a forward pass may do what torch.vmap cannot
            words = str(error).strip().splitlines()
            raise NoRule(
                f"torch.vmap cannot run it ({type(error).__name__}: {words[0] if words else ''})"
            ) from error
        seen = {site.weight for sites in self.sites.values() for site in sites}
        for number, weight in enumerate(weights):
            if number not in seen and (id(weight.live) in named or not all(s.tensors for s in stages)):
                raise NoRule(f"no rule is known for the operation that reads {weight.name}")
        self._lay_signs(seen)

    def _find(self, reading: Sequence[int], sample: Tensor, inputs: Tensor) -> dict[int, list[_Site]]:
        """The sites of each stage that reads weights, after a comparison of what it computes."""
        found: dict[int, list[_Site]] = {}
        x = sample
        for number in range(self.first, max(reading, default=self.first - 1) + 1):
            stage = self.stages[number]
            expected = stage.run(x, inputs)
            if number in reading:
                sites: list[_Site] = []
                try:
                    got = self._one_by_one(stage, x, inputs, sites)
                except Conflict:  # a layout has changed, perhaps that of an earlier site
                    return self._find(reading, sample, inputs)
                size = expected.float().abs().max()
                tolerance = max(TOLERANCE, _UNITS * torch.finfo(expected.dtype).eps)
                if (
                    got.shape != expected.shape
                    or not (got - expected).float().abs().max() <= tolerance * size
                ):
                    raise NoRule("computed image by image, it gives other numbers")
                if sites:
                    found[number] = sites
            x = expected
        return found

    def _one_by_one(self, stage: Stage, x: Tensor, inputs: Tensor, sites: list[_Site]) -> Tensor:
        def one(x: Tensor, inputs: Tensor, nothing: Tensor) -> Tensor:
            def shift(site: Site) -> Tensor:
                shape = None if site.input is None else site.input.shape
                sites.append(_Site(site.weight, site.shift, site.shape, shape))
                if self._is_shared(site):
                    return self._zero(site)
                return nothing.to(self.weights[site.weight].live.dtype)

            return self._image(stage, x, inputs, shift)

        # Zeros, but of each image: what cannot be done to weights that differ fails here.
        found: Tensor = torch.vmap(one)(x, inputs, torch.zeros(len(x), device=x.device))
        return found

    def _image(self, stage: Stage, x: Tensor, inputs: Tensor, shift: Callable[[Site], Tensor]) -> Tensor:
        """A stage on a single image, inside of torch.vmap."""
        x, inputs = x.unsqueeze(0), inputs.unsqueeze(0)
        with Rules(self.weights, shift):
            return stage.run(x, inputs).squeeze(0)

    def _is_shared(self, site: Site | _Site) -> bool:
        return self.weights[site.weight].layout == SHARED

    def _zero(self, site: Site) -> Tensor:
        """One for all images."""
        return self.weights[site.weight].live.new_zeros(())

    @property
    def _own(self) -> list[_Site]:
        """The sites where images differ, of all stages."""
        return [site for sites in self.sites.values() for site in sites if not self._is_shared(site)]

    def check(self) -> None:
        """Raise NoRule where the images would share the noise of most of the weights."""
        alike = [weight for weight in self.weights if weight.layout == SHARED]
        size = sum(weight.live.numel() for weight in alike)
        if 2 * size > sum(weight.live.numel() for weight in self.weights):
            names = ", ".join(weight.name for weight in alike)
            raise NoRule(f"no rule is known for the operations that read {names}")

    # --- signs ----------------------------------------------------------------------------------

    def _lay_signs(self, seen: set[int]) -> None:
        device = self.weights[0].live.device if self.weights else None
        counts = [
            weight.layout.count if weight.layout is not None and number in seen else 0
            for number, weight in enumerate(self.weights)
        ]
        for weight, count in zip(self.weights, counts, strict=True):
            check_blocks(weight.block + blocks_of(count))
        blocks = [
            torch.arange(weight.block, weight.block + blocks_of(count))
            for weight, count in zip(self.weights, counts, strict=True)
        ]
        starts = accumulate((len(block) * BITS for block in blocks), initial=0)
        self._counts, self._starts = counts, list(starts)
        self._blocks = torch.cat(blocks).to(device)

    def signs(self, perturbation: Perturbation, numbers: Tensor) -> list[Signs]:
        """Of each weight, the signs of the images of these numbers."""
        bits = signs_of_blocks(perturbation.seed, perturbation.draw, numbers, self._blocks)
        found: list[Signs] = []
        bases = perturbation.bases
        for weight, base, count, start in zip(self.weights, bases, self._counts, self._starts, strict=False):
            if count and weight.layout is not None:
                one = bits[:, start : start + count].to(weight.live.dtype)
                found.append(weight.layout.split(one, base, numbers))
            else:
                found.append(())
        return found

    # --- what is computed -----------------------------------------------------------------------

    def run(
        self, number: int, x: Tensor, inputs: Tensor, perturbation: Perturbation, signs: list[Signs]
    ) -> Tensor:
        """What a stage makes of images [n, ...] with the weights that each of them has."""
        stage = self.stages[number]
        # Its own weights alone: torch.vmap looks at each tensor that it is given.
        noise = _Noise(perturbation.bases, signs, [site.weight for site in self.sites[number]])
        first = [x, inputs] if stage.reads_inputs and inputs is not x else [x]

        def run(*args: Tensor) -> Tensor:
            bases, own = noise.of(args[len(first) :])

            def one(x: Tensor, inputs: Tensor, signs: dict[int, Signs]) -> Tensor:
                def shift(site: Site) -> Tensor:
                    x = bases[site.weight] if site.input is None else site.input
                    return site.shift(x, bases[site.weight], signs[site.weight])

                return self._image(stage, x, inputs, shift)

            found: Tensor = torch.vmap(one)(args[0], args[len(first) - 1], own)
            return found

        return self._replays.run((self, number), run, [*first, *noise.flat], stage.tensors)

    @property
    def bytes(self) -> int:
        """Bytes that a :class:`Record` takes of one image."""
        numbers = 0
        for site in self._own:
            size = self.weights[site.weight].live.element_size()
            numbers += size * (site.shape.numel() + (site.input.numel() if site.input is not None else 0))
        return numbers

    def tapped(
        self, number: int, x: Tensor, inputs: Tensor, taps: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """A stage's result for images [n, ...], with a tap [n, ...] added at each site; the sites' inputs."""
        stage = self.stages[number]

        def one(x: Tensor, inputs: Tensor, taps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
            seen: list[Tensor | None] = []

            def shift(site: Site) -> Tensor:
                if self._is_shared(site):
                    return self._zero(site)
                seen.append(site.input)
                return taps[len(seen) - 1]

            y = self._image(stage, x, inputs, shift)
            return y, [x for x in seen if x is not None]

        found: tuple[Tensor, list[Tensor]] = torch.vmap(one)(x, inputs, list(taps))
        return found

    def record(self, x: Tensor, inputs: Tensor, losses: Callable[[Tensor], Tensor]) -> Record:
        """The inputs and gradients at all sites. losses: logits [n, classes] -> loss of each image."""
        taps: list[Tensor] = []
        seen: list[Tensor | None] = []
        for number in range(self.first, len(self.stages)):
            if (sites := self.sites.get(number)) is None:
                x = self.stages[number].run(x, inputs)
                continue
            own = [site for site in sites if not self._is_shared(site)]
            here = [_tap(len(x), site.shape, self.weights[site.weight].live) for site in own]
            x, found = self.tapped(number, x, inputs, here)
            rest = iter(found)
            seen += [None if site.input is None else next(rest).detach() for site in own]
            taps += here
        if not taps:  # nothing reads the weights
            return Record([], [], [])
        gradients = torch.autograd.grad(losses(x).sum(), taps, allow_unused=True, materialize_grads=True)
        lives = [self.weights[site.weight].live for site in self._own]
        return Record(lives, seen, list(gradients))

    def control(self, record: Record, perturbation: Perturbation, signs: list[Signs]) -> Tensor:
        """<dl_n/dw, D_n> of each image: float64 [n], or a single zero if nothing reads the weights.

        Weights whose noise images share are left out, which biases nothing: the mean of theirs is zero, too.

        Args:
            record: Of the sites of these weights, for n images.
            perturbation: The draw.
            signs: Those of the n images.
        """
        if not (sites := self._own):
            return torch.zeros(1, dtype=torch.float64)
        noise = _Noise(perturbation.bases, signs, [site.weight for site in sites])
        known = [x for x in record.inputs if x is not None]
        count = len(known)

        def run(*args: Tensor) -> Tensor:
            bases, own = noise.of(args[count + len(sites) :])

            def one(inputs: list[Tensor], gradients: list[Tensor], signs: dict[int, Signs]) -> Tensor:
                products, rest = [], iter(inputs)
                for site, gradient in zip(sites, gradients, strict=True):
                    x = bases[site.weight] if site.input is None else next(rest)
                    shift = site.shift(x, bases[site.weight], signs[site.weight])
                    products.append((gradient.float() * shift.float()).sum())
                return torch.stack(products).double().sum()

            found: Tensor = torch.vmap(one)(list(args[:count]), list(args[count : count + len(sites)]), own)
            return found

        return self._replays.run((self, "control"), run, [*known, *record.gradients, *noise.flat], ())


@dataclass(frozen=True)
class _Noise:
    """Base perturbations and signs of some weights as one list of tensors, and back."""

    bases: Sequence[Tensor]
    signs: Sequence[Signs]
    weights: Sequence[int]

    @property
    def _own(self) -> list[int]:
        return list(dict.fromkeys(self.weights))

    @property
    def flat(self) -> list[Tensor]:
        """The base and the signs of one weight after another."""
        return [x for number in self._own for x in (self.bases[number], *self.signs[number])]

    def of(self, flat: Sequence[Tensor]) -> tuple[dict[int, Tensor], dict[int, Signs]]:
        """Weight -> base, weight -> signs, of a list like ``flat``."""
        rest = iter(flat)
        bases, signs = {}, {}
        for number in self._own:
            bases[number] = next(rest)
            signs[number] = tuple(next(rest) for _ in self.signs[number])
        return bases, signs


def _tap(images: int, shape: torch.Size, like: Tensor) -> Tensor:
    """Zeros at which a gradient is taken, without memory of their own."""
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(images, *shape).requires_grad_()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Gradients are recorded, and none at the model's weights."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for parameter in learning:
            stack.callback(parameter.requires_grad_, True)
            parameter.requires_grad_(False)
        yield
