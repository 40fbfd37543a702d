"""``python -m rft_fast.report``: a run, or the differences of two runs, as one page."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from .. import report
from ..common import program
from ..common.words import some, visible
from ..names import RUNS


@program.command("report")
def main(argv: Sequence[str]) -> int:
    """Run the command; return 0, or 2 if it was refused."""
    parser = program.parser(
        "report",
        description="Write a run as one self-contained HTML page with text, interactive charts and sortable "
        "tables. With two runs, write their differences.",
    )
    parser.add_argument(
        "runs",
        type=pathlib.Path,
        nargs="*",
        metavar="RUN",
        help="the directory of a run (--out of the sweep), or of two to compare; default: the newest in "
        f"{RUNS}/",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        metavar="FILE",
        help="the page; default: report.html in the run, or comparison.html in the second run",
    )
    options = parser.parse_args(argv)
    try:
        found = options.runs or [_newest()]
        if len(found) > 2:
            raise ValueError(
                f"expected the directory of one run, or of two to compare, got {len(found)}: "
                f"{some(list(map(str, found)))}; run the command once for each"
            )
        if len(found) == 1:
            file = report.write(found[0], options.out)
        else:
            file = report.compare(found[0], found[1], options.out)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(program.failure(parser.prog, error), file=sys.stderr)
        return 2
    if len(found) == 2:
        print("compared " + " (A) with ".join(visible(str(run)) for run in found) + " (B)")
    elif not options.runs:
        print(f"run      {visible(str(found[0]))}, the newest in {RUNS}/")
    print(f"report   {file} ({file.stat().st_size / 1e6:.1f} MB, opens without a network)")
    print(program.next_step("python -m webbrowser", file.absolute().as_uri()))
    return 0


def _newest() -> pathlib.Path:
    """Return the run among those without a name that was measured last."""
    files = [file for file in pathlib.Path(RUNS).glob("*/rows.sqlite") if file.is_file()]
    if not files:
        raise ValueError(
            f"no directory of a run is named, and {pathlib.Path(RUNS).absolute()} holds none; name the "
            "directory that the sweep printed (its --out)"
        )
    return max(files, key=lambda file: (file.stat().st_mtime_ns, file)).parent


if __name__ == "__main__":
    sys.exit(main())
