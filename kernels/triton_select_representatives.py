"""select_representatives on a GPU: every block by one program, and nothing waits for the host.

::

    features              ->   mean [W, D]                a window's mean token, a slice of channels a program
    features, mean        ->   length [N, P]              how far each token is from it
    features, both        ->   gain, place [V, turns, B]  a block: its cosines by tensor cores, then turn after turn
                                                          with all of them in registers
    gain                  ->   which places stay          one stable sort; then the rows are copied

W is as many windows as there may be, since counts are known to the device only; programs of others end at once.

What it costs a video of 32 frames of 196 tokens of 3584 channels in bfloat16 at a ratio of 0.1 (627 of 6272 tokens):
4 windows x 13 strips = 52 blocks of 8 x 16 places, up to 25 turns each. The features are read three times (135 MB, 28
us at 4.8 TB/s); 6.1 GFLOP of cosines, three times as much with ``tf32x3``, on 52 of 132 processors (about 100 us); a
turn is 128 x 128 differences and two reductions inside one processor (1 to 2 us, 50 us in all); 20 launches, no wait.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from earlytom_compile.kernels.select_representatives import (
    FADING,
    MOST_OF_SHARE,
    POWER,
    ROUNDING,
    STRIP,
    TIE,
    WINDOW,
    check_budget,
    check_shapes,
    near_equal,
)

_WINDOW = tl.constexpr(WINDOW)
_LOG2_OF_FADING = tl.constexpr(math.log2(FADING))
_POWER = tl.constexpr(POWER)
_ROUNDING = tl.constexpr(ROUNDING)
_TIE = tl.constexpr(TIE)
_ROWS = 32  # tokens of a window that are added at a time
_SLICE = 64  # channels of a program that adds tokens
_CHANNELS = 64  # of a token in flight
_BLOCK_CHANNELS = 16  # of a block, whose cosines need the registers
_LEAST = 16  # rows of a matrix product


def run(features: Tensor, counts: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """As ``select_representatives``: [N, P, D], int64 [V] -> [V, budget, D], int64 [V, budget, 2].

    Where the native operator raises for values: a video with NaN or inf gets tokens of NaN; counts that mean nothing,
    and places that a video lacks, give rows of 0 and places of -1."""
    check_shapes(features, counts)
    total, tokens, channels = features.shape
    videos = counts.shape[0]
    check_budget(budget, total // videos if videos else 0, tokens)
    gain, place, broken = _turns(features, counts.contiguous(), budget)
    order = gain.flatten(1).sort(dim=1, descending=True, stable=True).indices[:, :budget]
    kept = place.flatten(1).gather(1, order).sort(dim=1).values
    first = (counts.cumsum(0) - counts)[:, None]
    frame, token = kept.div(tokens, rounding_mode="floor"), kept.remainder(tokens)
    rows = features[(first + frame).clamp(0, total - 1), token]
    rows = rows.masked_fill((kept < 0)[:, :, None], 0).masked_fill(broken[:, None, None], float("nan"))
    kept_places = kept.new_empty((*kept.shape, 2))
    kept_places[..., 0], kept_places[..., 1] = frame, token.masked_fill(kept < 0, -1)
    return rows, kept_places


def _turns(features: Tensor, counts: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    """int32 [V, turns, B], int64 [V, turns, B], bool [V]: the largest gain before each turn of each block, in whole
    ``TIE``, and the place that is taken, -1 each where there is no such turn; which videos have values that are not
    finite."""
    total, tokens, channels = features.shape
    videos = counts.shape[0]
    strips = near_equal(tokens, STRIP)
    width = strips[0][1]
    slots = (total + (WINDOW - 1) * videos) // WINDOW
    of_video = triton.cdiv(total, WINDOW)  # windows of a video, if it is the only one
    # The limit of a block of a video with one window; others have a smaller share of the budget.
    turns = min(WINDOW * width, -(-MOST_OF_SHARE * budget * width // tokens), budget)
    mean = features.new_empty((slots, channels), dtype=torch.float32)
    length = features.new_empty((total, tokens), dtype=torch.float32)
    gain = counts.new_full((videos, turns, of_video * len(strips)), -1, dtype=torch.int32)
    place = counts.new_full(gain.shape, -1)
    broken = counts.new_zeros((videos,), dtype=torch.bool)
    known = {"VIDEOS": triton.next_power_of_2(videos), "num_warps": 4, "enable_fp_fusion": False}
    strides = features.stride()
    _mean[(slots, triton.cdiv(channels, _SLICE))](
        features, *strides, counts, mean, total, videos, tokens, channels, ROWS=_ROWS, SLICE=_SLICE, **known
    )
    _length[(total, triton.cdiv(tokens, _ROWS))](
        features, *strides, counts, mean, length, total, videos, tokens, channels,
        ROWS=_ROWS, CHANNELS=_CHANNELS, **known,
    )  # fmt: skip
    _cover[(slots, len(strips))](
        features, *strides, counts, mean, length, gain, place, broken,
        total, videos, tokens, channels, MOST_OF_SHARE * budget, turns, of_video * len(strips),
        STRIPS=len(strips), WIDTH=width, PADDED=triton.next_power_of_2(tokens), CHANNELS=_BLOCK_CHANNELS,
        BLOCK=max(_LEAST, triton.next_power_of_2(WINDOW * width)), **{**known, "num_warps": 8},
    )  # fmt: skip
    return gain, place, broken


@triton.jit
def _window(counts, slot, total, videos, VIDEOS: tl.constexpr):
    """Of the ``slot``-th window of all: its video, its number in it, its first frame in it and how many it has, the
    video's first frame and frames, and whether there is such a window and all counts make sense."""
    index = tl.arange(0, VIDEOS)
    count, last, fine = _counts(counts, total, videos, VIDEOS)
    windows = (count + _WINDOW - 1) // _WINDOW
    end = tl.cumsum(windows, 0)
    video = tl.sum((end <= slot).to(tl.int32), 0)
    mine = index == video
    fine = fine & (slot < tl.max(end, 0))
    number = tl.where(fine, slot - tl.sum(tl.where(mine, end - windows, 0), 0), 0)
    frames = tl.where(fine, tl.sum(tl.where(mine, count, 0), 0), 1)
    first = tl.where(fine, tl.sum(tl.where(mine, last - count, 0), 0), 0)
    parts = tl.cdiv(frames, _WINDOW)
    begin, end_of_window = _part(number, frames, parts), _part(number + 1, frames, parts)
    return tl.where(fine, video, 0), number, begin, end_of_window - begin, first, frames, fine


@triton.jit
def _counts(counts, total, videos, VIDEOS: tl.constexpr):
    """int32 [VIDEOS] twice: frames of each video, and of all up to it; and whether they make sense."""
    index = tl.arange(0, VIDEOS)
    count = tl.load(counts + index, mask=index < videos, other=0)
    possible = (count >= 1) & (count <= total)
    # Only now: a count beyond int32 would come out as some other.
    count = tl.where(possible, count, 0).to(tl.int32)
    last = tl.cumsum(count, 0)
    fine = (tl.sum(possible.to(tl.int32), 0) == videos) & (tl.max(last, 0) == total)
    return count, last, fine


@triton.jit
def _part(number, whole, parts):
    """Where part ``number`` of near-equal ones begins, the larger of which come first."""
    return number * (whole // parts) + tl.minimum(number, whole % parts)


@triton.jit(do_not_specialize=["total", "videos"])
def _mean(
    features, frame_stride, token_stride, channel_stride, counts, mean, total, videos, tokens, channels,
    ROWS: tl.constexpr, SLICE: tl.constexpr, VIDEOS: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    _, _, begin, frames, first, _, fine = _window(counts, slot, total, videos, VIDEOS)
    channel = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    size = tl.where(fine, frames * tokens, 0)
    sums = tl.zeros([ROWS, SLICE], tl.float32)
    for start in range(0, size, ROWS):
        row = start + tl.arange(0, ROWS)
        frame = (first + begin + row // tokens).to(tl.int64)
        address = frame * frame_stride + (row % tokens).to(tl.int64) * token_stride
        mask = (row < size)[:, None] & (channel < channels)[None, :]
        x = tl.load(features + address[:, None] + channel.to(tl.int64)[None, :] * channel_stride, mask=mask, other=0.0)
        sums += x.to(tl.float32)
    found = tl.sum(sums, 0) / tl.maximum(size, 1).to(tl.float32)
    tl.store(mean + slot.to(tl.int64) * channels + channel, found, mask=(channel < channels) & fine)


@triton.jit(do_not_specialize=["total", "videos"])
def _length(
    features, frame_stride, token_stride, channel_stride, counts, mean, length, total, videos, tokens, channels,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, VIDEOS: tl.constexpr,
):  # fmt: skip
    """How far each token is from the mean of its window; 0 where that is rounding."""
    t = tl.program_id(0)
    slot, fine = _slot_of(counts, t, total, videos, VIDEOS)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    start_of = features + t.to(tl.int64) * frame_stride + token.to(tl.int64) * token_stride
    mean += slot.to(tl.int64) * channels
    away = tl.zeros([ROWS], tl.float32)
    own = tl.zeros([ROWS], tl.float32)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        inside = (channel < channels) & fine
        mask = (token < tokens)[:, None] & inside[None, :]
        x = tl.load(start_of[:, None] + channel.to(tl.int64)[None, :] * channel_stride, mask=mask, other=0.0)
        x = x.to(tl.float32)
        difference = tl.where(mask, x - tl.load(mean + channel, mask=inside, other=0.0)[None, :], 0.0)
        away += tl.sum(difference * difference, 1)
        own += tl.sum(x * x, 1)
    away, own = tl.sqrt(away), tl.sqrt(own)
    tl.store(
        length + t.to(tl.int64) * tokens + token, tl.where(away <= own * _ROUNDING, 0.0, away), mask=token < tokens
    )


@triton.jit
def _slot_of(counts, t, total, videos, VIDEOS: tl.constexpr):
    """The window of frame ``t`` among those of all videos, and whether all counts make sense."""
    index = tl.arange(0, VIDEOS)
    count, last, fine = _counts(counts, total, videos, VIDEOS)
    video = tl.sum((last <= t).to(tl.int32), 0)
    windows = (count + _WINDOW - 1) // _WINDOW
    before = tl.sum(tl.where(index < video, windows, 0), 0)
    frames = tl.maximum(tl.sum(tl.where(index == video, count, 0), 0), 1)
    mine = t - tl.sum(tl.where(index < video, count, 0), 0)
    parts = tl.cdiv(frames, _WINDOW)
    size, larger = frames // parts, frames % parts
    split = larger * (size + 1)
    number = tl.where(mine < split, mine // (size + 1), larger + (mine - split) // size)
    return tl.where(fine, before + number, 0), fine


@triton.jit(do_not_specialize=["total", "videos", "budget", "turns", "blocks"])
def _cover(
    features, frame_stride, token_stride, channel_stride, counts, mean, length, gain, place, broken,
    total, videos, tokens, channels, budget, turns, blocks,
    STRIPS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    VIDEOS: tl.constexpr,
):  # fmt: skip
    """The turns of one block; ``budget`` is twice that of a video."""
    slot, strip = tl.program_id(0), tl.program_id(1)
    video, number, begin, frames, first, of_video, fine = _window(counts, slot, total, videos, VIDEOS)
    if fine:
        lengths = length + (first + begin).to(tl.int64) * tokens
        average = _average(lengths, frames, tokens, PADDED)
        finite = tl.where(average < float("inf"), frames, 0)
        tl.store(broken + video, 1, mask=finite == 0)
        line = tl.arange(0, BLOCK)
        frame, token = line // WIDTH, _part(strip, tokens, STRIPS) + line % WIDTH
        end = _part(strip + 1, tokens, STRIPS)
        there = (frame < frames) & (token < end)
        far = tl.load(lengths + frame * tokens + token, mask=there & (frame < finite), other=0.0)
        address = (first + begin + frame).to(tl.int64) * frame_stride + token.to(tl.int64) * token_stride
        rows = features + address
        cosine = _cosines(rows, channel_stride, mean + slot.to(tl.int64) * channels, far, channels, CHANNELS, BLOCK)
        fading = tl.exp2(tl.abs(frame[:, None] - frame[None, :]).to(tl.float32) * _LOG2_OF_FADING)
        weight = tl.where(far > 0.0, tl.exp2(tl.log2(far / average) * _POWER), 0.0)
        likeness = cosine * fading * weight[:, None]

        size = frames * (end - _part(strip, tokens, STRIPS))
        limit = tl.minimum(tl.cdiv(budget * size, of_video * tokens), turns)
        row = video.to(tl.int64) * turns * blocks + number * STRIPS + strip
        where = (begin + frame).to(tl.int64) * tokens + token
        covered = tl.zeros([BLOCK], tl.float32)
        free = there.to(tl.int32)
        for turn in range(0, tl.minimum(limit, size)):
            adds = tl.sum(tl.maximum(likeness - covered[:, None], 0.0), 0)
            adds = tl.where(free > 0, adds, -1.0)
            most = tl.max(adds, 0)
            best = tl.min(tl.where(adds >= most - _TIE, line, BLOCK), 0)
            chosen = line == best
            tl.store(gain + row + turn * blocks, tl.floor(most / _TIE + 0.5).to(tl.int32))
            tl.store(place + row + turn * blocks, tl.sum(tl.where(chosen, where, 0), 0))
            covered = tl.maximum(covered, tl.sum(tl.where(chosen[None, :], likeness, 0.0), 1))
            free = tl.where(chosen, 0, free)


@triton.jit
def _average(lengths, frames, tokens, PADDED: tl.constexpr):
    """The mean length of the tokens of a window; infinite or NaN if one is."""
    token = tl.arange(0, PADDED)
    sums = tl.zeros([PADDED], tl.float32)
    for frame in range(0, frames):
        sums += tl.load(lengths + frame * tokens + token, mask=token < tokens, other=0.0)
    return tl.sum(sums, 0) / (frames * tokens).to(tl.float32)


@triton.jit
def _cosines(rows, channel_stride, mean, far, channels, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """float32 [BLOCK, BLOCK]: of the differences from the mean, negative ones 0; 0 for rows that are not ``far``."""
    product = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        inside = channel < channels
        mask = (far > 0.0)[:, None] & inside[None, :]
        x = tl.load(rows[:, None] + channel.to(tl.int64)[None, :] * channel_stride, mask=mask, other=0.0)
        away = tl.where(mask, x.to(tl.float32) - tl.load(mean + channel, mask=inside, other=0.0)[None, :], 0.0)
        # Differences are float32 whatever the features are, and tensor cores take them in three parts.
        product = tl.dot(away, tl.trans(away), product, input_precision="tf32x3")
    inverse = tl.where(far > 0.0, 1.0 / far, 0.0)
    return tl.maximum(product * inverse[:, None] * inverse[None, :], 0.0)
