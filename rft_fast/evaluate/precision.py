"""Number formats of the forward pass: the dtype of the live weights, and how products are computed.

With "fp32" all matrix products and convolutions are plain float32, except attention on a GPU. There torch
selects the fastest kernel, and its memory-efficient one computes each float32 product as three TF32 products
(3xTF32 in CUTLASS): about as exact, but with other bits. No switch of torch affects that kernel. "ieee" is
"fp32" with torch's plain attention (``SDPBackend.MATH``): softmax(Q K^T) V by plain products. It is slower
and stores the whole attention matrix.

"bf16x3" splits each operand of a product with weights into two bfloat16 numbers, see
:mod:`rft_fast.evaluate.splitting`. On a GPU its tensor cores multiply these. On a CPU the same numbers are
multiplied in float32: the same errors, to measure them, but slower than "fp32".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import names
from .split import product
from .splitting import splitting

_BFLOAT16 = (8, 0)  # first compute capability with tensor cores for bfloat16

# Name -> dtype of the live weights and of the activations.
# ieee: attention by plain products, too. tf32: products of values rounded to 10 bits, on tensor cores.
# bf16x3: products of float32 values that are split into two of bfloat16.
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
    if precision == "bf16x3" and (reason := _no_split(device)):
        raise ValueError(
            f"precision 'bf16x3' needs products of bfloat16 with float32 sums, which {device} does not have: "
            f"{reason}; use fp32"
        )


def _no_split(device: torch.device) -> str:
    """Return why a device cannot compute split products; empty if it can, or if it is not there to ask."""
    if device.type == "cpu":
        return ""
    if device.type != "cuda":
        return "they are written for NVIDIA GPUs, and for CPUs"
    if not torch.cuda.is_available():
        return ""
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < _BFLOAT16:
        has, needed = (".".join(map(str, version)) for version in (capability, _BFLOAT16))
        return f"its compute capability is {has}, and they need {needed}"
    try:
        x = torch.ones(16, 16, device=device)
        right = bool((product(x, x) == 16).all())
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return "" if right else "its result is wrong"


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
    """Context manager: float32 products, TF32 for "tf32", split for "bf16x3"; float32 sums of products.

    For "ieee", attention consists of such products; for the others it uses the kernel that torch selects, see
    above. The switches are global, except that products are split in this thread only, and are restored on
    exit.
    """
    backends: Any = torch.backends
    tf32 = precision == "tf32"
    with ExitStack() as stack:

        def put(place: Any, name: str, value: object) -> None:
            stack.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, value)

        stack.enter_context(splitting(precision == "bf16x3"))
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
