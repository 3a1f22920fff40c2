"""The operators of reused patches once more, for programs that leave Python; see ``exportable.py``.

A place that did not change is left out of the packed rows, and so of all linear layers, norms and MLPs. Attention alone
goes through all places of all frames, each with the query of the row that it reads, and what it gives for those that
did not change is thrown away: a frame's own number of queries would be a size known at run time for each frame.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop

from earlytom_compile.kernels.plan_reuse import PIXELS_COUNT, SIZES, fewest_places, halves, is_noise, threshold_above


def plan_reuse(
    pixels: Tensor, grid: Sequence[int], patch: Sequence[int], prefix: int, tau: float, budget: int, *, most: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Without a budget, of one video."""
    patches = _patches(pixels.flatten(0, -4), grid, patch)
    frames, count = patches.shape[:2]
    sums, sizes = _sums_of_quarters(patches)
    noise = _noise(patches, sums)
    threshold = threshold_above(tau, noise, patch)
    source, change = _scan(patches.flatten(0, 1).flatten(1), sums.flatten(0, 1), sizes, count, threshold)
    frame = torch.arange(frames, device=pixels.device)
    source = torch.cat((frame[:, None].expand(-1, prefix), source), 1)
    change = torch.cat((change.new_full((frames, prefix), math.inf), change), 1)

    waiting = _waiting(source, change)
    active, changed = (source == frame[:, None]).sum(), (waiting > 0).sum()
    total = _size(active, changed, frames, prefix + count, prefix)
    by_place_latest_first = waiting.flip(0).t().flatten()
    order = by_place_latest_first.argsort(descending=True, stable=True)
    taken = torch.zeros_like(order).scatter(0, order, torch.arange(len(order), device=order.device)) < total - active
    taken = taken.view(-1, frames).t().flip(0)
    source = torch.where(taken, frame[:, None], source)
    return source[None], change[None], total[None], torch.stack((noise, threshold))[None]


def _patches(pixels: Tensor, grid: Sequence[int], patch: Sequence[int]) -> Tensor:
    """float32 [F, P, C, h, w]."""
    (rows, columns), (height, width) = grid, patch
    inside = pixels[:, :, : rows * height, : columns * width]
    apart = inside.unflatten(2, (rows, height)).unflatten(4, (columns, width))
    return apart.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).float().contiguous()


def _sums_of_quarters(patches: Tensor) -> tuple[Tensor, Tensor]:
    """float64 [F, P, quarters * C], sums of pixels, and [quarters * C], how many these are."""
    height, width = patches.shape[-2:]
    quarters = [
        patches[..., top:bottom, left:right].sum((-2, -1), dtype=torch.float64)
        for top, bottom in halves(height)
        for left, right in halves(width)
    ]
    sizes = [(bottom - top) * (right - left) for top, bottom in halves(height) for left, right in halves(width)]
    count = torch.tensor(sizes, dtype=torch.float64, device=patches.device).repeat_interleave(patches.shape[2])
    return torch.cat(quarters, -1), count


def _noise(patches: Tensor, sums: Tensor) -> Tensor:
    """float32 []."""
    frames, _, _, height, width = patches.shape
    height, width = height // 2 * 2, width // 2 * 2
    if frames < 2 or not (height and width):
        return patches.new_zeros(())
    apart = (patches[1:] - patches[:-1])[..., :height, :width]
    mixed = apart[..., ::2, ::2] - apart[..., ::2, 1::2] - apart[..., 1::2, ::2] + apart[..., 1::2, 1::2]
    values = _mean((mixed / 2).abs().flatten(2)).float().flatten().sort().values
    noise = values[(len(values) - 1) // 2]
    squares = patches.double().square().sum()
    return torch.where(is_noise(noise, sums.sum(), squares, patches.numel()), noise, 0.0)


def _mean(x: Tensor) -> Tensor:
    """float64 [...] of float32 [..., m]."""
    return x.sum(-1, dtype=torch.float64) / x.shape[-1]


def _scan(pixels: Tensor, sums: Tensor, sizes: Tensor, count: int, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Sources int64 [F, P] and changes float32 [F, P] of ``count`` = P patches, by their pixels [F * P, n] and the sums
    of their quarters float64 [F * P, m], each of so many pixels as ``sizes`` [m] says."""
    frames = pixels.shape[0] // count
    place = torch.arange(count, device=pixels.device)

    def goes_on(frame: Tensor, before: Tensor, source: Tensor, change: Tensor) -> Tensor:
        return frame < frames

    def step(frame: Tensor, before: Tensor, source: Tensor, change: Tensor) -> tuple[Tensor, ...]:
        now, then = frame * count + place, before * count + place
        apart = _mean((pixels.index_select(0, now) - pixels.index_select(0, then)).abs())
        means = ((sums.index_select(0, now) - sums.index_select(0, then)).abs() / sizes).amax(1)
        differs = torch.maximum(means, apart / PIXELS_COUNT).float()
        before = torch.where(differs <= threshold, before, frame)  # NaN is not
        row = frame.view(1, 1).expand(1, count)
        return frame + 1, before, source.scatter(0, row, before[None]), change.scatter(0, row, differs[None])

    source, change = place.new_zeros((frames, count)), pixels.new_full((frames, count), math.inf)
    start = torch.ones((), dtype=torch.int64, device=pixels.device), torch.zeros_like(place), source, change
    return while_loop(goes_on, step, start)[2:]


def _waiting(source: Tensor, change: Tensor) -> Tensor:
    """float32 [F, S], the least change from there to the end of the run, -1 if active."""
    frames = len(source)
    active = source == torch.arange(frames, device=source.device)[:, None]
    least = [change[frames - 1]]
    for frame in range(frames - 2, -1, -1):
        goes_on = torch.minimum(change[frame], least[-1])
        least.append(torch.where(active[frame + 1], change[frame], goes_on))
    return torch.where(active, -1.0, torch.stack(least[::-1]))


def _size(active: Tensor, changed: Tensor, frames: int, places: int, prefix: int) -> Tensor:
    """int64 []: as many places as the operator computes."""
    every, fewest = frames * places, fewest_places(frames, places, prefix)
    step = math.ceil((every - fewest) / SIZES)
    rounded = fewest + (active - fewest + step - 1) // step * step if step else torch.full_like(active, fewest)
    total = torch.minimum(rounded.clamp_max(every), active + changed)
    return torch.where(5 * active > 4 * every, every, total)


def distinct_frames(source: Tensor, change: Tensor, prefix: int, *, most: int) -> tuple[Tensor, Tensor]:
    """As the operator."""
    source, change = source[..., prefix:], change[..., prefix:]
    exact = (source == torch.arange(source.shape[1], device=source.device)[:, None]) | (change == 0)
    repeats = ((source[:, 1:] == source[:, :-1]) & exact[:, :-1] & (change[:, 1:] == 0)).all(2)
    first = F.pad(~repeats, (1, 0), value=True)
    return first.flatten().cumsum(0) - 1, first.sum(1)


def take_frames(x: Tensor, rows: Tensor, n: int, *, most: int) -> Tensor:
    """As the operator."""
    return x.index_select(0, torch.searchsorted(rows, torch.arange(n, device=rows.device)))


def return_frames(x: Tensor, rows: Tensor, *, most: int) -> Tensor:
    """As the operator."""
    return x.index_select(0, rows)


def pack_places(source: Tensor, total: int, *, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """As the operator."""
    active = source == torch.arange(source.shape[1], device=source.device)[:, None]
    flat = active.flatten()
    packed = flat.cumsum(0) - 1
    index = _places_of(torch.where(flat, packed, total), total)
    rows = packed.view_as(source).gather(1, source).flatten(0, 1)
    offsets = F.pad(active.flatten(0, 1).sum(1).cumsum(0), (1, 0))
    return index, rows, offsets


def _places_of(packed: Tensor, total: int) -> Tensor:
    """int64 [total]: of each packed row its place; ``packed`` int64 [N * S] is ``total`` for places without one."""
    index = packed.new_zeros((total + 1,)).scatter(0, packed, torch.arange(packed.shape[0], device=packed.device))
    return index.narrow(0, 0, total)


def take_places(hidden: Tensor, index: Tensor, *, most: int) -> Tensor:
    """As the operator."""
    return hidden.flatten(0, 1).index_select(0, index).unsqueeze(0)


def return_places(hidden: Tensor, packed: Tensor, index: Tensor, rows: Tensor, *, most: int) -> Tensor:
    """As the operator."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    flat = hidden.flatten(0, 1)
    update = packed[0].to(wide) - flat.index_select(0, index).to(wide)
    moved = update.index_select(0, rows.flatten()) + flat.to(wide)
    return moved.to(hidden.dtype).index_copy(0, index, packed[0]).view(hidden.shape)


def spread_places(packed: Tensor, rows: Tensor, *, most: int) -> Tensor:
    """As the operator."""
    _, heads, _, width = packed.shape
    spread = packed[0].transpose(0, 1).index_select(0, rows.flatten())
    return spread.view(*rows.shape, heads, width).transpose(1, 2)


def reuse_attention(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, offsets: Tensor, scale: float, *, most: int
) -> Tensor:
    """Every place of every frame asks."""
    total = query.shape[2]
    spread = [spread_places(x, rows, most=most) for x in (query, key, value)]
    attended = F.scaled_dot_product_attention(*spread, scale=scale).transpose(1, 2).flatten(0, 1)  # [N * S, H, d]
    own = (rows >= offsets[:-1, None]) & (rows < offsets[1:, None])
    index = _places_of(torch.where(own, rows, total).flatten(), total)
    return attended.index_select(0, index).transpose(0, 1).unsqueeze(0)


def at_places(table: Tensor, index: Tensor, axis: int, *, most: int) -> Tensor:
    """As the operator."""
    return table.index_select(axis, index % table.shape[axis])


FORMS: dict[str, Callable[..., Any]] = {
    form.__name__: form
    for form in (
        plan_reuse, distinct_frames, take_frames, return_frames, pack_places, take_places, return_places,
        spread_places, reuse_attention, at_places,
    )
}  # fmt: skip
"""By the names of their operators."""
