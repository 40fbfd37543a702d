"""Show what a run has so far, and write its rows in other formats."""

from __future__ import annotations

import pathlib
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING

from .. import results
from ..common import again, program
from ..common.tables import aligned, labelled
from ..common.words import many
from .database import FILE

if TYPE_CHECKING:
    import pandas as pd


@program.command("results")
def main(argv: Sequence[str]) -> int:
    """Run a command line.

    Args:
        argv: Arguments without the program's name; left out: those of the process.

    Returns:
        0. Refused arguments exit with 2, before anything is written.
    """
    parser = program.parser("results", description=__doc__)
    parser.add_argument(
        "directory", metavar="DIR", type=pathlib.Path, help="directory of a run, finished or not"
    )
    parser.add_argument("--csv", metavar="FILE", type=pathlib.Path, help="write the rows to FILE")
    parser.add_argument(
        "--parquet",
        metavar="FILE",
        type=pathlib.Path,
        help="write the rows to FILE, with their types (needs pyarrow)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    parser.add_argument(
        "--recover", action="store_true", help="save the readable part of a damaged rows.sqlite to a new file"
    )
    options = parser.parse_args(argv)
    try:
        if options.recover:
            print("\n".join(_recovered(options.directory)))
            return 0
        rows = results.load(options.directory)
        files = [file for file in (options.csv, options.parquet) if file is not None]
        for file in files:
            _check(file, options.overwrite)
        if len({file.resolve() for file in files}) < len(files):
            raise ValueError(
                f"results: --csv and --parquet name the same file, {files[0]}; give different ones"
            )
        if options.parquet is not None:
            _check_pyarrow()
        print(describe(options.directory, rows))
        if options.csv is not None:
            results.export.write_csv(options.directory, options.csv)
        if options.parquet is not None:
            results.export.write_parquet(options.directory, options.parquet)
        for file in files:
            print(f"written  {many(f'{len(rows):,}', 'row')} to {file}")
        print(program.next_step("report", options.directory))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


def _recovered(directory: pathlib.Path) -> list[str]:
    """Recover a run; return what was saved, and the commands that resume from it, if anything was."""
    from .salvage import saved

    found = saved(directory)
    if found.file is None:
        return [found.text]
    commands = [program.next_step("rm", *found.stale)] if found.stale else []
    commands.append(program.next_step("mv", found.file, directory / FILE))
    start, words = program.called("sweep").split(), list[str]()
    with suppress(ValueError):  # quotes of a command that is damaged, too
        words = shlex.split(found.command)
    if words[: len(start)] == start:
        commands.append(program.next_step("sweep", *again.resuming(words[len(start) :], directory)))
    return [found.text, *commands]


def describe(directory: pathlib.Path, rows: pd.DataFrame) -> str:
    """Describe a run: its command, and how many rows it has of each study and model."""
    from .single_images import count

    config = results.recorded(directory) or {}
    kept = count(directory)
    share = "all" if kept == len(rows) else f"{kept:,} of them"
    images = f", {share} with results of single images" if kept else ""
    about = [
        ("command", str(config.get("command", "unknown"))),
        ("begun", str(config.get("date", "unknown"))),
        ("rows", f"{len(rows):,}{images}"),
    ]
    table = [["study", "models", "rows"]] if len(rows) else []
    for study, part in rows.groupby("study", sort=False):
        table.append([str(study), f"{part['model'].nunique():,}", f"{len(part):,}"])
    return "\n".join([*labelled(about, wrap=False), *aligned(table)])  # the command is there to copy


def _check_pyarrow() -> None:
    if find_spec("pyarrow") is None:
        raise ValueError('results: Parquet needs pyarrow; pip install "rft-fast[huggingface]"')


def _check(file: pathlib.Path, overwrite: bool) -> None:
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise ValueError(f"results: cannot write {file}: it is a folder, or its folder does not exist")
    if file.exists() and not file.is_file():
        raise ValueError(f"results: cannot write {file}: it exists and is not a regular file")
    if file.exists() and not overwrite:
        raise ValueError(f"results: {file} exists; choose another name, or add --overwrite")
    if file.exists():
        with file.open("rb") as stream:
            if stream.read(15) == b"SQLite format 3":
                raise ValueError(f"results: {file} is a database, possibly of a run; choose another name")


if __name__ == "__main__":
    sys.exit(main())
