"""Files of trainers: which dict of tensors is taken, which names its tensors get, and what is refused."""

from __future__ import annotations

import argparse
import itertools
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.tiny_checkpoints import State, clip, same
from support.wording import refused, said
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from rft_fast import checkpoints
from rft_fast.checkpoints.__main__ import main

STATE: State = {
    "visual.conv1.weight": torch.arange(48.0).reshape(4, 3, 2, 2),
    "visual.transformer.resblocks.0.ln_1.weight": torch.ones(4),
    "visual.proj": torch.arange(12.0).reshape(4, 3),
    "positional_embedding": torch.ones(5, 4),
    "logit_scale": torch.tensor(4.6),
}
EMA = {name: tensor + 1 for name, tensor in STATE.items()}
HEAD = {"classification_head.weight": torch.ones(2, 3), "classification_head.bias": torch.zeros(2)}


def renamed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def adam() -> dict[str, Any]:
    """The state of an optimizer by numbers of parameters, as torch keeps it."""
    moments = {place: {"step": torch.tensor(3.0), "exp_avg": t} for place, t in enumerate(STATE.values())}
    return {"state": moments, "param_groups": [{"lr": 0.1, "params": list(moments)}]}


def read(tmp_path: Path, content: Any, key: str | None = None) -> checkpoints.Checkpoint:
    torch.save(content, tmp_path / "a.pt")
    return checkpoints.read(tmp_path / "a.pt", key=key)


# What common trainers write, and a few more: beside the weights, at other depths, of other types.
TRAINERS: dict[str, Any] = {
    "open_clip": {"epoch": 1, "state_dict": STATE, "optimizer": adam(), "scaler": {"scale": 2.0}},
    "torchvision": {"epoch": 1, "state_dict": STATE, "best_acc1": torch.tensor(0.3), "optimizer": adam()},
    "numpy": {"epoch": np.int64(1), "state_dict": STATE, "best_acc1": np.float64(0.3)},
    "lightning": {
        "epoch": 1,
        "pytorch-lightning_version": "2.1",
        "state_dict": OrderedDict(renamed(STATE, "model.")),
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"EarlyStopping": {"best_score": torch.tensor(1.0), "weights": torch.ones(3)}},
        "optimizer_states": [adam()],
        "lr_schedulers": [{"last_lr": [0.1]}],
        "hyper_parameters": {"class_weights": torch.ones(7)},
    },
    "lightning, other name": {"state_dict": renamed(STATE, "net."), "pytorch-lightning_version": "2.1"},
    "model": {"model": STATE, "epoch": 3, "args": argparse.Namespace(lr=1)},
    "model_state_dict": {"model_state_dict": STATE, "optimizer_state_dict": adam(), "epoch": 3},
    "deepspeed": {"module": STATE, "buffer_names": [], "optimizer": None, "ds_config": {}},
    "net": {"net": STATE, "acc": 0.5, "epoch": 3},
    "ema alone": {"ema": STATE, "updates": 10},
    "average in a table": {"ema": {"decay": 0.99, "num_updates": torch.tensor(3), "shadow": STATE}},
    "two deep": {"checkpoint": {"model": STATE, "epoch": 1}, "version": 1},
    "three deep": {"run": {"last": {"weights": STATE}}},
    "in a list": [3, STATE],
    "in a tuple": (STATE, adam()),
    "by name": {"model": STATE, "optimizer": {"state": {n: {"exp_avg": t} for n, t in STATE.items()}}},
    "moments like a model": {"model": STATE, "optimizer": EMA, "exp_avg_sq": EMA, "momentum_buffers": EMA},
    "param_groups": {"model": STATE, "adam_w": {"state": EMA, "param_groups": []}},
    "random states": {"model": STATE, "rng_state": {"cpu": torch.zeros(9).byte()}},
    "integers": {"model": STATE, "seen": {"indices": torch.arange(9)}},
    "loss": {"model": STATE, "dino_loss": {"center": torch.ones(9)}, "criterion": {"w": torch.ones(3)}},
    "metrics": {"model": STATE, "history": {"loss": torch.ones(9)}, "best": {"acc": torch.tensor(0.3)}},
    "queue": {"model": STATE, "queue": torch.ones(3, 4), "queue_ptr": torch.tensor(0)},
    "the same twice": {"state_dict": STATE, "state_dict_ema": STATE, "model": renamed(STATE, "module.")},
    "an empty average": {"model": STATE, "ema": {}, "optimizer": {}},
    "no average": {"model": STATE, "ema": None},
    "a list of moments": {"model": STATE, "ema": {"decay": 0.9, "shadow_params": list(EMA.values())}},
    "weights of a callback": {"state_dict": STATE, "callbacks": {"EMA": {"ema_weights": EMA}}},
    "extra state": {"model": {**STATE, "visual._extra_state": None}},
    "averages of torch": {"model": AveragedModel(nn.Module()).state_dict(), "m": STATE},
}  # fmt: skip


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_one_dict_of_tensors_is_taken(tmp_path: Path, trainer: str) -> None:
    got = read(tmp_path, TRAINERS[trainer])
    same(got.tensors, STATE)
    same(checkpoints.load(tmp_path / "a.pt"), STATE)
    said("\n".join(got.notes))


def test_modules_within_a_dict(tmp_path: Path) -> None:
    model = clip()
    got = read(tmp_path, {"model": model, "epoch": 1, "optimizer": adam()})
    assert got.format == "task-vector"
    assert not got.tensors.activation["image"].quick
    same(got.tensors, model.state_dict())
    content = {"model": model, "ema": AveragedModel(clip(1, quick_gelu=True))}
    with refused(ValueError, "model", "ema", "--key"):
        read(tmp_path, content)
    got = read(tmp_path, content, "ema")
    same(got.tensors, clip(1).state_dict())
    assert got.tensors.activation["image"].quick
    said("\n".join(got.notes), "n_averaged", "model")


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"state_dict": STATE, "state_dict_ema": EMA}, ("state_dict", "state_dict_ema")),
        ({"student": renamed(STATE, "module."), "teacher": EMA, "optimizer": EMA}, ("student", "teacher")),
        ({"model": {"state_dict": STATE, "ema": {"shadow": EMA}}}, ("model.state_dict", "model.ema.shadow")),
        ({"model": STATE, "head": {"weight": torch.ones(2, 3)}}, ("model", "head")),
        ([STATE, EMA], ("0", "1")),
        ({"state_dict": {**renamed(STATE, "student."), **renamed(EMA, "teacher.")}}, ("student", "teacher")),
        ({**renamed(STATE, "encoder_q."), **renamed(EMA, "encoder_k.")}, ("encoder_q", "encoder_k")),
        ({**renamed(STATE, "model.net."), **renamed(EMA, "model.ema.module.")}, ("net", "ema")),
    ],
)
def test_several_are_refused_by_name_and_a_key_chooses(
    tmp_path: Path, content: Any, names: tuple[str, str]
) -> None:
    with refused(ValueError, *names, "--key"):
        read(tmp_path, content)
    expected = [STATE, {"weight": torch.ones(2, 3)} if "head" in names else EMA]
    for name, state in zip(names, expected, strict=True):
        got = read(tmp_path, content, name)
        same(got.tensors, state)
        last = name.rpartition(".")[2]
        if last != "state_dict":  # the last key alone, where only one dict has it
            same(checkpoints.load(tmp_path / "a.pt", key=last), state)
    with refused(ValueError, "a.pt", "nonsense"):
        read(tmp_path, content, "nonsense")


class Shard:
    """A tensor as torch pickles a DTensor."""

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_wrapper_subclass, (Shard, torch.float32, (4, 3), (3, 1), 0)


def test_shards_of_a_model_in_training_are_named(tmp_path: Path) -> None:
    with refused(ValueError, "visual.proj", "DTensor", "full_state_dict=True"):
        read(tmp_path, {"model": {**STATE, "visual.proj": Shard()}})


def test_a_module_and_its_state_dict_are_one(tmp_path: Path) -> None:
    model = clip()
    same(read(tmp_path, {"model": model, "state_dict": model.state_dict()}).tensors, model.state_dict())


def test_keys_choose_the_weights_of_the_training_too(tmp_path: Path) -> None:
    content = {"model": STATE, "momentum": EMA, "epoch": 1}
    same(read(tmp_path, content).tensors, STATE)
    same(read(tmp_path, content, "momentum").tensors, EMA)
    with refused(ValueError, "momentum"):
        read(tmp_path, {"momentum": EMA})


def test_names_without_a_prefix_beside_others(tmp_path: Path) -> None:
    content = {**STATE, **renamed(EMA, "ema.")}
    with refused(ValueError, "ema", "'.'"):
        read(tmp_path, content)
    same(read(tmp_path, content, "ema").tensors, EMA)
    got = read(tmp_path, content, ".")
    same(got.tensors, STATE)
    said("\n".join(got.notes), "ema.visual.proj")


def middle(state: State, wrapper: str) -> State:
    return {name.replace("resblocks.0.", f"resblocks.0.{wrapper}."): t for name, t in state.items()}


WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@pytest.mark.parametrize(
    "change",
    [
        *(lambda s, w=w: middle(s, w) for w in WRAPPERS),
        *(lambda s, a=a, b=b: renamed(s, f"{a}.{b}.") for a, b in itertools.permutations(WRAPPERS, 2)),
        lambda s: renamed(middle(middle(s, "_checkpoint_wrapped_module"), "_fsdp_wrapped_module"), "module."),
        lambda s: {name.replace("visual.", "visual._orig_mod."): t for name, t in s.items()},
        lambda s: {("module." if i % 2 else "") + name: t for i, (name, t) in enumerate(s.items())},
        lambda s: {("model." if i % 2 else "") + name: t for i, (name, t) in enumerate(s.items())},
        lambda s: {("net." if i % 2 else "") + name: t for i, (name, t) in enumerate(s.items())},
        lambda s: {**renamed(s, "module."), "n_averaged": torch.tensor(7)},
        lambda s: {**renamed(s, "averaged.module."), "averaged.n_averaged": torch.tensor(7)},
        lambda s: renamed(s, "model.module.net._orig_mod.clip."),
        lambda s: renamed(s, "image_encoder._orig_mod.model.module."),
        lambda s: OrderedDict(renamed(s, "_forward_module.model.")),
    ],
    ids=range(26),
)
@pytest.mark.parametrize("content", [lambda s: s, lambda s: {"state_dict": s, "epoch": 1}])
def test_wrappers_are_dropped_at_any_place(
    tmp_path: Path, change: Callable[[State], State], content: Callable[[State], Any]
) -> None:
    got = read(tmp_path, content(change(STATE)))
    same(got.tensors, STATE)


@pytest.mark.parametrize("prefix", ["net.", "model.", "module.", "net.image_encoder.model.", "a.b."])
def test_a_head_beside_the_clip_keeps_its_own_prefix(tmp_path: Path, prefix: str) -> None:
    outer = prefix.removesuffix("image_encoder.model.")
    got = read(tmp_path, {**renamed(STATE, prefix), **renamed(HEAD, outer)})
    assert got.format == "soup"
    same(got.tensors, {**STATE, **HEAD})


def test_prefixes_are_noted_and_another_part_can_be_left_out(tmp_path: Path) -> None:
    content = {**renamed(STATE, "net.clip."), "net.loss.weight": torch.ones(3)}
    got = read(tmp_path, content)
    assert list(got.tensors) == [*STATE, "loss.weight"]
    said("\n".join(got.notes), "net.clip.")
    got = read(tmp_path, content, "net.clip")
    same(got.tensors, STATE)
    said("\n".join(got.notes), "net.loss.weight")


def test_two_names_that_become_one(tmp_path: Path) -> None:
    for other in ("module.visual.proj", "visual._orig_mod.proj", "model.module.visual.proj"):
        with refused(ValueError, other, "'visual.proj'"):
            read(tmp_path, {**STATE, other: torch.zeros(4, 3)})


def test_parts_that_a_sharded_training_leaves(tmp_path: Path) -> None:
    with refused(ValueError, "FSDP", "full_state_dict=True"):
        read(tmp_path, {"_fsdp_wrapped_module.visual._fsdp_wrapped_module.flat_param": torch.ones(99)})
    empty = {name: torch.empty(0) for name in STATE}
    with refused(ValueError, "ZeRO-3", "zero_to_fp32.py"):
        read(tmp_path, {"module": empty, "param_shapes": [], "ds_version": "0.14"})
    for name, facts in (
        (".metadata", "dcp_to_torch"),
        ("zero_to_fp32.py", "zero_to_fp32.py"),
        ("x.pt", "x.pt"),
    ):
        (folder := tmp_path / name.strip(".")).mkdir()
        (folder / name).touch()
        (folder / ("__0_0.distcp" if name == ".metadata" else "y.txt")).touch()
        with refused(ValueError, str(folder), facts):
            checkpoints.read(folder)


def test_values_that_hold_one_another(tmp_path: Path) -> None:
    loop: dict[str, Any] = {"model": STATE}
    loop["self"] = {"again": loop}
    same(read(tmp_path, loop).tensors, STATE)
    deep: Any = STATE
    for _ in range(30):
        deep = {"a": deep}
    with refused(ValueError, "a"):
        read(tmp_path, deep)
    wide: Any = {"x": torch.ones(2)}
    for _ in range(7):
        wide = {"a": wide, "b": wide}
    same(read(tmp_path, wide).tensors, {"x": torch.ones(2)})
    with refused(ValueError, "1000"):
        read(tmp_path, [{"x": torch.ones(2)} for _ in range(1001)])


def test_the_command_takes_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": STATE, "state_dict_ema": EMA, "epoch": 1}, tmp_path / "a.pt")
    assert main([str(tmp_path / "a.pt")]) == 2
    said(capsys.readouterr().err, "state_dict_ema", "--key")
    assert main([str(tmp_path / "a.pt"), "--key", "state_dict_ema"]) == 0
    assert "state_dict_ema" in capsys.readouterr().out


def test_an_open_checkpoint_reads_one_tensor_at_a_time_and_gives_back_its_names(tmp_path: Path) -> None:
    torch.save({"model": renamed(STATE, "module.net."), "epoch": 1}, tmp_path / "a.pt")
    with checkpoints.opened(tmp_path / "a.pt") as found:
        assert found.path == ("model",) and list(found.entries) == list(STATE)
        for name, tensor in STATE.items():
            entry = found.entries[name]
            assert entry.shape == tuple(tensor.shape) and entry.dtype == tensor.dtype
            assert torch.equal(found.tensor(name), tensor)
            ((stored, back),) = entry.split(tensor + 1)
            assert stored == f"module.net.{name}" and torch.equal(back, tensor + 1)


def test_stored_views_are_read_alone(tmp_path: Path) -> None:
    base = torch.arange(1000.0)
    state: dict[str, Tensor] = {
        "visual.a": base[10:16].view(2, 3),
        "visual.b": base[100:700].view(20, 30).t(),
    }
    torch.save(state, tmp_path / "a.pt")
    with checkpoints.opened(tmp_path / "a.pt") as found:
        for name, tensor in state.items():
            got = found.tensor(name)
            assert torch.equal(got, tensor) and got.is_contiguous()


@pytest.mark.slow
def test_many_names_take_no_time(tmp_path: Path) -> None:
    """Nothing is quadratic in the number of names or of prefixes: it would take hours."""
    one = torch.ones(1)
    save_file({f"module.visual.{place}": one.clone() for place in range(20_000)}, tmp_path / "a.safetensors")
    got = checkpoints.load(tmp_path / "a.safetensors", "meta")
    assert len(got) == 20_000 and "visual.19999" in got
    got = checkpoints.load(tmp_path / "a.safetensors", "meta", key="visual")
    assert len(got) == 20_000 and "19999" in got
    save_file({f"a{place}.visual.proj": one.clone() for place in range(20_000)}, tmp_path / "b.safetensors")
    for key in (None, "."):
        with refused(ValueError, "b.safetensors", "--key"):
            checkpoints.load(tmp_path / "b.safetensors", "meta", key=key)
