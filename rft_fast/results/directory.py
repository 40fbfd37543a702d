"""The files of a run's directory, and which directories a run may write to."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from ..common import disk, words
from ..config.recorded import EARLIER, is_compared, named_differences, shown_as, value_as
from ..names import FIGURE_FORMATS, STUDIES
from . import database
from .errors import Mismatch
from .loading import is_begun, is_same_release, opened, order, recorded, refuse_stranger
from .lock import refuse_in_use

TABLE, CONFIG, FIGURES, LOG = "rows.csv", "config.json", "figures", "run.log"
REPORTS = ("report.html", "comparison.html")  # names of rft_fast.report, made from the rows
# Entries of a configuration that rows do not depend on.
DERIVED = ("scored among", "run")  # computed from other entries; how the run went
ASIDE = {("command",), ("date",), ("platform",), ("threads",), ("versions", "python")}


def differences(
    there: Mapping[str, Any], now: Mapping[str, Any], sides: tuple[str, str] = ("in the run", "requested")
) -> list[str]:
    """Describe how two configurations differ in what rows depend on.

    Ignored are command, date, platform, number of threads, version of Python, development versions of one
    release of rft_fast, and every entry called ``path``, as content hashes count instead. A model or a data
    set may have any of these names.

    Args:
        there: The configuration of a run.
        now: The configuration to compare it with.
        sides: What the two are called.

    Returns:
        One phrase per difference; empty where rows would be the same.
    """

    own = [_version(config) for config in (there, now)]

    def aside(names: tuple[str, ...]) -> bool:
        if names == ("versions", "rft_fast") and is_same_release(*own):
            return True
        return names in ASIDE or names[0] in DERIVED or names[-1] == "path" or not is_compared(names)

    return words.differences(
        plain(there),
        plain(now),
        aside,
        lambda names: shown_as(names, "."),
        sides,
        value_as,
        lambda names, a, b: named_differences(names, a, b, sides),
    )


def _version(config: Mapping[str, Any]) -> str:
    versions = config.get("versions")
    return str(versions.get("rft_fast", "")) if isinstance(versions, Mapping) else ""


def check(
    directory: str | os.PathLike[str], overwrite: bool = False, config: Mapping[str, Any] | None = None
) -> None:
    """Refuse a directory that a run must not or cannot write to; change nothing.

    An existing run may be resumed if its configuration does not differ.

    Args:
        directory: Directory of a run; need not exist.
        overwrite: Check that an existing run may be replaced instead.
        config: The configuration, as far as it is known; None: do not compare.

    Raises:
        InUse: Another process writes to it.
        Mismatch: It holds a run with other settings; the message lists the differences.
        Damaged: It holds a run that cannot be read.
        ValueError: It is not a directory, contains files under a run's names that are not of a run (or links,
            or FIFOs), or holds a run of a newer version.
        PermissionError: It cannot be written to.
    """
    directory = pathlib.Path(directory)
    if not directory.exists():
        parent = next(p for p in directory.absolute().parents if p.exists())
        if not parent.is_dir():
            raise ValueError(f"results: expected a directory, got the file {parent}")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(f"results: cannot create {directory}: {parent} is not writable")
        return
    if not directory.is_dir():
        raise ValueError(f"results: expected a directory, got the file {directory}")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(f"results: {directory} is not writable")
    refuse_links(directory, config or {})
    refuse_in_use(directory)
    if not is_begun(directory):
        # A kill while a run begins, or replaces another, leaves an empty database and that folder.
        ours = [directory / FIGURES] if (directory / database.FILE).exists() else []
        written = dict.fromkeys([*replaced(directory, config or {}), directory / FIGURES, directory / LOG])
        if names := [f.relative_to(directory) for f in written if f not in ours and f.exists()]:
            raise ValueError(
                f"results: {directory} contains {', '.join(map(str, names))} but no {database.FILE} "
                "of a run; choose another directory"
            )
        return
    if overwrite:
        with opened(directory) as base:
            refuse_stranger(directory, base)
        return
    there = recorded(directory)
    if there is not None and config is not None:
        # Some settings a run finds out for itself.
        known = {
            name: _common(there[name], value) if name == "settings" else there[name]
            for name, value in config.items()
            if name in there
        }
        if unlike := differences(known, config):
            raise mismatch(directory, unlike, there)


def _common(table: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What of nested tables the other has as well."""
    return {
        name: _common(value, other[name])
        if isinstance(value, Mapping) and isinstance(other[name], Mapping)
        else value
        for name, value in table.items()
        if name in other
    }


def figure_file(directory: pathlib.Path, study: str, ending: str = "png") -> pathlib.Path:
    return directory / FIGURES / f"{study}.{ending}"


def figure_files(directory: pathlib.Path, study: str) -> list[pathlib.Path]:
    """The files of a study's figure in all formats, and that of its caption."""
    return [figure_file(directory, study, ending) for ending in (*FIGURE_FORMATS, "txt")]


def table_file(directory: pathlib.Path, study: str) -> pathlib.Path:
    return directory / f"{study}.csv"


def replaced(directory: pathlib.Path, config: Mapping[str, Any]) -> list[pathlib.Path]:
    """The files that a run of this configuration writes anew."""
    names = dict.fromkeys([*STUDIES, *order(config)[1], "cost"])
    named = [[*figure_files(directory, name), table_file(directory, name)] for name in names]
    return [*chain(*named), directory / TABLE, directory / CONFIG]


def refuse_links(directory: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Refuse a directory in which a name that a run writes is a link, or not a plain file."""
    base = directory / database.FILE
    in_place = [base, *(database.beside(base, end) for end in database.BESIDE)]
    in_place += [directory / database.LOCK, directory / LOG]
    try:
        disk.check_targets(replaced(directory, config), in_place, [directory / FIGURES])
    except ValueError as error:
        raise ValueError(f"results: {error}") from None


# Packages whose name at the index is not that of the module.
_DISTRIBUTIONS = {"rft_fast": "rft-fast", "open_clip": "open_clip_torch"}


def mismatch(directory: pathlib.Path, unlike: Sequence[str], there: Mapping[str, Any]) -> Mismatch:
    """Return the error about a run with other settings. there: its configuration."""
    packages = [
        each.removeprefix("versions.").partition(":")[0] for each in unlike if each.startswith("versions.")
    ]
    ways = [] if len(packages) == len(unlike) else ["use the same settings"]
    if packages:
        versions = there.get("versions")
        versions = versions if isinstance(versions, Mapping) else {}
        ways.append(_install({name: str(versions.get(name, "")) for name in packages}))
    remedy = f"To resume it, {' and '.join(ways)}; otherwise choose another --out, or add --overwrite"
    if any(EARLIER in difference for difference in unlike):
        remedy = "This version has no options for these settings: choose another --out, or add --overwrite"
    if "rft_fast" in packages:
        remedy += ". A run is not measured by two releases, but this version reads, reports and compares it"
    return Mismatch(f"results: {directory} holds a run with other settings ({'; '.join(unlike)}). {remedy}")


def _install(versions: Mapping[str, str]) -> str:
    """Say how to get packages in these versions. Development versions of rft_fast are at no package index."""
    own = versions.get("rft_fast", "")
    unreleased = ".dev" in own or not own
    wanted = " ".join(
        f"{_DISTRIBUTIONS.get(name, name)}=={version.partition('+')[0]}"
        for name, version in versions.items()
        if version and not (name == "rft_fast" and unreleased)
    )
    ways = [f"install the versions of the run (pip install {wanted})"] if wanted else []
    if "rft_fast" in versions and unreleased:
        ways.append(f"install rft_fast {own or 'of the run'} from the source that made it")
    return " and ".join(ways) or "use the versions of the run"


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as JSON gives it back."""
    found: dict[str, Any] = json.loads(json.dumps(config))
    return found
