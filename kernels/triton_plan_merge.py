"""plan_merge on a GPU: one warp plans every video of the batch, and nothing waits for the host.

::

    similarity [5, band]   ->   near [5]   s(t, t - 1), side by side       all lanes
    near, similarity       ->   role [5]   KEPT, PAIR, KEPT, KEPT, KEPT    frame by frame, each after the last
    near, role             ->   source, weight, merged_counts              all lanes: Eq. 3, rows packed

The decisions are scalars of one warp, whose loads hit its cache: the rows of ``similarity`` lie a band apart, a
column copied together takes one cache line for 32 frames. Arithmetic is that of the native body to the last bit:
float32 without fused multiply-add for the moving average, float64 for the weights, rounded once.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from earlytom_compile.kernels.plan_merge import check, check_batch, float32, longest_segment, plan_distance

_BLOCK = 32  # one frame for each lane

_KEPT = tl.constexpr(0)
_PAIR = tl.constexpr(1)  # merges with the next frame
_LOST = tl.constexpr(2)  # released: the last of several middle frames, which never gets a row of its own


def run(
    similarity: Tensor,
    counts: Tensor,
    *,
    variant: str,
    tau_seg: float,
    alpha: float,
    max_window: int,
    tau_merge: float,
    min_frames: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``plan_merge``: float32 [T, band], int64 [V] -> int64 [T, 2], float32 [T, 2], int64 [V]."""
    check(similarity, counts, variant, tau_seg, alpha, max_window, "plan_merge")
    segmentation = segmentation_arguments(similarity, variant, tau_seg, alpha, max_window)
    total, band = similarity.shape
    farthest = plan_distance(variant, max_window, tau_merge)
    check_batch(similarity, counts, farthest, "plan_merge")
    near = similarity.new_empty((total,))
    role = similarity.new_empty((total,), dtype=torch.int32)
    source = similarity.new_empty((total, 2), dtype=torch.int64)
    weight = similarity.new_empty((total, 2))
    merged_counts = counts.new_empty(counts.shape)
    _plan[(1,)](
        similarity.contiguous(), counts.contiguous(), near, role, source, weight, merged_counts,
        total, counts.shape[0], band, int(min(farthest, total)),
        *segmentation, float32(tau_merge), min(max(min_frames, 0), total),
        PAPER=variant == "paper", BY_SEGMENT=math.isnan(tau_merge), BLOCK=_BLOCK,
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return source, weight, merged_counts


def segmentation_arguments(
    similarity: Tensor, variant: str, tau_seg: float, alpha: float, max_window: int
) -> tuple[float, float, float, int]:
    """newest, older, tau_seg and longest of ``end_of_segment``, rounded as the native body rounds them."""
    longest = int(min(longest_segment(variant, max_window), similarity.shape[0]))
    return float32(alpha), float32(1.0 - alpha), float32(tau_seg), longest


@triton.jit
def end_of_segment(table, band, head, frames, newest, older, tau_seg, longest, PAPER: tl.constexpr):
    """The frame after the segment that begins at ``head``, and whether it asked for finite values only.

    ``table`` [frames, band] holds similarities to the frames before, nearest first.
    """
    limit = tl.minimum(frames, head + longest)
    end = head + 1
    smoothed = 1.0
    finite = True
    is_open = True
    while is_open & (end < limit):
        distance = 1 if PAPER else end - head
        now = tl.load(table + end * band + distance - 1)
        finite &= tl.abs(now) < float("inf")
        smoothed = newest * now + older * smoothed
        is_open = smoothed >= tau_seg
        end += is_open.to(tl.int32)
    return end, finite


@triton.jit
def frames_of(counts, video, first, total, band, farthest):
    """Frames of a video, and whether it lies within the ``total`` and the band holds what it can ask for."""
    count = tl.load(counts + video)
    fits = (count >= 1) & (count <= total - first)
    # Only now: a count beyond int32 would come out as some other.
    frames = tl.where(fits, count, 0).to(tl.int32)
    return frames, fits & (tl.minimum(farthest, frames - 1) <= band)


@triton.jit
def _pair_segment(similarity, near, role, band, head, tail, tau_merge, PAPER: tl.constexpr, BY_SEGMENT: tl.constexpr):
    """Mark in ``role`` what happens to the frames from head to tail; the number of pairs, and whether all is finite."""
    threshold = tau_merge
    finite = True
    if BY_SEGMENT:
        threshold = tl.load(similarity + tail * band + tail - head - 1, mask=tail > head, other=1.0)
        finite = tl.abs(threshold) < float("inf")
    last = tail - 1
    if not PAPER:
        tl.store(role + last, _LOST, mask=last > head + 1)
    pairs = 0
    frame = head + 1
    while frame < last:
        alike = tl.load(near + frame + 1)
        following = tl.load(near + frame + 2)
        if PAPER:
            merges = (alike >= threshold) & (alike >= following)
        else:
            following = tl.where(frame + 1 == last, 0.0, following)
            finite &= (tl.abs(alike) < float("inf")) & (tl.abs(following) < float("inf"))
            merges = (alike > threshold) & (alike > following)
        tl.store(role + frame, _PAIR, mask=merges)
        pairs += merges.to(tl.int32)
        frame += 1 + merges.to(tl.int32)
    return pairs, finite


@triton.jit
def _undo_worst(near, role, frames, most, BLOCK: tl.constexpr):
    """Leave the ``most`` most similar pairs, of equals the earlier."""
    start = 0
    while start < frames:
        frame = start + tl.arange(0, BLOCK)
        is_pair = tl.load(role + frame, mask=frame < frames, other=_KEPT) == _PAIR
        alike = tl.load(near + frame + 1, mask=is_pair, other=0.0)
        better = tl.zeros([BLOCK], tl.int32)
        other = 0
        # Pairs undone in an earlier block do not count, and need not: whoever they beat is beaten by ``most`` others.
        while other < frames - 1:
            theirs = tl.load(near + other + 1)
            beats = (theirs > alike) | ((theirs == alike) & (other < frame))
            better += (beats & (tl.load(role + other) == _PAIR)).to(tl.int32)
            other += 1
        tl.debug_barrier()
        tl.store(role + frame, _KEPT, mask=is_pair & (better >= most))
        tl.debug_barrier()
        start += BLOCK


@triton.jit
def _write_rows(near, role, source, weight, first, row, frames, PAPER: tl.constexpr, BLOCK: tl.constexpr):
    """Write the rows of one video from ``row`` on; the row after its last."""
    start = 0
    while start < frames:
        frame = start + tl.arange(0, BLOCK)
        here = frame < frames
        mine = tl.load(role + frame, mask=here, other=_LOST)
        before = tl.load(role + frame - 1, mask=here & (frame > 0), other=_KEPT)
        pair = mine == _PAIR
        alike = tl.load(near + frame + 1, mask=pair, other=1.0).to(tl.float64)
        following = tl.load(near + frame + 2, mask=pair, other=0.0).to(tl.float64)
        if PAPER:
            alike = tl.where(alike > 0.0, alike, 0.0)
            following = tl.where(following > 0.0, following, 0.0)
        else:
            next_is_last = tl.load(role + frame + 1, mask=pair, other=_KEPT) == _LOST
            following = tl.where(next_is_last, 0.0, following)
        both = alike + following
        undecided = both == 0.0
        divisor = tl.where(undecided, 1.0, both)
        has_row = (mine != _LOST) & (before != _PAIR)
        place = 2 * (row + tl.cumsum(has_row.to(tl.int32), 0) - 1)
        tl.store(source + place, (first + frame).to(tl.int64), mask=has_row)
        tl.store(source + place + 1, (first + frame + pair.to(tl.int32)).to(tl.int64), mask=has_row)
        tl.store(weight + place, tl.where(undecided, 0.5, alike / divisor).to(tl.float32), mask=has_row)
        tl.store(weight + place + 1, tl.where(undecided, 0.5, following / divisor).to(tl.float32), mask=has_row)
        row += tl.sum(has_row.to(tl.int32), 0)
        start += BLOCK
    return row


@triton.jit(do_not_specialize=["total", "videos", "band", "farthest", "longest", "min_frames"])
def _plan(
    similarity, counts, near, role, source, weight, merged_counts,
    total, videos, band, farthest, newest, older, tau_seg, longest, tau_merge, min_frames,
    PAPER: tl.constexpr, BY_SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _gather_neighbours(similarity, near, role, total, band, BLOCK)
    tl.debug_barrier()

    first = 0
    rows = 0
    video = 0
    fine = True
    while fine & (video < videos):
        frames, fine = frames_of(counts, video, first, total, band, farthest)
        of_video = similarity + tl.cast(first, tl.int64) * band
        pairs = 0
        head = 0
        while fine & (head < frames):
            if PAPER:
                end, finite = end_of_segment(near + first, 1, head, frames, newest, older, tau_seg, longest, PAPER)
            else:
                end, finite = end_of_segment(of_video, band, head, frames, newest, older, tau_seg, longest, PAPER)
            more, all_finite = _pair_segment(
                of_video, near + first, role + first, band, head, end - 1, tau_merge, PAPER, BY_SEGMENT
            )
            pairs += more
            fine = finite & all_finite
            head = end
        tl.debug_barrier()
        before = rows
        if fine:
            most = tl.maximum(frames - min_frames, 0)
            if PAPER and pairs > most:
                _undo_worst(near + first, role + first, frames, most, BLOCK)
            rows = _write_rows(near + first, role + first, source, weight, first, rows, frames, PAPER, BLOCK)
        tl.store(merged_counts + video, rows - before)
        first += frames
        video += 1

    fine &= first == total
    rows = tl.where(fine, rows, 0)
    tl.debug_barrier()
    _fill_rest(source, weight, merged_counts, rows, total, tl.where(fine, 0, videos), BLOCK)


@triton.jit
def _gather_neighbours(similarity, near, role, total, band, BLOCK: tl.constexpr):
    """near[t] = s(t, t - 1), which means nothing where a video begins; no frame has a role yet."""
    readable = tl.where(band > 0, total, 0)
    start = 0
    while start < total:
        frame = start + tl.arange(0, BLOCK)
        neighbour = tl.load(similarity + frame.to(tl.int64) * band, mask=frame < readable, other=0.0)
        tl.store(near + frame, neighbour, mask=frame < total)
        tl.store(role + frame, _KEPT, mask=frame < total)
        start += BLOCK


@triton.jit
def _fill_rest(source, weight, merged_counts, rows, total, refused, BLOCK: tl.constexpr):
    """Zero the rows after the plan, and mark the first ``refused`` videos as without a plan."""
    start = 2 * rows
    while start < 2 * total:
        place = start + tl.arange(0, BLOCK)
        tl.store(source + place, tl.zeros([BLOCK], tl.int64), mask=place < 2 * total)
        tl.store(weight + place, tl.zeros([BLOCK], tl.float32), mask=place < 2 * total)
        start += BLOCK
    start = 0
    while start < refused:
        video = start + tl.arange(0, BLOCK)
        tl.store(merged_counts + video, tl.full([BLOCK], -1, tl.int64), mask=video < refused)
        start += BLOCK
