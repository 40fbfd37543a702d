"""A position for every layer: one write of a path against writes of one layer at a time, and its files."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.tiny_path import Net, State, assert_close, between, ends, positive, same_bits, snapshot
from support.wording import refused
from torch import nn

from rft_fast.kernels import Write
from rft_fast.path import Path
from rft_fast.path.coefficients import read_table

IMPLS = ["reference", "native", pytest.param("triton", marks=pytest.mark.emulated)]
TABLE = {"re:blocks\\.[2-9].*": 0.75, "head": 0.0, "embed": 1.0, "scale": -0.5, None: 0.3}


def of_layer(name: str, path: Path) -> float:
    """The position of a layer by TABLE, read by hand."""
    if name.startswith("blocks."):
        return 0.75 if len(name.split(".")[1]) == 1 and name[7] in "23456789" else 0.3
    return {"head": 0.0, "embed": 1.0, "scale": -0.5}.get(name, 0.3)


@pytest.fixture
def path() -> Path:
    return Path(Net(), *ends())


def recorded(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is submitted to the plan of the parameters: runs."""
    runs: list[Any] = []
    submit = path.writer.parameters.submit  # type: ignore[attr-defined]

    def record(write: Any, tensors: Sequence[tuple[int, int]] | None = None) -> None:
        runs.append(tensors)
        submit(write, tensors)

    monkeypatch.setattr(path.writer.parameters, "submit", record)  # type: ignore[attr-defined]
    return runs


# --- writing ------------------------------------------------------------------------------------


@pytest.mark.slow(only="noisy-triton")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("more", [{}, {"rho": 0.3, "seed": 5, "keep": 0.7}], ids=["plain", "noisy"])
def test_a_table_writes_what_layers_one_by_one_do(
    impl: Any, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, in one launch, whatever was there before."""
    path = Path(Net(), *ends(), impl=impl)
    path.write(0.3, **more)
    for layer in path.layers:
        path.write(of_layer(layer, path), layers=[layer], **more)
    one_by_one, checksum = snapshot(path.model), path.checksum()
    path.write(0.9)
    runs = recorded(path, monkeypatch)
    path.write(TABLE, **more)
    assert len(runs) == 1 and sum(last - first for first, last in runs[0]) == 36
    assert same_bits(snapshot(path.model), one_by_one) and path.checksum() == checksum
    assert path.alpha is None


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("alpha", [0.0, 0.37, 1.0, 1.3])
def test_equal_coefficients_are_interpolation(impl: Any, alpha: float) -> None:
    path = Path(Net(), *ends(), impl=impl)
    path.write(alpha)
    whole = snapshot(path.model)
    path.write(0.6)
    path.write({**dict.fromkeys(path.layers, alpha), None: alpha})
    assert same_bits(snapshot(path.model), whole) and path.alpha == alpha
    path.write({"re:.*": alpha, None: 0.6})  # what is in no layer differs
    assert path.alpha is None
    for name, tensor in path.model.state_dict().items():
        assert name.startswith("fixed.") or torch.equal(tensor, whole[name]), name


def test_a_table_interpolates_like_float64(path: Path) -> None:
    """Buffers follow their layer, integers come from its nearer end, and what is in no layer takes None's."""
    zeroshot, finetuned = ends()
    path.write(TABLE)
    expected: State = {}
    for name in zeroshot:
        layer = "embed" if name.startswith(("embed.", "head.weight")) else name.rpartition(".")[0] or name
        expected[name] = between(of_layer(layer, path), zeroshot, finetuned)[name]
    assert_close(path.model, expected)
    for name in ("embed.position_ids", "blocks.1.bn.num_batches_tracked", "blocks.3.bn.num_batches_tracked"):
        end = zeroshot if name.startswith("blocks.1.") else finetuned
        assert torch.equal(path.model.state_dict()[name], end[name])


def test_without_a_rest_what_is_in_no_layer_stays(path: Path) -> None:
    path.write(0.5)
    path.write({"re:.*": 0.25})
    zeroshot, finetuned = ends()
    for name, tensor in between(0.25, zeroshot, finetuned).items():
        alpha = 0.5 if name.startswith("fixed.") else 0.25
        tensor = between(alpha, zeroshot, finetuned)[name]
        torch.testing.assert_close(path.model.state_dict()[name].double(), tensor.double(), msg=name)


def test_a_table_of_some_layers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``layers``, only these are written, and only these need a position."""
    path.write(0.4)
    before = snapshot(path.model)
    runs = recorded(path, monkeypatch)
    path.write({"head": 0.8, None: 0.1}, layers=["scale", "head"])
    assert len(runs) == 1 and sum(last - first for first, last in runs[0]) == 2  # one weight is embed's
    zeroshot, finetuned = ends()
    for name, tensor in path.model.state_dict().items():
        if name in ("scale", "head.bias"):
            alpha = 0.1 if name == "scale" else 0.8
            torch.testing.assert_close(tensor, between(alpha, zeroshot, finetuned)[name].float())
        else:
            assert torch.equal(tensor, before[name]), name


def test_buffers_can_be_left(path: Path) -> None:
    path.write(0.5)
    before = snapshot(path.model)
    path.write({"re:blocks.*": 9.0, None: 1.0}, buffers=False)
    buffers = {name for name, _ in path.model.named_buffers()}
    for name, tensor in path.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name in buffers), name


# --- restoring ----------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [0.9, {"head": 0.2, None: 0.6}, {"re:.*": 0.1}, {"scale": 0.3, None: 0.3}])
def test_a_table_is_restored_bit_for_bit(path: Path, inside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one launch, with the layers that were apart from it."""
    path.write(TABLE, rho=0.1, seed=3)
    path.write(0.8, layers=["blocks.4.bn"])
    before, checksum = snapshot(path.model), path.checksum()
    with path.at(inside):
        path.write(0.1, 0.2, ["blocks.7.conv"])
        assert not same_bits(snapshot(path.model), before)
        runs = recorded(path, monkeypatch)
    assert len(runs) == 1
    assert same_bits(snapshot(path.model), before) and path.checksum() == checksum
    with path.perturbed({"head": 0.2, "scale": 0.1}, 0.5, layers=["scale", "head"]), path.at(0.5):
        pass
    assert same_bits(snapshot(path.model), before)


def test_a_table_is_undone_after_an_error(path: Path) -> None:
    path.write(0.37)
    before = snapshot(path.model)
    with pytest.raises(KeyboardInterrupt), path.at(TABLE):
        raise KeyboardInterrupt
    assert same_bits(snapshot(path.model), before) and path.alpha == 0.37


def test_an_interrupted_table_is_restored(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write(0.4)
    before = snapshot(path.model)
    plan = path.writer.parameters  # type: ignore[attr-defined]
    submit = plan.submit

    def interrupted(write: object, tensors: Sequence[tuple[int, int]] | None = None) -> None:
        submit(Write(0.123), tensors)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), path.at(0.8, ["scale"]), monkeypatch.context() as m:
        m.setattr(plan, "submit", interrupted)
        path.write({"scale": 0.8, None: 0.4})
    assert same_bits(snapshot(path.model), before)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "error", "facts"),
    [
        pytest.param({"blocks.1.con": 0.5, None: 0.1}, ValueError, ["blocks.1.con"], id="unknown"),
        pytest.param({"re:heads": 0.5, None: 0.1}, ValueError, ["re:heads"], id="no match"),
        pytest.param({"head": 0.5, "re:h.*": 0.1, None: 1}, ValueError, ["head", "re:h.*"], id="twice"),
        pytest.param({"head": 0.5}, ValueError, [24, "scale"], id="missing"),
        pytest.param({}, ValueError, [25], id="empty"),
        pytest.param({"fixed.running_var": 0.5, None: 0.1}, ValueError, ["fixed.running_var"], id="inert"),
        pytest.param({3: 0.5, None: 0.1}, TypeError, [3], id="key"),
        pytest.param({"head": "0.5", None: 0.1}, TypeError, ["head"], id="text"),
        pytest.param({"head": float("inf"), None: 0.1}, ValueError, ["head", "inf"], id="infinite"),
        pytest.param({"re:.*": 0.5, None: None}, TypeError, ["None"], id="rest"),
    ],
)
def test_tables_are_refused_before_anything_is_written(
    path: Path, table: Any, error: type[Exception], facts: list[object]
) -> None:
    path.write(0.4)
    before = path.checksum()
    for write in (path.write, lambda table: path.at(table).__enter__()):
        with refused(error, *facts):
            write(table)
    assert path.checksum() == before and path.alpha == 0.4


def test_variances_and_dtypes_are_held_by_layer() -> None:
    path = Path(Net(), positive(1), positive(2))
    before = path.checksum()
    with refused(ValueError, "blocks.3.bn.running_var", 50):
        path.write({"blocks.3.bn": 50.0, None: 0.5})
    assert path.checksum() == before
    path.write({"re:head|embed": 50.0, None: 0.5})  # which have none

    most = torch.finfo(torch.float16).max
    sides = [{"weight": torch.tensor([[-1.0, share * most]]), "bias": torch.ones(1)} for share in (0.5, 0.75)]
    half = Path(nn.Linear(2, 1).half(), *sides, granularity="tensor")
    half.write(1.5)
    bits = snapshot(half.model)
    with refused(ValueError, "weight (float16", 2.5):
        half.write({"weight": 2.5, "bias": 0.0})
    assert same_bits(snapshot(half.model), bits) and half.alpha == 1.5


# --- files --------------------------------------------------------------------------------------


def test_a_file_of_coefficients(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "table.toml"
    file.write_text("rest = 1\nvisual.conv1 = 0.5\n'visual.proj' = -0.25\n're:.*\\.mlp\\..*' = 0.0\n")
    assert read_table(file) == (
        (None, 1.0), ("visual.conv1", 0.5), ("visual.proj", -0.25), ("re:.*\\.mlp\\..*", 0.0),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        pytest.param("", ["table.toml"], id="empty"),
        pytest.param("rest = 0.5", ["table.toml"], id="no layer"),
        pytest.param("visual.conv1 = true", ["visual.conv1", "True"], id="bool"),
        pytest.param("visual.conv1 = nan", ["visual.conv1", "nan"], id="nan"),
        pytest.param("visual.conv1 = [0.5]", ["visual.conv1", "[0.5]"], id="list"),
        pytest.param("visual.conv1: 0.5", ["table.toml"], id="no toml"),
        pytest.param("a = 1\na = 2", ["table.toml"], id="key twice"),
        pytest.param(None, ["table.toml"], id="no file"),
    ],
)
def test_files_that_are_no_tables(tmp_path: pathlib.Path, text: str | None, facts: list[str]) -> None:
    file = tmp_path / "table.toml"
    if text is not None:
        file.write_text(text)
    with refused(ValueError, *facts):
        read_table(file)
