"""From a request to what it is about: the live model, its paths and its images."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import open_clip
from torch import Tensor, nn
from tqdm import tqdm

from .. import catalogue, checkpoints, datasets
from .. import path as paths
from ..checkpoints.canonical import HEAD_WEIGHT
from ..clip import architectures, prompts
from ..clip.endpoints import Ends, Setup
from ..common import files
from ..common.words import visible
from ..config import zoo
from ..config.builder import QUICK
from ..config.request import Request
from ..config.settings import Computed, Running
from ..evaluate import Evaluator, precision
from ..merge.streamed import COUNTER
from ..settings import Along, Layers, Prune, Sharpness
from ..studies.images import NO_CLASS
from ..studies.others import Others, State

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
    parts: dict[str, tuple[Path, ...]]  # of each checkpoint: its file, or its index and shards
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
        parts = {weights.source: checkpoints.parts(weights.source) for weights in source.finetuned.values()}
        parts[str(file)] = checkpoints.parts(file)
        for part in (part for some in (common[1:], *parts.values()) for part in some):
            inputs.add(part)
        for text in common[1:]:
            inputs.sha256(text)
        setup = _setup(source, request.fetch)
        with inputs.reading(*parts[str(file)]):
            state = checkpoints.load(file, request.device, source.zeroshot.format, source.zeroshot.key)
        with _at(file):
            ends = Ends(
                setup, state, _classes(source, file), request.device, stand_ins=request.of(Running).plan
            )
        for weights in source.finetuned.values():
            with _at(weights.source), inputs.reading(*parts[weights.source]):
                ends.check(_load(source, weights, "meta", file))
        live = precision.cast(ends.live, request.of(Computed).precision).to(request.device)
        models = cls(request, ends, live, inputs, common, parts)
        if request.of(Running).image_results and ends.classes > NO_CLASS:
            raise ValueError(
                f"{file}: the head has {ends.classes} classes, but results of single images can "
                f"number at most {NO_CLASS}; add --no-image-results"
            )
        models.hashes[source.zeroshot.source] = models._sha256(file)
        integers: dict[str, tuple[str, Tensor]] = {}
        first: dict[tuple[str, str | None], str] = {}  # SHA-256 and key -> the first model of that file
        for name, weights in tqdm(source.finetuned.items(), "checking models", disable=None, leave=False):
            models.hashes[weights.source] = found = models._sha256(weights.source)
            if (other := first.setdefault((found, weights.key), name)) != name:
                both = f"{visible(other)} and {visible(name)}"
                warnings.warn(f"{both} are the same file, so it counts as two models", stacklevel=2)
            path = models.path(name)
            models._check_layers(path)
            models.layers[name] = tuple(path.layers)
            models.frozen[name] = path.unchanged
            if any(catalogue.study(study).averages for study in request.measured):
                integers = same_integers(path, name, integers)
        return models

    @property
    def rows(self) -> datasets.Rows:
        """What the rows of the head stand for."""
        prompts = self.ends.setup.prompts
        return datasets.Rows(self.ends.classes, () if prompts is None else prompts.class_names)

    def path(self, name: str) -> paths.Path:
        """The live model on the way to this fine-tuned one."""
        ends, granularity = self.pair(name), self.request.of(Layers).granularity
        with _at(self.request.zoo.finetuned[name].source):
            return paths.Path(self.live, *ends, granularity, impl=self.request.of(Computed).impl)

    def pair(self, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The two ends of the path to this fine-tuned model, read from its file."""
        weights = self.request.zoo.finetuned[name]
        with _at(weights.source):
            with self.inputs.reading(*self.parts[weights.source]):
                state = _load(self.request.zoo, weights, "cpu", self.common[0])
            if name not in self.layers:  # when it is loaded for the first time
                self.ends.check_lineage(state, weights.unrelated)
            return self.ends.pair(state, name)

    @cached_property
    def others(self) -> Others:
        """The fine-tuned models, each read from its file whenever it is asked for."""
        return Others(_Read(self))

    def unchanged(self, *names: str) -> AbstractContextManager[None]:
        """Raises files.Changed at the end where a file of these models has changed meanwhile."""
        sources = [self.request.zoo.finetuned[name].source for name in names]
        tuned = [part for source in sources for part in self.parts[source]]
        return self.inputs.unchanged(*self.parts[str(self.common[0])], *self.common[1:], *tuned)

    def _sha256(self, source: str | Path) -> str:
        """The SHA-256 of a checkpoint, of one file or several."""
        return checkpoints.digest({part: self.inputs.sha256(part) for part in self.parts[str(source)]})

    def _check_layers(self, path: paths.Path) -> None:
        """Refuses layers that are not on the path, with the nearest names."""
        request = self.request
        excluded = request.of(Sharpness).exclude
        for study in request.measured:
            catalogue.study(study).fits(request, path.layers)
        asked = (
            ("layers", request.of(Layers).layers),
            ("prune-layers", request.of(Prune).layers),
            ("exclude", excluded),
        )
        for option, layers in asked:
            try:
                chosen = path.select(layers)
            except ValueError as error:
                raise ValueError(f"{request.named(option)}: {error}") from None
        if excluded is not None and set(chosen) == set(path.layers):
            raise ValueError(
                f"{request.named('exclude')}: {list(excluded)} excludes all {len(path.layers)} "
                "layers, so that none is left to perturb; exclude fewer"
            )

    def evaluator(self, sets: Sequence[datasets.Dataset]) -> Evaluator:
        computed = self.request.of(Computed)
        return Evaluator(
            self.live,
            sets,
            computed.batch_size,
            computed.precision,
            memory_limit=computed.memory_limit,
            graphs=computed.graphs,
            compile=computed.compile,
        )


def same_integers(
    path: paths.Path, model: str, before: dict[str, tuple[str, Tensor]]
) -> dict[str, tuple[str, Tensor]]:
    """Refuses integer tensors of a model that differ from those of another, because none can be averaged.

    Counters of training steps may differ.

    Args:
        path: of the model.
        model: its name.
        before: what this function returned for the first model; empty for that one.

    Returns:
        Name of the tensor -> name of the first model, and its tensor.
    """
    found = {
        slot.name: (model, slot.ends[1])
        for slot in path.slots
        if not (slot.is_float or slot.name.endswith(COUNTER))
    }
    for name, (other, tensor) in before.items():
        if not tensor.equal(found[name][1]):
            raise ValueError(
                f"{visible(model)} and {visible(other)} cannot be averaged, because they differ in {name}, a "
                "tensor of integers; leave soups out, or one of the models"
            )
    return before or found


class _Read(Mapping[str, State]):
    """Name of a fine-tuned model -> its end of the path."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def __getitem__(self, name: str) -> State:
        return self._models.pair(name)[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models.request.zoo.finetuned)

    def __len__(self) -> int:
        return len(self._models.request.zoo.finetuned)


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


def _load(source: zoo.Zoo, weights: zoo.Weights, device: str, zeroshot: Path) -> dict[str, Tensor]:
    """A fine-tuned checkpoint; a LoRA adapter is added to the zero-shot model, whose file is given."""
    if not checkpoints.is_adapter(weights.source):
        return checkpoints.load(weights.source, device, weights.format, weights.key)
    base = checkpoints.load(zeroshot, device, source.zeroshot.format, source.zeroshot.key)
    return checkpoints.load(weights.source, device, weights.format, weights.key, base)


def _classes(source: zoo.Zoo, file: Path) -> int | None:
    """Rows of the first fine-tuned head, where the zero-shot end may have none to tell."""
    if source.head.choice != "finetuned" or source.head.class_names is not None:
        return None
    weights = next(iter(source.finetuned.values()))
    head = _load(source, weights, "meta", file).get(HEAD_WEIGHT)
    return None if head is None else len(head)


def preprocess(source: zoo.Zoo) -> architectures.Preprocess:
    """How images are prepared for the models of a zoo: as for the published weights, if they start there."""
    name = source.zeroshot.source
    published = not Path(name).exists() and not name.startswith("hf-hub:")
    return architectures.preprocess(source.arch, name if published else None)


def find_images(request: Request, rows: datasets.Rows) -> list[datasets.Listed]:
    """The data sets, in the order of the zoo, each listed once and not decoded."""
    return [
        datasets.find(
            name,
            data.path,
            preprocess(request.zoo),
            request.of(Along).samples,
            request.of(Along).seed,
            kind=data.kind,
            rows=rows,
            label_map=data.labels,
            at_most=request.settings.giver("samples") == QUICK,
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
                warnings.warn(f"{found.name}: {note}; name that folder explicitly to be sure", stacklevel=2)
        with tqdm(desc=f"reading {visible(found.name)}", disable=None, leave=False) as bar:

            def progress(done: int, total: int, bar: Any = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            ood, skip = request.zoo.data[found.name].ood, request.of(Computed).skip_unreadable
            sets.append(found.load(ood, progress, cache=request.of(Running).cache, skip_unreadable=skip))
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
    own = request.of(Layers)
    return _some(whole, own.data or _first(whole, ood=True), own.samples)


def of_sharpness(request: Request, whole: Counts) -> Counts:
    """The images of sharpness: of the data sets named, or the first in distribution."""
    own = request.of(Sharpness)
    return _some(whole, own.data or _first(whole, ood=False), own.samples)


def _first(whole: Counts, ood: bool) -> list[str]:
    return ([name for name, (_, far) in whole.items() if far == ood] or list(whole))[:1]


def _some(whole: Counts, names: Sequence[str], most: int) -> Counts:
    return {name: (min(most, count), ood) for name, (count, ood) in whole.items() if name in names}
