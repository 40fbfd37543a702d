"""From a zero-shot checkpoint and a folder of images to a zoo: one fine-tuned model per setting."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rft_fast import datasets, env
from rft_fast.clip.classifier import ImageClassifier, ZeroShotClassifier
from rft_fast.common import disk
from rft_fast.common.program import Stop
from rft_fast.evaluate.precision import exact
from rft_fast.names import STORED

from . import inputs, output, zoo_folder
from .images import FeatureBatches, ImageBatches, accuracy, features
from .losses import check_precision, classifier
from .settings import Request, Setting
from .start import Origin, Start, head_prompts
from .training import COLUMNS, Diverged, Row, check_warmup, train

DTYPES = {name: getattr(torch, name) for name in STORED}


@dataclass
class Outcome:
    """What became of the models of a request.

    Attributes:
        trained: Names of the models that were trained.
        skipped: Names of the models that existed, or that another process is training.
        diverged: Name of a model -> why its training diverged.
    """

    trained: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    diverged: dict[str, str] = field(default_factory=dict)


def run(request: Request) -> Outcome:
    """Fine-tune a model for every setting that has none yet, and write the zoo after each.

    Everything is checked before the first step. An interrupted run resumes when it is started again. A model
    that diverges is left out and the others are trained. Several processes may work on one directory.

    Args:
        request: What is fine-tuned on what.

    Returns:
        The names of the models that were trained, skipped, or diverged.

    Raises:
        ValueError: The request cannot be met, or would overwrite files.
        OSError: The disk fails.
    """
    return Work(request).run()


class Work:
    """A request whose checks have passed: the model, its images, and the models that exist.

    Args:
        request: What is fine-tuned on what.

    Raises:
        ValueError: The request cannot be met, or would overwrite files.
        OSError: The disk fails.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._device = env.device(request.device)
        check_precision(request.precision, self._device)
        inputs.check(request)
        # Slow steps come last, after everything that can be refused without them.
        origin = Origin(request)
        zoo_folder.refuse_links(request)
        output.check_zoo(request.out)
        made = head_prompts(request)
        source = inputs.training_source(request)
        start = Start(request, origin, made, self._device)
        self._model = start.model
        # Of the contrastive loss; None for cross-entropy.
        self._prompts = start.model.prompts if isinstance(start.model, ZeroShotClassifier) else None
        rows = datasets.Rows(start.classes, made.class_names if made is not None else ())
        self._images = inputs.training_images(request, source, rows, origin.preprocess)
        rows = inputs.named_rows(request, rows, self._images)
        label_maps = inputs.label_maps(request, rows)
        for setting in request.settings.values():
            check_warmup(setting, len(ImageBatches(self._images, setting, self._device, self._prompts)))
        start.prepare()
        fixed = {
            **start.facts,
            "stored": request.store,
            "data": self._images.digest(),
            "images": len(self._images),
            "freeze": list(request.freeze),
            "freeze_blocks": request.freeze_blocks,
            "precision": request.precision,
        }
        self._dtype = DTYPES[request.store]
        self._folder = zoo_folder.ZooFolder(
            request,
            json.loads(json.dumps(fixed)),  # as read from a file's header
            origin.preprocess,
            rows,
            inputs.in_zoo(request, label_maps),
            self._dtype,
        )
        self._folder.check()
        todo = any(not self._folder.file(name).exists() for name in request.settings)
        if request.check_images and todo:
            self._images.check()
        self._features: Tensor | None = None
        self._stop: Stop | None = None
        self._zeroshot: list[Row] = []  # the row of epoch 0, the same for all models
        self._val = inputs.validation(request, origin.preprocess, rows, label_maps) if todo else {}
        self._start = self._folder.start() or output.rounded(start.weights(), self._dtype)

    def run(self, stop: Stop | None = None) -> Outcome:
        """Train the models that are missing, and write the zoo.

        Args:
            stop: Checked after each step.

        Returns:
            The names of the models that were trained, skipped, or diverged.

        Raises:
            Interrupted: ``stop`` was requested; the state is kept.
        """
        self._stop = stop
        # Training starts from the stored weights, which are the zero-shot end of the path.
        self._start = self._folder.write_start(self._start)
        outcome = Outcome()
        for name, setting in self._request.settings.items():
            if stop is not None:
                stop.check()
            with disk.locked(self._request.out / f".{name}.lock") as ours:
                if not ours:
                    tqdm.write(f"{name}: skipped, another process is training it")
                    outcome.skipped.append(name)
                elif self._folder.is_finished(name):
                    tqdm.write(f"{name}: skipped, it exists already")
                    outcome.skipped.append(name)
                    self._folder.keeper(name).file.unlink(missing_ok=True)
                else:
                    try:
                        self._train(name, setting)
                        outcome.trained.append(name)
                    except Diverged as error:
                        tqdm.write(f"{name}: {error}")
                        outcome.diverged[name] = str(error)
        self._folder.write_zoo()
        return outcome

    def _train(self, name: str, setting: Setting) -> None:
        request, model, keeper = self._request, self._model, self._folder.keeper(name)
        model.load_state_dict(self._start)
        model.to(self._device).eval()  # a model that diverged was left mid-training
        torch.manual_seed(setting.seed)
        batch_size = max(1, setting.batch_size // setting.accumulate)
        if self._val and not self._zeroshot:
            zero: Row = {"epoch": 0, "step": 0, "lr": math.nan, "loss": math.nan}
            self._zeroshot = [zero | self._scores(model, batch_size) | {"seconds": 0.0}]
            tqdm.write(f"{inputs.RESERVED}: epoch 0 of every model{_accuracies(self._zeroshot[0])}")
        if setting.probe_epochs and not keeper.file.exists():
            self._probe(name, setting)

        def scores(model: nn.Module) -> dict[str, float]:
            return self._scores(model, batch_size)

        def finished(rows: Sequence[Row]) -> None:
            output.write_rows(self._folder.table(name), [*self._zeroshot, *rows])
            _report(name, rows[-1], setting.epochs)

        train(
            model,
            ImageBatches(self._images, setting, self._device, self._prompts),
            setting,
            precision=request.precision,
            metrics=scores,
            keeper=keeper,
            finished=finished,
            label=name,
            stop=self._stop,
        )
        if broken := output.overflowing(model.state_dict(), self._dtype):
            raise Diverged(
                f"finetune: {broken} is not finite in {self._dtype}, the type of the weights in the "
                f"files; train it with --dtype float32 in another --out ({keeper.file.name} keeps "
                "these weights)"
            )
        self._folder.write_model(name, model.state_dict())
        self._folder.write_zoo()
        keeper.file.unlink(missing_ok=True)

    def _scores(self, model: nn.Module, batch_size: int) -> dict[str, float]:
        """Return a model's accuracy on each data set of --val."""
        precision = self._request.precision
        if not self._val:
            return {}
        with exact(precision):
            live = classifier(model)
            return {data: accuracy(live, images, batch_size, precision) for data, images in self._val.items()}

    def _probe(self, name: str, setting: Setting) -> None:
        """Train the head alone, on features that are computed once for all settings (LP-FT)."""
        model = classifier(self._model)
        if self._features is None:
            self._features = features(model, self._images, self._request.precision, self._stop)
        head = replace(
            setting,
            lr=setting.probe_lr,
            epochs=setting.probe_epochs,
            mixup=0.0,
            warmup=0,
            accumulate=1,
            probe_epochs=0,
        )
        batches = FeatureBatches(self._features, self._images.labels.to(self._device), head)
        train(
            _Head(model),
            batches,
            head,
            finished=lambda rows: _report(f"{name}, head alone", rows[-1], head.epochs),
            label=f"{name}, head alone",
            stop=self._stop,
        )


class _Head(nn.Module):
    """The head of a classifier, applied to features."""

    def __init__(self, classifier: ImageClassifier) -> None:
        super().__init__()
        self.classification_head = classifier.classification_head
        self.classify = classifier.classify

    def forward(self, features: Tensor) -> Tensor:
        return self.classify(features)


def _report(name: str, row: Row, epochs: int) -> None:
    tqdm.write(
        f"{name}: epoch {row['epoch']} of {epochs}, loss {row['loss']:.4f}{_accuracies(row)}, "
        f"{row['seconds']:.0f} s"
    )


def _accuracies(row: Row) -> str:
    return "".join(f", {data} {100 * value:.1f} %" for data, value in row.items() if data not in COLUMNS)
