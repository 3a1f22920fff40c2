"""select_tokens_released on a GPU: the quotas on the host, which has to know M, and the rest in one launch.

::

    counts, dynamic, "any NaN?"    ->   host         one read
    quota, first row, place of t   ->   device       one copy
    importance, features           ->   tokens [M, D], kept [M, 3]

How many tokens stay depends on the counts, and the output cannot be allocated before that is known. So the quotas
are those of the native body, in Python's float64, and all its checks are made.
"""

import itertools
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from earlytom_compile.kernels import host_selection
from earlytom_compile.kernels.select_tokens import check_place, check_ratio, check_shapes, read_videos, released_quotas
from earlytom_compile.kernels.triton_select_tokens import frame_arguments, frame_options, select_frame, slices


def run(
    features: Tensor,
    importance: Tensor,
    dynamic: Tensor,
    counts: Tensor,
    frames: int,
    retain_ratio: float,
    *,
    static_selection: str = "device",
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``select_tokens_released``: [N, P, D], float [N, P], bool [N], int64 [V] -> [M, D], [M, 3], [V]."""
    check_place(static_selection, "select_tokens_released")
    inputs = features, importance, dynamic, counts
    amount = frames, retain_ratio
    quotas = partial(released_quotas, frames=frames, retain_ratio=retain_ratio, tokens=importance.shape[1])
    on_device = partial(select_on_device, *inputs, *amount)
    tokens, kept, kept_counts = host_selection.select_at(static_selection, inputs, amount, quotas, on_device)
    return tokens, kept, kept_counts


def select_on_device(
    features: Tensor,
    importance: Tensor,
    dynamic: Tensor,
    counts: Tensor,
    frames: int,
    retain_ratio: float,
    *,
    only_dynamic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``only_dynamic`` leaves the rows of static frames empty."""
    check_shapes(features, importance, dynamic, counts, "select_tokens_released")
    check_ratio(frames, retain_ratio)
    total, per_frame, channels = features.shape
    videos = read_videos(importance, dynamic, counts, "select_tokens_released")
    per_video = released_quotas(videos, frames, retain_ratio, per_frame)
    quotas = sum(per_video, [])
    begins = [0, *itertools.accumulate(quotas)]
    if only_dynamic:
        quotas = [quota if flag else 0 for quota, flag in zip(quotas, sum(videos, []), strict=True)]
    places = [(video, frame) for video, flags in enumerate(videos) for frame in range(len(flags))]
    rows = [(begin, quota, *place) for begin, quota, place in zip(begins, quotas, places, strict=False)]
    host = torch.tensor([field for row in rows for field in row] + [sum(quota) for quota in per_video])
    table, kept_counts = host.to(counts.device).split([4 * total, len(videos)])

    tokens = features.new_empty((begins[-1], channels))
    kept = counts.new_empty((begins[-1], 3))
    _select_given[(total, slices(channels))](
        *frame_arguments(features, importance, tokens, kept),
        dynamic.contiguous(), table, **frame_options(per_frame, channels),
    )  # fmt: skip
    return tokens, kept, kept_counts.clone()


@triton.jit
def _select_given(
    features, importance, tokens, kept,
    frame_stride, token_stride, channel_stride, row_stride, column_stride, channels,
    dynamic, table,
    TOKENS: tl.constexpr, PADDED: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``table`` int64 [T, 4]: first row, number of rows, video, and frame within it."""
    t = tl.program_id(0)
    begin = tl.load(table + 4 * t)
    quota = tl.load(table + 4 * t + 1).to(tl.int32)
    select_frame(
        features, importance, tokens, kept,
        frame_stride, token_stride, channel_stride, row_stride, column_stride, channels,
        t, tl.load(table + 4 * t + 2), tl.load(table + 4 * t + 3), tl.load(dynamic + t), begin, quota, quota > 0,
        3, TOKENS, PADDED, STEP, ROWS, CHANNELS,
    )  # fmt: skip
