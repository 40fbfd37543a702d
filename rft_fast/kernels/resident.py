"""A backend's own data in the memory of the device that its kernels run on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Resident:
    """Tensors of the host, copied to a device, where kernels on any stream may read them.

    wait: until they have arrived. Without, only the stream that is current now may read them, and the host
        goes on at once.

    The memory is torch's: nothing waits for the device when it is given back, and no capture of a CUDA graph
    is disturbed.
    """

    def __init__(self, device: torch.device, parts: Sequence[Tensor], wait: bool = True) -> None:
        self._device = device
        self._streams: set[int] = set()  # whose kernels have read it
        if device.type == "cuda" and not wait:
            parts = [part.pin_memory() for part in parts]
        self.parts = [part.to(device, non_blocking=not wait) for part in parts]

    def stream(self) -> int:
        """The current stream, as a number, for a launch that reads the data; 0 on the CPU.

        torch gives the memory to nobody else before what was launched there is done.
        """
        if self._device.type != "cuda":
            return 0
        stream = torch.cuda.current_stream(self._device)
        if stream.cuda_stream not in self._streams:
            self._streams.add(stream.cuda_stream)
            for part in self.parts:
                part.record_stream(stream)
        return int(stream.cuda_stream)
