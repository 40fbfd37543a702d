"""``Stage`` and ``Stages``: a model as chains of functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Stage:
    """A part of a model that runs after the stages before it.

    Attributes:
        run: (x, inputs) -> activations after this stage. x: activations before it, [n, ...]; for the first
            stage, ``inputs`` itself. inputs: input of the first stage. It changes neither, keeps no state,
            reads the present weights, and may run in several threads at once.
        tensors: The parameters and buffers that it reads. Those that no stage names belong to the first one.
        reads_inputs: Whether it reads ``inputs`` besides x.
    """

    run: Callable[[Tensor, Tensor], Tensor]
    tensors: tuple[Tensor, ...] = ()
    reads_inputs: bool = False


@dataclass(frozen=True, eq=False)
class Stages:
    """A model as chains of stages. Each boundary is one tensor whose first dimension is the batch.

    Attributes:
        image: From float images [n, 3, h, w] to logits [n, classes], or, with a text chain, to image features
            [n, d].
        text: From prompts, int64 [p, context], to text features [p, d]. Empty: the head is fixed.
        head: Text features [p, d] of all prompts -> weights of the head [classes, d].
        join: (image features [n, d], weights of the head) -> logits [n, classes].
        joined: The tensors that ``head`` and ``join`` read.
        prompts: int64 [p, context], on the device of the model.
    """

    image: tuple[Stage, ...]
    text: tuple[Stage, ...] = ()
    head: Callable[[Tensor], Tensor] | None = None
    join: Callable[[Tensor, Tensor], Tensor] | None = None
    joined: tuple[Tensor, ...] = ()
    prompts: Tensor | None = None
