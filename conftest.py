"""How many processes pytest takes: two by pyproject.toml, but not where that is wrong or impossible."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Lets pytest run, in one process, where pytest-xdist is not installed."""
    for option in ("--numprocesses", "--dist"):
        with suppress(ValueError):  # it is there
            parser.addoption(option, help="without pytest-xdist: ignored")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist's, which starts them
def pytest_cmdline_main(config: pytest.Config) -> None:
    """One process for benchmarks, which nothing may run beside, and for one file, which is not divided."""
    if hasattr(config, "workerinput"):
        return
    files = {Path(config.invocation_params.dir, argument.partition("::")[0]) for argument in config.args}
    benchmarks = any((config.rootpath / "benchmarks") in (file, *file.parents) for file in files)
    said = any(word.startswith(("-n", "--numprocesses")) for word in config.invocation_params.args)
    if benchmarks or (len(files) == 1 and all(file.is_file() for file in files) and not said):
        config.option.numprocesses = 0
