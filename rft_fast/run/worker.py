"""One process's share of a run: models and images, loaded once, and the measurements made on them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from time import perf_counter

from .. import path as paths
from ..common import files, meter
from ..config.request import Request, check_device
from ..names import Study
from ..studies.pruning import NAMED
from ..studies.rows import Sink
from . import cost as costs
from . import identity, wiring
from .pieces import Counter, Measurement, Piece, Stragglers
from .wiring import Models, Shared


class Worker:
    """Models and images of a request.

    config: what the request is about, and what it runs on here, as ``config.json`` has it, but for the
        command and the date.

    Raises ValueError, RuntimeError or OSError for whatever of the request cannot be met here.
    """

    def __init__(self, request: Request) -> None:
        check_device(request)
        self.request = request
        self._models = Models.load(request)
        self._stored: list[files.Inputs] = []
        sets = wiring.load_images(request, self._models.rows, self._stored)
        self._studies = wiring.make(self._models, sets)
        self.config: dict[str, object] = identity.complete(self._models, self._studies)
        self._models.inputs.check()
        self._path: tuple[str, paths.Path] | None = None
        self._counted: dict[tuple[object, ...], list[Measurement]] = {}

    def measure(self, piece: Piece, shared: Shared, sink: Sink) -> tuple[float, int]:
        """Makes the measurements of a piece, and calls ``sink`` with each; what that raises ends the piece.

        Returns the seconds it took, and the peak of memory in bytes.

        Raises files.Changed where a file of the model is no longer the one that was hashed: what came of the
        piece is not to be kept.
        """
        start = perf_counter()
        with meter.Peak(self.request.device) as peak, self._models.unchanged(piece.model):
            path = self._on(piece.model)
            self._studies.run(
                piece.study, path, piece.stragglers, shared, model=piece.model, only=piece.numbers, sink=sink
            )
        self._notice_other_images()
        return perf_counter() - start, peak.bytes

    def _notice_other_images(self) -> None:
        """Images are in memory, by a hash of their own: rows are of those, whatever is in the file now."""
        for stored in list(self._stored):
            try:
                stored.check()
            except files.Changed as error:
                self._stored.remove(stored)
                what = str(error).partition(", so")[0]
                warnings.warn(f"{what}; results are of the images as they were read before", stacklevel=2)

    def plan(
        self, study: Study, models: Sequence[str], stragglers: Mapping[str, Stragglers]
    ) -> dict[str, list[Measurement]]:
        """Model -> its measurements of a study. stragglers: model -> criterion -> layers, of ``prune``."""
        found = {}
        for model in models:
            chosen = stragglers.get(model)
            layers = self._layers(study, model)
            key = (study, layers, None if chosen is None else repr(sorted(chosen.items())))
            if key not in self._counted:
                # Any model with the same layers will do: the one at hand, or else this one.
                at_hand = None if self._path is None else self._path[0]
                same = at_hand is not None and self._layers(study, at_hand) == layers
                path = self._on(at_hand if same and at_hand is not None else model)
                self._counted[key] = self._counter.count(study, path, chosen)
            found[model] = self._counted[key]
        return found

    def _layers(self, study: Study, model: str) -> tuple[tuple[str, ...], ...]:
        """What decides how much is measured: the layers, and for ``layers`` those that do not change."""
        unchanged = self._models.frozen[model] if study == "layers" else ()
        return self._models.layers[model], unchanged

    def some_stragglers(self, model: str) -> Stragglers:
        """Criterion -> a layer, to reckon with before it is known which layers are to be pruned."""
        if self.request.prune_layers is not None:
            return {NAMED: self._on(model).select(self.request.prune_layers)}
        return {criterion: self._models.layers[model][:1] for criterion in self.request.criteria}

    def cost(self, measurement: Measurement) -> float:
        """FLOPs of a measurement."""
        return float(self._flops.of(measurement.work))

    def pieces(
        self, study: Study, models: Sequence[str], stragglers: Mapping[str, Stragglers]
    ) -> tuple[list[Piece], dict[str, list[tuple[int, str]]]]:
        """All of a study: a piece for each model, and model -> (number, model) of what need not be measured.

        At alpha = 0 the sharpness of a model is that of the first one that has the same layers.
        """
        plan = self.plan(study, models, stragglers)
        found: list[Piece] = []
        copies: dict[str, list[tuple[int, str]]] = {}
        first: dict[tuple[int, object], str] = {}
        for model, measurements in plan.items():
            own: list[Measurement] = []
            copies[model] = []
            for m in measurements:
                holder = first.setdefault((m.number, m.what), model) if self._shares(study, m) else model
                if holder == model:
                    own.append(m)
                else:
                    copies[model].append((m.number, holder))
            # Every other model's gain is measured from the zero-shot scores that the first one's piece makes.
            ahead = study == "interpolation" and model == models[0] and not self._own_heads
            for zero in (True, False) if ahead else (None,):
                part = [m for m in own if zero is None or m.zero == zero]
                numbers, costs = tuple(m.number for m in part), tuple(map(self.cost, part))
                found.append(Piece(study, model, numbers, costs, stragglers.get(model), ahead=zero is True))
        return found, copies

    def _shares(self, study: Study, measurement: Measurement) -> bool:
        return measurement.zero and study in wiring.SHARPNESS and not self._own_heads

    @property
    def _own_heads(self) -> bool:
        """Whether the zero-shot end is another one for each model."""
        return self.request.zoo.head.choice == "finetuned"

    def _on(self, model: str) -> paths.Path:
        if self._path is None or self._path[0] != model:
            self._path = None  # one fine-tuned model is gone before the next is loaded
            self._path = (model, self._models.path(model))
        return self._path[1]

    @cached_property
    def _counter(self) -> Counter:
        whole = {data.name: (len(data.labels), data.ood) for data in self._studies.whole.datasets}
        return Counter(self.request, self._studies.whole, whole)

    @cached_property
    def _flops(self) -> costs.Flops:
        return costs.flops(self._studies.whole)
