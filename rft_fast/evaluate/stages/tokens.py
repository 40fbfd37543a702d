"""Computes one token instead of all, where a graph continues with one."""

from __future__ import annotations

import operator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._pytree import tree_leaves

from .tracing import drop_dead
from .traits import Facts

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


def sink(facts: Facts) -> bool:
    """Where a graph continues with one of many tokens, select it as early as possible, in place.

    For a token-wise operation, ``x[:, 0]`` of its result is the operation on one token of its operands.
    Attention for one query reads the other tokens but computes none of their keys and values
    (:func:`attend`). So the last block of a transformer is computed for the pooled token only.

    Args:
        facts: The graph, which is changed, and what is known about it.

    Returns:
        Whether the graph was changed.
    """
    if facts.changes:  # selections are views, whose base must not change
        return False
    found = False
    for node in facts.flow:
        if node.target is operator.getitem and (token := _selected(node)) is not None:
            source = node.args[0]
            if isinstance(source, fx.Node) and len(facts.shape(source)) == 3:
                found = _sink_one(facts, node, source, token) or found
    return found


def _selected(node: fx.Node) -> int | None:
    """Return the token that x[:, token] or x[:, token, :] selects."""
    index: Any = node.args[1]
    if not isinstance(index, tuple) or len(index) not in (2, 3):
        return None
    batch, token, *rest = index
    every = slice(None)
    return token if type(token) is int and batch == every and rest in ([], [every]) else None


def _sink_one(facts: Facts, chosen: fx.Node, source: fx.Node, token: int) -> bool:
    graph, root = facts.graph, facts.root
    tokens = facts.shape(source)[:2]
    thin: dict[
        fx.Node, fx.Node | None
    ] = {}  # nodes of which one token is needed -> call of the attention module
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
            # A slice of length one keeps the dimension.
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
                narrow[node] = graph.call_function(attend, (one(x), x, *given, module.num_heads))
        for user in [user for user in node.users if _asks_type(user)]:
            user.replace_input_with(node, narrow[node])
    chosen.args = (narrow[source], (slice(None), 0))
    drop_dead(graph, set())
    return True


def attend(
    query: Tensor,
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    heads: int,
) -> Tensor:
    """Self-attention of one token.

    The result is that of ``nn.MultiheadAttention``, without keys and values: q . (W x) is (q W) . x, and the
    mean of W x is W times the mean of x, so the weights are applied to one vector per head.

    Args:
        query: The token, [n, 1, d].
        x: All tokens, [n, tokens, d].
        in_weight: ``in_proj_weight`` of the module, [3 d, d].
        in_bias: ``in_proj_bias``, [3 d], or None.
        out_weight: ``out_proj.weight``, [d, d].
        out_bias: ``out_proj.bias``, [d], or None.
        heads: Number of heads.

    Returns:
        [n, 1, d].
    """
    tensors = (query, x, in_weight, in_bias, out_weight, out_bias)
    if has_torch_function(tensors):  # see rft_fast.evaluate.flips
        mixed: Tensor = handle_torch_function(attend, tensors, *tensors, heads)
        return mixed
    wq, wk, wv = in_weight.view(3, heads, -1, in_weight.shape[1])
    bq, bk, bv = in_weight.new_zeros(3, 1, 1) if in_bias is None else in_bias.view(3, heads, -1)
    q = torch.einsum("nd,hed->nhe", query.squeeze(1), wq) + bq
    scores = torch.einsum("nhe,hed->nhd", q, wk) @ x.mT + (q * bk).sum(-1, keepdim=True)
    mean = (scores * q.shape[-1] ** -0.5).softmax(-1) @ x
    values = torch.einsum("nhd,hed->nhe", mean, wv) + bv
    return F.linear(values.flatten(1).unsqueeze(1), out_weight, out_bias)


def _get(graph: fx.Graph, name: str) -> fx.Node:
    # Graph.get_attr would look it up in the graph's module, and this graph has none.
    return graph.create_node("get_attr", name)


def _asks_type(node: fx.Node) -> bool:
    return node.target is getattr and node.args[1] in ("device", "dtype")


def _is_linear(root: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(root.get_submodule(str(node.target))) is nn.Linear
    return node.target is F.linear


def _self_attention(facts: Facts, node: fx.Node) -> fx.Node | None:
    """Return the call of ``nn.MultiheadAttention`` behind a node, if it is unmasked self-attention."""
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


def _is_tokenwise(facts: Facts, node: fx.Node, tokens: tuple[int, ...]) -> bool:
    """Whether each token [n, 1, ...] of the result depends only on that token of the operands."""

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
        # Other operands must be the same for all tokens: numbers, [d], [1, d], [n, 1, d].
        return all(
            has_tokens(other) or len(facts.shape(other)) < 2 or facts.shape(other)[-2] == 1
            for other in node.all_input_nodes
        )
    return False
