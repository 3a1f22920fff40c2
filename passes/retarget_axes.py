"""Makes every number that means an axis follow the axis, after a pass has changed its size.

Before: ``h = merge_frames(h, ...)  # 8 frames in, n out``
        ``h.view(8, 36, -1, 8)``                  ``h.reshape(1, 72, -1)``
After:  ``h.view(sym_size(h, 0), 36, -1, 8)``     ``h.reshape(1, sym_size(h, 0) * 9, -1)``

Only the first 8 above was the number of frames; the head size 8 stays. Which is which comes from ``AxisMap``.
All is decided before anything is edited: a graph is rewritten completely, or left as it was with a reason.
"""

from __future__ import annotations

import logging
import operator
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from earlytom_compile.passes.axes import AxisMap
from earlytom_compile.passes.axis_call import Path, Site
from earlytom_compile.passes.graph_order import stable_order, stable_topological_sort, writes
from earlytom_compile.passes.new_sizes import Combined, NewSizes, Plan, ResizedAxis, SizeOf

log = logging.getLogger(__name__)


def retarget_axes(
    graph_module: GraphModule,
    axes: Sequence[ResizedAxis],
    wanted: Iterable[Node] = (),
    as_before: Container[Node] = (),
) -> int:
    """Rewrites every argument that spells the size of a changed axis, or of one computed from it.

    Pass all changed axes in one call. Dead code, which nobody keeps right, is removed; the graph is sorted again
    (a size may be needed before the place where it is computed), linted and recompiled. ``wanted`` are nodes that
    somebody is going to read although nobody does yet; ``as_before`` are nodes to which a number that could be the old
    size of an axis means the old size.

    Returns:
        The number of rewritten arguments.

    Raises:
        NotApplicable: some op stands in the way; the graph is unchanged.
    """
    sizes_read = {axis.size for axis in axes if isinstance(axis.size, Node)}
    dead = _dead_nodes(graph_module, {*sizes_read, *wanted})
    axes = [axis for axis in axes if axis.node not in dead]
    starts: dict[Node, list[int]] = defaultdict(list)
    for axis in axes:
        starts[axis.node].append(axis.dim)
    inferred = AxisMap.infer(graph_module, starts, skip=dead)
    sizes = NewSizes(inferred, axes, as_before)
    if not sizes.changed:
        return 0
    sizes.check()
    plan = [(site, sizes.plan(site.dim, site.node)) for site in sizes.sites()]
    stable_order(graph_module.graph, _reads(plan))
    _Rewriter(graph_module).apply(plan, dead)
    log.debug("%d sizes follow %s", len(plan), ", ".join(sorted({axis.name for axis in axes})))
    return len(plan)


def _dead_nodes(graph_module: GraphModule, wanted: set[Node]) -> set[Node]:
    """Nodes that reach neither the output, nor a side effect, nor ``wanted``: nobody would notice if they failed."""
    alive = set(wanted)
    for node in reversed(graph_module.graph.nodes):
        effect = not node.users and node.meta.get("example_value") is None
        if node.op in ("placeholder", "output") or effect or writes(node) or node in alive:
            alive |= {node, *node.all_input_nodes}
    return {node for node in graph_module.graph.nodes if node not in alive}


def _nodes_of(plan: Plan) -> set[Node]:
    if isinstance(plan, Combined):
        return set().union(*map(_nodes_of, plan.parts))
    return {plan} if isinstance(plan, Node) else {plan.node} if isinstance(plan, SizeOf) else set()


def _reads(plans: Sequence[tuple[Site, Plan]]) -> dict[Node, set[Node]]:
    reads: dict[Node, set[Node]] = defaultdict(set)
    for site, plan in plans:
        reads[site.node] |= _nodes_of(plan)
    return reads


class _Rewriter:
    """Carries out a plan that is known to work."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.made: dict[Plan, Node] = {}

    def apply(self, plans: Sequence[tuple[Site, Plan]], dead: set[Node]) -> None:
        for node in reversed([node for node in self.graph.nodes if node in dead]):
            self.graph.erase_node(node)
        for site, plan in plans:
            with self.graph.inserting_before(site.node):
                size = self._made(plan, site.node)
            args, kwargs = _put((site.node.args, dict(site.node.kwargs)), site.path, size)
            site.node.args, site.node.kwargs = args, kwargs
        stable_topological_sort(self.graph)
        self.graph.lint()
        self.graph_module.recompile()

    def _made(self, plan: Plan, user: Node) -> int | Node:
        """The node that computes a size; each is computed once."""
        if isinstance(plan, (int, Node)):
            return plan
        if plan not in self.made:
            self.made[plan] = self._read(plan, user) if isinstance(plan, SizeOf) else self._computed(plan, user)
        return self.made[plan]

    def _read(self, plan: SizeOf, user: Node) -> Node:
        node = self.graph.call_function(torch.ops.aten.sym_size.int, (plan.node, plan.dim))
        return _described(node, user, plan.node.meta["example_value"].shape[plan.dim])

    def _computed(self, plan: Combined, user: Node) -> Node:
        function = operator.mul if plan.kind == "product" else operator.add
        parts = [self._made(part, user) for part in plan.parts]
        total = parts[0]
        for part in parts[1:]:
            node = self.graph.call_function(function, (total, part))
            values = [x.meta.get("example_value") if isinstance(x, Node) else x for x in (total, part)]
            total = _described(node, user, None if None in values else function(*values))
        assert isinstance(total, Node)
        return total


def _described(node: Node, user: Node, value: Any) -> Node:
    node.meta = {key: user.meta[key] for key in ("nn_module_stack", "stack_trace") if key in user.meta}
    if value is not None:
        node.meta["example_value"] = value
    return node


def _put(arguments: tuple[tuple[Any, ...], dict[str, Any]], path: Path, new: Any) -> Any:
    """The arguments with ``new`` at ``path``."""
    which, *rest = path
    args, kwargs = arguments
    if which == "args":
        return _with(args, rest, new), kwargs
    return args, _with(kwargs, rest, new)


def _with(value: Any, path: Sequence[Any], new: Any) -> Any:
    if not path:
        return new
    key, rest = path[0], path[1:]
    if isinstance(value, slice):
        parts = {part: getattr(value, part) for part in ("start", "stop", "step")}
        parts[key] = _with(parts[key], rest, new)
        return slice(*parts.values())
    if isinstance(value, Mapping):
        return {**value, key: _with(value[key], rest, new)}
    changed = [_with(item, rest, new) if i == key else item for i, item in enumerate(value)]
    return tuple(changed) if isinstance(value, tuple) else changed
