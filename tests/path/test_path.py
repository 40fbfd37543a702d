"""Path against brute force: plain torch on the same weights, in float64."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support import PATIENCE
from support.tiny_path import Net, State, assert_close, between, ends, fill, positive, same_bits, snapshot
from support.wording import refused, said
from torch import Tensor, nn
from torch.nn.utils import prune

from rft_fast.kernels import Write, keep_mask_like, noise_like
from rft_fast.path import Path


def brute(
    model: nn.Module, zeroshot: State, finetuned: State, alpha: float, rho: float = 0.0,
    on: str = "finetuned", keep: float = 1.0, fill: str = "zero", noise: str = "normal",
    adaptive: bool = True, seed: int = 0, draw: int = 0, sign: int = 1,
) -> State:  # fmt: skip
    """Brute force in float64 of a whole-model write; only parameters are perturbed and pruned."""
    names = [name for name, _ in model.named_parameters()]
    like = [zeroshot[name] for name in names]
    eps = noise_like(like, seed, draw, noise, impl="reference")
    kept = keep_mask_like(like, keep, seed, impl="reference")
    expected = between(alpha, zeroshot, finetuned)
    for name, e, k in zip(names, eps, kept, strict=True):
        w0, w1 = zeroshot[name].double(), finetuned[name].double()
        w1 = torch.where(k, w1, torch.zeros_like(w1) if fill == "zero" else w0)
        step = sign * rho * e.double()
        if on == "finetuned":
            w = (1 - alpha) * w0 + alpha * (w1 + step * (w1.abs() if adaptive else 1))
        else:
            v = (1 - alpha) * w0 + alpha * w1
            w = v + step * (v.abs() if adaptive else 1)
        expected[name] = w
    return {**expected, "head.weight": expected["embed.weight"]}


@pytest.fixture
def zeroshot() -> State:
    return ends()[0]


@pytest.fixture
def finetuned() -> State:
    return ends()[1]


@pytest.fixture
def path(zeroshot: State, finetuned: State) -> Path:
    return Path(Net(), zeroshot, finetuned)


# --- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0, -0.2, 1.3])
def test_interpolates_like_float64(path: Path, zeroshot: State, finetuned: State, alpha: float) -> None:
    path.write(alpha)
    assert_close(path.model, between(alpha, zeroshot, finetuned))
    assert path.alpha == alpha


def test_the_ends_are_exact(path: Path, zeroshot: State, finetuned: State) -> None:
    assert same_bits(path.model.state_dict(), zeroshot)  # from the start
    path.write(1.0)
    assert same_bits(path.model.state_dict(), finetuned)


@pytest.mark.parametrize(
    "arguments",
    [
        {"rho": 0.1},
        {"rho": 0.5, "seed": 3, "draw": 4, "sign": -1},
        {"rho": 0.1, "on": "interpolated", "noise": "uniform"},
        {"rho": 0.1, "adaptive": False, "noise": "rademacher"},
        {"keep": 0.5, "seed": 9},
        {"keep": 0.5, "fill": "zeroshot", "rho": 0.2},
    ],
)
def test_perturbs_like_float64(
    path: Path, zeroshot: State, finetuned: State, arguments: dict[str, object]
) -> None:
    expected = brute(path.model, zeroshot, finetuned, 0.4, **arguments)  # type: ignore[arg-type]
    path.write(0.4, **arguments)  # type: ignore[arg-type]
    assert_close(path.model, expected)


def test_a_layer_alone_gets_the_noise_of_the_whole(path: Path) -> None:
    path.write(0.6, 0.2, seed=5)
    whole = snapshot(path.model)
    path.write(0.6)
    rest = snapshot(path.model)
    for layers in (["blocks.1.conv"], ["head", "blocks.3.bn", "blocks.9.conv"], path.layers):
        path.write(0.6)
        path.write(0.6, 0.2, layers, seed=5)
        for name, tensor in path.model.state_dict().items():
            layer = "embed" if name == "head.weight" else name.rpartition(".")[0] or name
            expected = whole if layer in layers else rest
            assert torch.equal(tensor, expected[name]), name


def test_layer_names_are_exact_and_patterns_are_whole(path: Path, zeroshot: State) -> None:
    path.write(1.0, layers=["blocks.1.conv"])
    changed = {n for n, t in path.model.state_dict().items() if not torch.equal(t, zeroshot[n])}
    assert changed == {"blocks.1.conv.weight"}
    path.write(1.0, layers=[r"re:blocks\.1\d?\.conv"])
    changed = {n for n, t in path.model.state_dict().items() if not torch.equal(t, zeroshot[n])}
    assert changed == {"blocks.1.conv.weight", "blocks.10.conv.weight"}
    path.write(0.5, layers=[])
    assert path.alpha is None


def test_batchnorm_statistics_follow_their_layer(path: Path, zeroshot: State, finetuned: State) -> None:
    path.write(0.7, 0.3, ["blocks.2.bn"])
    halfway, live = between(0.7, zeroshot, finetuned), path.model.state_dict()
    for name in live:
        if name.startswith("blocks.2.bn.running") or name == "blocks.2.bn.num_batches_tracked":
            torch.testing.assert_close(live[name].double(), halfway[name].double())  # no noise
        elif not name.startswith("blocks.2.bn."):
            assert torch.equal(live[name], zeroshot[name]), name
    assert not torch.allclose(live["blocks.2.bn.weight"].double(), halfway["blocks.2.bn.weight"])


def test_integers_are_copied_from_the_nearer_end(path: Path, zeroshot: State, finetuned: State) -> None:
    for alpha, end in ((0.49, zeroshot), (0.5, finetuned), (2.0, finetuned), (-1.0, zeroshot)):
        path.write(alpha)
        for name in ("embed.position_ids", "embed.mask", "blocks.0.bn.num_batches_tracked"):
            assert torch.equal(path.model.state_dict()[name], end[name]), (alpha, name)


def test_non_persistent_buffers_are_left_alone(zeroshot: State, finetuned: State) -> None:
    model = Net()
    model.embed.cache.fill_(3.0)
    Path(model, zeroshot, finetuned).write(0.5)
    assert model.embed.cache.tolist() == [3.0] * 3


def test_storage_never_moves(path: Path) -> None:
    def addresses() -> list[int]:
        return [tensor.data_ptr() for tensor in path.model.state_dict().values()]

    before = addresses()
    path.write(0.5, 0.1)
    with path.perturbed(0.2, 0.3, ["head"]), path.at(1.0):
        pass
    assert addresses() == before


def test_the_output_is_that_of_a_model_merged_by_hand(path: Path, zeroshot: State, finetuned: State) -> None:
    model, x = path.model.eval(), torch.randn(2, 5, 4, 4)
    for name in list(zeroshot):
        if name.endswith("running_var"):
            zeroshot[name].abs_()
            finetuned[name].abs_()
    with path.at(0.35), torch.no_grad():
        got = model(x)
    merged = Net().eval().double()
    merged.load_state_dict(between(0.35, zeroshot, finetuned))
    torch.testing.assert_close(got.double(), merged(x.double()).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_tensor_has_its_own_precision(dtype: torch.dtype, zeroshot: State, finetuned: State) -> None:
    half = {n: t.to(dtype) if t.is_floating_point() else t for n, t in finetuned.items()}
    path = Path(Net().to(dtype), zeroshot, half)
    path.write(0.25)
    for name, truth in between(0.25, zeroshot, half).items():
        assert torch.equal(path.model.state_dict()[name], truth.float().to(dtype)), name


def test_modules_serve_as_ends(zeroshot: State, finetuned: State) -> None:
    w0, w1 = Net(), Net()
    w0.load_state_dict(zeroshot)
    w1.load_state_dict(finetuned)
    path = Path(Net(), w0, w1)
    path.write(1.0)
    assert same_bits(path.model.state_dict(), finetuned)
    assert same_bits(w0.state_dict(), zeroshot)


def test_frozen_and_trainable_parameters_alike(path: Path, finetuned: State) -> None:
    model: Any = path.model.requires_grad_(False)
    model.head.requires_grad_(True)
    path.write(1.0)
    assert same_bits(model.state_dict(), finetuned)
    assert model.head.bias.requires_grad and model.head.bias.grad_fn is None


# --- layers -------------------------------------------------------------------------------------


def test_layers_and_what_is_left_out(path: Path) -> None:
    blocks = [f"blocks.{i}.{part}" for i in range(11) for part in ("conv", "bn")]
    assert path.layers == ["scale", *blocks, "embed", "head"]
    assert set(path.inert) == {f"fixed.{b}" for b in ("running_mean", "running_var",
                                                      "num_batches_tracked")}  # fmt: skip
    assert "module has no parameters" in path.inert["fixed.running_mean"]


def test_tied_parameters_are_written_once(zeroshot: State, finetuned: State) -> None:
    path = Path(Net(), zeroshot, finetuned, granularity="tensor")
    assert "head.weight" not in path.layers
    assert path.inert["head.weight"] == "it is embed.weight by another name, written there"
    path.write(1.0, layers=["embed.weight"])
    assert torch.equal(path.model.state_dict()["head.weight"], finetuned["head.weight"])
    # The head's bias would draw other noise if the tied weight counted twice.
    path.write(0.4, 0.1)
    assert_close(path.model, brute(path.model, zeroshot, finetuned, 0.4, 0.1))


def test_granularities(zeroshot: State, finetuned: State) -> None:
    path = Path(Net(), zeroshot, finetuned, granularity="block")
    assert path.layers == ["scale", *(f"blocks.{i}" for i in range(11)), "embed", "head"]
    path.write(1.0, layers=["blocks.1"])
    for name, tensor in path.model.state_dict().items():
        end = finetuned if name.startswith("blocks.1.") else zeroshot
        assert torch.equal(tensor, end[name]), name


def test_layers_of_zeros_are_inert(zeroshot: State, finetuned: State) -> None:
    for end in (zeroshot, finetuned):
        end["head.bias"].zero_()
        end["blocks.0.bn.weight"].zero_()  # its buffers still differ: not inert
        end["blocks.0.bn.bias"].zero_()
        end["blocks.1.conv.weight"].zero_()
    zeroshot["blocks.2.conv.weight"].zero_()  # at one end only: not inert
    path = Path(Net(), zeroshot, finetuned, inert=["scale", r"re:blocks\.10\..*"])
    assert {"head", "blocks.1.conv", "scale", "blocks.10.conv", "blocks.10.bn"} <= set(path.inert)
    assert not set(path.inert) & set(path.layers)
    assert {"blocks.0.bn", "blocks.2.conv", "blocks.1.bn"} <= set(path.layers)
    said("\n".join(path.inert[layer] for layer in ("head", "scale")), "inert=")
    path.write(1.0)  # reaches inert layers, too
    assert same_bits(path.model.state_dict(), finetuned)
    with refused(ValueError, "Path.write", "scale", "inert="):
        path.write(0.5, layers=["head_", "scale"])
    with refused(ValueError, "re:scale"):  # patterns do not reach them
        path.write(0.5, layers=["re:scale"])


def test_distance_counts_each_weight_that_matters_once(zeroshot: State, finetuned: State) -> None:
    path = Path(Net(), zeroshot, finetuned, inert=["re:.*bn"])
    named = dict(path.model.named_parameters())  # tied ones once, buffers not at all
    mine = [name for name in named if ".bn." not in name]
    assert 0 < len(mine) < len(named)
    squares = sum(float((finetuned[name].double() - zeroshot[name].double()).square().sum()) for name in mine)
    assert path.distance == pytest.approx(squares**0.5, rel=1e-12)
    big = nn.Linear(300, 200)  # more than one piece
    ends = [{"weight": torch.full((200, 300), x), "bias": torch.zeros(200)} for x in (0.0, 0.5)]
    assert Path(big, *ends).distance == pytest.approx(0.5 * 60_000**0.5, rel=1e-12)
    with pytest.warns(UserWarning):
        assert Path(big, ends[1], ends[1]).distance == 0.0


def test_alpha_is_none_when_mixed(path: Path) -> None:
    path.write(0.4)
    path.write(0.4, 0.1, ["head"])
    assert path.alpha == 0.4
    path.write(0.5, layers=["head"])
    assert path.alpha is None
    path.write(0.4, layers=["head"])
    assert path.alpha == 0.4


def test_alpha_is_that_of_layers_written_one_by_one(zeroshot: State, finetuned: State) -> None:
    for end in (zeroshot, finetuned):
        for name in [name for name in end if name.startswith("fixed.")]:
            del end[name]

    def net() -> Net:
        model = Net()
        model.fixed = nn.BatchNorm1d(7, affine=False, track_running_stats=False)
        return model

    path = Path(net(), zeroshot, finetuned)
    for layer in path.layers:
        assert path.alpha == (0.0 if layer == path.layers[0] else None)
        path.write(0.7, layers=[layer])
    assert path.alpha == 0.7
    with path.at(0.2, ["head"]):
        assert path.alpha is None
    assert path.alpha == 0.7

    path = Path(net(), zeroshot, finetuned, inert=["scale"])  # which stays at zero-shot
    path.write(0.7, layers=path.layers)
    assert path.alpha is None


# --- restoring ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [None, ["head", "blocks.4.bn"]])
def test_restored_bit_for_bit(path: Path, layers: list[str] | None) -> None:
    path.write(0.37, 0.2, seed=11, keep=0.8)
    path.write(0.9, 0.1, ["blocks.4.bn", "embed"], seed=12)
    before, checksum = snapshot(path.model), path.checksum()
    with path.perturbed(0.5, 0.3, layers, draw=2) as entered:
        assert entered is path
        assert not same_bits(snapshot(path.model), before)
        path.write(0.1, layers=["blocks.7.conv"])  # further writes inside are undone, too
    assert same_bits(snapshot(path.model), before)
    assert path.checksum() == checksum
    assert path.alpha is None


def test_restored_after_exceptions(path: Path) -> None:
    path.write(0.37, 0.2)
    before = snapshot(path.model)
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), path.at(0.8):
            path.write(0.1, 0.5, ["head"])
            raise error
        assert same_bits(snapshot(path.model), before)
    with pytest.raises(ValueError, match="unknown"), path.at(0.8):
        with refused(ValueError, "rho", -1.0):
            path.write(0.1, -1.0)
        assert path.alpha == 0.8  # a refused write changes nothing
        raise ValueError("unknown")
    assert same_bits(snapshot(path.model), before)


def test_restored_when_nested(path: Path) -> None:
    states = [snapshot(path.model)]
    with path.at(0.4):
        states.append(snapshot(path.model))
        with path.perturbed(0.4, 0.1, ["head"]):
            states.append(snapshot(path.model))
            with path.at(0.7, ["head", "embed"]):
                path.write(1.0)
            assert same_bits(snapshot(path.model), states[2])
        assert same_bits(snapshot(path.model), states[1])
        assert path.alpha == 0.4
    assert same_bits(snapshot(path.model), states[0])


def test_an_interrupted_write_is_restored(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write(0.4)
    before = snapshot(path.model)

    def interrupted(write: Write, tensors: Sequence[tuple[int, int]] | None = None) -> None:
        submit(Write(0.123), tensors)  # half-written weights are neither here nor there
        raise KeyboardInterrupt

    submit = path.writer.parameters.submit
    for layers in (None, ["head", "scale"]):
        with pytest.raises(KeyboardInterrupt), path.at(0.8, ["scale"]), monkeypatch.context() as m:
            m.setattr(path.writer.parameters, "submit", interrupted)
            # The same numbers as before entry: the state must not look restored already.
            path.write(0.4, layers=layers)
        assert same_bits(snapshot(path.model), before)

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as m:
        m.setattr(path.writer.parameters, "submit", interrupted)
        path.write(0.9)
    assert path.alpha is None
    with refused(RuntimeError), path.at(0.5):
        pass
    path.write(0.4)
    assert same_bits(snapshot(path.model), before)


def test_only_what_changed_is_written_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[object] = []
    submit = path.writer.parameters.submit

    def recorded(write: Write, tensors: Sequence[tuple[int, int]] | None = None) -> None:
        runs.append(tensors)
        submit(write, tensors)

    monkeypatch.setattr(path.writer.parameters, "submit", recorded)
    path.write(0.5)
    rows = len(list(path.model.parameters()))
    with path.perturbed(0.5, 0.1, ["scale", "blocks.0.conv", "blocks.1.conv"]):
        path.write(0.5, layers=["blocks.2.conv"])  # as it was: nothing left to do for it
        path.write(0.7, layers=["blocks.3.conv"])
    assert runs[:2] == [[(0, rows)], [(0, 2), (4, 5)]]
    assert runs[2:] == [[(7, 8)], [(10, 11)], [(0, 2), (4, 5), (10, 11)]]


@pytest.mark.parametrize("layers", [None, ["blocks.4.bn", "head"]])
@pytest.mark.parametrize("enter", ["at", "perturbed"])
def test_what_is_no_write_is_undone_from_an_equal_state_too(
    path: Path, enter: str, layers: list[str] | None
) -> None:
    """BatchNorm's statistics move in training, and an optimiser steps, while no write is to be undone."""
    model: Any = path.model.train()
    path.write(0.4)
    before, checksum = snapshot(path.model), path.checksum()
    same = path.at(0.4, layers) if enter == "at" else path.perturbed(0.4, 0.0, layers)
    with same, torch.no_grad():
        if layers is None:
            model(torch.randn(2, 5, 4, 4))
        model.blocks[4].bn.running_mean.add_(1)
        model.head.bias.zero_()
        with path.at(0.4, ["head"]):
            assert torch.equal(model.head.bias, before["head.bias"])
            model.head.bias.fill_(3)
        assert path.alpha == 0.4
    assert same_bits(snapshot(path.model), before) and path.checksum() == checksum
    assert path.alpha == 0.4


# --- weights, selections, and weights on loan -----------------------------------------------------


def test_weights_are_the_live_ones_with_their_ends_in_the_order_of_their_noise(
    path: Path, zeroshot: State, finetuned: State
) -> None:
    weights = path.weights()
    assert [w.name for w in weights] == [name for name, _ in path.model.named_parameters()]
    for weight, live in zip(weights, path.model.parameters(), strict=True):
        assert weight.live is live
        assert torch.equal(weight.zeroshot, zeroshot[weight.name])
        assert torch.equal(weight.finetuned, finetuned[weight.name])
    eps = noise_like([w.live for w in weights], 7, 3, "normal", impl="reference")
    path.write(0.4, 0.2, seed=7, draw=3, on="interpolated")
    for weight, e in zip(weights, eps, strict=True):
        v = 0.6 * weight.zeroshot.double() + 0.4 * weight.finetuned.double()
        expected = v + 0.2 * v.abs() * e.double()
        torch.testing.assert_close(weight.live.double(), expected, rtol=2e-6, atol=2e-6)


def test_weights_of_layers_come_in_the_order_of_the_model(path: Path) -> None:
    some = path.weights(["head", "blocks.2.bn", "scale", "head"])
    assert [w.name for w in some] == ["scale", "blocks.2.bn.weight", "blocks.2.bn.bias", "head.bias"]
    assert [w.name for w in path.weights(["embed"])] == ["embed.weight"]  # tied: once, no buffers
    assert path.weights([]) == []
    with refused(ValueError, "hed"):
        path.weights(["hed"])


def test_weights_of_inert_layers_are_among_all(zeroshot: State, finetuned: State) -> None:
    path = Path(Net(), zeroshot, finetuned, inert=["scale"])
    assert path.weights()[0].name == "scale" and "scale" not in path.layers
    with refused(ValueError, "scale"):
        path.weights(["scale"])


def test_select_reads_layers_as_write_does(path: Path) -> None:
    assert path.select(None) == path.layers and path.select(None) is not path.layers
    assert path.select(["head", "scale", "head"]) == ["head", "scale"]
    assert path.select([r"re:blocks\.1\d?\.bn"]) == ["blocks.1.bn", "blocks.10.bn"]
    assert path.select([]) == []
    for wrong in ("head", 3):
        with refused(TypeError, wrong):
            path.select(wrong)  # type: ignore[arg-type]
    with refused(ValueError, "'blocks.1'", "blocks.1.conv"):
        path.select(["blocks.1"])


def test_tensors_of_a_layer_are_all_that_is_written_with_it(path: Path) -> None:
    model: Any = path.model
    for layer in path.layers:
        path.write(0.0)
        before = snapshot(path.model)
        path.write(1.0, layers=[layer])
        changed = {n for n, t in path.model.state_dict().items() if not torch.equal(t, before[n])}
        held = {id(t) for t in path.tensors(layer)}
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
        assert {n for n, t in named if id(t) in held} >= changed, layer
    bn = model.blocks[4].bn
    expected = [bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.num_batches_tracked]
    assert {id(t) for t in path.tensors("blocks.4.bn")} == {id(t) for t in expected}
    with refused(ValueError, "blocks.44.bn"):
        path.tensors("blocks.44.bn")


@pytest.mark.parametrize("layers", [None, ["head", "blocks.4.bn"]])
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_borrowed_weights_come_back(path: Path, layers: list[str] | None, error: Any) -> None:
    path.write(0.37, 0.2, seed=11, keep=0.8)
    path.write(0.9, 0.1, ["blocks.4.bn", "embed"], seed=12)
    before, checksum = snapshot(path.model), path.checksum()

    def loan() -> None:
        with path.borrowed(layers) as weights:
            assert [w.name for w in weights] == [w.name for w in path.weights(layers)]
            assert same_bits(snapshot(path.model), before)  # borrowing changes nothing
            assert path.alpha is None
            for weight in weights:
                weight.live.data.normal_()
            for entered in (path.at(0.5), path.perturbed(0.5, 0.1, ["head"]), path.borrowed()):
                with refused(RuntimeError):
                    entered.__enter__()
            assert path.checksum() != checksum
            if error is not None:
                raise error

    if error is None:
        loan()
    else:
        with pytest.raises(error):
            loan()
    assert same_bits(snapshot(path.model), before) and path.checksum() == checksum
    with path.at(0.5):
        assert path.alpha == 0.5
    assert path.checksum() == checksum


def test_writes_while_weights_are_borrowed_are_undone_too(path: Path) -> None:
    path.write(0.4)
    checksum = path.checksum()
    with path.borrowed(["head"]) as weights:
        weights[0].live.data.fill_(3.0)
        path.write(0.8, layers=["scale", "head"])
        path.write(0.1)
        assert path.alpha == 0.1
    assert path.checksum() == checksum and path.alpha == 0.4
    with refused(ValueError, "hed"), path.borrowed(["hed"]):
        pass
    assert path.alpha == 0.4


def test_a_model_that_was_moved_cannot_be_borrowed(path: Path) -> None:
    model: Any = path.model
    model.head.bias.data = model.head.bias.data.clone()
    for layers in (None, ["head"]):
        with refused(RuntimeError, "head.bias"), path.borrowed(layers):
            pass
    with path.borrowed(["scale"]) as weights:
        weights[0].live.data.fill_(3.0)
    assert path.alpha == 0.0


# --- checksum -----------------------------------------------------------------------------------


def test_checksum_sees_every_change(path: Path) -> None:
    seen = {path.checksum()}
    assert path.checksum() in seen

    def is_new() -> bool:
        checksum = path.checksum()
        new = checksum not in seen
        seen.add(checksum)
        return new and 0 <= checksum < 2**64

    model: Any = path.model
    with torch.no_grad():
        model.head.bias[3] = torch.nextafter(model.head.bias[3], torch.tensor(9.0))
        assert is_new()
        model.head.bias[:2] = model.head.bias[:2].flip(0)  # swapped values
        assert is_new()
        conv = model.blocks[0].conv.weight
        conv.copy_(conv.flip(0))
        assert is_new()
        a, b = model.blocks[1].bn.weight, model.blocks[1].bn.bias  # swapped between tensors
        a.data, b.data = b.clone(), a.clone()
        assert is_new()
        model.scale.zero_()
        assert is_new()
        model.scale.neg_()  # -0.0 has other bits
        assert is_new()
        model.embed.position_ids[0] += 1
        assert is_new()
        model.embed.cache[0] = 5.0
        assert is_new()


def test_checksum_of_large_and_odd_tensors() -> None:
    model: Any = nn.ParameterList(
        [torch.arange(100_003.0), torch.zeros(0), torch.ones(3, dtype=torch.bfloat16)]
    )
    path = Path(model, copy.deepcopy(model), copy.deepcopy(model))
    first = path.checksum()
    with torch.no_grad():
        model[0][[5, 5 + 2**15, 100_002]] = model[0][[5 + 2**15, 5, 100_002]]  # across chunks
        assert path.checksum() != first
    path.write(0.3)
    assert path.checksum() == first


# --- refusals -----------------------------------------------------------------------------------


def refuses(model: nn.Module, zeroshot: object, finetuned: object, *facts: str) -> None:
    before = snapshot(model) if isinstance(model, Net) and not is_meta(model) else None
    with refused(ValueError, *facts):
        Path(model, zeroshot, finetuned)  # type: ignore[arg-type]
    assert before is None or same_bits(before, snapshot(model))


def is_meta(model: nn.Module) -> bool:
    return any(p.is_meta for p in model.parameters())


def test_refuses_names_shapes_and_kinds_all_at_once(zeroshot: State, finetuned: State) -> None:
    del zeroshot["blocks.3.bn.bias"]
    for i in range(6):
        zeroshot[f"extra.{i}"] = torch.zeros(1)
    finetuned["head.bias"] = torch.zeros(8)
    finetuned["scale"] = torch.tensor(2)
    finetuned["embed.position_ids"] = finetuned["embed.position_ids"].int()
    finetuned["blocks.0.conv.weight"] = finetuned["blocks.0.conv.weight"].double()
    finetuned["blocks.4.conv.weight"][0, 0, 0, 0] = float("nan")
    finetuned["blocks.5.bn.running_var"][1] = float("-inf")
    finetuned["_extra_state"] = {}  # type: ignore[assignment]
    finetuned["embed.mask"] = "yes"  # type: ignore[assignment]
    refuses(
        Net(),
        zeroshot,
        finetuned,
        "blocks.3.bn.bias",
        "(6): extra.0, extra.1, extra.2, extra.3 and 2 more",
        "(1): head.bias (expected [7], got [8])",
        "(2): scale (expected float32, got int64), embed.position_ids (expected int64, got int32)",
        "(1): blocks.0.conv.weight (float64)",
        "(2): blocks.4.conv.weight, blocks.5.bn.running_var",
        "(1): _extra_state",
        "(1): embed.mask (str)",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_refuses_non_finite_weights_wherever_they_are(value: float, dtype: torch.dtype) -> None:
    for at in (0, 50, 1000):
        model = nn.ParameterList([torch.zeros(1001)])
        bad = torch.zeros(1001, dtype=dtype)
        bad[at] = value
        refuses(model, {"0": bad}, {"0": torch.zeros(1001)}, "zeroshot", "(1): 0")


def test_refuses_tied_names_that_disagree(zeroshot: State, finetuned: State) -> None:
    finetuned["head.weight"] = finetuned["head.weight"] + 1
    refuses(Net(), zeroshot, finetuned, "finetuned", "embed.weight and head.weight")
    del finetuned["head.weight"]
    refuses(Net(), zeroshot, finetuned, "finetuned", "(1): head.weight")


def test_refuses_shared_memory(zeroshot: State, finetuned: State) -> None:
    model = Net()
    model.load_state_dict(zeroshot)
    refuses(model, model, finetuned, "zeroshot", "scale")
    inside = torch.zeros(20)
    model.head.bias = nn.Parameter(inside[:7])
    finetuned["scale"] = inside[6]  # a view of the last live number
    refuses(model, zeroshot, finetuned, "finetuned", "(1): scale")
    finetuned["scale"] = inside[7]  # its neighbour is free
    Path(model, zeroshot, finetuned)
    model.embed.bias = nn.Parameter(inside[2:9])
    for end in (zeroshot, finetuned):
        end["embed.bias"] = torch.zeros(7)
    finetuned["scale"] = torch.tensor(1.0)
    refuses(model, zeroshot, finetuned, "(1): head.bias and embed.bias")
    zeroshot["head.bias"] = finetuned["head.bias"]  # the ends may share
    del model.embed.bias, zeroshot["embed.bias"], finetuned["embed.bias"]
    Path(model, zeroshot, finetuned)


def test_refuses_memory_it_cannot_write(zeroshot: State, finetuned: State) -> None:
    refuses(Net().to(memory_format=torch.channels_last), zeroshot, finetuned, "(11): blocks.0.conv.weight")
    refuses(Net().to("meta"), zeroshot, finetuned, "meta")
    refuses(Net().double(), zeroshot, finetuned, "scale (float64)")
    lazy = nn.LazyLinear(3)
    refuses(lazy, {"weight": torch.ones(3, 2), "bias": torch.ones(3)}, lazy, "(2): weight, bias")
    refuses(Net(), Net().to("meta"), finetuned, "zeroshot", "meta")
    finetuned["embed.weight"] = finetuned["embed.weight"].t().contiguous().t()
    refuses(Net(), zeroshot, finetuned, "finetuned", "(1): embed.weight")
    finetuned["embed.weight"] = finetuned["embed.weight"].to_sparse()
    refuses(Net(), zeroshot, finetuned, "finetuned", "(1): embed.weight")


@pytest.mark.parametrize("left", [0, 8])
def test_refuses_memory_that_was_freed(zeroshot: State, finetuned: State, left: int) -> None:
    def freed(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().clone()
        tensor.untyped_storage().resize_(left)
        return tensor

    for end, label in ((zeroshot, "zeroshot"), (finetuned, "finetuned")):
        bad = {**end, "head.bias": freed(end["head.bias"]), "embed.position_ids": freed(torch.arange(7))}
        both = {"zeroshot": zeroshot, "finetuned": finetuned, label: bad}
        refuses(Net(), *both.values(), label, "(2): head.bias, embed.position_ids")
    model = Net()
    model.blocks[1].conv.weight.untyped_storage().resize_(left)  # type: ignore[union-attr, operator]
    with refused(ValueError, "(1): blocks.1.conv.weight"):
        Path(model, zeroshot, finetuned)


@pytest.mark.parametrize("of", ["live", "zeroshot", "finetuned"])
@pytest.mark.parametrize("again", [False, True])
def test_refuses_memory_that_is_freed_later(path: Path, of: str, again: bool) -> None:
    path.write(0.4)
    (weight,) = path.weights(["scale"])
    storage = getattr(weight, of).untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    taken = [torch.zeros(1) for _ in range(100)]  # what was freed
    if again:
        storage.resize_(size)  # somewhere else
    for layers in (None, ["scale"], ["head", "scale"]):
        with refused(RuntimeError, "Path.write", "scale"):
            path.write(0.5, layers=layers)
        with refused(RuntimeError, "scale"), path.at(0.5, layers):
            pass
    assert path.alpha == 0.4 and not any(taken)
    path.write(0.5, layers=["head"])


def test_refuses_other_types(zeroshot: State, finetuned: State) -> None:
    with refused(TypeError, "nn.Module", "int"):
        Path(3, zeroshot, finetuned)  # type: ignore[arg-type]
    with refused(TypeError, "finetuned", "str"):
        Path(Net(), zeroshot, "model.pt")  # type: ignore[arg-type]
    with refused(ValueError):
        Path(nn.ReLU(), {}, {})
    path = Path(Net(), zeroshot, finetuned)
    for duplicate in (copy.deepcopy, copy.copy, pickle.dumps):
        with refused(TypeError):
            duplicate(path)
    with refused(ValueError, "inert", "heed", "head"):
        Path(Net(), zeroshot, finetuned, inert=["heed"])
    with refused(ValueError, "granularity", "modules"):
        Path(Net(), zeroshot, finetuned, granularity="modules")
    with refused(ValueError, "impl", "fast"):
        Path(Net(), zeroshot, finetuned, impl="fast")


def test_write_refuses_before_it_writes(path: Path) -> None:
    path.write(0.4)
    before = path.checksum()
    with refused(ValueError, "blocks.1.con", "blocks.1.conv"):
        path.write(0.5, layers=["head", "blocks.1.con"])
    with refused(TypeError, "head"):
        path.write(0.5, layers="head")
    with refused(TypeError, 3):
        path.write(0.5, layers=3)  # type: ignore[arg-type]
    with refused(TypeError):
        path.write(0.5, layers=[["head"]])  # type: ignore[list-item]
    for arguments in ({"rho": -0.1}, {"keep": 1.5}, {"on": "both"}, {"alpha": float("nan")}):
        with refused(ValueError, *arguments):
            path.write(**{"alpha": 0.5, **arguments})  # type: ignore[arg-type]
    assert path.checksum() == before
    assert path.alpha == 0.4


def test_refuses_a_model_that_was_moved(zeroshot: State, finetuned: State) -> None:
    def rebind(model: Net) -> None:
        model.head.bias.data = model.head.bias.data.clone()

    def replace(model: Net) -> None:
        model.head = nn.Linear(5, 7)

    def assign(model: Net) -> None:
        model.load_state_dict(copy.deepcopy(zeroshot), assign=True)

    def cast(model: Net) -> None:
        model.half()

    # The last two leave it at its address.

    def repeat(model: Net) -> None:
        model.head.bias.data = model.head.bias.data[:1].expand(7)

    def cut(model: Net) -> None:
        model.head.bias.data = model.head.bias.data[:3]

    for change in (rebind, replace, assign, cast, repeat, cut):
        path = Path(Net(), zeroshot, finetuned)
        change(path.model)  # type: ignore[arg-type]
        for layers in (None, ["head"], ["scale", "head"]):
            with refused(RuntimeError, "Path.write"):
                path.write(0.5, layers=layers)
        assert path.alpha == 0.0
    path = Path(Net(), zeroshot, finetuned)
    rebind(path.model)  # type: ignore[arg-type]
    path.write(0.5, layers=["embed"])  # what still lies where it was can be written
    conv: Any = path.model.blocks[0].conv  # type: ignore[union-attr, index]
    conv.weight.data = conv.weight.data.transpose(0, 1)
    with refused(RuntimeError, "blocks.0.conv.weight"):
        path.write(0.5, layers=["blocks.0.conv"])
    path = Path(Net().half(), zeroshot, finetuned)
    bias: Any = path.model.head.bias
    bias.data = bias.data.view(torch.bfloat16)
    with refused(RuntimeError, "head.bias"):
        path.write(0.5)


# --- memory -------------------------------------------------------------------------------------

MEMORY = """
import copy, torch
from torch import nn
from rft_fast.path import Path

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024

torch.set_num_threads(1)
def make(value):
    return nn.ParameterList([torch.full((1024, 1024), value) for _ in range(50)])
small = nn.Linear(4, 4)
Path(small, copy.deepcopy(small), copy.deepcopy(small)).checksum()  # code pages are no copies
zeroshot, finetuned, live = make(1.0).state_dict(), make(2.0).state_dict(), make(3.0)
before = peak()
path = Path(live, zeroshot, finetuned)
path.write(0.5, 0.1)
with path.perturbed(0.3, 0.1, keep=0.5), path.at(0.3, ["7"]):
    path.checksum()
print(path.impl, before, peak() - before)
"""


@pytest.mark.slow
def test_no_copy_of_the_model_is_made() -> None:
    """Peak resident memory, in MiB, over the two ends and the live model."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=PATIENCE
    )
    impl, before, growth = done.stdout.split()
    assert float(before) > 600  # three models of 200 MiB
    # The reference computes a million elements at a time, in some 100 bytes each.
    limit = 110 if impl == "reference" else 20
    assert float(growth) < limit, done.stdout


# --- numbers outside their domain, and what is no weight ----------------------------------------------


def test_variances_do_not_become_negative() -> None:
    zeroshot, finetuned = positive(1), positive(2)
    path = Path(Net(), zeroshot, finetuned)
    names = [name for name in zeroshot if name.endswith("running_var")]
    w0, w1 = (torch.cat([state[name] for name in names]).double() for state in (zeroshot, finetuned))
    roots = w0 / (w0 - w1)
    low, high = float(roots[roots < 0].max()), float(roots[roots > 1].min())
    for alpha in (0.99 * low, 0.99 * high):
        path.write(alpha)
        assert_close(path.model, between(alpha, zeroshot, finetuned))
    before = path.checksum()
    for alpha in (1.01 * low, 1.01 * high, -50.0, 50.0):
        for refusing in (
            lambda alpha=alpha: path.write(alpha),
            lambda alpha=alpha: path.at(alpha).__enter__(),
        ):
            with refused(ValueError, f"{low:.4g}", f"{high:.4g}"):
                refusing()
    assert path.checksum() == before
    path.write(50.0, layers=["head", "embed"])  # which have none
    # For weights alone, statistics stay where they are.
    path.write(0.5)
    path.write(50.0, buffers=False)
    expected = between(50.0, zeroshot, finetuned)
    kept = between(0.5, zeroshot, finetuned)
    buffers = {name for name, _ in path.model.named_buffers()}
    assert_close(path.model, {name: (kept if name in buffers else expected)[name] for name in expected})
    assert path.alpha is None
    with refused(RuntimeError):
        path.at(0.5).__enter__()
    path.write(0.5)
    assert_close(path.model, kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_a_dtype_cannot_hold_is_refused_and_undone(dtype: torch.dtype) -> None:
    most, name = torch.finfo(dtype).max, str(dtype).removeprefix("torch.")
    ends = [{"weight": torch.tensor([[-1.0, share * most]]), "bias": torch.ones(1)} for share in (0.5, 0.75)]
    path = Path(nn.Linear(2, 1).to(dtype), *ends)
    path.write(1.5)  # to 0.875
    before = snapshot(path.model)
    for write in ({"alpha": 2.5}, {"alpha": -9.0}, {"alpha": 1.0, "rho": 99.0}, {"alpha": 0.5, "rho": 1e9}):
        with refused(ValueError, f"weight ({name}"):
            path.write(**write)  # type: ignore[arg-type]
        assert same_bits(snapshot(path.model), before) and path.alpha == 1.5
    with refused(ValueError, f"weight ({name}"), path.at(9.0):
        pass
    assert same_bits(snapshot(path.model), before)
    path.write(9.0, layers=["bias"]) if "bias" in path.layers else path.write(0.0)
    if dtype == torch.float16:
        large = {"weight": torch.tensor([[1.0, 7e4]]), "bias": torch.ones(1)}
        with refused(ValueError, "finetuned", name, "weight"):
            Path(nn.Linear(2, 1).to(dtype), ends[0], large)


class Lora(nn.Module):
    def __init__(self, name: str = "lora") -> None:
        super().__init__()
        self.base_layer = nn.Linear(3, 3)
        self.register_module(f"{name}_A", nn.Linear(3, 2, bias=False))
        self.register_module(f"{name}_B", nn.Linear(2, 3, bias=False))


class Named(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.ones(2, 2)))


def normed(new: bool) -> nn.Module:
    if new:
        return torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(3, 3)))


@pytest.mark.parametrize(
    ("make", "facts"),
    [
        (Lora, ["LoRA", "lora_A.weight, lora_B.weight"]),
        (lambda: nn.ModuleDict({"lora": nn.Linear(2, 2)}), ["LoRA"]),
        (lambda: Named("q_proj_lora_A", "q_proj_lora_B"), ["LoRA", "q_proj_lora_A", "q_proj_lora_B"]),
        (lambda: Lora("hada_w1"), ["peft"]),
        (lambda: Named("ia3_l"), ["peft", "ia3_l"]),
        (lambda: normed(True), ["remove_parametrizations", "original0"]),
        (lambda: normed(False), ["remove_weight_norm", "0.weight_g, 0.weight_v"]),
        (lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), ["remove_parametrizations"]),
        (lambda: prune.l1_unstructured(nn.Linear(3, 3), "weight", 2), ["prune.remove"]),
    ],
)
def test_factors_of_weights_are_refused_by_name(make: Callable[[], nn.Module], facts: list[str]) -> None:
    with refused(ValueError, *facts):
        Path(make(), fill(make(), 1), fill(make(), 2))


def test_other_names_are_no_factors() -> None:
    make = lambda: Named("flora", "explorative", "weight_v", "loraine", "kernel_g", "kernel_v", "weight_orig")  # noqa: E731
    Path(make(), fill(make(), 1), fill(make(), 2))
