"""Shorten the prompt to the placeholders that still have a token, and everything that runs along it.

::

    input_ids  a V V V V b    (V = video placeholder, 4 before, 2 after)
    keep_positions       ->   0 1 2 5
    take_positions(x)    ->   x[0] x[1] x[2] x[5]

The paper variant keeps as many for every video, so the new length is static. The released variant keeps what
the content asks for; rows then differ in length and are padded on the left with position -1.
"""

import math

import torch
from torch import Tensor


@torch.library.custom_op("earlytom::keep_positions", mutates_args=())
def keep_positions(input_ids: Tensor, video_token: int, before: int, after: int, length: int) -> Tensor:
    """Positions of each row that stay when every video goes from ``before`` to ``after`` placeholders.

    Every position that is no placeholder stays, and of every ``before`` consecutive placeholders of a row the
    first ``after`` (the k-th placeholder of a row stays iff k % before < after).

    Args:
        input_ids: int64 or int32 [R, S].
        video_token: id of the placeholder.
        before, after: placeholders of one video now and then, 0 <= after <= before, before >= 1.
        length: positions that stay in each row: S - videos of the row * (before - after), the same for all
            rows.

    Returns:
        int64 [R, length], ascending in each row.

    Raises:
        ValueError: a row whose placeholders are no multiple of ``before``, or that does not come to
            ``length``.
    """
    _check(input_ids, "keep_positions")
    if before < 1 or not 0 <= after <= before:
        raise ValueError(
            f"earlytom::keep_positions: before={before}, after={after}; before must be at least 1, after in [0, before]"
        )
    placeholder = input_ids == video_token
    index = placeholder.cumsum(1) - 1
    keep = ~placeholder | (index % before < after)
    stay, held = torch.stack([keep.sum(1), placeholder.sum(1)]).tolist()
    for row, (positions, placeholders) in enumerate(zip(stay, held, strict=True)):
        if placeholders % before or positions != length:
            raise ValueError(
                f"earlytom::keep_positions: row {row} has {placeholders} placeholders (token {video_token}) "
                f"in {input_ids.shape[1]} positions; videos of {before} cut to {after} leave {positions}, "
                f"not the length={length} asked for. Rows must hold whole videos, the same number of videos "
                f"each"
            )
    return _compact(keep, length, pad_left=False)


@keep_positions.register_fake
def _(input_ids: Tensor, video_token: int, before: int, after: int, length: int) -> Tensor:
    _check(input_ids, "keep_positions")
    return input_ids.new_empty((input_ids.shape[0], length), dtype=torch.int64)


@torch.library.custom_op("earlytom::keep_positions_ragged", mutates_args=())
def keep_positions_ragged(input_ids: Tensor, kept: Tensor, video_token: int, before: int) -> Tensor:
    """Positions that stay when each video keeps its own number of placeholders.

    Videos take the placeholders in reading order over the rows, ``before`` each; video v keeps its first
    ``kept[v]``.

    Args:
        input_ids: int64 or int32 [R, S], at least one row.
        kept: int64 [V], placeholders each video keeps, in [0, before].
        video_token: id of the placeholder.
        before: placeholders of one video now, at least 1.

    Returns:
        int64 [R, L], ascending in each row, L the longest row's length; shorter rows start with -1.

    Raises:
        ValueError: placeholders that are not V * before, a row that cuts a video in two, ``kept`` out of
            range, or nothing left at all.
    """
    _check_ragged(input_ids, kept)
    videos = kept.shape[0]
    if before < 1 or videos == 0 or 0 in input_ids.shape:
        raise ValueError(
            f"earlytom::keep_positions_ragged: before={before}, {videos} videos, input_ids "
            f"{list(input_ids.shape)}; all must be at least 1"
        )
    quota = kept.to(input_ids.device)
    placeholder = input_ids == video_token
    index = (placeholder.reshape(-1).cumsum(0) - 1).view(placeholder.shape).clamp_min_(0)
    keep = ~placeholder | (index % before < quota[(index // before).clamp_max_(videos - 1)])
    rows = input_ids.shape[0]
    numbers = torch.cat([keep.sum(1), placeholder.sum(1), quota]).tolist()
    stay, held, quotas = numbers[:rows], numbers[rows : 2 * rows], numbers[2 * rows :]
    if any(count % before for count in held) or sum(held) != videos * before:
        raise ValueError(
            f"earlytom::keep_positions_ragged: rows hold {held} placeholders (token {video_token}) for "
            f"{videos} videos of {before}; every row must hold whole videos and all rows together "
            f"{videos * before}"
        )
    if min(quotas) < 0 or max(quotas) > before or max(stay) == 0:
        raise ValueError(
            f"earlytom::keep_positions_ragged: kept={quotas}, rows left with {stay} positions; a video keeps "
            f"0 to {before} placeholders, and some position must stay"
        )
    return _compact(keep, max(stay), pad_left=True)


@keep_positions_ragged.register_fake
def _(input_ids: Tensor, kept: Tensor, video_token: int, before: int) -> Tensor:
    _check_ragged(input_ids, kept)
    longest = input_ids.shape[1]
    # torch takes an upper bound only above 2, and only where the length is known.
    bound = {"max": longest} if isinstance(longest, int) and longest > 2 else {}
    length = torch.library.get_ctx().new_dynamic_size(min=1, **bound)
    return input_ids.new_empty((input_ids.shape[0], length), dtype=torch.int64)


@torch.library.custom_op("earlytom::take_positions", mutates_args=())
def take_positions(x: Tensor, positions: Tensor, fill: float) -> Tensor:
    """The entries of ``x`` at ``positions`` along axis 1.

    Args:
        x: [R, S, ...], any dtype and strides: ids, masks, labels, position ids, embeddings.
        positions: int64 [R, L], in [-1, S).
        fill: value where the position is -1; must be representable in the dtype of ``x``.

    Returns:
        [R, L, ...], dtype of ``x``.

    Raises:
        ValueError: shapes that do not match, positions outside ``x``, or a fill its dtype cannot hold.
    """
    _check_take(x, positions)
    if not _holds(x.dtype, fill):
        raise ValueError(
            f"earlytom::take_positions: fill={fill} cannot be held by x of {x.dtype}; use a value of its range"
        )
    rows = x.shape[0]
    if positions.shape[0] != rows:
        raise ValueError(
            f"earlytom::take_positions: x has {rows} rows, positions {positions.shape[0]}; they must have the same"
        )
    if positions.numel() == 0:
        return x.new_empty((*positions.shape, *x.shape[2:]))
    low, high = torch.stack(positions.aminmax()).tolist()
    if low < -1 or high >= x.shape[1]:
        raise ValueError(
            f"earlytom::take_positions: positions run from {low} to {high}, x has {x.shape[1]} along axis 1; "
            f"use positions in [-1, {x.shape[1]}), -1 for padding"
        )
    row = torch.arange(rows, device=x.device)[:, None]
    out = x[row, positions.clamp_min(0)]
    if low < 0:
        out[positions < 0] = fill
    return out


@take_positions.register_fake
def _(x: Tensor, positions: Tensor, fill: float) -> Tensor:
    _check_take(x, positions)
    return x.new_empty((positions.shape[0], positions.shape[1], *x.shape[2:]))


def _check(input_ids: Tensor, op: str) -> None:
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"earlytom::{op}: input_ids must be int64 or int32 [rows, positions], got {input_ids.dtype} with "
            f"{input_ids.dim()} axes"
        )


def _check_ragged(input_ids: Tensor, kept: Tensor) -> None:
    _check(input_ids, "keep_positions_ragged")
    if kept.dim() != 1 or kept.dtype != torch.int64:
        raise ValueError(
            f"earlytom::keep_positions_ragged: kept must be int64 [videos], got {kept.dtype} with {kept.dim()} axes"
        )


def _check_take(x: Tensor, positions: Tensor) -> None:
    if x.dim() < 2 or positions.dim() != 2 or positions.dtype != torch.int64:
        raise ValueError(
            f"earlytom::take_positions: x must be [rows, length, ...] and positions int64 [rows, new "
            f"length], got {x.dim()} axes, and {positions.dtype} with {positions.dim()}"
        )


def _holds(dtype: torch.dtype, value: float) -> bool:
    if dtype.is_floating_point or dtype.is_complex:
        return True
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return math.isfinite(value) and value == int(value) and low <= value <= high


def _compact(keep: Tensor, width: int, pad_left: bool) -> Tensor:
    """int64 [R, width]: columns of the True entries of each row of ``keep`` in order, -1 for padding."""
    rows, columns = keep.shape
    place = keep.cumsum(1) - 1
    if pad_left:
        place += width - keep.sum(1, keepdim=True)
    place.masked_fill_(~keep, width)
    out = place.new_full((rows, width + 1), -1)
    out.scatter_(1, place, torch.arange(columns, device=keep.device).expand(rows, columns))
    return out[:, :width].contiguous()
