"""Which node of a graph is computed from which, and what lies between two of them.

    flow = Dataflow(graph)
    flow.is_from(add, hidden)            # whether the numbers of `add` depend on those of `hidden`
    flow.between(hidden, query)          # [norm, linear, view, transpose]: what makes `query` of `hidden`

Only numbers count: who reads nothing but the size or the dtype of a tensor is not computed from it.
"""

from collections.abc import Iterable

import torch
from torch.fx import Graph, Node

from earlytom_compile.passes.patterns import op_name


class Dataflow:
    """The data flow of a graph as it is now; edits are not followed."""

    def __init__(self, graph: Graph) -> None:
        self.nodes = list(graph.nodes)
        self._place = {node: i for i, node in enumerate(self.nodes)}
        # Bit j of number i: node i is computed from node j, or is node j.
        self._sources: list[int] = []
        for i, node in enumerate(self.nodes):
            sources = 1 << i
            if _has_numbers(node):
                # weight.to(x) is not computed from x.
                for read in node.all_input_nodes[:1] if op_name(node) in ("to", "type_as") else node.all_input_nodes:
                    sources |= self._sources[self._place[read]] if _has_numbers(read) else 0
            self._sources.append(sources)

    def is_from(self, node: Node, source: Node) -> bool:
        """Whether ``node`` is computed from ``source``, or is it."""
        return bool(self._sources[self._place[node]] >> self._place[source] & 1)

    def before(self, *nodes: Node) -> list[Node]:
        """All that one of ``nodes`` is computed from, themselves included, in graph order."""
        return self._listed(self._union(nodes))

    def behind(self, source: Node) -> list[Node]:
        """All that is computed from ``source``, in graph order."""
        place = self._place[source]
        return [node for i, node in enumerate(self.nodes) if i > place and self._sources[i] >> place & 1]

    def between(self, source: Node, *targets: Node) -> list[Node]:
        """What makes ``targets`` of ``source``, in graph order: the targets included, the source not."""
        place, wanted = self._place[source], self._union(targets)
        return [
            node
            for node in self._listed(wanted)
            if node is not source and self._sources[self._place[node]] >> place & 1
        ]

    def _union(self, nodes: Iterable[Node]) -> int:
        union = 0
        for node in nodes:
            union |= self._sources[self._place[node]]
        return union

    def _listed(self, wanted: int) -> list[Node]:
        found = []
        while wanted:
            lowest = wanted & -wanted
            found.append(self.nodes[lowest.bit_length() - 1])
            wanted ^= lowest
        return found


def _has_numbers(node: Node) -> bool:
    """Whether what a node makes is computed from the numbers it reads: a tensor is, and what is read out of one, but a
    size is not."""
    value = node.meta.get("example_value")
    if node.target == "item" or isinstance(value, torch.SymFloat):
        return True
    return value is None or _holds_tensor(value)


def _holds_tensor(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_holds_tensor, value))
    return isinstance(value, torch.Tensor)
