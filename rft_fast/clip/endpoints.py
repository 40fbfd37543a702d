"""Two checkpoints -> the ends of a path and the live model between them: which heads, which towers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from .. import checkpoints
from ..checkpoints.canonical import HEAD_BIAS, HEAD_WEIGHT, INERT, POSITIONS, TEXT, is_visual
from ..common.parametrised import factors
from ..common.words import some
from ..names import HEADS, TOWERS, HeadChoice, Towers
from . import architectures, matching
from .classifier import ImageClassifier, ZeroShotClassifier
from .heads import SCALE, HeadMaker, check_scale, naming, refuse_without_text, text_name
from .prompts import Prompts

ZEROSHOT, FINETUNED = "zero-shot end", "fine-tuned end"
# First component of a name -> why it cannot change the output if both towers are on the path.
_INERT_BOTH = {
    "attn_mask": "causal mask: the text tower creates its own",
    "classification_head": "head: made from the prompts instead",
    "logit_bias": "logit bias: the same for every class",
    "text_decoder": "text decoder: not part of a classifier",
}


@dataclass(frozen=True, eq=False)
class Setup:
    """How two checkpoints become a path.

    Attributes:
        arch: as for :func:`rft_fast.clip.architectures.config`.
        towers: ``image``: image tower and head are on the path. ``both``: both towers are, and the text tower
            makes the head from the prompts at every alpha (FLYP).
        head: heads of the ends. ``interpolate``: each has its own. ``zeroshot``: both have the zero-shot one.
            ``finetuned``: both have the fine-tuned one. A checkpoint's own head is the one that it holds;
            without one, its text tower makes it from the prompts.
        prompts: classes and templates, needed if a head is made.
        scale: factor of a head that is made (100 in model-soups); None: exp(logit_scale) of the checkpoint.
        zeroshot_head: ``classification_head.weight`` [classes, d], and optionally ``.bias`` [classes], used
            instead of the zero-shot checkpoint's own (:func:`rft_fast.checkpoints.load_head`).
        network: whether a tokenizer may be downloaded (:func:`rft_fast.clip.tokenizers.tokenizer`).
        resize_positions: whether position embeddings for another image size are resampled, with a warning
            (:func:`rft_fast.clip.matching.resized`).

    Raises:
        ValueError: a value is unknown, or values contradict each other.
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
                raise ValueError("Setup: with both towers, the head is made from prompts; give --class-names")
            if self.head != "interpolate" or self.zeroshot_head is not None:
                raise ValueError(
                    "Setup: with both towers on the path, the text tower makes the head from prompts at "
                    "every alpha; leave --head and --zeroshot-head out, or use --towers image"
                )
        if self.zeroshot_head is not None:
            if self.head == "finetuned":
                raise ValueError(
                    "Setup: --head finetuned does not use the zero-shot head; leave --zeroshot-head out"
                )
            if HEAD_WEIGHT not in self.zeroshot_head or set(self.zeroshot_head) - {HEAD_WEIGHT, HEAD_BIAS}:
                raise ValueError(
                    f"Setup: a head must have {HEAD_WEIGHT!r}, and may have {HEAD_BIAS!r}; got "
                    f"{some(list(self.zeroshot_head)) or 'nothing'}"
                )
        if self.scale is not None:
            if self.prompts is None:
                raise ValueError(
                    "Setup: the scale is for a head made from prompts, but there are none; give "
                    "--class-names, or leave --head-scale out"
                )
            if not (math.isfinite(self.scale) and self.scale > 0):
                raise ValueError(f"Setup: the head's scale must be a positive number, got {self.scale}")


class Ends:
    """The two ends of a path, and the live model between them.

    The constructor only checks. Models and heads are made on first use, so that :meth:`check` can check every
    fine-tuned checkpoint before a prompt is encoded.

    Args:
        setup: how the checkpoints become ends.
        zeroshot: zero-shot checkpoint by canonical name (:func:`rft_fast.checkpoints.load`); float tensors of
            the dtypes that :class:`rft_fast.Path` accepts, on any device.
        classes: number of classes of the fine-tuned heads; only needed with ``head="finetuned"`` if neither
            the prompts nor the zero-shot checkpoint show it.
        device: where prompts are encoded; slow on a CPU for many prompts.
        stand_ins: encode no prompts. Heads that would be made have random weights, the same for the same text
            tower: enough to check and time a run.

    Attributes:
        setup: as the argument.
        classes: rows of the head.
        inert: name in the zero-shot checkpoint -> why it cannot change the live model's output.

    Raises:
        ValueError: the checkpoint is of another architecture (the message has the one that fits), has unknown
            names, has no head and no text tower (the message has the option that helps), or has another
            number of classes than the prompts. Raised before anything large is made.
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
        self.setup, self._stand_ins = setup, stand_ins
        self._heads = HeadMaker(setup.arch, setup.prompts, setup.scale, setup.network, device, stand_ins)
        self._both = setup.towers == "both"
        self._made: dict[str, dict[str, Tensor]] = {}
        with torch.device("meta"):  # names and shapes only
            visual = architectures.visual(setup.arch)
            self._grid: tuple[int, int] | None = getattr(visual, "grid_size", None)
            self._shapes = matching.shapes_of("visual", visual)
            if self._both:
                self._shapes |= matching.shapes_of("text", architectures.text(setup.arch))
                self._shapes[SCALE] = torch.Size(())
        self._tower, self.inert = self._towers(zeroshot, ZEROSHOT)
        self._owner: Mapping[str, Tensor] | None = None  # holds the head of the zero-shot end
        self._scaled = self._both  # whether a head is made at the zero-shot end
        if self._both:
            self.classes = len(self._heads.tokens)
        elif setup.head == "finetuned":
            self.classes = self._count_classes(zeroshot, classes)
        else:
            self._owner = zeroshot if setup.zeroshot_head is None else setup.zeroshot_head
            self.classes = self._check_head(self._owner, ZEROSHOT)
            self._scaled = HEAD_WEIGHT not in self._owner
            if setup.head == "zeroshot" and not self._scaled:
                self._refuse_scale()

    @cached_property
    def live(self) -> nn.Module:
        """The model on the CPU, in float32 and eval mode, with random weights.

        An :class:`ImageClassifier`; for both towers, a :class:`ZeroShotClassifier`.
        """
        arch = self.setup.arch
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            visual = architectures.visual(arch)
            if not self._both:
                return ImageClassifier(visual, nn.Linear(self._heads.features, self.classes)).eval()
            scale = nn.Parameter(torch.zeros(()))
            return ZeroShotClassifier(visual, architectures.text(arch), self._heads.tokens, scale).eval()

    @cached_property
    def zeroshot(self) -> dict[str, Tensor]:
        """The zero-shot end by the live model's names; tensors are those of the checkpoint, not copies.

        With ``head="finetuned"`` it has no head: each fine-tuned model provides it.
        """
        if self._owner is None:
            return self._tower
        head = self._heads.make(self._owner)
        self._owner = None  # frees the text tower
        return {**self._tower, **head}

    @property
    def heads(self) -> int:
        """Number of heads made from prompts so far, each from all prompts."""
        return len(self._made) + int(self._scaled and not self._both and self._owner is None)

    def pair(
        self, finetuned: Mapping[str, Tensor], name: str | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the zero-shot and the fine-tuned end, with the choice of head applied.

        Args:
            finetuned: checkpoint by canonical name.
            name: key of a head that is made from prompts, so that it is made once per model; None: not kept.

        Returns:
            Two state dicts with the live model's names. Tensors are those of the checkpoints, except a head
            made from prompts and a missing bias (zeros).

        Raises:
            ValueError: as :meth:`check`.
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
            head = self._heads.make(finetuned)
            if name is not None and HEAD_WEIGHT not in finetuned:
                self._made[name] = head
        common = head if self.setup.head == "finetuned" else {}
        return {**self.zeroshot, **common}, {**tuned, **head}

    def check(self, finetuned: Mapping[str, Tensor]) -> None:
        """Check a fine-tuned checkpoint before anything is computed.

        Args:
            finetuned: checkpoint by canonical name.

        Raises:
            ValueError: as the constructor, or the two heads have different numbers of classes.
        """
        self._towers(finetuned, FINETUNED)
        if self._both or self.setup.head == "zeroshot":
            return
        rows = self._check_head(finetuned, FINETUNED)
        if HEAD_WEIGHT in finetuned and not self._scaled:
            self._refuse_scale()
        if rows != self.classes and self.setup.head == "finetuned":
            raise ValueError(
                f"{FINETUNED}: its head has {rows} classes, but the others have {self.classes}; sweep "
                "models with other classes separately"
            )
        if rows != self.classes:
            raise ValueError(
                f"{FINETUNED}: its head has {rows} classes, but the zero-shot end has {self.classes}; "
                "use one head for both ends (--head zeroshot or finetuned), or models with the same "
                "classes"
            )

    def check_lineage(self, finetuned: Mapping[str, Tensor], unrelated: bool = False) -> None:
        """Check that a fine-tuned end differs from the zero-shot one and was fine-tuned from it.

        Reads all weights once. A linear probe, with the same tower and another head, is accepted.

        Args:
            finetuned: a checkpoint that :meth:`check` accepts.
            unrelated: accept an end of another training (``--unrelated``).

        Raises:
            ValueError: the weights are the same; the rows of the heads are in different orders; or the cosine
                between the matrices of the image towers is below
                :data:`rft_fast.checkpoints.lineage.UNRELATED`.
        """
        tower = self._towers(finetuned, FINETUNED)[0]
        kinship = checkpoints.kinship(self._tower, tower, is_visual)
        problem = kinship.identical()
        if problem is not None and (self._both or self.setup.head == "interpolate"):
            a, b = self.pair(finetuned)
            if not checkpoints.kinship(a, b, lambda name: not is_visual(name)).same:
                problem = None
        known = not (self._stand_ins and self._scaled)  # whether the zero-shot head is not a stand-in
        if problem is None and self.setup.head == "interpolate" and HEAD_WEIGHT in finetuned and known:
            problem = checkpoints.moved_rows(self.zeroshot, finetuned)
        if problem is None and not unrelated:
            problem = kinship.unrelated()
        if problem is not None:
            raise ValueError(f"{FINETUNED}: it has {problem}")

    # --- towers ---------------------------------------------------------------------------------------

    def _towers(self, state: Mapping[str, Tensor], end: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the towers by the live model's names, and why other names (but the head) have no effect."""
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
                used[text_name(name)] = tensor
            elif self._both and name == SCALE:
                used[name] = tensor.reshape(()) if tensor.numel() == 1 else tensor
            elif first in reasons:
                inert[name] = reasons[first]
            elif name not in (HEAD_WEIGHT, HEAD_BIAS):
                unknown.append(name)
        if unknown:
            raise ValueError(
                f"{end}: {some(unknown)} belong to no image tower ('visual.*'), head "
                f"({HEAD_WEIGHT!r}, {HEAD_BIAS!r}) or text tower; is this a CLIP model?"
            )
        if not any(map(is_visual, used)):
            raise ValueError(f"{end}: the checkpoint has no image tower ('visual.*')")
        if self._both:
            refuse_without_text(state, end, "use --towers image")
            if self.setup.scale is not None:
                used[SCALE] = torch.tensor(math.log(self.setup.scale))
            with naming(end):
                check_scale(used)
        with naming(end):
            if self.setup.resize_positions:
                self._resize(used, end)
            matching.compare(self.setup.arch, self._shapes, used, state)
            self._check_activation(state)
        return used, inert

    def _resize(self, used: dict[str, Tensor], end: str) -> None:
        """Resample position embeddings of another image size in place, with a warning."""
        positions = used.get(POSITIONS)
        if positions is None or self._grid is None:
            return
        used[POSITIONS] = resized = matching.resized(positions, self._grid)
        if resized is not positions:
            warnings.warn(
                f"{end}: its position embeddings were resampled from {len(positions) - 1} cells to "
                f"{self._grid[0]} x {self._grid[1]}, for the image size of {self.setup.arch}",
                stacklevel=2,
            )

    def _check_activation(self, state: Mapping[str, Tensor]) -> None:
        """Check the activations that a checkpoint shows against the architecture."""
        made = self.setup.prompts is not None and HEAD_WEIGHT not in state
        towers = ("image", "text") if self._both or made else ("image",)
        matching.check_evidence(self.setup.arch, getattr(state, "activation", {}), towers)

    # --- heads ----------------------------------------------------------------------------------------

    def _count_classes(self, zeroshot: Mapping[str, Tensor], classes: int | None) -> int:
        """Return the number of classes if the zero-shot end has no head of its own."""
        if self.setup.prompts is not None:
            return len(self.setup.prompts.class_names)
        if classes is not None:
            return classes
        if HEAD_WEIGHT in zeroshot:
            return self._heads.check_shape(zeroshot, ZEROSHOT)
        raise ValueError(
            f"{ZEROSHOT}: it has no head, so the number of classes is unknown; give --class-names"
        )

    def _refuse_scale(self) -> None:
        """Refuse a scale if no head is made."""
        if self.setup.scale is not None:
            raise ValueError(
                f"ends: a head scale of {self.setup.scale} has no effect, because no head is made "
                "from prompts; leave --head-scale out"
            )

    def _check_head(self, state: Mapping[str, Tensor], end: str) -> int:
        remedy = "give --zeroshot-head FILE" if end == ZEROSHOT else "use --head zeroshot"
        return self._heads.check(state, end, remedy)
