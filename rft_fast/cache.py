"""``python -m rft_fast.cache``: list the caches of decoded images, or remove them with ``--clear``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rft_fast.common import program
from rft_fast.common.tables import aligned, labelled
from rft_fast.common.words import many
from rft_fast.datasets import cache


def listed(entries: Sequence[cache.Entry]) -> list[str]:
    """Return a table of caches, and below it the data set and the transform of each."""
    table, origins = [("file", "images", "height x width", "on disk")], []
    for entry in entries:
        name, taken, about = entry.path.name, cache.size(entry.taken), entry.about
        if about is None:
            table.append((name, "", "", taken))
            origins.append((name, "damaged or unfinished"))
            continue
        images, size = f"{entry.decoded:,} of {about['count']:,}", " x ".join(map(str, about["size"]))
        table.append((name, images, size, taken))
        how = " ".join(f"{option}={value}" for option, value in about["transform"].items())
        origins.append((name, f"{about['folder']}; {how}"))
    return [*aligned(table, indent=""), "", *labelled(origins), ""] if entries else []


@program.command("cache")
def main(argv: Sequence[str]) -> int:
    """Run a command line; returns 0, or 1 where something could not be removed."""
    parser = program.parser(
        "cache",
        description="List the decoded images that are kept for later runs, in the directory $RFT_CACHE, "
        "else $XDG_CACHE_HOME/rft_fast, else ~/.cache/rft_fast.",
    )
    parser.add_argument("--clear", action="store_true", help="remove them; running sweeps are not disturbed")
    clear = parser.parse_args(argv).clear
    directory = cache.directory()
    found = cache.entries(directory)
    total = f"{many(len(found), 'cache')}, {cache.size(sum(entry.taken for entry in found))}, in {directory}"
    if not clear:
        print("\n".join([*listed(found), total]))
        print(program.next_step("sweep"))
        return 0
    try:
        for entry in found:
            entry.path.unlink(missing_ok=True)
        (directory / ".lock").unlink(missing_ok=True)
    except OSError as error:
        print(program.failure(parser.prog, f"{error}; not everything is removed"), file=sys.stderr)
        return 1
    print(f"removed {total}")
    print(program.next_step("sweep"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
