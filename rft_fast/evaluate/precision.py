"""Number formats of the forward pass: the dtype of the live weights, and how products are computed.

With "fp32" all matrix products and convolutions are plain float32, except attention on a GPU. There torch
selects the fastest kernel, and its memory-efficient one computes each float32 product as three TF32 products
(3xTF32 in CUTLASS): about as exact, but with other bits. No switch of torch affects that kernel. "ieee" is
"fp32" with torch's plain attention (``SDPBackend.MATH``): softmax(Q K^T) V by plain products. It is slower
and stores the whole attention matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import names

# Name -> dtype of the live weights and of the activations.
# ieee: attention by plain products, too. tf32: products of values rounded to 10 bits, on tensor cores.
PRECISIONS = dict.fromkeys(names.PRECISIONS, torch.float32)
PRECISIONS |= {"bf16": torch.bfloat16, "fp16": torch.float16}


def check(precision: names.Precision, device: torch.device) -> None:
    """Raise ValueError for an unknown precision, or one that the device does not support."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(
            f"precision 'tf32' is a mode of NVIDIA GPUs; the device is {device}, use fp32 or bf16"
        )


def cast(model: nn.Module, precision: names.Precision) -> nn.Module:
    """Convert the weights of a live model to the dtype of a precision, in place, before a Path is made of it.

    The linear head and the scale of the logits stay float32: they cost nothing, and bfloat16 logits near 30
    would have steps of 1/8, the dominant error of the loss.

    Args:
        model: The live model.
        precision: Name of the precision.

    Returns:
        The model.

    Raises:
        ValueError: The precision is unknown.
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
    """Context manager: float32 products, or TF32 for "tf32"; float32 sums of half-precision products.

    For "ieee", attention consists of such products; for the others it uses the kernel that torch selects, see
    above. The switches are global and are restored on exit.
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
        if hasattr(backends.cudnn, "conv"):  # torch >= 2.9: one switch per backend and operation
            operations = [backends.cuda.matmul, backends.mkldnn.matmul]
            for backend in (backends.cudnn, backends.mkldnn):
                operations += [backend.conv, backend.rnn]
        for operation in operations:
            put(operation, "fp32_precision", "ieee")
        # The older names of the same switches, which torch's compiler still reads. Torch raises an error if
        # the two disagree, so both are set; all operations are at "ieee" while the older ones are read.
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
