"""plan_reuse on a GPU: a program goes through the frames of one place, and no decision waits for the host.

::

    pixels [V, F, C, H, W]   ->   noise of each patch       [V, (F - 1) * P]   a sort: its first quartile   [V]
                                  source, change            [V, F, S]          frame after frame, the patch of the
                                                                               source frame in registers
                                  active places, total      [V]
                                  fill                                         a sort, for the places still missing

With a budget the second line is computed 14 times, at thresholds that a kernel of one program for each video halves
between them. Leading places see the whole grid; that would be one program for all pixels. So differences of whole
frames are summed first, for all pairs of frames, in tiles of frames and rows of the grid; a scan then reads them.
Sums are float64 of float32 differences, as those of the native body, and rounded once: the plan is the same.

Read are the pixels once for the noise, and once for each scan (frames that overlap a program's pixels come from the
cache); the table of pairs reads them F / 4 times. Launches: 4 of this file without a budget and 30 with one, one more
with leading places, and the sorts.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from earlytom_compile.kernels.plan_reuse import HALVINGS, NOISE_QUARTER, SIZES, check_arguments, videos_of

_PLACES = 128  # of one program, where a lane is a place
_PAIR_TILE = 4  # frames
_PAIR_BLOCK = 128  # pixels at a time


def run(
    pixels: Tensor, grid: Sequence[int], patch: Sequence[int], prefix: int, tau: float, budget: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``plan_reuse``, but a budget that cannot be kept gives -1 in ``computed``. Never waits for the device."""
    check_arguments(pixels, grid, patch, prefix, tau, budget)
    scan = _Scans(videos_of(pixels), grid, patch, prefix)
    noise = scan.noise()
    threshold = scan.smallest_threshold(budget) if budget else noise + tau
    scan.at(threshold)
    active, total = scan.totals(budget)
    source = _filled(scan, total - active)
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
        self.source = pixels.new_empty(shape, dtype=torch.int64)
        self.change = pixels.new_empty(shape, dtype=torch.float32)
        self.active = pixels.new_empty((self._videos, self._places), dtype=torch.int32)
        self._pairs = self._sums_of_pairs() if prefix else self.change

    def _sums_of_pairs(self) -> Tensor:
        """float64 [V, rows of the grid, F, F], below the diagonal: sums of absolute differences of two frames."""
        (rows, columns), (height, width) = self._grid, self._patch
        frames = self._frames
        sums = self._pixels.new_empty((self._videos, rows, frames, frames), dtype=torch.float64)
        tiles = triton.cdiv(frames, _PAIR_TILE)
        _sum_pairs[(tiles * tiles, rows, self._videos)](
            self._pixels, sums, *self._pixels.stride(), frames, tiles, self._channels, height, columns * width,
            TILE=_PAIR_TILE, BLOCK=_PAIR_BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
        return sums

    def noise(self) -> Tensor:
        """float32 [V]."""
        height, width = self._patch
        blocks = self._channels * (height // 2) * (width // 2)
        pairs = self._frames - 1
        if not pairs or not blocks:
            return self._pixels.new_zeros((self._videos,), dtype=torch.float32)
        found = self._pixels.new_empty((self._videos, pairs * self._patches), dtype=torch.float32)
        _noise_of_patches[(self._videos * pairs * self._patches,)](
            self._pixels, found, *self._pixels.stride(), pairs, *self._grid, height, width, blocks,
            BLOCK=triton.next_power_of_2(blocks), num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        return found.sort(dim=1).values[:, (found.shape[1] - 1) // NOISE_QUARTER].contiguous()

    def at(self, threshold: Tensor) -> None:
        """Scan at ``threshold`` float32 [V]."""
        height, width = self._patch
        block = triton.next_power_of_2(self._channels * height * width)
        _scan[(self._videos * self._places,)](
            self._pixels, self._pairs, threshold, self.source, self.change, self.active, *self._pixels.stride(),
            self._frames, *self._grid, height, width, self._channels, self._prefix,
            BLOCK=block, ROWS=triton.next_power_of_2(self._grid[0]), LEADING=self._prefix > 0,
            num_warps=max(4, block // 256), enable_fp_fusion=False,
        )  # fmt: skip

    def smallest_threshold(self, budget: int) -> Tensor:
        """float32 [V]."""
        finite = self._pixels.nan_to_num(0.0, 0.0, 0.0).flatten(1)
        low = self._pixels.new_zeros((self._videos,), dtype=torch.float32)
        high, threshold = finite.amax(1).float() - finite.amin(1).float(), torch.zeros_like(low)
        for halving in range(HALVINGS + 1):  # the first scan is the one at 0
            self.at(threshold)
            _halve[(self._videos,)](
                self.active, low, high, threshold, self._places, budget, LAST=halving == HALVINGS, BLOCK=_PLACES,
                num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
        return threshold

    def totals(self, budget: int) -> tuple[Tensor, Tensor]:
        """int64 [V] twice: active places at the threshold, and after filling up."""
        active = self.source.new_empty((self._videos,))
        total = torch.empty_like(active)
        _totals[(self._videos,)](
            self.active, active, total, self._frames, self._places, budget, SIZES=SIZES, BLOCK=_PLACES, num_warps=1
        )
        return active, total

    def waiting(self) -> Tensor:
        """float32 [V, S, F], last frame first: the least change from there to the end of the run, -1 if active."""
        least = self.change.new_empty((self._videos, self._places, self._frames))
        _least_to_the_end_of_the_run[(triton.cdiv(self._places, _PLACES), self._videos)](
            self.source, self.change, least, self._frames, self._places, BLOCK=_PLACES, num_warps=4
        )
        return least


def _filled(scan: _Scans, missing: Tensor) -> Tensor:
    """Sources with ``missing`` int64 [V] more active places: those that come first in a stable sort."""
    videos, frames, places = scan.source.shape
    order = scan.waiting().flatten(1).sort(dim=1, descending=True, stable=True).indices
    rank = torch.arange(frames * places, device=order.device)
    taken = torch.empty_like(order, dtype=torch.bool).scatter_(1, order, rank < missing[:, None])
    taken = taken.view(videos, places, frames).flip(2).transpose(1, 2).contiguous()  # strides of the result, too
    return torch.where(taken, _frame_numbers(scan.source), scan.source)


def _cut(source: Tensor, total: int) -> Tensor:
    """Sources with only the first ``total`` active places of each video; a plan that keeps its budget stays."""
    frame = _frame_numbers(source)
    active = source == frame
    rank = active.flatten(1).cumsum(1).view_as(source)
    return torch.where(active & (rank <= total), frame, 0).cummax(1).values


def _frame_numbers(source: Tensor) -> Tensor:
    return torch.arange(source.shape[1], device=source.device)[:, None]


@triton.jit
def _noise_of_patches(pixels, found, video_stride, frame_stride, channel_stride, row_stride, column_stride, pairs,
                      rows, columns, height, width, blocks, BLOCK: tl.constexpr):  # fmt: skip
    """Mean over the 2x2 blocks (a b / c d) of |a - b - c + d| / 2, of what a patch differs from the frame before."""
    patch = tl.program_id(0) % (rows * columns)
    pair = tl.program_id(0) // (rows * columns)
    frame, video = (pair % pairs).to(tl.int64), (pair // pairs).to(tl.int64)
    block = tl.arange(0, BLOCK)
    across = width // 2
    channel, row, column = block // (height // 2 * across), block // across % (height // 2), block % across
    row = patch // columns * height + 2 * row
    column = patch % columns * width + 2 * column
    before = pixels + video * video_stride + frame * frame_stride
    before += channel * channel_stride + row.to(tl.int64) * row_stride + column * column_stride
    mask = block < blocks
    a = _apart(before, frame_stride, mask)
    b = _apart(before + column_stride, frame_stride, mask)
    c = _apart(before + row_stride, frame_stride, mask)
    d = _apart(before + row_stride + column_stride, frame_stride, mask)
    mixed = tl.abs((a - b - c + d) / 2)
    tl.store(found + tl.program_id(0), (tl.sum(mixed.to(tl.float64)) / blocks).to(tl.float32))


@triton.jit
def _apart(pointers, frame_stride, mask):
    """The next frame less this one, float32."""
    before = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return tl.load(pointers + frame_stride, mask=mask, other=0.0).to(tl.float32) - before


@triton.jit
def _tile(pixels, frame, present, frame_stride, offset, mask):
    """Some pixels of some frames, float32 [frames, pixels]."""
    pointers = pixels + (frame.to(tl.int64) * frame_stride)[:, None] + offset[None, :]
    return tl.load(pointers, mask=present[:, None] & mask[None, :], other=0.0).to(tl.float32)


@triton.jit
def _sum_pairs(pixels, sums, video_stride, frame_stride, channel_stride, row_stride, column_stride, frames, tiles,
               channels, height, width, TILE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Sums of absolute differences over one row of the grid, between the frames of two tiles."""
    later, earlier = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if earlier <= later:
        grid_row, video = tl.program_id(1), tl.program_id(2).to(tl.int64)
        pixels += video * video_stride + (grid_row * height).to(tl.int64) * row_stride
        one = later * TILE + tl.arange(0, TILE)
        other = earlier * TILE + tl.arange(0, TILE)
        total = tl.zeros([TILE, TILE, BLOCK], tl.float64)
        count = channels * height * width
        for start in range(0, count, BLOCK):
            pixel = start + tl.arange(0, BLOCK)
            mask = pixel < count
            channel, row, column = pixel // (height * width), pixel // width % height, pixel % width
            offset = channel.to(tl.int64) * channel_stride + row * row_stride + column * column_stride
            x = _tile(pixels, one, one < frames, frame_stride, offset, mask)
            y = _tile(pixels, other, other < frames, frame_stride, offset, mask)
            total += tl.abs(x[:, None, :] - y[None, :, :]).to(tl.float64)
        out = sums + (video * tl.num_programs(1) + grid_row) * frames * frames
        out += one.to(tl.int64)[:, None] * frames + other[None, :]
        tl.store(out, tl.sum(total, 2), mask=(one < frames)[:, None] & (other < frames)[None, :])


@triton.jit(do_not_specialize=["frames"])
def _scan(pixels, pair_sums, threshold, source_out, change_out, active_out, video_stride, frame_stride, channel_stride,
          row_stride, column_stride, frames, rows, columns, height, width, channels, prefix, BLOCK: tl.constexpr,
          ROWS: tl.constexpr, LEADING: tl.constexpr):  # fmt: skip
    """Source and change of one place in every frame, and how often it is active."""
    places = prefix + rows * columns
    video, place = (tl.program_id(0) // places).to(tl.int64), tl.program_id(0) % places
    limit = tl.load(threshold + video)
    out = video * frames * places + place
    tl.store(source_out + out, tl.zeros([], tl.int64))
    tl.store(change_out + out, float("inf"))
    patch = place - prefix
    pixel = tl.arange(0, BLOCK)
    row = patch // columns * height + pixel // width % height
    column = patch % columns * width + pixel % width
    offset = (pixel // (height * width)).to(tl.int64) * channel_stride
    offset += row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    mask = (pixel < channels * height * width) & (patch >= 0)
    count = channels * height * width * tl.where(patch < 0, rows * columns, 1)
    at = pixels + video * video_stride + offset
    held = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    now = tl.load(at + frame_stride, mask=mask & (frames > 1), other=0.0).to(tl.float32)
    grid_row = tl.arange(0, ROWS)
    sums = pair_sums + (video * rows + grid_row) * frames * frames
    source = tl.zeros([], tl.int32)
    active = tl.full([], 1, tl.int32)
    for frame in range(1, frames):
        at += frame_stride
        after = tl.load(at + frame_stride, mask=mask & (frame + 1 < frames), other=0.0).to(tl.float32)  # is on its way
        total = tl.sum(tl.abs(held - now).to(tl.float64))
        if LEADING:
            whole = tl.load(sums + frame * frames + source, mask=(grid_row < rows) & (patch < 0), other=0.0)
            total += tl.sum(whole.to(tl.float64))
        change = (total / count).to(tl.float32)
        unchanged = change <= limit  # not where it is NaN
        held = tl.where(unchanged, held, now)
        now = after
        source = tl.where(unchanged, source, frame)
        active += tl.where(unchanged, 0, 1)
        out += places
        tl.store(source_out + out, source.to(tl.int64))
        tl.store(change_out + out, change)
    tl.store(active_out + video * places + place, active)


@triton.jit
def _active_places(active, video, places, BLOCK: tl.constexpr):
    """int64, of one video."""
    total = tl.zeros([BLOCK], tl.int64)
    for start in range(0, places, BLOCK):
        place = start + tl.arange(0, BLOCK)
        total += tl.load(active + video * places + place, mask=place < places, other=0)
    return tl.sum(total)


@triton.jit(do_not_specialize=["budget"])
def _halve(active, low, high, threshold, places, budget, LAST: tl.constexpr, BLOCK: tl.constexpr):
    """Move the border that the last scan was at, and choose the next threshold; the last one keeps the budget."""
    video = tl.program_id(0).to(tl.int64)
    now, below, above = tl.load(threshold + video), tl.load(low + video), tl.load(high + video)
    fits = _active_places(active, video, places, BLOCK) <= budget
    above = tl.where(fits, now, above)
    below = tl.where(fits, below, now)
    tl.store(low + video, below)
    tl.store(high + video, above)
    tl.store(threshold + video, above if LAST else (below + above) / 2)


@triton.jit(do_not_specialize=["frames", "budget"])
def _totals(active, active_out, total_out, frames, places, budget, SIZES: tl.constexpr, BLOCK: tl.constexpr):
    """Active places of one video, and the budget or the size that they are rounded up to."""
    video = tl.program_id(0).to(tl.int64)
    found = _active_places(active, video, places, BLOCK)
    every = tl.cast(frames, tl.int64) * places
    step = tl.maximum(((frames - 1) * places + SIZES - 1) // SIZES, 1)
    rounded = tl.minimum(places + (found - places + step - 1) // step * step, every)
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
