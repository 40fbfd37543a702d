"""What tests of merging share: related models, their float64 values, and reading of results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rft_fast.merge import Outcome, Request, run

State = dict[str, Tensor]
BLOCKS = 3


def base(seed: int = 0) -> State:
    """A small tower with a head: matrices, vectors, a scalar, an empty tensor."""
    noise = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "visual.conv1.weight": (4, 3, 2, 2),
        "visual.class_embedding": (7,),
        **{f"visual.transformer.resblocks.{i}.mlp.c_fc.weight": (13, 5) for i in range(BLOCKS)},
        **{f"visual.transformer.resblocks.{i}.mlp.c_fc.bias": (13,) for i in range(BLOCKS)},
        "visual.ln_post.weight": (5,),
        "visual.empty": (0, 3),
        "classification_head.weight": (3, 5),
        "classification_head.bias": (3,),
        "logit_scale": (),
    }
    return {name: torch.randn(shape, generator=noise) for name, shape in shapes.items()}


def moved(state: Mapping[str, Tensor], seed: int, size: float = 0.1) -> State:
    """A model that was fine-tuned a little."""
    noise = torch.Generator().manual_seed(seed)
    return {
        name: (t + size * torch.randn(t.shape, generator=noise)).to(t.dtype) if t.is_floating_point() else t
        for name, t in state.items()
    }


def put(folder: Path, **states: Mapping[str, Tensor]) -> dict[str, Path]:
    """Write states as safetensors: name -> file."""
    files = {}
    for name, state in states.items():
        files[name] = folder / f"{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, files[name])
    return files


def merged(method: Any, files: Mapping[str, Path], out: Path, **options: Any) -> tuple[State, Outcome]:
    """Merge ``zero`` (if there is one) and the others, in order, and read the result."""
    others = tuple(file for name, file in files.items() if name != "zero")
    outcome = run(Request(method, others, out, files.get("zero"), **options))
    return load_file(out), outcome


def close(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], within: float = 1e-6) -> None:
    """Compare with float64 values, relative to the largest of each tensor."""
    assert set(got) == set(expected)
    for name, truth in expected.items():
        assert truth.dtype == torch.float64 and got[name].shape == truth.shape, name
        if truth.numel():
            error = (got[name].double() - truth).abs().max() / truth.abs().max().clamp(min=1e-3)
            assert error <= within, (name, float(error))
