"""plan_reuse on a GPU: a program goes through the frames of one patch, and no decision waits for the host.

::

    pixels [V, F, C, H, W]   ->   sums of quarters, squares [V, F, P]
                                  noise of each patch       [V, (F - 1) * P]   a sort: its median, the threshold  [V]
                                  source, change            [V, F, S]          frame after frame, the patch of the
                                                                               source frame and its sums in registers
                                  waiting                   [V, S, F]          from the last frame to the first
                                  active patches, total     [V]
                                  fill                                         a sort, for the places still missing

With a budget the third line is computed 14 times, at thresholds that a kernel of one program for each video halves
between them. Leading places are filled in once: they are active in every frame. Sums are float64 of float32 numbers, as
those of the native body, and rounded once: the plan is the same.

Read are the pixels once for sums and noise, and once for each scan (frames that overlap a program's pixels come from
the cache). Launches: 4 of this file without a budget and 30 with one, and the sorts.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from earlytom_compile.kernels.plan_reuse import (
    HALVINGS,
    PIXELS_COUNT,
    SIZES,
    check_arguments,
    halves,
    is_noise,
    threshold_above,
    videos_of,
)

_PLACES = 128  # of one program, where a lane is a place


def run(
    pixels: Tensor, grid: Sequence[int], patch: Sequence[int], prefix: int, tau: float, budget: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``plan_reuse``, but a budget that cannot be kept gives -1 in ``computed``. Never waits for the device."""
    check_arguments(pixels, grid, patch, prefix, tau, budget)
    scan = _Scans(videos_of(pixels), grid, patch, prefix)
    noise = scan.noise()
    threshold = scan.smallest_threshold(budget) if budget else threshold_above(tau, noise, patch)
    scan.at(threshold)
    waiting = scan.waiting()
    active, total = scan.totals((waiting > 0).sum((1, 2)), budget)
    source = _filled(scan.source, waiting, total - active)
    if budget:
        source = _cut(source, budget)
        total = torch.where(active > total, -1, total)
    return source, scan.change, total, torch.stack([noise, threshold], dim=1)


class _Scans:
    """Scans of all videos, each at its own threshold; the last one's results."""

    def __init__(self, pixels: Tensor, grid: Sequence[int], patch: Sequence[int], prefix: int) -> None:
        self._pixels, self._prefix = pixels, prefix
        self._videos, self._frames, self._channels = pixels.shape[:3]
        self._grid, self._patch = grid, patch
        self._patches = grid[0] * grid[1]
        self._places = prefix + self._patches
        shape = (self._videos, self._frames, self._places)
        # Leading places stay as they are here.
        self.source = torch.arange(self._frames, device=pixels.device)[:, None].expand(shape).contiguous()
        self.change = torch.full(shape, float("inf"), dtype=torch.float32, device=pixels.device)
        self.active = pixels.new_empty((self._videos, self._patches), dtype=torch.int32)
        self._groups = self._channels * len(halves(patch[0])) * len(halves(patch[1]))
        sums = (self._videos, self._frames, self._patches, self._groups)
        self._sums = pixels.new_empty(sums, dtype=torch.float64)

    def noise(self) -> Tensor:
        """float32 [V]; what scans need is measured with it."""
        height, width = self._patch
        pairs, blocks = self._frames - 1, self._channels * (height // 2) * (width // 2)
        found = self._pixels.new_empty((self._videos, pairs * self._patches), dtype=torch.float32)
        squares = self._pixels.new_empty((self._videos, self._frames * self._patches), dtype=torch.float64)
        groups = triton.next_power_of_2(self._groups)
        quarter = triton.next_power_of_2(triton.cdiv(height, 2) * triton.cdiv(width, 2))
        _measure[(squares.numel(),)](
            self._pixels, self._sums, squares, found, *self._pixels.stride(), self._frames, *self._grid, height, width,
            self._groups, blocks, GROUPS=groups, QUARTER=quarter, BLOCK=triton.next_power_of_2(max(1, blocks)),
            num_warps=min(32, max(4, groups * quarter // 256)), enable_fp_fusion=False,
        )  # fmt: skip
        if not pairs or not blocks:
            return self._pixels.new_zeros((self._videos,), dtype=torch.float32)
        median = found.sort(dim=1).values[:, (found.shape[1] - 1) // 2]
        count = self._frames * self._patches * self._channels * height * width
        return torch.where(is_noise(median, self._sums.sum((1, 2, 3)), squares.sum(1), count), median, 0.0)

    def at(self, threshold: Tensor) -> None:
        """Scan at ``threshold`` float32 [V]."""
        height, width = self._patch
        block = triton.next_power_of_2(self._channels * height * width)
        _scan[(self._videos * self._patches,)](
            self._pixels, self._sums, threshold, self.source, self.change, self.active, *self._pixels.stride(),
            self._frames, *self._grid, height, width, self._channels, self._prefix, self._groups,
            BLOCK=block, GROUPS=triton.next_power_of_2(self._groups), PIXELS_COUNT=PIXELS_COUNT,
            num_warps=max(4, block // 256), enable_fp_fusion=False,
        )  # fmt: skip

    def smallest_threshold(self, budget: int) -> Tensor:
        """float32 [V]."""
        finite = self._pixels.nan_to_num(0.0, 0.0, 0.0).flatten(1)
        low = self._pixels.new_zeros((self._videos,), dtype=torch.float32)
        high, threshold = finite.amax(1).float() - finite.amin(1).float(), torch.zeros_like(low)
        of_patches = budget - self._frames * self._prefix
        for halving in range(HALVINGS + 1):  # the first scan is the one at 0
            self.at(threshold)
            _halve[(self._videos,)](
                self.active, low, high, threshold, self._patches, of_patches, LAST=halving == HALVINGS, BLOCK=_PLACES,
                num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
        return threshold

    def totals(self, changed: Tensor, budget: int) -> tuple[Tensor, Tensor]:
        """int64 [V] twice: active places at the threshold, and after filling up, for which ``changed`` int64 [V]
        inactive places count that changed at all."""
        active = self.source.new_empty((self._videos,))
        total = torch.empty_like(active)
        _totals[(self._videos,)](
            self.active, changed, active, total, self._frames, self._patches, self._prefix, budget, SIZES=SIZES,
            BLOCK=_PLACES, num_warps=1,
        )  # fmt: skip
        return active, total

    def waiting(self) -> Tensor:
        """float32 [V, S, F], last frame first: the least change from there to the end of the run, -1 if active."""
        least = self.change.new_empty((self._videos, self._places, self._frames))
        _least_to_the_end_of_the_run[(triton.cdiv(self._places, _PLACES), self._videos)](
            self.source, self.change, least, self._frames, self._places, BLOCK=_PLACES, num_warps=4
        )
        return least


def _filled(source: Tensor, waiting: Tensor, missing: Tensor) -> Tensor:
    """Sources with ``missing`` int64 [V] more active places: those that come first in a stable sort."""
    videos, frames, places = source.shape
    order = waiting.flatten(1).sort(dim=1, descending=True, stable=True).indices
    rank = torch.arange(frames * places, device=order.device)
    taken = torch.empty_like(order, dtype=torch.bool).scatter_(1, order, rank < missing[:, None])
    taken = taken.view(videos, places, frames).flip(2).transpose(1, 2).contiguous()  # strides of the result, too
    return torch.where(taken, _frame_numbers(source), source)


def _cut(source: Tensor, total: int) -> Tensor:
    """Sources with only the first ``total`` active places of each video; a plan that keeps its budget stays."""
    frame = _frame_numbers(source)
    active = source == frame
    rank = active.flatten(1).cumsum(1).view_as(source)
    return torch.where(active & (rank <= total), frame, 0).cummax(1).values


def _frame_numbers(source: Tensor) -> Tensor:
    return torch.arange(source.shape[1], device=source.device)[:, None]


@triton.jit
def _quarters(group, height, width):
    """Channel, first row, first column, rows and columns of each quarter of each channel."""
    up, across = tl.minimum(height, 2), tl.minimum(width, 2)
    i, j = group // across % up, group % across
    top, left = i * (height // 2), j * (width // 2)
    rows = tl.where(i + 1 < up, height // 2, height - top)
    columns = tl.where(j + 1 < across, width // 2, width - left)
    return group // (up * across), top, left, rows, columns


@triton.jit
def _offset(channel, row, column, channel_stride, row_stride, column_stride):
    offset = channel.to(tl.int64) * channel_stride
    offset += row.to(tl.int64) * row_stride
    offset += column.to(tl.int64) * column_stride
    return offset


@triton.jit
def _apart(pointers, frame_stride, mask):
    """The next frame less this one, float32."""
    before = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return tl.load(pointers + frame_stride, mask=mask, other=0.0).to(tl.float32) - before


@triton.jit
def _noise_of_patch(pixels, frame_stride, channel_stride, row_stride, column_stride, height, width, blocks,
                    BLOCK: tl.constexpr):  # fmt: skip
    """float32, the mean over the 2x2 blocks (a b / c d) of |a - b - c + d| / 2, of what the next frame differs."""
    block = tl.arange(0, BLOCK)
    up, across = height // 2, width // 2
    channel, row, column = block // (up * across), block // across % up * 2, block % across * 2
    pixels += _offset(channel, row, column, channel_stride, row_stride, column_stride)
    mask = block < blocks
    a = _apart(pixels, frame_stride, mask)
    b = _apart(pixels + column_stride, frame_stride, mask)
    c = _apart(pixels + row_stride, frame_stride, mask)
    d = _apart(pixels + row_stride + column_stride, frame_stride, mask)
    mixed = tl.abs((a - b - c + d) / 2)
    return (tl.sum(mixed.to(tl.float64)) / blocks).to(tl.float32)


@triton.jit(do_not_specialize=["frames"])
def _measure(pixels, sums_out, squares_out, noise_out, video_stride, frame_stride, channel_stride, row_stride,
             column_stride, frames, rows, columns, height, width, groups, blocks, GROUPS: tl.constexpr,
             QUARTER: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Of a patch in a frame: sums of the pixels of its quarters, the sum of all their squares, and the noise to the
    next frame."""
    program = tl.program_id(0).to(tl.int64)
    patches = rows * columns
    patch, frame, video = program % patches, program // patches % frames, program // patches // frames
    pixels += video * video_stride + frame * frame_stride
    pixels += patch // columns * height * row_stride + patch % columns * width * column_stride
    group, pixel = tl.arange(0, GROUPS), tl.arange(0, QUARTER)
    channel, top, left, high, wide = _quarters(group, height, width)
    row, column = pixel[None, :] // wide[:, None], pixel[None, :] % wide[:, None]
    mask = (group < groups)[:, None] & (row < high[:, None])
    at = pixels + _offset(channel[:, None], top[:, None] + row, left[:, None] + column, channel_stride, row_stride,
                          column_stride)  # fmt: skip
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32).to(tl.float64)
    tl.store(sums_out + program * groups + group, tl.sum(x, 1), mask=group < groups)
    tl.store(squares_out + program, tl.sum(tl.sum(x * x, 1), 0))
    if (frame + 1 < frames) & (blocks > 0):
        noise = _noise_of_patch(pixels, frame_stride, channel_stride, row_stride, column_stride, height, width, blocks,
                                BLOCK)  # fmt: skip
        tl.store(noise_out + (video * (frames - 1) + frame) * patches + patch, noise)


@triton.jit(do_not_specialize=["frames"])
def _scan(pixels, sums, threshold, source_out, change_out, active_out, video_stride, frame_stride, channel_stride,
          row_stride, column_stride, frames, rows, columns, height, width, channels, prefix, groups,
          BLOCK: tl.constexpr, GROUPS: tl.constexpr, PIXELS_COUNT: tl.constexpr):  # fmt: skip
    """Source and change of one patch in every frame, and how often it is active."""
    patches = rows * columns
    video, patch = (tl.program_id(0) // patches).to(tl.int64), tl.program_id(0) % patches
    limit = tl.load(threshold + video)
    out = video * frames * (prefix + patches) + prefix + patch
    tl.store(source_out + out, tl.zeros([], tl.int64))
    pixel, count = tl.arange(0, BLOCK), channels * height * width
    mask = pixel < count
    row = patch // columns * height + pixel // width % height
    column = patch % columns * width + pixel % width
    at = pixels + video * video_stride
    at += _offset(pixel // (height * width), row, column, channel_stride, row_stride, column_stride)
    held = tl.load(at, mask=mask, other=0.0)
    now = tl.load(at + frame_stride, mask=mask & (frames > 1), other=0.0)
    group = tl.arange(0, GROUPS)
    _, _, _, high, wide = _quarters(group, height, width)
    in_quarter = (high * wide).to(tl.float64)
    of_group = group < groups
    sums += (video * frames * patches + patch) * groups + group
    held_sums = tl.load(sums, mask=of_group, other=0.0)
    source = tl.zeros([], tl.int32)
    active = tl.full([], 1, tl.int32)
    for frame in range(1, frames):
        at += frame_stride
        sums += patches * groups
        now_sums = tl.load(sums, mask=of_group, other=0.0)
        after = tl.load(at + frame_stride, mask=mask & (frame + 1 < frames), other=0.0)  # is on its way
        of_pixels = tl.sum(tl.abs(held.to(tl.float32) - now.to(tl.float32)).to(tl.float64)) / count / PIXELS_COUNT
        of_means = tl.abs(held_sums - now_sums) / in_quarter
        is_number = (of_pixels == of_pixels) & (tl.max((of_means != of_means).to(tl.int32), 0) == 0)
        largest = tl.maximum(tl.max(of_means, 0), of_pixels)
        change = tl.where(is_number, largest, float("nan")).to(tl.float32)
        unchanged = change <= limit  # not where it is NaN
        held = tl.where(unchanged, held, now)
        held_sums = tl.where(unchanged, held_sums, now_sums)
        now = after
        source = tl.where(unchanged, source, frame)
        active += tl.where(unchanged, 0, 1)
        out += prefix + patches
        tl.store(source_out + out, source.to(tl.int64))
        tl.store(change_out + out, change)
    tl.store(active_out + video * patches + patch, active)


@triton.jit
def _active_patches(active, video, patches, BLOCK: tl.constexpr):
    """int64, of one video."""
    total = tl.zeros([BLOCK], tl.int64)
    for start in range(0, patches, BLOCK):
        patch = start + tl.arange(0, BLOCK)
        total += tl.load(active + video * patches + patch, mask=patch < patches, other=0)
    return tl.sum(total)


@triton.jit(do_not_specialize=["budget"])
def _halve(active, low, high, threshold, patches, budget, LAST: tl.constexpr, BLOCK: tl.constexpr):
    """Move the border that the last scan was at, and choose the next threshold; the last one keeps the budget."""
    video = tl.program_id(0).to(tl.int64)
    now, below, above = tl.load(threshold + video), tl.load(low + video), tl.load(high + video)
    fits = _active_patches(active, video, patches, BLOCK) <= budget
    above = tl.where(fits, now, above)
    below = tl.where(fits, below, now)
    tl.store(low + video, below)
    tl.store(high + video, above)
    tl.store(threshold + video, above if LAST else (below + above) / 2)


@triton.jit(do_not_specialize=["frames", "prefix", "budget"])
def _totals(active, changed, active_out, total_out, frames, patches, prefix, budget, SIZES: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    """Active places of one video, and the budget or the size that they are rounded up to, as far as others changed."""
    video = tl.program_id(0).to(tl.int64)
    leading = tl.cast(frames, tl.int64) * prefix
    found = leading + _active_patches(active, video, patches, BLOCK)
    fewest, every = leading + patches, leading + tl.cast(frames, tl.int64) * patches
    step = tl.maximum((every - fewest + SIZES - 1) // SIZES, 1)
    rounded = tl.minimum(fewest + (found - fewest + step - 1) // step * step, every)
    rounded = tl.minimum(rounded, found + tl.load(changed + video))
    rounded = tl.where(5 * found > 4 * every, every, rounded)
    tl.store(active_out + video, found)
    tl.store(total_out + video, tl.where(budget > 0, budget, rounded))


@triton.jit(do_not_specialize=["frames"])
def _least_to_the_end_of_the_run(source, change, least_out, frames, places, BLOCK: tl.constexpr):
    """[F, S] twice -> [S, F], last frame first."""
    video = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < places
    least = tl.full([BLOCK], float("inf"), tl.float32)
    for back in range(0, frames):
        frame = frames - 1 - back
        at = (video * frames + frame) * places + place
        active = tl.load(source + at, mask=mask, other=0) == frame
        least = tl.minimum(least, tl.load(change + at, mask=mask, other=0.0))
        tl.store(least_out + (video * places + place) * frames + back, tl.where(active, -1.0, least), mask=mask)
        least = tl.where(active, float("inf"), least)
