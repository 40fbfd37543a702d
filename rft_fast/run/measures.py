"""Models measured on the data of a sweep, for merges that need data."""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from .. import checkpoints
from ..config import request as requests
from ..config.settings import Computed
from ..evaluate import Evaluator, modes
from ..settings import Along
from . import wiring
from .wiring import Models

State = dict[str, Tensor]
_BATCH = 128  # images of a batch, where none is given


class Measured:
    """Accuracies and Fisher information of checkpoints; a :class:`rft_fast.merge.greedy.Measures`.

    Models and images are loaded when they are needed first.

    Args:
        words: options of ``python -m rft_fast.sweep`` for architecture, head, data and device.
        files: the checkpoints, two or more; the first is the zero-shot end of the sweep.
        key: which weights of the others, where a file has several.
        zeroshot_key: which weights of the first file, likewise.
        unrelated: accept models of which neither was fine-tuned from the other.

    Raises:
        ValueError, RuntimeError, OSError: as a sweep with these words, here or when they are needed.
    """

    def __init__(
        self,
        words: Sequence[str],
        files: Sequence[pathlib.Path],
        key: str | None = None,
        zeroshot_key: str | None = None,
        unrelated: bool = False,
    ) -> None:
        self._words, self._files, self._key = tuple(words), tuple(files), key
        self._more = [] if zeroshot_key is None else ["--zeroshot-key", zeroshot_key]
        self._more += ["--unrelated"] if unrelated else []
        self.request = self._requested(files[1:], key)
        self._sum: tuple[tuple[pathlib.Path, ...], State] = ((), {})

    def _requested(self, finetuned: Sequence[pathlib.Path], key: str | None) -> requests.Request:
        """Return the request of a sweep of these models."""
        named = ["--zeroshot", str(self._files[0]), "--finetuned", *map(str, finetuned)]
        named += [] if key is None else ["--key", key]
        return requests.read(["interpolation", *named, *self._more, *self._words])

    @cached_property
    def _models(self) -> Models:
        return Models.load(self.request)

    @cached_property
    def _evaluator(self) -> Evaluator:
        return self._models.evaluator(wiring.load_images(self.request, self._models.rows))

    @property
    def about(self) -> dict[str, object]:
        """The options, and the SHA-256 of the images of each data set."""
        digests = {data.name: wiring.digest(data) for data in self._evaluator.datasets}
        return {"options": self._words, "datasets": digests}

    def accuracy(self, files: Sequence[pathlib.Path]) -> float:
        """Return the accuracy of the mean of some models: the mean over data sets, each counts the same."""
        *before, last = files
        known, total = self._sum
        if known != tuple(before):
            total = {}
            for file in before:
                total = self._added(total, file, self._key)
            self._sum = tuple(before), total
        self._write(self._added(total, last, self._key), len(files))
        scores = self._evaluator.scores().values()
        return sum(each.accuracy for each in scores) / len(scores)

    def fisher(self, file: pathlib.Path) -> State:
        """Return the diagonal Fisher information of a model (Matena & Raffel 2022, Eq. 4).

        The mean over images of the squared gradient of log p(y | x), with one class y drawn from the model's
        own prediction for each image, by the seed of the sweep. Images are computed one by one.
        """
        self._write(self._added({}, file, self._key), 1)
        live, draws = self._models.live, torch.Generator().manual_seed(self.request.of(Along).seed)
        weights = {name: p for name, p in live.named_parameters() if p.is_floating_point()}
        sums = {name: torch.zeros(p.shape, device=p.device) for name, p in weights.items()}
        count = 0
        with modes.differentiating(live, self.request.of(Computed).precision, list(weights.values())):
            for feed in self._evaluator.feeds:
                for place in range(len(feed)):
                    logits = live(feed.prepare(slice(place, place + 1))).float()
                    if feed.classes is not None:
                        logits = logits.index_select(1, feed.classes)
                    chances = logits.detach().softmax(1).cpu()
                    drawn = int(torch.multinomial(chances, 1, generator=draws))
                    found = torch.autograd.grad(
                        logits.log_softmax(1)[0, drawn], list(weights.values()), allow_unused=True
                    )
                    for total, gradient in zip(sums.values(), found, strict=True):
                        if gradient is not None:
                            total.addcmul_(gradient.float(), gradient.float())
                    count += 1
        return {name: (total / count).cpu() for name, total in sums.items()}

    def statistics(self, file: pathlib.Path, differences: Collection[pathlib.Path] = ()) -> State:
        """Return the statistics of BatchNorm of a model on the images: their cumulative mean over batches.

        As ``torch.optim.swa_utils.update_bn`` estimates them.

        Args:
            file: the model.
            differences: which files are differences, no models: they are not loaded.

        Raises:
            ValueError: the model has no BatchNorm.
        """
        if differences:
            models = [each for each in self._files[1:] if checkpoints.located(each) not in differences]
            self.request = self._requested(models or [file], self._key if models else None)
        self._write(self._added({}, file), 1)
        live = self._models.live
        modules = {
            name: module
            for name, module in live.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        }
        if not modules:
            raise ValueError("the model has no BatchNorm with statistics; leave --recalibrate out")
        size = self._evaluator.batch_size or _BATCH
        live.eval()
        for module in modules.values():
            module.reset_running_stats()
            module.momentum = None  # a cumulative mean
            module.train()
        with torch.no_grad():
            for feed in self._evaluator.feeds:
                for start in range(0, len(feed), size):
                    live(feed.prepare(slice(start, min(start + size, len(feed)))))
        live.eval()
        return {
            f"{name}.{key}": tensor.detach().cpu().clone()
            for name, module in modules.items()
            for key, tensor in module.named_buffers()
        }

    def _added(self, total: State, file: pathlib.Path, key: str | None = None) -> State:
        """Return a sum of models and one more, in float32; integers are those of the last one."""
        state = self._models.ends.pair(checkpoints.load(file, key=key), str(file))[1]
        return {
            name: (total[name] + tensor.float() if total else tensor.float())
            if tensor.is_floating_point()
            else tensor
            for name, tensor in state.items()
        }

    @torch.no_grad()
    def _write(self, total: State, count: int) -> None:
        """Write a mean into the live model."""
        for name, tensor in self._models.live.state_dict().items():
            if name in total:
                value = total[name].to(tensor.device)
                tensor.copy_(value / count if tensor.is_floating_point() else value)
