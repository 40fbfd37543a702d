"""Classification heads: those that checkpoints hold, and those that text towers make of prompts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..checkpoints.canonical import HEAD_BIAS, HEAD_WEIGHT, TEXT
from . import architectures, matching
from .classifier import directions
from .prompts import Prompts
from .prompts import tokens as tokenise

BATCH = 256  # prompts that are encoded at once
SCALE = "logit_scale"
_LARGEST_SCALE = 88.0  # e**88 is 1.7e38


@dataclass(eq=False)
class HeadMaker:
    """Checks heads of checkpoints, and makes those that a text tower has to.

    arch, prompts, scale, network: as in :class:`rft_fast.clip.endpoints.Setup`.
    device, stand_ins: as in :class:`rft_fast.clip.endpoints.Ends`.
    """

    arch: str
    prompts: Prompts | None
    scale: float | None = None
    network: bool | None = None
    device: str | torch.device = "cpu"
    stand_ins: bool = False

    @cached_property
    def features(self) -> int:
        """Columns of a head."""
        return int(architectures.config(self.arch)[1]["embed_dim"])

    @cached_property
    def tokens(self) -> Tensor:
        """The prompts: int64 [classes, templates, context]."""
        if self.prompts is None:
            raise ValueError("ends: there are no prompts to make a head from; give --class-names")
        return tokenise(self.arch, self.prompts, self.network)

    def check(self, state: Mapping[str, Tensor], end: str, remedy: str) -> int:
        """How many rows the head of an end has; refuses one that is not there and cannot be made."""
        names = None if self.prompts is None else self.prompts.class_names
        if HEAD_WEIGHT in state:
            rows = self.check_shape(state, end)
            if names is not None and rows != len(names):
                raise ValueError(
                    f"{end}: its head has {rows} classes, but there are {len(names)} class names; name the "
                    "classes of that head, in its order (--class-names)"
                )
            return rows
        refuse_without_text(state, end, f"it has no head either: {remedy}")
        if names is None:
            raise ValueError(
                f"{end}: the checkpoint has no head ({HEAD_WEIGHT!r}), but a text tower that can make one: "
                f"give --class-names (and --templates), or {remedy}"
            )
        with naming(end):
            _text_weights(self.arch, state)
            if self.scale is None:
                check_scale(state)
            _ = self.tokens  # refuses an architecture whose prompts cannot be tokenised
        return len(names)

    def check_shape(self, head: Mapping[str, Tensor], end: str) -> int:
        """The rows of a head; refuses other shapes."""
        weight = head[HEAD_WEIGHT]
        rows = len(weight) if weight.ndim else 0
        if weight.shape != (rows, self.features) or rows == 0:
            raise ValueError(
                f"{end}: {HEAD_WEIGHT!r} must be [classes, {self.features}], got {list(weight.shape)}; "
                "it is of another architecture"
            )
        if HEAD_BIAS in head and head[HEAD_BIAS].shape != (rows,):
            raise ValueError(f"{end}: {HEAD_BIAS!r} must be [{rows}], got {list(head[HEAD_BIAS].shape)}")
        return rows

    def make(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The head of a checkpoint that was checked."""
        if HEAD_WEIGHT not in state:
            return _filled({HEAD_WEIGHT: self.encode(state)})
        return _filled(state)

    def encode(self, state: Mapping[str, Tensor]) -> Tensor:
        """The head that a checkpoint's text tower makes of the prompts: float32 [classes, features]."""
        weights, scale = _text_weights(self.arch, state), _factor(state, self.scale)
        if self.stand_ins:
            return scale * _stand_in(weights, len(self.tokens), self.features)
        return _encode(self.arch, weights, self.tokens, scale, self.device)


def zeroshot_head(
    arch: str,
    state: Mapping[str, Tensor],
    prompts: Prompts,
    scale: float | None = None,
    device: str | torch.device = "cpu",
) -> Tensor:
    """The head that a checkpoint's text tower makes of the prompts, as in CLIP, WiSE-FT and FLYP.

    For each class, the normalised mean over its templates of the normalised text features, times scale
    (None: exp(logit_scale) of the checkpoint).

    state: under canonical names. device: where it is computed, in float32.

    Returns float32 [classes, d], on the CPU. Raises ValueError for a checkpoint without the text tower of
    this architecture, and where the prompts cannot be tokenised.
    """
    refuse_without_text(state, "zeroshot_head", "use a checkpoint with both towers")
    return HeadMaker(arch, prompts, scale, device=device).encode(state)


def _encode(
    arch: str, weights: Mapping[str, Tensor], tokens: Tensor, scale: float, device: str | torch.device
) -> Tensor:
    """weights: by the text tower's own names. tokens: int64 [classes, templates, context]."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        tower = architectures.text(arch).eval()
    # Assigned, so that float32 weights are not held twice.
    tower.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    tower.to(device)
    classes, templates, _ = tokens.shape
    head = []
    with torch.no_grad(), tqdm(total=classes, desc="making the head", disable=None, leave=False) as bar:
        for part in torch.split(tokens, max(1, BATCH // templates)):
            head.append(directions(tower(part.flatten(0, 1).to(device)), templates).cpu())
            bar.update(len(part))
    return scale * torch.cat(head)


def _stand_in(weights: Mapping[str, Tensor], classes: int, features: int) -> Tensor:
    """Rows of length 1 at random, the same for the same text tower: float32 [classes, features]."""
    found = hashlib.blake2b(digest_size=7)
    for _, tensor in sorted(weights.items()):
        found.update(tensor.float().cpu().contiguous().numpy().data.cast("B"))
    generator = torch.Generator().manual_seed(int.from_bytes(found.digest(), "big"))
    return nn.functional.normalize(torch.randn(classes, features, generator=generator))


def _text_weights(arch: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text tower of a checkpoint by the tower's own names, compared with that of the architecture."""
    with torch.device("meta"):
        shapes = matching.shapes_of("text", architectures.text(arch))
    used = {text_name(n): t for n, t in state.items() if n.partition(".")[0] in ("text", *TEXT)}
    matching.compare(arch, shapes, used, state)
    return {name.removeprefix("text."): tensor for name, tensor in used.items()}


def refuse_without_text(state: Mapping[str, Tensor], end: str, remedy: str) -> None:
    if not any(name.startswith(("transformer.", "text.")) for name in state):
        raise ValueError(
            f"{end}: the checkpoint has no text tower, or only a rest of it (model-soups' files lack "
            f"'transformer'); {remedy}"
        )


def _factor(state: Mapping[str, Tensor], scale: float | None) -> float:
    if scale is not None:
        return scale
    check_scale(state)
    return math.exp(float(state[SCALE]))


def check_scale(state: Mapping[str, Tensor]) -> None:
    if SCALE not in state or state[SCALE].numel() != 1:
        raise ValueError(
            f"the checkpoint has no {SCALE!r} of one element, which gives the scale of a head that is made "
            "from prompts; give --head-scale (100 for models that descend from OpenAI's)"
        )
    # Its exponential is the factor of the logits: CLIP's is 4.6, the logarithm of 100.
    scale = 0.0 if state[SCALE].is_meta else float(state[SCALE])
    if not -_LARGEST_SCALE <= scale <= _LARGEST_SCALE:
        raise ValueError(
            f"the checkpoint's {SCALE!r} is {scale:g}, whose exponential float32 cannot hold; is it the "
            "factor itself, instead of its logarithm, or is the file damaged?"
        )


def _filled(head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weight and bias of a head; a missing bias is zero."""
    weight = head[HEAD_WEIGHT]
    bias = head[HEAD_BIAS] if HEAD_BIAS in head else weight.new_zeros(len(weight))
    return {HEAD_WEIGHT: weight, HEAD_BIAS: bias}


def text_name(name: str) -> str:
    return name if name.startswith("text.") else f"text.{name}"


@contextmanager
def naming(end: str) -> Iterator[None]:
    """Says of which end a ValueError is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{end}: {error}") from error
