"""A model in stages, so that a change late in the model need not compute its beginning again.

Any model that ``torch.fx`` can trace is cut wherever all that goes on is one activation. Nothing here
knows an architecture: where a block ends follows from what the forward pass does.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from operator import attrgetter
from typing import Any

import torch
from open_clip.transformer import text_global_pool
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rft_fast.classifier import ZeroShotClassifier

TOLERANCE = 1e-4
"""How far logits may be from the forward pass's where only the pooled token is computed in the last
block, relative to the largest of them (float32; see :func:`stages`)."""


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


def stages(model: nn.Module, images: Tensor, exact: bool = False) -> Stages:
    """The model in stages that, run one after the other, compute what ``model(images)`` computes.

    images: an example of the model's input, float [2 or more, 3, h, w]; at most three are looked at.
    exact: the same bits as the forward pass on the same batch. Otherwise, where a transformer's last
        block is pooled by taking one token, only that token is computed as far as possible: the same
        numbers up to rounding (checked: within ``TOLERANCE`` of the largest output; for types of lower
        precision than float32, within eight of their steps).

    The model is traced as it is in eval mode, and the stages are meant for eval mode; its training flags
    stay as they were. That the stages compute what the model computes is checked on two and on three
    images. A model that cannot be cut is one stage, with a warning that says why.

    Raises what the model raises on these images, and ValueError for an example without a batch.
    """
    if not isinstance(images, Tensor) or images.ndim == 0 or len(images) == 0:
        got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"stages: expected an example batch [2, 3, h, w], got {got}")
    if type(model) is ZeroShotClassifier:
        prompts = model.prompts.flatten(0, 1)
        image = _chain(model.visual, images, exact)
        text = _chain(model.text, prompts, exact)
        return Stages(image, text, model.head, model.classify, (model.logit_scale,), prompts)
    return Stages(_chain(model, images, exact))


class _Uncut(Exception):
    """Why a model cannot be cut."""


class _Root(nn.Module):
    """Holds the model while it is traced: fx stows constants in its root, which must not be the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


def _chain(model: nn.Module, example: Tensor, exact: bool) -> tuple[Stage, ...]:
    with _evaluating(model), torch.inference_mode(False), torch.no_grad():
        # Copies: tensors of inference mode do not count their changes, which is looked at here.
        batches = [example[[i % len(example) for i in order]].clone() for order in ((0, 1), (0, 1, 0))]
        # Before anything else, so that a model that cannot take its input fails in its own words.
        expected = [model(batch.clone()) for batch in batches]
        try:
            return _cut_model(model, batches, expected, exact)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # forward passes may do anything, and so may tracing them
            words = str(error).strip().splitlines()
            reason = (words[0] if words else "") if isinstance(error, _Uncut) else _describe(error)
    warnings.warn(
        f"stages: this {type(model).__name__} is one stage, because {reason}; every score then takes a "
        "whole forward pass, and the numbers are the same",
        stacklevel=3,
    )
    return (Stage(lambda x, inputs: model(x)),)


def _describe(error: Exception) -> str:
    words = str(error).strip().splitlines()
    return f"torch.fx cannot trace it ({type(error).__name__}: {words[0] if words else ''})"


def _cut_model(
    model: nn.Module, batches: Sequence[Tensor], expected: Sequence[Any], exact: bool
) -> tuple[Stage, ...]:
    pairs = list(zip(batches, expected, strict=True))
    if not all(isinstance(y, Tensor) and y.shape[:1] == x.shape[:1] for x, y in pairs):
        raise _Uncut("it does not return one tensor [n, ...]")
    weights = [*model.parameters(), *model.buffers()]
    versions = [_version(weight) for weight in weights]
    graph, opaque = _trace(root := _Root(model))
    facts = _Facts(root, graph, batches)
    found = _build(facts, compact=False)
    if [_version(weight) for weight in weights] != versions:
        raise _Uncut("its forward pass changes its own weights or buffers")
    # The same bits are asked for first, whatever is done with them then: what is close may be wrong.
    if not all(_same(_run(found, x), y, 0) for x, y in pairs):
        raise _Uncut("its traced forward pass computes other numbers")
    if len(found) == 1 and opaque is not None:
        raise _Uncut(_describe(opaque))
    if exact:
        return found
    try:
        if _sink(facts):
            facts = _Facts(root, graph, batches)
        shorter = _build(facts, compact=True)
        if all(_same(_run(shorter, x), y, TOLERANCE) for x, y in pairs):
            return shorter
    except torch.OutOfMemoryError:
        raise
    except Exception:  # only a saving is lost
        pass
    return found


def _run(chain: Sequence[Stage], inputs: Tensor) -> Tensor:
    x = inputs
    for stage in chain:
        x = stage.run(x, inputs)
    return x


def _same(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    if tolerance and expected.is_floating_point():
        tolerance = max(tolerance, 8 * torch.finfo(expected.dtype).eps)
    got, expected = got.double(), expected.double()
    agree = (got == expected) | (got.isnan() & expected.isnan())
    if not tolerance:
        return bool(agree.all())
    size = expected[expected.isfinite()].abs().max() if expected.isfinite().any() else 0
    return bool((agree | ((got - expected).abs() <= tolerance * size)).all())


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


# --- tracing --------------------------------------------------------------------------------------


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


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
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


def _trace(root: _Root) -> tuple[fx.Graph, Exception | None]:
    """The graph of the model in ``root``, and why one of its modules is not looked into, if so."""
    tracer = _Tracer()
    attributes = {module: dict(vars(module)) for module in root.model.modules()}
    try:
        with _Watch(root, refuse=True):
            graph = tracer.trace(root)
    finally:
        for module, before in attributes.items():  # a forward pass may keep what it computes
            vars(module).clear()
            vars(module).update(before)
    if not isinstance(graph.output_node().args[0], fx.Node):
        raise _Uncut("it does not return one tensor [n, ...]")
    return graph, tracer.opaque


def _drop_dead(graph: fx.Graph, kept: set[fx.Node]) -> None:
    for node in reversed(graph.nodes):
        if not node.users and node not in kept and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


# --- what a graph does, seen by running it --------------------------------------------------------


class _Probe(fx.Interpreter):
    """Runs a graph and notes of every node its shape, what it changed in place, and which weights it read."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, graph=graph)
        self.values: dict[fx.Node, _Value] = {}
        self.changes: dict[fx.Node, list[fx.Node]] = {}
        self.read: dict[fx.Node, list[Tensor]] = {}
        self._watch = _Watch(root)
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
                result.is_floating_point(),
            )
        return result


@dataclass(frozen=True)
class _Value:
    shape: tuple[int, ...]
    whole: bool  # it is no part of a larger tensor
    floating: bool


def _versions(value: Any) -> list[int]:
    if isinstance(value, Tensor):
        return [_version(value)]
    if isinstance(value, (tuple, list, dict)):
        return [_version(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return []


_SHAPE_ATTRIBUTES = ("device", "dtype", "is_cuda", "itemsize", "layout", "ndim", "shape")
_SHAPE_METHODS = ("dim", "element_size", "is_floating_point", "ndimension", "numel", "size")


def _asks_shape(node: fx.Node) -> bool:
    """Whether a node knows a tensor's shape or type, and not its values."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _SHAPE_ATTRIBUTES
    return node.op == "call_method" and node.target in _SHAPE_METHODS


@dataclass
class _Facts:
    """What is known about a graph that has been run on batches of two sizes.

    flow: the nodes that are activations, in order. All others derive from weights alone, or from the
    input without weights (masks, sizes), and are computed again in every stage that needs them.
    """

    root: nn.Module
    graph: fx.Graph
    batches: Sequence[Tensor]
    flow: list[fx.Node] = field(init=False)
    reads: dict[fx.Node, dict[int, Tensor]] = field(init=False)  # tensors behind a node that is no flow
    values: dict[fx.Node, _Value] = field(init=False)
    changes: dict[fx.Node, list[fx.Node]] = field(init=False)
    inputs: fx.Node = field(init=False)

    def __post_init__(self) -> None:
        graph = self.graph
        probe = self._probe(0)
        _drop_dead(graph, set(probe.changes))
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
        """Makes uses of a changed tensor uses of the change; returns what must stay in its order."""
        order = {node: place for place, node in enumerate(self.graph.nodes)}
        forced: set[fx.Node] = set()
        for node, changed in probe.changes.items():
            if any(other.op == "get_attr" for other in changed):
                raise _Uncut("its forward pass changes its own weights or buffers")
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
        """The weights that a node itself reads; also such as it was seen to read and does not name."""
        if node.op == "get_attr":
            value = attrgetter(str(node.target))(self.root)
            return [value] if id(value) in self._weights else []  # not constants of the forward pass
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            return [*module.parameters(), *module.buffers(), *self._read[node]]
        return self._read[node]

    def shape(self, node: Any) -> tuple[int, ...]:
        """The shape of a tensor in the larger batch; () for anything else."""
        return self.values[node].shape if node in self.values else ()

    def batch_dimension(self, node: fx.Node) -> int | None:
        """The one dimension that is as long as the batch, if there is one."""
        if node not in self.values or node not in self.smaller:
            return None
        small, large = self.smaller[node].shape, self.values[node].shape
        if len(small) != len(large):
            return None
        differ = [k for k in range(len(small)) if small[k] != large[k]]
        sizes = (len(self.batches[0]), len(self.batches[1]))
        fits = len(differ) == 1 and (small[differ[0]], large[differ[0]]) == sizes
        return differ[0] if fits else None


# --- cutting --------------------------------------------------------------------------------------


def _build(facts: _Facts, compact: bool) -> tuple[Stage, ...]:
    """The stages of a graph. compact: a boundary that is part of a larger tensor is copied out of it."""
    cuts = _cuts(facts)
    starts = [0, *(start for start, _ in cuts), len(facts.flow)]
    last = facts.graph.output_node().all_input_nodes[0]
    edges = [facts.inputs, *(boundary for _, boundary in cuts), last]
    found: list[Stage] = []
    x = inputs = facts.batches[0]
    for k in range(len(starts) - 1):
        part = _Part(facts, facts.flow[starts[k] : starts[k + 1]], edges[k], edges[k + 1], compact)
        stage = part.stage()
        before, kept = _version(x), _version(inputs)
        y = stage.run(x, inputs)
        if _version(x) != before:
            stage = part.stage(copy=True)
            x = _run(found, inputs)
            y = stage.run(x, inputs)
        if _version(inputs) != kept and x is not inputs:
            raise _Uncut("a late part of it changes its input")
        found.append(stage)
        x = y
    return tuple(found)


def _cuts(facts: _Facts) -> list[tuple[int, fx.Node]]:
    """(place in the flow, the activation that goes on there): right before layers, where possible."""
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
        raise _Uncut("nowhere between its layers is one tensor [n, ...] all that goes on")
    return found


@dataclass(frozen=True, eq=False)
class _Part:
    """The part of a graph between two boundaries, which may be the input and the output."""

    facts: _Facts
    flow: Sequence[fx.Node]
    start: fx.Node
    end: fx.Node
    compact: bool

    def stage(self, copy: bool = False) -> Stage:
        """copy: what comes in is copied first, because it would be changed in place."""
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
        """The batch as the first dimension, or back to where the model has it."""
        dimension = self.facts.batch_dimension(node)
        return graph.call_method("transpose", (x, 0, dimension)) if dimension else x


def _function(graph: fx.Graph, root: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The graph as a function that looks the weights up in ``root`` whenever it is called.

    A GraphModule would hold them itself, and go on reading buffers that the model has replaced since.
    """
    code = graph.python_code("self")
    names: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, "<stage>", "exec"), names)
    return partial(names["forward"], root)


# --- one token instead of all ---------------------------------------------------------------------

_ELEMENTWISE_FUNCTIONS = (
    operator.add,
    operator.mul,
    operator.sub,
    operator.truediv,
    torch.add,
    torch.mul,
    torch.sigmoid,
    torch.tanh,
    F.gelu,
    F.relu,
    F.sigmoid,
    F.silu,
    F.tanh,
)
_ELEMENTWISE_METHODS = ("add", "contiguous", "float", "mul", "sigmoid", "tanh", "to", "type")
_ELEMENTWISE_MODULES = (nn.Dropout, nn.GELU, nn.Identity, nn.ReLU, nn.SiLU, nn.Sigmoid, nn.Tanh)


def _sink(facts: _Facts) -> bool:
    """Where a graph goes on with one token of many, selects it as early as possible, in place.

    ``x[:, 0]`` of what a token-wise operation returns is that operation on one token of its operands,
    and attention for one query reads the other tokens, but computes no keys and values of theirs
    (:func:`_attend`). So a transformer's last block is computed for the pooled token alone.

    Returns whether anything was changed.
    """
    if facts.changes:  # selections are views, which must not see changes of what they are part of
        return False
    found = False
    for node in facts.flow:
        if node.target is operator.getitem and (token := _selected(node)) is not None:
            source = node.args[0]
            if isinstance(source, fx.Node) and len(facts.shape(source)) == 3:
                found = _sink_one(facts, node, source, token) or found
    return found


def _selected(node: fx.Node) -> int | None:
    """The token that x[:, token] or x[:, token, :] takes."""
    index: Any = node.args[1]
    if not isinstance(index, tuple) or len(index) not in (2, 3):
        return None
    batch, token, *rest = index
    every = slice(None)
    return token if type(token) is int and batch == every and rest in ([], [every]) else None


def _sink_one(facts: _Facts, chosen: fx.Node, source: fx.Node, token: int) -> bool:
    graph, root = facts.graph, facts.root
    tokens = facts.shape(source)[:2]
    thin: dict[fx.Node, fx.Node | None] = {}  # of which one token is needed; its attention module's call
    for node in reversed(facts.flow):
        users = [user for user in node.users if not _asks_type(user)]
        if not users or any(user is not chosen and user not in thin for user in users):
            continue
        if (attention := _self_attention(facts, node)) is not None:
            thin[node] = attention
        elif _is_tokenwise(facts, node, tokens):
            thin[node] = None
    if source not in thin or not any(call or _is_linear(root, node) for node, call in thin.items()):
        return False
    narrow: dict[fx.Node, fx.Node] = {}

    def one(node: fx.Node) -> fx.Node:
        if node not in narrow and facts.shape(node)[:2] == tokens and len(facts.shape(node)) == 3:
            # Of one length, so that the dimension stays.
            index = (slice(None), slice(token, token + 1 or None))
            narrow[node] = graph.call_function(operator.getitem, (node, index))
        return narrow.get(node, node)

    for node in reversed(thin):
        with graph.inserting_before(node):
            if (call := thin[node]) is None:
                narrow[node] = graph.node_copy(node, one)
            else:
                x: Any = call.args[0]
                module: Any = root.get_submodule(str(call.target))
                names = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
                given = [
                    None if attrgetter(name)(module) is None else _get(graph, f"{call.target}.{name}")
                    for name in names
                ]
                narrow[node] = graph.call_function(_attend, (one(x), x, *given, module.num_heads))
        for user in [user for user in node.users if _asks_type(user)]:
            user.replace_input_with(node, narrow[node])
    chosen.args = (narrow[source], (slice(None), 0))
    _drop_dead(graph, set())
    return True


def _attend(
    query: Tensor,
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    heads: int,
) -> Tensor:
    """Self-attention for one token: query [n, 1, d] and x [n, tokens, d] to [n, 1, d].

    What ``nn.MultiheadAttention`` computes, but no key and no value is made: q . (W x) is (q W) . x, and
    the mean of W x is W times the mean of x, so that weights meet one vector for each head.
    """
    wq, wk, wv = in_weight.view(3, heads, -1, in_weight.shape[1])
    bq, bk, bv = in_weight.new_zeros(3, 1, 1) if in_bias is None else in_bias.view(3, heads, -1)
    q = torch.einsum("nd,hed->nhe", query.squeeze(1), wq) + bq
    scores = torch.einsum("nhe,hed->nhd", q, wk) @ x.mT + (q * bk).sum(-1, keepdim=True)
    mean = (scores * q.shape[-1] ** -0.5).softmax(-1) @ x
    values = torch.einsum("nhd,hed->nhe", mean, wv) + bv
    return F.linear(values.flatten(1).unsqueeze(1), out_weight, out_bias)


def _get(graph: fx.Graph, name: str) -> fx.Node:
    # Graph.get_attr would look for it in the graph's module, which it has none.
    return graph.create_node("get_attr", name)


def _asks_type(node: fx.Node) -> bool:
    return node.target is getattr and node.args[1] in ("device", "dtype")


def _is_linear(root: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(root.get_submodule(str(node.target))) is nn.Linear
    return node.target is F.linear


def _self_attention(facts: _Facts, node: fx.Node) -> fx.Node | None:
    """The call of ``nn.MultiheadAttention`` whose result this is, if it is x to itself without a mask."""
    call = node.args[0] if node.target is operator.getitem and node.args[1] == 0 else None
    if not isinstance(call, fx.Node) or call.op != "call_module" or len(call.users) != 1:
        return None
    module = facts.root.get_submodule(str(call.target))
    if type(module) is not nn.MultiheadAttention or not module.batch_first:
        return None
    plain = module.in_proj_weight is not None and module.bias_k is None and not module.add_zero_attn
    given = {name: value for name, value in call.kwargs.items() if value is not None}
    same = len(call.args) == 3 and call.args[0] is call.args[1] is call.args[2]
    return call if plain and same and given == {"need_weights": False} else None


def _is_tokenwise(facts: _Facts, node: fx.Node, tokens: tuple[int, ...]) -> bool:
    """Whether each token [n, 1, ...] of the result depends on that token of the operands alone."""

    def has_tokens(operand: Any) -> bool:
        shape = facts.shape(operand)
        return len(shape) == 3 and shape[:2] == tokens

    if not has_tokens(node):
        return False
    module: Any = facts.root.get_submodule(str(node.target)) if node.op == "call_module" else None
    over_last = (
        _is_linear(facts.root, node)
        or (type(module) is nn.LayerNorm and len(module.normalized_shape) == 1)
        or (node.target is F.layer_norm and len(tree_leaves(node.args[1:2])) == 1)
    )
    if over_last:
        first, *others = node.all_input_nodes
        return has_tokens(first) and not any(has_tokens(other) for other in others)
    if (
        type(module) in _ELEMENTWISE_MODULES
        or (node.op == "call_function" and node.target in _ELEMENTWISE_FUNCTIONS)
        or (node.op == "call_method" and node.target in _ELEMENTWISE_METHODS)
    ):
        # Others must be the same for all tokens: numbers, [d], [1, d], [n, 1, d].
        return all(
            has_tokens(other) or len(facts.shape(other)) < 2 or facts.shape(other)[-2] == 1
            for other in node.all_input_nodes
        )
    return False
