"""Checkpoints of several files: shards, folders of save_pretrained, LoRA adapters and their bases."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.tiny_checkpoints import State, clip, huggingface, renamed, same
from support.wording import refused, said
from torch import Tensor

from rft_fast import checkpoints
from rft_fast.checkpoints.__main__ import main

# --- shards -------------------------------------------------------------------------------------------


def shards(folder: Path, state: State, count: int = 3, ending: str = "safetensors") -> Path:
    """Write a state dict as transformers does: shards and their index."""
    start = "model" if ending == "safetensors" else "pytorch_model"
    places: dict[str, str] = {}
    for number in range(count):
        name = f"{start}-{number + 1:05}-of-{count:05}.{ending}"
        part = {key: state[key] for key in list(state)[number::count]}
        save_file(part, folder / name) if ending == "safetensors" else torch.save(part, folder / name)
        places |= dict.fromkeys(part, name)
    size = sum(tensor.nbytes for tensor in state.values())
    index = folder / f"{start}.{ending}.index.json"
    ordered = {name: places[name] for name in state}
    index.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": ordered}))
    return index


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("prefix", ["", "clip."])
def test_shards_by_index_and_by_folder(tmp_path: Path, ending: str, prefix: str) -> None:
    model = clip()
    index = shards(tmp_path, renamed(huggingface(model.state_dict()), "", prefix), ending=ending)
    config = {"model_type": "clip", "vision_config": {"hidden_act": "gelu"}, "text_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (index, tmp_path):
        got = checkpoints.read(path)
        assert got.format == "huggingface" and got.file == index
        same(got.tensors, model.state_dict(), order=False)
        assert {tower: known.quick for tower, known in got.tensors.activation.items()} == {
            "image": False,
            "text": True,
        }
    assert all(tensor.is_meta for tensor in checkpoints.load(index, "meta").values())
    parts = checkpoints.parts(tmp_path)
    assert parts[0] == index and len(parts) == 4
    lines = [f"{hashlib.sha256(part.read_bytes()).hexdigest()}  {part.name}\n" for part in parts]
    assert checkpoints.sha256(tmp_path) == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_shards_that_are_incomplete(tmp_path: Path) -> None:
    state = huggingface(clip().state_dict())
    index = shards(tmp_path, state)
    alone = tmp_path / "model-00002-of-00003.safetensors"
    with refused(ValueError, alone.name, index.name):
        checkpoints.read(alone)
    (other := tmp_path / "other").mkdir()
    (other / alone.name).write_bytes(alone.read_bytes())
    with refused(ValueError, alone.name, index.name):
        checkpoints.read(other / alone.name)
    content = json.loads(index.read_text())
    save_file({"x": torch.ones(2)}, alone)
    with refused(ValueError, alone.name):
        checkpoints.read(index)
    alone.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(64))
    with refused(ValueError, alone.name, "GGUF"):
        checkpoints.read(index)
    alone.unlink()
    with refused(ValueError, alone.name, 1, 3):
        checkpoints.read(tmp_path)
    for name in ("../x.safetensors", "/etc/passwd", "..", "", 3, "a\\b"):
        content["weight_map"] = {"visual.proj": name}
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="index of a sharded"):
            checkpoints.read(index)


def test_one_shard_of_one_is_a_file(tmp_path: Path) -> None:
    shards(tmp_path, clip().state_dict(), count=1)
    (tmp_path / "model.safetensors.index.json").unlink()
    got = checkpoints.read(tmp_path / "model-00001-of-00001.safetensors")
    same(got.tensors, clip().state_dict(), order=False)


def test_the_weights_of_a_folder(tmp_path: Path) -> None:
    torch.save(huggingface(clip(1).state_dict()), tmp_path / "pytorch_model.bin")
    same(checkpoints.load(tmp_path), clip(1).state_dict(), order=False)
    save_file(clip(0).state_dict(), tmp_path / "open_clip_model.safetensors")  # open_clip's own comes first
    same(checkpoints.load(tmp_path), clip(0).state_dict(), order=False)
    assert checkpoints.fetch(str(tmp_path), "ViT-B-32") == tmp_path / "open_clip_model.safetensors"


# --- LoRA ---------------------------------------------------------------------------------------------

CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "base_model_name_or_path": "org/base"}
Q = "vision_model.encoder.layers.0.self_attn.q_proj"


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def adapter(folder: Path, tensors: State, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(renamed(tensors, "", "base_model.model."), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def factors(state: State, *modules: str, rank: int = 2) -> State:
    """Factors for linear, convolution and embedding weights, under the names of peft."""
    made = {}
    for module in modules:
        weight = state[f"{module}.weight"]
        out, into, *window = weight.shape
        if "embedding" in module and weight.ndim == 2:
            made[f"{module}.lora_embedding_A"] = random(rank, out)
            made[f"{module}.lora_embedding_B"] = random(into, rank)
        else:
            made[f"{module}.lora_A.weight"] = random(rank, into, *window)
            made[f"{module}.lora_B.weight"] = random(out, rank, *[1 for _ in window])
    return made


def added(state: State, made: State, scale: Any) -> State:
    """W + scale B A in float64, module by module."""
    result = {name: tensor.double() for name, tensor in state.items()}
    for name in made:
        if match := re.fullmatch(r"(.+)\.lora_(embedding_)?A(\.weight)?", name):
            module, embedding, weight = match[1], match[2], match[3] or ""
            a = made[name].double()
            b = made[f"{module}.lora_{embedding or ''}B{weight}"].double()
            product = torch.einsum("or,r...->o...", b.reshape(len(b), -1), a) * scale(module)
            result[f"{module}.weight"] += (
                product.T if embedding else product.view_as(state[f"{module}.weight"])
            )
    return result


ATTENTION = tuple(
    f"{tower}_model.encoder.layers.{layer}.self_attn.{part}_proj"
    for tower in ("vision", "text")
    for layer in (0, 1)
    for part in "qv"
)
OTHERS = (
    "vision_model.encoder.layers.1.mlp.fc1",
    "text_model.encoder.layers.0.self_attn.out_proj",
    "vision_model.embeddings.patch_embedding",
    "text_model.embeddings.token_embedding",
    "visual_projection",
    "text_projection",
)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, lambda module: 1.5),
        ({"use_rslora": True}, lambda module: 3 / math.sqrt(2)),
        (
            {"alpha_pattern": {"v_proj": 7, "^visual_projection": 5, Q.replace(".", "\\."): 11.0}},
            lambda m: {Q: 11, "visual_projection": 5}.get(m, 7 if m.endswith("v_proj") else 3) / 2,
        ),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.clip."])
def test_adapters_are_added_to_their_base(tmp_path: Path, config: Any, scale: Any, prefix: str) -> None:
    state = huggingface(clip().state_dict())
    made = factors(state, *ATTENTION, *OTHERS)
    expected = added(state, made, scale)
    save_file({name: tensor.double() for name, tensor in expected.items()}, tmp_path / "expected")
    want = checkpoints.load(tmp_path / "expected")
    folder = adapter(tmp_path / "adapter", renamed(made, "", prefix), **config)
    base = {name: tensor.clone() for name, tensor in clip().state_dict().items()}
    got = checkpoints.read(folder, base=base)
    assert got.format == "lora" and checkpoints.is_adapter(folder) and set(got.tensors) == set(base)
    same(base, clip().state_dict())  # not written to
    for name, tensor in got.tensors.items():
        assert tensor.dtype == base[name].dtype and tensor.is_contiguous()
        torch.testing.assert_close(tensor.double(), want[name].double(), rtol=1e-6, atol=1e-6)
    assert not torch.equal(got.tensors["visual.proj"], base["visual.proj"])
    meta = checkpoints.load(folder, "meta", base={name: tensor.to("meta") for name, tensor in base.items()})
    assert {n: t.shape for n, t in meta.items()} == {n: t.shape for n, t in base.items()}
    said("\n".join(got.notes), "org/base")


def test_linear_weights_that_are_stored_the_other_way_round(tmp_path: Path) -> None:
    module = "visual.transformer.resblocks.0.mlp.c_fc"
    base = clip().state_dict()
    base[f"{module}.weight"] = base[f"{module}.weight"].T.contiguous()
    into, out = base[f"{module}.weight"].shape
    a, b = random(2, into), random(out, 2)
    made = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    got = checkpoints.load(adapter(tmp_path, made, fan_in_fan_out=True), base=base)[f"{module}.weight"]
    expected = base[f"{module}.weight"].double() + 1.5 * (b.double() @ a.double()).T
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


def test_whole_tensors_of_an_adapter_replace_those_of_the_base(tmp_path: Path) -> None:
    state = huggingface(clip().state_dict())
    made = factors(state, Q)
    whole = {
        f"{Q}.base_layer.bias": random(16),
        "vision_model.encoder.layers.0.self_attn.k_proj.bias": random(16) + 1,
        "visual_projection.weight": random(10, 16),
        "classification_head.weight": random(3, 10),
    }
    got = checkpoints.read(adapter(tmp_path, {**made, **whole}), base=clip().state_dict())
    bias = got.tensors["visual.transformer.resblocks.0.attn.in_proj_bias"]
    assert torch.equal(bias[:16], whole[f"{Q}.base_layer.bias"])
    assert torch.equal(bias[16:32], whole["vision_model.encoder.layers.0.self_attn.k_proj.bias"])
    assert torch.equal(
        bias[32:], clip().state_dict()["visual.transformer.resblocks.0.attn.in_proj_bias"][32:]
    )
    assert torch.equal(got.tensors["visual.proj"], whole["visual_projection.weight"].T)
    assert torch.equal(got.tensors["classification_head.weight"], whole["classification_head.weight"])
    said("\n".join(got.notes), "classification_head.weight")


def test_bases_in_half_precision_are_rounded_once(tmp_path: Path) -> None:
    base = {name: tensor.bfloat16() for name, tensor in clip().state_dict().items()}
    made = factors(huggingface(clip().state_dict()), Q)
    got = checkpoints.load(adapter(tmp_path, made), base=base)
    name = "visual.transformer.resblocks.0.attn.in_proj_weight"
    product = 1.5 * (made[f"{Q}.lora_B.weight"] @ made[f"{Q}.lora_A.weight"])
    expected = (base[name][:16].float() + product).bfloat16()
    assert got[name].dtype == torch.bfloat16 and torch.equal(got[name][:16], expected)
    assert torch.equal(got[name][16:], base[name][16:])


def made_of(**names: Tensor) -> State:
    return {**factors(huggingface(clip().state_dict()), Q), **names}


@pytest.mark.parametrize(
    ("config", "tensors", "fact"),
    [
        ({"peft_type": "IA3"}, made_of(), "IA3"),
        ({"use_dora": True}, made_of(), "use_dora"),
        ({"init_lora_weights": "pissa_niter_4"}, made_of(), "pissa_niter_4"),
        ({"lora_alpha": None}, made_of(), "lora_alpha"),
        ({"lora_alpha": "1e999"}, made_of(), "lora_alpha"),
        ({"alpha_pattern": {".*q_proj|x": 3}}, made_of(), "alpha_pattern"),
        ({}, made_of(**{f"{Q}.lora_magnitude_vector": torch.ones(3)}), "lora_magnitude_vector"),
        ({}, made_of(**{f"{Q}.lora_B.bias": torch.ones(16)}), "lora_B.bias"),
        ({}, made_of(**{f"{Q}.lora_A.weight": torch.ones(3, 16)}), "[3, 16]"),
        ({}, made_of(**{f"{Q}.lora_A.weight": torch.ones(2, 9)}), "[16, 9]"),
        ({}, {f"{Q}.lora_A.weight": torch.ones(2, 16)}, Q),
        ({}, made_of(**{f"{Q}.lora_A.second.weight": torch.ones(2, 16)}), Q),
        (
            {},
            {"visual.other.lora_A.weight": random(2, 3), "visual.other.lora_B.weight": random(3, 2)},
            "other",
        ),
        ({}, made_of(**{"score.weight": torch.ones(2)}), "score.weight"),
        ({}, {"visual.a.base_layer.out_proj.lora_A.weight": random(2, 3)}, "MultiheadAttention"),
        ({}, {"visual.proj": random(16, 10)}, "lora_A"),
        ({"r": 4}, made_of(), "rank 2"),
        ({"rank_pattern": {"q_proj": 3}}, made_of(), "rank 2"),
    ],
)
def test_adapters_that_are_refused(tmp_path: Path, config: Any, tensors: State, fact: str) -> None:
    folder = adapter(tmp_path / "adapter", tensors, **config)
    with refused(ValueError, "adapter_model.safetensors", fact):
        checkpoints.read(folder, base=clip().state_dict())


def test_bases_and_formats_that_do_not_fit(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", made_of())
    save_file(clip().state_dict(), tmp_path / "whole.safetensors")
    with refused(ValueError, "whole.safetensors"):
        checkpoints.read(tmp_path / "whole.safetensors", base=clip().state_dict())
    with refused(ValueError, "adapter_model.safetensors", "lora"):
        checkpoints.read(folder, "lora")
    (folder / "adapter_config.json").write_text("[")
    with refused(ValueError, "adapter_config.json"):
        checkpoints.read(folder, base=clip().state_dict())


def test_a_base_without_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the configuration of the adapter is missing."""
    folder = adapter(tmp_path / "adapter", made_of())
    save_file(clip().state_dict(), base := tmp_path / "base.safetensors")
    (folder / "adapter_config.json").unlink()
    for file in (base, folder / "adapter_model.safetensors"):
        assert main([str(file), "--base", str(base)]) == 2
        said(capsys.readouterr().err, file.name, "adapter_config.json")


def test_shards_without_an_index(tmp_path: Path) -> None:
    shards(tmp_path, clip().state_dict()).unlink()
    with refused(ValueError, "model.safetensors.index.json"):
        checkpoints.read(tmp_path)


def test_the_command_tells_of_an_adapter_and_takes_a_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter(tmp_path / "adapter", made_of())
    save_file(clip().state_dict(), base := tmp_path / "base.safetensors")
    assert main([str(folder)]) == 0
    whole = re.sub(r"\n {2,}", " ", capsys.readouterr().out)  # long notes are wrapped
    said("\n".join(line for line in whole.splitlines() if line.startswith("note")), "LoRA", "--base")
    assert main([str(base), str(folder), "--base", str(base)]) == 0
    assert "1 of them differ" in capsys.readouterr().out
