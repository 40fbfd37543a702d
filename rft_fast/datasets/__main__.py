"""``python -m rft_fast.datasets``: describe a data set and check it for errors."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from .. import datasets, names
from ..common import program


@program.command("datasets")
def main(argv: Sequence[str]) -> int:
    """Run the command.

    Returns:
        0: no error found; 1: the data set has errors; 2: not a data set, or an invalid request.
    """
    parser = program.parser(
        "datasets",
        description="Describe a data set, how it would be scored, and its problems. Exit status: 0 no "
        "problems, 1 problems found, 2 not a data set.",
    )
    parser.add_argument("path", type=_path, help="folder of class folders, archive, or file of arrays")
    parser.add_argument(
        "--kind", choices=sorted(names.KINDS), help="format of the data set (default: detected)"
    )
    parser.add_argument(
        "--rows",
        metavar="HEAD",
        help="rows of the head: imagenet, cifar10, ..., a file of class names, or their number",
    )
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help=(
            "label map from classes to rows of the head (.json, .toml or .csv); or the word "
            "order: class i is row i"
        ),
    )
    parser.add_argument("--quick", action="store_true", help="list the files, but do not decode them")
    parser.add_argument(
        "--write-labels",
        metavar="FILE.csv",
        type=pathlib.Path,
        help=("only write a draft of a label map, with the rows that class names indicate, to be completed"),
    )
    options = parser.parse_args(argv)
    from tqdm import tqdm

    from . import doctor

    try:
        rows = None if options.rows is None else _rows(options.rows)
        if options.write_labels is not None:
            print(doctor.write_labels(options.path, options.write_labels, options.kind, rows))
            print(_next(options, "--labels", options.write_labels))
            return 0
        with tqdm(desc="decoding", disable=None, leave=False) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            report = doctor.examine(options.path, options.kind, rows, options.labels, options.quick, progress)
    except (OSError, ValueError) as error:
        print(program.failure(parser.prog, error), file=sys.stderr)
        return 2
    print(report)
    if report.problems:
        return 1
    if options.quick:
        print(_next(options, *(("--labels", options.labels) if options.labels is not None else ())))
    else:
        print(_sweep(options))
    return 0


def _next(options: argparse.Namespace, *labels: object) -> str:
    """Return the line that says how to check all images."""
    given = [("--kind", options.kind), ("--rows", options.rows)]
    arguments = [word for pair in given if pair[1] is not None for word in pair]
    return program.next_step("datasets", options.path, *arguments, *labels)


def _sweep(options: argparse.Namespace) -> str:
    """Return the line of a sweep of the data set; the words in capitals are for people to replace."""
    path = options.path.resolve()
    name = path.stem if path.is_file() else path.name or "data"
    words: list[object] = ["--arch", "NAME", "--zeroshot", "SOURCE", "--finetuned", "FILE"]
    words += ["--data", f"{name}={options.path}"]
    if options.kind is not None:
        words += ["--data-kind", f"{name}={options.kind}"]
    if options.labels is not None:
        words += ["--data-labels", f"{name}={options.labels}"]
    if options.rows is not None and not options.rows.isdecimal():
        words += ["--class-names", options.rows]
    return program.next_step("sweep", *words)


def _path(text: str) -> pathlib.Path:
    if not text:  # as from an unset shell variable; an empty path would mean the current folder
        raise argparse.ArgumentTypeError("expected a path, got an empty one; the current folder is .")
    return pathlib.Path(text)


def _rows(head: str) -> datasets.Rows:
    if head.isdecimal():
        return datasets.Rows(int(head))
    from ..clip import prompts

    classes = prompts.class_names(head)
    return datasets.Rows(len(classes), classes)


if __name__ == "__main__":
    sys.exit(main())
