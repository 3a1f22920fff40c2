"""select_tokens on a GPU: one launch finds the tokens of every frame and copies them, and nothing waits for the host.

::

    counts, dynamic      ->   quota and first output row of frame t   a closed form, so each program has its own
    importance [t]       ->   which tokens stay                       a token's rank = how many are better
    features [t], ranks  ->   tokens, kept                            whole rows, in order

A program has one frame and one slice of the channels. To be better is one comparison of integers: the run of
the token, then its importance, then the lower index, so that ranks are those of the one stable sort of the native
body. In a static frame all tokens of later runs are better than those of earlier ones, and known to be, which
leaves each token's rank in its own run.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from earlytom_compile.kernels import host_selection
from earlytom_compile.kernels.select_tokens import check_budget, check_place, check_shapes, paper_quotas

_PAIRS = 4096  # comparisons in flight
_ROWS = 16
_CHANNELS = 512
_FLAGS = 128
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # what is copied, whatever it means


def run(
    features: Tensor,
    importance: Tensor,
    dynamic: Tensor,
    counts: Tensor,
    budget: int,
    *,
    static_selection: str = "device",
) -> tuple[Tensor, Tensor]:
    """As ``select_tokens``: [N, P, D], float [N, P], bool [N], int64 [V] -> [V, budget, D], int64 [V, budget, 2]."""
    check_place(static_selection, "select_tokens")
    inputs = features, importance, dynamic, counts
    quotas = partial(paper_quotas, budget=budget, tokens=importance.shape[1])
    on_device = partial(select_on_device, *inputs, budget)
    tokens, kept = host_selection.select_at(static_selection, inputs, budget, quotas, on_device)
    return tokens, kept


def select_on_device(
    features: Tensor, importance: Tensor, dynamic: Tensor, counts: Tensor, budget: int, *, only_dynamic: bool = False
) -> tuple[Tensor, Tensor]:
    """``only_dynamic`` leaves the rows of static frames empty."""
    check_shapes(features, importance, dynamic, counts, "select_tokens")
    total, per_frame, channels = features.shape
    videos = counts.shape[0]
    # How few frames the shortest video has is known to the device only; no more than the average.
    check_budget(budget, total // videos if videos else 0, per_frame)
    tokens = features.new_empty((videos, budget, channels))
    kept = counts.new_empty((videos, budget, 2))
    _select[(total, slices(channels))](
        *frame_arguments(features, importance, tokens, kept),
        dynamic.contiguous(), counts.contiguous(), total, videos, budget,
        VIDEOS=triton.next_power_of_2(videos), FLAGS=_FLAGS, ONLY_DYNAMIC=only_dynamic,
        **frame_options(per_frame, channels),
    )  # fmt: skip
    return tokens, kept


def slices(channels: int) -> int:
    """Programs that share a frame; the first also writes ``kept``."""
    return max(1, triton.cdiv(channels, _CHANNELS))


def frame_arguments(features: Tensor, importance: Tensor, tokens: Tensor, kept: Tensor) -> tuple[Tensor | int, ...]:
    """The first arguments of a kernel, which it passes on to ``select_frame``."""
    bits = _BITS[features.element_size()]
    strides = (*features.stride(), *importance.stride())
    return features.view(bits), importance, tokens.view(bits), kept, *strides, features.shape[2]


def frame_options(per_frame: int, channels: int) -> dict[str, int]:
    """Compile-time arguments of a kernel for frames of ``per_frame`` tokens."""
    padded = triton.next_power_of_2(per_frame)
    return {
        "TOKENS": per_frame,
        "PADDED": padded,
        "STEP": min(padded, max(1, _PAIRS // padded)),
        "ROWS": _ROWS,
        "CHANNELS": min(_CHANNELS, triton.next_power_of_2(max(1, channels))),
        "num_warps": 4 if padded <= 256 else 8,
        "enable_fp_fusion": False,
    }


@triton.jit(do_not_specialize=["total", "videos", "budget"])
def _select(
    features, importance, tokens, kept,
    frame_stride, token_stride, channel_stride, row_stride, column_stride, channels,
    dynamic, counts, total, videos, budget,
    VIDEOS: tl.constexpr, FLAGS: tl.constexpr, ONLY_DYNAMIC: tl.constexpr,
    TOKENS: tl.constexpr, PADDED: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    video, first, frames, fine = _video_of(counts, t, total, videos, VIDEOS)
    begin, quota = _rows_of(dynamic + first, t - first, frames, budget, FLAGS)
    # Without counts that make sense all programs together mark all rows as empty.
    share = tl.cdiv(videos * budget, total)
    begin = tl.where(fine, video * budget + begin, t * share)
    quota = tl.where(fine, quota, tl.minimum(share, videos * budget - begin))
    is_dynamic = tl.load(dynamic + t)
    if ONLY_DYNAMIC:
        quota = tl.where(is_dynamic, quota, 0)
    select_frame(
        features, importance, tokens, kept,
        frame_stride, token_stride, channel_stride, row_stride, column_stride, channels,
        t, video, t - first, is_dynamic, begin, quota, fine,
        2, TOKENS, PADDED, STEP, ROWS, CHANNELS,
    )  # fmt: skip


@triton.jit
def _video_of(counts, t, total, videos, VIDEOS: tl.constexpr):
    """Video of frame ``t``, its first frame, its frames, and whether all counts make sense."""
    index = tl.arange(0, VIDEOS)
    count = tl.load(counts + index, mask=index < videos, other=0)
    possible = (count >= 1) & (count <= total)
    # Only now: a count beyond int32 would come out as some other.
    count = tl.where(possible, count, 0).to(tl.int32)
    end = tl.cumsum(count, 0)
    fine = (tl.sum(possible.to(tl.int32), 0) == videos) & (tl.max(end, 0) == total)
    video = tl.sum((end <= t).to(tl.int32), 0)
    first = tl.max(tl.where(end <= t, end, 0), 0)
    frames = tl.sum(tl.where(index == video, count, 0), 0)
    return video, tl.where(fine, first, 0), tl.where(fine, frames, 1), fine


@triton.jit
def _rows_of(dynamic, mine, frames, budget, FLAGS: tl.constexpr):
    """First row within its video, and number of rows, of frame ``mine``; the rest goes to dynamic frames first."""
    before = 0
    all_dynamic = 0
    start = 0
    while start < frames:
        frame = start + tl.arange(0, FLAGS)
        flag = tl.load(dynamic + frame, mask=frame < frames, other=0).to(tl.int32)
        all_dynamic += tl.sum(flag, 0)
        before += tl.sum(tl.where(frame < mine, flag, 0), 0)
        start += FLAGS
    base = budget // frames
    rest = budget % frames
    rest_static = tl.maximum(rest - all_dynamic, 0)
    extra_before = tl.minimum(before, rest) + tl.minimum(mine - before, rest_static)
    is_dynamic = tl.load(dynamic + mine)
    has_extra = tl.where(is_dynamic, before < rest, mine - before < rest_static)
    return mine * base + extra_before, base + has_extra.to(tl.int32)


@triton.jit
def select_frame(
    features, importance, tokens, kept,
    frame_stride, token_stride, channel_stride, row_stride, column_stride, channels,
    t, video, frame, is_dynamic, begin, quota, fine,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr, PADDED: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Fill the rows from ``begin`` to ``begin + quota`` with tokens of frame ``t``, as far as it has so many.

    A row of ``kept`` is (frame, token), or with three COLUMNS (video, frame, token).
    """
    runs = tl.where(is_dynamic, 1, tl.minimum(tl.maximum(quota, 1), TOKENS))
    most = tl.where(fine, tl.where(is_dynamic, quota, tl.minimum(quota, 1)), 0)
    importance += tl.cast(t, tl.int64) * row_stride
    token = tl.arange(0, PADDED)
    keep = (_rank(importance, column_stride, token, runs, TOKENS, PADDED, STEP) < most) & (token < TOKENS)
    row_of = tl.where(keep, tl.cumsum(keep.to(tl.int32), 0) - 1, -1)
    filled = tl.sum(keep.to(tl.int32), 0)

    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    recorded = tl.where(tl.program_id(1) == 0, quota, 0)
    start = 0
    while start < quota:
        row = start + tl.arange(0, ROWS)
        chosen = tl.sum(tl.where(row_of[None, :] == row[:, None], token[None, :], 0), 1)
        place = (begin + row).to(tl.int64)
        _write_kept(kept + place * COLUMNS, video, frame, chosen, row < filled, row < recorded, COLUMNS)
        source = tl.cast(t, tl.int64) * frame_stride + chosen.to(tl.int64) * token_stride
        mask = (row < quota)[:, None] & (channel < channels)[None, :]
        bits = tl.load(
            features + source[:, None] + channel.to(tl.int64)[None, :] * channel_stride,
            mask=mask & (row < filled)[:, None],
            other=0,
        )
        tl.store(tokens + place[:, None] * channels + channel[None, :], bits, mask=mask)
        start += ROWS


@triton.jit
def _write_kept(kept, video, frame, token, is_filled, mask, COLUMNS: tl.constexpr):
    if COLUMNS == 3:
        tl.store(kept, tl.where(is_filled, video, -1).to(tl.int64), mask=mask)
    tl.store(kept + COLUMNS - 2, tl.where(is_filled, frame, -1).to(tl.int64), mask=mask)
    tl.store(kept + COLUMNS - 1, tl.where(is_filled, token, -1).to(tl.int64), mask=mask)


@triton.jit
def _rank(importance, stride, token, runs, TOKENS: tl.constexpr, PADDED: tl.constexpr, STEP: tl.constexpr):
    """How many tokens of its run are better than each."""
    key, later = _order(importance, stride, token, runs, TOKENS)
    better = tl.zeros([PADDED], tl.int32)
    for start in range(0, TOKENS, STEP):
        others, _ = _order(importance, stride, start + tl.arange(0, STEP), runs, TOKENS)
        better += tl.sum((others[:, None] > key[None, :]).to(tl.int32), 0)
    return better - later


@triton.jit
def _order(importance, stride, token, runs, TOKENS: tl.constexpr):
    """A number that is larger for a later run, in it for more importance, and of equals for the lower index; and
    how many tokens lie in later runs. Of ``runs`` near-equal runs the larger come first."""
    here = token < TOKENS
    value = tl.load(importance + token.to(tl.int64) * stride, mask=here, other=0.0).to(tl.float32)
    value = tl.where(value != value, float("-inf"), tl.where(value == 0.0, 0.0, value))
    bits = value.to(tl.int32, bitcast=True)
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # floats below zero are ordered the other way round

    small = TOKENS // runs
    larger = TOKENS % runs
    split = larger * (small + 1)
    run = tl.where(token < split, token // (small + 1), larger + (token - split) // small)
    end = (run + 1) * small + tl.minimum(run + 1, larger)
    key = ((run.to(tl.int64) << 32) + ascending) * TOKENS + (TOKENS - 1 - token)
    return tl.where(here, key, -(1 << 62)), TOKENS - end
