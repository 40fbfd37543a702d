"""CSV files within a page: the rows of a run, and the values that two runs have in common."""

from __future__ import annotations

import csv
import io
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd

from ..common.words import cell, many
from ..results.export import write_csv
from .matching import KEYS
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
    everything = _download("rows.csv", "All rows", run.count, [*texts])
    made = []
    for part in studies:
        name = part.study
        if name in texts:
            one = _download(f"{name}.csv", "Rows of this study", counts[name], [name])
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


_MATCHED = "value a a_se n_a b b_se n_b difference half paired known apart corrected".split()


def with_matched(part: Section, common: pd.DataFrame) -> Section:
    """Add a download of all values that two runs have in common.

    Args:
        part: the section that shows them.
        common: the result of :func:`rft_fast.report.matching.matched`; of more than :data:`MOST`, the section
            says that they are too many.
    """
    if len(common) > MOST:
        text = f" The runs have {len(common):,} values in common, too many for a file within the page."
        return replace(part, lead=part.lead + text)
    lines = io.StringIO()
    common[[*KEYS, *_MATCHED]].map(cell).to_csv(lines, index=False, lineterminator="\n")
    one = _download("matched.csv", "All matched values", len(common), ["matched"])
    return replace(part, files={"matched": lines.getvalue()}, downloads=[one])


def _download(name: str, what: str, count: int, parts: Sequence[str]) -> Download:
    return Download(name, f"{what} as CSV ({many(f'{count:,}', 'row')})", parts)
