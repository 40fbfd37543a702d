"""Properties of a graph, found by running it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from .tracing import Uncut, Watch, drop_dead


class _Probe(fx.Interpreter):
    """Runs a graph and records, for each node, its shape, the nodes that it changed in place, and the weights
    read.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, graph=graph)
        self.values: dict[fx.Node, _Value] = {}
        self.changes: dict[fx.Node, list[fx.Node]] = {}
        self.read: dict[fx.Node, list[Tensor]] = {}
        self._watch = Watch(root)
        self.itself: dict[fx.Node, fx.Node] = {}  # a node -> the one that it changed and returned

    def run_node(self, n: fx.Node) -> Any:
        before = {node: _versions(value) for node, value in self.env.items()}
        with self._watch:
            result = super().run_node(n)
        self.read[n], self._watch.seen = self._watch.seen, []
        changed = [node for node, was in before.items() if _versions(self.env[node]) != was]
        if changed:
            self.changes[n] = changed
            for node in changed:
                if self.env[node] is result:
                    self.itself[n] = node
        if isinstance(result, Tensor):
            self.values[n] = _Value(
                tuple(result.shape),
                result.is_contiguous() or result.nbytes >= result.untyped_storage().nbytes(),
            )
        return result


@dataclass(frozen=True)
class _Value:
    shape: tuple[int, ...]
    whole: bool  # not a part of a larger tensor


def _versions(value: Any) -> list[int]:
    if isinstance(value, Tensor):
        return [version(value)]
    if isinstance(value, (tuple, list, dict)):
        return [version(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return []


def version(tensor: Tensor) -> int:
    """Return a number that grows with every change in place; -1 for tensors of inference mode."""
    return -1 if tensor.is_inference() else tensor._version


_SHAPE_ATTRIBUTES = ("device", "dtype", "is_cuda", "itemsize", "layout", "ndim", "shape")
_SHAPE_METHODS = ("dim", "element_size", "is_floating_point", "ndimension", "numel", "size")


def _asks_shape(node: fx.Node) -> bool:
    """Whether a node depends only on the shape or type of a tensor, not on its values."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _SHAPE_ATTRIBUTES
    return node.op == "call_method" and node.target in _SHAPE_METHODS


@dataclass
class Facts:
    """Properties of a graph that has been run on batches of two sizes.

    Attributes:
        root: Holds the model.
        graph: The graph; unused nodes are removed.
        batches: The two batches.
        flow: The nodes that are activations, in order. All others derive from weights only, or from the input
            without weights (masks, sizes), and are computed again in every stage that needs them.
        reads: Node -> the tensors of the model that it depends on, other than through activations.
        values: Node -> shape in the larger batch.
        changes: Node -> the nodes that it changes in place.
        inputs: The node of the input.
    """

    root: nn.Module
    graph: fx.Graph
    batches: Sequence[Tensor]
    flow: list[fx.Node] = field(init=False)
    reads: dict[fx.Node, dict[int, Tensor]] = field(init=False)
    values: dict[fx.Node, _Value] = field(init=False)
    changes: dict[fx.Node, list[fx.Node]] = field(init=False)
    inputs: fx.Node = field(init=False)

    def __post_init__(self) -> None:
        graph = self.graph
        probe = self._probe(0)
        drop_dead(graph, set(probe.changes))
        (self.inputs,) = graph.find_nodes(op="placeholder")
        if any(self.inputs in changed for changed in probe.changes.values()):
            with graph.inserting_after(self.inputs):
                copy = graph.call_method("clone", (self.inputs,))
            self.inputs.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy)
            probe = self._probe(0)
        forced = self._in_place(probe)
        self._weights = {id(t) for t in (*self.root.parameters(), *self.root.buffers())}
        self.smaller, probe = probe.values, self._probe(1)
        self.values, self.changes, self._read = probe.values, probe.changes, probe.read
        self._sort(forced)

    def _probe(self, which: int) -> _Probe:
        probe = _Probe(self.root, self.graph)
        probe.run(self.batches[which].clone())
        return probe

    def _in_place(self, probe: _Probe) -> set[fx.Node]:
        """Replace later uses of a changed tensor by the change; return the nodes whose order is fixed."""
        order = {node: place for place, node in enumerate(self.graph.nodes)}
        forced: set[fx.Node] = set()
        for node, changed in probe.changes.items():
            if any(other.op == "get_attr" for other in changed):
                raise Uncut("its forward pass changes its own weights or buffers")
            if (same := probe.itself.get(node)) is not None:
                for user in [user for user in same.users if order[user] > order[node]]:
                    user.replace_input_with(same, node)
            if same is None or changed != [same] or list(same.users) != [node]:
                forced.update(changed, (node,))
        return forced

    def _sort(self, forced: set[fx.Node]) -> None:
        flow: dict[fx.Node, None] = {}
        from_input = {self.inputs}
        self.reads = {}
        for node in self.graph.nodes:
            above = node.all_input_nodes
            read = {id(tensor): tensor for tensor in self._own(node)}
            if not _asks_shape(node):
                for other in above:
                    read |= {} if other in flow else self.reads[other]
            self.reads[node] = read
            derived = any(other in from_input for other in above)
            learned = any(isinstance(tensor, nn.Parameter) for tensor in read.values())
            if node.op in ("placeholder", "output"):
                continue
            if any(other in flow for other in above) or node in forced or (derived and learned):
                flow[node] = None
            elif derived:
                from_input.add(node)
        self.flow = list(flow)

    def _own(self, node: fx.Node) -> list[Tensor]:
        """Return the weights that a node itself reads, including those that it does not name."""
        if node.op == "get_attr":
            value = attrgetter(str(node.target))(self.root)
            return [value] if id(value) in self._weights else []  # not constants of the forward pass
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            return [*module.parameters(), *module.buffers(), *self._read[node]]
        return self._read[node]

    def shape(self, node: Any) -> tuple[int, ...]:
        """Return the shape of a tensor in the larger batch; () for anything else."""
        return self.values[node].shape if node in self.values else ()

    def batch_dimension(self, node: fx.Node) -> int | None:
        """Return the only dimension with the size of the batch; None if there is none."""
        if node not in self.values or node not in self.smaller:
            return None
        small, large = self.smaller[node].shape, self.values[node].shape
        if len(small) != len(large):
            return None
        differ = [k for k in range(len(small)) if small[k] != large[k]]
        sizes = (len(self.batches[0]), len(self.batches[1]))
        fits = len(differ) == 1 and (small[differ[0]], large[differ[0]]) == sizes
        return differ[0] if fits else None
