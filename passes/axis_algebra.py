"""Axes as unknowns: every tensor dimension is a ``Dim``, and what an op says about its shapes is an equation.

    add([8, 9, 48], [8, 1, 48])        8 is 8, 48 is 48                    unify
    view([8, 9, 48] -> [72, 48])       72 = 8 x 9, row-major; 48 is 48     product
    view([72, 48] -> [8, 9, 48])       72 = 8'x 9', so 8' is 8, 9' is 9    align
    cat([72, 48], [1, 48])             73 = 72 + 1                         sum

Sizes only say where the pieces of one reshape meet; two dimensions are one axis because data flows from one
to the other, never because their sizes are equal.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv


@dataclass(frozen=True)
class Size:
    """A size of the trace: its expression (an integer when static) and its value while tracing, if known."""

    expr: sympy.Expr
    hint: int | None

    @classmethod
    def of(cls, value: int | torch.SymInt) -> Size:
        """Reads a size without installing a guard."""
        if not isinstance(value, torch.SymInt):
            return cls(sympy.Integer(value), int(value))
        expr = _without_exact_floors(value.node.expr)
        if expr.is_Integer:
            return cls(expr, int(expr))
        hint = value.node.hint if value.node.has_hint() else None
        return cls(expr, hint if isinstance(hint, int) else None)

    def is_(self, number: int) -> bool:
        return bool(self.expr == number)

    def same(self, other: Size) -> bool:
        """Whether two sizes are equal for every value of their symbols.

        Expressions with floors and ceilings (``6*(s//6)`` and ``s``) are beyond sympy; the trace has shown
        them to be equal where it put one for the other, so there the traced values decide.
        """
        if self.expr == other.expr:
            return True
        known = self.hint is not None and other.hint is not None
        if known and self.hint != other.hint:
            return False
        difference = sympy.expand(self.expr - other.expr)
        return bool(difference == 0) or (known and difference.has(sympy.Function))

    def __str__(self) -> str:
        return str(self.expr)


@functools.lru_cache(maxsize=4096)
def _without_exact_floors(expr: sympy.Expr) -> sympy.Expr:
    """``48 // (4*s*s // s**2)`` is 12: traces are full of these where a prompt is as long as the batch."""

    def divided(floor: sympy.Expr) -> sympy.Expr:
        quotient = sympy.cancel(floor.args[0] / floor.args[1])
        exact = quotient.is_polynomial() and all(c.is_Integer for c in quotient.as_coefficients_dict().values())
        return sympy.expand(quotient) if exact else floor

    return expr.replace(lambda e: isinstance(e, FloorDiv), divided) if expr.has(FloorDiv) else expr


Kind = Literal["product", "sum"]
_NEUTRAL: dict[Kind, int] = {"product": 1, "sum": 0}


def combine(kind: Kind, sizes: Iterable[Size]) -> Size:
    """The product or the sum of sizes."""
    expr, hint = sympy.Integer(_NEUTRAL[kind]), _NEUTRAL[kind]
    known: int | None = hint
    for size in sizes:
        expr = expr * size.expr if kind == "product" else expr + size.expr
        if known is not None and size.hint is not None:
            known = known * size.hint if kind == "product" else known + size.hint
        else:
            known = None
    return Size(expr, known)


class Dim:
    """One dimension of one tensor; dimensions found to be the same axis share a ``root`` (union-find)."""

    __slots__ = ("_parent", "fixed", "serial", "size")
    _serials = itertools.count()

    def __init__(self, size: Size, fixed: str | None = None) -> None:
        """``fixed`` says what gives the dimension its size when no argument in the graph does."""
        self.size = size
        self.fixed = fixed
        self.serial = next(Dim._serials)
        self._parent: Dim | None = None

    @property
    def root(self) -> Dim:
        dim = self
        while dim._parent is not None:
            if dim._parent._parent is not None:
                dim._parent = dim._parent._parent
            dim = dim._parent
        return dim

    def __repr__(self) -> str:
        return f"Dim{self.root.serial}({self.size})"


@dataclass(frozen=True)
class Relation:
    """``whole`` is the row-major product, or the sum (a concatenation), of ``parts``."""

    kind: Kind
    whole: Dim
    parts: tuple[Dim, ...]

    def key(self) -> tuple[Kind, Dim, tuple[Dim, ...]]:
        return self.kind, self.whole.root, tuple(part.root for part in self.parts)


Group = tuple[slice, slice]


def finest_groups(kind: Kind, left: Sequence[Size], right: Sequence[Size]) -> list[Group]:
    """Cuts two factorizations of one size where their prefix products (or sums) agree.

    ``[2, 3, 4]`` and ``[6, 2, 2]`` give ``[2, 3] | [6]`` and ``[4] | [2, 2]``. Neutral sizes (1 in a product)
    must have been left out. What follows the last agreement is one group.
    """
    prefixes = [combine(kind, left[: i + 1]) for i in range(len(left))]
    others = [combine(kind, right[: j + 1]) for j in range(len(right))]
    groups: list[Group] = []
    i = j = 0
    for a, prefix in enumerate(prefixes[:-1], 1):
        for b in range(j + 1, len(others)):
            if prefix.same(others[b - 1]):
                groups.append((slice(i, a), slice(j, b)))
                i, j = a, b
                break
    groups.append((slice(i, len(left)), slice(j, len(right))))
    return groups


class AxisSpace:
    """All the equations of one graph."""

    def __init__(self) -> None:
        self.relations: list[Relation] = []

    def unify(self, a: Dim, b: Dim) -> None:
        """States that two dimensions are the same axis."""
        first, second = sorted((a.root, b.root), key=lambda dim: dim.serial)
        if first is not second:
            second._parent = first
            first.fixed = first.fixed or second.fixed

    def relate(self, kind: Kind, whole: Dim, parts: Sequence[Dim]) -> None:
        """States that ``whole`` is the product or sum of ``parts``, in this order."""
        kept = tuple(part for part in parts if not part.size.is_(_NEUTRAL[kind]))
        if len(kept) == 1:
            self.unify(whole, kept[0])
        elif kept:
            self.relations.append(Relation(kind, whole, kept))

    def align(self) -> None:
        """Unifies what was made of the same parts and the parts of what was taken apart in two ways.

        Ends when there is nothing left to learn: every step joins two axes or splits one into smaller ones.
        """
        progress = True
        while progress:
            progress = self._join_equal_wholes()
            self.relations = list({relation.key(): relation for relation in self.relations}.values())
            known = {relation.key() for relation in self.relations}
            by_whole: dict[tuple[Kind, Dim], list[Relation]] = defaultdict(list)
            for relation in self.relations:
                by_whole[relation.kind, relation.whole.root].append(relation)
            first_parts = {key: found[0].parts for key, found in by_whole.items()}
            for (kind, _), found in by_whole.items():
                for a, b in itertools.combinations(found, 2):
                    progress |= self._match(kind, a.parts, b.parts, first_parts, known)

    def _join_equal_wholes(self) -> bool:
        made: dict[tuple[Kind, tuple[Dim, ...]], Dim] = {}
        progress = False
        for relation in self.relations:
            kind, whole, parts = relation.key()
            other = made.setdefault((kind, parts), whole).root
            progress |= other is not whole
            self.unify(whole, other)
        return progress

    def _match(
        self,
        kind: Kind,
        left: Sequence[Dim],
        right: Sequence[Dim],
        first_parts: dict[tuple[Kind, Dim], tuple[Dim, ...]],
        known: set[tuple[Kind, Dim, tuple[Dim, ...]]],
    ) -> bool:
        """Compares two ways of writing one axis; parts of parts are looked at only where that is needed."""
        progress = False
        for a, b in finest_groups(kind, [d.size for d in left], [d.size for d in right]):
            ins, outs = left[a], right[b]
            if len(ins) == len(outs) == 1:
                if ins[0].root is not outs[0].root:
                    self.unify(ins[0], outs[0])
                    progress = True
            elif 1 in (len(ins), len(outs)):
                whole, parts = (ins[0], outs) if len(ins) == 1 else (outs[0], ins)
                relation = Relation(kind, whole, tuple(parts))
                if relation.key() not in known:
                    known.add(relation.key())
                    self.relations.append(relation)
                    progress = True
            else:
                wider = [_taken_apart(kind, side, first_parts) for side in (ins, outs)]
                if len(wider[0]) + len(wider[1]) > len(ins) + len(outs):
                    progress |= self._match(kind, wider[0], wider[1], first_parts, known)
        return progress


def _taken_apart(kind: Kind, dims: Sequence[Dim], first_parts: dict[tuple[Kind, Dim], tuple[Dim, ...]]) -> list[Dim]:
    return [part for dim in dims for part in first_parts.get((kind, dim.root), (dim,))]
