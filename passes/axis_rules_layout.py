"""What ops that only rearrange say about axes: reshapes, permutations, copies, slices, indexing, joining.

view(x [8, 36, 48], 8, 6, 6, 48)       8 is 8, 36 = 6 x 6, 48 is 48; the 8 is spelled here
x[:, :81]  on an axis of 81            the axis goes on, 81 is spelled here
mask[(rows, arange(81))]               the indexed axis is the one that arange counts
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .axis_algebra import Dim, Size, combine, finest_groups
from .axis_call import Call, Dims, NoRule, Outputs, Path, TensorAxes, rule, wrap

ONE = Size.of(1)


# Reshapes


def reshaped(call: Call, dims: Sequence[Dim], sizes: Sequence[Size]) -> Dims:
    """Row-major regrouping of ``dims`` into axes of ``sizes``, in the finest groups that match.

    A group of one axis on either side is that axis; any other group is one product written in two ways. Axes
    of size 1 are matched apart: they are partners where they stand between the same groups.
    """
    if any(size.is_(0) for size in sizes):
        return tuple(call.pinned(size) for size in sizes)
    wide = [dim for dim in dims if not dim.size.is_(1)]
    places = [i for i, size in enumerate(sizes) if not size.is_(1)]
    result: dict[int, Dim] = {}
    borders = {0: 0}
    groups = finest_groups("product", [dim.size for dim in wide], [sizes[i] for i in places])
    for ins, outs in groups:
        borders[outs.stop] = ins.stop
        sources, targets = wide[ins], places[outs]
        if not sources:
            continue  # nothing but axes of size 1
        if len(sources) == len(targets) == 1:
            result[targets[0]] = sources[0]
            continue
        for i in targets:
            result[i] = call.free(sizes[i])
        _one_product(call, sources, [result[i] for i in targets])
    ones = _ones_by_place(dims)
    wanted = _ones_by_place([result.get(i, i) for i in range(len(sizes))])
    for place, numbers in wanted.items():
        partners = ones.get(borders.get(place, -1), [])
        for k, i in enumerate(numbers):
            result[i] = partners[k] if len(partners) == len(numbers) else call.free(ONE)
    return tuple(result[i] for i in range(len(sizes)))


def _one_product(call: Call, sources: Sequence[Dim], targets: Sequence[Dim]) -> None:
    if len(sources) == 1:
        call.relate("product", sources[0], targets)
    elif len(targets) == 1:
        call.relate("product", targets[0], sources)
    else:
        whole = call.free(combine("product", [dim.size for dim in sources]))
        call.relate("product", whole, sources)
        call.relate("product", whole, targets)


def _ones_by_place(dims: Sequence[Any]) -> dict[int, list[Any]]:
    """Axes of size 1 by the number of wider axes before them; a plain number stands for such an axis."""
    places: dict[int, list[Any]] = {}
    before = 0
    for dim in dims:
        if isinstance(dim, Dim) and not dim.size.is_(1):
            before += 1
        else:
            places.setdefault(before, []).append(dim)
    return places


def _moved(call: Call, input: Any, dims: Dims) -> TensorAxes:
    """The same values under other axes: positions stay positions."""
    return TensorAxes(dims, call.index_of(input))


@rule("view", "reshape", "unsafe_view")
def view(call: Call, input: Any, *shape: Any, **named: Any) -> TensorAxes:
    dims = call.dims(input)
    if any(isinstance(x, torch.dtype) for x in (*shape, *named.values())):
        if len(dims) != len(call.out) or not all(d.size.same(n) for d, n in zip(dims, call.out, strict=True)):
            raise NoRule("a view as another type changes a size")
        return TensorAxes(dims)
    spelled = call.literals(1, "shape" if "shape" in named else "size")
    result = reshaped(call, dims, call.out)
    for (literal, path), dim in zip(spelled, result, strict=True):
        if isinstance(literal, Node) or literal != -1:
            call.site(path, dim)
    return _moved(call, input, result)


@rule("view_as", "reshape_as")
def view_as(call: Call, input: Any, other: Any) -> TensorAxes:
    result = reshaped(call, call.dims(input), call.out)
    for dim, partner in zip(result, call.dims(other), strict=True):
        if not dim.size.is_(1):
            call.unify(dim, partner)
    return _moved(call, input, result)


@rule("flatten", "ravel")
def flatten(call: Call, input: Any, start_dim: int = 0, end_dim: int = -1) -> TensorAxes:
    return _moved(call, input, reshaped(call, call.dims(input), call.out))


@rule("unflatten")
def unflatten(call: Call, input: Any, dim: int, sizes: Sequence[Any]) -> TensorAxes:
    dims = call.dims(input)
    at = wrap(dim, len(dims))
    pieces = reshaped(call, dims[at : at + 1], call.out[at : at + len(sizes)])
    base = ("kwargs", "sizes") if "sizes" in call.node.kwargs else ("args", 2)
    for i, (literal, piece) in enumerate(zip(sizes, pieces, strict=True)):
        if isinstance(literal, Node) or literal != -1:
            call.site((*base, i), piece)
    return _moved(call, input, (*dims[:at], *pieces, *dims[at + 1 :]))


@rule("unsqueeze")
def unsqueeze(call: Call, input: Any, dim: int) -> TensorAxes:
    dims = list(call.dims(input))
    dims.insert(wrap(dim, len(dims) + 1), Dim(ONE))
    return _moved(call, input, tuple(dims))


@rule("squeeze")
def squeeze(call: Call, input: Any, dim: Any = None) -> TensorAxes:
    dims = call.dims(input)
    chosen = range(len(dims)) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {i for i in (wrap(d, len(dims)) for d in chosen) if dims[i].size.is_(1)}
    return _moved(call, input, tuple(d for i, d in enumerate(dims) if i not in gone))


# Permutations


@rule("transpose", "swapaxes", "swapdims")
def transpose(call: Call, input: Any, dim0: int, dim1: int) -> TensorAxes:
    dims = list(call.dims(input))
    i, j = wrap(dim0, len(dims)), wrap(dim1, len(dims))
    dims[i], dims[j] = dims[j], dims[i]
    return _moved(call, input, tuple(dims))


@rule("t", "adjoint")
def last_two_swapped(call: Call, input: Any) -> TensorAxes:
    *lead, last = call.dims(input)
    return _moved(call, input, (*lead[:-1], last, *lead[-1:]))


@rule("getattr")
def attribute(call: Call, input: Any, name: str) -> TensorAxes:
    if name in ("mT", "mH") or (name in ("T", "H") and len(call.out) <= 2):
        return last_two_swapped(call, input)
    if name in ("data", "real", "imag"):
        return TensorAxes(call.dims(input))
    raise NoRule(f"the attribute {name}")


@rule("permute")
def permute(call: Call, input: Any, *_: Any, **__: Any) -> TensorAxes:
    dims = call.dims(input)
    return _moved(call, input, tuple(dims[wrap(i, len(dims))] for i, _ in call.literals(1, "dims")))


@rule("movedim", "moveaxis")
def movedim(call: Call, input: Any, source: Any, destination: Any) -> TensorAxes:
    dims = call.dims(input)
    sources, destinations = (
        [wrap(d, len(dims)) for d in ([x] if isinstance(x, int) else x)] for x in (source, destination)
    )
    rest = iter(i for i in range(len(dims)) if i not in sources)
    moved = dict(zip(destinations, sources, strict=True))
    return _moved(call, input, tuple(dims[moved[i] if i in moved else next(rest)] for i in range(len(dims))))


# Copies


@rule("expand", "broadcast_to")
def expand(call: Call, input: Any, *_: Any, **__: Any) -> TensorAxes:
    dims = call.dims(input)
    spelled = call.literals(1)
    missing = len(spelled) - len(dims)
    result = []
    for i, ((literal, path), size) in enumerate(zip(spelled, call.out, strict=True)):
        old = dims[i - missing] if i >= missing else None
        if old is None or (old.size.is_(1) and not size.is_(1)):
            result.append(call.free(size, path))
        else:
            result.append(old)
            if isinstance(literal, Node) or literal != -1:
                call.site(path, old)
    return _moved(call, input, tuple(result))


@rule("expand_as")
def expand_as(call: Call, input: Any, other: Any) -> TensorAxes:
    call.broadcast(call.dims(input), call.dims(other))
    return _moved(call, input, call.dims(other))


@rule("broadcast_tensors")
def broadcast_tensors(call: Call, *tensors: Any) -> Outputs:
    tensors = tuple(tensors[0]) if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)) else tensors
    dims = call.broadcast(*(call.dims(x) for x in tensors))
    return Outputs(_moved(call, x, dims) for x in tensors)


@rule("repeat", "tile")
def repeat(call: Call, input: Any, *_: Any, **__: Any) -> TensorAxes:
    """Times 1 keeps an axis, copies of a 1 are a new axis, all others a product ``copies x axis``."""
    spelled = call.literals(1, "dims" if call.name == "tile" else "repeats")
    dims = call.dims(input)
    old = [Dim(ONE)] * (len(spelled) - len(dims)) + list(dims)
    if len(spelled) < len(dims):
        raise NoRule("fewer repeats than axes")
    return _moved(call, input, tuple(_copies(call, d, n, p, False) for d, (n, p) in zip(old, spelled, strict=True)))


@rule("repeat_interleave")
def repeat_interleave(call: Call, input: Any, repeats: Any, dim: Any = None, **_: Any) -> TensorAxes:
    if dim is None or call.is_tensor(repeats):
        raise NoRule("only a number of repeats along one axis is known")
    dims = list(call.dims(input))
    at = wrap(dim, len(dims))
    path = ("kwargs", "repeats") if "repeats" in call.node.kwargs else ("args", 1)
    dims[at] = _copies(call, dims[at], repeats, path, True)
    return _moved(call, input, tuple(dims))


def _copies(call: Call, dim: Dim, copies: Any, path: Path, inner: bool) -> Dim:
    count = call.size_of(copies)
    if count.is_(1):
        return dim
    number = call.free(count, path)
    if dim.size.is_(1):
        return number
    whole = call.free(combine("product", [count, dim.size]))
    call.relate("product", whole, (dim, number) if inner else (number, dim))
    return whole


# Slices

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
    return _moved(call, input, tuple(dims))


@rule("select")
def select(call: Call, input: Any, dim: int, index: Any) -> TensorAxes:
    dims = call.dims(input)
    at = wrap(dim, len(dims))
    _picked(call, dims[at], index)
    return _moved(call, input, (*dims[:at], *dims[at + 1 :]))


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
    return _moved(call, input, dims)


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
    return _moved(call, input, tuple(dims))


@rule("gather", "take_along_dim")
def gather(call: Call, input: Any, dim: int, index: Any, **_: Any) -> TensorAxes:
    _beside(call, input, dim, index)
    return _moved(call, input, call.dims(index))


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


# Joining and taking apart


@rule("cat", "concat", "concatenate")
def cat(call: Call, tensors: Sequence[Any], dim: int = 0) -> Dims:
    """Legacy empty tensors ``[0]`` count for nothing."""
    shapes = [call.dims(x) for x in tensors]
    shapes = [s for s in shapes if not (len(s) == 1 and s[0].size.is_(0))] or shapes[:1]
    at = wrap(dim, len(shapes[0]))
    joined = [shape[at] for shape in shapes]
    for other in shapes[1:]:
        for i, (a, b) in enumerate(zip(shapes[0], other, strict=True)):
            if i != at and not a.size.is_(1):
                call.unify(a, b)
    whole = joined[0]
    if len(joined) > 1:
        whole = call.free(call.out[at])
        call.relate("sum", whole, joined)
    return (*shapes[0][:at], whole, *shapes[0][at + 1 :])


@rule("stack")
def stack(call: Call, tensors: Sequence[Any], dim: int = 0) -> Dims:
    shapes = [call.dims(x) for x in tensors]
    for other in shapes[1:]:
        for a, b in zip(shapes[0], other, strict=True):
            if not a.size.is_(1):
                call.unify(a, b)
    at = wrap(dim, len(shapes[0]) + 1)
    return (*shapes[0][:at], call.pinned(call.out[at]), *shapes[0][at:])


@rule("unbind")
def unbind(call: Call, input: Any, dim: int = 0) -> Outputs:
    dims = call.dims(input)
    at = wrap(dim, len(dims))
    call.forbid([dims[at]], "is taken apart by")
    return Outputs([_moved(call, input, (*dims[:at], *dims[at + 1 :]))] * _count(call))


@rule("split", "chunk", "tensor_split", "split_with_sizes", "unsafe_split", "unsafe_chunk")
def split(call: Call, input: Any, parts: Any, dim: int = 0) -> Outputs:
    dims = call.dims(input)
    at = wrap(dim, len(dims))
    call.forbid([dims[at]], "is taken apart by")
    pieces = [call.pinned(Size.of(x.shape[at])) for x in call.node.meta["example_value"]]
    if isinstance(parts, (tuple, list)) and call.node.args[1:2] == (parts,):
        for i, piece in enumerate(pieces):
            call.site(("args", 1, i), piece)
    return Outputs(_moved(call, input, (*dims[:at], piece, *dims[at + 1 :])) for piece in pieces)


def _count(call: Call) -> int:
    return len(call.node.meta["example_value"])


@rule("pad")
def pad(call: Call, input: Any, pad: Sequence[Any], *_: Any, **__: Any) -> Dims:
    """Pairs of margins, last axis first: an axis grows by its margins whatever its size."""
    dims = list(call.dims(input))
    for i in range(len(pad) // 2):
        before, after = pad[2 * i : 2 * i + 2]
        at = len(dims) - 1 - i
        if not (isinstance(before, int) and isinstance(after, int) and before >= 0 and after >= 0):
            call.forbid([dims[at]], "is padded by")
            dims[at] = call.pinned(call.out[at])
        elif before or after:
            whole = call.free(call.out[at])
            margins = [call.pinned(Size.of(n)) for n in (before, after)]
            call.relate("sum", whole, (margins[0], dims[at], margins[1]))
            dims[at] = whole
    return tuple(dims)


@rule("view_as_complex")
def view_as_complex(call: Call, input: Any) -> Dims:
    return call.dims(input)[:-1]


@rule("view_as_real")
def view_as_real(call: Call, input: Any) -> Dims:
    return (*call.dims(input), call.pinned(call.out[-1]))
