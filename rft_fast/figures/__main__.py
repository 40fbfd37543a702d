"""``python -m rft_fast.figures RUN``: the figures of a run, drawn again from its rows."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from .. import catalogue
from ..common import program
from ..common.words import suggestion, visible
from ..config.builder import Builder
from ..config.settings import Figures
from ..settings import once


@program.command("figures")
def main(argv: Sequence[str]) -> int:
    """Run the command; return 0. Refused arguments exit with 2, before anything is written."""
    parser = program.parser(
        "figures",
        description="Draw the figures of a run again from its rows, also while it is running. Nothing is "
        "measured, and nothing else in the run changes.",
    )
    parser.add_argument(
        "run", metavar="RUN", type=pathlib.Path, help="directory of a run (--out of the sweep)"
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="studies to draw (default: all of the run)")
    parser.add_argument(
        "--models",
        metavar="MODEL",
        nargs="+",
        help="models to show (default: each study's own choice); figures about all models together, such as "
        "that of correlation, are left out",
    )
    options = Builder((Figures,))
    options.add_to(parser)
    given = parser.parse_args(argv)
    try:
        how = options.of(Figures, options.given(given))
        for file in draw(given.run, once(given.names), given.models and once(given.models), how):
            print(f"figure   {visible(str(file))}")
        print(program.next_step("report", given.run))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


def draw(
    directory: pathlib.Path, names: Sequence[str], models: Sequence[str] | None, how: Figures
) -> list[pathlib.Path]:
    """Draw figures of a run; print what is left out.

    Args:
        directory: directory of a run, which may be unfinished.
        names: names of studies; none: all of the run that have rows.
        models: names of the models to show; None: each study's own choice.
        how: how figures are presented.

    Returns:
        The files of the figures.

    Raises:
        OSError: there is no run, or a file cannot be written.
        ValueError: an unknown study or model, a study without rows, an invalid style file, or a run that
            cannot be read.
    """
    for name in names:
        if name not in catalogue.names():
            raise ValueError(f"figures: no study is called {name!r}; {suggestion(name, catalogue.names())}")
    from ..report.runs import (
        read,  # pandas and matplotlib take seconds, which most mistakes need not wait for
    )
    from ..run.pictures import Pictures

    pictures = Pictures(directory, how)
    run = read(directory, "figures")
    for note in run.notes:
        print(f"note     {visible(note)}")
    facts, drawn = run.facts, list[pathlib.Path]()
    known = list(facts.rows["model"].unique())
    if models is not None:
        for model in models:
            if model not in known:
                raise ValueError(
                    f"figures: the run has no rows of a model {model!r}; {suggestion(model, known)}"
                )
        facts = facts.but(rows=facts.rows[facts.rows["model"].isin(models)])
    every = [study for study in catalogue.studies() if study.done(run.facts)]
    studies = [catalogue.study(name) for name in names]
    for study in studies:
        if study.pooled and models is not None:
            raise ValueError(
                f"figures: {study.name} is about all models together; leave it out, or leave out --models"
            )
        if not study.done(facts):
            of_whom = "" if models is None else f" of {', '.join(models)}"
            others = ", ".join(study.name for study in every if study.done(facts))
            raise ValueError(
                f"figures: {directory} has no rows of {study.name}{of_whom}; it has those of {others}"
            )
    for study in studies or every:
        if study.pooled and models is not None:
            print(f"note     {study.name} is about all models together: not drawn.")
            continue
        measured = facts.part(study.name)["model"].unique()
        own = None if models is None else [model for model in models if model in measured]
        if models is not None and (lacking := [model for model in models if model not in measured]):
            print(f"note     {study.name} has no rows of {visible(', '.join(lacking))}.")
        if own is None or own:
            drawn += pictures.draw(study, facts, own, known)
    return drawn


if __name__ == "__main__":
    sys.exit(main())
