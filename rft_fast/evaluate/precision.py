"""The number format of the forward pass: what the live weights are stored in, and how products are taken.

Under "fp32" all matrix products and convolutions are float32's own, but for attention on a GPU. There torch
picks the fastest kernel, and its memory-efficient one takes each product of float32 as three of TF32 (3xTF32,
as CUTLASS calls it): about as exact, but not the same bits. No switch of torch reaches inside that kernel.
"ieee" is "fp32" with torch's plain attention (``SDPBackend.MATH``): softmax(Q K^T) V by ordinary products. It
is slower, and holds the whole attention matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import names

# Name -> the type of the live weights and of the activations.
# ieee: attention by ordinary products, too. tf32: products of values rounded to 10 bits, on tensor cores.
PRECISIONS = dict.fromkeys(names.PRECISIONS, torch.float32)
PRECISIONS |= {"bf16": torch.bfloat16, "fp16": torch.float16}


def check(precision: names.Precision, device: torch.device) -> None:
    """Raises ValueError for a precision that is not offered, or not on this device."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(
            f"precision 'tf32' is a mode of NVIDIA GPUs; the device is {device}, use fp32 or bf16"
        )


def cast(model: nn.Module, precision: names.Precision) -> nn.Module:
    """Turns the live model's weights into the type of a precision, in place, before a Path is made of it.

    The linear head and what scales the logits stay float32: they cost nothing, and a logit of 30 in
    bfloat16 has steps of an eighth, which would be all the loss's error. Returns the model.

    Raises ValueError for an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    towers = [
        getattr(model, name)
        for name in ("visual", "text")
        if isinstance(getattr(model, name, None), nn.Module)
    ]
    for module in towers or [model]:
        module.to(PRECISIONS[precision])
    return model


@contextmanager
def exact(precision: names.Precision) -> Iterator[None]:
    """Products in full float32, or for "tf32" on TF32; sums of half precision products in float32.

    For "ieee" attention is made of such products; for the others by the kernel that torch picks (see above).
    These switches of torch are global, and as they were afterwards.
    """
    backends: Any = torch.backends
    tf32 = precision == "tf32"
    with ExitStack() as stack:

        def put(place: Any, name: str, value: object) -> None:
            stack.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, value)

        if precision == "ieee":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        put(backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)
        put(backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False)
        operations = []
        if hasattr(backends.cudnn, "conv"):  # torch 2.9 and newer: one switch per backend and operation
            operations = [backends.cuda.matmul, backends.mkldnn.matmul]
            for backend in (backends.cudnn, backends.mkldnn):
                operations += [backend.conv, backend.rnn]
        for operation in operations:
            put(operation, "fp32_precision", "ieee")
        # The older names of the same switches, which torch's compiler still asks by. Torch refuses to answer
        # where the two disagree, so both are set; all operations are at "ieee" while the older are asked.
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        try:
            convolutions = backends.cudnn.allow_tf32
        except RuntimeError:
            convolutions = True
        stack.callback(setattr, backends.cudnn, "allow_tf32", convolutions)
        backends.cudnn.allow_tf32 = tf32
        for operation in operations:
            operation.fp32_precision = "tf32" if tf32 else "ieee"
        yield
