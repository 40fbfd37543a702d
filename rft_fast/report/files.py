"""The rows of a run as CSV files within its page."""

from __future__ import annotations

import csv
import io
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..common.words import many
from ..results.export import write_csv
from .runs import RunRead
from .shown import Download, Section

MOST = 100_000
"""Most rows within a page."""


def with_rows(run: RunRead, parts: Sequence[Section]) -> list[Section]:
    """Add to each study's section a download of its rows, and to the last section one of all rows.

    Args:
        run: the run; of more than :data:`MOST` rows, the last section says where they are instead.
        parts: sections of its page.
    """
    *studies, last = parts
    if run.count > MOST:
        text = f" The run has {run.count:,} rows, too many for a page: they are in rows.csv of its directory."
        return [*studies, replace(last, lead=last.lead + text)]
    texts, counts = _by_study(run)
    everything = Download("rows.csv", f"All rows as CSV ({many(f'{run.count:,}', 'row')})", [*texts])
    made = []
    for part in studies:
        name = part.study
        if name in texts:
            one = Download(
                f"{name}.csv", f"Rows of this study as CSV ({many(f'{counts[name]:,}', 'row')})", [name]
            )
            part = replace(part, downloads=[one])
        made.append(part)
    return [*made, replace(last, files=texts, downloads=[everything])]


def _by_study(run: RunRead) -> tuple[Mapping[str, str], Mapping[str, int]]:
    """Return the lines of ``rows.csv`` of each study, below their headings, and their number."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "rows.csv")
        write_csv(run.directory, file)
        with file.open(newline="", encoding="utf-8") as stream:
            headings, *rows = csv.reader(stream)
    place = headings.index("study")
    streams: dict[str, io.StringIO] = {}
    counts: dict[str, int] = {}
    for row in rows:
        study = row[place]
        if study not in streams:
            streams[study], counts[study] = io.StringIO(), 0
            csv.writer(streams[study], lineterminator="\n").writerow(headings)
        csv.writer(streams[study], lineterminator="\n").writerow(row)
        counts[study] += 1
    return {study: stream.getvalue() for study, stream in streams.items()}, counts
