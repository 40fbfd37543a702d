"""From a model to the graph of its forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from open_clip.transformer import text_global_pool
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Uncut(Exception):
    """Why a model cannot be cut."""


class Root(nn.Module):
    """Holds the model while it is traced: fx stows constants in its root, which must not be the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


class _Tracer(fx.Tracer):
    """Traces as deep into the modules as it can; one that it cannot look into is called as a whole."""

    proxy_buffer_attributes = True  # else what is computed from buffers alone would be a constant

    def __init__(self) -> None:
        # It calls torch.arange on a traced size, which fx cannot follow.
        super().__init__(autowrap_functions=(text_global_pool,))
        self.opaque: Exception | None = None  # why the first module was not looked into

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
            # Parameters that were met for the first time in there may be used again.
            if node not in before and node.op != "get_attr":
                self.graph.erase_node(node)
        return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees which weights are computed with; refused under a tracer, which would make constants of them."""

    def __init__(self, model: nn.Module, refuse: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._refuse = refuse
        self.seen: list[Tensor] = []
        self._weights: dict[int, list[Tensor]] = {}  # those that share memory together
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
            raise TypeError("weights are computed with out of the sight of torch.fx")
        return func(*args, **(kwargs or {}))


def trace(root: Root) -> tuple[fx.Graph, Exception | None]:
    """The graph of the model in ``root``, and why one of its modules is not looked into, if so."""
    tracer = _Tracer()
    attributes = {module: dict(vars(module)) for module in root.model.modules()}
    try:
        with Watch(root, refuse=True):
            graph = tracer.trace(root)
    finally:
        for module, before in attributes.items():  # a forward pass may keep what it computes
            vars(module).clear()
            vars(module).update(before)
    if not isinstance(graph.output_node().args[0], fx.Node):
        raise Uncut("it does not return one tensor [n, ...]")
    return graph, tracer.opaque


def drop_dead(graph: fx.Graph, kept: set[fx.Node]) -> None:
    for node in reversed(graph.nodes):
        if not node.users and node not in kept and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
