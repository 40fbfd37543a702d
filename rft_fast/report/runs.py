"""Read a run's directory and check that it can be reported."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from packaging.version import InvalidVersion, Version

from .. import __version__, catalogue, results
from ..common import disk
from ..common.words import many
from ..config.recorded import tree_of, upgraded
from ..results.directory import figure_file
from ..results.loading import is_same_release
from ..studies.chance import among
from ..studies.facts import Facts

_LONGEST = 100_000  # bytes of a caption
_NEEDED = "everything measured settings command date zoo arch zeroshot finetuned data versions".split()


@dataclass(frozen=True)
class RunRead:
    """A run on disk.

    Attributes:
        directory: directory of the run.
        config: contents of its ``config.json``.
        facts: facts of its rows, without the models that a study did not finish.
        count: number of all rows.
        costs: time and memory of each study; None if they were not recorded.
        notes: sentences on what is missing.
        captions: study -> caption of its figure, where the sweep wrote it to a file.
    """

    directory: pathlib.Path
    config: dict[str, Any]
    facts: Facts
    count: int
    costs: pd.DataFrame | None
    notes: list[str]
    captions: dict[str, str]


def read(directory: str | os.PathLike[str], command: str = "report") -> RunRead:
    """Read a run, which may be unfinished.

    Rows of a model that a study did not finish are left out, with a note.

    Args:
        directory: directory of the run.
        command: name of the command that reads it, for errors.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: rows without ``config.json``, no complete rows, or a run made by a newer version.
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        kind = "a file" if directory.exists() else "nothing"
        raise FileNotFoundError(f"{command}: expected a run's directory, got {kind} at {directory}")
    config = _config(directory, command)
    rows = results.load(directory)
    if rows.empty:
        raise ValueError(f"{command}: the run in {directory} has no rows yet; wait for its first measurement")
    count, notes = len(rows), []
    for study in rows["study"].unique():
        for model in _unfinished(rows[rows["study"] == study]):
            cut = (rows["study"] == study) & (rows["model"] == model)
            notes.append(f"{study} was not finished for {model}, and is left out ({many(cut.sum(), 'row')}).")
            rows = rows[~cut]
    if not (rows["study"] == "interpolation").any():
        raise ValueError(
            f"{command}: the run in {directory} has no model whose path was measured to its end; run it again"
        )
    known = {study.name: study for study in catalogue.studies()}
    unmeasured = {name for name in config["measured"] if name in known and not known[name].measures}
    missing = [name for name in config["measured"] if name not in {*rows["study"].unique(), *unmeasured}]
    if missing:
        notes.append(f"Requested, but without rows: {', '.join(missing)}.")
    facts = Facts(
        rows,
        tree_of(config),
        among(config),
        config["measured"],
        config["everything"],
        results.Stored(directory),
    )
    for name in unmeasured:
        try:
            known[name].check(facts)
        except ValueError as error:
            notes.append(f"The {name} is left out: {error}.")
            facts = facts.but(measured=[other for other in facts.measured if other != name])
    file = directory / "cost.csv"
    costs = pd.read_csv(file) if file.is_file() else None
    return RunRead(directory, config, facts, count, costs, notes, _captions(directory, facts.measured))


def _captions(directory: pathlib.Path, studies: Sequence[str]) -> dict[str, str]:
    files = {study: figure_file(directory, study, "txt") for study in studies}
    return {
        study: disk.read_plain(file, _LONGEST).decode("utf-8", errors="replace").strip()
        for study, file in files.items()
        if file.exists()
    }


def _config(directory: pathlib.Path, command: str) -> dict[str, Any]:
    file = directory / "config.json"
    has_rows = (directory / "rows.sqlite").is_file()
    if not file.is_file():
        if has_rows:
            raise ValueError(
                f"{command}: {directory} has rows.sqlite but no config.json, which describes the run; "
                "restore the one that the sweep wrote beside it"
            )
        raise FileNotFoundError(
            f"{command}: no run in {directory}: expected rows.sqlite and config.json there"
        )
    if not has_rows:
        raise FileNotFoundError(
            f"{command}: {directory} has a config.json but no rows.sqlite: nothing to report"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{command}: {file} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{command}: expected an object in {file}, got {type(config).__name__}")
    _check_version(config, file, command)
    config = upgraded(config)
    if missing := [name for name in _NEEDED if name not in config]:
        raise ValueError(f"{command}: {file} lacks {', '.join(missing)}; was it written by the sweep?")
    return config


def _check_version(config: dict[str, Any], file: pathlib.Path, command: str) -> None:
    versions = config.get("versions")
    made_by = versions.get("rft_fast") if isinstance(versions, dict) else None
    try:
        newer = Version(str(made_by)) > Version(__version__) and not is_same_release(
            str(made_by), __version__
        )
    except InvalidVersion:
        raise ValueError(f"{command}: {file} does not say which version of rft_fast wrote it") from None
    if newer:
        raise ValueError(
            f"{command}: the run in {file.parent} was made by rft_fast {made_by}, this is {__version__}; "
            "upgrade to read it"
        )


def _unfinished(part: pd.DataFrame) -> list[str]:
    """Return the models that a study did not finish: a curve lacks an end, or there are fewer rows."""
    keys = [name for name in _CURVE if part[name].notna().any()]
    ends = part.groupby(keys, sort=False, dropna=False)["alpha"].agg(["min", "max"])
    known = [study for study in catalogue.studies() if study.name == part["study"].iloc[0]]
    low, high = ends["min"].min(), ends["max"].max()
    if any(study.reaches_ends for study in known):
        low, high = 0.0, 1.0
    cut = ends[(ends["min"] > low) | (ends["max"] < high)]
    unfinished = set(cut.index.get_level_values("model"))
    if not any(study.rows_vary for study in known):
        counts = part["model"].value_counts()
        unfinished |= set(counts.index[counts < counts.max()])
    return [model for model in part["model"].unique() if model in unfinished]


_CURVE = (
    "model dataset partners others cumulative layer rho on noise method criterion coefficients control asked "
    "seed"
).split()
