"""What ops that only rearrange say about axes: reshapes, permutations, copies, slices, indexing, joining.

view(x [8, 36, 48], 8, 6, 6, 48)       8 is 8, 36 = 6 x 6, 48 is 48; the 8 is spelled here
x[:, :81]  on an axis of 81            the axis goes on, 81 is spelled here
mask[(rows, arange(81))]               the indexed axis is the one that arange counts
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from earlytom_compile.passes.axis_algebra import Dim, Size, combine, finest_groups
from earlytom_compile.passes.axis_call import ONE, Call, Dims, NoRule, Outputs, Path, TensorAxes, rule, wrap

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


@rule("view", "reshape", "unsafe_view")
def view(call: Call, input: Any, *shape: Any, **named: Any) -> TensorAxes:
    dims = call.dims(input)
    if any(isinstance(x, torch.dtype) for x in (*shape, *named.values())):
        if len(dims) != len(call.out) or not all(d.size.same(n) for d, n in zip(dims, call.out, strict=True)):
            raise NoRule("a view as another type changes a size")
        return TensorAxes(dims)
    result = reshaped(call, dims, call.out)
    if (others := call.sizes_of_another(1, "shape", "size")) is not None:
        _unify_wide(call, result, others)
        return call.moved(input, result)
    spelled = call.literals(1, "shape" if "shape" in named else "size")
    for (literal, path), dim in zip(spelled, result, strict=True):
        if isinstance(literal, Node) or literal != -1:
            call.site(path, dim)
    return call.moved(input, result)


@rule("view_as", "reshape_as")
def view_as(call: Call, input: Any, other: Any) -> TensorAxes:
    result = reshaped(call, call.dims(input), call.out)
    _unify_wide(call, result, call.dims(other))
    return call.moved(input, result)


def _unify_wide(call: Call, dims: Dims, others: Dims) -> None:
    for dim, partner in zip(dims, others, strict=True):
        if not dim.size.is_(1):
            call.unify(dim, partner)


@rule("flatten", "ravel")
def flatten(call: Call, input: Any, start_dim: int = 0, end_dim: int = -1) -> TensorAxes:
    return call.moved(input, reshaped(call, call.dims(input), call.out))


@rule("unflatten")
def unflatten(call: Call, input: Any, dim: int, sizes: Sequence[Any]) -> TensorAxes:
    dims = call.dims(input)
    at = wrap(dim, len(dims))
    pieces = reshaped(call, dims[at : at + 1], call.out[at : at + len(sizes)])
    base = ("kwargs", "sizes") if "sizes" in call.node.kwargs else ("args", 2)
    for i, (literal, piece) in enumerate(zip(sizes, pieces, strict=True)):
        if isinstance(literal, Node) or literal != -1:
            call.site((*base, i), piece)
    return call.moved(input, (*dims[:at], *pieces, *dims[at + 1 :]))


@rule("unsqueeze")
def unsqueeze(call: Call, input: Any, dim: int) -> TensorAxes:
    dims = list(call.dims(input))
    dims.insert(wrap(dim, len(dims) + 1), Dim(ONE))
    return call.moved(input, tuple(dims))


@rule("squeeze")
def squeeze(call: Call, input: Any, dim: Any = None) -> TensorAxes:
    dims = call.dims(input)
    chosen = range(len(dims)) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {i for i in (wrap(d, len(dims)) for d in chosen) if dims[i].size.is_(1)}
    return call.moved(input, tuple(d for i, d in enumerate(dims) if i not in gone))


# Permutations


@rule("transpose", "swapaxes", "swapdims")
def transpose(call: Call, input: Any, dim0: int, dim1: int) -> TensorAxes:
    dims = list(call.dims(input))
    i, j = wrap(dim0, len(dims)), wrap(dim1, len(dims))
    dims[i], dims[j] = dims[j], dims[i]
    return call.moved(input, tuple(dims))


# torch 2.14 writes x.mT, x.mH and x.H as these operators of aten, 2.11 to 2.13 as attributes (below).
@rule("t", "adjoint", "mT", "mH", "matrix_H")
def last_two_swapped(call: Call, input: Any) -> TensorAxes:
    *lead, last = call.dims(input)
    return call.moved(input, (*lead[:-1], last, *lead[-1:]))


@rule("numpy_T")
def reverse(call: Call, input: Any) -> TensorAxes:
    return call.moved(input, call.dims(input)[::-1])


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
    return call.moved(input, tuple(dims[wrap(i, len(dims))] for i, _ in call.literals(1, "dims")))


@rule("movedim", "moveaxis")
def movedim(call: Call, input: Any, source: Any, destination: Any) -> TensorAxes:
    dims = call.dims(input)
    sources, destinations = (
        [wrap(d, len(dims)) for d in ([x] if isinstance(x, int) else x)] for x in (source, destination)
    )
    rest = iter(i for i in range(len(dims)) if i not in sources)
    moved = dict(zip(destinations, sources, strict=True))
    return call.moved(input, tuple(dims[moved[i] if i in moved else next(rest)] for i in range(len(dims))))


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
    return call.moved(input, tuple(result))


@rule("expand_as")
def expand_as(call: Call, input: Any, other: Any) -> TensorAxes:
    call.broadcast(call.dims(input), call.dims(other))
    return call.moved(input, call.dims(other))


@rule("broadcast_tensors")
def broadcast_tensors(call: Call, *tensors: Any) -> Outputs:
    tensors = tuple(tensors[0]) if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)) else tensors
    dims = call.broadcast(*(call.dims(x) for x in tensors))
    return Outputs(call.moved(x, dims) for x in tensors)


@rule("repeat", "tile")
def repeat(call: Call, input: Any, *_: Any, **__: Any) -> TensorAxes:
    """Times 1 keeps an axis, copies of a 1 are a new axis, all others a product ``copies x axis``."""
    spelled = call.literals(1, "dims" if call.name == "tile" else "repeats")
    dims = call.dims(input)
    old = [Dim(ONE)] * (len(spelled) - len(dims)) + list(dims)
    if len(spelled) < len(dims):
        raise NoRule("fewer repeats than axes")
    return call.moved(input, tuple(_copies(call, d, n, p, False) for d, (n, p) in zip(old, spelled, strict=True)))


@rule("repeat_interleave")
def repeat_interleave(call: Call, input: Any, repeats: Any, dim: Any = None, **_: Any) -> TensorAxes:
    if dim is None or call.is_tensor(repeats):
        raise NoRule("only a number of repeats along one axis is known")
    dims = list(call.dims(input))
    at = wrap(dim, len(dims))
    path = ("kwargs", "repeats") if "repeats" in call.node.kwargs else ("args", 1)
    dims[at] = _copies(call, dims[at], repeats, path, True)
    return call.moved(input, tuple(dims))


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
    return Outputs([call.moved(input, (*dims[:at], *dims[at + 1 :]))] * _count(call))


@rule("split", "chunk", "tensor_split", "split_with_sizes", "unsafe_split", "unsafe_chunk")
def split(call: Call, input: Any, parts: Any, dim: int = 0) -> Outputs:
    dims = call.dims(input)
    at = wrap(dim, len(dims))
    call.forbid([dims[at]], "is taken apart by")
    pieces = [call.pinned(Size.of(x.shape[at])) for x in call.node.meta["example_value"]]
    if isinstance(parts, (tuple, list)) and call.node.args[1:2] == (parts,):
        for i, piece in enumerate(pieces):
            call.site(("args", 1, i), piece)
    return Outputs(call.moved(input, (*dims[:at], piece, *dims[at + 1 :])) for piece in pieces)


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
