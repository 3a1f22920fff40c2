"""What is written into a tensor that nobody else holds is a result like any other.

Before: ``r = eye.repeat(4, 1, 1); r.add_(q); bmm(x, r)``      and ``h = linear(x); h += y``
After:  ``r = eye.repeat(4, 1, 1); s = r.add(q); bmm(x, s)``   and ``h = linear(x); s = h + y``

So the data flow shows what is computed from what, and a residual stream that is added to in place is a sum.
"""

import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from earlytom_compile.passes.graph_order import writes
from earlytom_compile.passes.patterns import memory_of, op_name, value_of

_OPERATORS = {"iadd": operator.add, "isub": operator.sub, "imul": operator.mul, "itruediv": operator.truediv}


def canonicalize_writes(graph: Graph) -> int:
    """Rewrite every match in place; returns how many there were."""
    nodes = list(graph.nodes)
    writers = [node for node in nodes if writes(node)]
    if not writers:
        return 0
    holders: dict[int | None, list[Node]] = defaultdict(list)
    for node in nodes:
        if not writes(node):
            holders[memory_of(node)].append(node)
    rewritten = 0
    for node in writers:
        target = _without_writing(node)
        if target is None or not _is_held_once(node, holders):
            continue
        written = node.args[0]
        assert isinstance(written, Node)
        node.target = target
        for reader in [user for user in written.users if user > node]:
            reader.replace_input_with(written, node)
        rewritten += 1
    return rewritten


def _without_writing(node: Node) -> Callable[..., Any] | str | None:
    """The same function as one that returns its result; None if there is none."""
    if node.op == "call_function":
        return _OPERATORS.get(op_name(node))
    name = str(node.target).removesuffix("_")
    return name if hasattr(torch.Tensor, name) else None


def _is_held_once(node: Node, holders: Mapping[int | None, Sequence[Node]]) -> bool:
    """Whether nothing but the tensor that is written to has its memory, and its dtype would be the result's too."""
    written, result = node.args[0], value_of(node)
    if not isinstance(written, Node) or not isinstance(result, torch.Tensor) or memory_of(written) is None:
        return False
    (holder, *others) = holders[memory_of(written)] or [written]
    values = [value_of(read) for read in node.all_input_nodes]
    return (
        not others
        and holder.op.startswith("call")
        and all(x.dtype == result.dtype for x in values if isinstance(x, torch.Tensor) and x.is_floating_point())
    )
