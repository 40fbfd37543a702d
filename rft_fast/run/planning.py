"""``--plan``: what a request will cost, before anything of it runs."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
from tqdm import tqdm

from .. import catalogue, datasets
from .. import path as paths
from ..catalogue import Study
from ..clip import architectures, tokenizers
from ..common.words import duration
from ..config.request import NotFetched, Request
from ..config.settings import Running
from ..evaluate import Evaluator
from ..settings import Layers
from . import bench, cost, selection, wiring
from .pieces import Counter, total
from .wiring import Models


def plan(request: Request) -> str:
    """Forward passes, FLOPs, bytes, time and memory of a request, to read.

    Loads the models, lists the images, counts what the studies would do and times what one of each thing
    takes, on random pixels, in about ten seconds. Decodes and measures nothing, and encodes no prompts.

    Raises NotFetched for a tokenizer that would have to be downloaded, and ValueError for what a run would
    refuse, unreadable images apart.
    """
    try:
        models = Models.load(request)
    except ValueError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, tokenizers.NotHere):
            cause = cause.__cause__
        if cause is None:
            raise
        raise NotFetched(f"a tokenizer ({cause})") from error
    sets = wiring.find_images(request, models.rows)
    whole = {found.name: (found.count, request.zoo.data[found.name].ood) for found in sets}
    start = perf_counter()
    path = models.path(next(iter(request.zoo.finetuned)))
    loading = perf_counter() - start
    evaluator = models.evaluator([_noise(request, 8)])
    takes = selection.how_many(request)
    counter = Counter(request, evaluator, whole)
    studies = {study: catalogue.study(study) for study in takes}
    counts = {
        study: _count(request, what, takes[study], path, evaluator, counter)
        for study, what in studies.items()
    }
    works = {study: work for study, (work, _) in counts.items()}
    everything = sum(works.values(), cost.Work.none(evaluator))
    costs = cost.flops(evaluator, everything)
    # Sets of like sizes take like times an image; a small one takes more.
    images = bench.sizes(request, whole)
    largest = {name: max(count for count, _ in counts.values()) for name, counts in images.items()}
    at_once = {study: what.images_at_once(request, largest[what.images]) for study, what in studies.items()}
    sizes = {study: min(count, cost.images_wanted(evaluator)) for study, count in at_once.items()}
    rates = {}
    for size in tqdm(sorted(set(sizes.values())), "calibrating", disable=None, leave=False):
        wanted = sum((works[s] for s in works if sizes[s] == size), cost.Work.none(evaluator))
        noise = evaluator.on([_noise(request, size)])
        rates[size] = cost.calibrate(noise, path, costs, wanted, 10 / len(set(sizes.values())))
    lines = [
        cost.Line(study, takes[study], work, rates[sizes[study]], takes[study] * loading)
        for study, work in works.items()
    ]
    encoding = _encoding(models, next(iter(rates.values())), costs)
    resident = sum(count for counts in images.values() for count, _ in counts.values())
    peak = cost.memory(everything, evaluator, path, resident)
    stored = sum(size for _, size in counts.values())
    return cost.table(lines, costs, peak, path, _notes(request, sets, stored), encoding)


def _encoding(models: Models, rates: cost.Rates, costs: cost.Flops) -> cost.Encoding | None:
    """What the text tower does before the first measurement; None where no head is made from prompts.

    Counted by the tower's shapes: of its weights, only matrices inside blocks work on every token.
    """
    ends = models.ends
    if not ends.heads or ends.setup.prompts is None:
        return None
    with torch.device("meta"):
        tower: Any = architectures.text(ends.setup.arch)
    tokens: int = tower.context_length
    matrices: int = sum(p.numel() for p in tower.transformer.parameters() if p.ndim > 1)
    widths: int = sum(m.embed_dim for m in tower.modules() if isinstance(m, torch.nn.MultiheadAttention))
    prompts = ends.heads * len(ends.setup.prompts.class_names) * len(ends.setup.prompts.templates)
    flops = prompts * (2 * tokens * matrices + 4 * tokens**2 * widths)
    return cost.Encoding(ends.heads, prompts, flops, flops * sum(rates.images) / costs.forward)


def _count(
    request: Request, study: Study, models: int, path: paths.Path, evaluator: Evaluator, counter: Counter
) -> tuple[cost.Work, int]:
    """The work of a study on so many models, and the bytes of the results of single images.

    The first model measures what the others share.
    """
    chosen = study.guess(request, path.layers)
    measurements = counter.count(study.name, path, chosen)
    first, stored = total(measurements, evaluator), models * sum(m.stored for m in measurements)
    if models == 1:
        return first, stored
    other = counter.count(study.name, path, chosen, model="another")
    if study.same_at_zeroshot and not request.zoo.own_heads:
        other = [measurement for measurement in other if not measurement.zero]
    return first + total(other, evaluator) * (models - 1), stored


def _noise(request: Request, images: int) -> datasets.Dataset:
    """Random pixels of the model's size: their values do not matter for time."""
    preprocess = wiring.preprocess(request.zoo)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, *preprocess.size), dtype=torch.uint8, generator=generator)
    labels = torch.zeros(images, dtype=torch.int64)
    return datasets.Dataset("noise", pixels, labels, preprocess.mean, preprocess.std)


def _notes(request: Request, sets: Sequence[datasets.Listed], stored: int) -> list[str]:
    notes = list(request.notices)
    if stored:
        notes.append(f"Results of single images: {stored:,} bytes in rows.sqlite (--no-image-results: none).")
    seconds, images = 0.0, 0
    for found in sets:
        if undecoded := found.undecoded(request.of(Running).cache):
            seconds += undecoded * found.time_decoding()
            images += undecoded
    if images:
        kept = "and then kept" if request.of(Running).cache is not None else "and not kept (--no-cache)"
        notes.append(
            f"Decoding {images:,} images first, {kept}: {duration(seconds)}, not included in the table."
        )
    studies = [catalogue.study(name) for name in request.measured]
    few = any(study.measures and study.most_models(request) is not None for study in studies)
    if few and request.of(Layers).models is None and len(request.zoo.finetuned) > 2:
        notes.append("The interpolation decides which models are studied layer by layer; they cost the same.")
    notes += dict.fromkeys(note for study in studies for note in study.assumptions(request))
    return notes
