"""What stages are to those that run them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Stage:
    """A part of a model that runs after the stages before it.

    run: (x, inputs) -> the activations after this stage. x: those before it, [n, ...]; for the first
        stage ``inputs`` itself. inputs: what the first stage got. Changes neither, keeps no state, and
        may run in several threads at once. Reads the weights as they are when it runs.
    tensors: the parameters and buffers that it reads. What no stage names belongs to the first.
    reads_inputs: whether it looks at ``inputs`` beside x.
    """

    run: Callable[[Tensor, Tensor], Tensor]
    tensors: tuple[Tensor, ...] = ()
    reads_inputs: bool = False


@dataclass(frozen=True, eq=False)
class Stages:
    """A model as chains of stages. Every boundary is one tensor with the batch as its first dimension.

    image: float images [n, 3, h, w] -> ... -> logits [n, classes], or, where there is a text chain, to
        image features [n, d].
    text: prompts int64 [p, context] -> ... -> text features [p, d]. Empty: the head is fixed.
    head: text features [p, d], of all prompts -> weights of the head [classes, d].
    join: (image features [n, d], weights of the head) -> logits [n, classes].
    joined: the tensors that ``head`` and ``join`` read.
    prompts: int64 [p, context], on the model's device.
    """

    image: tuple[Stage, ...]
    text: tuple[Stage, ...] = ()
    head: Callable[[Tensor], Tensor] | None = None
    join: Callable[[Tensor, Tensor], Tensor] | None = None
    joined: tuple[Tensor, ...] = ()
    prompts: Tensor | None = None
