from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

VERSION: int
CUDA: bool  # without it, CudaTable and why_not_cuda are not there

class Element:
    def __init__(
        self,
        base: int,
        k: float,
        noise: int,
        scale: float,
        adaptive: bool,
        interpolated: bool,
        masked: bool,
        threshold: int,
        fill_zeroshot: bool,
        seed: int,
        draw: int,
    ) -> None: ...

class Table:
    def __init__(self, entries: Sequence[tuple[int, int, int, int, int, int, int, int]]) -> None: ...
    def write(
        self, runs: Sequence[tuple[int, int]], element: Element, threads: int, isa: str = ""
    ) -> None: ...

class CudaTable:
    bytes: int
    def __init__(self, entries: Sequence[tuple[int, int, int, int, int, int, int, int]]) -> None: ...
    def fill(self, memory: int) -> None: ...
    def write(
        self, memory: int, runs: Sequence[tuple[int, int]], element: Element, device: int, stream: int
    ) -> None: ...

def why_not_cuda(device: int) -> str: ...
def philox(counter: Sequence[int], key: Sequence[int], isa: str = "") -> list[int]: ...
def noise(kind: int, words: npt.NDArray[np.uint32], isa: str = "") -> npt.NDArray[np.float32]: ...
def isas() -> list[str]: ...
