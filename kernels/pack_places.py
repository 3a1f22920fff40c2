"""Rows of active places only, and back: what lies around the layers that reuse what they computed before.

::

    source      0 0 0   ->   pack_places   index    0 1 2 4      flat places of the packed rows
    (2 frames)  0 1 0                      rows     0 1 2        the packed row that each place reads
                                                    0 3 2
                                           offsets  0 3 4        where the rows of each frame begin

    take_places     [N, S, D], index          ->   [1, T, D]         the active places' states
    return_places   and what became of them   ->   [N, S, D]         an inactive place changes as its source did
    spread_places   [1, H, T, d], rows        ->   [N, H, S, d]      every place with its source's query or key
"""

import torch
from torch import Tensor

from earlytom_compile.kernels.providers import Provider, provide

_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@torch.library.custom_op("earlytom::pack_places", mutates_args=())
def pack_places(source: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the active places of all videos go when their rows are packed, frame after frame.

    Args:
        source: int64 [V, F, S], from ``plan_reuse``; a place is active in frame f of its video if its source is f.
        total: active places of all videos, ``computed.sum()``.

    Returns:
        index: int64 [total], of each packed row its place, n * S + s in frame n = v * F + f.
        rows: int64 [V * F, S], the packed row of (source, s), which the place reads; its own if it is active.
        offsets: int64 [V * F + 1], the first packed row of each frame, and ``total``.

    Raises:
        ValueError: wrong rank or dtype, a ``total`` that is not the plan's, or sources that are not active. A
            provider that does not read values stays inside ``total`` rows instead.
    """
    check_pack(source, total)
    frame = torch.arange(source.shape[1], device=source.device)[:, None]
    active = source == frame
    if not ((source >= 0) & (source <= frame)).all() or not active.gather(1, source).all():
        raise ValueError(
            "earlytom::pack_places: source names frames in which the place is not computed; pass the source of "
            "plan_reuse, in which source[v, f, s] is source[v, f - 1, s] or f"
        )
    index = active.flatten().nonzero().flatten()
    if len(index) != total:
        raise ValueError(
            f"earlytom::pack_places: total={total}, but the source has {len(index)} active places; pass "
            f"total=int(computed.sum()) of the same plan"
        )
    packed = (active.flatten().cumsum(0) - 1).view_as(source)
    rows = packed.gather(1, source).flatten(0, 1)
    offsets = index.new_zeros(rows.shape[0] + 1)
    offsets[1:] = active.flatten(0, 1).sum(1).cumsum(0)
    return index, rows, offsets


@pack_places.register_fake
def _(source: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    _check_source(source)
    videos, frames, places = source.shape
    return (
        source.new_empty((total,)),
        source.new_empty((videos * frames, places)),
        source.new_empty((videos * frames + 1,)),
    )


@torch.library.custom_op("earlytom::take_places", mutates_args=())
def take_places(hidden: Tensor, index: Tensor) -> Tensor:
    """The packed rows.

    Args:
        hidden: [N, S, D], any dtype and strides.
        index: int64 [T], from ``pack_places``.

    Returns:
        [1, T, D], contiguous.

    Raises:
        ValueError: wrong rank or dtype, or places outside ``hidden``.
    """
    check_take(hidden, index)
    _check_inside(index, hidden.shape[0] * hidden.shape[1], "take_places", "index")
    return hidden.flatten(0, 1).index_select(0, index).unsqueeze(0)


@take_places.register_fake
def _(hidden: Tensor, index: Tensor) -> Tensor:
    _check_take(hidden, index)
    return hidden.new_empty((1, index.shape[0], hidden.shape[2]))


@torch.library.custom_op("earlytom::return_places", mutates_args=())
def return_places(hidden: Tensor, packed: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """All places again: an active one as its packed row, another changed by as much as the row that it reads.

    Over several layers that reuse it is enough to come back once behind the last one: the sum of a row's updates is
    what it is now less what it was.

    Args:
        hidden: [N, S, D], float, any strides: what ``take_places`` took the rows from.
        packed: [1, T, D], of the same dtype, any strides: what became of them.
        index, rows: int64 [T] and [N, S], from ``pack_places``.

    Returns:
        [N, S, D], contiguous. An active place is an exact copy; of another place p, hidden[p] + (packed[rows[p]] -
        hidden[index[rows[p]]]), computed in float32 (float64 stays float64) and rounded once.

    Raises:
        ValueError: wrong ranks or dtypes, shapes that do not match, or rows or places outside.
    """
    check_return(hidden, packed, index, rows)
    frames, places, channels = hidden.shape
    _check_inside(index, frames * places, "return_places", "index")
    _check_inside(rows, packed.shape[1], "return_places", "rows")
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    before = hidden.flatten(0, 1).index_select(0, index)
    update = packed[0].to(wide) - before.to(wide)
    out = hidden.new_empty(hidden.shape)
    moved = update.new_empty((places, channels))
    for frame in range(frames):  # one at a time stays in the cache
        torch.index_select(update, 0, rows[frame], out=moved)
        out[frame] = moved.add_(hidden[frame])
    out.view(-1, channels)[index] = packed[0]
    return out


@return_places.register_fake
def _(hidden: Tensor, packed: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    _check_return(hidden, packed, index, rows)
    return hidden.new_empty(hidden.shape)


@torch.library.custom_op("earlytom::spread_places", mutates_args=())
def spread_places(packed: Tensor, rows: Tensor) -> Tensor:
    """Queries or keys of all places, each with those of the row that it reads.

    Args:
        packed: [1, H, T, d], any dtype and strides.
        rows: int64 [N, S], from ``pack_places``.

    Returns:
        [N, H, S, d], whose memory is [N, S, H, d].

    Raises:
        ValueError: wrong rank or dtype, or rows outside ``packed``.
    """
    check_spread(packed, rows)
    _check_inside(rows, packed.shape[2], "spread_places", "rows")
    spread = packed[0].transpose(0, 1).index_select(0, rows.flatten())
    return spread.view(*rows.shape, *spread.shape[1:]).transpose(1, 2)


@spread_places.register_fake
def _(packed: Tensor, rows: Tensor) -> Tensor:
    _check_spread(packed, rows)
    _, heads, _, width = packed.shape
    return packed.new_empty((*rows.shape, heads, width)).transpose(1, 2)


def _check_source(source: Tensor) -> None:
    if source.dim() != 3 or source.dtype != torch.int64:
        raise ValueError(
            f"earlytom::pack_places: source must be int64 [videos, frames, places] as plan_reuse returns it, got "
            f"{source.dtype} with {source.dim()} axes"
        )


def check_pack(source: Tensor, total: int) -> None:
    """What a provider has to refuse, all of it known without a look at the values."""
    _check_source(source)
    videos, frames, places = source.shape
    least = videos * places
    if not 1 <= least <= total <= least * frames:
        raise ValueError(
            f"earlytom::pack_places: total={total} for source {list(source.shape)}; between {least}, the first frame "
            f"of each video, and {least * frames} places are active; pass total=int(computed.sum()) of the same plan"
        )


def _check_take(hidden: Tensor, index: Tensor) -> None:
    if hidden.dim() != 3 or index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(
            f"earlytom::take_places: hidden must be [frames, places, channels] and index int64 [rows] as pack_places "
            f"returns it, got {hidden.dim()} axes, and {index.dtype} with {index.dim()}"
        )


def check_take(hidden: Tensor, index: Tensor) -> None:
    """What a provider has to refuse, all of it known without a look at the values."""
    _check_take(hidden, index)
    if 0 in hidden.shape:
        raise ValueError(f"earlytom::take_places: hidden {list(hidden.shape)} is empty; no axis may be 0")


def _check_return(hidden: Tensor, packed: Tensor, index: Tensor, rows: Tensor) -> None:
    if hidden.dim() != 3 or packed.dim() != 3 or not hidden.is_floating_point() or packed.dtype != hidden.dtype:
        raise ValueError(
            f"earlytom::return_places: hidden must be [frames, places, channels] and packed [1, rows, channels] of one "
            f"float dtype, got {hidden.dtype} with {hidden.dim()} axes and {packed.dtype} with {packed.dim()}"
        )
    if index.dim() != 1 or rows.dim() != 2 or index.dtype != torch.int64 or rows.dtype != torch.int64:
        raise ValueError(
            f"earlytom::return_places: index must be int64 [rows] and rows int64 [frames, places] as pack_places "
            f"returns them, got {index.dtype} with {index.dim()} axes and {rows.dtype} with {rows.dim()}"
        )


def check_return(hidden: Tensor, packed: Tensor, index: Tensor, rows: Tensor) -> None:
    """What a provider has to refuse, all of it known without a look at the values."""
    _check_return(hidden, packed, index, rows)
    expected = (1, index.shape[0], hidden.shape[2])
    if packed.shape != expected or rows.shape != hidden.shape[:2] or 0 in (*hidden.shape, *packed.shape):
        raise ValueError(
            f"earlytom::return_places: packed {list(packed.shape)}, rows {list(rows.shape)} for hidden "
            f"{list(hidden.shape)} and {index.shape[0]} packed rows; packed must be {list(expected)} and rows "
            f"{list(hidden.shape[:2])}, all of one plan, without empty axes"
        )


def _check_spread(packed: Tensor, rows: Tensor) -> None:
    if packed.dim() != 4 or rows.dim() != 2 or rows.dtype != torch.int64:
        raise ValueError(
            f"earlytom::spread_places: packed must be [1, heads, rows, head_dim] and rows int64 [frames, places] as "
            f"pack_places returns them, got {packed.dim()} axes, and {rows.dtype} with {rows.dim()}"
        )


def check_spread(packed: Tensor, rows: Tensor) -> None:
    """What a provider has to refuse, all of it known without a look at the values."""
    _check_spread(packed, rows)
    if packed.shape[0] != 1 or 0 in packed.shape:
        raise ValueError(
            f"earlytom::spread_places: packed {list(packed.shape)} must be [1, heads, rows, head_dim] without empty "
            f"axes, the rows of all frames in one"
        )


def _check_inside(numbers: Tensor, limit: int, op: str, name: str) -> None:
    if numbers.numel() == 0:
        return
    low, high = torch.stack(numbers.aminmax()).tolist()
    if low < 0 or high >= limit:
        raise ValueError(
            f"earlytom::{op}: {name} runs from {low} to {high}, but there are {limit} to choose from; pass what "
            f"pack_places returned for these frames"
        )


def _triton_packs(source: Tensor, total: int) -> bool:
    return source.dtype == torch.int64 and source.dim() == 3


def _triton_copies(x: Tensor, numbers: Tensor) -> bool:
    return x.dtype in _TRITON_DTYPES


def _triton_returns(hidden: Tensor, packed: Tensor, index: Tensor, rows: Tensor) -> bool:
    return hidden.dtype in _TRITON_DTYPES


provide(pack_places, Provider("triton", ".triton_pack_places", supports=_triton_packs))
provide(take_places, Provider("triton", ".triton_take_places", supports=_triton_copies))
provide(return_places, Provider("triton", ".triton_return_places", supports=_triton_returns))
provide(spread_places, Provider("triton", ".triton_spread_places", supports=_triton_copies))
