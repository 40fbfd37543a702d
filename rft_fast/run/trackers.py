"""Runs in TensorBoard and Weights & Biases, through their own clients; see docs/progress.md.

Each curve over alpha is named ``study/dataset/model``, followed by the layer, the noise scale or the pruning
if there is one, and by the value.
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
from ..studies.soups import STUDY as SOUPS

VALUES = ("accuracy", "loss", "sharpness", "gain", "change")  # logged columns
STEPS = 1000  # steps of TensorBoard, which are integers, per unit of alpha

_CLIENTS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


class Tracker(Protocol):
    """Receives the rows of a run."""

    def measured(self, study: str, model: str, number: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Log the rows of one measurement; an exception ends the tracking, not the run.

        Args:
            study: name of the study.
            model: name of the model.
            number: number of the measurement within study and model.
            rows: its rows, with the columns of :data:`rft_fast.studies.COLUMNS`.
        """

    def close(self) -> None:
        """Flush and close; repeated calls do nothing."""


def check(names: Sequence[TrackerName]) -> None:
    """Check that trackers can be opened, without side effects.

    Args:
        names: among :data:`NAMES`.

    Raises:
        ValueError: a name is unknown, or its client is not installed.
    """
    for name in names:
        if name not in NAMES:
            raise ValueError(f"track: expected names among {', '.join(NAMES)}; got {name!r}")
        _client(name)


def open_trackers(
    names: Sequence[TrackerName], directory: pathlib.Path, config: Mapping[str, object], name: str
) -> list[Tracker]:
    """Open trackers for a run.

    Args:
        names: among :data:`NAMES`; duplicates are ignored.
        directory: existing directory of the run. TensorBoard writes to ``tensorboard/`` in it, W&B to
            ``wandb/``.
        config: the run's configuration, as JSON values. Directory and ``"date"`` (of the first start)
            identify a resumed run to W&B.
        name: name of the run for display.

    Raises:
        ValueError: :func:`check` refuses the names, or a client cannot be opened, with the reason.
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
        except Exception as error:  # clients raise errors of any class
            for tracker in opened:
                tracker.close()
            remedy = "; log in (wandb login) or set WANDB_MODE=offline" if which == "wandb" else ""
            raise ValueError(
                f"track: {which} cannot be opened: {type(error).__name__}: {error}{remedy}"
            ) from error
    return opened


class TensorBoard:
    """Logs scalars at step ``round(1000 * alpha)``, and the configuration as text.

    A resumed run extends the same curves.

    Args:
        directory: directory of the run.
        config: the run's configuration.
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
    """Logs every row as one entry of the run's history, with alpha as the axis of the charts.

    The client's environment variables, such as WANDB_MODE and WANDB_PROJECT, take precedence.

    Args:
        directory: directory of the run.
        config: the run's configuration.
        name: name of the run for display.
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
    """Return an identifier of a run, from its directory and first date, that is the same when resumed."""
    key = json.dumps([str(directory.absolute()), str(config.get("date", ""))])
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _client(name: str) -> Any:
    """Import a client; raise ValueError if that fails."""
    try:
        module = importlib.import_module(_CLIENTS[name])
    except Exception as error:  # a broken installation raises errors of any class
        reason = f"{type(error).__name__}: {error}"
    else:
        if getattr(module, "__file__", None) is not None:
            return module
        reason = f"it is only a folder of that name, {next(iter(module.__path__))}"  # W&B creates one
    raise ValueError(f'track: {name} cannot be used ({reason}); pip install "rft-fast[track]"')


def _read(study: str, model: str, row: Mapping[str, object]) -> tuple[float, dict[str, float]]:
    """Return the alpha of a row, and its values by name of curve."""
    has = {name: value for name, value in row.items() if value is not None and value is not pd.NA}
    place = "/".join(_tag(str(part)) for part in (study, has["dataset"], model, *_apart(has)))
    return _number(has["alpha"]), {f"{place}/{name}": _number(has[name]) for name in VALUES if name in has}


def _apart(row: Mapping[str, object]) -> list[str]:
    """Return what distinguishes the curve of a row from others of its study, data set and model."""
    if "partners" in row:  # all names of a soup together would be long
        return [str(row["method"] if row["study"] == SOUPS else row["partners"])]
    if "method" in row or "control" in row:  # the layers' names together would be long
        parts = [str(row[name]) for name in ("criterion", "method", "coefficients") if name in row]
        parts += ["control"] if row.get("control") else []
        parts += [f"seed{row['seed']}"] if "seed" in row else []
        return ["-".join(parts)]
    layer = [str(row[name]) for name in ("cumulative", "coefficients", "layer") if name in row]
    rho = _number(row.get("rho", 0))
    return layer + ([f"rho{rho:g}"] if rho else [])


def _number(value: Any) -> float:
    return float(value)


def _tag(name: str) -> str:
    """Replace characters that one of the clients changes in names."""
    return re.sub(r"[^-\w.]", "_", name)
