"""Which pieces of a graph compute every frame from that frame alone, as runs that any number of frames may go through.

    before | layer 0 ... layer 6 | merge | layer 7 ... layer 21 | merge | layer 22 ... projector | selection ...
    `-------- a run -----------'          `------- a run -----'          `------- a run -------'

A long video goes through a run in chunks, and what the run makes of them is put together: nobody needs the memory that
a layer takes for all frames at once. That changes nothing where the frames, or some equal number of places of each, are
the outermost axis of all that a piece reads and hands out, and no operator in it mixes along that axis. Which axis that
is the axis inference says (axes.py), from the size known at run time only that counts the frames; a number that happens
to be equal is none. An operator without an axis rule ends a run.
"""

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from earlytom_compile.passes.axes import OURS, AxisMap
from earlytom_compile.passes.axes import op_name as full_name
from earlytom_compile.passes.axis_algebra import Dim, Size
from earlytom_compile.passes.axis_call import Outputs, TensorAxes
from earlytom_compile.passes.graph_order import writes
from earlytom_compile.passes.patterns import value_of
from earlytom_compile.passes.positions import UNIFORM, mixed_dims
from earlytom_compile.passes.split_stages import FRAME_BY_FRAME, Piece

_LIKE = frozenset(("to", "type_as", "expand_as", "view_as", "reshape_as"))
"""Operators that read nothing of their further arguments but shape and dtype."""
_INDEXED = {"getitem": 0, "index_select": 0, "embedding": 1}
"""Operators that take places of an argument, which, as another tensor says."""


@dataclass(frozen=True)
class Share:
    """How many places of a tensor's axis, or how much of a number, belong to each frame."""

    axis: int | None  # None: of a number
    each: int


@dataclass
class FrameRun:
    """Pieces in a row, all of them frame by frame, of as many frames as ``frames`` says."""

    frames: sympy.Symbol
    pieces: list[Piece]


def find_frame_runs(pieces: Sequence[Piece], counts: Container[sympy.Symbol]) -> list[FrameRun]:
    """The runs of ``pieces`` in which the frames are counted by one of ``counts``. Those that hold operators of ours,
    which look at all frames, are in none."""
    runs, before = list[FrameRun](), None
    for piece in pieces:
        frames = _count_of(piece, counts)
        if frames is not None and _is_frame_wise(piece, frames):
            if frames != before:
                runs.append(FrameRun(frames, []))
            runs[-1].pieces.append(piece)
            before = frames
        else:
            before = None
    return runs


def share_of(value: Any, frames: sympy.Symbol) -> Share | None:
    """What of ``value`` belongs to each of ``frames``; None if nothing does. Raises ValueError where it has to do with
    their number in any other way."""
    if isinstance(value, torch.Tensor):
        sizes = [Size.of(size).expr for size in value.shape]
        if not any(frames in size.free_symbols for size in sizes):
            return None
        axis = next(i for i, size in enumerate(sizes) if size != 1)
        each = _multiple(sizes[axis], frames)
        inner = (*sizes[axis + 1 :], *(Size.of(stride).expr for stride in value.stride()[axis:]))
        if each is not None and not any(frames in size.free_symbols for size in inner):
            return Share(axis, each)
    elif isinstance(value, torch.SymInt):
        expression = Size.of(value).expr
        if frames not in expression.free_symbols:
            return None
        if (each := _multiple(expression, frames)) is not None:
            return Share(None, each)
    elif not isinstance(value, (torch.SymFloat, torch.SymBool)) or frames not in value.node.expr.free_symbols:
        return None
    raise ValueError(f"{value} is not so much for each of {frames} frames")


def _multiple(size: sympy.Expr, frames: sympy.Symbol) -> int | None:
    ratio = sympy.cancel(size / frames)
    return int(ratio) if ratio.is_Integer and ratio > 0 else None


def _count_of(piece: Piece, counts: Container[sympy.Symbol]) -> sympy.Symbol | None:
    """The one of ``counts`` that sizes of the piece's tensors mention; None if there are none, or several."""
    tensors = (value for value in piece.inputs if isinstance(value, torch.Tensor))
    sizes = (Size.of(size).expr for tensor in tensors for size in tensor.shape)
    found = {symbol for size in sizes for symbol in size.free_symbols if symbol in counts}
    return found.pop() if len(found) == 1 else None


def _is_frame_wise(piece: Piece, frames: sympy.Symbol) -> bool:
    """Whether every operator of a piece computes each frame of what it makes from that frame of what it reads."""
    try:
        return _Frames(piece, frames).stay_apart()
    except ValueError:
        return False


class _Frames:
    """The frames' axis in all that a piece makes."""

    def __init__(self, piece: Piece, frames: sympy.Symbol) -> None:
        self._nodes = list(piece.graph_module.graph.nodes)
        self._frames = frames
        self._axes = AxisMap.infer(piece.graph_module)
        starts = (self._axes.dim(node, i) for node in self._nodes if node.op == "placeholder" for i in self._axis(node))
        self._dims = self._and_their_wholes({dim.root for dim in starts})

    def stay_apart(self) -> bool:
        if any(writes(node) or _looks_at_all(node) for node in self._nodes) or self._counts():
            return False
        for node in self._nodes[-1].all_input_nodes:
            share_of(value_of(node), self._frames)  # of what is handed out, numbers included
        # In the order of the graph: what operators of ours make is known to have the axis by then.
        kept = all(map(self._keeps, self._nodes))
        return kept and not any(self._is_watched(obstacle.dims) for obstacle in self._axes.obstacles)

    def _axis(self, node: Node) -> tuple[int, ...]:
        share = share_of(value_of(node), self._frames)
        return () if share is None or share.axis is None else (share.axis,)

    def _counts(self) -> bool:
        """Whether the number of frames is computed with."""
        numbers = (use.number for use in self._axes.sizes_as_values if isinstance(use.number, Node))
        return any(share_of(value_of(number), self._frames) is not None for number in numbers)

    def _keeps(self, node: Node) -> bool:
        """Whether what ``node`` makes has the axis once if what it reads has it, and nothing meets on it."""
        if not node.op.startswith("call"):
            return True
        made = [value for value in _leaves(value_of(node)) if isinstance(value, torch.Tensor)]
        read = [source for source in self._numbers_of(node) if self._is_watched(self._dims_of(source))]
        if not read:
            return full_name(node) in UNIFORM or not any(map(self._counts_frames, made))
        if full_name(node) in FRAME_BY_FRAME:
            self._dims = self._and_their_wholes(self._dims | {each.dims[0].root for each in self._results(node)})
            return all(self._is_watched(self._dims_of(source)[:1]) for source in read)
        return not made or (all(map(self._has_frames, self._results(node))) and not self._mixes(node))

    @staticmethod
    def _numbers_of(node: Node) -> list[Node]:
        """The arguments whose numbers ``node`` computes with."""
        name = full_name(node)
        return [] if name.startswith("new_") else node.all_input_nodes[: 1 if name in _LIKE else None]

    def _counts_frames(self, tensor: torch.Tensor) -> bool:
        return any(self._frames in Size.of(size).expr.free_symbols for size in tensor.shape)

    def _mixes(self, node: Node) -> bool:
        place = _INDEXED.get(full_name(node))
        if place is not None and self._is_watched(self._dims_of(node.args[place])):
            # Places that are the same for all frames are inside them, or the axis is gone.
            others = (read for read in node.all_input_nodes if read is not node.args[place])
            return any(self._is_watched(self._dims_of(read)) for read in others)
        for operand, along in mixed_dims(node):
            dims = self._dims_of(operand)
            if self._is_watched(dims if along is None else [dims[i] for i in along if -len(dims) <= i < len(dims)]):
                return True
        return False

    def _results(self, node: Node) -> Iterator[TensorAxes]:
        value = self._axes.values.get(node)
        for each in value if isinstance(value, Outputs) else (value,):
            yield each if isinstance(each, TensorAxes) else TensorAxes(())

    def _has_frames(self, tensor: TensorAxes) -> bool:
        """Whether one axis of a tensor is the frames', as large as so many for each, and no other has to do with
        them."""
        dims = [dim for dim in tensor.dims if self._is_watched((dim,)) or self._frames in dim.size.expr.free_symbols]
        return len(dims) == 1 and self._is_watched(dims) and _multiple(dims[0].size.expr, self._frames) is not None

    def _dims_of(self, node: Any) -> Sequence[Dim]:
        value = self._axes.values.get(node) if isinstance(node, Node) else None
        several = value if isinstance(value, Outputs) else (value,)
        return [dim for each in several if isinstance(each, TensorAxes) for dim in each.dims]

    def _is_watched(self, dims: Iterable[Dim]) -> bool:
        return any(dim.root in self._dims for dim in dims)

    def _and_their_wholes(self, dims: set[Dim]) -> set[Dim]:
        """``dims``, what they are the outermost part of, and what is the outermost part of them."""
        before = 0
        while before < len(dims):
            before = len(dims)
            for relation in self._axes.space.relations:
                first, whole = relation.parts[0].root, relation.whole.root
                if relation.kind == "product" and (first in dims or whole in dims):
                    dims |= {first, whole}
        return dims


def _looks_at_all(node: Node) -> bool:
    name = full_name(node)
    return name.startswith(f"{OURS}::") and name not in FRAME_BY_FRAME


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    elif value is not None:
        yield value
