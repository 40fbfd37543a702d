"""From a request to what it is about: the live model, its paths, its images, and the studies on them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from . import architectures, checkpoints, datasets, prompts, studies, zoo
from . import path as paths
from .classifier import HEAD_WEIGHT
from .endpoints import Ends, Setup
from .evaluate import Evaluator, Scores, precision
from .request import Request

Counts = dict[str, tuple[int, bool]]  # data set -> its images, and whether it is out of distribution


@dataclass(frozen=True)
class Models:
    """The live model, the zero-shot end of its paths, and SHA-256 of every checkpoint by its source."""

    request: Request
    ends: Ends
    live: nn.Module
    hashes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, request: Request) -> Models:
        """Puts the live model on the way to each fine-tuned one once, so that none fails later.

        Names, shapes and heads of all models are checked before the first prompt is encoded.
        """
        source = request.zoo
        setup = _setup(source)
        file = checkpoints.fetch(source.zeroshot.source, source.arch)
        state = checkpoints.load(file, request.device, source.zeroshot.format)
        with _at(file):
            ends = Ends(setup, state, _classes(source), request.device)
        for weights in source.finetuned.values():
            with _at(weights.source):
                ends.check(checkpoints.load(weights.source, format=weights.format))
        live = precision.cast(ends.live, request.precision).to(request.device)
        models = cls(request, ends, live)
        models.hashes[source.zeroshot.source] = checkpoints.sha256(file)
        for name, weights in tqdm(source.finetuned.items(), "checking models", disable=None, leave=False):
            models._check_layers(models.path(name))
            models.hashes[weights.source] = checkpoints.sha256(weights.source)
        return models

    @property
    def rows(self) -> datasets.Rows:
        """What the rows of the head stand for."""
        prompts = self.ends.setup.prompts
        return datasets.Rows(self.ends.classes, () if prompts is None else prompts.class_names)

    def path(self, name: str) -> paths.Path:
        """The live model on the way to this fine-tuned one."""
        weights = self.request.zoo.finetuned[name]
        with _at(weights.source):
            ends = self.ends.pair(checkpoints.load(weights.source, format=weights.format), name)
            return paths.Path(self.live, *ends, self.request.granularity, impl=self.request.impl)

    def _check_layers(self, path: paths.Path) -> None:
        """Refuses layers that are not on the path, with the nearest names."""
        asked = (("--layers", self.request.layers), ("--prune-layers", self.request.prune_layers))
        for option, layers in asked:
            try:
                path.select(layers)
            except ValueError as error:
                raise ValueError(f"argument {option}: {error}") from None

    def evaluator(self, sets: Sequence[datasets.Dataset]) -> Evaluator:
        request = self.request
        return Evaluator(
            self.live,
            sets,
            request.batch_size,
            request.precision,
            memory_limit=request.memory_limit,
            graphs=request.graphs,
            compile=request.compile,
        )


@contextmanager
def _at(file: str | Path) -> Iterator[None]:
    """Says of which file a ValueError is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _setup(source: zoo.Zoo) -> Setup:
    head = source.head
    chosen = None
    if head.class_names is not None:
        chosen = prompts.Prompts(prompts.class_names(head.class_names), prompts.templates(head.templates))
    given = None if head.given is None else checkpoints.load_head(head.given)
    return Setup(source.arch, head.towers, head.choice, chosen, head.scale, given)


def _classes(source: zoo.Zoo) -> int | None:
    """Rows of the first fine-tuned head, where the zero-shot end may have none to tell."""
    if source.head.choice != "finetuned" or source.head.class_names is not None:
        return None
    weights = next(iter(source.finetuned.values()))
    head = checkpoints.read(weights.source, weights.format).tensors.get(HEAD_WEIGHT)
    return None if head is None else len(head)


def preprocess(source: zoo.Zoo) -> architectures.Preprocess:
    """How images are prepared for the models of a zoo: as for the published weights, if they start there."""
    name = source.zeroshot.source
    published = not Path(name).is_file() and not name.startswith("hf-hub:")
    return architectures.preprocess(source.arch, name if published else None)


def find_images(request: Request, rows: datasets.Rows) -> list[datasets.Found]:
    """The data sets, in the order of the zoo, each listed once and not decoded."""
    return [
        datasets.find(
            name,
            data.path,
            preprocess(request.zoo),
            request.samples,
            request.seed,
            kind=data.kind,
            rows=rows,
            label_map=data.labels,
        )
        for name, data in request.zoo.data.items()
    ]


def load_images(request: Request, rows: datasets.Rows) -> list[datasets.Dataset]:
    """The data sets, in the order of the zoo. All are looked at before the first is decoded."""
    sets = []
    for found in find_images(request, rows):
        with tqdm(desc=f"reading {found.name}", disable=None, leave=False) as bar:

            def progress(done: int, total: int, bar: Any = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            ood, skip = request.zoo.data[found.name].ood, request.skip_unreadable
            sets.append(found.load(ood, progress, cache=request.cache, skip_unreadable=skip))
    return sets


def digest_prompts(models: Models) -> str | None:
    """SHA-256 of class names and templates; None where none are given."""
    prompts = models.ends.setup.prompts
    if prompts is None:
        return None
    return hashlib.sha256(repr((prompts.class_names, prompts.templates)).encode()).hexdigest()


def digest(data: datasets.Dataset) -> str:
    """SHA-256 of the images that are scored, of their labels, and of the classes scored among."""
    found = hashlib.sha256()
    for tensor in (data.images, data.labels, data.classes, data.groups):
        if tensor is not None:
            found.update(tensor.contiguous().numpy().data.cast("B"))
    return found.hexdigest()


def by_layer(request: Request, whole: Counts) -> Counts:
    """The images of what is studied layer by layer: of the data sets named, or the first that is OOD."""
    names = request.layer_images.names or _first(whole, ood=True)
    return _some(whole, names, request.layer_images.samples)


def of_sharpness(request: Request, whole: Counts) -> Counts:
    """The images of sharpness: of the data sets named, or the first in distribution."""
    names = request.sharpness_images.names or _first(whole, ood=False)
    return _some(whole, names, request.sharpness_images.samples)


def _first(whole: Counts, ood: bool) -> list[str]:
    return ([name for name, (_, far) in whole.items() if far == ood] or list(whole))[:1]


def _some(whole: Counts, names: Sequence[str], most: int) -> Counts:
    return {name: (min(most, count), ood) for name, (count, ood) in whole.items() if name in names}


class Studies:
    """The studies of a request on its images, one model at a time; what all models share, once.

    whole: all data sets. by_layer, sharpness: the images of those studies.
    """

    def __init__(self, request: Request, whole: Evaluator, by_layer: Evaluator, sharpness: Evaluator) -> None:
        self.whole, self.by_layer, self.sharpness = whole, by_layer, sharpness
        self._request = request
        self._scores: dict[int, dict[str, Scores]] = {}
        self._sharpness: dict[tuple[object, ...], Any] = {}

    def run(
        self, study: str, path: paths.Path, stragglers: Mapping[str, Sequence[str]] | None, **common: Any
    ) -> None:
        """One study of one model. stragglers: criterion -> layers to prune, where that is the study."""
        request = self._request
        if request.zoo.head.choice == "finetuned":  # the zero-shot end has each model's own head
            self._scores.clear()
            self._sharpness.clear()
        if study == "interpolation":
            zeroshot = self._zeroshot(path, self.whole)
            studies.interpolation(path, self.whole, request.alphas, zeroshot=zeroshot, **common)
        elif study == "layers":
            studies.layerwise_interpolation(
                path,
                self.by_layer,
                request.layer_alphas,
                request.layers,
                others=request.others,
                zeroshot=self._zeroshot(path, self.by_layer),
                **common,
            )
        elif study in ("sharpness", "layer-sharpness"):
            where = (path, self.sharpness, request.sharpness_alphas, request.rhos)
            shared = {"zeroshot": self._sharpness, **common}
            if study == "sharpness":
                studies.sharpness(*where, request.draws, protocol=request.general, **shared)
            else:
                draws, layers = request.layer_draws, request.layers
                studies.layerwise_sharpness(*where, draws, layers, protocol=request.layerwise, **shared)
        elif study == "prune":
            studies.prune_stragglers(
                path,
                self.by_layer,
                request.alphas,
                request.keep,
                layers=stragglers,
                methods=request.methods,
                seeds=request.mask_seeds,
                control=request.control,
                zeroshot=self._zeroshot(path, self.by_layer),
                **common,
            )

    def steps(self, study: str, path: paths.Path) -> int | None:
        """How many positions a model's progress counts; None where that is not known before."""
        request = self._request
        if study == "interpolation":
            return len(request.alphas)
        if study == "layers":
            return len(path.select(request.layers)) * (len(request.layer_alphas) - 1)
        if study == "prune":
            return None
        return len(request.sharpness_alphas) * len(self.sharpness.datasets)

    def _zeroshot(self, path: paths.Path, evaluator: Evaluator) -> dict[str, Scores]:
        """An evaluator's scores where every path begins."""
        if id(evaluator) not in self._scores:
            with path.at(0.0):
                self._scores[id(evaluator)] = evaluator.scores()
        return self._scores[id(evaluator)]


def make(models: Models, sets: Sequence[datasets.Dataset]) -> Studies:
    """The studies of the request on these images."""
    request = models.request
    whole = {data.name: (len(data.labels), data.ood) for data in sets}

    def some(counts: Counts) -> list[datasets.Dataset]:
        chosen = [data for data in sets if data.name in counts]
        return [datasets.subset(data, counts[data.name][0], request.seed) for data in chosen]

    evaluator = models.evaluator(sets)
    return Studies(
        request,
        evaluator,
        evaluator.on(some(by_layer(request, whole))),
        evaluator.on(some(of_sharpness(request, whole)), request.normalize_logits),
    )
