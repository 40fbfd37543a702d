"""A run from its first measurement to its last: which measurements are missing, phase by phase."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from .. import catalogue, results
from ..catalogue import Chosen, Study
from ..common.program import Stop
from ..config.request import Request
from ..studies.chance import among
from ..studies.facts import Facts
from . import selection
from .executor import Copies, Executor
from .ledger import Ledger
from .pieces import Piece
from .progress import Progress


def measure(
    executor: Executor, request: Request, run: results.Run, progress: Progress, stop: Stop
) -> list[dict[str, object]]:
    """Makes every measurement of the request that the run lacks.

    Each measurement is on disk before the next begins.

    Returns:
        The cost of each study, including earlier processes of this run: models, seconds (of all workers),
        peak memory in bytes.

    Raises:
        Interrupted: the user stopped it.
        OSError: the disk fails.
        MemoryError: a measurement does not fit.
    """
    ledger = Ledger(run, progress, stop, among(executor.config))
    takes = {study: list(request.zoo.finetuned) for study in request.measured}
    progress.expect(_estimated(executor, request))
    phases = [[each for each in phase if each.name in request.measured] for phase in catalogue.phases()]
    for phase, turn in _turns(phases):
        todo: list[Piece] = []
        copies: dict[str, Copies] = {}
        facts = Facts(run.rows(), request.settings, images=results.Stored(run.directory))
        for what in (each for each in phase if turn < each.rounds):
            study, models = what.name, takes[what.name]
            # The first of several rounds is chosen by nothing, and may lack rows of some models when resumed.
            first = what.rounds > 1 and not turn
            choose = partial(executor.guess, study) if first else partial(what.choose, facts)
            pieces, copies[study] = executor.pieces(study, models, _some(models, choose))
            done = {model: run.done(study, model) for model in models}
            left = [rest for piece in pieces if (rest := piece.without(done[piece.model])) is not None]
            counts = Counter[str]()
            for piece in left:
                counts[piece.model] += len(piece.numbers)
            whole = sum(piece.cost for piece in pieces)
            had = whole - sum(piece.cost for piece in left)
            progress.expect({study: whole}, {study: had}, {study: dict(counts)})
            ledger.models[study] = len(models)
            if what.rounds > 1:
                left = [
                    one for piece in left if (one := piece.without({*piece.numbers} - {turn})) is not None
                ]
            todo += left
        executor.measure(todo, run, ledger)
        for study, copied in copies.items():
            _copy(run, study, copied)
        if turn == 0 and phase[0].phase == 0:  # the gains decide
            takes |= selection.choose(request, run.rows())
        if turn > 0 and turn == max(each.rounds for each in phase) - 1:
            facts = Facts(run.rows(), request.settings)
            for what in phase:
                for text in what.notices(facts):
                    progress.notice(text)
        stop.check()
    return ledger.rows()


def _turns(phases: Sequence[Sequence[Study]]) -> Iterator[tuple[Sequence[Study], int]]:
    """Yield the studies of each phase, with the number of the round, as often as one of them has rounds."""
    for phase in phases:
        for turn in range(max((each.rounds for each in phase), default=0)):
            yield phase, turn


def _some(models: Sequence[str], choose: Callable[[str], Chosen | None]) -> dict[str, Chosen]:
    """Model -> the layers chosen for it, where any are."""
    found = {model: choose(model) for model in models}
    return {model: chosen for model, chosen in found.items() if chosen is not None}


def _estimated(executor: Executor, request: Request) -> dict[str, float]:
    """Study -> its estimated cost, before it is known which models and layers it takes."""
    found: dict[str, float] = {}
    for study, count in selection.how_many(request).items():
        models = list(request.zoo.finetuned)[:count]
        chosen = _some(models, partial(executor.guess, study))
        found[study] = sum(piece.cost for piece in executor.pieces(study, models, chosen)[0])
    return found


def _copy(run: results.Run, study: str, copies: Copies) -> None:
    """Copies the rows that several models share from the model that they were measured for."""
    for model, same in copies.items():
        done = run.done(study, model)
        for number, holder in same:
            if number not in done:
                rows = [
                    {**row, "model": model, "seconds": 0.0} for row in run.measurement(study, holder, number)
                ]
                run.add(study, model, number, rows, run.images(study, holder, number))
