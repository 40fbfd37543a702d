"""How many processes pytest takes, and which tests: what pyproject.toml says, but for some arguments."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest

# OpenMP's threads sleep while they wait: two processes that spin take the cores from each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Lets pytest run, in one process, where pytest-xdist is not installed."""
    for option in ("--numprocesses", "--dist"):
        with suppress(ValueError):  # it is there
            parser.addoption(option, help="without pytest-xdist: ignored")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist's, which starts them
def pytest_cmdline_main(config: pytest.Config) -> None:
    """One process for benchmarks and for one file; all tests, also slow ones, where some are named."""
    if hasattr(config, "workerinput"):
        return

    def given(*options: str) -> bool:
        return any(str(word).startswith(options) for word in config.invocation_params.args)

    files = {Path(config.invocation_params.dir, argument.partition("::")[0]) for argument in config.args}
    benchmarks = any((config.rootpath / "benchmarks") in (file, *file.parents) for file in files)
    one = len(files) == 1 and all(file.is_file() for file in files)
    if benchmarks or (one and not given("-n", "--numproc")):
        config.option.numprocesses = 0
    if any("::" in argument for argument in config.args) and not given("-m"):
        config.option.markexpr = ""
