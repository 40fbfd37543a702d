"""From a model to the graph of its forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from open_clip.transformer import text_global_pool
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Uncut(Exception):
    """A model cannot be cut; the message is the reason."""


class Root(nn.Module):
    """Holds the model while it is traced: fx stores constants in its root, which must not be the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


class _Tracer(fx.Tracer):
    """Traces into modules as deep as possible; a module that it cannot trace is called as a whole."""

    proxy_buffer_attributes = True  # otherwise results of buffers alone would be constants

    def __init__(self) -> None:
        # It calls torch.arange on a traced size, which fx cannot trace.
        super().__init__(autowrap_functions=(text_global_pool,))
        self.opaque: Exception | None = None  # why the first opaque module could not be traced

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        before, stack = set(self.graph.nodes), self.module_stack.copy()
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            self.opaque = self.opaque or error
        self.module_stack = stack
        for node in reversed(self.graph.nodes):
            # Parameters that were first used in the module may be used again.
            if node not in before and node.op != "get_attr":
                self.graph.erase_node(node)
        return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records which weights are used; refuses it under a tracer, which would make them constants."""

    def __init__(self, model: nn.Module, refuse: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._refuse = refuse
        self.seen: list[Tensor] = []
        self._weights: dict[int, list[Tensor]] = {}  # by storage
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.numel():
                self._weights.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self.seen += self._weights.get(value.untyped_storage().data_ptr(), [])
        if self.seen and self._refuse:
            self.seen.clear()
            raise TypeError("torch.fx does not see all computations with its weights")
        return func(*args, **(kwargs or {}))


def trace(root: Root) -> tuple[fx.Graph, Exception | None]:
    """Trace the model in ``root``.

    Returns:
        The graph, and the error that prevented tracing into a module, if any.

    Raises:
        Uncut: The forward pass does not return one tensor.
    """
    tracer = _Tracer()
    attributes = {module: dict(vars(module)) for module in root.model.modules()}
    try:
        with Watch(root, refuse=True):
            graph = tracer.trace(root)
    finally:
        for module, before in attributes.items():  # a forward pass may store results
            vars(module).clear()
            vars(module).update(before)
    if not isinstance(graph.output_node().args[0], fx.Node):
        raise Uncut("it does not return one tensor [n, ...]")
    return graph, tracer.opaque


def drop_dead(graph: fx.Graph, kept: set[fx.Node]) -> None:
    """Remove unused nodes from a graph, except those in ``kept``."""
    for node in reversed(graph.nodes):
        if not node.users and node not in kept and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
