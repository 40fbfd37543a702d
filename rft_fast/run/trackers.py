"""A run in TensorBoard or Weights & Biases, through their own clients. docs/progress.md shows them.

Both get one curve over alpha for whatever a study measures apart: ``study/dataset/model``, then the layer,
the noise scale or the pruning where there is one, then the value.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import pandas as pd

from ..common import disk
from ..names import TRACKERS as NAMES
from ..names import TrackerName, never

VALUES = ("accuracy", "loss", "sharpness", "gain", "change")  # the columns that are logged
STEPS = 1000  # TensorBoard's steps are whole numbers: thousandths of alpha

_CLIENTS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


class Tracker(Protocol):
    """What gets the rows of a run."""

    def measured(self, study: str, model: str, number: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Logs the rows of one measurement. What it raises ends the tracking, not the run."""

    def close(self) -> None:
        """Hands over what is still to be logged. May be called more than once."""


def check(names: Sequence[TrackerName]) -> None:
    """Finds out early whether trackers can be opened; changes nothing.

    Raises:
        ValueError: a name that is not in :data:`NAMES`, or whose client is not installed.
    """
    for name in names:
        if name not in NAMES:
            raise ValueError(f"track: expected names among {', '.join(NAMES)}; got {name!r}")
        _client(name)


def open_trackers(
    names: Sequence[TrackerName], directory: pathlib.Path, config: Mapping[str, object], name: str
) -> list[Tracker]:
    """Opens trackers for a run.

    Args:
        names: among :data:`NAMES`; one that is named twice is opened once.
        directory: of the run; it exists. TensorBoard's files go to ``tensorboard/`` there, W&B's to
            ``wandb/``.
        config: the complete request, as JSON values. Its ``"date"``, when the run first started, tells
            W&B together with the directory which run is gone on with.
        name: of the run, to show.

    Raises:
        ValueError: as :func:`check`; and a client that refuses to open, with its reason.
    """
    check(names)
    try:
        disk.check_targets((), folders=[directory / name for name in names])
    except ValueError as error:
        raise ValueError(f"track: {error}") from None
    opened: list[Tracker] = []
    for which in dict.fromkeys(names):
        try:
            if which == "tensorboard":
                opened.append(TensorBoard(directory, config))
            elif which == "wandb":
                opened.append(WeightsAndBiases(directory, config, name))
            else:
                never(which)
        except Exception as error:  # whatever the clients raise
            for tracker in opened:
                tracker.close()
            remedy = "; log in (wandb login) or set WANDB_MODE=offline" if which == "wandb" else ""
            raise ValueError(
                f"track: {which} does not open: {type(error).__name__}: {error}{remedy}"
            ) from error
    return opened


class TensorBoard:
    """Scalars at step ``round(1000 * alpha)``, and the config as text.

    A resumed run adds to the same curves.
    """

    def __init__(self, directory: pathlib.Path, config: Mapping[str, object]) -> None:
        self._writer = _client("tensorboard").SummaryWriter(str(directory / "tensorboard"), flush_secs=10)
        text = json.dumps(config, indent=2, ensure_ascii=False, default=str)
        self._writer.add_text("config", "\n".join("    " + line for line in text.splitlines()))  # as code

    def measured(self, study: str, model: str, number: int, rows: Sequence[Mapping[str, object]]) -> None:
        for row in rows:
            alpha, values = _read(study, model, row)
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, round(STEPS * alpha))

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Every row as one entry of its run's history, with alpha as the axis of its charts.

    The client's own environment variables decide first: WANDB_MODE, WANDB_PROJECT and the rest.
    """

    def __init__(self, directory: pathlib.Path, config: Mapping[str, object], name: str) -> None:
        ours = {
            "project": ("WANDB_PROJECT", "rft_fast"),
            "name": ("WANDB_NAME", name),
            "dir": ("WANDB_DIR", str(directory)),
            "id": ("WANDB_RUN_ID", run_id(directory, config)),
            "resume": ("WANDB_RESUME", "allow"),
        }
        chosen = {what: value for what, (variable, value) in ours.items() if not os.environ.get(variable)}
        plain = json.loads(json.dumps(config, default=str))
        self._run = _client("wandb").init(config=plain, allow_val_change=True, **chosen)
        self._run.define_metric("alpha", hidden=True)
        self._studies: set[str] = set()

    def measured(self, study: str, model: str, number: int, rows: Sequence[Mapping[str, object]]) -> None:
        if study not in self._studies:
            self._studies.add(study)
            self._run.define_metric(f"{study}/*", step_metric="alpha")
        for row in rows:
            alpha, values = _read(study, model, row)
            if values:
                self._run.log({"alpha": alpha, **values})

    def close(self) -> None:
        self._run.finish()


def run_id(directory: pathlib.Path, config: Mapping[str, object]) -> str:
    """A name for a run that is the same when it is resumed: of its directory and its first date."""
    key = json.dumps([str(directory.absolute()), str(config.get("date", ""))])
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _client(name: str) -> Any:
    """The client's module.

    Raises:
        ValueError: it is not installed, or does not import.
    """
    try:
        module = importlib.import_module(_CLIENTS[name])
    except Exception as error:  # one that is installed but broken raises anything
        reason = f"{type(error).__name__}: {error}"
    else:
        if getattr(module, "__file__", None) is not None:
            return module
        reason = f"there is only a folder of its name, {next(iter(module.__path__))}"  # as W&B itself makes
    raise ValueError(f'track: {name} cannot be used ({reason}); pip install "rft-fast[track]"')


def _read(study: str, model: str, row: Mapping[str, object]) -> tuple[float, dict[str, float]]:
    """A row's alpha and its values, each under the name of its curve."""
    has = {name: value for name, value in row.items() if value is not None and value is not pd.NA}
    place = "/".join(_tag(str(part)) for part in (study, has["dataset"], model, *_apart(has)))
    return _number(has["alpha"]), {f"{place}/{name}": _number(has[name]) for name in VALUES if name in has}


def _apart(row: Mapping[str, object]) -> list[str]:
    """What tells a row's curve from others of the same study, data set and model."""
    if "method" in row:  # pruned: the layers' names together would be long
        parts = [str(row[name]) for name in ("criterion", "method") if name in row]
        parts += ["control"] if row.get("control") else []
        parts += [f"seed{row['seed']}"] if "seed" in row else []
        return ["-".join(parts)]
    layer = [str(row["layer"])] if "layer" in row else []
    rho = _number(row.get("rho", 0))
    return layer + ([f"rho{rho:g}"] if rho else [])


def _number(value: Any) -> float:
    return float(value)


def _tag(name: str) -> str:
    """A part of a curve's name, of the characters that both clients leave as they are."""
    return re.sub(r"[^-\w.]", "_", name)
