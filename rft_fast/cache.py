"""``python -m rft_fast.cache``: list the caches of decoded images, or remove them with ``--clear``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rft_fast.common import program
from rft_fast.common.words import many
from rft_fast.datasets import cache


def line(entry: cache.Entry) -> str:
    """Describe a cache in two lines: size and name, and what it holds."""
    about = entry.about
    if about is None:
        what = "damaged or unfinished"
    else:
        height, width = about["size"]
        how = " ".join(f"{name}={value}" for name, value in about["transform"].items())
        what = f"{about['folder']}: {entry.decoded:,} of {about['count']:,} images, {height} x {width}, {how}"
    return f"{cache.size(entry.taken):>10}  {entry.path.name}\n{'':>12}{what}"


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
        print("\n".join([*map(line, found), total]))
        return 0
    try:
        for entry in found:
            entry.path.unlink(missing_ok=True)
        (directory / ".lock").unlink(missing_ok=True)
    except OSError as error:
        print(program.failure(parser.prog, f"{error}; not everything is removed"), file=sys.stderr)
        return 1
    print(f"removed {total}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
