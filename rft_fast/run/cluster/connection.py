"""The connection to a Ray cluster, on this machine or by address."""

from __future__ import annotations

import importlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from ipaddress import ip_address
from typing import Any

import torch
from packaging.version import Version

from rft_fast import env

_ours = False  # whether this process has made the connection that there is


OLDEST = "2.59"  # of Ray's versions: the first whose local clusters ask for a token by default
# Ray's name for "no other machines": nodes then have the loopback address, and servers listen there alone.
_ALONE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def check() -> None:
    """Raises ValueError where Ray is missing or too old."""
    if find_spec("ray") is None:
        raise ValueError('argument --workers: Ray is not installed; pip install "rft-fast[cluster]"')
    if Version(found := version("ray")) < Version(OLDEST):
        raise ValueError(
            f"argument --workers: Ray {found} accepts commands from anybody who reaches its "
            f"ports; {OLDEST} or later, which requires a token, is needed: pip install -U "
            '"rft-fast[cluster]"'
        )


def device(workers: str, asked: str | None) -> torch.device:
    """The device of each worker: the requested one, else a GPU where the cluster has some.

    Raises:
        ValueError: no cluster answers, or there is no such device.
    """
    if is_local(workers):
        if asked == "cuda" and torch.cuda.is_available():
            return torch.device(asked)  # trying it here would take a worker's memory
        return torch.device(env.device(asked).type)
    connect(workers)
    has = int(client().cluster_resources().get("GPU", 0))
    if asked == "cuda" and not has:
        raise ValueError(f"argument --device: the cluster at {workers} has no GPUs; use --device cpu")
    return torch.device(asked or ("cuda" if has else "cpu"))


def client() -> Any:
    """The module ray, which takes a second to load."""
    return importlib.import_module("ray")


def is_local(workers: str) -> bool:
    return workers == "auto" or workers.isdecimal()


def connect(workers: str) -> None:
    """Starts a cluster on this machine, or connects to the named one, unless connected already.

    Raises:
        ValueError: no cluster answers.
    """
    global _ours
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked to be counted
    ray = client()
    if ray.is_initialized():
        return
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if is_local(workers):
            with _hangup_ignored(), _on_loopback():  # its processes belong to this terminal
                ray.init(
                    address="local",
                    include_dashboard=False,
                    dashboard_host="127.0.0.1",
                    configure_logging=False,
                    **quiet,
                )
            _check_loopback()
        else:
            ray.init(address=workers, **quiet)
    except Exception as error:  # Ray has many ways of not finding a cluster
        raise ValueError(
            f"argument --workers: no Ray cluster could be reached at {workers}: {reason(error)}. "
            "Is it running (ray start --head), with the same versions of Ray and Python? If it "
            "requires a token, does this process have it (RAY_AUTH_TOKEN)?"
        ) from error
    _ours = True


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Within it, a new cluster listens on 127.0.0.1 only."""
    constants: Any = importlib.import_module("ray._private.ray_constants")
    before, was = os.environ.get(_ALONE), constants.ENABLE_RAY_CLUSTER
    os.environ[_ALONE], constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:  # another cluster may be reached later
        constants.ENABLE_RAY_CLUSTER = was
        del os.environ[_ALONE]
        if before is not None:
            os.environ[_ALONE] = before


def _check_loopback() -> None:
    """Ends the cluster and raises RuntimeError where this version of Ray listens elsewhere, too."""
    addresses = [node["NodeManagerAddress"] for node in client().nodes()]
    if not all(ip_address(address).is_loopback for address in addresses):
        client().shutdown()
        raise RuntimeError(f"it listens on {', '.join(addresses)}, which other machines can reach")


@contextmanager
def _hangup_ignored() -> Iterator[None]:
    """Within it, new processes ignore the hangup of their terminal, so that a run stops in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def disconnect() -> None:
    """Undoes :func:`connect`. A connection from before stays."""
    global _ours
    if _ours:
        client().shutdown()
    _ours = False


def reason(error: BaseException) -> str:
    """The first line of an error that says something, and its last where the first ends in a colon.

    Ray's client says "Initialization failure from server:" and then a traceback, whose reason is last.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
