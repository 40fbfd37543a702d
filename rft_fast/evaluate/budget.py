"""How the memory of a device is shared out: images that stay there, held activations, batches in work."""

from __future__ import annotations

import torch

from ..common import meter

# Of the memory limit: for images that stay on the device, for activations that are held between stages, and
# for those of the batches in work. The rest is for gradients and what libraries take.
RESIDENT, HELD, WORKING = 0.4, 0.3, 0.2


class Budget:
    """The memory that all evaluators of a model may use together.

    Args:
        device: the model's.
        limit: in bytes; None: 80 % of what is free now on a GPU, half of what is free on the CPU.
    """

    def __init__(self, device: torch.device, limit: int | None = None) -> None:
        if limit is None:
            share = 0.8 if device.type == "cuda" else 0.5
            limit = int(share * meter.available(device))
        self.limit = limit
        self._on_device = device.type != "cuda"  # where images are in the device's memory already
        self._resident = 0  # bytes of images that stay on the device

    @property
    def for_images(self) -> float:
        """Bytes for images that stay on a GPU."""
        return RESIDENT * self.limit

    @property
    def for_batches(self) -> int:
        """Bytes for the activations of all batches in work."""
        return int(WORKING * self.limit)

    def keep(self, images: int) -> bool:
        """Whether so many more bytes of images stay on the device; they are counted if so."""
        stays = self._on_device or self._resident + images <= self.for_images
        self._resident += images if stays else 0
        return stays

    def holds(self, size: int) -> bool:
        """Whether activations of so many bytes may be held between stages."""
        return size <= HELD * self.limit

    def held(self, each: int) -> int:
        """How many images may be held between stages, at so many bytes each; at least one."""
        return max(1, int(HELD * self.limit / max(1, each)))
