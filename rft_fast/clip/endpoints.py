"""Two checkpoints -> the two ends of a path, and the live model between them: whose head, which towers."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import checkpoints
from ..checkpoints.canonical import HEAD_BIAS, HEAD_WEIGHT, INERT, TEXT, is_visual
from ..common.parametrised import factors
from ..common.words import some
from ..names import HEADS, TOWERS, HeadChoice, Towers
from . import architectures
from .classifier import ImageClassifier, ZeroShotClassifier, directions
from .prompts import Prompts
from .prompts import tokens as tokenise

ZEROSHOT, FINETUNED = "zero-shot end", "fine-tuned end"
BATCH = 256  # prompts that are encoded at once

_SCALE = "logit_scale"
LARGEST_SCALE = 88.0  # e**88 is 1.7e38
# With both towers live: the first word of a name -> why it cannot change the output.
_INERT_BOTH = {
    "classification_head": "head: made anew from the prompts",
    "logit_bias": "logit bias: the same for every class",
    "text_decoder": "text decoder: no part of a classifier",
}


@dataclass(frozen=True, eq=False)
class Setup:
    """How two checkpoints become a path.

    arch: as in :func:`rft_fast.clip.architectures.config`.
    towers: "image": the image tower and the head's weights are on the path. "both": both towers are, and
        the head is made from the prompts wherever on the path the text tower is (FLYP).
    head: whose head the ends get. "interpolate": each its own. "zeroshot": both the zero-shot one.
        "finetuned": both the fine-tuned one. A checkpoint's own head is the one that it holds; failing
        that, the one that its own text tower makes of the prompts.
    prompts: every class in every template; needed where a head is made.
    scale: the factor of a head that is made (100 in model-soups); None: exp(logit_scale) of the checkpoint
        whose text tower makes it.
    zeroshot_head: ``classification_head.weight`` [classes, d], and ``.bias`` where there is one, which
        count instead of the zero-shot checkpoint's own (:func:`rft_fast.checkpoints.load_head`).
    network: whether a tokenizer may be downloaded (:func:`rft_fast.clip.architectures.tokenizer`).
    resize_positions: whether the positions of an image tower for another image size are resampled to the
        architecture's (:func:`rft_fast.clip.architectures.resized`), with a warning.

    Raises ValueError for values that are none of these, and for some that make no sense together.
    """

    arch: str
    towers: Towers = "image"
    head: HeadChoice = "interpolate"
    prompts: Prompts | None = None
    scale: float | None = None
    zeroshot_head: Mapping[str, Tensor] | None = None
    network: bool | None = None
    resize_positions: bool = False

    def __post_init__(self) -> None:
        for what, value, known in (("towers", self.towers, TOWERS), ("head", self.head, HEADS)):
            if value not in known:
                raise ValueError(f"Setup: {what} must be one of {', '.join(known)}; got {value!r}")
        if self.towers == "both":
            if self.prompts is None:
                raise ValueError("Setup: both towers need prompts to make the head from; give --class-names")
            if self.head != "interpolate" or self.zeroshot_head is not None:
                raise ValueError(
                    "Setup: with both towers on the path, the head is what the text tower makes of the "
                    "prompts at every point, and no other can be chosen; leave --head and --zeroshot-head "
                    "out, or use --towers image"
                )
        if self.zeroshot_head is not None:
            if self.head == "finetuned":
                raise ValueError(
                    "Setup: with --head finetuned, the zero-shot head counts nowhere; leave --zeroshot-head "
                    "out"
                )
            if HEAD_WEIGHT not in self.zeroshot_head or set(self.zeroshot_head) - {HEAD_WEIGHT, HEAD_BIAS}:
                raise ValueError(
                    f"Setup: a head has {HEAD_WEIGHT!r} and perhaps {HEAD_BIAS!r}; got "
                    f"{some(list(self.zeroshot_head)) or 'nothing'}"
                )
        if self.scale is not None:
            if self.prompts is None:
                raise ValueError(
                    "Setup: the scale is that of a head made from prompts, and there are none; give "
                    "--class-names, or leave --head-scale out"
                )
            if not (math.isfinite(self.scale) and self.scale > 0):
                raise ValueError(f"Setup: the head's scale must be a positive number, got {self.scale}")


class Ends:
    """The two ends of a path, and the live model between them.

    setup: how the checkpoints become ends.
    zeroshot: the zero-shot checkpoint, under canonical names (:func:`rft_fast.checkpoints.load`); float
        tensors of any float type that :class:`rft_fast.Path` takes, on any device.
    classes: how many classes the fine-tuned heads have. Only needed with ``head="finetuned"`` where neither
        prompts nor the zero-shot checkpoint tell.
    device: where heads are made from prompts; many prompts are slow on a CPU.
    stand_ins: encode no prompts. A head that would be made from them is random numbers of its shape, the same
        ones for the same text tower: enough to check and to time what a run does, and nothing else.

    Attributes:
        classes: rows of the head.
        inert: name in the zero-shot checkpoint -> why it cannot change the live model's output.

    Only checks: models and heads are made when they are first asked for, so that :meth:`check` can be asked
    about every fine-tuned checkpoint before a prompt is encoded.

    Raises ValueError, before anything large is made, for a checkpoint of another architecture (with the
    one it fits), with names unknown here, without a needed text tower or head (with the option that helps),
    or with as many classes in its head as the prompts have not.
    """

    def __init__(
        self,
        setup: Setup,
        zeroshot: Mapping[str, Tensor],
        classes: int | None = None,
        device: str | torch.device = "cpu",
        *,
        stand_ins: bool = False,
    ) -> None:
        self.setup, self._device, self._stand_ins = setup, device, stand_ins
        self._both = setup.towers == "both"
        self._made: dict[str, dict[str, Tensor]] = {}
        self._features: int = architectures.config(setup.arch)[1]["embed_dim"]
        with torch.device("meta"):  # names and shapes without memory
            visual = architectures.visual(setup.arch)
            self._grid: tuple[int, int] | None = getattr(visual, "grid_size", None)
            self._shapes = _shapes("visual", visual)
            if self._both:
                self._shapes |= _shapes("text", architectures.text(setup.arch)) | {_SCALE: torch.Size(())}
        self._tower, self.inert = self._towers(zeroshot, ZEROSHOT)
        self._owner: Mapping[str, Tensor] | None = None  # of the head of the zero-shot end
        self._scaled = self._both  # whether the scale of a head that is made counts at the zero-shot end
        if self._both:
            self.classes = len(self._tokens)
        elif setup.head == "finetuned":
            self.classes = self._told(zeroshot, classes)
        else:
            self._owner = zeroshot if setup.zeroshot_head is None else setup.zeroshot_head
            self.classes = self._check_head(self._owner, ZEROSHOT)
            self._scaled = HEAD_WEIGHT not in self._owner
            if setup.head == "zeroshot" and not self._scaled:
                self._refuse_scale()

    @cached_property
    def live(self) -> nn.Module:
        """The model, on the CPU, in float32 and in eval mode, with random weights.

        An :class:`ImageClassifier`, or, for both towers, a :class:`ZeroShotClassifier`.
        """
        arch = self.setup.arch
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            visual = architectures.visual(arch)
            if not self._both:
                return ImageClassifier(visual, nn.Linear(self._features, self.classes)).eval()
            scale = nn.Parameter(torch.zeros(()))
            return ZeroShotClassifier(visual, architectures.text(arch), self._tokens, scale).eval()

    @cached_property
    def zeroshot(self) -> dict[str, Tensor]:
        """The zero-shot end, as the live model's state dict names it; tensors are those given, not copies.

        With ``head="finetuned"`` it lacks the head, which each fine-tuned model brings: then the zero-shot
        end is another one for each of them.
        """
        if self._owner is None:
            return self._tower
        head = self._own(self._owner)
        self._owner = None  # a text tower is not kept longer than it is needed
        return {**self._tower, **head}

    @property
    def heads(self) -> int:
        """How many heads were made from prompts, each from all of them."""
        return len(self._made) + int(self._scaled and not self._both and self._owner is None)

    def pair(
        self, finetuned: Mapping[str, Tensor], name: str | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The zero-shot and the fine-tuned end, with the choice of head applied.

        finetuned: a checkpoint under canonical names. name: what a head that is made from prompts is kept
            under, so that the same model's is not made again; None: it is not kept.

        Returns two state dicts with the live model's names. Their tensors are those given; only a head
        that is made from prompts, and a missing bias (zeros), are new.

        Raises what :meth:`check` raises.
        """
        self.check(finetuned)
        tuned = self._towers(finetuned, FINETUNED)[0]
        if self._both:
            return {**self.zeroshot}, tuned
        if self.setup.head == "zeroshot":
            head = {name: self.zeroshot[name] for name in (HEAD_WEIGHT, HEAD_BIAS)}
        elif name in self._made:
            head = self._made[name]
        else:
            head = self._own(finetuned)
            if name is not None and HEAD_WEIGHT not in finetuned:
                self._made[name] = head
        common = head if self.setup.head == "finetuned" else {}
        return {**self.zeroshot, **common}, {**tuned, **head}

    def check(self, finetuned: Mapping[str, Tensor]) -> None:
        """Refuses a fine-tuned checkpoint that cannot be an end, before anything is computed.

        Raises ValueError as the constructor does, and where the two heads have not the same classes.
        """
        self._towers(finetuned, FINETUNED)
        if self._both or self.setup.head == "zeroshot":
            return
        rows = self._check_head(finetuned, FINETUNED)
        if HEAD_WEIGHT in finetuned and not self._scaled:
            self._refuse_scale()
        if rows != self.classes and self.setup.head == "finetuned":
            raise ValueError(
                f"{FINETUNED}: its head has {rows} classes, where the others have {self.classes}; models of "
                "other classes need a sweep of their own"
            )
        if rows != self.classes:
            raise ValueError(
                f"{FINETUNED}: its head has {rows} classes, where {self.classes} were expected, as at the "
                "zero-shot end; use --head zeroshot (or finetuned) for one end's head at both, or models of "
                "the same classes"
            )

    def check_lineage(self, finetuned: Mapping[str, Tensor], unrelated: bool = False) -> None:
        """Refuses a fine-tuned end that is the zero-shot one, or that was not fine-tuned from it.

        Reads all weights once. A linear probe, with the same tower and another head, is accepted.

        Args:
            finetuned: a checkpoint that :meth:`check` accepts.
            unrelated: whether it may be of another training (``--unrelated``).

        Raises:
            ValueError: the same weights; the zero-shot head's rows in another order; or a cosine between the
                matrices of the image towers below :data:`rft_fast.checkpoints.lineage.UNRELATED`.
        """
        tower = self._towers(finetuned, FINETUNED)[0]
        found = checkpoints.kinship(self._tower, tower, is_visual)
        why = found.identical()
        if why is not None and (self._both or self.setup.head == "interpolate"):
            a, b = self.pair(finetuned)
            if not checkpoints.kinship(a, b, lambda name: not is_visual(name)).same:
                why = None
        known = not (self._stand_ins and self._scaled)  # the zero-shot head, which else is random numbers
        if why is None and self.setup.head == "interpolate" and HEAD_WEIGHT in finetuned and known:
            why = checkpoints.moved_rows(self.zeroshot, finetuned)
        if why is None and not unrelated:
            why = found.unrelated()
        if why is not None:
            raise ValueError(f"{FINETUNED}: it has {why}")

    # --- towers ---------------------------------------------------------------------------------------

    def _towers(self, state: Mapping[str, Tensor], end: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The towers under the live model's names, and why each other name but the head has no effect."""
        used: dict[str, Tensor] = {}
        inert: dict[str, str] = {}
        unknown = []
        for what, names in factors(state).items():
            raise ValueError(f"{end}: the checkpoint holds {what} ({some(names, 3)})")
        reasons = _INERT_BOTH if self._both else INERT
        for name, tensor in state.items():
            first = name.partition(".")[0]
            if first == "visual":
                used[name] = tensor
            elif self._both and (first == "text" or first in TEXT):
                used[_below_text(name)] = tensor
            elif self._both and name == _SCALE:
                used[name] = tensor.reshape(()) if tensor.numel() == 1 else tensor
            elif first in reasons:
                inert[name] = reasons[first]
            elif name not in (HEAD_WEIGHT, HEAD_BIAS):
                unknown.append(name)
        if unknown:
            raise ValueError(
                f"{end}: {some(unknown)} belong neither to an image tower ('visual.*'), a head "
                f"({HEAD_WEIGHT!r}, {HEAD_BIAS!r}) nor a text tower; is this a CLIP model?"
            )
        if not any(map(is_visual, used)):
            raise ValueError(f"{end}: the checkpoint has no image tower ('visual.*')")
        if self._both:
            _refuse_without_text(state, end, "use --towers image")
            if self.setup.scale is not None:
                used[_SCALE] = torch.tensor(math.log(self.setup.scale))
            with _at(end):
                _check_scale(used)
        with _at(end):
            if self.setup.resize_positions:
                self._resize(used, end)
            architectures.compare(self.setup.arch, self._shapes, used, state)
            self._check_activation(state)
        return used, inert

    def _resize(self, used: dict[str, Tensor], end: str) -> None:
        """Resamples the positions of another image size, in place, and warns of it."""
        positions = used.get(architectures.POSITIONS)
        if positions is None or self._grid is None:
            return
        used[architectures.POSITIONS] = resized = architectures.resized(positions, self._grid)
        if resized is not positions:
            warnings.warn(
                f"{end}: its positions were resampled from {len(positions) - 1} cells to {self._grid[0]} x "
                f"{self._grid[1]}, the image size of {self.setup.arch}",
                stacklevel=2,
            )

    def _check_activation(self, state: Mapping[str, Tensor]) -> None:
        """Refuses a checkpoint that says of itself that it has another activation than the architecture."""
        made = self.setup.prompts is not None and HEAD_WEIGHT not in state
        towers = ("image", "text") if self._both or made else ("image",)
        architectures.check_evidence(self.setup.arch, getattr(state, "activation", {}), towers)

    # --- heads ----------------------------------------------------------------------------------------

    @cached_property
    def _tokens(self) -> Tensor:
        if self.setup.prompts is None:
            raise ValueError("ends: there are no prompts to make a head from; give --class-names")
        return tokenise(self.setup.arch, self.setup.prompts, self.setup.network)

    def _told(self, zeroshot: Mapping[str, Tensor], classes: int | None) -> int:
        """How many classes there are, where the zero-shot end has no head of its own."""
        if self.setup.prompts is not None:
            return len(self.setup.prompts.class_names)
        if classes is not None:
            return classes
        if HEAD_WEIGHT in zeroshot:
            return _check_shape(zeroshot, self._features, ZEROSHOT)
        raise ValueError(
            f"{ZEROSHOT}: it has no head, so how many classes the fine-tuned ones have is not known; "
            "give --class-names"
        )

    def _refuse_scale(self) -> None:
        if self.setup.scale is not None:
            raise ValueError(
                f"ends: a head scale of {self.setup.scale} would change nothing, as no head is made from "
                "prompts here: they are given as they are; leave --head-scale out"
            )

    def _check_head(self, state: Mapping[str, Tensor], end: str) -> int:
        """How many rows the head of an end has; refuses one that is not there and cannot be made."""
        names = None if self.setup.prompts is None else self.setup.prompts.class_names
        if HEAD_WEIGHT in state:
            rows = _check_shape(state, self._features, end)
            if names is not None and rows != len(names):
                raise ValueError(
                    f"{end}: its head has {rows} classes, but there are {len(names)} class names; name the "
                    "classes of that head, in its order (--class-names)"
                )
            return rows
        remedy = "give --zeroshot-head FILE" if end == ZEROSHOT else "use --head zeroshot"
        _refuse_without_text(state, end, f"it has no head either: {remedy}")
        if names is None:
            raise ValueError(
                f"{end}: the checkpoint has no head ({HEAD_WEIGHT!r}), but a text tower that can make one: "
                f"give --class-names (and --templates), or {remedy}"
            )
        with _at(end):
            _text_weights(self.setup.arch, state)
            if self.setup.scale is None:
                _check_scale(state)
            _ = self._tokens  # refuses an architecture whose prompts cannot be tokenised
        return len(names)

    def _own(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The head of a checkpoint that was checked."""
        if HEAD_WEIGHT in state:
            return _filled(state)
        weights, scale = _text_weights(self.setup.arch, state), _factor(state, self.setup.scale)
        if self._stand_ins:
            return _filled({HEAD_WEIGHT: scale * _stand_in(weights, len(self._tokens), self._features)})
        return _filled({HEAD_WEIGHT: _encode(self.setup.arch, weights, self._tokens, scale, self._device)})


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
    _refuse_without_text(state, "zeroshot_head", "use a checkpoint with both towers")
    weights, factor = _text_weights(arch, state), _factor(state, scale)
    return _encode(arch, weights, tokenise(arch, prompts), factor, device)


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
        shapes = _shapes("text", architectures.text(arch))
    used = {_below_text(n): t for n, t in state.items() if n.partition(".")[0] in ("text", *TEXT)}
    architectures.compare(arch, shapes, used, state)
    return {name.removeprefix("text."): tensor for name, tensor in used.items()}


def _refuse_without_text(state: Mapping[str, Tensor], end: str, remedy: str) -> None:
    if not any(name.startswith(("transformer.", "text.")) for name in state):
        raise ValueError(
            f"{end}: the checkpoint has no text tower, or only a rest of it (model-soups' files lack "
            f"'transformer'); {remedy}"
        )


def _factor(state: Mapping[str, Tensor], scale: float | None) -> float:
    if scale is not None:
        return scale
    _check_scale(state)
    return math.exp(float(state[_SCALE]))


def _check_scale(state: Mapping[str, Tensor]) -> None:
    if _SCALE not in state or state[_SCALE].numel() != 1:
        raise ValueError(
            f"the checkpoint has no {_SCALE!r} of one element, which gives the scale of a head that is made "
            "from prompts; give --head-scale (100 for models that descend from OpenAI's)"
        )
    # Its exponential is the factor of the logits: CLIP's is 4.6, the logarithm of 100.
    scale = 0.0 if state[_SCALE].is_meta else float(state[_SCALE])
    if not -LARGEST_SCALE <= scale <= LARGEST_SCALE:
        raise ValueError(
            f"the checkpoint's {_SCALE!r} is {scale:g}, whose exponential float32 cannot hold; is it the "
            "factor itself, instead of its logarithm, or is the file damaged?"
        )


def _check_shape(head: Mapping[str, Tensor], features: int, end: str) -> int:
    """The rows of a head; refuses other shapes."""
    weight = head[HEAD_WEIGHT]
    rows = len(weight) if weight.ndim else 0
    if weight.shape != (rows, features) or rows == 0:
        raise ValueError(
            f"{end}: {HEAD_WEIGHT!r} must be [classes, {features}], got {list(weight.shape)}; "
            "it is of another architecture"
        )
    if HEAD_BIAS in head and head[HEAD_BIAS].shape != (rows,):
        raise ValueError(f"{end}: {HEAD_BIAS!r} must be [{rows}], got {list(head[HEAD_BIAS].shape)}")
    return rows


def _filled(head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weight and bias of a head; a missing bias is zero."""
    weight = head[HEAD_WEIGHT]
    bias = head[HEAD_BIAS] if HEAD_BIAS in head else weight.new_zeros(len(weight))
    return {HEAD_WEIGHT: weight, HEAD_BIAS: bias}


def _below_text(name: str) -> str:
    return name if name.startswith("text.") else f"text.{name}"


def _shapes(prefix: str, tower: nn.Module) -> dict[str, torch.Size]:
    return {f"{prefix}.{name}": tensor.shape for name, tensor in tower.state_dict().items()}


@contextmanager
def _at(end: str) -> Iterator[None]:
    """Says of which end a ValueError is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{end}: {error}") from error
