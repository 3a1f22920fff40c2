"""Attention of the places of a frame among those of their own window.

::

    places, sorted by window      0 0 0 0 1 1 1 1 2 2 3 3        windows = [2, 4, 2, 2]: two of 4 places, two of 2
    place 5 attends to            . . . . x x x x . . . .

Windows at the border of a picture are smaller, so that a frame has a few sizes of them; those of one size lie side by
side, and each size is one batched attention.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("earlytom::window_attention", mutates_args=())
def window_attention(query: Tensor, key: Tensor, value: Tensor, windows: Sequence[int], scale: float) -> Tensor:
    """softmax(q k^T * scale) v inside each window of each frame.

    Args:
        query, key, value: [T, H, S, d], one float dtype, any strides.
        windows: (number, places of each) of each size of windows, one after the other, in the order of the places.
        scale: factor on the scores before the softmax.

    Returns:
        [T, H, S, d], whose memory is [T, S, H, d]. A window's places depend on no others, bit for bit what
        ``scaled_dot_product_attention`` gives on them alone.

    Raises:
        ValueError: wrong ranks or dtypes, shapes that differ, an empty axis, or windows that are not S places.
    """
    check_windows("window_attention", windows, query, key, value)
    frames, heads, places, width = query.shape
    out = query.new_empty((frames, places, heads, width)).transpose(1, 2)
    for start, number, length in runs_of(windows):
        own = [in_windows(x, start, number, length) for x in (query, key, value)]
        mixed = F.scaled_dot_product_attention(own[0], own[1], own[2], scale=scale)
        whole = mixed.unflatten(0, (frames, number)).transpose(1, 2).flatten(2, 3)  # [T, H, number * length, d]
        out.narrow(2, start, number * length).copy_(whole)
    return out


@window_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, windows: Sequence[int], scale: float) -> Tensor:
    _check_ranks("window_attention", query, key, value)
    frames, heads, places, width = query.shape
    return query.new_empty((frames, places, heads, width)).transpose(1, 2)


def runs_of(windows: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first place, number of windows, places of each) of each size of windows."""
    start = 0
    for number, length in zip(windows[::2], windows[1::2], strict=True):
        yield start, number, length
        start += number * length


def in_windows(x: Tensor, start: int, number: int, length: int) -> Tensor:
    """[T, H, S, d] -> [T * number, H, length, d]: the windows of one size, each as if it were a frame."""
    run = x.narrow(2, start, number * length).unflatten(2, (number, length))
    return run.transpose(1, 2).flatten(0, 1)


def check_windows(op: str, windows: Sequence[int], *tensors: Tensor) -> None:
    """What an operator over windows has to refuse, all of it known without a look at the values."""
    _check_ranks(op, *tensors)
    shapes = [list(x.shape) for x in tensors]
    if any(shape != shapes[0] for shape in shapes) or 0 in shapes[0]:
        raise ValueError(
            f"earlytom::{op}: operands of shapes {', '.join(map(str, shapes))}; all must be the same [frames, heads, "
            "places, head_dim] without empty axes"
        )
    fits = len(windows) % 2 == 0 and all(size > 0 for size in windows)
    if not fits or sum(number * length for _, number, length in runs_of(windows)) != shapes[0][2]:
        raise ValueError(
            f"earlytom::{op}: windows {list(windows)} for {shapes[0][2]} places; they are pairs (number, places of "
            "each), all above 0, that add up to the places"
        )


def _check_ranks(op: str, *tensors: Tensor) -> None:
    if any(x.dim() != 4 or x.dtype != tensors[0].dtype for x in tensors) or not tensors[0].is_floating_point():
        raise ValueError(
            f"earlytom::{op}: operands must be [frames, heads, places, head_dim] of one float dtype, got "
            f"{', '.join(f'{x.dtype} with {x.dim()} axes' for x in tensors)}"
        )
