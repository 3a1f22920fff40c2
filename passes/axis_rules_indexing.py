"""What slicing and indexing say about axes.

    x[:, :81]  on an axis of 81            the axis goes on, 81 is spelled here
    x[:, -1:]                              one position, however many there are
    mask[(rows, arange(81))]               the indexed axis is the one that arange counts

What a slice or an index leaves of an axis is right only while the axis keeps its size, with few exceptions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from earlytom_compile.passes.axis_algebra import Dim, Size
from earlytom_compile.passes.axis_call import ONE, Call, Dims, NoRule, Path, TensorAxes, rule, wrap

Piece = Callable[[Size], Dim]
"""An axis of an indexing result, made once its size is known."""


def sliced(call: Call, dim: Dim, part: slice, stop_path: Path) -> Dim | Piece:
    """``x[:]`` and ``x[:size]`` keep the axis, ``x[:k]`` spells a new one, ``x[-k:]`` is k at any size."""
    start, stop = part.start, part.stop
    plain = part.step is None or part.step == 1
    from_start = plain and (start is None or (isinstance(start, int) and start == 0))
    if from_start and stop is None:
        return dim
    if from_start and (isinstance(stop, Node) or stop >= 0):
        size = call.size_of(stop)
        if size.same(dim.size):
            call.site(stop_path, dim)
            return dim
        if dim.size.hint is not None and size.hint is not None and size.hint > dim.size.hint:
            return dim
        call.forbid([dim], "is cut to its first positions by")
        return lambda size: call.free(size, stop_path)
    tail = plain and stop is None and isinstance(start, int) and start < 0
    if not (tail and dim.size.hint is not None and -start < dim.size.hint):
        call.forbid([dim], "is cut into parts by")
    return call.pinned


@rule("narrow")
def narrow(call: Call, input: Any, dim: int, start: Any, length: Any) -> TensorAxes:
    dims = list(call.dims(input))
    at = wrap(dim, len(dims))
    path = ("kwargs", "length") if "length" in call.node.kwargs else ("args", 3)
    if isinstance(start, int) and (start == 0 or (start < 0 and length == -start)):
        piece = sliced(call, dims[at], slice(None, length) if start == 0 else slice(start, None), path)
    else:
        call.forbid([dims[at]], "is cut into parts by")
        piece = call.pinned
    dims[at] = piece if isinstance(piece, Dim) else piece(call.out[at])
    return call.moved(input, tuple(dims))


@rule("select")
def select(call: Call, input: Any, dim: int, index: Any) -> TensorAxes:
    dims = call.dims(input)
    at = wrap(dim, len(dims))
    _picked(call, dims[at], index)
    return call.moved(input, (*dims[:at], *dims[at + 1 :]))


def _picked(call: Call, dim: Dim, index: Any) -> None:
    """The first position, and positions counted from the end, mean the same at any size."""
    if isinstance(index, Node) or index > 0:
        call.forbid([dim], "is read at one position by")


# Indexing


@dataclass(frozen=True)
class Indexed:
    """An axis indexed by a tensor of positions [dims] or, where None, by a mask over it and its neighbours."""

    dims: Dims | None


Entry = Dim | Piece | Indexed


@rule("getitem")
def getitem(call: Call, input: Any, index: Any) -> TensorAxes:
    entries = _index_entries(call, input, index)
    indexed = [i for i, entry in enumerate(entries) if isinstance(entry, Indexed)]
    plain = [entry for entry in entries if not isinstance(entry, Indexed)]
    block = _index_block(call, [entries[i] for i in indexed], len(call.out) - len(plain))
    # Tensors that stand together leave their axes in place, others move theirs to the front.
    together = bool(indexed) and indexed[-1] - indexed[0] == len(indexed) - 1
    before = indexed[0] if together else 0
    layout = [*plain[:before], *block, *plain[before:]]
    if len(layout) != len(call.out):
        raise NoRule("this indexing has another rank than expected")
    dims = tuple(x if isinstance(x, Dim) else x(size) for x, size in zip(layout, call.out, strict=True))
    return call.moved(input, dims)


@rule("setitem")
def setitem(call: Call, input: Any, index: Any, value: Any) -> None:
    """``x[:, :n] = value`` over whole axes; anything else must not meet an axis that changes."""
    entries = _index_entries(call, input, index)
    kept = [entry for entry in entries if isinstance(entry, Dim)]
    values = call.dims(value) if call.is_tensor(value) else ()
    if len(kept) == len(entries):
        call.broadcast(kept, values)
    else:
        call.forbid((*call.dims(input), *values), "is written in parts by")


def _index_entries(call: Call, input: Any, index: Any) -> list[Any]:
    """What becomes of each axis of ``input``, in order, and the new axes that ``None`` makes."""
    dims = list(call.dims(input))
    items = list(index) if isinstance(index, tuple) else [index]
    paths: list[Path] = [("args", 1, i) for i in range(len(items))] if isinstance(index, tuple) else [("args", 1)]
    if not any(item is Ellipsis for item in items):
        items, paths = [*items, Ellipsis], [*paths, ()]
    taken = [_axes_taken(call, item) for item in items]
    entries: list[Any] = []
    for i, (item, path) in enumerate(zip(items, paths, strict=True)):
        count = len(dims) - sum(taken[i:]) if item is Ellipsis else taken[i]
        here, dims = dims[:count], dims[count:]
        if item is None:
            entries.append(Dim(ONE))
        elif item is Ellipsis:
            entries += here
        elif isinstance(item, slice):
            entries.append(sliced(call, here[0], item, (*path, "stop")))
        elif call.is_tensor(item):
            entries += _indexed_by(call, input, here, item)
        else:
            _picked(call, here[0], item)
    return entries


def _axes_taken(call: Call, item: Any) -> int:
    if item is None or item is Ellipsis:
        return 0
    if isinstance(item, (bool, list)):
        raise NoRule("an index is a list or a bool")
    return len(call.dims(item)) if _is_mask(call, item) else 1


def _is_mask(call: Call, item: Any) -> bool:
    return call.is_known(item) and item.meta["example_value"].dtype in (torch.bool, torch.uint8)


def _indexed_by(call: Call, input: Node, here: Sequence[Dim], item: Node) -> list[Indexed]:
    index = call.tensor(item)
    if _is_mask(call, item):
        for dim, partner in zip(here, index.dims, strict=True):
            call.broadcast([dim], [partner])
        return [Indexed(None)] * len(here)
    link(call, input, here[0], index)
    return [Indexed(index.dims)]


def _index_block(call: Call, indexed: Sequence[Indexed], rank: int) -> tuple[Dim | Piece, ...]:
    """The axes that the index tensors make together; a mask makes one, as long as it has true entries."""
    shapes = [entry.dims for entry in indexed if entry.dims is not None]
    if len(shapes) == len(indexed):
        return call.broadcast(*shapes)
    if shapes or rank != 1:
        raise NoRule("a mask stands beside other indices")
    return (call.pinned,)


def link(call: Call, source: Node, dim: Dim, positions: TensorAxes) -> None:
    """``dim`` of ``source`` is indexed by positions: it is the axis they count, if that is known.

    A table among the weights may be longer than the axis that reads it, so its length is left alone.
    """
    if dim.size.is_(1) or is_weight(source):
        return
    counted = positions.index_of
    if counted is not None and counted.size.same(dim.size):
        call.unify(counted, dim)
    else:
        call.forbid([dim], "is indexed by positions on an unknown axis in")


def is_weight(node: Node) -> bool:
    """True for parameters and buffers, whose shapes never change."""
    if node.op == "get_attr":
        return True
    example = node.meta.get("example_value")
    described = node.meta.get("tensor_dict") or {}
    return node.op == "placeholder" and (
        isinstance(example, torch.nn.Parameter) or "_dynamo_static_input_type" in described
    )


@rule("index_select")
def index_select(call: Call, input: Any, dim: int, index: Any) -> TensorAxes:
    dims = list(call.dims(input))
    at = wrap(dim, len(dims))
    link(call, input, dims[at], call.tensor(index))
    dims[at] = call.dims(index)[0] if call.dims(index) else Dim(ONE)
    return call.moved(input, tuple(dims))


@rule("gather", "take_along_dim")
def gather(call: Call, input: Any, dim: int, index: Any, **_: Any) -> TensorAxes:
    _beside(call, input, dim, index)
    return call.moved(input, call.dims(index))


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(call: Call, input: Any, dim: int, index: Any, src: Any = None, *_: Any, **__: Any) -> Dims:
    _beside(call, input, dim, index)
    if call.is_tensor(src):
        for a, b in zip(call.dims(index), call.dims(src), strict=True):
            _together(call, a, b)
    return call.dims(input)


def _beside(call: Call, input: Any, dim: int, index: Any) -> None:
    dims, positions = call.dims(input), call.tensor(index)
    at = wrap(dim, len(dims))
    link(call, input, dims[at], positions)
    for i, (a, b) in enumerate(zip(dims, positions.dims, strict=True)):
        if i != at:
            _together(call, a, b)


def _together(call: Call, a: Dim, b: Dim) -> None:
    """Partners of gather and scatter, where one may be a part of the other."""
    if a.size.same(b.size):
        if not a.size.is_(1):
            call.unify(a, b)
    else:
        call.forbid([a, b], "is matched in part by")
