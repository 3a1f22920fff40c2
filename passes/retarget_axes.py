"""Makes every number that means an axis follow the axis, after a pass has changed its size.

Before: ``h = merge_frames(h, ...)  # 8 frames in, n out``     ``h.view(8, 36, -1, 8)``   ``h.reshape(1, 72, -1)``
After:  ``h.view(sym_size(h, 0), 36, -1, 8)``                  ``h.reshape(1, sym_size(h, 0) * 9, -1)``

Only the first 8 above was the number of frames; the head size 8 stays. Which is which comes from ``AxisMap``.
Everything is decided before anything is edited: a graph is rewritten completely, or left as it was with a reason.
"""

from __future__ import annotations

import logging
import operator
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from .axes import AxisMap
from .axis_algebra import Dim, Kind, Relation, Size, combine
from .axis_call import Path, ScalarValue, Site, TensorAxes
from .graph_order import stable_order, stable_topological_sort, writes
from .reasons import NotApplicable, describe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResizedAxis:
    """At run time the tensor ``node`` has ``size`` along ``dim``; its recorded value still shows the traced size.

    ``size`` is a number, or a node that yields one. Axes that may meet must give the same number or node.
    ``name`` is for messages: "frames", "prompt".
    """

    node: Node
    dim: int
    name: str
    size: int | Node


def retarget_axes(graph_module: GraphModule, axes: Sequence[ResizedAxis]) -> int:
    """Rewrites every argument that spells the size of a changed axis, or of one computed from it.

    Pass all changed axes in one call. Dead code that spells such a size is removed; the graph is sorted again
    (a size may be needed before the place where it is computed), linted and recompiled.

    Returns:
        The number of rewritten arguments.

    Raises:
        NotApplicable: some op stands in the way; the graph is unchanged.
    """
    dead = _dead_nodes(graph_module)
    axes = [axis for axis in axes if axis.node not in dead]
    starts: dict[Node, list[int]] = defaultdict(list)
    for axis in axes:
        starts[axis.node].append(axis.dim)
    inferred = AxisMap.infer(graph_module, starts, skip=dead)
    sizes = NewSizes(inferred, axes)
    if not sizes.changed:
        return 0
    sizes.check()
    plan = [(site, sizes.plan(site.dim, site.node)) for site in sizes.sites()]
    stable_order(graph_module.graph, _reads(plan))
    _Rewriter(graph_module).apply(plan, dead)
    log.debug("%d sizes follow %s", len(plan), ", ".join(sorted({axis.name for axis in axes})))
    return len(plan)


def _dead_nodes(graph_module: GraphModule) -> set[Node]:
    """Nodes that reach neither the output nor a side effect: they may be wrong, but nobody would notice."""
    alive: set[Node] = set()
    for node in reversed(graph_module.graph.nodes):
        effect = not node.users and node.meta.get("example_value") is None
        if node.op in ("placeholder", "output") or effect or writes(node) or node in alive:
            alive |= {node, *node.all_input_nodes}
    return {node for node in graph_module.graph.nodes if node not in alive}


# New sizes


class NewSizes:
    """The size of every axis after the change.

    Attributes:
        changed: the new size of each axis that changes, as an expression; nodes are symbols of their name.
    """

    def __init__(self, axes: AxisMap, resized: Sequence[ResizedAxis]) -> None:
        self.axes = axes
        self.changed: dict[Dim, sympy.Expr] = {}
        self.names: dict[Dim, str] = {}
        self.declared: dict[Dim, ResizedAxis] = {}
        self.members = axes.members_by_axis()
        for axis in resized:
            self._declare(axis)
        self.relations = _in_dependency_order(axes.space.relations)
        for relation in self.relations:
            self._derive(relation)

    def _declare(self, axis: ResizedAxis) -> None:
        dim = self.axes.dim(axis.node, axis.dim)
        size = _symbol(axis.size)
        if dim.size.expr == size:
            return
        if dim.size.is_(1):
            raise NotApplicable(
                f"the axis {axis.name} had size 1 while tracing ({describe(axis.node)}), where it cannot be told "
                "from an axis that is only there for broadcasting",
                "Leave an axis of size 1 as it is",
            )
        other = self.declared.setdefault(dim, axis)
        if _symbol(other.size) != size:
            raise NotApplicable(
                f"the axes {other.name!r} and {axis.name!r} meet in the graph but get different sizes, "
                f"{other.size} and {axis.size}",
                "Give axes that meet one size",
            )
        self.changed[dim] = size
        self.names[dim] = axis.name

    def _derive(self, relation: Relation) -> None:
        moved = [part.root for part in relation.parts if part.root in self.changed]
        whole = relation.whole.root
        if moved and whole not in self.changed:
            self.changed[whole] = self.expression(relation)
            self.names[whole] = " and ".join(dict.fromkeys(self.names[part] for part in moved))

    def expression(self, relation: Relation) -> sympy.Expr:
        parts = [Size(self.changed.get(part.root, part.size.expr), None) for part in relation.parts]
        return sympy.expand(combine(relation.kind, parts).expr)

    # What stands in the way

    def check(self) -> None:
        """Raises NotApplicable if some op cannot follow."""
        self._check_fixed()
        self._check_relations()
        for obstacle in self.axes.obstacles:
            for dim in obstacle.dims:
                if dim.root in self.changed:
                    raise NotApplicable(
                        f"the axis {self.names[dim.root]!r} changes its size, and {obstacle.why} "
                        f"{describe(obstacle.node)}",
                        "Teach passes/axis_rules.py what the op does to its axes, or keep the axis away from it",
                    )
        self._check_numbers()
        self._check_settled()

    def _check_fixed(self) -> None:
        for dim in self.changed:
            fixed = dim.root.fixed
            if fixed is not None:
                raise NotApplicable(
                    f"the axis {self.names[dim]!r} changes its size but must equal a size of {fixed}, which has a "
                    f"fixed size of {dim.size}",
                    "Resize that tensor in the same way, or keep the two apart",
                )

    def _check_relations(self) -> None:
        for relation in self.relations:
            whole = relation.whole.root
            if whole in self.changed and sympy.expand(self.changed[whole]) != self.expression(relation):
                parts = (" x " if relation.kind == "product" else " + ").join(str(part.size) for part in relation.parts)
                nodes = self.members.get(whole, [])
                raise NotApplicable(
                    f"the axis {self.names[whole]!r} changes its size, and {whole.size} is written as {parts}, "
                    "where it is unknown which part follows" + (f": {describe(nodes[0][0])}" if nodes else ""),
                    "Keep an axis whole if its size is to change",
                )

    def _check_numbers(self) -> None:
        symbols = set().union(*(dim.size.expr.free_symbols for dim in self.changed))
        for use in self.axes.sizes_as_values:
            if isinstance(use.number, int):
                self._check_divisor(use.node, Size.of(use.number))
                continue
            value = use.number.meta.get("example_value")
            named = set().union(
                *(
                    Size.of(part).expr.free_symbols if isinstance(part, torch.SymInt) else part.node.expr.free_symbols
                    for part in (value if isinstance(value, torch.Size) else [value])
                    if isinstance(part, (torch.SymInt, torch.SymFloat, torch.SymBool))
                )
            )
            if named & symbols or self.moves(use.number):
                raise NotApplicable(
                    f"{describe(use.node)} computes with the number {use.number.name}, which may be the old size of "
                    f"the axis {self._name_for(named)!r}",
                    "Read the size from a tensor where it is needed",
                )

    def _check_divisor(self, node: Node, divisor: Size) -> None:
        for dim, name in self.names.items():
            if dim.size.same(divisor):
                raise NotApplicable(
                    f"{describe(node)} divides by {divisor}, which may be the size of the axis {name!r} that changes",
                    "Write an average as mean(), or divide by a float if the number is a constant",
                )

    def _check_settled(self) -> None:
        """An axis that only literals spell, as large as a changed one was, may be that one: data does not say."""
        settled = self._settled()
        for site in self.axes.sites:
            if site.dim.root not in settled and not site.dim.size.is_(1):
                for dim, name in self.names.items():
                    if dim.size.same(site.dim.size):
                        raise NotApplicable(
                            f"the size {dim.size} in {describe(site.node)} may be that of the axis {name!r}, which "
                            "changes, and nothing in the graph says whether it is",
                            "Combine the tensor with one that has the axis, or take its size from a weight",
                        )

    def _settled(self) -> set[Dim]:
        """Axes with a known size: fixed ones, changed ones, and what follows from them."""
        settled = {dim for dim in self.members if dim.fixed} | set(self.changed)
        progress = True
        while progress:
            before = len(settled)
            for relation in self.relations:
                whole, parts = relation.whole.root, {part.root for part in relation.parts}
                open_parts = parts - settled
                if not open_parts:
                    settled.add(whole)
                elif whole in settled and (len(open_parts) == 1 or whole not in self.changed):
                    settled |= open_parts
            progress = len(settled) > before
        return settled

    def _name_for(self, symbols: set[sympy.Symbol]) -> str:
        named = [self.names[dim] for dim in self.changed if dim.size.expr.free_symbols & symbols]
        return (named or list(self.names.values()))[0]

    def moves(self, number: Any) -> bool:
        """Whether a size read from tensors in the graph will come out changed."""
        value = self.axes.values.get(number) if isinstance(number, Node) else None
        return isinstance(value, ScalarValue) and any(dim.root in self.changed for dim in value.depends)

    # What to write instead

    def sites(self) -> Iterator[Site]:
        """The arguments to rewrite: those that spell a changed axis, or another axis by a number that moves."""
        for site in self.axes.sites:
            if site.dim.root in self.changed or self.moves(_at((site.node.args, site.node.kwargs), site.path)):
                yield site

    def plan(self, dim: Dim, user: Node) -> Plan:
        """How ``user`` gets the size of ``dim``: from its own tensors where they have it."""
        root = dim.root
        expr = self.changed.get(root, root.size.expr)
        if expr.is_Integer:
            return int(expr)
        own = [(node, i) for node in user.all_input_nodes for i in self._places(node, root)]
        if own:
            return SizeOf(*own[0])
        for relation in self.relations:
            if relation.whole.root is root and any(part.root in self.changed for part in relation.parts):
                return Combined(relation.kind, tuple(self.plan(part, user) for part in relation.parts))
        if root in self.declared:
            return self.declared[root].size
        others = [place for place in self.members.get(root, []) if place[0] is not user]
        if not others:
            raise NotApplicable(
                f"no tensor has the size {root.size} that {describe(user)} needs",
                "Compile with static shapes (dynamic=False)",
            )
        return SizeOf(*others[0])

    def _places(self, node: Node, root: Dim) -> list[int]:
        value = self.axes.values.get(node)
        return [i for i, dim in enumerate(value.dims) if dim.root is root] if isinstance(value, TensorAxes) else []


def _symbol(size: int | Node) -> sympy.Expr:
    return sympy.Symbol(size.name, integer=True) if isinstance(size, Node) else sympy.Integer(size)


def _in_dependency_order(relations: Sequence[Relation]) -> list[Relation]:
    """Parts before the wholes they make up."""
    by_whole: dict[Dim, list[Relation]] = defaultdict(list)
    for relation in relations:
        by_whole[relation.whole.root].append(relation)
    done: dict[Dim, None] = {}
    result: list[Relation] = []

    def visit(dim: Dim) -> None:
        if dim in done:
            return
        done[dim] = None
        for relation in by_whole.get(dim, []):
            for part in relation.parts:
                visit(part.root)
        result.extend(by_whole.get(dim, []))

    for relation in relations:
        visit(relation.whole.root)
    return result


# Rewriting


@dataclass(frozen=True)
class SizeOf:
    """The size of dimension ``dim`` of ``node``."""

    node: Node
    dim: int


@dataclass(frozen=True)
class Combined:
    """The product or sum of sizes."""

    kind: Kind
    parts: tuple[Plan, ...]


Plan = int | Node | SizeOf | Combined


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
            total = _described(node, user, function(_traced(total), _traced(part)))
        assert isinstance(total, Node)
        return total


def _described(node: Node, user: Node, value: Any) -> Node:
    node.meta = {key: user.meta[key] for key in ("nn_module_stack", "stack_trace") if key in user.meta}
    if value is not None:
        node.meta["example_value"] = value
    return node


def _traced(size: int | Node) -> Any:
    return size.meta.get("example_value", 1) if isinstance(size, Node) else size


def _at(arguments: tuple[tuple[Any, ...], Mapping[str, Any]], path: Path) -> Any:
    value: Any = dict(zip(("args", "kwargs"), arguments, strict=True))
    for key in path:
        value = getattr(value, key) if isinstance(value, slice) else value[key]
    return value


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
