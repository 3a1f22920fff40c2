"""Frames that repeat one before them to the last pixel need not be computed, even where all places are.

::

    frames   a a b b c      (equal letters are equal pixels)
    rows ->  0 0 1 1 2      the number of each frame among the distinct ones; 3 of them

``take_frames`` keeps the first of each, ``return_frames`` hands what was computed to those that repeat it.
"""

import torch
from torch import Tensor


@torch.library.custom_op("earlytom::distinct_frames", mutates_args=())
def distinct_frames(source: Tensor, change: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Number the frames of each video by their content, as ``plan_reuse`` saw it.

    Frame f repeats frame f - 1 if none of its patches is computed in it, and those of both frames do not differ at all
    from what they were last compared with: then the two are equal in every pixel that belongs to a patch.

    Args:
        source: int64 [V, F, S], of ``plan_reuse``.
        change: float32 [V, F, S], of the same plan.
        prefix: leading places without pixels, such as a class token.

    Returns:
        rows: int64 [V * F], the number of each frame among the distinct frames of all videos, in order.
        counts: int64 [V], distinct frames of each video.

    Raises:
        ValueError: shapes or dtypes that do not match, or a prefix that leaves no patch.
    """
    _check(source, change)
    if source.shape != change.shape or not 0 <= prefix < source.shape[2]:
        raise ValueError(
            f"earlytom::distinct_frames: source {list(source.shape)} and change {list(change.shape)} with "
            f"prefix={prefix}; both must have the same shape, and prefix be at least 0 and less than their places"
        )
    source, change = source[..., prefix:], change[..., prefix:]
    frame = torch.arange(source.shape[1], device=source.device)[:, None]
    exact = (source == frame) | (change == 0)
    repeats = ((source[:, 1:] == source[:, :-1]) & exact[:, :-1] & (change[:, 1:] == 0)).all(2)
    first = torch.nn.functional.pad(~repeats, (1, 0), value=True)
    return first.flatten().cumsum(0) - 1, first.sum(1)


@distinct_frames.register_fake
def _(source: Tensor, change: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    _check(source, change)
    videos, frames, _ = source.shape
    return source.new_empty((videos * frames,)), source.new_empty((videos,))


def _check(source: Tensor, change: Tensor) -> None:
    wrong = source.dim() != 3 or source.dtype != torch.int64 or change.dtype != torch.float32
    if wrong or change.dim() != 3:
        raise ValueError(
            f"earlytom::distinct_frames: source must be int64 and change float32, both [videos, frames, places] as "
            f"plan_reuse returns them, got {source.dtype} with {source.dim()} axes and {change.dtype} with "
            f"{change.dim()}"
        )


@torch.library.custom_op("earlytom::take_frames", mutates_args=())
def take_frames(x: Tensor, rows: Tensor, n: int) -> Tensor:
    """The first frame of each number.

    Args:
        x: [N, ...], one for each frame.
        rows: int64 [N] of ``distinct_frames``.
        n: distinct frames, ``int(counts.sum())``.

    Returns:
        A copy [n, ...].

    Raises:
        ValueError: shapes that do not match, or, on a CPU, another ``n``.
    """
    _check_rows("take_frames", x, rows)
    if x.shape[0] != rows.shape[0] or (rows.device.type == "cpu" and n != int(rows[-1:].sum()) + 1):
        raise ValueError(
            f"earlytom::take_frames: x {list(x.shape)} and n={n} for rows {rows.tolist()}; x must have as many frames "
            f"as rows, and n be the number of distinct ones"
        )
    return x.index_select(0, torch.searchsorted(rows, torch.arange(n, device=rows.device)))


@take_frames.register_fake
def _(x: Tensor, rows: Tensor, n: int) -> Tensor:
    _check_rows("take_frames", x, rows)
    return x.new_empty((n, *x.shape[1:]))


def _check_rows(op: str, x: Tensor, rows: Tensor) -> None:
    if x.dim() < 1 or rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(
            f"earlytom::{op}: rows must be int64 [frames] as distinct_frames returns them, and x [frames, ...], "
            f"got {rows.dtype} with {rows.dim()} axes and {x.dim()} axes"
        )


@torch.library.custom_op("earlytom::return_frames", mutates_args=())
def return_frames(x: Tensor, rows: Tensor) -> Tensor:
    """What was computed of the distinct frames, for all frames.

    Args:
        x: [n, ...], one for each distinct frame.
        rows: int64 [N] of ``distinct_frames``.

    Returns:
        A copy [N, ...].

    Raises:
        ValueError: rows of another dtype or shape.
    """
    _check_rows("return_frames", x, rows)
    return x.index_select(0, rows)


@return_frames.register_fake
def _(x: Tensor, rows: Tensor) -> Tensor:
    _check_rows("return_frames", x, rows)
    return x.new_empty((rows.shape[0], *x.shape[1:]))
