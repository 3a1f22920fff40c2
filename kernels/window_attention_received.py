"""Importance of a place where attention stays inside windows: what it receives from the places of its own window.

::

    windows [2, 4, 2, 2] of 12 places   ->   attention_received of each window alone, times its share of the places
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from earlytom_compile.kernels.attention_received import attention_received
from earlytom_compile.kernels.window_attention import check_windows, in_windows, runs_of


@torch.library.custom_op("earlytom::window_attention_received", mutates_args=())
def window_attention_received(query: Tensor, key: Tensor, windows: Sequence[int], scale: float) -> Tensor:
    """Mean over heads and query positions of the attention each place receives, none of it from other windows.

    Args:
        query, key: [T, H, S, d], one float dtype, any strides.
        windows: (number, places of each) of each size of windows, as ``window_attention`` takes them.
        scale: factor on the scores before the softmax.

    Returns:
        float32 [T, S]; each row sums to 1, each window to its share of the S places.

    Raises:
        ValueError: as ``window_attention``.
    """
    check_windows("window_attention_received", windows, query, key)
    frames, _, places, _ = query.shape
    out = query.new_empty((frames, places), dtype=torch.float32)
    for start, number, length in runs_of(windows):
        received = attention_received(*(in_windows(x, start, number, length).contiguous() for x in (query, key)), scale)
        out.narrow(1, start, number * length).copy_(received.view(frames, -1).mul_(length / places))
    return out


@window_attention_received.register_fake
def _(query: Tensor, key: Tensor, windows: Sequence[int], scale: float) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[2]), dtype=torch.float32)
