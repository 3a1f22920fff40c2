"""What an axis rule sees of one call, and what it may state about it.

    @rule("bmm")
    def bmm(call, input, mat2):                       # arguments as torch names them
        (batch, rows, inner), (other, again, cols) = call.dims(input), call.dims(mat2)
        call.unify(batch, other)
        call.unify(inner, again)
        return batch, rows, cols                      # the axes of the result

A rule returns one tuple of axes for a tensor, ``Outputs`` for several. It never looks at sizes to decide what
an axis *means*; where it cannot tell, it raises ``NoRule`` and the op counts as unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from earlytom_compile.passes.axis_algebra import AxisSpace, Dim, Kind, Size
from earlytom_compile.passes.reasons import describe

ONE = Size.of(1)
Dims = tuple[Dim, ...]
Path = tuple[Any, ...]
"""Where an argument stands: ``("args", 1, 0)``, ``("kwargs", "size", 2)``, ``("args", 1, "stop")`` of a slice."""


@dataclass(frozen=True)
class TensorAxes:
    """The axes of a tensor; ``index_of`` is the axis that its values are positions of (``arange``)."""

    dims: Dims
    index_of: Dim | None = None


@dataclass(frozen=True)
class ScalarValue:
    """A number, size or None; ``depends`` are the axes whose sizes it is computed from while running."""

    depends: Dims = ()


class Outputs(tuple):
    """Several results of one call, in order."""


MARK = "earlytom_position_wise"
"""Key of ``node.meta`` of an operator without a rule that computes [..., N] of [..., D] one by one: the node of the
latter."""


Value = TensorAxes | ScalarValue | Outputs | None
"""What is known of a node; None for a tensor without a recorded shape."""


class NoRule(Exception):
    """This call is not covered; its axes end here."""


@dataclass(frozen=True)
class Site:
    """An argument that spells the size of ``dim``."""

    node: Node
    path: Path
    dim: Dim


@dataclass(frozen=True)
class Obstacle:
    """``node`` is only right as long as none of ``dims`` changes."""

    node: Node
    dims: Dims
    why: str


Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for ops of these names, whether spelled as function, method, operator or aten op."""

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, f"two axis rules for {name}"
            RULES[name] = function
        return function

    return register


class Call:
    """One call under inference."""

    def __init__(self, node: Node, name: str, space: AxisSpace, values: Mapping[Node, Value]) -> None:
        self.node = node
        self.name = name
        self.space = space
        self.values = values
        self.sites: list[Site] = []
        self.obstacles: list[Obstacle] = []
        example = node.meta.get("example_value")
        self.several = isinstance(example, (tuple, list))
        first = example[0] if isinstance(example, (tuple, list)) and example else example
        self.out = [Size.of(n) for n in first.shape] if isinstance(first, torch.Tensor) else []

    # What the arguments are

    def is_tensor(self, value: Any) -> bool:
        return isinstance(value, Node) and (self.values.get(value) is None or self.is_known(value))

    def is_known(self, value: Any) -> bool:
        return isinstance(value, Node) and isinstance(self.values.get(value), TensorAxes)

    def tensor(self, value: Any) -> TensorAxes:
        known = self.values.get(value) if isinstance(value, Node) else None
        if not isinstance(known, TensorAxes):
            raise NoRule("an argument has no recorded shape")
        return known

    def dims(self, value: Any) -> Dims:
        return self.tensor(value).dims

    def index_of(self, value: Any) -> Dim | None:
        known = self.values.get(value) if isinstance(value, Node) else None
        return known.index_of if isinstance(known, TensorAxes) else None

    def size_of(self, literal: Any) -> Size:
        """The size that an int or a SymInt node spells."""
        if isinstance(literal, Node):
            literal = literal.meta.get("example_value")
        if isinstance(literal, bool) or not isinstance(literal, (int, torch.SymInt)):
            raise NoRule("an argument is no size")
        return Size.of(literal)

    def literals(self, position: int, keyword: str = "size") -> list[tuple[Any, Path]]:
        """The sizes in ``view(x, 2, 3)``, ``view(x, (2, 3))`` or ``view(x, size=(2, 3))``, each with its path."""
        args, kwargs = self.node.args, self.node.kwargs
        given: Any = kwargs.get(keyword, args[position] if len(args) == position + 1 else None)
        if isinstance(given, (tuple, list)):
            base: Path = ("kwargs", keyword) if keyword in kwargs else ("args", position)
            found = [(value, (*base, i)) for i, value in enumerate(given)]
        else:
            found = [(value, ("args", position + i)) for i, value in enumerate(args[position:])]
        for value, _ in found:
            self.size_of(value)
        return found

    def sizes_of_another(self, position: int, *keywords: str) -> Dims | None:
        """The axes of y in ``x.reshape(y.shape)``: one argument that holds all sizes, and follows y by itself."""
        args, kwargs = self.node.args, self.node.kwargs
        given = next((kwargs[key] for key in keywords if key in kwargs), None)
        given = args[position] if given is None and len(args) == position + 1 else given
        sizes = self.values.get(given) if isinstance(given, Node) else None
        if not isinstance(sizes, Outputs):
            return None
        dims = [size.depends for size in sizes if isinstance(size, ScalarValue)]
        return tuple(each[0] for each in dims) if dims and all(len(each) == 1 for each in dims) else None

    # What the rule states

    def unify(self, a: Dim, b: Dim) -> None:
        if None not in (a.size.hint, b.size.hint) and a.size.hint != b.size.hint:
            raise NoRule(f"sizes {a.size} and {b.size} do not match")
        self.space.unify(a, b)

    def relate(self, kind: Kind, whole: Dim, parts: Sequence[Dim]) -> None:
        self.space.relate(kind, whole, parts)

    def site(self, path: Path, dim: Dim) -> None:
        """The argument at ``path`` spells the size of ``dim`` and follows it."""
        self.sites.append(Site(self.node, path, dim))

    def free(self, size: Size, path: Path | None = None) -> Dim:
        """A new axis whose size is spelled at ``path``, or follows from other axes."""
        dim = Dim(size)
        if path is not None:
            self.site(path, dim)
        return dim

    def pinned(self, size: Size) -> Dim:
        """A new axis whose size this op decides by itself."""
        return Dim(size, fixed=f"a result of {describe(self.node)}")

    def forbid(self, dims: Sequence[Dim], why: str) -> None:
        """The op is only right while none of ``dims`` changes."""
        if dims:
            self.obstacles.append(Obstacle(self.node, tuple(dims), why))

    def moved(self, input: Any, dims: Dims) -> TensorAxes:
        """The values of ``input`` under other axes: positions stay positions."""
        return TensorAxes(dims, self.index_of(input))

    def broadcast(self, *shapes: Sequence[Dim]) -> Dims:
        """Right-aligned shapes; partners are one axis unless one of them is 1."""
        result: list[Dim] = []
        for position in range(1, max(map(len, shapes), default=0) + 1):
            partners = [shape[-position] for shape in shapes if len(shape) >= position]
            wide = [dim for dim in partners if not dim.size.is_(1)]
            for dim in wide[1:]:
                self.unify(wide[0], dim)
            result.append(wide[0] if wide else partners[0])
        return tuple(reversed(result))


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Node]]:
    """All nodes in the arguments of a node, each with its path."""
    if isinstance(value, Node):
        yield path, value
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from leaves(item, (*path, i))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, slice):
        for part in ("start", "stop", "step"):
            yield from leaves(getattr(value, part), (*path, part))


def wrap(dim: int, rank: int) -> int:
    """A non-negative dimension number."""
    if not isinstance(dim, int) or not -max(rank, 1) <= dim < max(rank, 1):
        raise NoRule("a dimension is not a plain number")
    return dim % rank if rank else 0
