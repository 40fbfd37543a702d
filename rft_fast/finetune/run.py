"""From a zero-shot checkpoint and a folder of images to a zoo: a fine-tuned model for every setting."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rft_fast import architectures, checkpoints, datasets, prompts
from rft_fast.classifier import HEAD_WEIGHT, ImageClassifier
from rft_fast.endpoints import Ends, Setup

from . import output
from .images import FeatureBatches, ImageBatches, Images, accuracy, features, threads
from .settings import Setting, as_json
from .training import Diverged, Row, check_precision, check_warmup, freeze, train

DTYPES = {"float32": torch.float32, "float16": torch.float16}
RESERVED = "zeroshot"


@dataclass(frozen=True)
class Request:
    """What is fine-tuned on what, and where it goes.

    arch, zeroshot: an architecture, and a checkpoint file, a pretrained tag or ``hf-hub:org/name``, of it.
    train: images that are trained on (:func:`rft_fast.datasets.open_source`); kind: of those. label_map: rows
        of the head for the classes of ``train`` and ``val`` (:func:`rft_fast.datasets.assign`).
    out: the directory of the zoo. settings: name -> setting.
    val: data sets scored after every epoch; in the zoo in distribution. ood: those that are only named there.
    class_names: names of the head's rows (:mod:`rft_fast.prompts`). Classes of data sets that are called so
        go to those rows; and where the checkpoint has no head, one is made of them, ``templates`` and
        ``head_scale``.
    freeze, freeze_blocks: what is not trained (:func:`rft_fast.finetune.freeze`).
    precision, checkpointing: of training. store: ``float32`` or ``float16``, of the files.
    keep_every: optimizer steps between two states to go on from. check_images: open every image first.
    """

    arch: str
    zeroshot: str
    train: Path
    out: Path
    settings: Mapping[str, Setting]
    val: Mapping[str, Path] = field(default_factory=dict)
    ood: Mapping[str, Path] = field(default_factory=dict)
    kind: str | None = None
    label_map: Path | None = None
    class_names: str | None = None
    templates: str | None = None
    head_scale: float | None = None
    freeze: Sequence[str] = ()
    freeze_blocks: int = 0
    precision: str = "fp32"
    checkpointing: bool = False
    store: str = "float32"
    device: str | None = None
    workers: int | None = None
    in_memory: bool = False
    check_images: bool = True
    keep_every: int | None = 500
    cache: Path | None = None


@dataclass
class Outcome:
    """Names of the models that were trained, that were there already, and name -> why it diverged."""

    trained: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    diverged: dict[str, str] = field(default_factory=dict)


def run(request: Request) -> Outcome:
    """Fine-tunes a model for every setting that has none yet, and writes the zoo after each.

    Everything is checked before the first step. A killed run that is started again goes on where it was. A
    model that diverges is left out, and the others are made.

    Raises ValueError for whatever cannot be done or would be overwritten; OSError where the disk fails.
    """
    work = _Work(request)
    work.write_start()
    outcome = Outcome()
    for name, setting in request.settings.items():
        if name in work.finished:
            tqdm.write(f"{name}: already there, skipped")
            outcome.skipped.append(name)
            work.keeper(name).file.unlink(missing_ok=True)
            continue
        try:
            work.train(name, setting)
            outcome.trained.append(name)
        except Diverged as error:
            tqdm.write(f"{name}: {error}")
            outcome.diverged[name] = str(error)
    work.write_zoo()
    return outcome


class _Work:
    """A request, checked: the model, its images, and what is there already."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.names: tuple[str, ...] = ()
        self.device = torch.device(request.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"finetune: there is no device {self.device}: torch finds no CUDA; use cpu")
        check_precision(request.precision, self.device)
        self._check_words()
        checkpoints.check_source(request.zeroshot, request.arch)
        tag = request.zeroshot if self._is_tag() else None
        if tag is not None:
            architectures.check_activation(request.arch, tag)
        output.check_zoo(request.out)
        source = self._open_train()
        state = checkpoints.load(checkpoints.fetch(request.zeroshot, request.arch))
        ends = self._ends(state)
        rows = datasets.Rows(ends.classes, self.names)
        self.preprocess = architectures.preprocess(request.arch, tag)
        self.images = self._choose_images(source, rows)
        for setting in request.settings.values():
            check_warmup(setting, len(ImageBatches(self.images, setting, self.device)))
        self.dtype = DTYPES[request.store]
        # Training starts from the stored weights, which are the path's zero-shot end.
        self.start = output.rounded(ends.zeroshot, self.dtype)
        self.model = cast(ImageClassifier, ends.live)
        frozen = freeze(self.model, request.freeze, request.freeze_blocks)
        if HEAD_WEIGHT in frozen and any(s.probe_epochs for s in request.settings.values()):
            raise ValueError(f"finetune: the head is to be trained first, but {HEAD_WEIGHT} is frozen")
        if request.checkpointing:
            self._checkpoint_gradients()
        fixed = {
            "model": architectures.config(request.arch)[1],
            "zeroshot": _digest(self.start),
            "data": self.images.digest(),
            "images": len(self.images),
            "classes": ends.classes,
            "class_names": hashlib.sha256("\n".join(self.names).encode()).hexdigest() if self.names else None,
            "preprocess": asdict(self.preprocess),
            "freeze": list(request.freeze),
            "freeze_blocks": request.freeze_blocks,
            "precision": request.precision,
            "stored": request.store,
        }
        self.fixed = json.loads(json.dumps(fixed))  # as a file's header gives it back
        self.finished = self._what_is_there()
        if request.check_images and len(self.finished) < len(request.settings):
            self.images.check()
        self.val = {
            name: datasets.load(
                name,
                path,
                self.preprocess,
                ood=False,
                cache=request.cache,
                rows=rows,
                label_map=request.label_map,
            )
            for name, path in request.val.items()
        }
        self._features: Tensor | None = None
        self.entries: dict[str, str] = {}  # of the zoo
        if request.class_names is not None:
            built_in = request.class_names in prompts.CLASS_NAMES
            self.entries["class-names"] = request.class_names if built_in else "classes.json"

    # --- checks -----------------------------------------------------------------------------------

    def _check_words(self) -> None:
        request = self.request
        if not request.settings:
            raise ValueError("finetune: there are no settings")
        if RESERVED in request.settings:
            raise ValueError(f"finetune: a model cannot be called {RESERVED!r}, which the start is")
        for name, setting in request.settings.items():
            if not name or Path(name).name != name:
                raise ValueError(f"finetune: {name!r} cannot be the name of a file")
            if not isinstance(setting, Setting):
                raise TypeError(f"finetune: settings are of Setting, got {type(setting).__name__}")
        if request.store not in DTYPES:
            raise ValueError(f"finetune: store must be one of {', '.join(DTYPES)}; got {request.store!r}")
        if both := sorted(set(request.val) & set(request.ood)):
            raise ValueError(f"finetune: {both[0]!r} names a data set in distribution and one out of it")
        if missing := [
            str(path) for path in (*request.val.values(), *request.ood.values()) if not path.exists()
        ]:
            raise ValueError(f"finetune: there is no {missing[0]}")
        for name in ("workers", "keep_every"):
            value = getattr(request, name)
            if value is not None and value < 1:
                raise ValueError(f"finetune: {name} must be at least 1, got {value}")
        if request.out.exists() and not request.out.is_dir():
            raise ValueError(f"finetune: {request.out} is a file, expected a directory")

    def _is_tag(self) -> bool:
        source = self.request.zeroshot
        return not Path(source).is_file() and not source.startswith(architectures.HUB)

    def _ends(self, state: Mapping[str, Tensor]) -> Ends:
        request = self.request
        made = None
        if request.class_names is not None:
            self.names = prompts.class_names(request.class_names)
            made = prompts.Prompts(self.names, prompts.templates(request.templates or "openai"))
        elif request.templates is not None or request.head_scale is not None:
            raise ValueError("finetune: templates and a head scale are of a head made from --class-names")
        if HEAD_WEIGHT in state and request.head_scale is not None:
            raise ValueError(
                "finetune: the zero-shot checkpoint has a head, used as it is; leave the head scale out"
            )
        setup = Setup(request.arch, prompts=made, scale=request.head_scale)
        return Ends(setup, state, device=self.device)

    def _open_train(self) -> datasets.Source:
        request = self.request
        source = datasets.open_source("train", request.train, request.kind)
        if source.path.resolve() != request.train.resolve():
            raise ValueError(
                f"finetune: {request.train} has several parts, of which {source.path.name!r} would be taken; "
                "name the folder that is to be trained on"
            )
        return source

    def _choose_images(self, source: datasets.Source, rows: datasets.Rows) -> Images:
        request = self.request
        found = datasets.assign(source, rows, request.label_map)
        if found.groups is not None:
            raise ValueError(
                "finetune: some classes of the training images have several rows of the head; give a label "
                "map that has one for each"
            )
        if not len(found.labels):
            raise ValueError(f"finetune: {request.train} has no images that are trained on")
        if int(found.labels.max()) >= rows.count:
            raise ValueError(
                f"finetune: labels go up to {int(found.labels.max())}, but the head has {rows.count} classes"
            )
        for note in source.notes:
            tqdm.write(f"train: {note}")
        workers = request.workers or threads()
        return Images(source, found.images, found.labels, self.preprocess, workers, request.in_memory)

    def _checkpoint_gradients(self) -> None:
        switch = getattr(self.model.visual, "set_grad_checkpointing", None)
        if switch is None:
            raise ValueError(
                f"finetune: the image tower of {self.request.arch} offers no gradient checkpointing; "
                "take a higher --accumulate instead"
            )
        switch(True)

    def _what_is_there(self) -> set[str]:
        """The models that are finished; refuses files and states of another configuration."""
        folder, finished = self.request.out, set()
        start = folder / output.START
        asked = {name: {"setting": as_json(s), **self.fixed} for name, s in self.request.settings.items()}
        for name, mine in {RESERVED: {"zeroshot": self.fixed["zeroshot"]}, **asked}.items():
            file = folder / f"{name}.safetensors"
            if not file.exists():
                continue
            there = output.configuration_of(file)
            if there is None:
                raise ValueError(f"finetune: {file} was not made by fine-tuning; choose another --out")
            if different := output.differences(there, mine):
                raise ValueError(
                    f"finetune: {file} was made with another configuration ({different}); "
                    "choose another --out"
                )
            finished.add(name)
        self.configurations = asked
        if not start.exists() and finished:
            raise ValueError(f"finetune: {folder} has models but no {start.name}; choose another --out")
        for name in asked:
            if name not in finished:
                self.keeper(name).load()
        return finished - {RESERVED}

    # --- what is made -----------------------------------------------------------------------------

    def keeper(self, name: str) -> output.FileKeeper:
        file = self.request.out / f"{name}.resume"
        return output.FileKeeper(file, self.configurations[name], self.request.keep_every)

    def write_start(self) -> None:
        """The directory, the zero-shot model, and what the zoo needs beside it."""
        request, folder = self.request, self.request.out
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / output.START).exists():
            made_of = {"zeroshot": self.fixed["zeroshot"]}
            output.write_model(folder / output.START, self.start, made_of, self.dtype)
        self._write_arch()
        if request.class_names is not None and request.class_names not in prompts.CLASS_NAMES:
            output.write_json(folder / "classes.json", list(self.names))

    def _write_arch(self) -> None:
        """The architecture, with the preprocessing that was trained with."""
        arch = self.request.arch
        if not Path(arch).is_file() and architectures.preprocess(arch) == self.preprocess:
            self.entries["arch"] = arch
            return
        self.entries["arch"] = "model.json"
        content = {"model_cfg": self.fixed["model"], "preprocess_cfg": self.fixed["preprocess"]}
        output.write_json(self.request.out / "model.json", content)

    def train(self, name: str, setting: Setting) -> None:
        request, model, keeper = self.request, self.model, self.keeper(name)
        model.load_state_dict(self.start)
        model.to(self.device)
        torch.manual_seed(setting.seed)
        batch_size = max(1, setting.batch_size // setting.accumulate)
        if setting.probe_epochs and not keeper.file.exists():
            self._probe(name, setting)

        def scores(model: nn.Module) -> dict[str, float]:
            live = cast(ImageClassifier, model)
            return {
                data: accuracy(live, images, batch_size, request.precision)
                for data, images in self.val.items()
            }

        def finished(rows: Sequence[Row]) -> None:
            output.write_rows(request.out / f"{name}.csv", rows)
            _tell(name, rows[-1], setting.epochs)

        train(
            model,
            ImageBatches(self.images, setting, self.device),
            setting,
            precision=request.precision,
            metrics=scores,
            keeper=keeper,
            finished=finished,
            label=name,
        )
        file = request.out / f"{name}.safetensors"
        output.write_model(file, model.state_dict(), self.configurations[name], self.dtype)
        self.write_zoo()
        keeper.file.unlink(missing_ok=True)

    def _probe(self, name: str, setting: Setting) -> None:
        """The head alone, on features that are computed once for all settings."""
        if self._features is None:
            self._features = features(self.model, self.images, self.request.precision)
        head = replace(
            setting,
            lr=setting.probe_lr,
            epochs=setting.probe_epochs,
            mixup=0.0,
            warmup=0,
            accumulate=1,
            probe_epochs=0,
        )
        batches = FeatureBatches(self._features, self.images.labels.to(self.device), head)
        train(
            _Head(self.model),
            batches,
            head,
            finished=lambda rows: _tell(f"{name}, head alone", rows[-1], head.epochs),
            label=f"{name}, head alone",
        )

    def write_zoo(self) -> None:
        """Of all models of the directory that were made from this zero-shot model, those asked for first."""
        folder = self.request.out
        names = [name for name in self.request.settings if (folder / f"{name}.safetensors").exists()]
        for file in sorted(folder.glob("*.safetensors")):
            there = output.configuration_of(file)
            if (
                there
                and "setting" in there
                and there["zeroshot"] == self.fixed["zeroshot"]
                and file.stem not in names
            ):
                names.append(file.stem)
        if names:
            output.write_zoo(folder, self.entries, names, self._data())

    def _data(self) -> dict[str, dict[str, object]]:
        request = self.request
        of_training: dict[str, object] = {}
        if request.label_map is not None:
            of_training["labels"] = str(request.label_map.resolve())
        data: dict[str, dict[str, object]] = {}
        for name, path in request.val.items():
            data[name] = {"path": str(path.resolve()), "ood": False, **of_training}
        for name, path in request.ood.items():
            data[name] = {"path": str(path.resolve()), "ood": True}
        if not data:  # a zoo has data
            if request.kind is not None:
                of_training["kind"] = request.kind
            data["train"] = {"path": str(request.train.resolve()), "ood": False, **of_training}
        return data


class _Head(nn.Module):
    """The head of a classifier, on features."""

    def __init__(self, classifier: ImageClassifier) -> None:
        super().__init__()
        self.classification_head = classifier.classification_head
        self.classify = classifier.classify

    def forward(self, features: Tensor) -> Tensor:
        return self.classify(features)


def _tell(name: str, row: Row, epochs: int) -> None:
    known = ("epoch", "step", "lr", "loss", "seconds")
    scores = "".join(f", {data} {100 * value:.1f} %" for data, value in row.items() if data not in known)
    tqdm.write(
        f"{name}: epoch {row['epoch']} of {epochs}, loss {row['loss']:.4f}{scores}, {row['seconds']:.0f} s"
    )


def _digest(state: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data.cast("B"))
    return found.hexdigest()
