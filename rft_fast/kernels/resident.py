"""Memory on the device that holds a backend's own data, which cannot be filled while a graph is captured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Resident:
    """Host tensors copied to a device, where kernels on any stream may read them.

    The memory is torch's: freeing it waits for no kernel, and captures of CUDA graphs are not disturbed.

    Args:
        device: Where to copy to.
        parts: Tensors on the host.
        wait: Wait until they have arrived. Otherwise only the current stream may read them, and the host goes
            on at once.
    """

    def __init__(self, device: torch.device, parts: Sequence[Tensor], wait: bool = True) -> None:
        self._device = device
        self._streams: set[int] = set()  # streams whose kernels read it
        if device.type == "cuda" and not wait:
            parts = [part.pin_memory() for part in parts]
        self.parts = [part.to(device, non_blocking=not wait) for part in parts]

    def stream(self) -> int:
        """The current stream as a number, for a launch that reads the data; 0 on the CPU.

        torch does not reuse the memory before the work launched on that stream is done.
        """
        if self._device.type != "cuda":
            return 0
        stream = torch.cuda.current_stream(self._device)
        if stream.cuda_stream not in self._streams:
            self._streams.add(stream.cuda_stream)
            for part in self.parts:
                part.record_stream(stream)
        return int(stream.cuda_stream)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream of the current device or of ``device``."""
    if device.type != "cuda":
        return False
    if torch.cuda.is_current_stream_capturing():
        return True
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def refuse_capture(backend: str, device: torch.device) -> None:
    """Raise RuntimeError while a CUDA graph is captured: a table cannot be copied to the device then."""
    if capturing(device):
        raise RuntimeError(
            f"{backend}: making a Plan copies its table to the device, which cannot be captured in a CUDA "
            "graph; make the Plan before the capture"
        )


def refuse_numbers(backend: str, device: torch.device) -> None:
    """Raise RuntimeError while a CUDA graph is captured: a replay would not see other numbers."""
    if capturing(device):
        raise RuntimeError(
            f"{backend}: numbers that differ from tensor to tensor are copied to the device, which cannot be "
            "captured in a CUDA graph; write before the capture, or pass one number for all tensors"
        )
