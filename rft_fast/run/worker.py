"""``Worker``: models and images of a request, loaded once in a process, and the measurements on them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from time import perf_counter

from .. import catalogue
from .. import path as paths
from ..catalogue import Chosen
from ..common import files, meter
from ..config.request import Request, check_device
from ..config.settings import Running
from ..evaluate import Evaluator
from ..studies.images import ImageScores, Kept
from ..studies.rows import Row
from . import bench, identity, wiring
from . import cost as costs
from .bench import Shared
from .pieces import Counter, Measurement, Piece
from .wiring import Models

FullSink = Callable[[int, list[Row], Sequence[ImageScores]], object]


class Worker:
    """Makes any measurement of a request.

    Attributes:
        request: the request.
        config: what the run is and what it runs on here, as in ``config.json``, without command and date.

    Raises:
        ValueError, RuntimeError, OSError: this process cannot meet the request.
    """

    def __init__(self, request: Request) -> None:
        check_device(request)
        self.request = request
        self._models = Models.load(request)
        self._stored: list[files.Inputs] = []
        sets = wiring.load_images(request, self._models.rows, self._stored)
        self._bench = bench.make(self._models, sets)
        self.config: dict[str, object] = identity.complete(self._models, self._bench)
        self._models.inputs.check()
        self._path: tuple[str, paths.Path] | None = None
        self._counted: dict[tuple[object, ...], list[Measurement]] = {}

    @property
    def models(self) -> Models:
        """The models of the request."""
        return self._models

    def measure(self, piece: Piece, shared: Shared, sink: FullSink) -> tuple[float, int]:
        """Makes the measurements of a piece.

        Args:
            piece: the measurements.
            shared: scores of other measurements; missing ones are added.
            sink: called with the number of each measurement, its rows and the results of their images, which
                are none where they are not kept. What it raises ends the piece.

        Returns:
            Seconds, and peak memory in bytes.

        Raises:
            files.Changed: a file of the model has changed since it was hashed. The measurements of the piece
                are invalid.
        """
        kept: Kept | None = {} if self.request.of(Running).image_results else None

        def with_images(number: int, rows: list[Row]) -> None:
            sink(number, rows, () if kept is None else kept.pop(number, ()))

        start = perf_counter()
        read = [*self._models.layers] if catalogue.study(piece.study).combines else [piece.model]
        with meter.Peak(self.request.device) as peak, self._models.unchanged(*read):
            path = self._on(piece.model)
            self._bench.run(
                piece.study,
                path,
                piece.chosen,
                shared,
                self._models.others,
                model=piece.model,
                only=piece.numbers,
                sink=with_images,
                images=kept,
            )
        self._notice_other_images()
        return perf_counter() - start, peak.bytes

    def _notice_other_images(self) -> None:
        """Warns of changed image files. Rows stay valid: images are in memory, and hashed by themselves."""
        for stored in list(self._stored):
            try:
                stored.check()
            except files.Changed as error:
                self._stored.remove(stored)
                what = str(error).partition(", so")[0]
                warnings.warn(f"{what}; results are of the images as they were read before", stacklevel=2)

    def plan(
        self, study: str, models: Sequence[str], chosen: Mapping[str, Chosen]
    ) -> dict[str, list[Measurement]]:
        """Model -> its measurements of a study. chosen: model -> layers that the study picked."""
        found = {}
        for model in models:
            own = chosen.get(model)
            layers = self._layers(study, model)
            key = (study, layers, None if own is None else repr(sorted(own.items())))
            if key not in self._counted:
                # Any model with the same layers will do: the one at hand, or else this one.
                at_hand = None if self._path is None else self._path[0]
                same = at_hand is not None and self._layers(study, at_hand) == layers
                path = self._on(at_hand if same and at_hand is not None else model)
                self._counted[key] = self._counter.count(study, path, own, model)
            found[model] = self._counted[key]
        return found

    def _layers(self, study: str, model: str) -> tuple[tuple[str, ...], ...]:
        """What decides the number of measurements: the layers, and unchanged ones where these are skipped."""
        unchanged = self._models.frozen[model] if catalogue.study(study).skips_unchanged else ()
        return self._models.layers[model], unchanged

    def guess(self, study: str, model: str) -> Chosen | None:
        """Layers to estimate costs with, before the study can pick any."""
        return catalogue.study(study).guess(self.request, self._models.layers[model], model)

    def cost(self, measurement: Measurement) -> float:
        """FLOPs of a measurement."""
        return float(self._flops.of(measurement.work))

    def pieces(
        self, study: str, models: Sequence[str], chosen: Mapping[str, Chosen]
    ) -> tuple[list[Piece], dict[str, list[tuple[int, str]]]]:
        """All measurements of a study.

        Args:
            study: its name.
            models: names of the models that it takes.
            chosen: model -> layers that the study picked.

        Returns:
            The pieces, and model -> (number, other model) of measurements that are copied: at alpha = 0, the
            sharpness of a model is that of the first model with the same layers.
        """
        what = catalogue.study(study)
        own_heads = self.request.zoo.own_heads
        shared = what.same_at_zeroshot and not own_heads
        plan = self.plan(study, models, chosen)
        found: list[Piece] = []
        copies: dict[str, list[tuple[int, str]]] = {}
        first: dict[tuple[int, object], str] = {}
        for model, measurements in plan.items():
            own: list[Measurement] = []
            copies[model] = []
            for m in measurements:
                holder = first.setdefault((m.number, m.what), model) if m.zero and shared else model
                if holder == model:
                    own.append(m)
                else:
                    copies[model].append((m.number, holder))
            # Every other model's gain is measured from the zero-shot scores that the first one's piece makes.
            ahead = what.zeroshot_first and model == models[0] and not own_heads
            for zero in (True, False) if ahead else (None,):
                part = [m for m in own if zero is None or m.zero == zero]
                numbers, costs = tuple(m.number for m in part), tuple(map(self.cost, part))
                found.append(Piece(study, model, numbers, costs, chosen.get(model), ahead=zero is True))
        return found, copies

    def _on(self, model: str) -> paths.Path:
        if self._path is None or self._path[0] != model:
            self._path = None  # one fine-tuned model is gone before the next is loaded
            self._path = (model, self._models.path(model))
        return self._path[1]

    @cached_property
    def _counter(self) -> Counter:
        whole = {data.name: (len(data.labels), data.ood) for data in self._whole.datasets}
        return Counter(self.request, self._whole, whole)

    @cached_property
    def _flops(self) -> costs.Flops:
        return costs.flops(self._whole)

    @property
    def _whole(self) -> Evaluator:
        return self._bench.evaluators["all images"]
