"""``python -m rft_fast``: the list of commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .common import program


@program.command("")
def main(argv: Sequence[str]) -> int:
    """Print the commands; returns 0."""
    commands = program.listed({program.called(name): what for name, what in program.COMMANDS.items()})
    parser = program.parser(
        "",
        description="Study the straight line in weight space between zero-shot and fine-tuned CLIP models.",
        epilog=f"commands, each with --help:\n{commands}",
    )
    parser.parse_args(argv)
    parser.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
