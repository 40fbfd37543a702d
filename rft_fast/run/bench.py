"""``Bench``: where the studies of a request measure, and the scores that their measurements share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

from .. import catalogue, datasets
from ..catalogue import Chosen, Images, Task
from ..config.request import Request
from ..evaluate import Evaluator, Scores
from ..path import Path
from ..settings import Along, Sharpness
from ..studies.images import Kept
from ..studies.others import Others
from ..studies.rows import Sink
from .wiring import Counts, Models, by_layer, of_sharpness


class Shared(Protocol):
    """Scores that several measurements need, kept where they last."""

    def scores(self, of: str) -> MutableMapping[tuple[str, float], Scores]:
        """(data set, alpha) -> scores. of: what they are of."""


class InMemory:
    """Shared scores of a process that need not outlive it."""

    def __init__(self) -> None:
        self._tables: dict[str, dict[tuple[str, float], Scores]] = {}

    def scores(self, of: str) -> dict[tuple[str, float], Scores]:
        return self._tables.setdefault(of, {})


class Bench:
    """An evaluator for each choice of images, and the studies of a request on them."""

    def __init__(self, request: Request, evaluators: Mapping[Images, Evaluator]) -> None:
        self.request, self.evaluators = request, evaluators
        self._kept: dict[tuple[str, str], dict[Any, Any]] = {}

    def run(
        self,
        study: str,
        path: Path,
        chosen: Chosen | None,
        shared: Shared,
        others: Others,
        *,
        model: str = "",
        only: Collection[int] | None = None,
        sink: Sink | None = None,
        images: Kept | None = None,
    ) -> None:
        """Makes measurements of one study of one model.

        Args:
            study: its name.
            path: the live model on the way to this fine-tuned one.
            chosen: layers, where the study takes some by earlier rows.
            shared: scores of other measurements; those that are missing are added.
            others: the fine-tuned models.
            model: name of the fine-tuned model.
            only, sink, images: as studies take them.
        """
        what = catalogue.study(study)
        names = self.shares(study, model)
        zeroshot, own = (shared.scores(of) for of in names)
        kept = self._kept.setdefault((study, names[0]), {})
        evaluator, found = self.evaluators[what.images], images if what.keeps_images else None
        what.measure(
            Task(self.request, path, evaluator, model, chosen, zeroshot, own, kept, others, only, sink, found)
        )

    def shares(self, study: str, model: str) -> tuple[str, str]:
        """Names of the scores that its measurements share: at alpha = 0, and elsewhere."""
        return shares(self.request, study, model)


def shares(request: Request, study: str, model: str) -> tuple[str, str]:
    """As :meth:`Bench.shares`: at alpha = 0 those of all models, unless each has a head of its own there."""
    images = catalogue.study(study).images
    own = f"{images}, {model}"
    return own if request.zoo.own_heads else images, own


def sizes(request: Request, whole: Counts) -> dict[Images, Counts]:
    """How many images of which data sets there are in each choice of images, out of all of them."""
    return {
        "all images": whole,
        "images of layers and prune": by_layer(request, whole),
        "images of sharpness": of_sharpness(request, whole),
    }


def make(models: Models, sets: Sequence[datasets.Dataset]) -> Bench:
    """The bench of a request on these images."""
    request = models.request
    whole = {data.name: (len(data.labels), data.ood) for data in sets}
    evaluator = models.evaluator(sets)
    found: dict[Images, Evaluator] = {}
    for images, counts in sizes(request, whole).items():
        chosen = [data for data in sets if data.name in counts]
        some = [datasets.subset(data, counts[data.name][0], request.of(Along).seed) for data in chosen]
        normalize = images == "images of sharpness" and request.of(Sharpness).normalize_logits
        found[images] = evaluator if images == "all images" else evaluator.on(some, normalize)
    return Bench(request, found)
