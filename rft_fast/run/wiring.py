"""From a request to what it is about: the live model, its paths, its images, and the studies on them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import open_clip
from torch import nn
from tqdm import tqdm

from .. import checkpoints, datasets, studies
from .. import path as paths
from ..checkpoints.canonical import HEAD_WEIGHT
from ..clip import architectures, prompts
from ..clip.endpoints import Ends, Setup
from ..common import files
from ..common.words import visible
from ..config import zoo
from ..config.request import Request
from ..evaluate import Evaluator, Scores, precision
from ..names import Names, Study, never
from ..studies.rows import Sink

Counts = dict[str, tuple[int, bool]]  # data set -> its images, and whether it is out of distribution


@dataclass(frozen=True)
class Models:
    """The live model, the zero-shot end of its paths, and SHA-256 of every checkpoint by its source.

    inputs: the files of all this, which must stay as they are hashed.
    """

    request: Request
    ends: Ends
    live: nn.Module
    inputs: files.Inputs
    common: tuple[Path, ...]  # those of all models, the zero-shot checkpoint first
    hashes: dict[str, str] = field(default_factory=dict)
    layers: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of each fine-tuned model's path
    frozen: dict[str, tuple[str, ...]] = field(default_factory=dict)  # those that are the same at both ends

    @classmethod
    def load(cls, request: Request) -> Models:
        """Puts the live model on the way to each fine-tuned one once, so that none fails later.

        Names, shapes and heads of all models are checked before the first prompt is encoded. A plan encodes
        none: it needs the shapes of heads alone.
        """
        source, inputs = request.zoo, files.Inputs()
        file = checkpoints.fetch(source.zeroshot.source, source.arch, request.fetch is not False)
        common = (file, *_texts(source))
        for each in (*common, *(Path(weights.source) for weights in source.finetuned.values())):
            inputs.add(each)
        for text in common[1:]:
            inputs.sha256(text)
        setup = _setup(source, request.fetch)
        with inputs.reading(file):
            state = checkpoints.load(file, request.device, source.zeroshot.format)
        with _at(file):
            ends = Ends(setup, state, _classes(source), request.device, stand_ins=request.plan)
        for weights in source.finetuned.values():
            with _at(weights.source), inputs.reading(weights.source):
                ends.check(checkpoints.load(weights.source, "meta", weights.format))
        live = precision.cast(ends.live, request.precision).to(request.device)
        models = cls(request, ends, live, inputs, common)
        models.hashes[source.zeroshot.source] = inputs.sha256(file)
        first: dict[str, str] = {}  # SHA-256 -> the first model of that file
        for name, weights in tqdm(source.finetuned.items(), "checking models", disable=None, leave=False):
            models.hashes[weights.source] = found = inputs.sha256(weights.source)
            if (other := first.setdefault(found, name)) != name:
                both = f"{visible(other)} and {visible(name)}"
                warnings.warn(f"{both} are the same file: as two models they count twice", stacklevel=2)
            path = models.path(name)
            models._check_layers(path)
            models.layers[name] = tuple(path.layers)
            models.frozen[name] = path.unchanged
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
            with self.inputs.reading(weights.source):
                state = checkpoints.load(weights.source, format=weights.format)
            if name not in self.layers:  # when it is loaded for the first time
                self.ends.check_lineage(state, weights.unrelated)
            ends = self.ends.pair(state, name)
            return paths.Path(self.live, *ends, self.request.granularity, impl=self.request.impl)

    def unchanged(self, name: str) -> AbstractContextManager[None]:
        """Raises files.Changed at the end where a file of this model has changed meanwhile."""
        return self.inputs.unchanged(*self.common, self.request.zoo.finetuned[name].source)

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


def _setup(source: zoo.Zoo, network: bool | None) -> Setup:
    head = source.head
    chosen = None
    if head.class_names is not None:
        chosen = prompts.Prompts(prompts.class_names(head.class_names), prompts.templates(head.templates))
    given = None if head.given is None else checkpoints.load_head(head.given)
    return Setup(
        source.arch, head.towers, head.choice, chosen, head.scale, given, network, source.resize_positions
    )


def _texts(source: zoo.Zoo) -> list[Path]:
    """The other files that models are made of: architecture, head, class names, templates."""
    head = source.head
    named = [
        (source.arch, source.arch in open_clip.list_models()),
        (head.class_names, head.class_names in prompts.CLASS_NAMES),
        (head.templates, head.templates in prompts.TEMPLATES),
        (head.given, False),
    ]
    return [Path(file) for file, built_in in named if file and not built_in and Path(file).is_file()]


def _classes(source: zoo.Zoo) -> int | None:
    """Rows of the first fine-tuned head, where the zero-shot end may have none to tell."""
    if source.head.choice != "finetuned" or source.head.class_names is not None:
        return None
    weights = next(iter(source.finetuned.values()))
    head = checkpoints.load(weights.source, "meta", weights.format).get(HEAD_WEIGHT)
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


def load_images(
    request: Request, rows: datasets.Rows, stored: list[files.Inputs] | None = None
) -> list[datasets.Dataset]:
    """The data sets, in the order of the zoo. All are looked at before the first is decoded.

    stored: takes the files that they were read from.
    """
    sets = []
    for found in find_images(request, rows):
        for note in found.source.notes:
            if note.startswith(datasets.source.PART):
                warnings.warn(f"{found.name}: {note}; name that folder to be sure", stacklevel=2)
        with tqdm(desc=f"reading {visible(found.name)}", disable=None, leave=False) as bar:

            def progress(done: int, total: int, bar: Any = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            ood, skip = request.zoo.data[found.name].ood, request.skip_unreadable
            sets.append(found.load(ood, progress, cache=request.cache, skip_unreadable=skip))
        if stored is not None:
            stored.append(found.source.stored)
    return sets


def digest_prompts(models: Models) -> str | None:
    """SHA-256 of class names and templates; None where none are given."""
    prompts = models.ends.setup.prompts
    if prompts is None:
        return None
    return hashlib.sha256(repr((prompts.class_names, prompts.templates)).encode()).hexdigest()


def scored_among(data: datasets.Dataset, rows: int) -> int:
    """How many classes a data set is scored among. rows: of the head."""
    if data.groups is not None:
        return len(set(data.groups.tolist()))
    return rows if data.classes is None else len(data.classes)


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


class Studies:
    """The studies of a request on its images, one model at a time.

    whole: all data sets. by_layer, sharpness: the images of those studies.
    """

    def __init__(self, request: Request, whole: Evaluator, by_layer: Evaluator, sharpness: Evaluator) -> None:
        self.whole, self.by_layer, self.sharpness = whole, by_layer, sharpness
        self._request = request

    def run(
        self,
        study: Study,
        path: paths.Path,
        stragglers: Mapping[str, Names] | None,
        shared: Shared,
        *,
        model: str = "",
        only: Collection[int] | None = None,
        sink: Sink | None = None,
    ) -> None:
        """Measurements of one study of one model.

        stragglers: criterion -> layers to prune, where that is the study. only, sink: as studies take them.
        """
        request = self._request
        if study == "interpolation":
            known = _Zeroshot(shared.scores(self._of(ALL, model, 0.0)))
            studies.interpolation(
                path, self.whole, request.alphas, model=model, zeroshot=known, only=only, sink=sink
            )
        elif study == "layers":
            studies.layerwise_interpolation(
                path,
                self.by_layer,
                request.layer_alphas,
                request.layers,
                others=request.others,
                model=model,
                zeroshot=_Zeroshot(shared.scores(self._of(BY_LAYER, model, 0.0))),
                only=only,
                sink=sink,
            )
        elif study == "sharpness" or study == "layer-sharpness":
            where = (path, self.sharpness, request.sharpness_alphas, request.rhos)
            common: dict[str, Any] = {"model": model, "only": only, "sink": sink}
            if study == "sharpness":
                studies.sharpness(*where, request.draws, protocol=request.general, **common)
            else:
                draws, layers = request.layer_draws, request.layers
                studies.layerwise_sharpness(*where, draws, layers, protocol=request.layerwise, **common)
        elif study == "prune":
            zeroshot, own = (shared.scores(self._of(BY_LAYER, model, alpha)) for alpha in (0.0, 1.0))
            studies.prune_stragglers(
                path,
                self.by_layer,
                request.alphas,
                request.keep,
                layers=stragglers,
                methods=request.methods,
                seeds=request.mask_seeds,
                control=request.control,
                model=model,
                unpruned=_Unpruned(zeroshot, own),
                only=only,
                sink=sink,
            )
        elif study == "correlation":  # made of rows
            raise ValueError("studies: the correlation is made of rows; it measures nothing")
        else:
            never(study)

    def _of(self, images: str, model: str, alpha: float) -> str:
        """What scores are of: at alpha = 0 of all models, unless these have heads of their own there."""
        own = alpha != 0 or self._request.zoo.head.choice == "finetuned"
        return f"{images}, {model}" if own else images


ALL, BY_LAYER = "all images", "images of layers and prune"
SHARPNESS = ("sharpness", "layer-sharpness")


class _Zeroshot(MutableMapping[str, Scores]):
    """Data set -> scores at alpha = 0."""

    def __init__(self, table: MutableMapping[tuple[str, float], Scores]) -> None:
        self._table = table

    def __getitem__(self, name: str) -> Scores:
        return self._table[name, 0.0]

    def __setitem__(self, name: str, scores: Scores) -> None:
        self._table[name, 0.0] = scores

    def __delitem__(self, name: str) -> None:
        del self._table[name, 0.0]

    def __iter__(self) -> Iterator[str]:
        return (name for name, alpha in self._table if alpha == 0)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _Unpruned(MutableMapping[tuple[str, float], Scores]):
    """(data set, alpha) -> scores of the unpruned path; those at alpha = 0 in a table of all models."""

    def __init__(
        self,
        zeroshot: MutableMapping[tuple[str, float], Scores],
        own: MutableMapping[tuple[str, float], Scores],
    ) -> None:
        self._zeroshot, self._own = zeroshot, own

    def _table(self, key: tuple[str, float]) -> MutableMapping[tuple[str, float], Scores]:
        return self._own if key[1] else self._zeroshot

    def __getitem__(self, key: tuple[str, float]) -> Scores:
        return self._table(key)[key]

    def __setitem__(self, key: tuple[str, float], scores: Scores) -> None:
        self._table(key)[key] = scores

    def __delitem__(self, key: tuple[str, float]) -> None:
        del self._table(key)[key]

    def __iter__(self) -> Iterator[tuple[str, float]]:
        yield from (key for key in self._zeroshot if not key[1])
        yield from (key for key in self._own if key[1])

    def __len__(self) -> int:
        return sum(1 for _ in self)


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
