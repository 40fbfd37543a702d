"""``python -m rft_fast``: the list of commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .common import program


@program.command("")
def main(argv: Sequence[str]) -> int:
    """Print the commands; returns 0."""
    width = max(map(len, program.COMMANDS))
    lines = [f"  python -m rft_fast.{name:<{width}}  {what}" for name, what in program.COMMANDS.items()]
    parser = program.parser(
        "",
        description="Measure the straight path between a zero-shot CLIP model and a fine-tuned one.",
        epilog="\n".join(["commands, each with --help:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(argv)
    parser.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
