"""``--plan``: what a request will cost, before anything of it runs."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from tqdm import tqdm

from .. import catalogue, datasets, results
from .. import path as paths
from ..catalogue import Chosen, Study
from ..clip import architectures, tokenizers
from ..common.words import duration, paragraph
from ..config.request import NotFetched, Request
from ..config.settings import Running
from ..evaluate import Evaluator
from ..names import WORST_CASE
from ..results.loading import measured
from ..settings import Layers, Sharpness
from ..studies.estimators import climbs
from ..studies.facts import Facts
from . import bench, cost, identity, selection, wiring
from .pieces import Counter, Measurement, total
from .wiring import Models


def plan(request: Request) -> str:
    """Forward passes, FLOPs, bytes, time and memory of a request, or of what its run lacks, to read.

    Loads the models, lists the images, counts what the studies would do and times what one of each thing
    takes, on random pixels, in about ten seconds. Decodes and measures nothing, and encodes no prompts.

    Raises NotFetched for a tokenizer that would have to be downloaded, and ValueError for what a run would
    refuse, unreadable and changed images apart.
    """
    running = request.of(Running)
    done = None if running.overwrite else measured(request.out)
    try:
        models = Models.load(request)
    except ValueError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, tokenizers.NotHere):
            cause = cause.__cause__
        if cause is None:
            raise
        raise NotFetched(f"a tokenizer ({cause})") from error
    if done is not None:
        results.check(request.out, config=identity.known(models))
    sets = wiring.find_images(request, models.rows)
    whole = {found.name: (found.count, request.zoo.data[found.name].ood) for found in sets}
    start = perf_counter()
    path = models.path(next(iter(request.zoo.finetuned)))
    loading = perf_counter() - start
    evaluator = models.evaluator([_noise(request, 8)])
    counter = Counter(request, evaluator, whole)
    found = dict(_counted(request, path, evaluator, counter, done))
    counts = {study: found[study] for study in selection.how_many(request)}
    studies = {study: catalogue.study(study) for study in counts}
    works = {study: counted.left for study, counted in counts.items()}
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
        cost.Line(
            study,
            counted.models,
            counted.left,
            rates[sizes[study]],
            (counted.lacking + counted.left.loads) * loading,
        )
        for study, counted in counts.items()
    ]
    encoding = _encoding(models, next(iter(rates.values())), costs)
    resident = sum(count for counts in images.values() for count, _ in counts.values())
    peak = cost.memory(everything, evaluator, path, resident, _copies(request))
    decided = done is not None and all(
        counted.done == counted.numbers for study, counted in counts.items() if not studies[study].phase
    )
    stored = sum(counted.stored for counted in counts.values())
    table = cost.table(lines, costs, peak, path, _notes(request, sets, stored, decided), encoding)
    if done is None:
        return table
    had = ", ".join(
        f"{study} {counted.done:,} of {'about ' * counted.guessed}{counted.numbers:,} measured"
        for study, counted in counts.items()
    )
    about = paragraph(f"{had}. The table is the cost of what is left.")
    return "\n".join([f"{request.out} holds this run:", *about, "", table])


def _copies(request: Request) -> int:
    """How many float32 copies of borrowed weights its studies hold."""
    own = request.of(Sharpness)
    if own.estimator == "auto" or own.estimator not in WORST_CASE:
        return cost.PRUNING
    return climbs.copies(own.estimator, own.restarts)


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


@dataclass(frozen=True)
class _Counted:
    """Measurements of a study.

    Attributes:
        models: how many models it takes.
        lacking: how many of them lack measurements.
        numbers: how many measurements there are to make, without those that are copied from another model.
        done: how many of these the run has.
        left: the work of the others.
        stored: bytes of the results of single images, of all measurements.
        guessed: whether later rows decide what it measures.
    """

    models: int
    lacking: int
    numbers: int
    done: int
    left: cost.Work
    stored: int
    guessed: bool = False


def _counted(
    request: Request,
    path: paths.Path,
    evaluator: Evaluator,
    counter: Counter,
    done: Mapping[tuple[str, str], set[int]] | None,
) -> Iterator[tuple[str, _Counted]]:
    """Yield each study that measures, with its measurements.

    Models and layers that depend on rows are those that the run will choose if it has these rows; else they
    are guessed.
    """
    takes = {study: list(request.zoo.finetuned)[:n] for study, n in selection.how_many(request).items()}
    decided = bool(done)  # whether the run has everything of the phases before
    facts: Facts | None = None
    for phase in catalogue.phases():
        if phase[0].phase and decided and facts is None:
            rows = results.load(request.out)
            facts = Facts(rows, request.settings, images=results.Stored(request.out))
            takes |= selection.choose(request, rows)
        sure = decided and facts is not None
        for what in (each for each in phase if each.name in takes):
            models = takes[what.name]
            guesses = {m: what.guess(request, path.layers, m) for m in models}
            chosen = {m: what.choose(facts, m) if sure and facts else guesses[m] for m in models}
            counted = _count(request, what, chosen, path, evaluator, counter, done or {})
            decided = decided and counted.done == counted.numbers
            guessed = any(guess is not None for guess in guesses.values())
            guessed = guessed and not sure and what.rounds == 1
            yield what.name, replace(counted, guessed=guessed)


def _count(
    request: Request,
    what: Study,
    chosen: Mapping[str, Chosen | None],
    path: paths.Path,
    evaluator: Evaluator,
    counter: Counter,
    done: Mapping[tuple[str, str], set[int]],
) -> _Counted:
    """Count the measurements of a study. The first model measures what the others share.

    Args:
        chosen: model -> layers that the study takes.
        done: (study, model) -> numbers of measurements that exist.
    """
    shared = what.same_at_zeroshot and not request.zoo.own_heads
    known: dict[tuple[bool, str], list[Measurement]] = {}
    left = Tally[tuple[tuple[bool, str], frozenset[int]]]()
    numbers = stored = 0
    for place, (model, layers) in enumerate(chosen.items()):
        other = place > 0
        key = (other, repr(layers))
        if key not in known:
            known[key] = counter.count(what.name, path, layers, model="another" if other else "")
        stored += sum(m.stored for m in known[key])
        own = {m.number for m in known[key] if not (other and shared and m.zero)}
        numbers += len(own)
        left[key, frozenset(own - done.get((what.name, model), set()))] += 1
    work = cost.Work.none(evaluator)
    for (key, missing), models in left.items():
        work += total([m for m in known[key] if m.number in missing], evaluator) * models
    lacking = sum(models for (_, missing), models in left.items() if missing)
    rest = sum(len(missing) * models for (_, missing), models in left.items())
    return _Counted(len(chosen), lacking, numbers, numbers - rest, work, stored)


def _noise(request: Request, images: int) -> datasets.Dataset:
    """Random pixels of the model's size: their values do not matter for time."""
    preprocess = wiring.preprocess(request.zoo)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, *preprocess.size), dtype=torch.uint8, generator=generator)
    labels = torch.zeros(images, dtype=torch.int64)
    return datasets.Dataset("noise", pixels, labels, preprocess.mean, preprocess.std)


def _notes(request: Request, sets: Sequence[datasets.Listed], stored: int, decided: bool) -> list[str]:
    """What is assumed. decided: whether the models that are studied layer by layer are known."""
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
    if few and not decided and request.of(Layers).models is None and len(request.zoo.finetuned) > 2:
        notes.append("The interpolation decides which models are studied layer by layer; they cost the same.")
    notes += dict.fromkeys(note for study in studies for note in study.assumptions(request))
    return notes
