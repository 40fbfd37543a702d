"""Classification heads: those that checkpoints hold, and those that a text tower makes from prompts."""

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

BATCH = 256  # prompts that are encoded together
SCALE = "logit_scale"
_LARGEST_SCALE = 88.0  # e**88 is 1.7e38


@dataclass(eq=False)
class HeadMaker:
    """Checks the heads of checkpoints, and makes missing ones from prompts.

    Attributes:
        arch: as for :func:`rft_fast.clip.architectures.config`.
        prompts: classes and templates; None: no head can be made.
        scale: factor of a head that is made; None: exp(logit_scale) of the checkpoint.
        network: whether a tokenizer may be downloaded (:func:`rft_fast.clip.tokenizers.tokenizer`).
        device: where prompts are encoded.
        stand_ins: encode no prompts; heads have random weights, the same for the same text tower.
    """

    arch: str
    prompts: Prompts | None
    scale: float | None = None
    network: bool | None = None
    device: str | torch.device = "cpu"
    stand_ins: bool = False

    @cached_property
    def features(self) -> int:
        """Number of columns of a head."""
        return int(architectures.config(self.arch)[1]["embed_dim"])

    @cached_property
    def tokens(self) -> Tensor:
        """The prompts: int64 [classes, templates, context]; raises ValueError if there are none."""
        if self.prompts is None:
            raise ValueError("ends: there are no prompts to make a head from; give --class-names")
        return tokenise(self.arch, self.prompts, self.network)

    def check(self, state: Mapping[str, Tensor], end: str, remedy: str) -> int:
        """Check that a checkpoint has a head, or that one can be made.

        Args:
            state: checkpoint by canonical name.
            end: start of the error message.
            remedy: what to do if there is no head.

        Returns:
            The number of rows.

        Raises:
            ValueError: there is no head and none can be made, or it does not fit the architecture or the
                class names.
        """
        names = None if self.prompts is None else self.prompts.class_names
        if HEAD_WEIGHT in state:
            rows = self.check_shape(state, end)
            if names is not None and rows != len(names):
                raise ValueError(
                    f"{end}: its head has {rows} classes, but there are {len(names)} class names; give "
                    "the class names of that head, in its order (--class-names)"
                )
            return rows
        refuse_without_text(state, end, f"it has no head either: {remedy}")
        if names is None:
            raise ValueError(
                f"{end}: the checkpoint has no head ({HEAD_WEIGHT!r}), but its text tower can make "
                f"one: give --class-names (and --templates), or {remedy}"
            )
        with naming(end):
            _text_weights(self.arch, state)
            if self.scale is None:
                check_scale(state)
            _ = self.tokens  # raises if the prompts cannot be tokenised
        return len(names)

    def check_shape(self, head: Mapping[str, Tensor], end: str) -> int:
        """Check the shape of a head.

        Args:
            head: checkpoint by canonical name, with a head.
            end: start of the error message.

        Returns:
            The number of rows.

        Raises:
            ValueError: the shape does not fit the architecture.
        """
        weight = head[HEAD_WEIGHT]
        rows = len(weight) if weight.ndim else 0
        if weight.shape != (rows, self.features) or rows == 0:
            raise ValueError(
                f"{end}: {HEAD_WEIGHT!r} must be [classes, {self.features}], got {list(weight.shape)}; "
                "it belongs to another architecture"
            )
        if HEAD_BIAS in head and head[HEAD_BIAS].shape != (rows,):
            raise ValueError(f"{end}: {HEAD_BIAS!r} must be [{rows}], got {list(head[HEAD_BIAS].shape)}")
        return rows

    def make(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the head of a checkpoint: its own, or made from the prompts.

        Args:
            state: a checkpoint that :meth:`check` accepts.

        Returns:
            ``classification_head.weight`` [classes, features] and ``.bias`` [classes]; a missing bias is
            zero.
        """
        if HEAD_WEIGHT not in state:
            return _filled({HEAD_WEIGHT: self.encode(state)})
        return _filled(state)

    def encode(self, state: Mapping[str, Tensor]) -> Tensor:
        """Make a head from the prompts by a checkpoint's text tower.

        Args:
            state: checkpoint by canonical name.

        Returns:
            float32 [classes, features], on the CPU.

        Raises:
            ValueError: the checkpoint has no text tower of this architecture, or the prompts cannot be
                tokenised.
        """
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
    """Make the head of a checkpoint's text tower from prompts, as CLIP, WiSE-FT and FLYP do.

    Per class: the normalised mean over its templates of the normalised text features, times ``scale``.

    Args:
        arch: as for :func:`rft_fast.clip.architectures.config`.
        state: checkpoint by canonical name.
        prompts: classes and templates.
        scale: factor; None: exp(logit_scale) of the checkpoint.
        device: where prompts are encoded, in float32.

    Returns:
        float32 [classes, features], on the CPU.

    Raises:
        ValueError: the checkpoint has no text tower of this architecture, or the prompts cannot be tokenised.
    """
    refuse_without_text(state, "zeroshot_head", "use a checkpoint with both towers")
    return HeadMaker(arch, prompts, scale, device=device).encode(state)


def _encode(
    arch: str, weights: Mapping[str, Tensor], tokens: Tensor, scale: float, device: str | torch.device
) -> Tensor:
    """Encode tokens int64 [classes, templates, context]; ``weights`` are by the text tower's own names."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        tower = architectures.text(arch).eval()
    # Assigned, so that float32 weights are not copied.
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
    """Return random rows of length 1, float32 [classes, features]; the seed is a hash of the text tower."""
    digest = hashlib.blake2b(digest_size=7)
    for _, tensor in sorted(weights.items()):
        digest.update(tensor.float().cpu().contiguous().numpy().data.cast("B"))
    generator = torch.Generator().manual_seed(int.from_bytes(digest.digest(), "big"))
    return nn.functional.normalize(torch.randn(classes, features, generator=generator))


def _text_weights(arch: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the text tower of a checkpoint by the tower's own names, after a check of shapes."""
    with torch.device("meta"):
        shapes = matching.shapes_of("text", architectures.text(arch))
    used = {text_name(n): t for n, t in state.items() if n.partition(".")[0] in ("text", *TEXT)}
    matching.compare(arch, shapes, used, state)
    return {name.removeprefix("text."): tensor for name, tensor in used.items()}


def refuse_without_text(state: Mapping[str, Tensor], end: str, remedy: str) -> None:
    """Raise an error if a checkpoint has no text tower.

    Args:
        state: checkpoint by canonical name.
        end: start of the error message.
        remedy: end of the error message.

    Raises:
        ValueError: there is none.
    """
    if not any(name.startswith(("transformer.", "text.")) for name in state):
        raise ValueError(
            f"{end}: the checkpoint has no complete text tower (files of model-soups lack "
            f"'transformer'); {remedy}"
        )


def _factor(state: Mapping[str, Tensor], scale: float | None) -> float:
    if scale is not None:
        return scale
    check_scale(state)
    return math.exp(float(state[SCALE]))


def check_scale(state: Mapping[str, Tensor]) -> None:
    """Check the logit scale of a checkpoint.

    Args:
        state: checkpoint by canonical name.

    Raises:
        ValueError: it is missing, not one element, or its exponential overflows float32.
    """
    if SCALE not in state or state[SCALE].numel() != 1:
        raise ValueError(
            f"the checkpoint has no {SCALE!r} with one element, the logit scale of a head made "
            "from prompts; give --head-scale (100 for models derived from OpenAI's)"
        )
    # The logarithm of the factor of the logits: 4.6 for CLIP, whose factor is 100.
    scale = 0.0 if state[SCALE].is_meta else float(state[SCALE])
    if not -_LARGEST_SCALE <= scale <= _LARGEST_SCALE:
        raise ValueError(
            f"the checkpoint's {SCALE!r} is {scale:g}, whose exponential overflows float32; is it "
            "the scale instead of its logarithm, or is the file damaged?"
        )


def _filled(head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weight and bias of a head; a missing bias is zero."""
    weight = head[HEAD_WEIGHT]
    bias = head[HEAD_BIAS] if HEAD_BIAS in head else weight.new_zeros(len(weight))
    return {HEAD_WEIGHT: weight, HEAD_BIAS: bias}


def text_name(name: str) -> str:
    """Return the name of a text tower's tensor below ``text.``, which a standard CLIP lacks."""
    return name if name.startswith("text.") else f"text.{name}"


@contextmanager
def naming(end: str) -> Iterator[None]:
    """Prefix a ValueError inside with the name of the end."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{end}: {error}") from error
