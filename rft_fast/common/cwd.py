"""The working directory, which must exist: the import of torch ends a process whose own was deleted."""

from __future__ import annotations

import os
import sys

GONE = "the working directory no longer exists (it was deleted or renamed); change to one that does"
REFUSED = 2  # exit status, as argparse's


def exists() -> bool:
    """Return whether the working directory exists."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def check() -> None:
    """Refuse a deleted working directory.

    Raises:
        SystemExit: in a command, with status 2.
        FileNotFoundError: elsewhere, unless torch is already imported.
    """
    if exists():
        return
    if sys.argv[:1] == ["-m"] or os.path.basename(sys.argv[0]).startswith("rft-"):
        print(f"rft_fast: error: {GONE}", file=sys.stderr)
        raise SystemExit(REFUSED)
    if "torch" not in sys.modules:
        raise FileNotFoundError(f"rft_fast: {GONE}")
