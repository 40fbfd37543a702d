"""Layers whose control variates share a forward and a backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...evaluate.flipped import Flipped, NoRule
from ..rows import AT_ONCE
from .estimates import Target

if TYPE_CHECKING:
    from ...evaluate import Evaluator
    from ...path import Path

STATIONS = 4
"""Stations whose layers share the passes: two blocks of a transformer.

With all stations together ViT-B/32 has 7 % fewer passes, and six times the memory.
"""


@dataclass(frozen=True, eq=False)
class Group:
    """Weights whose control variates come from the same passes.

    Attributes:
        first: The station at which these start.
        last: The last station that reads one of the weights.
        weights: The weights: of all layers that lie between the two, whichever are requested, so that the
            numbers of a layer depend on no other layer.
        shared: Whether they belong to several targets.
    """

    first: int
    last: int
    weights: tuple[Flipped, ...]
    shared: bool


class Groups:
    """The group of each target.

    Args:
        path: The live model between its two ends.
        evaluator: An evaluator of the model.
        flipped: Name of a parameter -> how it is perturbed.
        targets: What is perturbed, one at a time.

    Attributes:
        recorded: Bytes that the passes of the largest group leave for each image.
    """

    def __init__(
        self, path: Path, evaluator: Evaluator, flipped: Mapping[str, Flipped], targets: Iterable[Target]
    ) -> None:
        self._path, self._evaluator, self._flipped = path, evaluator, flipped
        self._text = evaluator.stations - len(evaluator.stages.image) - bool(evaluator.stages.text)
        self._spans = {layer: evaluator.span(path.tensors(layer)) for layer in path.layers}
        self._blocks: dict[int, Group | None] = {}
        self.recorded = 0
        self._of = {target: self._find(target) for target in targets}

    def of(self, target: Target) -> Group:
        """Return the group of a target."""
        return self._of[target]

    def chunks(self, targets: Sequence[Target]) -> list[list[Target]]:
        """Split targets into whole groups, with about ``AT_ONCE`` targets or more in each part."""
        found: list[list[Target]] = []
        for target in targets:
            if not found or (len(found[-1]) >= AT_ONCE and self.of(found[-1][-1]) is not self.of(target)):
                found.append([])
            found[-1].append(target)
        return found

    def _find(self, target: Target) -> Group:
        first = target.stage
        if target.layer is not None and first >= self._text:
            first -= (first - self._text) % STATIONS
            if target.last < first + STATIONS and (block := self._block(first)) is not None:
                return block
        own = self._group(first, target.last, target.layers, False)
        return own or Group(first, target.last, (), False)

    def _block(self, first: int) -> Group | None:
        """Return the group of the layers that lie within stations from this one on; None as of _group."""
        if first not in self._blocks:
            layers = [x for x, (a, b) in self._spans.items() if first <= a and b < first + STATIONS]
            last = max(self._spans[layer][1] for layer in layers)
            self._blocks[first] = self._group(first, last, layers, True)
        return self._blocks[first]

    def _group(self, first: int, last: int, layers: list[str] | None, shared: bool) -> Group | None:
        """None: no rule is known for these layers together."""
        weights = tuple(self._flipped[weight.name] for weight in self._path.weights(layers))
        try:
            size = self._evaluator.recorded(weights, first, last)
        except NoRule:
            return None
        self.recorded = max(self.recorded, size)
        return Group(first, last, weights, shared)
