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

import torch
from torch.fx import GraphModule, Node

from earlytom_compile.passes.axes import AxisMap, op_name
from earlytom_compile.passes.axis_algebra import Dim
from earlytom_compile.passes.axis_call import Outputs, TensorAxes, Value
from earlytom_compile.passes.dataflow import Dataflow
from earlytom_compile.passes.patterns import CASTS, argument, einsum_letters, peel, shape_of, value_of

UNIFORM = frozenset(
    ("expand", "expand_as", "broadcast_to", "repeat", "tile")
    + ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")
)
"""Ops that make an axis along which all is the same, of one of size 1 or of nothing."""


Foreign = Callable[[Node], bool | None]
"""Whether a tensor that is no result of the one that is followed has its frames as an axis; None for what is the same
for all videos, such as a weight."""


def first_mixing(
    graph_module: GraphModule,
    flow: Dataflow,
    source: Node,
    kept: Sequence[int],
    *targets: Node,
    foreign: Foreign = lambda read: None,
    through: Node | None = None,
) -> Node | None:
    """The first node between ``source`` and ``targets`` that mixes the axes ``kept`` of ``source``, or may do so as far
    as anybody knows; None if all of it computes every position of these axes from itself alone. The first of ``kept``
    are the frames, which must be treated alike. An attention to go ``through`` may mix tokens."""
    follower = _Follower(graph_module, source, kept, foreign, through)
    return next((node for node in flow.between(source, *targets) if not follower.keeps(node)), None)


class _Follower:
    """Follows a few axes of one tensor through what is computed from it, and from nothing else that is known.

    The axes of the whole graph would not do: a later sum makes the result of a convolution over tokens one axis with
    the tokens. Here a sum of two results of the tensor must find them to be one axis already.
    """

    def __init__(
        self,
        graph_module: GraphModule,
        source: Node,
        kept: Sequence[int],
        foreign: Foreign,
        through: Node | None,
    ) -> None:
        self._graph_module = graph_module
        self._foreign, self._through = foreign, through
        self._axes = AxisMap.of_values([source], graph_module)
        self._own = {source}
        value = self._axes.values[source]
        # An axis of one position cannot be mixed, nor told from others of size 1.
        dims = [value.dims[i] for i in kept] if isinstance(value, TensorAxes) else []
        self._kept = [dim for dim in dims if not dim.size.is_(1)]
        self._watches_frames = bool(dims) and not dims[0].size.is_(1)

    def keeps(self, node: Node) -> bool:
        """Whether ``node`` has the axes, once each, and does not mix along them; asked in graph order."""
        self._learn_of_others(node)
        others = [dim for read in self._own.intersection(node.all_input_nodes) for dim in self._dims(read)]
        watched = self._made_of(self._kept)
        strangers = [dim for dim in others if dim.root not in watched]
        value = self._axes.follow(node, self._graph_module)
        self._own.add(node)
        watched = self._made_of(self._kept)
        if any(dim.root in watched for dim in strangers):
            return False
        if node is not self._through and self._mixes(node, watched):
            return False
        if any(self._tells_frames_apart(read) for read in node.all_input_nodes if read not in self._own):
            return False
        self._axes.space.align()
        results = value if isinstance(value, Outputs) else (value,)
        return all(map(self._has_axes, results))

    def _tells_frames_apart(self, read: Node) -> bool:
        """Whether ``read``, which is no result of the tensor, has something else for each frame, as a time embedding
        has: a merged frame is none of them. What is computed from the video too must have the same frames."""
        if (framed := self._foreign(read)) is not None:
            return not framed
        value = self._axes.values.get(read)
        frames = self._made_of(self._kept[:1] if self._watches_frames else [])
        if not isinstance(value, TensorAxes) or all(dim.root not in frames for dim in value.dims):
            return False
        return op_name(peel(read, CASTS)) not in UNIFORM

    def _learn_of_others(self, node: Node) -> None:
        """What ``node`` reads beside results of the tensor: weights, positions, sizes."""
        for read in node.all_input_nodes:
            if read in self._axes.values:
                continue
            if isinstance(value_of(read), (int, torch.SymInt, torch.Size)) and read.all_input_nodes:
                self._learn_of_others(read)  # a size, perhaps of one of the results
                self._axes.follow(read, self._graph_module)
            else:
                self._axes.values.update(AxisMap.of_values([read], self._graph_module).values)

    def _dims(self, node: Node) -> Iterator[Dim]:
        value = self._axes.values.get(node)
        for each in value if isinstance(value, Outputs) else (value,):
            if isinstance(each, TensorAxes):
                yield from each.dims

    def _has_axes(self, value: Value) -> bool:
        """Whether a tensor has the axes, once each, as dimensions of their own or as part of larger ones."""
        if not isinstance(value, TensorAxes):
            return False
        held = [self._made_of([dim]) for dim in value.dims]
        present = set[Dim]().union(*held)
        return all(self._is_covered(axis.root, present) for axis in self._kept) and all(
            sum(axis.root in each for each in held) <= 1 for axis in self._kept
        )

    def _mixes(self, node: Node, watched: set[Dim]) -> bool:
        for operand, along in mixed_dims(node):
            value = self._axes.values.get(operand)
            if operand in self._own and isinstance(value, TensorAxes):
                rank = len(value.dims)
                dims = value.dims if along is None else [value.dims[i] for i in along if -rank <= i < rank]
                if any(not self._made_of([dim]).isdisjoint(watched) for dim in dims):
                    return True
        return False

    def _parts(self, whole: Dim) -> Iterator[tuple[Dim, ...]]:
        for relation in self._axes.space.relations:
            if relation.kind == "product" and relation.whole.root is whole:
                yield tuple(part.root for part in relation.parts)

    def _made_of(self, dims: Iterable[Dim]) -> set[Dim]:
        """``dims`` and all axes that they are products of."""
        pending, found = [dim.root for dim in dims], set[Dim]()
        while pending:
            dim = pending.pop()
            if dim not in found:
                found.add(dim)
                pending += [part for parts in self._parts(dim) for part in parts]
        return found

    def _is_covered(self, axis: Dim, present: set[Dim]) -> bool:
        """Whether an axis is there, or all parts of it: [T, h, w, D] has the tokens too."""
        if axis in present:
            return True
        return any(all(self._is_covered(part, present) for part in parts) for parts in self._parts(axis))


Along = tuple[Any, Sequence[int] | None]
"""An operand, and its dimensions that an op mixes along; None for all of them."""


def mixed_dims(node: Node) -> Iterator[Along]:
    """Where the op mixes although its result keeps the axis. An op that loses the axis needs no entry."""
    rule = _MIXING.get(op_name(node))
    if rule is not None:
        yield from rule(node)


def _along(position: int, name: str = "dim", default: Any = None) -> Callable[[Node], Iterator[Along]]:
    """For ops with a dimension, or several, among their arguments."""

    def mixed(node: Node) -> Iterator[Along]:
        given = argument(node, position, name, default)
        if isinstance(given, int):
            several = [dim for dim in node.args[position:] if isinstance(dim, int)] if name == "dims" else []
            yield argument(node, 0, "input"), several or (given,)  # flip(x, 1, 2)
        elif isinstance(given, (tuple, list)) and all(isinstance(dim, int) for dim in given):
            yield argument(node, 0, "input"), tuple(given)
        else:
            yield from _everything(node)

    return mixed


def _everything(node: Node) -> Iterator[Along]:
    for operand in node.all_input_nodes:
        yield operand, None


def _last(count: int) -> Callable[[Node], Iterator[Along]]:
    def mixed(node: Node) -> Iterator[Along]:
        yield argument(node, 0, "input"), range(-count, 0)

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


def _keys_and_values(node: Node) -> Iterator[Along]:
    """Each query is answered alone, from all keys and values."""
    for place, name in ((1, "key"), (2, "value")):
        yield argument(node, place, name), (-2,)


def _summed_letters(node: Node) -> Iterator[Along]:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    shapes = [shape_of(operand) for operand in operands]
    if not isinstance(equation, str) or None in shapes:
        yield from _everything(node)
        return
    terms, result = einsum_letters(equation, [len(shape or ()) for shape in shapes])
    for term, operand in zip(terms, operands, strict=False):
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
    **dict.fromkeys(("scaled_dot_product_attention", "earlytom::window_attention"), _keys_and_values),
    "masked_scatter": _everything,
    **dict.fromkeys(
        ("gather", "take_along_dim", "scatter", "scatter_add", "scatter_reduce", "index_select"), _everything
    ),
}
