"""Training images: decoded and augmented by threads, each image with a random stream of its own."""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from tqdm import tqdm

from rft_fast.clip.architectures import Preprocess
from rft_fast.clip.classifier import ImageClassifier
from rft_fast.common.program import Stop
from rft_fast.common.words import some
from rft_fast.datasets import Dataset, decoding, pixel_transform
from rft_fast.datasets.source import Source
from rft_fast.evaluate.precision import exact
from rft_fast.names import Mixed

from .losses import Batch, autocast, logits
from .settings import AUGMENT, MAGNITUDES, Setting

SCALE, RATIO = (0.9, 1.0), (3 / 4, 4 / 3)  # of a crop: share of the area, and width / height
FEATURES = 128  # images per forward pass for features
AHEAD = 2  # batches prepared while one is trained on

# Purposes of random streams, so that no two are the same.
_ORDER, _IMAGE, _MIXUP, _TEXT = range(4)

Augmentation = Callable[[Image.Image, np.random.Generator], Image.Image]


# --- augmentation -------------------------------------------------------------------------------------


def augmentation(name: str, preprocess: Preprocess) -> Augmentation:
    """Return the transform of RGB images before training; its results have the model's size.

    Args:
        name: ``none``: the evaluation's transform. ``crop``: a random part with 0.9 to 1 of the area, resized
            (bicubic), as open_clip and WiSE-FT train. ``crop-flip``: also mirrored half of the time.
            ``rand-mM-nN``: then N operations of RandAugment with magnitude M of 30, on the scale of its paper
            and torchvision.
        preprocess: Size and normalisation of the model's inputs.

    Raises:
        ValueError: The name is unknown.
    """
    found = AUGMENT.fullmatch(name)
    if found is None:
        raise ValueError(f"augmentation: expected none, crop, crop-flip or rand-mM-nN, got {name!r}")
    if name == "none":
        whole = pixel_transform(preprocess)
        return lambda image, rng: whole(image)
    flips = name != "crop"
    count, share = int(found["n"] or 0), int(found["m"] or 0) / MAGNITUDES

    def augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        top, left, height, width = crop_box(image.height, image.width, rng)
        image = TF.resized_crop(
            image, top, left, height, width, list(preprocess.size), InterpolationMode.BICUBIC
        )
        if flips and rng.random() < 0.5:
            image = TF.hflip(image)
        for number in rng.integers(len(OPERATIONS), size=count):
            operation = list(OPERATIONS.values())[number]
            image = operation(image, share, float(rng.choice((-1, 1))))
        return image

    return augment


def crop_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of a random part: area uniform in SCALE, shape log-uniform in RATIO.

    If ten draws do not fit, it is the largest central part whose shape is allowed.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def _sheared(image: Image.Image, x: float, y: float) -> Image.Image:
    degrees = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    sheared: Image.Image = TF.affine(
        image, 0, [0, 0], 1.0, degrees, InterpolationMode.BILINEAR, center=[0, 0]
    )
    return sheared


def _moved(image: Image.Image, x: float, y: float) -> Image.Image:
    moved: Image.Image = TF.affine(image, 0, [int(x), int(y)], 1.0, [0.0, 0.0], InterpolationMode.BILINEAR)
    return moved


_MOVE = 150 / 331  # of the image's side, at full magnitude

# Operation of RandAugment -> (image, share of the full magnitude, sign) -> image.
OPERATIONS: dict[str, Callable[[Image.Image, float, float], Image.Image]] = {
    "Identity": lambda image, share, sign: image,
    "ShearX": lambda image, share, sign: _sheared(image, sign * 0.3 * share, 0),
    "ShearY": lambda image, share, sign: _sheared(image, 0, sign * 0.3 * share),
    "TranslateX": lambda image, share, sign: _moved(image, sign * _MOVE * share * image.width, 0),
    "TranslateY": lambda image, share, sign: _moved(image, 0, sign * _MOVE * share * image.height),
    "Rotate": lambda image, share, sign: TF.rotate(image, sign * 30 * share, InterpolationMode.BILINEAR),
    "Brightness": lambda image, share, sign: TF.adjust_brightness(image, 1 + sign * 0.9 * share),
    "Color": lambda image, share, sign: TF.adjust_saturation(image, 1 + sign * 0.9 * share),
    "Contrast": lambda image, share, sign: TF.adjust_contrast(image, 1 + sign * 0.9 * share),
    "Sharpness": lambda image, share, sign: TF.adjust_sharpness(image, 1 + sign * 0.9 * share),
    "Posterize": lambda image, share, sign: TF.posterize(image, 8 - round(4 * share)),
    "Solarize": lambda image, share, sign: TF.solarize(image, 255 * (1 - share)),
    "AutoContrast": lambda image, share, sign: TF.autocontrast(image),
    "Equalize": lambda image, share, sign: TF.equalize(image),
}


# --- batches ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Images:
    """The training images of a source, and the rows of the head that they belong to.

    Args:
        source: Where they lie.
        chosen: int64 [n], positions in ``source.files``.
        labels: int64 [n], rows of the head.
        preprocess: Of the model.
        workers: Threads that decode.
        in_memory: Keep every image decoded, as it is stored, after it is first read.
    """

    source: Source
    chosen: Tensor
    labels: Tensor
    preprocess: Preprocess
    workers: int
    in_memory: bool = False
    _held: dict[int, Image.Image] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        return len(self.labels)

    def _image(self, index: int) -> Image.Image:
        if not self.in_memory:
            return self._read(index)
        if index not in self._held:
            self._held[index] = self._read(index)
        return self._held[index]

    def _read(self, index: int) -> Image.Image:
        """Return an image as RGB, its borders trimmed. Only modes that the evaluation reads are accepted."""
        try:
            image = self.source.open(index)
            if image.mode not in decoding.MODES:
                raise ValueError(decoding.loss(image.mode))
            image = image.convert("RGB")
        except Exception as error:  # Pillow raises almost anything on damaged images
            raise ValueError(f"finetune: {self.where(index)} cannot be read: {error}") from error
        edge = self.source.trim
        return image.crop((edge, edge, image.width - edge, image.height - edge)) if edge else image

    def where(self, index: int) -> str:
        """Describe where an image lies."""
        return f"{self.source.path}: {self.source.files[index].name}"

    def load(self, position: int, augment: Augmentation, rng: np.random.Generator) -> Tensor:
        """Return an image after augmentation: uint8 [3, h, w]."""
        image = augment(self._image(int(self.chosen[position])), rng)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def digest(self) -> str:
        """SHA-256 of what identifies the images: names, sizes, labels; of decoded images, their pixels."""
        found = hashlib.sha256(self.labels.numpy().tobytes())
        for index in self.chosen.tolist():
            file = self.source.files[index]
            found.update(f"{file.name}\0{file.size}\n".encode())
        if self.source.pixels is not None:
            found.update(self.source.pixels.contiguous().numpy().data.cast("B"))
        return found.hexdigest()

    def check(self) -> None:
        """Read the header of every image.

        Raises:
            ValueError: Some cannot be read, or have another mode; the message names them.
        """
        if self.source.pixels is not None:
            return
        broken: list[str] = []

        def problem(index: int) -> str | None:
            try:
                mode, size = self.source.mode_and_size(index)
                if mode not in decoding.MODES:
                    return decoding.loss(mode)
                return None if min(size) > 2 * self.source.trim else f"its size is {size}"
            except Exception as error:  # as in _read
                return str(error)

        chosen = self.chosen.tolist()
        with ThreadPoolExecutor(self.workers) as pool:
            results = pool.map(problem, chosen, chunksize=64)
            for index, what in zip(
                chosen, tqdm(results, "checking images", len(chosen), disable=None, leave=False), strict=True
            ):
                if what is not None:
                    broken.append(f"{self.where(index)} ({what})")
        if broken:
            raise ValueError(
                f"finetune: {len(broken)} of {len(chosen)} images cannot be read: {some(broken)}; "
                "replace or remove them"
            )


@dataclass(frozen=True, eq=False)
class ImageBatches:
    """The batches of a setting. What is random about an image depends on seed, epoch and image alone.

    Attributes:
        images: The training images.
        setting: Of the training.
        device: Where the batches go.
        prompts: int64 [classes, templates, context]. With them, each image has a text: a random template of
            its class, drawn anew in each epoch. A last pair alone, which has no loss, joins the batch before
            it.
    """

    images: Images
    setting: Setting
    device: torch.device
    prompts: Tensor | None = None

    def __len__(self) -> int:
        return len(self._split(torch.empty(len(self.images))))

    def _split(self, order: Tensor) -> list[Tensor]:
        """Split the order of an epoch into batches."""
        batches = list(torch.split(order, self.setting.batch_size))
        if self.prompts is not None and len(batches) > 1 and len(batches[-1]) == 1:
            batches[-2:] = [torch.cat(batches[-2:])]
        return batches

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        setting = self.setting
        order = torch.from_numpy(_stream(setting, _ORDER, number).permutation(len(self.images)))
        augment = augmentation(setting.augment, self.images.preprocess)

        def load(position: int) -> Tensor:
            return self.images.load(position, augment, _stream(setting, _IMAGE, number, position))

        batches = list(enumerate(self._split(order)))[first:]
        loaded = prepared(load, [chosen for _, chosen in batches], self.images.workers)
        texts = self._texts(number)
        for (index, chosen), pixels in zip(batches, loaded, strict=True):
            batch = Batch(
                normalised(pixels, self.images.preprocess, self.device),
                self.images.labels[chosen].to(self.device),
                texts=None if texts is None else texts(chosen).to(self.device),
            )
            yield mixed(batch, setting.mixup, _stream(setting, _MIXUP, number, index))

    def _texts(self, epoch: int) -> Callable[[Tensor], Tensor] | None:
        """Return positions of images -> the tokens of their texts in an epoch; None without prompts."""
        if (prompts := self.prompts) is None:
            return None
        rng = _stream(self.setting, _TEXT, epoch)
        templates = torch.from_numpy(rng.integers(prompts.shape[1], size=len(self.images)))
        return lambda chosen: prompts[self.images.labels[chosen], templates[chosen]]


@dataclass(frozen=True, eq=False)
class FeatureBatches:
    """Batches of features [n, d] that were computed once: the data of a head alone."""

    features: Tensor
    labels: Tensor
    setting: Setting

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / self.setting.batch_size)

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        order = torch.from_numpy(_stream(self.setting, _ORDER, number).permutation(len(self.labels)))
        for chosen in torch.split(order, self.setting.batch_size)[first:]:
            yield Batch(self.features[chosen], self.labels[chosen])


def prepared(load: Callable[[int], Tensor], batches: Sequence[Tensor], workers: int) -> Iterator[Tensor]:
    """Yield the loaded images of each batch of positions, stacked; threads load some batches ahead."""
    pool = ThreadPoolExecutor(workers)
    queue: deque[list[Future[Tensor]]] = deque()
    try:
        for chosen in batches:
            queue.append([pool.submit(load, position) for position in chosen.tolist()])
            if len(queue) > AHEAD:
                yield torch.stack([future.result() for future in queue.popleft()])
        while queue:
            yield torch.stack([future.result() for future in queue.popleft()])
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for queued images


def normalised(pixels: Tensor, preprocess: Preprocess | Dataset, device: torch.device) -> Tensor:
    """uint8 [n, 3, h, w] -> the model's inputs, float32 on the device."""
    if device.type == "cuda":
        pixels = pixels.pin_memory()
    mean = torch.tensor(preprocess.mean, device=device)[:, None, None]
    std = torch.tensor(preprocess.std, device=device)[:, None, None]
    white = torch.tensor(255.0, device=device)  # a tensor: CUDA divides by a number through its reciprocal
    return (pixels.to(device, non_blocking=True).float() / white - mean) / std


def mixed(batch: Batch, alpha: float, rng: np.random.Generator) -> Batch:
    """Apply mixup: blend each image with another of the batch, with a share drawn from Beta(alpha, alpha)."""
    if alpha == 0:
        return batch
    share = float(rng.beta(alpha, alpha))
    other = torch.from_numpy(rng.permutation(len(batch.labels))).to(batch.labels.device)
    images = share * batch.images + (1 - share) * batch.images[other]
    return Batch(images, batch.labels, batch.labels[other], share)


def _stream(setting: Setting, purpose: int, *place: int) -> np.random.Generator:
    return np.random.default_rng([setting.seed, purpose, *place])


# --- features and accuracy ----------------------------------------------------------------------------


@torch.no_grad()
def features(model: ImageClassifier, images: Images, precision: Mixed, stop: Stop | None = None) -> Tensor:
    """Return the image tower's features of all images in order, unaugmented: float32 [n, d] on its device."""
    device = model.classification_head.weight.device
    augment, rng = augmentation("none", images.preprocess), np.random.default_rng(0)
    batches = torch.split(torch.arange(len(images)), FEATURES)
    loaded = prepared(lambda position: images.load(position, augment, rng), batches, images.workers)
    bar = tqdm(loaded, "features for the head", len(batches), disable=None, leave=False)
    found = []
    for pixels in bar:
        if stop is not None:
            stop.check()
        with exact(precision), autocast(precision, device):
            found.append(model.visual(normalised(pixels, images.preprocess, device)).float())
    return torch.cat(found)


@torch.no_grad()
def accuracy(model: ImageClassifier, dataset: Dataset, batch_size: int, precision: Mixed) -> float:
    """Return the fraction of a data set's images that a model in eval mode classifies correctly.

    Predictions are among the classes of the data set.
    """
    device = model.classification_head.weight.device
    right = 0
    batches = zip(
        torch.split(dataset.images, batch_size), torch.split(dataset.labels, batch_size), strict=True
    )
    for pixels, labels in batches:
        found = logits(model, normalised(pixels, dataset, device), precision).cpu()
        if dataset.classes is None:
            predicted = found.argmax(1)
        else:
            rows = dataset.classes if dataset.groups is None else dataset.groups
            predicted = rows[found[:, dataset.classes].argmax(1)]
        right += int((predicted == labels).sum())
    return right / len(dataset.labels)


def threads() -> int:
    """Number of CPU cores that this process may use."""
    with suppress(AttributeError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
