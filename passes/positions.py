"""Whether a part of a graph is position-wise: every token of every frame is computed from itself alone.

    norm -> linear -> view -> transpose        yes: [T, S, D] comes out as [T, H, S, d], and nothing met
    linear + lora_B(lora_A(x)) * scale         yes, however it is spelled
    x - x.mean(1, keepdim=True)                no: the mean is of all tokens, and lost their axis
    softmax(x, dim=1)                          no: it kept the axis and mixed along it

The axes of a graph (``axes.py``) say which dimensions are the frames and the tokens. An op that mixes them either
loses one of the two, or is listed here with the dimensions along which it mixes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch.fx import Node

from earlytom_compile.passes.axes import AxisMap, op_name
from earlytom_compile.passes.axis_algebra import Dim
from earlytom_compile.passes.axis_call import Outputs, TensorAxes
from earlytom_compile.passes.dataflow import Dataflow
from earlytom_compile.passes.patterns import argument


class Positions:
    """The frames [T] and tokens [S] of one encoder, wherever they are in a graph. ``frames`` is None where there is
    one frame only, which nothing can mix."""

    def __init__(self, axes: AxisMap, frames: Dim | None, tokens: Dim | None) -> None:
        self._axes = axes
        self._axes_of_interest = [dim.root for dim in (frames, tokens) if dim is not None]
        self._parts: dict[Dim, list[tuple[Dim, ...]]] = {}
        for relation in axes.space.relations:
            if relation.kind == "product":
                parts = tuple(part.root for part in relation.parts)
                self._parts.setdefault(relation.whole.root, []).append(parts)
        self._watched = self._made_of(self._axes_of_interest)

    def first_mixing(self, flow: Dataflow, source: Node, *targets: Node) -> Node | None:
        """The first node between ``source`` and ``targets`` that is not position-wise, as far as is known."""
        return next((node for node in flow.between(source, *targets) if not self.is_position_wise(node)), None)

    def is_position_wise(self, node: Node) -> bool:
        """Whether a node keeps the axes and does not mix along them; it must read a tensor that has them."""
        value = self._axes.values.get(node)
        results = value if isinstance(value, Outputs) else (value,)
        return all(map(self.are_in, results)) and not self._mixes(node)

    def are_in(self, value: Any) -> bool:
        """Whether a tensor has the axes, once each, as dimensions of their own or as part of larger ones."""
        if not isinstance(value, TensorAxes):
            return False
        held = [self._made_of([dim]) for dim in value.dims]
        present = set().union(*held) if held else set()
        self._put_together(present)
        return all(axis in present and sum(axis in each for each in held) <= 1 for axis in self._axes_of_interest)

    def _mixes(self, node: Node) -> bool:
        for operand, along in _mixed_dims(node):
            value = self._axes.values.get(operand)
            if not isinstance(value, TensorAxes):
                continue
            dims = (
                value.dims
                if along is None
                else [value.dims[i] for i in along if -len(value.dims) <= i < len(value.dims)]
            )
            if any(not self._made_of([dim]).isdisjoint(self._watched) for dim in dims):
                return True
        return False

    def _made_of(self, dims: Iterable[Dim]) -> set[Dim]:
        """``dims`` and all axes that they are products of."""
        pending, found = [dim.root for dim in dims], set[Dim]()
        while pending:
            dim = pending.pop()
            if dim not in found:
                found.add(dim)
                pending += [part for parts in self._parts.get(dim, ()) for part in parts]
        return found

    def _put_together(self, present: set[Dim]) -> None:
        """Add the axes of interest whose parts are all there: [T, h, w, D] has the tokens too."""
        for axis in self._axes_of_interest:
            if axis not in present and self._is_covered(axis, present):
                present.add(axis)

    def _is_covered(self, axis: Dim, present: set[Dim]) -> bool:
        if axis in present:
            return True
        return any(all(self._is_covered(part, present) for part in parts) for parts in self._parts.get(axis, ()))


Along = tuple[Any, Sequence[int] | None]
"""An operand, and its dimensions that an op mixes along; None for all of them."""


def _mixed_dims(node: Node) -> Iterator[Along]:
    """Where the op mixes although its result keeps the axis. An op that loses the axis needs no entry."""
    rule = _MIXING.get(op_name(node))
    if rule is not None:
        yield from rule(node)


def _along(position: int, name: str = "dim", default: Any = None) -> Callable[[Node], Iterator[Along]]:
    """For ops with a dimension, or several, among their arguments."""

    def mixed(node: Node) -> Iterator[Along]:
        given = argument(node, position, name, default)
        if isinstance(given, int):
            yield node.args[0] if node.args else node.kwargs.get("input"), (given,)
        elif isinstance(given, (tuple, list)) and all(isinstance(dim, int) for dim in given):
            yield node.args[0], tuple(given)
        else:
            yield from _everything(node)

    return mixed


def _everything(node: Node) -> Iterator[Along]:
    for operand in node.all_input_nodes:
        yield operand, None


def _last(count: int) -> Callable[[Node], Iterator[Along]]:
    def mixed(node: Node) -> Iterator[Along]:
        yield node.args[0], range(-count, 0)

    return mixed


def _normalised(node: Node) -> Iterator[Along]:
    shape = argument(node, 1, "normalized_shape")
    if isinstance(shape, (tuple, list)):
        yield argument(node, 0, "input"), range(-len(shape), 0)
    else:
        yield from _everything(node)


def _in_training(node: Node) -> Iterator[Along]:
    if argument(node, 5, "training", False) is not False:
        yield from _everything(node)


def _contracted(node: Node) -> Iterator[Along]:
    """A product sums over the last dimension of its left operand and the last but one of its right."""
    first = 1 if op_name(node) in ("addmm", "baddbmm") else 0
    left, right = argument(node, first, "mat1"), argument(node, first + 1, "other")
    if op_name(node) == "rmatmul":
        left, right = right, left
    if not (isinstance(left, Node) and isinstance(right, Node)):
        yield from _everything(node)
    else:
        yield left, (-1,)
        yield right, (-2,)


def _summed_letters(node: Node) -> Iterator[Along]:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str):
        yield from _everything(node)
        return
    terms, _, result = equation.replace(" ", "").partition("->")
    for term, operand in zip(terms.split(","), operands, strict=False):
        yield operand, [i for i, letter in enumerate(term) if letter not in result]


_MIXING: dict[str, Callable[[Node], Iterator[Along]]] = {
    **dict.fromkeys(("softmax", "log_softmax", "softmin"), _along(1)),
    **dict.fromkeys(("cumsum", "cumprod", "logcumsumexp"), _along(1)),
    **dict.fromkeys(("sort", "argsort"), _along(1, default=-1)),
    "topk": _along(2, default=-1),
    "normalize": _along(2, default=1),
    "flip": _along(1, "dims"),
    "roll": _along(2, "dims"),
    "fliplr": _everything,
    "flipud": _everything,
    **dict.fromkeys(("tril", "triu"), _last(2)),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalised),
    **dict.fromkeys(("group_norm", "instance_norm"), _everything),
    "batch_norm": _in_training,
    **dict.fromkeys(("matmul", "rmatmul", "mm", "bmm", "mv", "dot", "addmm", "baddbmm"), _contracted),
    "einsum": _summed_letters,
    "linear": _last(1),
    **dict.fromkeys(("scaled_dot_product_attention", "masked_scatter"), _everything),
    **dict.fromkeys(
        ("gather", "take_along_dim", "scatter", "scatter_add", "scatter_reduce", "index_select"), _everything
    ),
}
