"""The folder of a zoo while it is made: which models exist, and which files must not be replaced."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor

from rft_fast import checkpoints, datasets
from rft_fast.checkpoints.canonical import TEXT
from rft_fast.clip import architectures, prompts
from rft_fast.clip.architectures import Preprocess
from rft_fast.clip.heads import SCALE, text_name
from rft_fast.common import disk
from rft_fast.common.words import differences
from rft_fast.datasets import imagenet, naming

from . import output
from .inputs import RESERVED
from .settings import TEMPLATES, Request, as_json

# What all models of a folder have in common.
SHARED = ("model", "zeroshot", "head", "classes", "class_names", "preprocess", "stored", "loss")


def refuse_links(request: Request) -> None:
    """Refuse a directory in which a name that is written is a link; a finished model may be one."""
    out, names = request.out, list(request.settings)
    files = [out / f"{name}{end}" for name in names for end in (".csv", ".resume")]
    files += [out / name for name in ("zoo.toml", "model.json", "classes.json", "templates.json")]
    locks = [out / ".lock", *(out / f".{name}.lock" for name in names)]
    try:
        disk.check_targets(files, locks)
    except ValueError as error:
        raise ValueError(f"finetune: {error}") from None


class ZooFolder:
    """The models of a request on disk. Several processes may write to one folder.

    Args:
        request: What is fine-tuned on what.
        fixed: What all models have in common, as JSON values.
        preprocess: How images become inputs.
        rows: Rows of the head.
        data: Data set -> its entries in the zoo.
        dtype: Type of the stored weights.
    """

    def __init__(
        self,
        request: Request,
        fixed: Mapping[str, Any],
        preprocess: Preprocess,
        rows: datasets.Rows,
        data: Mapping[str, Mapping[str, object]],
        dtype: torch.dtype,
    ) -> None:
        self._request, self._fixed, self._data, self._dtype = request, fixed, data, dtype
        self._path = request.out
        self._entries: dict[str, str] = {"arch": request.arch}
        self._beside: dict[str, object] = {}  # file that the zoo refers to -> its content
        known = not pathlib.Path(request.arch).is_file() and not request.arch.startswith(architectures.HUB)
        if not known or architectures.preprocess(request.arch) != preprocess:
            self._entries["arch"] = "model.json"
            self._beside["model.json"] = {"model_cfg": fixed["model"], "preprocess_cfg": fixed["preprocess"]}
        given, names = request.class_names, rows.names
        if given is not None:
            self._entries["class-names"] = given
        if request.loss == "contrastive":
            templates = request.templates or TEMPLATES
            self._entries["templates"] = templates
            if templates not in prompts.TEMPLATES:
                self._entries["templates"] = "templates.json"
                self._beside["templates.json"] = list(prompts.templates(templates))
        shown = naming.numbers(names) or (len(names) == imagenet.CLASSES and imagenet.are_wnids(names))
        if names and given not in prompts.CLASS_NAMES and (given is not None or not shown):
            self._entries["class-names"] = "classes.json"
            self._beside["classes.json"] = list(names)

    def file(self, name: str) -> pathlib.Path:
        """The file of a model."""
        return self._path / f"{name}.safetensors"

    def keeper(self, name: str) -> output.FileKeeper:
        """Where the state of a model in training is kept."""
        file = self._path / f"{name}.resume"
        return output.FileKeeper(file, self._configuration(name), self._request.keep_every)

    def is_finished(self, name: str) -> bool:
        """Whether a model is finished; refuses a file of another origin or configuration."""
        file = self.file(name)
        if not file.exists():
            return False
        found = output.configuration_of(file)
        if found is None:
            raise ValueError(f"finetune: {file} was not written by finetune; choose another --out")
        if different := "; ".join(differences(found, self._configuration(name), sides=output.SIDES)):
            raise ValueError(
                f"finetune: {file} was written with another configuration ({different}); choose another --out"
            )
        return True

    def check(self) -> None:
        """Refuse files and states of another configuration, and files that would be replaced."""
        for name, content in self._beside.items():
            output.check_json(self._path / name, content)
        start = self.is_finished(RESERVED)
        finished = [name for name in self._request.settings if self.is_finished(name)]
        if finished and not start:
            raise ValueError(
                f"finetune: {self._path} has models, but no {output.START}; choose another --out"
            )
        for name in self._request.settings:
            table = self.table(name)
            if name in finished or self.keeper(name).load() is not None or not table.exists():
                continue
            if not self.file(name).exists():  # otherwise another process has just finished it
                raise ValueError(
                    f"finetune: {table} exists, but has no model or state to resume from; move it, or "
                    "choose another --out"
                )

    def table(self, name: str) -> pathlib.Path:
        """The file with one row per epoch of a model's training."""
        return self._path / f"{name}.csv"

    def start(self) -> dict[str, Tensor] | None:
        """Return the stored zero-shot model; None where there is none yet."""
        file = self.file(RESERVED)
        if not file.exists():
            return None
        state = checkpoints.load(file)
        if SCALE in state:  # both towers, by the live model's names
            state = {text_name(n) if n.partition(".")[0] in TEXT else n: t for n, t in state.items()}
        return output.rounded(state, self._dtype)

    def write_start(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Create the folder, the zero-shot model, and the files that the zoo refers to.

        Returns:
            The stored weights; those of another process, if it was first.
        """
        self._path.mkdir(parents=True, exist_ok=True)
        with self._locked():
            if self.is_finished(RESERVED):
                weights = self.start() or weights
            else:
                self.write_model(RESERVED, weights)
            for name, content in self._beside.items():
                output.check_json(self._path / name, content)
                output.write_json(self._path / name, content)
        return weights

    def write_model(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """Write a model, with its configuration in the header."""
        output.write_model(self.file(name), weights, self._configuration(name), self._dtype)

    def write_zoo(self) -> None:
        """Write the zoo of all models in the folder made from this zero-shot model, requested ones first."""
        shared = self._configuration(RESERVED)
        with self._locked():
            names = [name for name in self._request.settings if self.file(name).exists()]
            for file in sorted(self._path.glob("*.safetensors")):
                found: output.Configuration | None = None
                with suppress(ValueError):  # not a file of fine-tuning
                    found = output.configuration_of(file)
                if found is None or "setting" not in found or file.stem in names:
                    continue
                if shared.items() <= found.items():
                    names.append(file.stem)
            if names:
                output.write_zoo(self._path, self._entries, names, self._data)

    def _configuration(self, name: str) -> output.Configuration:
        """What a model was made with; for the zero-shot model, what all models have in common."""
        if name == RESERVED:
            return {key: self._fixed[key] for key in SHARED if key in self._fixed}
        return {"setting": as_json(self._request.settings[name]), **self._fixed}

    def _locked(self) -> AbstractContextManager[bool]:
        """Lock what all models have in common; other processes wait."""
        return disk.locked(self._path / ".lock", wait=True)
