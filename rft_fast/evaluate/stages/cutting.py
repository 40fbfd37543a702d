"""Where a graph can be cut, and the stages that result."""

from __future__ import annotations

import linecache
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from types import MethodType
from typing import Any

from torch import Tensor, fx, nn

from .contract import Stage
from .tracing import Uncut
from .traits import Facts, version

_COUNT = count()


def build(facts: Facts, compact: bool) -> tuple[Stage, ...]:
    """Build the stages of a graph.

    Args:
        facts: The graph, and what is known about it.
        compact: Copy a boundary that is a part of a larger tensor.

    Raises:
        Uncut: The graph cannot be cut.
    """
    cuts = _cuts(facts)
    starts = [0, *(start for start, _ in cuts), len(facts.flow)]
    last = facts.graph.output_node().all_input_nodes[0]
    edges = [facts.inputs, *(boundary for _, boundary in cuts), last]
    found: list[Stage] = []
    x = inputs = facts.batches[0]
    for k in range(len(starts) - 1):
        part = _Part(facts, facts.flow[starts[k] : starts[k + 1]], edges[k], edges[k + 1], compact)
        stage = part.stage()
        before, kept = version(x), version(inputs)
        y = stage.run(x, inputs)
        if version(x) != before:
            stage = part.stage(copy=True)
            x = run(found, inputs)
            y = stage.run(x, inputs)
        if version(inputs) != kept and x is not inputs:
            raise Uncut("a later part of it changes its input in place")
        found.append(stage)
        x = y
    return tuple(found)


def _cuts(facts: Facts) -> list[tuple[int, fx.Node]]:
    """Return (position in the flow, the only activation there), directly before layers where possible."""
    order = {node: place for place, node in enumerate(facts.flow)}
    last_use = {node: max(order.get(u, len(order)) for u in node.users) for node in facts.flow if node.users}
    boundaries: dict[int, fx.Node] = {}
    alive: set[fx.Node] = set()
    for place, node in enumerate(facts.flow):
        alive = {other for other in alive if last_use[other] >= place}
        if len(alive) == 1:
            (only,) = alive
            if facts.batch_dimension(only) is not None:
                boundaries[place] = only
        if node in last_use:
            alive.add(node)
    readers = [
        place
        for place, node in enumerate(facts.flow)
        if any(tensor.is_floating_point() for tensor in facts.reads[node].values())
    ]
    found = []
    for before, reader in pairwise(readers):
        places = [place for place in range(before + 1, reader + 1) if place in boundaries]
        if places:
            found.append((places[-1], boundaries[places[-1]]))
    if not found and len(readers) > 1:
        raise Uncut("more than one tensor [n, ...] is passed on everywhere between its layers")
    return found


@dataclass(frozen=True, eq=False)
class _Part:
    """The part of a graph between two boundaries, which may be the input and the output."""

    facts: Facts
    flow: Sequence[fx.Node]
    start: fx.Node
    end: fx.Node
    compact: bool

    def stage(self, copy: bool = False) -> Stage:
        """Build the stage; ``copy``: its input is copied first, because it would be changed in place."""
        graph = fx.Graph()
        x, inputs = graph.placeholder("x"), graph.placeholder("inputs")
        facts = self.facts
        entry = graph.call_method("clone", (x,)) if copy else x
        known = {facts.inputs: inputs, self.start: self._turn(graph, entry, self.start)}

        def place(node: fx.Node) -> fx.Node:
            if node not in known:
                for other in node.all_input_nodes:
                    place(other)
                known[node] = graph.node_copy(node, known.__getitem__)
            return known[node]

        for node in self.flow:
            place(node)
        exit = place(self.end)
        if self.end is not facts.graph.output_node().all_input_nodes[0]:
            if self.compact and not facts.values[self.end].whole:
                exit = graph.call_method("contiguous", (exit,))
            exit = self._turn(graph, exit, self.end)
        graph.output(exit)
        tensors: dict[int, Tensor] = {}
        for node in self.flow:
            tensors |= facts.reads[node]
        return Stage(_function(graph, facts.root), tuple(tensors.values()), bool(inputs.users))

    def _turn(self, graph: fx.Graph, x: fx.Node, node: fx.Node) -> fx.Node:
        """Move the batch to the first dimension, or back."""
        dimension = self.facts.batch_dimension(node)
        return graph.call_method("transpose", (x, 0, dimension)) if dimension else x


def _function(graph: fx.Graph, root: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the graph as a function that looks the weights up in ``root`` at each call.

    A GraphModule would hold the weights itself, and so read buffers that the model has replaced.
    """
    code = graph.python_code("self")
    names: dict[str, Any] = dict(code.globals)
    # A method whose source can be looked up. torch.compile wraps all others in one common function, compiles
    # eight versions of it, and runs the rest uncompiled. Tracebacks show the line, too.
    file = f"<rft_fast stage {next(_COUNT)}>"
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(keepends=True), file)
    exec(compile(code.src, file, "exec"), names)
    method = MethodType(names["forward"], root)
    weakref.finalize(names["forward"], linecache.cache.pop, file, None)
    return method


def run(chain: Sequence[Stage], inputs: Tensor) -> Tensor:
    """Run a chain of stages on its input."""
    x = inputs
    for stage in chain:
        x = stage.run(x, inputs)
    return x
