"""Training: a classifier, batches, AdamW on a schedule, and a state from which a killed run resumes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rft_fast.common.program import Stop
from rft_fast.evaluate.precision import exact
from rft_fast.names import Mixed, never

from .losses import Batch, backward, check_precision
from .progress import Progress
from .settings import Setting

Row = dict[str, float]
COLUMNS = ("epoch", "step", "lr", "loss", "seconds")  # of a row, in addition to the metrics
Metrics = Callable[[nn.Module], Mapping[str, float]]


class Diverged(ValueError):
    """A loss, gradient or weight is not finite."""


class Batches(Protocol):
    """The data that :func:`train` takes."""

    def __len__(self) -> int:
        """Number of batches of an epoch."""

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from number ``first`` on: the same ones on every call."""


class Keeper(Protocol):
    """Where :func:`train` keeps the state that a killed run resumes from."""

    every: int | None  # steps between two states; None: only at the end of an epoch

    def load(self) -> dict[str, Any] | None:
        """Return the last state; None where there is none."""

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the state by one of tensors, numbers, strings and containers of those."""


def train(
    model: nn.Module,
    batches: Batches,
    setting: Setting,
    *,
    precision: Mixed = "fp32",
    metrics: Metrics | None = None,
    keeper: Keeper | None = None,
    finished: Callable[[Sequence[Row]], object] | None = None,
    label: str = "",
    stop: Stop | None = None,
) -> list[Row]:
    """Train, in place, the parameters of ``model`` that require gradients.

    In each step the learning rate is set (:func:`learning_rate`), the mean loss of the batch is computed
    (cross-entropy with label smoothing; under mixup the weighted losses of both labels; for batches with
    texts, :func:`rft_fast.finetune.losses.contrastive`), gradients are clipped to norm ``clip``, and AdamW
    steps. Randomness of the model itself, such as dropout, is that of torch's global generator, which the
    caller seeds. Modules without trained parameters stay in eval mode, so that their statistics stay
    unchanged.

    Args:
        model: Maps images to logits [n, classes]; for batches with texts, a
            :class:`rft_fast.clip.classifier.ZeroShotClassifier`. float32 weights on one device.
        batches: The data. ``batch_size``, ``augment``, ``mixup`` and ``seed`` of the setting are theirs to
            apply.
        setting: Optimizer, schedule and loss.
        precision: ``fp32``; ``tf32`` on CUDA; ``bf16``: autocast; ``fp16``: autocast and scaled losses, on
            CUDA.
        metrics: Called after each epoch with the model in eval mode, without gradients; its values join the
            epoch's row.
        keeper: Where the state is kept. With one, a run that is killed and started again ends with the same
            weights as an uninterrupted one, on the same machine.
        finished: Called with all rows after each epoch, and with the kept rows on resuming.
        label: Name in the progress and in errors. Where stderr is no terminal, progress is a line every 30 s.
        stop: Checked after each step; on a request the state is kept.

    Returns:
        One row per epoch: epoch (from 1), step, lr (of the last step), loss (mean over images), the metrics,
            seconds.

    Raises:
        Diverged: A loss, gradient or weight is not finite.
        Interrupted: ``stop`` was requested.
        ValueError: The device lacks the precision, nothing is trained, weights are not float32, or the
            warm-up is as long as the training.
    """
    where = f"finetune: {label}" if label else "finetune"
    device = _check(model, batches, setting, precision, where)
    run = _Training(model, setting, precision, device, len(batches), where)
    if keeper is not None and (kept := keeper.load()) is not None:
        run.resume(kept)
        if run.rows and finished is not None:
            finished(run.rows)  # the process that kept them may have been killed before this

    def keep() -> None:
        if keeper is not None:
            keeper.save(run.state())

    _train_mode(model)
    with exact(precision), Progress(label or "training", run.steps, run.step, len(batches)) as progress:
        while run.step < run.steps:
            epoch, first = divmod(run.step, len(batches))
            for batch in batches.epoch(epoch, first):
                progress.step(run.take(batch), len(batch.labels))
                if run.step % len(batches):  # an epoch's last step is kept after its row is made
                    stopped = stop is not None and stop.requested
                    if stopped or (keeper is not None and keeper.every and run.step % keeper.every == 0):
                        keep()
                    if stop is not None:
                        stop.check()
            if run.step % len(batches):
                raise ValueError(
                    f"{where}: epoch {epoch + 1} ended after {run.step % len(batches)} of the {len(batches)} "
                    "batches that len() reports"
                )
            run.end_epoch(metrics)
            keep()
            if finished is not None:
                finished(run.rows)
            if stop is not None and run.step < run.steps:
                stop.check()
    model.eval()
    if broken := [name for name, tensor in model.state_dict().items() if not bool(tensor.isfinite().all())]:
        raise Diverged(f"{where}: {broken[0]} is not finite after the last step; {_REMEDY}")
    return run.rows


class _Training:
    """The state of :func:`train`: a model with its optimizer, and its progress."""

    def __init__(
        self,
        model: nn.Module,
        setting: Setting,
        precision: Mixed,
        device: torch.device,
        batches: int,
        where: str,
    ) -> None:
        """batches: number per epoch. where: prefix of errors."""
        self._model, self._setting, self._precision, self._device = model, setting, precision, device
        self._batches, self._where = batches, where
        self._optimizer = adamw(model, setting)
        self._scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._total, self._images = 0.0, 0  # sum of this epoch's losses, and number of its images
        self._start = time.perf_counter()
        self.steps = setting.epochs * batches
        self.step = 0
        self.rows: list[Row] = []

    def state(self) -> dict[str, Any]:
        """Return what :meth:`resume` needs."""
        return {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "random": _random(self._device),
            "rows": self.rows,
            "step": self.step,
            "total": self._total,
            "images": self._images,
            "seconds": time.perf_counter() - self._start,
        }

    def resume(self, kept: Mapping[str, Any]) -> None:
        self._model.load_state_dict(kept["model"])
        self._optimizer.load_state_dict(kept["optimizer"])
        self._scaler.load_state_dict(kept["scaler"])
        _restore_random(kept["random"], self._device)
        self.rows, self.step = list(kept["rows"]), kept["step"]
        self._total, self._images = kept["total"], kept["images"]
        self._start = time.perf_counter() - kept["seconds"]

    def take(self, batch: Batch) -> float:
        """Take one optimizer step and return the mean loss of the batch. Raises Diverged."""
        setting, optimizer, scaler = self._setting, self._optimizer, self._scaler
        lr = learning_rate(setting, self.step, self.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss = backward(self._model, batch, setting, self._precision, self._device, scaler)
        epoch = self.step // self._batches + 1
        place = f"at step {self.step} of {self.steps} (epoch {epoch}, learning rate {lr:.3g})"
        if not math.isfinite(loss):
            raise Diverged(f"{self._where}: the loss is {loss} {place}; {_REMEDY}")
        if setting.clip is not None:
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(self._trained, setting.clip)
            # A scaler skips the step after an overflow, which it expects now and then.
            if not scaler.is_enabled() and not math.isfinite(norm):
                raise Diverged(f"{self._where}: the gradient's norm is {float(norm)} {place}; {_REMEDY}")
        scaler.step(optimizer)
        scaler.update()
        self.step += 1
        self._total, self._images = self._total + loss * len(batch.labels), self._images + len(batch.labels)
        return loss

    def end_epoch(self, metrics: Metrics | None) -> None:
        """Add the row of an epoch whose batches have all been taken."""
        lr = learning_rate(self._setting, self.step - 1, self.steps)
        epoch = self.step // self._batches
        row: Row = {"epoch": epoch, "step": self.step, "lr": lr, "loss": self._total / self._images}
        self._total, self._images = 0.0, 0
        if metrics is not None:
            self._model.eval()
            with torch.no_grad():
                row |= metrics(self._model)
            _train_mode(self._model)
        self.rows.append(row | {"seconds": time.perf_counter() - self._start})


_REMEDY = "take a lower learning rate, a longer warm-up, or fp32"


def learning_rate(setting: Setting, step: int, steps: int) -> float:
    """Return the learning rate of a step.

    Args:
        setting: Peak ``lr``, ``warmup`` (None: a tenth of the steps, at most 500) and ``schedule``.
        step: Counted from 0.
        steps: Steps of the whole training.

    Returns:
        Linear up to ``lr`` during warm-up, then a half cosine to 0, or constant.
    """
    warmup = setting.warmup_of(steps)
    if step < warmup:
        return setting.lr * (step + 1) / warmup
    if setting.schedule == "constant":
        return setting.lr
    if setting.schedule == "cosine":
        return setting.lr * (0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))
    never(setting.schedule)


def adamw(model: nn.Module, setting: Setting) -> torch.optim.AdamW:
    """Return AdamW over the parameters that require gradients; weight decay on those with two or more
    dimensions.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": setting.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=setting.lr, betas=setting.betas)


def _check(
    model: nn.Module, batches: Batches, setting: Setting, precision: Mixed, where: str
) -> torch.device:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError(f"{where}: no parameter of the model requires gradients")
    if wrong := [f"{name} ({p.dtype})" for name, p in trained.items() if p.dtype != torch.float32]:
        raise ValueError(f"{where}: weights must be float32 to be trained, {wrong[0]} is not")
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        raise ValueError(f"{where}: the model must be on one device, it is on {sorted(map(str, devices))}")
    device = devices.pop()
    check_precision(precision, device)
    if not len(batches):
        raise ValueError(f"{where}: there are no batches")
    check_warmup(setting, len(batches))
    return device


def check_warmup(setting: Setting, batches: int) -> None:
    """Raise ValueError for a warm-up that is at least as long as the training."""
    if setting.warmup is not None and setting.warmup >= setting.epochs * batches:
        raise ValueError(
            f"finetune: a warm-up of {setting.warmup} steps does not fit into {setting.epochs} epochs of "
            f"{batches} steps; leave --warm-up out for a tenth of the steps"
        )


def _train_mode(module: nn.Module, above: bool = True) -> None:
    """Set train mode on modules with trained parameters, and on parameterless modules inside of those."""
    parameters = list(module.parameters())
    module.training = above and (not parameters or any(p.requires_grad for p in parameters))
    for child in module.children():
        _train_mode(child, module.training)


def _random(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore_random(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
