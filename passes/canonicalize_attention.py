"""Rewrite every known spelling of attention as ``scaled_dot_product_attention``.

Before: ``w = softmax(matmul(q, k.transpose(-1, -2)) * scale (+ mask), dim=-1, dtype=float32).to(q.dtype)``
        ``out = matmul(dropout(w, 0.0), v)                                             # w: [T, H, S, S]``
After:  ``out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)     # no [T, H, S, S]``

This is how transformers' ``eager`` attention and LLaVA-NeXT's SigLIP are written; ``flex_attention`` and custom
operators are in the same table (attention_spellings.py). The finders that follow know one spelling of attention, and
the [T, H, S, S] tensors are the largest of the encoder. Left alone where somebody else reads the weights
(``output_attentions``), where dropout is active, or where an operator does more than attention does.
"""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from earlytom_compile.passes.attention_spellings import Attention, attention_of, heads_of
from earlytom_compile.passes.axes import op_name
from earlytom_compile.passes.graph_order import eliminate_dead_code
from earlytom_compile.passes.patterns import insert, shape_of, value_of


def canonicalize_attention(graph: Graph) -> int:
    """Rewrite every match in place; returns how many there were."""
    rewritten = 0
    for node in list(graph.nodes):
        if node.op == "call_function" or node.op == "call_method":
            found = attention_of(node)
            if found is not None and _is_read_for_its_values_only(node, found):
                rewritten += _rewrite(graph, node, found)
    if rewritten:
        _erase_masks(graph)
    return rewritten


def _erase_masks(graph: Graph) -> None:
    """Erase what made the block masks of ``flex_attention``, which nobody reads any more: functorch's ``vmap`` writes
    them in place, and writing is what no elimination of dead code dares to touch."""
    alive = set[Node]()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in alive:
            alive |= {node, *node.all_input_nodes}
    for node in reversed(graph.nodes):
        target = node.args[0] if op_name(node) == "setitem" else None
        if isinstance(target, Node) and _is_batched(target) and alive.isdisjoint(target.users):
            graph.erase_node(node)
    eliminate_dead_code(graph)


def _is_batched(node: Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)


def _is_read_for_its_values_only(node: Node, found: Attention) -> bool:
    """False where somebody reads what else the op returns, such as the sums of a softmax."""
    if found.result is None:
        return True
    return all(user.target is operator.getitem and user.args[1] == found.result for user in node.users)


def _rewrite(graph: Graph, node: Node, found: Attention) -> bool:
    heads = heads_of(found.query) if len(shape_of(found.query) or ()) == 3 else None
    if len(shape_of(found.query) or ()) == 3 and heads is None:
        return False
    with graph.inserting_before(node):
        operands = [found.query, found.key, found.value]
        if found.key_transposed:
            operands[1] = _moved(graph, "transpose", found.key, -2, -1)
        if heads is not None:
            operands = [_moved(graph, "unflatten", operand, 0, (-1, heads)) for operand in operands]
        if found.layout == "tokens first":
            operands = [_moved(graph, "transpose", operand, 1, 2) for operand in operands]
        mixed = insert(
            graph,
            F.scaled_dot_product_attention,
            *operands,
            attn_mask=found.mask,
            dropout_p=0.0,
            scale=_scale(graph, found.scale),
            is_causal=found.causal,
            like=value_of(node) if operands[0] is found.query and found.result is None else _result(operands),
        )
        mixed.meta = {**node.meta, **mixed.meta}
        result = mixed
        if heads is not None:
            result = _moved(graph, "flatten", mixed, 0, 1)
        if found.layout == "tokens first":
            result = _moved(graph, "transpose", mixed, 1, 2)
    for old in [node] if found.result is None else list(node.users):
        old.replace_all_uses_with(result)
    return True


def _scale(graph: Graph, scale: Any) -> Any:
    if isinstance(scale, tuple):
        return insert(graph, operator.truediv, 1.0, scale[1])
    return scale


def _moved(graph: Graph, method: str, node: Node, *args: Any) -> Node:
    return insert(graph, method, node, *args, like=getattr(value_of(node), method)(*args))


def _result(operands: list[Node]) -> torch.Tensor:
    """[..., L, Ev]: as the query, with the values' channels."""
    query, _, value = map(value_of, operands)
    return query.new_empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype)  # type: ignore[union-attr]
