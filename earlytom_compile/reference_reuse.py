"""Reuse of unchanged patches as an executable specification: part of :mod:`earlytom_compile.reference`.

A place of the picture is computed once, and again only in frames in which its pixels changed::

    pixels [F, C, H, W] --plan_reuse--> source [F, S]      place s of frame f was last computed in frame source[f, s]
    hidden [F, S, D]    --encode_with_reuse--> hidden [F, S, D] behind every layer

Plain loops over frames; nothing is packed and nothing is saved: what reuse would not compute is computed here and
thrown away. Every function sees one video. Pixels and their differences are float32; what is made of them (changes,
noise, thresholds) is float64 until it is done, and rounded to float32 once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from earlytom_compile.errors import EarlyTomConfigError

NOTHING_REPEATS = (4, 5)  # with more than 4/5 of the places active, all are computed
SIZES = 16  # steps between the fewest places and all of them
HALVINGS = 12  # of the range of thresholds, in the search for the one that keeps a budget
PIXELS_PER_MEAN = 3  # of the mean absolute difference of pixels a third counts, of that of means all
LOUDEST_NOISE = 2  # noise of more than half the deviation of the picture is the picture
DEVIATIONS = 4  # of what noise does to a mean are let pass
NOISE_OF_PIXELS = 0.4  # of the noise is let pass at least; it makes a third of itself, as the difference of pixels

Layer = Callable[[Tensor], Tensor]
"""``[F, S, D] -> [F, S, D]``, each frame by itself."""


# --- The plan -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReusePlan:
    """Where each place of one video was last computed.

    source: int64 ``[F, S]``; ``source[f, s] == f`` is an *active* place, which is computed in frame f. Any other has
        ``source[f, s] == source[f - 1, s]``, so a source is always an active place of the same video.
    change: float32 ``[F, S]``, how much the place differs from what it was compared with; inf in the first frame, and
        for places in front of the grid.
    noise: the mean absolute difference of an unchanged place's pixels; 0 where it cannot be told.
    threshold: up to which a change does not count.
    """

    source: Tensor
    change: Tensor
    noise: float
    threshold: float

    @property
    def active(self) -> Tensor:
        """bool ``[F, S]``."""
        return self.source == torch.arange(len(self.source), device=self.source.device)[:, None]

    @property
    def computed(self) -> int:
        """T, the number of active places."""
        return int(self.active.sum())


def reuse_budget(frames: int, places: int, encode_ratio: float, prefix: int = 0) -> int:
    """T = max(fewest, round(encode_ratio * F * S)), the places that are computed of ``frames`` x ``places``.

    prefix: how many of the ``places`` of a frame lie in front of its grid. They are computed in every frame, the others
        in one at least: the fewest are S + (F - 1) * prefix.

    Raises EarlyTomConfigError for counts below 1, a prefix that leaves no place, or a ratio outside (0, 1].
    """
    _require(_is_count(frames, 1), f"frames={frames!r}: must be an integer of at least 1")
    _require(_is_count(places, 1), f"places={places!r}: must be an integer of at least 1")
    fine = _is_count(prefix, 0) and prefix < places
    _require(fine, f"prefix={prefix!r}: must be an integer from 0 to {places - 1}, one less than places")
    fine = _is_number(encode_ratio) and 0 < encode_ratio <= 1
    _require(fine, f"encode_ratio={encode_ratio!r}: must be a number in (0, 1]")
    return max(places + (frames - 1) * prefix, round(encode_ratio * frames * places))


def plan_reuse(
    pixels: Tensor,
    grid: Sequence[int],
    patch: Sequence[int],
    *,
    prefix: int = 0,
    tau_reuse: float = 0.0,
    budget: int | None = None,
) -> ReusePlan:
    """Which places of one video are computed in which frames, for ``pixels [F, C, H, W]`` as the model gets them.

    grid: rows and columns of patches; patch: height and width of one, in pixels. The grid begins in the upper left
        corner; what lies beside it belongs to no place.
    prefix: places in front of those of the grid, such as a class token. They have no pixels that could tell when
        they change, so they are active in every frame.
    tau_reuse: how much a place may differ from its source (:meth:`_Patches.change`), beside what the noise of the
        video does, which is measured (:func:`_noise`).
    budget: T, exactly as many places as are to be computed, from S + (F - 1) * prefix to F * S; ``tau_reuse`` then
        has no effect, the threshold is the smallest that bisection finds to leave no more than T. ``None``: what the
        threshold says, rounded up to one of at most 17 sizes; and everything if more than 4/5 of all places change.

    What is missing to T is filled up with the most changed places (:func:`_fill`); without a budget with no others.

    Raises EarlyTomConfigError for pixels of another shape or dtype or that are not finite, a grid that they do not
    hold, or an option out of range.
    """
    _check_pixels(pixels, grid, patch)
    _require(_is_count(prefix, 0), f"prefix={prefix!r}: must be an integer of at least 0")
    fine = _is_number(tau_reuse) and 0 <= tau_reuse < math.inf
    _require(fine, f"tau_reuse={tau_reuse!r}: must be a finite number of at least 0")
    patches = _Patches(pixels.float().cpu(), (int(grid[0]), int(grid[1])), (int(patch[0]), int(patch[1])), prefix)
    noise = _noise(patches)
    if budget is None:
        threshold = _float32(math.hypot(tau_reuse, _let_pass(noise, patches.patch)))
    else:
        least, most = patches.fewest, patches.frames * patches.places
        fine = _is_count(budget, least) and budget <= most
        _require(fine, f"budget={budget!r}: must be None or an integer from {least} to {most}")
        threshold = _smallest_threshold(patches, budget)
    source, change = _scan(patches, threshold)
    size = _rounded_up(_active_places(source), patches) if budget is None else budget
    _fill(source, change, size, only_changed=budget is None and size < patches.frames * patches.places)
    return ReusePlan(
        source=torch.tensor(source, dtype=torch.int64, device=pixels.device),
        change=torch.tensor(change, dtype=torch.float32, device=pixels.device),
        noise=noise,
        threshold=threshold,
    )


class _Patches:
    """The pixels of every patch of one video: ``pixels`` float32 ``[F, C, H, W]``."""

    def __init__(self, pixels: Tensor, grid: tuple[int, int], patch: tuple[int, int], prefix: int) -> None:
        self.pixels, self.grid, self.patch, self.prefix = pixels, grid, patch, prefix
        self.frames, self.places = len(pixels), prefix + grid[0] * grid[1]
        self.fewest = self.places + (self.frames - 1) * prefix
        patches = range(self.places - prefix)
        self._means = [[_quarter_means(self.of(f, p)) for p in patches] for f in range(self.frames)]

    def of(self, frame: int, patch: int) -> Tensor:
        """``[C, height, width]``."""
        height, width = self.patch
        row, column = divmod(patch, self.grid[1])
        return self.pixels[frame, :, row * height : (row + 1) * height, column * width : (column + 1) * width]

    def change(self, a: int, b: int, patch: int) -> float:
        """d(a, b, patch): the largest difference of the means of its quarters, over quarters and channels, or a third
        of the mean absolute difference of its pixels if that is more.

        Means hardly follow noise, compression and fine texture, as features do not; what moves within the quarters,
        such as text that scrolls, may leave all of them as they were.
        """
        means = (self._means[a][patch] - self._means[b][patch]).abs().max()
        pixels = (self.of(a, patch) - self.of(b, patch)).abs().double().mean() / PIXELS_PER_MEAN
        return torch.maximum(means, pixels).float().item()


def _quarter_means(view: Tensor) -> Tensor:
    """``[C, height, width]`` -> float64 ``[quarters, C]``: cut at half its height and half its width, rounded down; a
    side of one pixel is not cut."""
    height, width = view.shape[1] // 2, view.shape[2] // 2
    upper, lower = view[:, :height], view[:, height:]
    quarters = [upper[:, :, :width], upper[:, :, width:], lower[:, :, :width], lower[:, :, width:]]
    return torch.stack([quarter.double().mean((1, 2)) for quarter in quarters if quarter.numel()])


def _scan(patches: _Patches, threshold: float) -> tuple[list[list[int]], list[list[float]]]:
    """Source and change of every place. Compared is always with the start of the run, so slow drift adds up to one
    change, not to none."""
    prefix, places = patches.prefix, patches.places
    source, change = [[0] * places], [[math.inf] * places]
    for f in range(1, patches.frames):
        before = source[-1][prefix:]
        changes = [patches.change(f, g, p) for p, g in enumerate(before)]
        source.append([f] * prefix + [g if d <= threshold else f for g, d in zip(before, changes, strict=True)])
        change.append([math.inf] * prefix + changes)
    return source, change


def _active_places(source: list[list[int]]) -> int:
    return sum(row.count(f) for f, row in enumerate(source))


def _noise(patches: _Patches) -> float:
    """nu: what the mean absolute difference of a patch would be if nothing but noise had changed.

    Of the differences between neighbouring frames, each 2x2 block (a b / c d) of a patch says (a - b - c + d) / 2,
    which smooth changes (light, motion of what has no fine texture) leave near 0, and which has the spread of a
    single difference if pixels are independent. nu is the lower median, over patches and pairs of frames, of the mean
    absolute value of that. 0 for one frame, for patches of one row or column, and where it is more than half the
    standard deviation of all pixels inside the grid: frames that have nothing in common look like noise as well.
    """
    found = []
    for f in range(1, patches.frames):
        for p in range(patches.places - patches.prefix):
            apart = patches.of(f, p) - patches.of(f - 1, p)
            height, width = apart.shape[1] // 2 * 2, apart.shape[2] // 2 * 2
            blocks = apart[:, :height, :width]
            a, b, c, d = blocks[:, ::2, ::2], blocks[:, ::2, 1::2], blocks[:, 1::2, ::2], blocks[:, 1::2, 1::2]
            if a.numel():
                found.append(((a - b - c + d) / 2).abs().double().mean().float().item())
    if not found:
        return 0.0
    (rows, columns), (height, width) = patches.grid, patches.patch
    inside = patches.pixels[:, :, : rows * height, : columns * width].double()
    n, total, squares = inside.numel(), inside.sum().item(), inside.square().sum().item()
    median = sorted(found)[(len(found) - 1) // 2]
    # The deviation is sqrt(squares / n - (total / n)**2); without a root and a quotient, whole numbers stay exact.
    return median if (LOUDEST_NOISE * n * median) ** 2 <= n * squares - total**2 else 0.0


def _let_pass(noise: float, patch: tuple[int, int]) -> float:
    """Two means over the n pixels of a quarter differ by sigma * sqrt(2 / n), with noise = 2 * sigma / sqrt(pi)."""
    n = max(1, patch[0] // 2) * max(1, patch[1] // 2)
    return noise * max(DEVIATIONS * math.sqrt(math.pi / (2 * n)), NOISE_OF_PIXELS)


def _rounded_up(active: int, patches: _Patches) -> int:
    """Few sizes, so that what was compiled for one is met again; all places only where nothing repeats."""
    everything, fewest = patches.frames * patches.places, patches.fewest
    share, whole = NOTHING_REPEATS
    if active * whole > everything * share:
        return everything
    step = math.ceil((everything - fewest) / SIZES)
    return min(fewest + math.ceil((active - fewest) / step) * step, everything)


def _smallest_threshold(patches: _Patches, budget: int) -> float:
    """Bisection between 0 and the range of the pixels, at which no patch ever changes."""

    def fits(threshold: float) -> bool:
        return _active_places(_scan(patches, threshold)[0]) <= budget

    low, high = 0.0, (patches.pixels.max() - patches.pixels.min()).item()
    if fits(low):
        return low
    for _ in range(HALVINGS):
        middle = _float32((low + high) / 2)
        if fits(middle):
            high = middle
        else:
            low = middle
    return high


def _fill(source: list[list[int]], change: list[list[float]], total: int, *, only_changed: bool = False) -> None:
    """Make the most changed places active, in place, until there are ``total``; ``only_changed``: no unchanged ones.

    A run is an active place and the inactive ones behind it that read it. Only the last one of a run may be taken:
    then nobody reads another source than before. Of the last ones of all runs it is always the one of the largest
    change; of equal ones that of the lower place, of these the later.
    """
    frames, places = len(source), len(source[0])

    def ends_a_run(f: int, s: int) -> bool:
        return source[f][s] != f and (f + 1 == frames or source[f + 1][s] == f + 1)

    last = [(f, s) for f in range(frames) for s in range(places) if ends_a_run(f, s)]
    for _ in range(total - _active_places(source)):
        f, s = max(last, key=lambda end: (change[end[0]][end[1]], -end[1], end[0]))
        if only_changed and change[f][s] == 0:
            return
        source[f][s] = f
        last.remove((f, s))
        if ends_a_run(f - 1, s):
            last.append((f - 1, s))


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


# --- The layers -----------------------------------------------------------------------------------


def encode_with_reuse(
    hidden: Tensor, layers: Sequence[Layer], source: Tensor, *, full_layers: Collection[int] = ()
) -> list[Tensor]:
    """One video through the encoder: ``hidden [F, S, D]`` -> ``[F, S, D]`` before the first and behind every layer.

    layers: the model's own, each ``[F, S, D] -> [F, S, D]``, of which every operator but attention treats each place
        by itself; attention stays inside a frame.
    source: int64 ``[F, S]`` of :func:`plan_reuse`.
    full_layers: 0-based; they compute every place from its own state, as without reuse.

    In any other layer a frame attends to what its places' sources are (:func:`read_sources`), active places get what
    the layer makes of them, and an inactive one changes as its source does (:func:`share_updates`).

    Raises EarlyTomConfigError for a wrong shape or dtype, sources that no plan has, or a layer that does not exist.
    """
    _check_hidden(hidden)
    _check_source(source, hidden)
    strange = sorted(set(full_layers) - set(range(len(layers))))
    _require(not strange, f"full_layers={tuple(full_layers)}: the encoder has layers 0 to {len(layers) - 1}")
    states = [hidden]
    for index, layer in enumerate(layers):
        if index in full_layers:
            states.append(layer(states[-1]))
        else:
            states.append(share_updates(states[-1], layer(read_sources(states[-1], source)), source))
    return states


def read_sources(hidden: Tensor, source: Tensor) -> Tensor:
    """What a reusing layer sees: ``[F, S, ...]``, at (f, s) the row of (source[f, s], s) of ``hidden [F, S, ...]``.

    Queries of active places are among it, since they are their own sources; queries of the others are not used.
    """
    _check_source(source, hidden)
    return torch.stack([torch.stack([hidden[g, s] for s, g in enumerate(row)]) for row in source.tolist()])


def share_updates(hidden: Tensor, output: Tensor, source: Tensor) -> Tensor:
    """What a reusing layer leaves: ``[F, S, D]``, from its ``hidden`` states and the layer's ``output``, likewise.

    An active place gets its output. An inactive one keeps its own state and takes over the residual update of its
    source: h[f, s] + (output - hidden)[source[f, s], s], added in float32 (float64 for float64).
    """
    _check_source(source, hidden)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    update = output.to(wide) - hidden.to(wide)
    left = output.clone()
    for f, row in enumerate(source.tolist()):
        for s, g in enumerate(row):
            if g != f:
                left[f, s] = (hidden[f, s].to(wide) + update[g, s]).to(hidden.dtype)
    return left


def importance_with_reuse(query: Tensor, key: Tensor, source: Tensor, *, scale: float) -> Tensor:
    """Attention that each place receives in a layer that reuses: float32 ``[F, S]``, mean over heads and queries.

    query, key: ``[F, S, H, d]``, of which only the rows of active places count: every place of a frame asks and is
    asked with what its source has. Without reuse it is the same with every place its own source.
    """
    query, key = read_sources(query, source).float(), read_sources(key, source).float()
    received = []
    for queries, keys in zip(query, key, strict=True):
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        received.append(scores.softmax(-1).mean((0, 1)))
    return torch.stack(received)


# --- What input means something -------------------------------------------------------------------


def _require(fine: bool, message: str) -> None:
    if not fine:
        raise EarlyTomConfigError(message)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_pixels(pixels: Tensor, grid: Sequence[int], patch: Sequence[int]) -> None:
    _require(
        pixels.dim() == 4 and 0 not in pixels.shape and pixels.is_floating_point(),
        f"pixels has shape {tuple(pixels.shape)} and dtype {pixels.dtype}; "
        "it must be [frames, channels, height, width] of one video, none of them 0, of a floating dtype",
    )
    _require(bool(torch.isfinite(pixels).all()), "pixels holds NaN or inf; frames cannot be compared")
    for name, value in (("grid", grid), ("patch", patch)):
        fine = len(value) == 2 and all(_is_count(side, 1) for side in value)
        _require(fine, f"{name}={value!r}: must be two integers of at least 1, of rows and of columns")
    needed = [count * side for count, side in zip(grid, patch, strict=True)]
    _require(
        needed[0] <= pixels.shape[2] and needed[1] <= pixels.shape[3],
        f"grid={tuple(grid)} of patch={tuple(patch)} needs {needed[0]} x {needed[1]} pixels; "
        f"pixels has {pixels.shape[2]} x {pixels.shape[3]}",
    )


def _check_hidden(hidden: Tensor) -> None:
    _require(
        hidden.dim() == 3 and 0 not in hidden.shape and hidden.is_floating_point(),
        f"hidden has shape {tuple(hidden.shape)} and dtype {hidden.dtype}; "
        "it must be [frames, places, channels], none of them 0, of a floating dtype",
    )


def _check_source(source: Tensor, hidden: Tensor) -> None:
    rows = source.tolist()
    follows = source.shape == hidden.shape[:2] and all(
        g == f or (f > 0 and g == rows[f - 1][s]) for f, row in enumerate(rows) for s, g in enumerate(row)
    )
    _require(
        follows,
        f"source has shape {tuple(source.shape)}; it must be [frames, places] of a tensor of shape "
        f"{tuple(hidden.shape)}, and each the source of the frame before or the frame itself, as plan_reuse says",
    )
