"""Write the page of a run, or of the comparison of two, atomically."""

from __future__ import annotations

import os
import pathlib

from .. import catalogue
from ..common import disk
from ..common.words import visible
from . import comparison, files, page, provenance, sections
from .charts import colours
from .findings import findings
from .first import looks
from .runs import read
from .tables import minus

NAME = "report.html"


def write(directory: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Write a run as one self-contained HTML page.

    Args:
        directory: directory of a run (:class:`rft_fast.results.Run`), which may be unfinished.
        out: output file; None: ``report.html`` in ``directory``. An earlier report is replaced.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: there is no run in the directory.
        ValueError: the run has no rows, lacks ``config.json``, or was made by a newer version; ``out`` is a
            directory, has no parent directory, or exists and is not a report.
        ModuleNotFoundError: plotly is not installed.
        OSError: the page cannot be written.
    """
    file = _target(directory, out, NAME)
    page.library()  # before any computation: plotly may be missing
    run = read(directory)
    config, arch = run.config, str(run.config["arch"])
    arch = pathlib.Path(arch).name if arch.endswith(".json") else arch
    parts = sections.studied(run.facts, catalogue.studies(), run.captions)
    text = page.render(
        title=provenance.title(run),
        above="rft_fast report",
        about=f"{config['date'][:10]} · architecture {arch} · rft_fast {config['versions']['rft_fast']}",
        commands=[config["command"]],
        tiles=provenance.tiles(run),
        findings=[minus(visible(one.text)) for one in findings(run.facts, catalogue.studies())],
        notes=run.notes,
        parts=files.with_rows(run, [*parts, provenance.provenance(run)]),
        models=len(colours(run.facts)),
        looks=looks(run.facts, parts),
        names=run.facts.names,
    )
    return _replace(file, text)


def compare(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
) -> pathlib.Path:
    """Write the differences of two runs, in settings and measurements, as one HTML page.

    Args:
        first: directory of a run.
        second: directory of another run.
        out: output file; None: ``comparison.html`` in ``second``.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: as :func:`write`.
        ValueError: as :func:`write`, or the runs have no measurement in common.
        ModuleNotFoundError: plotly is not installed.
        OSError: the page cannot be written.
    """
    file = _target(second, out, "comparison.html")
    page.library()
    return _replace(file, page.render(**comparison.compare(read(first), read(second))))


def _target(directory: str | os.PathLike[str], out: str | os.PathLike[str] | None, name: str) -> pathlib.Path:
    """Return the output file; refuse one that cannot be written, before anything is computed."""
    file = pathlib.Path(directory) / name if out is None else pathlib.Path(out)
    if out is None and not os.path.isdir(directory):
        return file  # read() explains what is wrong
    if file.is_dir():
        raise ValueError(
            f"report: expected a file to write, got the directory {file}; use --out {file / NAME}"
        )
    if not file.absolute().parent.is_dir():
        raise ValueError(
            f"report: cannot write {file}: {file.absolute().parent} is not a directory; create it first"
        )
    if not os.access(file.absolute().parent, os.W_OK | os.X_OK):
        raise PermissionError(
            f"report: cannot write {file}: {file.absolute().parent} is not writable; use --out"
        )
    try:
        disk.check_targets([file])
    except ValueError as error:
        raise ValueError(f"report: {error}") from None
    if file.exists():
        with file.open("rb") as old:
            if page.MARK.encode() not in old.read(1000):
                raise ValueError(
                    f"report: {file} exists and is not a report, so it is not overwritten; use another --out"
                )
    return file


def _replace(file: pathlib.Path, text: str) -> pathlib.Path:
    try:
        with disk.replacing(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(f"report: cannot write {file}: {error}") from error
    return file
