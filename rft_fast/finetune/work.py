"""From a zero-shot checkpoint and a folder of images to a zoo: a fine-tuned model for every setting."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rft_fast import checkpoints, datasets, env
from rft_fast.checkpoints.canonical import HEAD_WEIGHT
from rft_fast.clip import architectures, matching, prompts
from rft_fast.clip.classifier import ImageClassifier
from rft_fast.clip.endpoints import Ends, Setup
from rft_fast.common import disk
from rft_fast.common.program import Stop
from rft_fast.common.words import differences, visible
from rft_fast.datasets import imagenet, labels, maps, naming
from rft_fast.names import STORED

from . import output
from .images import FeatureBatches, ImageBatches, Images, accuracy, features, threads
from .settings import Request, Setting, as_json
from .training import COLUMNS, Diverged, Row, check_precision, check_warmup, freeze, train

DTYPES = {name: getattr(torch, name) for name in STORED}
RESERVED = "zeroshot"
# What all models of a directory have in common.
SHARED = ("model", "zeroshot", "head", "classes", "class_names", "preprocess", "stored")


@dataclass
class Outcome:
    """Names of the models that were trained; that were there already, or are being made by another process;
    and name -> why it diverged."""

    trained: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    diverged: dict[str, str] = field(default_factory=dict)


def run(request: Request) -> Outcome:
    """Fine-tunes a model for every setting that has none yet, and writes the zoo after each.

    Everything is checked before the first step. A killed run that is started again goes on where it was. A
    model that diverges is left out, and the others are made. Several processes may work on one directory.

    Raises ValueError for whatever cannot be done or would be overwritten; OSError where the disk fails.
    """
    return Work(request).run()


class Work:
    """A request, checked: the model, its images, and what is there already. Raises as :func:`run` does."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.names: tuple[str, ...] = ()
        self.label_maps: dict[str, pathlib.Path | str | None] = {}  # data set -> what tells its rows
        self.device = env.device(request.device)
        check_precision(request.precision, self.device)
        self._check_words()
        model_cfg = architectures.config(request.arch)[1]
        checkpoints.check_source(request.zeroshot, request.arch)
        tag = request.zeroshot if self._is_tag() else None
        if tag is not None:
            matching.check_activation(request.arch, tag)
        self.preprocess = architectures.preprocess(request.arch, tag)
        self._refuse_links()
        output.check_zoo(request.out)
        made = self._prompts()
        source = self._open_train()
        state = checkpoints.load(checkpoints.fetch(request.zeroshot, request.arch))
        ends = self._ends(state, made)
        rows = datasets.Rows(ends.classes, self.names)
        self.images = self._choose_images(source, rows)
        self.rows = self._named(rows)
        self.label_maps = {
            name: self._label_map(name, path) for name, path in {**request.val, **request.ood}.items()
        }
        for setting in request.settings.values():
            check_warmup(setting, len(ImageBatches(self.images, setting, self.device)))
        self.dtype = DTYPES[request.store]
        self.model = cast(ImageClassifier, ends.live)
        frozen = freeze(self.model, request.freeze, request.freeze_blocks)
        if HEAD_WEIGHT in frozen and any(s.probe_epochs for s in request.settings.values()):
            raise ValueError(f"finetune: the head is to be trained first, but {HEAD_WEIGHT} is frozen")
        if request.checkpointing:
            self._checkpoint_gradients()
        self._warn_of_parts()
        fixed = {
            "model": model_cfg,
            "zeroshot": _digest(state, made is not None and HEAD_WEIGHT not in state),
            "head": self._head(state, made),
            "classes": ends.classes,
            "class_names": _sha256("\n".join(self.names)) if self.names else None,
            "preprocess": asdict(self.preprocess),
            "stored": request.store,
            "data": self.images.digest(),
            "images": len(self.images),
            "freeze": list(request.freeze),
            "freeze_blocks": request.freeze_blocks,
            "precision": request.precision,
        }
        self.fixed = json.loads(json.dumps(fixed))  # as a file's header gives it back
        self.entries, self.beside = self._entries()
        self._check_what_is_there()
        todo = any(not self.file(name).exists() for name in request.settings)
        if request.check_images and todo:
            self.images.check()
        self._features: Tensor | None = None
        self._stop: Stop | None = None
        self.val = {
            name: datasets.load(
                name,
                path,
                self.preprocess,
                ood=False,
                cache=request.cache,
                rows=self.rows,
                label_map=self.label_maps[name],
            )
            for name, path in (request.val.items() if todo else ())
        }
        if (start := self.file(RESERVED)).exists():
            self.start = checkpoints.load(start)
        else:
            self.start = ends.zeroshot
        self.start = output.rounded(self.start, self.dtype)

    def run(self, stop: Stop | None = None) -> Outcome:
        """Makes what is not there yet, and the zoo. Raises Interrupted when ``stop`` was asked."""
        self._stop = stop
        self._write_start()
        outcome = Outcome()
        for name, setting in self.request.settings.items():
            if stop is not None:
                stop.check()
            with disk.locked(self.request.out / f".{name}.lock") as ours:
                if not ours:
                    tqdm.write(f"{name}: being made by another process, skipped")
                    outcome.skipped.append(name)
                elif self._is_there(name):
                    tqdm.write(f"{name}: already there, skipped")
                    outcome.skipped.append(name)
                    self.keeper(name).file.unlink(missing_ok=True)
                else:
                    try:
                        self._train(name, setting)
                        outcome.trained.append(name)
                    except Diverged as error:
                        tqdm.write(f"{name}: {error}")
                        outcome.diverged[name] = str(error)
        self._write_zoo()
        return outcome

    # --- checks -----------------------------------------------------------------------------------

    def _check_words(self) -> None:
        request = self.request
        if not request.settings:
            raise ValueError("finetune: there are no settings")
        if RESERVED in request.settings:
            raise ValueError(f"finetune: a model cannot be called {RESERVED!r}, which the start is")
        for name, setting in request.settings.items():
            if not name or pathlib.Path(name).name != name:
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
        if taken := sorted(set(request.val) & set(COLUMNS)):
            raise ValueError(f"finetune: {taken[0]!r} is a column of the tables; give the data another name")
        json.dumps(self._data(), ensure_ascii=False).encode()  # the zoo's, which is UTF-8
        for name in ("workers", "keep_every"):
            value = getattr(request, name)
            if value is not None and value < 1:
                raise ValueError(f"finetune: {name} must be at least 1, got {value}")
        there = next(path for path in (request.out, *request.out.absolute().parents) if path.exists())
        if not there.is_dir():
            raise ValueError(f"finetune: {there} is a file, expected a directory")
        if not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(f"finetune: {there} cannot be written to; choose another --out")

    def _is_tag(self) -> bool:
        source = self.request.zeroshot
        return not pathlib.Path(source).is_file() and not source.startswith(architectures.HUB)

    def _prompts(self) -> prompts.Prompts | None:
        request = self.request
        if request.class_names is not None:
            self.names = prompts.class_names(request.class_names)
            return prompts.Prompts(self.names, prompts.templates(request.templates or "openai"))
        if request.templates is not None or request.head_scale is not None:
            raise ValueError("finetune: templates and a head scale are of a head made from --class-names")
        return None

    def _ends(self, state: Mapping[str, Tensor], made: prompts.Prompts | None) -> Ends:
        request = self.request
        if HEAD_WEIGHT in state and (request.head_scale is not None or request.templates is not None):
            raise ValueError(
                "finetune: the zero-shot checkpoint has a head, used as it is; leave --templates and "
                "--head-scale out"
            )
        return Ends(Setup(request.arch, prompts=made, scale=request.head_scale), state, device=self.device)

    def _head(self, state: Mapping[str, Tensor], made: prompts.Prompts | None) -> dict[str, object] | None:
        """What the head at the start is made of, None where the checkpoint has one."""
        if made is None or HEAD_WEIGHT in state:
            return None
        return {"templates": _sha256("\n".join(made.templates)), "scale": self.request.head_scale}

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
        tqdm.write(visible(f"train: {found.how}"))
        for note in source.notes:
            tqdm.write(visible(f"train: {note}"))
        workers = request.workers or threads()
        return Images(source, found.images, found.labels, self.preprocess, workers, request.in_memory)

    def _named(self, rows: datasets.Rows) -> datasets.Rows:
        """The rows by the training images' classes, where nothing else names them and each has one of those:
        in a data set with other classes, order alone would shift all that follow."""
        source, known = self.images.source, dict[int, str]()
        if rows.names or self.request.label_map not in (None, datasets.ORDER) or not source.class_names:
            return rows
        for row, label in zip(
            self.images.labels.tolist(), source.labels[self.images.chosen].tolist(), strict=True
        ):
            known[row] = source.class_names[label]
        different = set(map(naming.fold, known.values())) - {""}
        if len(known) < rows.count or len(different) < rows.count:
            return rows
        return datasets.Rows(rows.count, tuple(known[row] for row in range(rows.count)))

    def _label_map(self, name: str, path: pathlib.Path) -> pathlib.Path | str | None:
        """What tells the rows of a data set, here and in the zoo; None where its classes show them."""
        given = self.request.label_map
        try:
            source = datasets.open_source(name, path)
            if given == datasets.ORDER:
                named = self.rows.names or not source.class_names or labels.is_settled(source, self.rows)
                given = None if named else given
            elif given is not None and name in self.request.ood:
                given = given if maps.covers(source.class_names, maps.read_map(pathlib.Path(given))) else None
            datasets.assign(source, self.rows, given)
        except ValueError as error:
            more = ""
            if name in self.request.ood:
                more = "; or leave it out here, and name it in the sweep, with --data and --data-labels"
            raise ValueError(f"finetune: {name!r}: {error}{more}") from error
        return given

    def _checkpoint_gradients(self) -> None:
        visual = self.model.visual
        # timm's own: open_clip's call of it would only log that it cannot.
        tower = visual.trunk if isinstance(getattr(visual, "trunk", None), nn.Module) else visual
        with suppress(Exception):
            cast(Any, tower).set_grad_checkpointing(True)
        # Some towers take the call and do nothing.
        if not any(getattr(module, "grad_checkpointing", False) for module in visual.modules()):
            raise ValueError(
                f"finetune: the image tower of {self.request.arch} offers no gradient checkpointing; "
                "take a higher --accumulate instead"
                + (", which with batch norm is another step" if self._norms() else "")
            )

    def _norms(self) -> list[str]:
        """Batch norms whose statistics the training moves."""
        return [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            and any(parameter.requires_grad for parameter in module.parameters())
        ]

    def _warn_of_parts(self) -> None:
        if any(setting.accumulate > 1 for setting in self.request.settings.values()) and (
            norms := self._norms()
        ):
            warnings.warn(
                f"finetune: with --accumulate, the statistics of {len(norms)} batch norms, such as "
                f"{norms[0]}, are those of parts of a batch, so the step is another one than without",
                stacklevel=4,
            )

    def _check_what_is_there(self) -> None:
        """Refuses files and states of another configuration, and files that would be replaced."""
        request = self.request
        for name, content in self.beside.items():
            output.check_json(request.out / name, content)
        start = self._is_there(RESERVED)
        there = [name for name in request.settings if self._is_there(name)]
        if there and not start:
            raise ValueError(
                f"finetune: {request.out} has models but no {output.START}; choose another --out"
            )
        for name in request.settings:
            table = request.out / f"{name}.csv"
            if name in there or self.keeper(name).load() is not None or not table.exists():
                continue
            if not self.file(name).exists():  # else another process has just finished it
                raise ValueError(
                    f"finetune: {table} is there without a model or a state to go on from, and would be "
                    "replaced; move it, or choose another --out"
                )

    def _refuse_links(self) -> None:
        """Refuses a directory in which a name that is written is a link; a finished model may be one."""
        out, names = self.request.out, list(self.request.settings)
        files = [out / f"{name}{end}" for name in names for end in (".csv", ".resume")]
        files += [out / name for name in ("zoo.toml", "model.json", "classes.json")]
        locks = [out / ".lock", *(out / f".{name}.lock" for name in names)]
        try:
            disk.refuse_others(files, locks)
        except ValueError as error:
            raise ValueError(f"finetune: {error}") from None

    def _is_there(self, name: str) -> bool:
        """Whether a model is finished; refuses a file of another origin or configuration."""
        file = self.file(name)
        if not file.exists():
            return False
        there = output.configuration_of(file)
        if there is None:
            raise ValueError(f"finetune: {file} was not made by fine-tuning; choose another --out")
        if different := "; ".join(differences(there, self.configuration(name))):
            raise ValueError(
                f"finetune: {file} was made with another configuration ({different}); choose another --out"
            )
        return True

    # --- what is made -----------------------------------------------------------------------------

    def file(self, name: str) -> pathlib.Path:
        return self.request.out / f"{name}.safetensors"

    def configuration(self, name: str) -> output.Configuration:
        """What a model is made with; of the start, what all models of a directory share."""
        if name == RESERVED:
            return {key: self.fixed[key] for key in SHARED}
        return {"setting": as_json(self.request.settings[name]), **self.fixed}

    def keeper(self, name: str) -> output.FileKeeper:
        file = self.request.out / f"{name}.resume"
        return output.FileKeeper(file, self.configuration(name), self.request.keep_every)

    def _entries(self) -> tuple[dict[str, str], dict[str, object]]:
        """Entries of the zoo, and the files that they name: architecture with preprocessing, class names."""
        request = self.request
        entries: dict[str, str] = {"arch": request.arch}
        beside: dict[str, object] = {}
        known = not pathlib.Path(request.arch).is_file() and not request.arch.startswith(architectures.HUB)
        if not known or architectures.preprocess(request.arch) != self.preprocess:
            entries["arch"] = "model.json"
            beside["model.json"] = {
                "model_cfg": self.fixed["model"],
                "preprocess_cfg": self.fixed["preprocess"],
            }
        if request.class_names is not None:
            entries["class-names"] = request.class_names
        names = self.rows.names
        shown = naming.numbers(names) or (len(names) == imagenet.CLASSES and imagenet.are_wnids(names))
        if names and request.class_names not in prompts.CLASS_NAMES and (self.names or not shown):
            entries["class-names"] = "classes.json"
            beside["classes.json"] = list(names)
        return entries, beside

    def _whole_folder(self) -> AbstractContextManager[bool]:
        """For what all models share: other processes wait."""
        return disk.locked(self.request.out / ".lock", wait=True)

    def _write_start(self) -> None:
        """The directory, the zero-shot model, and what the zoo needs beside it."""
        folder = self.request.out
        folder.mkdir(parents=True, exist_ok=True)
        with self._whole_folder():
            # Training starts from the stored weights, which are the path's zero-shot end.
            if self._is_there(RESERVED):
                self.start = output.rounded(checkpoints.load(self.file(RESERVED)), self.dtype)
            else:
                output.write_model(self.file(RESERVED), self.start, self.configuration(RESERVED), self.dtype)
            for name, content in self.beside.items():
                output.check_json(folder / name, content)
                output.write_json(folder / name, content)

    def _train(self, name: str, setting: Setting) -> None:
        request, model, keeper = self.request, self.model, self.keeper(name)
        model.load_state_dict(self.start)
        model.to(self.device).eval()  # one that diverged was left in the middle
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
            stop=self._stop,
        )
        if lost := output.overflowing(model.state_dict(), self.dtype):
            raise Diverged(
                f"finetune: {lost} is not finite in {self.dtype}, in which it was to be stored; train it "
                f"with --dtype float32, in another --out ({keeper.file.name} keeps this one's weights)"
            )
        output.write_model(self.file(name), model.state_dict(), self.configuration(name), self.dtype)
        self._write_zoo()
        keeper.file.unlink(missing_ok=True)

    def _probe(self, name: str, setting: Setting) -> None:
        """The head alone, on features that are computed once for all settings."""
        if self._features is None:
            self._features = features(self.model, self.images, self.request.precision, self._stop)
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
            stop=self._stop,
        )

    def _write_zoo(self) -> None:
        """Of all models of the directory that were made from this zero-shot model, those asked for first."""
        folder = self.request.out
        shared = self.configuration(RESERVED)
        with self._whole_folder():
            names = [name for name in self.request.settings if self.file(name).exists()]
            for file in sorted(folder.glob("*.safetensors")):
                there: output.Configuration | None = None
                with suppress(ValueError):  # whatever it is, it is not ours
                    there = output.configuration_of(file)
                if there is None or "setting" not in there or file.stem in names:
                    continue
                if shared.items() <= there.items():
                    names.append(file.stem)
            if names:
                output.write_zoo(folder, self.entries, names, self._data())

    def _data(self) -> dict[str, dict[str, object]]:
        request = self.request
        sets = {**request.val, **request.ood}
        label_maps, kind = self.label_maps, None
        if not sets:  # a zoo has data
            sets, label_maps, kind = {"train": request.train}, {"train": request.label_map}, request.kind
        data: dict[str, dict[str, object]] = {}
        for name, path in sets.items():
            data[name] = {"path": str(path.resolve()), "ood": name in request.ood}
            if (given := label_maps.get(name)) is not None:
                data[name]["labels"] = (
                    given if given == datasets.ORDER else str(pathlib.Path(given).resolve())
                )
            if kind is not None:
                data[name]["kind"] = kind
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
    scores = "".join(f", {data} {100 * value:.1f} %" for data, value in row.items() if data not in COLUMNS)
    tqdm.write(
        f"{name}: epoch {row['epoch']} of {epochs}, loss {row['loss']:.4f}{scores}, {row['seconds']:.0f} s"
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(state: Mapping[str, Tensor], whole: bool) -> str:
    """SHA-256 of image tower and head; of everything, where the text tower makes the head."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        if not (whole or name.startswith(("visual.", "classification_head."))):
            continue
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data.cast("B"))
    return found.hexdigest()
