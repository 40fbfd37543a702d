"""LoRA adapters of peft -> the weights that they make of a base: W + scale B A (Hu et al. 2022, eq. 3)."""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import TypeVar

import torch
from torch import Tensor

from ..common import files
from ..common.pickles import Unreadable
from ..common.words import some
from . import folders, huggingface, sharded
from .activation import Tensors
from .canonical import HEAD
from .entries import Entry
from .folders import ADAPTER_CONFIG
from .naming import canonical_names
from .selecting import select
from .stored import Maker

_T = TypeVar("_T")
# Module, and which factor; between them and the end the name of the adapter may stand.
_FACTOR = re.compile(r"(.+)\.lora_(?:([AB])(?:\.[^.]+)?\.weight|(embedding_[AB])(?:\.[^.]+)?)")
_START = re.compile(r"\Abase_model\.model\.")
_PLAIN = re.compile(r"\^?[\w.\\-]+")  # a pattern of modules that is a name
_LARGEST = 1 << 20  # bytes of a configuration
_PEFT = (
    "merge it with its base where it was trained (peft: model.merge_and_unload()), and save the whole model"
)
# Initialisations that change the base: what is left of it is not in the adapter.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def is_adapter(path: str | PathLike[str]) -> bool:
    """Return whether a checkpoint is an adapter of peft.

    Args:
        path: of ``adapter_model.safetensors`` or ``.bin`` with ``adapter_config.json`` beside it, or of their
            folder; or of any other checkpoint.

    Raises:
        ValueError: as :func:`rft_fast.checkpoints.located`.
    """
    return len(found := folders.parts(path)) == 2 and found[1].name == ADAPTER_CONFIG


@dataclass(frozen=True)
class _Config:
    """What the configuration of an adapter says.

    Attributes:
        alpha: scale of the product, before it is divided by the rank.
        alphas: name of a module, or the last parts of it -> its own alpha.
        rank: rows of A; None where the file does not say it.
        ranks: name of a module, or the last parts of it -> its own rank.
        rslora: divide by the square root of the rank (Kalajdzievski 2023).
        transposed: whether linear weights are stored [in, out] (``fan_in_fan_out``).
        base: name of the model that it was trained on; empty if unknown.
    """

    alpha: float
    alphas: Mapping[str, float]
    rank: object
    ranks: Mapping[str, object]
    rslora: bool
    transposed: bool
    base: str

    @classmethod
    def read(cls, file: pathlib.Path) -> _Config:
        try:
            content = json.loads(files.read_bytes(file)) if file.stat().st_size <= _LARGEST else None
        except (ValueError, RecursionError) as error:
            raise Unreadable(f"has an {ADAPTER_CONFIG} that is not valid JSON") from error
        if not isinstance(content, dict):
            raise Unreadable(f"has an {ADAPTER_CONFIG} that is not a JSON object")
        if (kind := content.get("peft_type")) != "LORA":
            raise Unreadable(
                f"is an adapter of peft of the type {str(kind)[:40]!r}; only LORA is supported; {_PEFT}"
            )
        start = content.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
            raise Unreadable(
                f"is a LoRA adapter that was initialised with {start[:40]!r}, which changes the base "
                f"as well; {_PEFT}"
            )
        for name in ("use_dora", "lora_bias", "layer_replication", "target_parameters", "use_qalora"):
            if content.get(name):
                raise Unreadable(f"is a LoRA adapter with {name}, which is not supported; {_PEFT}")
        alphas = content.get("alpha_pattern") or {}
        numbers = [content.get("lora_alpha"), *(alphas.values() if isinstance(alphas, dict) else [None])]
        if not all(type(one) in (int, float) and math.isfinite(one) for one in numbers):
            raise Unreadable(
                f"has an {ADAPTER_CONFIG} in which lora_alpha or a value of alpha_pattern is not a "
                "finite number"
            )
        if regular := [name for name in alphas if not _PLAIN.fullmatch(name)]:
            raise Unreadable(
                "is a LoRA adapter whose alpha_pattern uses regular expressions "
                f"({some(regular, 3)}), which is not supported; {_PEFT}"
            )
        ranks = content.get("rank_pattern") or {}
        plain = isinstance(ranks, dict) and all(map(_PLAIN.fullmatch, ranks))
        return cls(
            float(numbers[0]),
            {_plain(name): float(value) for name, value in alphas.items()},
            content.get("r") if plain else None,
            {_plain(name): value for name, value in ranks.items()} if plain else {},
            content.get("use_rslora") is True,
            content.get("fan_in_fan_out") is True,
            str(content.get("base_model_name_or_path") or ""),
        )

    def scale(self, module: str, rank: int) -> float:
        """Return the factor of B A.

        Args:
            module: name of the module in the model that was adapted.
            rank: rows of A.

        Raises:
            Unreadable: the configuration says another rank, so that alpha may be that of another adapter.
        """
        expected = _of(self.ranks, module, self.rank)
        if expected is not None and expected != rank:
            raise Unreadable(
                f"has factors of {module!r} with rank {rank}, but {ADAPTER_CONFIG} says "
                f"{str(expected)[:40]}; is it the configuration of this adapter?"
            )
        return _of(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def _plain(pattern: str) -> str:
    return pattern.removeprefix("^").replace("\\", "")


def _of(table: Mapping[str, _T], module: str, default: _T) -> _T:
    """Return the value of a module: of its name, or of the last parts of it."""
    return next((value for name, value in table.items() if f".{module}".endswith(f".{name}")), default)


@dataclass
class _Change:
    """What an adapter does to a weight: a factor A, a factor B, and whether it is an embedding."""

    a: Tensor | None = None
    b: Tensor | None = None
    embedding: bool = False
    names: list[str] = field(default_factory=list)


def merged(path: str | PathLike[str], base: Mapping[str, Tensor]) -> tuple[Tensors, list[str]]:
    """Add an adapter to the weights of its base.

    The product of the factors is computed in float32; the sum is rounded to the dtype of the base once.
    Tensors that the adapter holds whole (``modules_to_save``, biases) replace those of the base.

    Args:
        path: of an adapter (:func:`is_adapter`), whose modules have the names of open_clip or transformers.
        base: weights by canonical name; meta tensors give shapes and dtypes only.

    Returns:
        All weights of the base, those that are adapted as new tensors, and heads of the adapter; and notes.

    Raises:
        Unreadable: the adapter is of another kind, is damaged, or does not fit the base.
    """
    file, config_file = folders.parts(path)
    config = _Config.read(config_file)
    meta = any(tensor.is_meta for tensor in base.values())
    with sharded.opened(file) as container:
        state = select(container, None)
        maker = Maker(container.size, meta)
        made = {
            _START.sub("", state.origin[name]): Entry.of(state.origin[name], value).make(maker)
            for name, value in state.state.items()
        }
    changes, whole = _sorted(made)
    result, notes = dict(base), list[str]()
    names = canonical_names([*(f"{module}.weight" for module in changes), *whole], notes)
    for module, change in changes.items():
        product = _product(module, change, config)
        _write(result, base, names[f"{module}.weight"], product, module, add=True)
    for name, tensor in whole.items():
        _write(result, base, names[name], tensor, name, add=False)
    of = f", trained on {config.base[:80]!r}" if config.base else ""
    count = f"{len(changes)} weight{'' if len(changes) == 1 else 's'}"
    notes.insert(0, f"a LoRA adapter{of}: added to {count} of the base")
    if whole:
        notes.append(f"used unchanged from the adapter: {some(list(whole), 3)}")
    return Tensors(result, getattr(base, "activation", None)), notes


def _sorted(made: Mapping[str, Tensor]) -> tuple[dict[str, _Change], dict[str, Tensor]]:
    """Sort the tensors of an adapter into factors by module, and whole tensors."""
    changes: dict[str, _Change] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in made.items():
        if match := _FACTOR.fullmatch(name):
            module, side = match[1], match[2] or match[3]
            if ".base_layer." in module:
                raise Unreadable(
                    f"adapts a MultiheadAttention of torch ({module!r}); some versions of peft add the "
                    f"product to its output projection twice; {_PEFT}"
                )
            change = changes.setdefault(module, _Change(embedding=side.startswith("embedding")))
            if (change.a if side.endswith("A") else change.b) is not None:
                raise Unreadable(f"holds several adapters for {module!r}; use one of them")
            if side.endswith("A"):
                change.a = tensor
            else:
                change.b = tensor
        elif "lora" in name.lower():
            raise Unreadable(f"has {name!r}, which does not belong to a plain LoRA adapter; {_PEFT}")
        else:
            whole[name.replace(".modules_to_save", "").replace(".base_layer", "")] = tensor
    if not changes:
        raise Unreadable("is an adapter without factors ('lora_A', 'lora_B')")
    return changes, whole


def _product(module: str, change: _Change, config: _Config) -> Tensor:
    """Compute what an adapter adds to a weight: scale B A, in the shape of the weight."""
    a, b = change.a, change.b
    if a is None or b is None:
        raise Unreadable(f"has only one of the two factors of {module!r}, A and B")
    if a.ndim < 2 or b.ndim < 2 or a.shape[0] != b.shape[1] or b[0, 0].numel() != 1 or not a.shape[0]:
        raise Unreadable(
            f"has factors of {module!r} that do not fit: A {list(a.shape)}, B {list(b.shape)}; expected A "
            "[r, in, ...] and B [out, r]"
        )
    rank = a.shape[0]
    product = b.float().flatten(1) @ a.float().flatten(1) * config.scale(module, rank)
    if change.embedding or (config.transposed and a.ndim == 2):
        return product.T
    return product.view(b.shape[0], *a.shape[1:])


def _write(
    result: dict[str, Tensor], base: Mapping[str, Tensor], name: str, value: Tensor, stored: str, add: bool
) -> None:
    """Add a change to a weight, or replace it.

    Args:
        result: weights by canonical name.
        base: the weights before; their tensors are not written to.
        name: canonical name, or that of transformers.
        value: in the shape that the weight has under that name.
        stored: name in the adapter, for messages.
        add: whether the value is added.
    """
    place = huggingface.target(name)
    name, part, transposed = (name, None, False) if place is None else place
    value = value.T if transposed else value
    if name not in base:
        if add or not name.startswith(HEAD):
            raise Unreadable(f"changes {stored!r}, but the base has no {name!r}. Is this the right base?")
        result[name] = value.contiguous()
        return
    if result[name] is base[name]:
        result[name] = base[name].clone()
    row = result[name] if part is None else result[name].chunk(3)[part]
    if row.shape != value.shape:
        raise Unreadable(
            f"changes {stored!r} with shape {list(value.shape)}, but in the base it has shape "
            f"{list(row.shape)}. Is this the right base?"
        )
    wide = torch.promote_types(row.dtype, torch.float32)
    row.copy_(row.to(wide) + value.to(row.device) if add else value)
