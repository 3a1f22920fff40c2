"""What size every axis has once some axes have changed, and whether every op can live with it.

    frames 8 -> n     72 = 8 x 9 -> 9*n     73 = 72 + 1 -> 9*n + 1     heads 8: still 8

Also decides how an op learns a new size: from one of its own tensors if one has the axis, else by computing it
from sizes that are known.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from earlytom_compile.passes.axes import AxisMap
from earlytom_compile.passes.axis_algebra import Dim, Kind, Relation, Size, combine
from earlytom_compile.passes.axis_call import Path, ScalarValue, Site, TensorAxes
from earlytom_compile.passes.reasons import NotApplicable, describe


@dataclass(frozen=True)
class ResizedAxis:
    """At run time ``node`` has ``size`` along ``dim``; its recorded value still shows the traced size.

    ``size`` is a number, or a node that yields one. Axes that may meet must give the same number or node.
    ``name`` is for messages: "frames", "prompt".
    """

    node: Node
    dim: int
    name: str
    size: int | Node


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


class NewSizes:
    """The size of every axis after the change.

    Attributes:
        changed: the new size of each axis that changes, as an expression; nodes are symbols of their name.
    """

    def __init__(self, axes: AxisMap, resized: Sequence[ResizedAxis], as_before: Container[Node] = ()) -> None:
        self.axes = axes
        self.as_before = as_before
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
            dim.fixed = dim.fixed or f"the axis {axis.name!r} at {describe(axis.node)}"
            return
        if dim.size.is_(1):
            raise NotApplicable(
                f"the axis {axis.name!r} had size 1 while tracing ({describe(axis.node)}), where it cannot be "
                "told from an axis that is only there for broadcasting",
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
                        "Teach passes/axis_rules.py what the op does to its axes, or keep this axis away from it",
                    )
        self._check_numbers()
        self._check_settled()

    def _check_fixed(self) -> None:
        for dim in self.changed:
            fixed = dim.root.fixed
            if fixed is not None:
                raise NotApplicable(
                    f"the axis {self.names[dim]!r} changes its size but must equal a size of {fixed}, which "
                    f"has a fixed size of {dim.size}",
                    "Resize that tensor in the same way, or keep the two apart",
                )

    def _check_relations(self) -> None:
        for relation in self.relations:
            whole = relation.whole.root
            if whole in self.changed and self.changed[whole] != self.expression(relation):
                sign = " x " if relation.kind == "product" else " + "
                where = [describe(node) for node, _ in self.members.get(whole, [])[:1]]
                raise NotApplicable(
                    f"the axis {self.names[whole]!r} changes its size, and {whole.size} is written as "
                    f"{sign.join(str(part.size) for part in relation.parts)}, where it is unknown which part "
                    f"follows: {', '.join(where) or 'a reshape'}",
                    "Keep an axis whole if its size is to change",
                )

    def _check_numbers(self) -> None:
        symbols = set().union(*(dim.size.expr.free_symbols for dim in self.changed))
        for use in self.axes.sizes_as_values:
            if use.node in self.as_before:
                continue
            if isinstance(use.number, int):
                self._check_divisor(use.node, Size.of(use.number))
                continue
            named = _symbols(use.number.meta.get("example_value"))
            if named & symbols or self.moves(use.number):
                raise NotApplicable(
                    f"{describe(use.node)} computes with the number {use.number.name}, which may be the old "
                    f"size of the axis {self._name_for(named)!r}",
                    "Read the size from a tensor where it is needed",
                )

    def _check_divisor(self, node: Node, divisor: Size) -> None:
        """``x.sum(1) / 81``; constants such as the width in rotary frequencies have not seen the axis."""
        for dim, name in self.names.items():
            if dim.size.same(divisor) and self._has_seen_a_change(node):
                raise NotApplicable(
                    f"{describe(node)} divides by {divisor}, which may be the old size of the axis {name!r}",
                    "Write an average as mean(), or divide by a float if the number is a constant",
                )

    def _has_seen_a_change(self, node: Node) -> bool:
        pending, seen = [node], {node}
        while pending:
            for source in pending.pop().all_input_nodes:
                value = self.axes.values.get(source)
                if isinstance(value, TensorAxes) and any(dim.root in self.changed for dim in value.dims):
                    return True
                if source not in seen:
                    seen.add(source)
                    pending.append(source)
        return False

    def _check_settled(self) -> None:
        """An axis that only literals spell, as large as a changed one was, may be that one: no data says."""
        settled = self._settled()
        for site in self.axes.sites:
            if site.dim.root not in settled and not site.dim.size.is_(1):
                for dim, name in self.names.items():
                    if dim.size.same(site.dim.size):
                        raise NotApplicable(
                            f"the size {dim.size} in {describe(site.node)} may be that of the axis {name!r}, "
                            "which changes, and nothing in the graph says whether it is",
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
        """The arguments to rewrite: they spell a changed axis, or another axis by a number that moves."""
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


def _symbols(value: Any) -> set[sympy.Symbol]:
    """The traced sizes that a number was computed from."""
    found: set[sympy.Symbol] = set()
    for part in value if isinstance(value, torch.Size) else [value]:
        if isinstance(part, torch.SymInt):
            found |= Size.of(part).expr.free_symbols
        elif isinstance(part, (torch.SymFloat, torch.SymBool)):
            found |= part.node.expr.free_symbols
    return found


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


def _at(arguments: tuple[tuple[Any, ...], Mapping[str, Any]], path: Path) -> Any:
    value: Any = dict(zip(("args", "kwargs"), arguments, strict=True))
    for key in path:
        value = getattr(value, key) if isinstance(value, slice) else value[key]
    return value
