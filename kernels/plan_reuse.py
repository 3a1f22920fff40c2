"""Which patches of a video are computed in which frames: a patch that did not change is not computed again.

::

    pixels of a patch in frames 0..4      a a' b b c      (a' differs from a by at most the threshold)
    source                           ->   0 0  2 2 4      computed in frames 0, 2 and 4: active there
    change                                inf . .  . .    how much each differs from what it was compared with

Compared is always with the frame in which the place was last computed, so that slow drift cannot add up. Noise
changes every pixel, but hardly the means of the quarters of a patch, so they are what is compared; pixels themselves
count a third, for what moves inside a quarter, such as text. The threshold follows the noise of the video; a budget
sets it aside and finds one of its own. Pixels and their differences are float32, sums float64 and rounded once, so
that the order of a sum decides nothing: a provider comes to the same plan.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from earlytom_compile.kernels.providers import Provider, provide

HALVINGS = 12
"""Of the range of pixels, in the search for the threshold of a budget."""
SIZES = 16
"""Steps from the places of one frame to those of all."""
PIXELS_COUNT = 3
"""A difference of pixels counts as a third of the like one of means."""
DEVIATIONS = 4
"""Standard deviations of what the noise does to the difference of two means that do not count."""
NOISE_OF_PIXELS = 0.4
"""Of the noise, that does not count either: a little more than the third that unchanged pixels themselves have."""
_MOST_PIXELS = 4096  # of a patch, in the Triton kernels, which hold one in registers


@torch.library.custom_op("earlytom::plan_reuse", mutates_args=())
def plan_reuse(
    pixels: Tensor, grid: Sequence[int], patch: Sequence[int], prefix: int, tau: float, budget: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plan which places of each video are computed in which of its frames; nothing is decided across videos.

    A place s is one of ``prefix`` leading ones, or a patch, in raster order: S = prefix + grid[0] * grid[1]. The change
    d(f, g, s) of a patch between two frames is the larger of two numbers: the largest difference of the means of a
    quarter in a channel (the patch is cut at height // 2 and width // 2, but for a side of one pixel), and a third of
    the mean absolute difference of its pixels. source[0, s] = 0; then source[f, s] = source[f - 1, s] if
    d(f, source[f - 1, s], s) is at most the threshold, else f, which makes the place *active* in f. Leading places are
    active in every frame, since what they will hold no pixels tell. T is the number of active places, at least
    *fewest* = S + (F - 1) * prefix.

    budget 0    the threshold is sqrt(tau^2 + m^2), m = nu * max(4 * sqrt(pi / (2 * n)), 0.4): four standard deviations
                of what white noise nu does to the difference of two means of the n pixels of the smallest quarter, and
                in large patches a little more than the third that counts of the difference of pixels. T is rounded up
                to one of at most 17 sizes, fewest + i * ceil((F * S - fewest) / 16), as far as places changed at all;
                with more than 4/5 of the places active all are
    budget T    the threshold is 0, or the least that halving the range of the video's pixels 12 times finds to leave
                at most T active, whatever ``tau`` is

    What is missing to T is filled up: again and again the last place of a run (an active place, and the inactive ones
    behind it that read it) becomes active, the one of the largest change of all runs; of equal ones that of the lower
    place, of these the later. Without a budget that ends where the largest change is 0, and T is what it is by then:
    what has the same pixels to the last bit is not computed twice. So source[f, s] is always source[f - 1, s] or f, and
    an active place's own.

    The noise nu is the lower median, over all patches and neighbouring frames, of the mean of |a - b - c + d| / 2 over
    the 2x2 blocks (a b / c d) of the differences in a patch: what the mean absolute difference of an unchanged patch
    would be with white noise alone, 2 / sqrt(pi) times its standard deviation. It is 0, that is unknown, for one frame,
    for patches less than two pixels high or wide, and where it exceeds half the standard deviation of all pixels of the
    grid, or one of them is not finite: noise as loud as the picture is the picture.

    Args:
        pixels: [V, F, C, H, W], or [F, C, H, W] of one video, any float dtype and strides, compared in float32.
        grid: rows and columns of patches, from the upper left corner; what lies beside them belongs to no place.
        patch: height and width of a patch, in pixels.
        prefix: places in front of the patches, such as a class token.
        tau: largest change that does not count where there is no noise; finite, at least 0.
        budget: active places of each video, in [fewest, F * S]; 0 for none.

    Returns:
        source: int64 [V, F, S]; change: float32 [V, F, S], d to what was compared with, inf in frame 0 and of leading
        places; computed: int64 [V], the T of each; measured: float32 [V, 2], its noise and its threshold. A patch whose
        pixels are not finite is active, and so it is in the frame after: NaN and infinity never count as unchanged.

    Raises:
        ValueError: wrong rank or dtype, an empty axis, a grid that the frames do not hold, an option out of range,
            or a budget that does not hold the patches that are not finite. For that last reason, a value, a provider
            puts -1 into ``computed`` and the first T active places into the plan.
    """
    check_arguments(pixels, grid, patch, prefix, tau, budget)
    plans = [_plan(video, grid, patch, prefix, tau, budget) for video in videos_of(pixels)]
    if any(plan.active > plan.total for plan in plans):
        raise ValueError(
            f"earlytom::plan_reuse: budget={budget}, but the videos have {[plan.active for plan in plans]} active "
            f"places at any threshold, because a patch whose pixels are not finite is always computed; pass pixels "
            f"without NaN and infinity"
        )
    computed = torch.tensor([plan.total for plan in plans], dtype=torch.int64, device=pixels.device)
    return (
        torch.stack([plan.source for plan in plans]),
        torch.stack([plan.change for plan in plans]),
        computed,
        torch.stack([torch.stack([plan.noise, plan.threshold]) for plan in plans]),
    )


@plan_reuse.register_fake
def _(
    pixels: Tensor, grid: Sequence[int], patch: Sequence[int], prefix: int, tau: float, budget: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(pixels, grid, patch)
    videos, frames = pixels.shape[:2] if pixels.dim() == 5 else (1, pixels.shape[0])
    places = (videos, frames, prefix + grid[0] * grid[1])
    return (
        pixels.new_empty(places, dtype=torch.int64),
        pixels.new_empty(places, dtype=torch.float32),
        pixels.new_empty((videos,), dtype=torch.int64),
        pixels.new_empty((videos, 2), dtype=torch.float32),
    )


def _check(pixels: Tensor, grid: Sequence[int], patch: Sequence[int]) -> None:
    if pixels.dim() not in (4, 5) or not pixels.is_floating_point():
        raise ValueError(
            f"earlytom::plan_reuse: pixels must be float [videos, frames, channels, height, width], or [frames, "
            f"channels, height, width] of one video, got {pixels.dtype} with {pixels.dim()} axes"
        )
    if len(grid) != 2 or len(patch) != 2:
        raise ValueError(
            f"earlytom::plan_reuse: grid={list(grid)}, patch={list(patch)}; pass [rows, columns] of patches and "
            f"[height, width] of one"
        )


def check_arguments(
    pixels: Tensor, grid: Sequence[int], patch: Sequence[int], prefix: int, tau: float, budget: int
) -> None:
    """What a provider has to refuse, all of it known without a look at the values."""
    _check(pixels, grid, patch)
    needed = [count * side for count, side in zip(grid, patch, strict=True)]
    if min(*grid, *patch) < 1 or 0 in pixels.shape or needed[0] > pixels.shape[-2] or needed[1] > pixels.shape[-1]:
        raise ValueError(
            f"earlytom::plan_reuse: a grid of {list(grid)} patches of {list(patch)} pixels needs {needed[0]} x "
            f"{needed[1]}, pixels are {list(pixels.shape)}; the grid must lie inside the frames, without empty axes"
        )
    if prefix < 0 or not 0 <= tau < math.inf:
        raise ValueError(
            f"earlytom::plan_reuse: prefix={prefix}, tau={tau}; the number of leading places must be at least 0, and "
            f"tau, the largest change that does not count, finite and at least 0"
        )
    frames, places = pixels.shape[-4], prefix + grid[0] * grid[1]
    fewest = fewest_places(frames, places, prefix)
    if budget and not fewest <= budget <= frames * places:
        raise ValueError(
            f"earlytom::plan_reuse: budget={budget}; {frames} frames of {places} places, {prefix} of them leading, "
            f"take a budget from {fewest}, one frame and the leading places of the others, to {frames * places}, all "
            f"of them, or 0 for none"
        )


def fewest_places(frames: int, places: int, prefix: int) -> int:
    """Those of one frame, and the leading ones of the others."""
    return places + (frames - 1) * prefix


def videos_of(pixels: Tensor) -> Tensor:
    """[V, F, C, H, W]."""
    return pixels if pixels.dim() == 5 else pixels.unsqueeze(0)


@dataclass(frozen=True)
class _Scan:
    """Sources int64 [F, S] and changes float32 [F, S] of one video at one threshold."""

    source: Tensor
    change: Tensor

    @property
    def active(self) -> int:
        frame = torch.arange(len(self.source), device=self.source.device)[:, None]
        return int((self.source == frame).sum())


@dataclass(frozen=True)
class _Plan:
    source: Tensor
    change: Tensor
    noise: Tensor  # float32 []
    threshold: Tensor  # float32 []
    active: int  # at the threshold
    total: int  # filled up


def _plan(pixels: Tensor, grid: Sequence[int], patch: Sequence[int], prefix: int, tau: float, budget: int) -> _Plan:
    """Of one video, [F, C, H, W]."""
    video = _Video(pixels, grid, patch, prefix)
    noise = video.noise()
    if budget:
        threshold, scan = _smallest_threshold(video, budget)
    else:
        threshold = threshold_above(tau, noise, patch)
        scan = video.scan(threshold)
    waiting, active = _waiting(scan), scan.active
    frames, places = scan.source.shape
    total = budget or _size(active, int((waiting > 0).sum()), frames, places, prefix)
    return _Plan(_filled(scan.source, waiting, total - active), scan.change, noise, threshold, active, total)


class _Video:
    """The patches of one video side by side, and what differs between them."""

    def __init__(self, pixels: Tensor, grid: Sequence[int], patch: Sequence[int], prefix: int) -> None:
        (rows, columns), (height, width) = grid, patch
        inside = pixels[:, :, : rows * height, : columns * width]
        apart = inside.unflatten(2, (rows, height)).unflatten(4, (columns, width))  # [F, C, rows, h, columns, w]
        by_patch = apart.permute(0, 2, 4, 1, 3, 5)
        self._pixels, self._prefix = pixels, prefix
        self._patches = torch.empty(by_patch.shape, dtype=torch.float32, device=pixels.device).copy_(by_patch)
        self._patches = self._patches.flatten(1, 2)  # [F, P, C, h, w]
        self._rows = self._patches.flatten(0, 1).flatten(1)  # [F * P, C * h * w]
        self._sums, self._squares = _sums_of_quarters(apart)
        self._pixels_of_quarters = torch.tensor(
            [(bottom - top) * (right - left) for top, bottom in halves(height) for left, right in halves(width)],
            dtype=torch.float64, device=pixels.device,
        ).repeat_interleave(pixels.shape[1])  # fmt: skip
        self._place = torch.arange(rows * columns, device=pixels.device)

    def range(self) -> Tensor:
        """float32 []: the largest less the smallest pixel, of which those that are not finite count as 0."""
        low, high = self._pixels.aminmax()
        if not (low.isfinite() and high.isfinite()):
            low, high = self._pixels.nan_to_num(0.0, 0.0, 0.0).aminmax()
        return high.float() - low.float()

    def noise(self) -> Tensor:
        """float32 []."""
        frames, _, _, height, width = self._patches.shape
        height, width = height // 2 * 2, width // 2 * 2
        found = []
        for frame in range(1, frames if height and width else 0):
            apart = (self._patches[frame] - self._patches[frame - 1])[..., :height, :width]
            mixed = apart[..., ::2, ::2] - apart[..., ::2, 1::2]
            mixed = mixed.sub_(apart[..., 1::2, ::2]).add_(apart[..., 1::2, 1::2]).div_(2)
            found.append(_mean(mixed.abs_().flatten(1)).float())
        if not found:
            return torch.zeros((), dtype=torch.float32, device=self._pixels.device)
        values = torch.cat(found).sort().values
        noise = values[(len(values) - 1) // 2]
        return torch.where(is_noise(noise, self._sums.sum(), self._squares, self._patches.numel()), noise, 0.0)

    def scan(self, threshold: Tensor, known: Sequence[_Scan] = ()) -> _Scan:
        """Sources at a threshold; differences that the ``known`` scans of this video needed too are taken from them."""
        frames, prefix = len(self._patches), self._prefix
        number = torch.arange(frames, device=self._pixels.device)
        source = number.new_zeros((frames, prefix + len(self._place)))
        source[:, :prefix] = number[:, None]
        change = torch.full(source.shape, math.inf, dtype=torch.float32, device=source.device)
        for frame in range(1, frames):
            before = source[frame - 1, prefix:]
            seen = [(scan.source[frame - 1, prefix:], scan.change[frame, prefix:]) for scan in known]
            now = self._differences(frame, before, seen)
            change[frame, prefix:] = now
            source[frame, prefix:] = torch.where(now <= threshold, before, frame)  # NaN is not
        return _Scan(source, change)

    def _differences(self, frame: int, before: Tensor, seen: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """float32 [P]: d to the frames ``before`` int64; ``seen`` are pairs of such frames and what came out for
        them."""
        out = torch.full(before.shape, -1.0, dtype=torch.float32, device=before.device)
        for other, change in seen:
            out = torch.where(other == before, change, out)
        place = (out == -1.0).nonzero().flatten()
        now, then = (number * len(self._place) + place for number in (frame, before[place]))
        apart = self._rows.index_select(0, now).sub_(self._rows.index_select(0, then)).abs_()
        means = self._sums.index_select(0, now).sub_(self._sums.index_select(0, then)).abs_()
        means = means.div_(self._pixels_of_quarters).amax(1)
        out[place] = torch.maximum(means, _mean(apart) / PIXELS_COUNT).float()
        return out


def _mean(x: Tensor) -> Tensor:
    """float64 [n] of float32 [n, m]."""
    return x.sum(1, dtype=torch.float64).div_(x.shape[1])


def _sums_of_quarters(patches: Tensor) -> tuple[Tensor, Tensor]:
    """float64 [F * P, quarters * C], sums of pixels [F, C, rows, height, columns, width] in float32, and [], the sum of
    their squares."""
    frames, channels, rows, height, columns, width = patches.shape
    up, across = halves(height), halves(width)
    shape = (frames, rows, columns, len(up) * len(across), channels)
    sums = torch.empty(shape, dtype=torch.float64, device=patches.device)
    wide = torch.empty(patches.shape[1:], dtype=torch.float64, device=patches.device)
    squares = torch.zeros((), dtype=torch.float64, device=patches.device)
    for frame in range(frames):
        flat = wide.copy_(patches[frame].float()).flatten()
        squares += flat.dot(flat)
        half = [wide[:, :, top:bottom].sum(2) for top, bottom in up]
        quarters = [x[..., left:right].sum(-1).permute(1, 2, 0) for x in half for left, right in across]
        torch.stack(quarters, 2, out=sums[frame])
    return sums.flatten(0, 2).flatten(1), squares


def halves(side: int) -> list[tuple[int, int]]:
    """Start and end of the halves of a side of a patch, of which one pixel has one."""
    return [(start, end) for start, end in ((0, side // 2), (side // 2, side)) if start < end]


def is_noise(noise: Tensor, total: Tensor, squares: Tensor, count: int) -> Tensor:
    """bool [...]: whether noise float32 [...] is at most half the standard deviation of ``count`` pixels, of which
    ``total`` float64 is the sum, and ``squares`` that of squares; not where a pixel is not finite.

    Without a division, and so exact where the sums are.
    """
    return (2 * count * noise.double()) ** 2 <= count * squares - total**2


def threshold_above(tau: float, noise: Tensor, patch: Sequence[int]) -> Tensor:
    """float32 [...]: the change that counts beside noise float32 [...].

    Of white noise of standard deviation sigma, nu is 2 sigma / sqrt(pi), and the means of the n pixels of a quarter
    differ by sqrt(2 / n) sigma = nu sqrt(pi / (2 n)). Pixels differ by nu, of which a third counts.
    """
    smallest = math.prod(max(1, side // 2) for side in patch)
    share = max(DEVIATIONS * math.sqrt(math.pi / (2 * smallest)), NOISE_OF_PIXELS)
    return (tau * tau + (share * noise.double()) ** 2).sqrt().float()


def _size(active: int, changed: int, frames: int, places: int, prefix: int) -> int:
    """One of at most 17 sizes, so that what was compiled for one is met again; less where only so many inactive places
    ``changed`` at all."""
    every, fewest = frames * places, fewest_places(frames, places, prefix)
    if 5 * active > 4 * every:
        return every
    step = math.ceil((every - fewest) / SIZES)
    rounded = fewest + (math.ceil((active - fewest) / step) * step if step else 0)
    return min(rounded, every, active + changed)


def _smallest_threshold(video: _Video, budget: int) -> tuple[Tensor, _Scan]:
    """float32 [], and the scan at it."""
    high = video.range()
    low = torch.zeros_like(high)
    below = video.scan(low)
    if below.active <= budget:
        return low, below
    above = video.scan(high, [below])
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        scan = video.scan(middle, [below, above])
        if scan.active <= budget:
            high, above = middle, scan
        else:
            low, below = middle, scan
    return high, above


def _waiting(scan: _Scan) -> Tensor:
    """float32 [F, S], the least change from there to the end of the run, -1 if active.

    The last place of a run is taken before the others whatever they have, so that is what a place waits for: what is
    taken one by one is a sort by it.
    """
    change, frames = scan.change, len(scan.change)
    active = scan.source == torch.arange(frames, device=change.device)[:, None]
    least = change.clone()
    for frame in range(frames - 2, 0, -1):
        goes_on = torch.minimum(change[frame], least[frame + 1])
        least[frame] = torch.where(active[frame + 1], change[frame], goes_on)
    return least.masked_fill_(active, -1.0)


def _filled(source: Tensor, waiting: Tensor, missing: int) -> Tensor:
    """Sources with so many more active places."""
    if missing <= 0:
        return source
    frames, source = len(source), source.clone()
    by_place_latest_first = waiting.flip(0).t().flatten()
    order = by_place_latest_first.argsort(descending=True, stable=True)[:missing]
    place, frame_taken = order // frames, frames - 1 - order % frames
    source[frame_taken, place] = frame_taken
    return source


def _triton_supports(
    pixels: Tensor, grid: Sequence[int], patch: Sequence[int], prefix: int, tau: float, budget: int
) -> bool:
    if pixels.dtype not in (torch.float32, torch.float16, torch.bfloat16) or pixels.dim() not in (4, 5):
        return False
    return pixels.shape[-3] * math.prod(patch) <= _MOST_PIXELS


provide(plan_reuse, Provider("triton", ".triton_plan_reuse", supports=_triton_supports))
