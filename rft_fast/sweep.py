"""``python -m rft_fast.sweep``: fine-tuned models through the paper's studies, on the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import options, program


@program.command("sweep")
def main(argv: Sequence[str]) -> int:
    """Runs a command line; ``argv`` without the program's name, left out for the process's own.

    Returns 0 when all is done, 1 when disk, memory or workers failed on the way, 130 when interrupted; what
    was measured until then is on disk, and the same command goes on from there. Exits with 2, as argparse
    does, for whatever is refused; that is always before the first measurement, with earlier rows untouched.
    """
    options.parser().parse_args(argv)  # help and typos do not wait for torch and the rest
    from .sweeping import sweep

    return sweep(argv)


if __name__ == "__main__":
    sys.exit(main())
