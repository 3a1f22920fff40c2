"""Puts the nodes of a graph back into an order in which everything is computed before it is used.

Before: ``arange(n); ...; n = counts.sum().item()``     after a rewrite made ``arange`` read ``n``
After:  ``...; n = counts.sum().item(); arange(n)``     nodes that need not move do not move

Data flow is not the only order that counts: a node that writes into a tensor stays on its side of everything
that shares the tensor's memory, and nothing crosses the border of an autocast region.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

from earlytom_compile.passes.reasons import NotApplicable, describe

_IN_PLACE = frozenset(
    [
        "setitem",
        "iadd",
        "isub",
        "imul",
        "itruediv",
        "ifloordiv",
        "imod",
        "ipow",
        "iand",
        "ior",
        "ixor",
        "imatmul",
        "ilshift",
        "irshift",
    ]
)
_REGIONS = frozenset(
    [
        "_enter_autocast",
        "_exit_autocast",
        "_set_grad_enabled",
        "_enter_inference_mode",
        "_exit_inference_mode",
    ]
)


def stable_topological_sort(graph: Graph) -> None:
    """Reorders ``graph`` in place; raises NotApplicable, and changes nothing, if no order exists."""
    order = stable_order(graph)
    for node, following in zip(order, order[1:], strict=False):
        if node.next is not following:
            node.append(following)


def stable_order(graph: Graph, extra: Mapping[Node, Iterable[Node]] | None = None) -> list[Node]:
    """The nodes in an order that respects their arguments and ``extra``, what they will read after a rewrite.

    Among nodes that could come next, the one that was first stays first.
    """
    place = {node: i for i, node in enumerate(graph.nodes)}
    waits: dict[Node, set[Node]] = {node: set(node.all_input_nodes) for node in place}
    for node, read in (extra or {}).items():
        waits[node] |= set(read)
    for earlier, later in _fixed_pairs(graph):
        waits[later].add(earlier)
    followers: dict[Node, list[Node]] = defaultdict(list)
    for node, read in waits.items():
        for source in read:
            followers[source].append(node)
    missing = {node: len(read) for node, read in waits.items()}
    ready = [(i, node) for node, i in place.items() if not missing[node]]
    order: list[Node] = []
    while ready:
        node = heapq.heappop(ready)[1]
        order.append(node)
        for follower in followers[node]:
            missing[follower] -= 1
            if not missing[follower]:
                heapq.heappush(ready, (place[follower], follower))
    if len(order) < len(place):
        stuck = min((node for node in place if missing[node]), key=place.__getitem__)
        raise NotApplicable(
            f"{describe(stuck)} would need a size that is only known after it",
            "Compute what depends on the size of an axis after it is known, and without writing in place",
        )
    return order


def writes(node: Node) -> bool:
    """Whether a node changes one of its arguments."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    named = {key for key in ("out", "inplace") if node.kwargs.get(key) not in (None, False)}
    return node.op == "call_function" and (bool(named) or getattr(node.target, "__name__", "") in _IN_PLACE)


def eliminate_dead_code(graph: Graph, keep: Container[Node] = ()) -> None:
    """Erase what nobody reads and what changes nothing; torch.fx takes ``x.add_(y)`` for such a thing."""
    graph.eliminate_dead_code(lambda node: node in keep or writes(node) or node.is_impure())


def _fixed_pairs(graph: Graph) -> Iterable[tuple[Node, Node]]:
    """Pairs (earlier, later) whose order is not visible in their arguments."""
    nodes = list(graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    borders = [node for node in nodes if getattr(node.target, "__name__", "") in _REGIONS]
    for border in borders:
        for node in nodes:
            if node.op not in ("placeholder", "output") and node is not border:
                yield (node, border) if place[node] < place[border] else (border, node)
    writers = [node for node in nodes if writes(node)]
    memory = _memory(nodes) if writers else {}
    for writer in writers:
        for node in nodes:
            if node is not writer and memory[node] & memory[writer]:
                yield (node, writer) if place[node] < place[writer] else (writer, node)


def _memory(nodes: Iterable[Node]) -> dict[Node, set[Any]]:
    """The storages each node reads or returns, by the fake tensors of the trace; views share theirs."""
    own: dict[Node, set[Any]] = {}
    for node in nodes:
        example = node.meta.get("example_value")
        tensors = example if isinstance(example, (tuple, list)) else [example]
        own[node] = {
            t.untyped_storage()._cdata
            for t in tensors
            if isinstance(t, torch.Tensor) and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        }
        if "example_value" not in node.meta:
            own[node] = set().union(*(own[source] for source in node.all_input_nodes))
    return {node: own[node].union(*(own[source] for source in node.all_input_nodes)) for node in own}
