"""Which patches of a video are computed in which frames: a patch that did not change is not computed again.

::

    pixels of a patch in frames 0..4      a a' b b c      (a' differs from a by at most the threshold)
    source                           ->   0 0  2 2 4      computed in frames 0, 2 and 4: active there
    change                                inf . .  . .    how much each differs from what it was compared with

Compared is always with the frame in which the place was last computed, so that slow drift cannot add up. The
threshold follows the noise of the video; a budget sets it aside and finds one of its own. Differences are float32,
their sums float64 and rounded once, so that the order of a sum decides nothing: a provider comes to the same plan.
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
NOISE_QUARTER = 4
"""The noise is that of the quietest quarter of the patches."""
_MOST_PIXELS = 4096  # of a patch, in the Triton kernels, which hold one in registers


@torch.library.custom_op("earlytom::plan_reuse", mutates_args=())
def plan_reuse(
    pixels: Tensor, grid: Sequence[int], patch: Sequence[int], prefix: int, tau: float, budget: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plan which places of each video are computed in which of its frames; nothing is decided across videos.

    A place s is one of ``prefix`` leading ones, whose pixels are those of the whole grid, or a patch, in raster
    order: S = prefix + grid[0] * grid[1]. d(f, g, s) is the mean absolute difference of its pixels between two
    frames. source[0, s] = 0; then source[f, s] = source[f - 1, s] if d(f, source[f - 1, s], s) is at most the
    threshold, else f, which makes the place *active* in f. T is the number of active places.

    budget 0    the threshold is ``tau`` plus the noise of the video, and T is rounded up to one of at most 17 sizes,
                S + i * ceil((F - 1) * S / 16); with more than 4/5 of the places active all are
    budget T    the threshold is 0, or the least that halving the range of the video's pixels 12 times finds to leave
                at most T active, whatever ``tau`` is

    What is missing to T is filled up: again and again the last place of a run (an active place, and the inactive ones
    behind it that read it) becomes active, the one of the largest change of all runs; of equal ones that of the lower
    place, of these the later. So source[f, s] is always source[f - 1, s] or f, and an active place's own.

    The noise is the lower first quartile, over all patches and neighbouring frames, of the mean of |a - b - c + d| / 2
    over the 2x2 blocks (a b / c d) of the differences in a patch: what d of an unchanged patch would be with this
    noise alone. It is 0 for one frame and for patches less than two pixels high or wide.

    Args:
        pixels: [V, F, C, H, W], or [F, C, H, W] of one video, any float dtype and strides, compared in float32.
        grid: rows and columns of patches, from the upper left corner; what lies beside them belongs to no place.
        patch: height and width of a patch, in pixels.
        prefix: places in front of the patches, such as a class token.
        tau: largest change that does not count, beside the noise; finite, at least 0.
        budget: active places of each video, in [S, F * S]; 0 for none.

    Returns:
        source: int64 [V, F, S]; change: float32 [V, F, S], d to what was compared with, inf in frame 0; computed:
        int64 [V], the T of each; measured: float32 [V, 2], its noise and its threshold. A place whose pixels are
        not finite is active, and so it is in the frame after: NaN and infinity never count as unchanged.

    Raises:
        ValueError: wrong rank or dtype, an empty axis, a grid that the frames do not hold, an option out of range,
            or a budget that does not hold the places that are not finite. For that last reason, a value, a provider
            puts -1 into ``computed`` and the first T active places into the plan.
    """
    check_arguments(pixels, grid, patch, prefix, tau, budget)
    plans = [_plan(video, grid, patch, prefix, tau, budget) for video in videos_of(pixels)]
    if any(plan.active > plan.total for plan in plans):
        raise ValueError(
            f"earlytom::plan_reuse: budget={budget}, but the videos have {[plan.active for plan in plans]} active "
            f"places at any threshold, because a place whose pixels are not finite is always computed; pass pixels "
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
    if budget and not places <= budget <= frames * places:
        raise ValueError(
            f"earlytom::plan_reuse: budget={budget}; {frames} frames of {places} places take a budget from {places}, "
            f"one frame, to {frames * places}, all of them, or 0 for none"
        )


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


def _plan(
    pixels: Tensor, grid: Sequence[int], patch: Sequence[int], prefix: int, tau: float, budget: int
) -> _Plan:
    """Of one video, [F, C, H, W]."""
    video = _Video(pixels, grid, patch, prefix)
    noise = video.noise()
    if budget:
        threshold, scan = _smallest_threshold(video, budget)
        active = scan.active
        total = budget
    else:
        threshold = torch.tensor(tau, dtype=torch.float32, device=pixels.device) + noise
        scan = video.scan(threshold)
        active = scan.active
        total = _rounded_up(active, *scan.source.shape)
    return _Plan(_filled(scan, total - active), scan.change, noise, threshold, active, total)


class _Video:
    """The patches of one video side by side, and what differs between them."""

    def __init__(self, pixels: Tensor, grid: Sequence[int], patch: Sequence[int], prefix: int) -> None:
        (rows, columns), (height, width) = grid, patch
        inside = pixels[:, :, : rows * height, : columns * width]
        apart = inside.unflatten(2, (rows, height)).unflatten(4, (columns, width)).permute(0, 2, 4, 1, 3, 5)
        self._pixels = pixels
        self._patches = torch.empty(apart.shape, dtype=torch.float32, device=pixels.device).copy_(apart).flatten(1, 2)
        self._rows = self._patches.flatten(0, 1).flatten(1)  # [F * P, C * height * width]
        self._place = torch.arange(rows * columns, device=pixels.device)
        self._prefix = prefix

    def range(self) -> Tensor:
        """float32 []: the largest less the smallest pixel, of which those that are not finite count as 0."""
        low, high = self._pixels.aminmax()
        if not (low.isfinite() and high.isfinite()):
            low, high = self._pixels.nan_to_num(0.0, 0.0, 0.0).aminmax()
        return high.float() - low.float()

    def noise(self) -> Tensor:
        """float32 []."""
        frames, _, channels, height, width = self._patches.shape
        height, width = height // 2 * 2, width // 2 * 2
        found = []
        for frame in range(1, frames if height and width else 0):
            apart = (self._patches[frame] - self._patches[frame - 1])[..., :height, :width]
            mixed = apart[..., ::2, ::2] - apart[..., ::2, 1::2]
            mixed = mixed.sub_(apart[..., 1::2, ::2]).add_(apart[..., 1::2, 1::2]).div_(2)
            found.append(_mean(mixed.abs_().flatten(1)))
        if not found:
            return torch.zeros((), dtype=torch.float32, device=self._pixels.device)
        values = torch.cat(found).sort().values
        return values[(len(values) - 1) // NOISE_QUARTER]

    def scan(self, threshold: Tensor, known: Sequence[_Scan] = ()) -> _Scan:
        """Sources at a threshold; differences that the ``known`` scans of this video needed too are taken from them.

        All leading places have the same pixels, so one is compared for them.
        """
        frames, alike = len(self._patches), max(0, self._prefix - 1)
        source = self._place.new_zeros((frames, self._prefix + len(self._place)))
        change = torch.full(source.shape, math.inf, dtype=torch.float32, device=source.device)
        for frame in range(1, frames):
            before = source[frame - 1, alike:]
            seen = [(scan.source[frame - 1, alike:], scan.change[frame, alike:]) for scan in known]
            now = self._differences(frame, before, seen)
            unchanged = now <= threshold  # not where it is NaN
            change[frame, alike:] = now
            source[frame, alike:] = torch.where(unchanged, before, frame)
            if alike:
                change[frame, :alike], source[frame, :alike] = now[0], source[frame, alike]
        return _Scan(source, change)

    def _differences(self, frame: int, before: Tensor, seen: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """float32 [1 + P], or [P] without leading places: to the frames ``before`` int64; ``seen`` are pairs of such
        frames and what came out for them."""
        leading = min(1, self._prefix)
        out = torch.full(before.shape, -1.0, dtype=torch.float32, device=before.device)
        for other, change in seen:
            out = torch.where(other == before, change, out)
        unknown = (out == -1.0).nonzero().flatten()
        if leading and len(unknown) and unknown[0] == 0:
            patches = len(self._place)
            source = int(before[0])
            apart = self._apart(frame, self._place, source * patches + self._place)
            out[0] = _mean(apart.flatten()[None])[0]
            unknown = unknown[1:]
        place = unknown - leading
        out[unknown] = _mean(self._apart(frame, place, before[unknown] * len(self._place) + place))
        return out

    def _apart(self, frame: int, place: Tensor, rows: Tensor) -> Tensor:
        """Absolute differences of some places of a frame from ``rows``, [n, C * height * width]."""
        patches = len(self._place)
        now = self._rows[frame * patches : (frame + 1) * patches]
        now = now if len(place) == patches else now.index_select(0, place)
        return (self._rows.index_select(0, rows) - now).abs_()


def _mean(x: Tensor) -> Tensor:
    """float32 [n] of float32 [n, m], summed in float64."""
    return x.sum(1, dtype=torch.float64).div_(x.shape[1]).float()


def _rounded_up(active: int, frames: int, places: int) -> int:
    """One of at most 17 sizes, so that what was compiled for one is met again."""
    if 5 * active > 4 * frames * places:
        return frames * places
    step = math.ceil((frames - 1) * places / SIZES)
    return min(places + math.ceil((active - places) / step) * step, frames * places)


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


def _filled(scan: _Scan, missing: int) -> Tensor:
    """Sources with so many more active places.

    The last place of a run goes before the others whatever they have, so a place waits for the least change from it
    to the end of its run: what is taken one by one is a sort by that.
    """
    source, change = scan.source.clone(), scan.change
    if missing <= 0:
        return source
    frames = len(source)
    active = source == torch.arange(frames, device=source.device)[:, None]
    least = change.clone()
    for frame in range(frames - 2, 0, -1):
        goes_on = torch.minimum(change[frame], least[frame + 1])
        least[frame] = torch.where(active[frame + 1], change[frame], goes_on)
    least.masked_fill_(active, -1.0)
    by_place_latest_first = least.flip(0).t().flatten()
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
