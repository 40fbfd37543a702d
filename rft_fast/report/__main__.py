"""``python -m rft_fast.report``: a run, or the differences of two runs, as one page."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from .. import report
from ..common import program


@program.command("report")
def main(argv: Sequence[str]) -> int:
    """Run the command; return 0, or 2 if it was refused."""
    parser = program.parser(
        "report",
        description="Write a run as one self-contained HTML page with text, interactive charts and sortable "
        "tables. With two runs, write their differences.",
    )
    parser.add_argument("run", type=pathlib.Path, help="the directory of a run (--out of the sweep)")
    parser.add_argument("other", type=pathlib.Path, nargs="?", help="a second run, for a comparison")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        metavar="FILE",
        help="the page; default: report.html in the run, or comparison.html in the second run",
    )
    options = parser.parse_args(argv)
    try:
        if options.other is None:
            file = report.write(options.run, options.out)
        else:
            file = report.compare(options.run, options.other, options.out)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(program.failure(parser.prog, error), file=sys.stderr)
        return 2
    print(f"report   {file} ({file.stat().st_size / 1e6:.1f} MB, opens without a network)")
    print(program.next_step("python -m webbrowser", file.absolute().as_uri()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
