"""Rewrite spelled-out attention as ``scaled_dot_product_attention``.

Before: ``w = softmax(matmul(q, k.transpose(-1, -2)) * scale (+ mask), dim=-1, dtype=float32).to(q.dtype)``
        ``out = matmul(dropout(w, 0.0), v)                                             # w: [T, H, S, S]``
After:  ``out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)     # no [T, H, S, S]``

This is how transformers' ``eager`` attention and LLaVA-NeXT's SigLIP are written. The finders that follow know one
spelling of attention, and the [T, H, S, S] tensors are the largest of the encoder. Left alone where somebody else
reads the weights (``output_attentions``) or where dropout is active.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch.fx import Graph, Node

from earlytom_compile.passes.patterns import CASTS, argument, insert, op_name, shape_of, value_of


@dataclass(frozen=True)
class _Attention:
    query: Node
    key_transposed: Node
    value: Node
    scale: float | Node
    mask: Node | None


def canonicalize_attention(graph: Graph) -> int:
    """Rewrite every match in place; returns how many there were."""
    rewritten = 0
    for node in list(graph.nodes):
        if op_name(node) != "matmul" or (found := _match(node)) is None:
            continue
        with graph.inserting_before(node):
            key = insert(graph, "transpose", found.key_transposed, -2, -1)
            fused = insert(
                graph,
                F.scaled_dot_product_attention,
                found.query,
                key,
                found.value,
                attn_mask=found.mask,
                dropout_p=0.0,
                scale=found.scale,
                is_causal=False,
                like=value_of(node),
            )
            value = value_of(found.key_transposed)
            key.meta["example_value"] = value.transpose(-2, -1)  # type: ignore[union-attr]
        fused.meta = {**node.meta, **fused.meta}
        node.replace_all_uses_with(fused)
        rewritten += 1
    if rewritten:
        graph.eliminate_dead_code()
    return rewritten


def _match(output: Node) -> _Attention | None:
    weights, value = output.args[:2] if len(output.args) == 2 else (None, None)
    softmax = _softmax_behind(weights)
    if softmax is None or not isinstance(value, Node):
        return None
    scores, mask = _split_mask(softmax.args[0])
    product, scale = _split_scale(scores)
    if op_name(product) != "matmul" or len(product.users) != 1:
        return None
    query, key_transposed = product.args[:2]
    if not (isinstance(query, Node) and isinstance(key_transposed, Node)) or len(shape_of(query) or ()) != 4:
        return None
    return _Attention(query, key_transposed, value, scale, mask)


def _softmax_behind(weights: Any) -> Node | None:
    """The softmax over keys that made ``weights``, if nobody else reads it and no dropout is active."""
    node = weights
    while isinstance(node, Node) and op_name(node) in CASTS and len(node.users) == 1:
        if op_name(node) == "dropout":
            active = argument(node, 1, "p", 0.5) and argument(node, 2, "training", True)
            if active:
                return None
        node = node.args[0]
    if op_name(node) != "softmax" or len(node.users) != 1:
        return None
    return node if argument(node, 1, "dim") in (-1, 3) else None


def _split_mask(scores: Any) -> tuple[Any, Node | None]:
    """``scores + mask`` -> (scores, mask): the mask is the side that is not computed from a matmul."""
    if op_name(scores) not in ("add", "iadd") or len(scores.users) != 1:
        return scores, None
    left, right = scores.args[:2]
    for product, mask in ((left, right), (right, left)):
        if isinstance(mask, Node) and op_name(_split_scale(product)[0]) == "matmul":
            return product, mask
    return scores, None


def _split_scale(scores: Any) -> tuple[Any, float | Node]:
    """``product * s`` or ``product / s`` -> (product, factor)."""
    name = op_name(scores)
    if name not in ("mul", "imul", "truediv", "div") or len(scores.users) != 1:
        return scores, 1.0
    left, right = scores.args[:2]
    if isinstance(left, (int, float)):
        left, right = right, left
        if name in ("truediv", "div"):
            return scores, 1.0
    if isinstance(right, (int, float)):
        return left, float(right) if name in ("mul", "imul") else 1.0 / right
    if isinstance(right, Node) and value_of(right) is not None and shape_of(right) is None:
        if name in ("mul", "imul"):
            return left, right
        with scores.graph.inserting_before(scores):
            return left, insert(scores.graph, operator.truediv, 1.0, right)
    return scores, 1.0
