"""The model that training starts from: a zero-shot checkpoint, its head, and which weights are trained."""

from __future__ import annotations

import hashlib
import pathlib
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rft_fast import checkpoints
from rft_fast.checkpoints.canonical import HEAD, HEAD_WEIGHT
from rft_fast.clip import architectures, matching, prompts
from rft_fast.clip.classifier import ImageClassifier, ZeroShotClassifier
from rft_fast.clip.endpoints import Ends, Setup
from rft_fast.clip.heads import SCALE, refuse_without_text
from rft_fast.common.words import some
from rft_fast.names import Towers

from .freezing import freeze
from .settings import TEMPLATES, Request


class Origin:
    """A zero-shot checkpoint before it is read: what its name and its architecture tell.

    Attributes:
        config: Configuration of the architecture, as open_clip has it.
        preprocess: How images become inputs.
    """

    def __init__(self, request: Request) -> None:
        self.config = architectures.config(request.arch)[1]
        if request.loss == "contrastive":
            _check_text_tower(request.arch, self.config)
        try:
            checkpoints.check_source(request.zeroshot, request.arch)
        except ValueError as error:
            raise ValueError(f"finetune: --zeroshot: {error}") from None
        is_file = pathlib.Path(request.zeroshot).exists()  # or a folder with one
        tag = None if is_file or request.zeroshot.startswith(architectures.HUB) else request.zeroshot
        if tag is not None:
            matching.check_activation(request.arch, tag)
        self.preprocess = architectures.preprocess(request.arch, tag)


def head_prompts(request: Request) -> prompts.Prompts | None:
    """Return the class names and templates that a head is made from; None without class names."""
    if request.class_names is not None:
        names = prompts.class_names(request.class_names)
        return prompts.Prompts(names, prompts.templates(request.templates or TEMPLATES))
    if request.templates is not None or request.head_scale is not None:
        raise ValueError(
            "finetune: --templates and --head-scale apply only to a head made from --class-names"
        )
    return None


class Start:
    """The zero-shot model in memory.

    Attributes:
        model: The live classifier: image tower and head, or both towers.
        classes: Number of rows of the head.
        facts: What models record of their start, as JSON values.
    """

    def __init__(
        self, request: Request, origin: Origin, made: prompts.Prompts | None, device: torch.device
    ) -> None:
        file = checkpoints.fetch(request.zeroshot, request.arch)
        state = checkpoints.load(file, key=request.zeroshot_key)
        both = request.loss == "contrastive"
        if both:
            _check_pairs(state)
        has_head = HEAD_WEIGHT in state and not both
        if has_head and (request.head_scale is not None or request.templates is not None):
            raise ValueError(
                "finetune: the zero-shot checkpoint has its own head; leave --templates and --head-scale out"
            )
        towers: Towers = "both" if both else "image"
        setup = Setup(request.arch, towers, prompts=made, scale=request.head_scale)
        ends = Ends(setup, state, device=device)
        if both and (others := [name for name in ends.inert if not name.startswith(HEAD)]):
            raise ValueError(
                "finetune: the checkpoint was pretrained with another loss than CLIP's; --loss contrastive "
                f"would drop {some(others)}; start from another checkpoint, or leave --loss out"
            )
        self._request, self._ends = request, ends
        self.model = cast(ImageClassifier | ZeroShotClassifier, ends.live)
        self.classes = ends.classes
        names = made.class_names if made is not None else ()
        head = None
        if made is not None and not has_head:
            head = {"templates": _sha256("\n".join(made.templates)), "scale": request.head_scale}
        self.facts: dict[str, object] = {
            "model": origin.config,
            "zeroshot": _digest(state, head is not None),
            "head": head,
            "classes": ends.classes,
            "class_names": _sha256("\n".join(names)) if names else None,
            "preprocess": asdict(origin.preprocess),
        }
        if both:  # models of cross-entropy have no such entry
            self.facts["loss"] = request.loss

    def weights(self) -> Mapping[str, Tensor]:
        """Return the zero-shot weights. A head that the checkpoint lacks is computed now, which is slow."""
        return self._ends.zeroshot

    def prepare(self) -> None:
        """Freeze parameters, and switch gradient checkpointing on where it is requested."""
        request = self._request
        settings = request.settings.values()
        frozen = freeze(self.model, request.freeze, request.freeze_blocks)
        if request.loss == "contrastive" and not any(
            parameter.requires_grad for name, parameter in self.model.named_parameters() if name != SCALE
        ):
            raise ValueError(
                f"finetune: both towers are frozen, so only {SCALE} would be trained; freeze less"
            )
        if HEAD_WEIGHT in frozen and any(setting.probe_epochs for setting in settings):
            raise ValueError(f"finetune: --probe-epochs train the head, but {HEAD_WEIGHT} is frozen")
        norms = _trained_norms(self.model)
        if request.checkpointing and not _checkpoint_gradients(self.model):
            raise ValueError(
                f"finetune: the image tower of {request.arch} offers no gradient checkpointing; "
                "use a higher --accumulate instead"
                + (" (with batch norm, that changes the step)" if norms else "")
            )
        if norms and any(setting.accumulate > 1 for setting in settings):
            warnings.warn(
                f"finetune: with --accumulate, {len(norms)} batch norms, such as {norms[0]}, use the "
                "statistics of parts of a batch, which changes the step",
                stacklevel=4,
            )


def _check_text_tower(arch: str, config: Mapping[str, Any]) -> None:
    """Refuse an architecture whose text tower cannot be trained."""
    text = config.get("text_cfg")
    if not isinstance(text, dict):
        what = "has none (no text_cfg)"
    elif name := text.get("hf_model_name"):
        what = f"has Hugging Face's {name}, which is not supported"
    elif (name := text.get("hf_tokenizer_name")) and (pathlib.Path(arch).parent / name).is_dir():
        what = f"has its tokenizer in the folder {name} beside it, which the zoo would lack"
    else:
        return
    raise ValueError(
        f"finetune: --loss contrastive trains the text tower, and {arch} {what}; choose another "
        "architecture, or leave --loss out"
    )


def _check_pairs(state: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint that lacks what the contrastive loss trains; a head that it holds is not used."""
    remedy = "start from a checkpoint with both towers, such as OpenAI's or open_clip's, or leave --loss out"
    refuse_without_text(state, "finetune: --loss contrastive", remedy)
    if SCALE not in state or state[SCALE].numel() != 1:
        raise ValueError(
            f"finetune: --loss contrastive: the checkpoint has no {SCALE} of one element; {remedy}"
        )
    if HEAD_WEIGHT in state:
        tqdm.write(
            "finetune: the head of the checkpoint is not used: the text tower makes one from the prompts"
        )


def _checkpoint_gradients(model: ImageClassifier | ZeroShotClassifier) -> bool:
    """Make the towers compute activations twice; returns whether the image tower can."""
    visual = model.visual
    if isinstance(model, ZeroShotClassifier):
        with suppress(Exception):
            cast(Any, model.text).set_grad_checkpointing(True)
    # Call timm directly: open_clip's wrapper only logs a failure.
    tower = visual.trunk if isinstance(getattr(visual, "trunk", None), nn.Module) else visual
    with suppress(Exception):
        cast(Any, tower).set_grad_checkpointing(True)
    # Some towers accept the call and do nothing.
    return any(getattr(module, "grad_checkpointing", False) for module in visual.modules())


def _trained_norms(model: nn.Module) -> list[str]:
    """Names of the batch norms whose statistics change in training."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and any(parameter.requires_grad for parameter in module.parameters())
    ]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(state: Mapping[str, Tensor], whole: bool) -> str:
    """SHA-256 of image tower and head; of all weights where the text tower makes the head."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        if not (whole or name.startswith(("visual.", "classification_head."))):
            continue
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data.cast("B"))
    return found.hexdigest()
