"""QuickGELU or GELU: evidence in a file, or in a configuration beside it, of the activation of its towers.

Weights do not show which one they were trained with, and with the other one a model computes worse features
without an error. Evidence: classes named in a pickle or TorchScript archive, the code of such an archive, the
metadata of a safetensors file or of a merged one, ``config.json`` or ``open_clip_config.json`` in the same
directory. Contradictory evidence is not used.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

TOWERS = ("image", "text")
NAMES = {True: "QuickGELU", False: "GELU"}

_LARGEST = 1 << 20  # bytes of JSON; configurations have a few KiB
OPEN_CLIP, TRANSFORMERS = "open_clip_config.json", "config.json"
# Names of the weights that a config.json in the same directory describes, by Hugging Face's convention.
_CONVENTIONAL = re.compile(r"(?:open_clip_)?(?:pytorch_)?model(?:-\d+-of-\d+)?\.(?:bin|safetensors)")
_INNER = ("model_cfg", "model", "config", "configuration")
# The constant of QuickGELU, x * sigmoid(1.702 x), and calls of GELU in TorchScript code.
_QUICK_CODE = re.compile(r"\b1\.70(?:2|19999)\d*\b")
_TORCHSCRIPT = re.compile(r"\b__torch__\.|\b___torch_mangle_\d+\.")  # what it adds to names of classes
_GELU_CODE = re.compile(r"\btorch\.gelu_?\(")


@dataclass(frozen=True)
class Activation:
    """The activation of a tower.

    Attributes:
        quick: True for QuickGELU, False for GELU.
        source: the evidence, in words.
    """

    quick: bool
    source: str

    def __str__(self) -> str:
        return f"{NAMES[self.quick]} ({self.source})"


class Tensors(dict[str, "Tensor"]):
    """Tensors by canonical name, with the activations of their model.

    Args:
        tensors: by canonical name.
        activation: tower (``image``, ``text``) -> its activation, where the file shows it.

    Attributes:
        activation: as the argument; empty if it was None.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], activation: Mapping[str, Activation] | None = None
    ) -> None:
        super().__init__(tensors)
        self.activation: dict[str, Activation] = dict(activation or {})


class Evidence:
    """Collects evidence of the activation of each tower."""

    def __init__(self) -> None:
        self._found: dict[str, dict[bool, str]] = {tower: {} for tower in TOWERS}

    def add(self, tower: str, quick: bool | None, source: str) -> None:
        """Add a piece of evidence.

        Args:
            tower: ``image`` or ``text``.
            quick: True for QuickGELU, False for GELU, None for neither.
            source: the evidence, in words.
        """
        if quick is not None:
            self._found[tower].setdefault(quick, source)

    def add_class(self, name: str, where: str) -> None:
        """Add the class or function of a module.

        Args:
            name: full name of the class.
            where: canonical name of the module.
        """
        name = _TORCHSCRIPT.sub("", name)
        first = where.partition(".")[0]
        if first in ("visual", "vision_model"):
            self.add("image", _is_quick(name), f"the class {name} in it")
        elif first in ("transformer", "text", "text_model"):
            self.add("text", _is_quick(name), f"the class {name} in it")

    def add_all(self, evidence: Iterable[tuple[str, bool, str]]) -> None:
        """Add several pieces of evidence: (tower, quick, source)."""
        for one in evidence:
            self.add(*one)

    def __bool__(self) -> bool:
        return any(self._found.values())

    def judged(self) -> tuple[dict[str, Activation], list[str]]:
        """Return tower -> activation where all evidence agrees, and notes where it does not."""
        clear = {
            tower: Activation(*next(iter(sources.items())))
            for tower, sources in self._found.items()
            if len(sources) == 1
        }
        notes = [
            f"the activation of the {tower} tower is unclear, so neither is used: {sources[True]} "
            f"says QuickGELU, {sources[False]} says GELU"
            for tower, sources in self._found.items()
            if len(sources) == 2
        ]
        return clear, notes


def notes_of(activation: Mapping[str, Activation]) -> list[str]:
    """Describe activations; one note if both towers have the same."""
    groups: dict[Activation, list[str]] = {}
    for tower, known in activation.items():
        groups.setdefault(known, []).append(tower)
    return [f"activation of the {' and '.join(towers)} tower: {known}" for known, towers in groups.items()]


def of_code(text: str) -> set[bool]:
    """Return the activations in TorchScript code: True for QuickGELU, False for GELU."""
    return {quick for quick, pattern in ((True, _QUICK_CODE), (False, _GELU_CODE)) if pattern.search(text)}


def of_metadata(metadata: Mapping[str, str]) -> Iterator[tuple[str, bool, str]]:
    """Yield the evidence in the metadata of a file: (tower, quick, source).

    Args:
        metadata: entries of a safetensors header or an archive; an activation itself, or a configuration as
            JSON.
    """
    for key, value in metadata.items():
        source = f"its entry {key[:40]!a}"
        if key in ("hidden_act", "quick_gelu"):
            quick = _is_quick(value) if key == "hidden_act" else _BOOLEANS.get(value.strip().lower())
            if quick is not None:
                yield from ((tower, quick, source) for tower in TOWERS)
        elif value[:1] == "{" and len(value) <= _LARGEST:
            try:
                content = json.loads(value)
            except (ValueError, RecursionError):
                continue
            yield from of_config(content, source)


def beside(file: pathlib.Path, huggingface: bool) -> Iterator[tuple[str, bool, str]]:
    """Yield the evidence in configurations beside a file: (tower, quick, source).

    ``open_clip_config.json`` describes all files except those of transformers with names of their own;
    ``config.json`` describes files of transformers, and files with conventional names.

    Args:
        file: the checkpoint; of a link, the directory of its target counts as well.
        huggingface: whether it has the names of transformers.
    """
    places = {place.parent.resolve(): place for place in (file.resolve(), file)}
    for place in places.values():
        conventional = _CONVENTIONAL.fullmatch(place.name) is not None
        for name, applies in (
            (OPEN_CLIP, not huggingface or conventional),
            (TRANSFORMERS, huggingface or conventional),
        ):
            path = place.parent / name
            try:
                if not applies or not path.is_file() or path.stat().st_size > _LARGEST:
                    continue
                content = json.loads(path.read_bytes())
            except (OSError, ValueError, RecursionError):
                continue
            yield from of_config(content, f"{name} beside it")


def of_config(content: Any, source: str, depth: int = 3) -> Iterator[tuple[str, bool, str]]:
    """Yield the evidence in a configuration of open_clip or transformers: (tower, quick, source).

    Args:
        content: of a JSON file.
        source: the evidence, in words.
        depth: levels of nested tables to search.
    """
    if not isinstance(content, dict) or not depth:
        return
    if isinstance(content.get("vision_cfg"), dict):
        yield from ((tower, quick, source) for tower, quick in of_model_cfg(content).items())
    elif isinstance(quick := content.get("quick_gelu"), bool):
        yield from ((tower, quick, source) for tower in TOWERS)
    else:
        yield from ((tower, quick, source) for tower, quick in _of_transformers(content))
        for name in _INNER:
            yield from of_config(content.get(name), source, depth - 1)


def of_model_cfg(model_cfg: Mapping[str, Any]) -> dict[str, bool]:
    """Return tower -> whether open_clip builds it with QuickGELU.

    Args:
        model_cfg: a configuration of open_clip.

    Returns:
        Only towers that have QuickGELU or GELU: not timm's image towers and Hugging Face's text towers, which
            have
        activations of their own, nor a ModifiedResNet, which has ReLU.
    """
    quick = model_cfg.get("quick_gelu", False)
    vision, text = model_cfg.get("vision_cfg"), model_cfg.get("text_cfg")
    if not isinstance(quick, bool):
        return {}
    activations = {}
    if (
        isinstance(vision, dict)
        and not vision.get("timm_model_name")
        and not isinstance(vision.get("layers"), (list, tuple))
    ):
        activations["image"] = quick
    if isinstance(text, dict) and not text.get("hf_model_name"):
        activations["text"] = quick
    return activations


def _of_transformers(content: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    kind = str(content.get("model_type", ""))
    for tower, part, alone in (
        ("image", "vision_config", "clip_vision_model"),
        ("text", "text_config", "clip_text_model"),
    ):
        inner = content.get(part, content.get(f"{part}_dict"))
        if inner is None and kind == alone:
            inner = content
        if not isinstance(inner, dict):
            continue
        # Defaults are not written; CLIP's is quick_gelu.
        default = "quick_gelu" if kind in ("clip", alone) else None
        quick = _is_quick(inner.get("hidden_act", default))
        if quick is not None:
            yield tower, quick


def _is_quick(name: object) -> bool | None:
    """Return whether a name of an activation, or of its class, means QuickGELU; None if it means neither."""
    last = name.rpartition(".")[2].lower() if isinstance(name, str) else ""
    if "gelu" not in last or "geglu" in last:
        return None
    return "quick" in last


_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
