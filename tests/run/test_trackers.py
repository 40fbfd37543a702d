"""Rows in TensorBoard and Weights & Biases, read back from what their own clients wrote."""

from __future__ import annotations

import json
import math
import os
import struct
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import wandb
from support.wording import refused

from rft_fast.run import trackers

CONFIG = {"date": "2026-03-01T12:00:00+02:00", "alphas": [0.0, 0.5], "data": {"far": {"samples": 9}}}

# (study, model, rows), and what must be found: curve -> {alpha: value}.
ROWS: list[tuple[str, str, list[dict[str, object]]]] = [
    ("interpolation", "m 1", [
        {"dataset": "far/a", "layer": None, "alpha": 0.0, "rho": 0.0, "keep": 1.0, "accuracy": 0.5,
         "loss": 2.5, "gain": 0.0, "samples": 9, "sharpness": None, "change": pd.NA},
        {"dataset": "near", "layer": None, "alpha": 0.0, "rho": 0.0, "accuracy": 0.25, "loss": float("nan")},
    ]),
    ("interpolation", "m 1", [
        {"dataset": "far/a", "alpha": 0.333, "rho": 0.0, "accuracy": np.float64(0.625), "loss": float("inf"),
         "gain": 0.125},
    ]),
    ("layers", "m 1", [{"dataset": "near", "layer": "visual.conv1", "alpha": 1.0, "accuracy": 0.75}]),
    ("layer-sharpness", "m2", [
        {"dataset": "near", "layer": "visual.conv1", "alpha": 0.5, "rho": rho, "seed": 0,
         "sharpness": 0.5 * rho, "loss": 1.5}
        for rho in (0.5, 1.0)
    ]),
    ("prune", "m2", [
        {"dataset": "near", "layer": None, "alpha": 0.5, "rho": 0.0, "accuracy": 0.5,
         "change": 0.0, "method": None},
        {"dataset": "near", "layer": "visual.conv1, visual.proj", "alpha": 0.5, "rho": 0.0, "accuracy": 0.25,
         "change": -0.25, "method": "zero", "criterion": "sharpness", "control": False, "seed": 3},
        {"dataset": "near", "layer": "visual.ln_post", "alpha": 0.5, "rho": 0.0, "accuracy": 0.75,
         "change": 0.25, "method": "zero", "criterion": "sharpness", "control": True, "seed": 3},
    ]),
]  # fmt: skip

CURVES = {
    "interpolation/far_a/m_1/accuracy": {0.0: 0.5, 0.333: 0.625},
    "interpolation/far_a/m_1/loss": {0.0: 2.5, 0.333: math.inf},
    "interpolation/far_a/m_1/gain": {0.0: 0.0, 0.333: 0.125},
    "interpolation/near/m_1/accuracy": {0.0: 0.25},
    "interpolation/near/m_1/loss": {0.0: math.nan},
    "layers/near/m_1/visual.conv1/accuracy": {1.0: 0.75},
    "layer-sharpness/near/m2/visual.conv1/rho0.5/sharpness": {0.5: 0.25},
    "layer-sharpness/near/m2/visual.conv1/rho0.5/loss": {0.5: 1.5},
    "layer-sharpness/near/m2/visual.conv1/rho1/sharpness": {0.5: 0.5},
    "layer-sharpness/near/m2/visual.conv1/rho1/loss": {0.5: 1.5},
    "prune/near/m2/accuracy": {0.5: 0.5},
    "prune/near/m2/change": {0.5: 0.0},
    "prune/near/m2/sharpness-zero-seed3/accuracy": {0.5: 0.25},
    "prune/near/m2/sharpness-zero-seed3/change": {0.5: -0.25},
    "prune/near/m2/sharpness-zero-control-seed3/accuracy": {0.5: 0.75},
    "prune/near/m2/sharpness-zero-control-seed3/change": {0.5: 0.25},
}


def log(tracker: trackers.Tracker, which: slice = slice(None)) -> None:
    for number, (study, model, rows) in enumerate(ROWS[which]):
        tracker.measured(study, model, number, rows)
    tracker.close()
    tracker.close()  # no harm


# --- TensorBoard ---------------------------------------------------------------------------------


def read_tensorboard(directory: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory / "tensorboard"))
    found.Reload()
    return found


def scalars(found: Any) -> dict[str, dict[int, float]]:
    return {tag: {event.step: event.value for event in found.Scalars(tag)} for tag in found.Tags()["scalars"]}


def test_tensorboard_has_the_rows(tmp_path: Path) -> None:
    (tracker,) = trackers.open_trackers(["tensorboard", "tensorboard"], tmp_path, CONFIG, "run 1")
    log(tracker)
    found = read_tensorboard(tmp_path)
    # Every value here is one that float32, TensorBoard's type, holds exactly; steps are thousandths.
    wanted = {
        tag: {round(1000 * alpha): value for alpha, value in curve.items()} for tag, curve in CURVES.items()
    }
    assert_same(scalars(found), wanted)
    assert 333 in wanted["interpolation/far_a/m_1/gain"]
    (text,) = found.Tensors("config/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert all(line.startswith("    ") for line in lines)  # Markdown's code
    assert json.loads("\n".join(lines)) == CONFIG


def test_a_resumed_run_adds_to_the_same_curves_of_tensorboard(tmp_path: Path) -> None:
    for part in (slice(0, 1), slice(1, None)):
        log(trackers.open_trackers(["tensorboard"], tmp_path, CONFIG, "run")[0], part)
    assert len(list((tmp_path / "tensorboard").glob("events.out.*"))) == 2
    wanted = {
        tag: {round(1000 * alpha): value for alpha, value in curve.items()} for tag, curve in CURVES.items()
    }
    assert_same(scalars(read_tensorboard(tmp_path)), wanted)


def assert_same(found: Mapping[str, Mapping[Any, float]], wanted: Mapping[str, Mapping[Any, float]]) -> None:
    """Equal, with NaN equal to itself."""
    assert set(found) == set(wanted)
    for tag, curve in wanted.items():
        assert set(found[tag]) == set(curve), tag
        for at, value in curve.items():
            assert found[tag][at] == value or (math.isnan(value) and math.isnan(found[tag][at])), (tag, at)


# --- Weights & Biases ----------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """W&B without network, with nothing of the user's; were it to call anybody, nobody would answer."""

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    settings = {"MODE": "offline", "BASE_URL": "http://127.0.0.1:9", "SILENT": "true", "CONSOLE": "off",
                "ERROR_REPORTING": "false"}  # fmt: skip
    settings |= {
        name: str(tmp_path / name) for name in ("CACHE_DIR", "CONFIG_DIR", "DATA_DIR", "ARTIFACT_DIR")
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()  # it reads its variables once
    yield tmp_path
    wandb.teardown()


def read_wandb(directory: Path) -> list[Any]:
    """The records of all runs in a directory. The client's own process writes them, and ends first."""
    wandb.teardown()
    files = sorted(directory.glob("wandb/offline-run-*/*.wandb"))
    assert files
    return [record for file in files for record in records_of(file)]


def records_of(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format after a header of seven bytes.

    Blocks of 32 KiB with pieces of records: checksum, length, kind (1 whole, 2 first, 3 middle, 4 last).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block is padding
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def history(records: list[Any]) -> list[dict[str, float]]:
    """What was logged, an entry for each call, without W&B's own."""
    entries = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            entries.append({name: value for name, value in items.items() if not name.startswith("_")})
    return entries


@pytest.mark.slow
def test_wandb_has_the_rows(offline: Path) -> None:
    directory = offline / "run"
    directory.mkdir()
    (tracker,) = trackers.open_trackers(["wandb"], directory, CONFIG, "run 1")
    log(tracker)
    records = read_wandb(directory)
    entries = history(records)
    assert len(entries) == sum(len(rows) for _, _, rows in ROWS)  # one for each row
    curves: dict[str, dict[float, float]] = {}
    for entry in entries:
        alpha = entry.pop("alpha")
        for tag, value in entry.items():
            curves.setdefault(tag, {})[alpha] = value
    assert_same(curves, CURVES)

    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name) == ("rft_fast", "run 1")
    assert run.run_id == trackers.run_id(directory, CONFIG)
    config = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert {name: config[name] for name in CONFIG} == CONFIG
    axes = {
        record.metric.glob_name: record.metric.step_metric
        for record in records
        if record.WhichOneof("record_type") == "metric" and record.metric.glob_name
    }
    assert all(axes[f"{tag.split('/')[0]}/*"] == "alpha" for tag in CURVES)


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(offline: Path) -> None:
    directory = offline / "run"
    directory.mkdir()
    # The command may be another one; where the run stands and when it began are not.
    for config in (CONFIG, CONFIG | {"alphas": [0.0]}):
        log(trackers.open_trackers(["wandb"], directory, config, "run")[0], slice(0, 1))
        wandb.teardown()
    runs = [record.run for record in read_wandb(directory) if record.WhichOneof("record_type") == "run"]
    assert {run.run_id for run in runs} == {trackers.run_id(directory, CONFIG)}
    assert all(run.resume for run in runs)


def test_a_run_is_known_by_its_directory_and_its_first_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    known = trackers.run_id(tmp_path / "run", CONFIG)
    assert known == trackers.run_id(Path("run"), {"date": CONFIG["date"], "other": 1})
    assert known != trackers.run_id(tmp_path / "run2", CONFIG)
    assert known != trackers.run_id(tmp_path / "run", {"date": "2026-03-01T12:00:01+02:00"})


def test_wandbs_own_variables_decide_first(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = offline / "elsewhere"
    elsewhere.mkdir()
    for name, value in {
        "PROJECT": "mine",
        "NAME": "called so",
        "RUN_ID": "abc",
        "DIR": str(elsewhere),
    }.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    log(trackers.open_trackers(["wandb"], offline / "run", CONFIG, "run")[0], slice(0, 1))
    (run,) = [r.run for r in read_wandb(elsewhere) if r.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name, run.run_id) == ("mine", "called so", "abc")


# --- what is refused -----------------------------------------------------------------------------


def test_an_unknown_tracker_is_refused() -> None:
    with refused(ValueError, "mlflow"):
        trackers.check(["tensorboard", "mlflow"])


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_client_that_is_not_installed_is_refused(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for refuse in (
        lambda: trackers.check([name]),
        lambda: trackers.open_trackers([name], tmp_path, CONFIG, "run"),
    ):
        with refused(ValueError, name, "rft-fast[track]"):
            refuse()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_called_wandb_is_no_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # W&B makes one where it is run, and Python imports any folder.
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with refused(ValueError):
        trackers.check(["wandb"])
    sys.modules.pop("wandb", None)


def test_one_that_does_not_open_is_refused_and_the_others_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []

    def init(**_: object) -> None:
        raise RuntimeError("no API key")

    client = types.SimpleNamespace(init=init, __file__="wandb.py")
    monkeypatch.setitem(sys.modules, "wandb", client)
    monkeypatch.setattr(trackers.TensorBoard, "close", lambda self: closed.append(self))
    with refused(ValueError, "RuntimeError"):
        trackers.open_trackers(["tensorboard", "wandb"], tmp_path, CONFIG, "run")
    assert len(closed) == 1
