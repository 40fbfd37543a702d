"""Shares of a device's memory: for resident images, held activations, and batches in work."""

from __future__ import annotations

import torch

from ..common import meter

# Shares of the limit: for images that stay on the device, for activations held between stages, and for those
# of batches in work. The rest is for gradients and workspaces of libraries.
RESIDENT, HELD, WORKING = 0.4, 0.3, 0.2


class Budget:
    """The memory that all evaluators of a model may use together.

    Args:
        device: Device of the model.
        limit: Bytes; None: 80 % of the free memory of a GPU, half of the free memory of the CPU.

    Attributes:
        limit: Bytes.
    """

    def __init__(self, device: torch.device, limit: int | None = None) -> None:
        if limit is None:
            share = 0.8 if device.type == "cuda" else 0.5
            limit = int(share * meter.available(device))
        self.limit = limit
        self._on_device = device.type != "cuda"  # images are in the device's memory anyway
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
        """Whether so many further bytes of images may stay on the device; they count from now on if so."""
        stays = self._on_device or self._resident + images <= self.for_images
        self._resident += images if stays else 0
        return stays

    def holds(self, size: int) -> bool:
        """Whether activations of that size in bytes may be held between stages."""
        return size <= HELD * self.limit

    def held(self, each: int) -> int:
        """Return how many images may be held between stages, at so many bytes each; at least one."""
        return max(1, int(HELD * self.limit / max(1, each)))
