"""``python -m rft_fast.sweep``: fine-tuned models through the paper's studies, on the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .common import program
from .config.request import NotFetched, read, unfetched


@program.command("sweep")
def main(argv: Sequence[str]) -> int:
    """Runs a command line; ``argv`` without the program's name, left out for the process's own.

    Returns 0 when all is done, 1 when disk, memory or workers failed on the way, or the analysis of what was
    measured did, 130 when interrupted. What was measured until then is on disk; the same command resumes
    from there. Exits with 2, as argparse does, for whatever is refused; that is always before the first
    measurement, with earlier rows untouched.
    """
    try:
        request = read(argv)
        from .run.sweeping import (
            sweep,  # torch and the rest take seconds, which most mistakes need not wait for
        )
    except NotFetched as error:
        print(unfetched(error))
        print(program.next_step("sweep", *argv, "--fetch"))
        return 0
    except (OSError, RuntimeError, ValueError) as error:
        program.parser("sweep").error(str(error))
    except KeyboardInterrupt:
        print("\nsweep: interrupted; nothing was measured yet", file=sys.stderr)
        return program.INTERRUPTED
    return sweep(request, argv)


if __name__ == "__main__":
    sys.exit(main())
