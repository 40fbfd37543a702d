"""A sweep: fine-tuned models through the paper's studies.

It wires request, checkpoints, data, studies, rows and figures together and computes nothing itself.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import datetime

from .. import catalogue, results
from ..common import again, disk, program
from ..common.program import Interrupted, Stop
from ..common.words import cell
from ..config.request import NotFetched, Request, unfetched
from ..config.settings import Figures, Running
from ..report import summary
from ..report.findings import findings
from ..report.shown import Attempts
from ..settings import Layers
from ..studies.chance import among
from ..studies.facts import Facts
from ..studies.pilot import NoCrossing
from . import identity, planning, running, saving, trackers
from .cluster.driver import Cluster, Failed
from .executor import Executor, InProcess
from .pictures import Pictures
from .progress import Progress, held_warnings
from .progress.outputs import Log
from .wiring import Models


def sweep(request: Request, argv: Sequence[str]) -> int:
    """Does what a command line asks for; returns and raises as :func:`rft_fast.sweep.main`.

    Args:
        request: what was read of it.
        argv: the command line itself, to be recorded.
    """
    run: results.Run | None = None
    executor: Executor | None = None
    try:
        try:
            saving.check(request)
            if request.of(Running).plan:
                print(planning.plan(identity.resumed(request)))
                print(program.next_step("sweep", *again.without(argv, "--plan")))
                return 0
            pictures = Pictures(request.out, request.of(Figures))
            with held_warnings() as early:
                early += request.notices
                request = identity.resumed(request)
                executor = InProcess(request) if request.of(Running).workers is None else Cluster(request)
                asked = identity.dated(executor.config, argv)
                run = results.Run(request.out, asked, overwrite=request.of(Running).overwrite)
                if request.of(Running).overwrite and not run.resumed:
                    saving.remove_earlier(run.directory)
                followers = trackers.open_trackers(
                    request.of(Running).track, run.directory, run.config, run.directory.name
                )
        except NotFetched as error:
            print(unfetched(error))
            print(program.next_step("sweep", *argv, "--fetch"))
            return 0
        except (OSError, RuntimeError, ValueError) as error:
            if run is not None:
                run.close()
            program.parser("sweep").error(str(error))
        with run:
            took = _measure(executor, request, run, argv, followers, early)
            facts = Facts(
                run.rows(),
                request.settings,
                among(executor.config),
                request.measured,
                request.everything,
                results.Stored(run.directory),
            )
            failed = _draw(request, facts, run, took, pictures)
            if request.of(Running).save_best:
                models = executor.models if isinstance(executor, InProcess) else Models.load(request)
                saved = saving.save(request, models, facts.rows, run.directory)
                _note(request, run, [f"best     {text}" for text in saved])
    except (KeyboardInterrupt, Interrupted):
        print(f"\nsweep: interrupted; {_kept(run, argv)}", file=sys.stderr)
        return 130
    except (OSError, MemoryError, Failed, NoCrossing) as error:
        print("\n" + program.failure("sweep", f"{error}; {_kept(run, argv)}"), file=sys.stderr)
        return 1
    finally:
        if executor is not None:
            executor.close()
    for name, text in failed.items():
        text = f"{name} was measured, but its analysis failed: {text}"
        print(program.failure("sweep", text), file=sys.stderr)
    return 1 if failed else 0


def _measure(
    executor: Executor,
    request: Request,
    run: results.Run,
    argv: Sequence[str],
    followers: Sequence[trackers.Tracker],
    early: Sequence[str],
) -> list[dict[str, object]]:
    how = request.of(Running)
    mode = "quiet" if how.quiet else "json" if how.json else "bar"
    with Progress(run.directory / "run.log", mode, followers) as progress:
        progress.start(identity.command(argv), run.directory, run.resumed, executor.size)
        for text in early:
            progress.notice(text)
        try:
            with Stop(progress.notice) as stop:
                took = running.measure(executor, request, run, progress, stop)
        except Interrupted:
            progress.end("interrupted")
            raise
        progress.end("finished")
    return took


def _draw(
    request: Request,
    facts: Facts,
    run: results.Run,
    took: Sequence[Mapping[str, object]],
    pictures: Pictures,
) -> dict[str, str]:
    """Write tables, figures and log, and print the summary; return name -> error of studies that failed."""
    attempts = Attempts()
    studies = [study for study in map(catalogue.study, request.measured) if not study.hidden]
    for study in studies:
        with attempts.at(study.name):
            table = study.table(facts)
            if table is not None:
                with disk.replacing(run.table(study.name)) as temporary:
                    table.map(cell).to_csv(temporary, index=False)
        with attempts.at(study.name):
            pictures.draw(study, facts, request.of(Layers).models)
    found = findings(facts, catalogue.studies(), attempts)
    log = Log(run.directory / "run.log", datetime.now, lambda text: print(text, file=sys.stderr))
    for finding in found:
        log.write(f"in short: {finding.text}")
    if request.of(Running).quiet or request.of(Running).json:
        return attempts.failed
    print(summary.report(facts, catalogue.studies(), found, attempts))
    print("\n" + summary.cost(took))
    print(
        f"\nfigures  {pictures.folder} ({', '.join(study.name for study in studies)})\n"
        f"rows     {run.directory / 'rows.csv'} (also rows.sqlite)\n"
        f"request  {run.directory / 'config.json'}; time and memory in cost.csv"
    )
    print(program.next_step("report", run.directory))
    print(program.next_step("results", run.directory))
    return attempts.failed


def _note(request: Request, run: results.Run, lines: Sequence[str]) -> None:
    """Add lines to the log, and to the output unless it is quiet."""
    log = Log(run.directory / "run.log", datetime.now, lambda text: print(text, file=sys.stderr))
    for line in lines:
        log.write(line)
        if not (request.of(Running).quiet or request.of(Running).json):
            print(line)


def _kept(run: results.Run | None, argv: Sequence[str]) -> str:
    if run is None:
        return "nothing was measured yet"
    command = identity.command(again.resuming(argv, run.directory))
    try:
        count = len(results.load(run.directory))
    except (OSError, ValueError) as error:
        return f"its rows cannot be read now: {error}"
    return f"the {count} rows so far are in {run.directory}; to resume:\n  {command}"
