"""Reuse of unchanged patches as an executable specification: part of :mod:`earlytom_compile.reference`.

A place of the picture is computed once, and again only in frames in which its pixels changed::

    pixels [F, C, H, W] --plan_reuse--> source [F, S]      place s of frame f was last computed in frame source[f, s]
    hidden [F, S, D]    --encode_with_reuse--> hidden [F, S, D] behind every layer

Plain loops over frames; nothing is packed and nothing is saved: what reuse would not compute is computed here and
thrown away. Every function sees one video. Differences of pixels, the noise and the thresholds are float32, sums over
pixels float64 before they are rounded to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from earlytom_compile.errors import EarlyTomConfigError

NOTHING_REPEATS = (4, 5)  # with more than 4/5 of the places active, all are computed
SIZES = 16  # steps between one frame and all of them
HALVINGS = 12  # of the range of thresholds, in the search for the one that keeps a budget
NOISE_QUARTER = 4  # the noise is that of the quietest quarter of all patches

Layer = Callable[[Tensor], Tensor]
"""``[F, S, D] -> [F, S, D]``, each frame by itself."""


# --- The plan -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReusePlan:
    """Where each place of one video was last computed.

    source: int64 ``[F, S]``; ``source[f, s] == f`` is an *active* place, which is computed in frame f. Any other has
        ``source[f, s] == source[f - 1, s]``, so a source is always an active place of the same video.
    change: float32 ``[F, S]``, how much the place differs from what it was compared with; inf in the first frame.
    noise: of the video, in units of ``change``.
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


def reuse_budget(frames: int, places: int, encode_ratio: float) -> int:
    """T = max(S, round(encode_ratio * F * S)), the places that are computed of ``frames`` x ``places``.

    Raises EarlyTomConfigError for counts below 1 or a ratio outside (0, 1].
    """
    _require(_is_count(frames, 1), f"frames={frames!r}: must be an integer of at least 1")
    _require(_is_count(places, 1), f"places={places!r}: must be an integer of at least 1")
    fine = _is_number(encode_ratio) and 0 < encode_ratio <= 1
    _require(fine, f"encode_ratio={encode_ratio!r}: must be a number in (0, 1]")
    return max(places, round(encode_ratio * frames * places))


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
    prefix: places in front of those of the grid, such as a class token; their pixels are those of the whole grid.
    tau_reuse: how much a place may differ from its source, beside the noise of the video, which is measured.
    budget: T, exactly as many places as are to be computed; ``tau_reuse`` then has no effect, the threshold is the
        smallest that bisection finds to leave no more than T. ``None``: what the threshold says, rounded up to one
        of at most 17 sizes; and everything if more than 4/5 of all places change.

    What is missing to T is filled up with the most changed places, see :func:`_fill`.

    Raises EarlyTomConfigError for pixels of another shape or dtype or that are not finite, a grid that they do not
    hold, or an option out of range.
    """
    _check_pixels(pixels, grid, patch)
    _require(_is_count(prefix, 0), f"prefix={prefix!r}: must be an integer of at least 0")
    fine = _is_number(tau_reuse) and 0 <= tau_reuse < math.inf
    _require(fine, f"tau_reuse={tau_reuse!r}: must be a finite number of at least 0")
    views = _Views(pixels.float().cpu(), (int(grid[0]), int(grid[1])), (int(patch[0]), int(patch[1])), prefix)
    frames, places = len(pixels), views.places
    noise = _noise(views)
    if budget is None:
        threshold = torch.tensor(tau_reuse, dtype=torch.float32) + noise
        source, change = _scan(views, threshold)
        total = _rounded_up(_active_places(source), frames, places)
    else:
        fine = _is_count(budget, places) and budget <= frames * places
        _require(fine, f"budget={budget!r}: must be None or an integer from {places} to {frames * places}")
        threshold = _smallest_threshold(views, budget)
        source, change = _scan(views, threshold)
        total = budget
    _fill(source, change, total)
    return ReusePlan(
        source=torch.tensor(source, dtype=torch.int64, device=pixels.device),
        change=torch.tensor(change, dtype=torch.float32, device=pixels.device),
        noise=noise.item(),
        threshold=threshold.item(),
    )


@dataclass(frozen=True)
class _Views:
    """The pixels of each place: ``pixels`` float32 ``[F, C, H, W]``."""

    pixels: Tensor
    grid: tuple[int, int]
    patch: tuple[int, int]
    prefix: int

    @property
    def places(self) -> int:
        return self.prefix + self.grid[0] * self.grid[1]

    def of(self, frame: int, place: int) -> Tensor:
        """``[C, height, width]``."""
        (rows, columns), (height, width) = self.grid, self.patch
        if place < self.prefix:
            return self.pixels[frame, :, : rows * height, : columns * width]
        row, column = divmod(place - self.prefix, columns)
        top, left = row * height, column * width
        return self.pixels[frame, :, top : top + height, left : left + width]

    def difference(self, a: int, b: int, place: int) -> Tensor:
        """d(a, b, place): float32 [], the mean absolute difference of its pixels between two frames."""
        return (self.of(a, place) - self.of(b, place)).abs().double().mean().float()


def _scan(views: _Views, threshold: Tensor) -> tuple[list[list[int]], list[list[float]]]:
    """Source and change of every place. Compared is always with the start of the run, so slow drift adds up to one
    change, not to none."""
    source = [[0] * views.places]
    change = [[math.inf] * views.places]
    for f in range(1, len(views.pixels)):
        differences = [views.difference(f, source[-1][s], s) for s in range(views.places)]
        source.append([source[-1][s] if d <= threshold else f for s, d in enumerate(differences)])
        change.append([d.item() for d in differences])
    return source, change


def _active_places(source: list[list[int]]) -> int:
    return sum(row.count(f) for f, row in enumerate(source))


def _noise(views: _Views) -> Tensor:
    """nu: float32 [], what the mean absolute difference of a place would be if nothing but noise had changed.

    Of the differences between neighbouring frames, each 2x2 block (a b / c d) of a patch says (a - b - c + d) / 2,
    which smooth changes (light, motion of what has no fine texture) leave near 0, and which has the spread of a
    single difference if pixels are independent. nu is the lower first quartile, over patches and pairs of frames, of
    the mean absolute value of that. 0 for one frame, and for patches of one row or column.
    """
    found = []
    for f in range(1, len(views.pixels)):
        for s in range(views.prefix, views.places):
            apart = views.of(f, s) - views.of(f - 1, s)
            height, width = apart.shape[1] // 2 * 2, apart.shape[2] // 2 * 2
            blocks = apart[:, :height, :width]
            a, b, c, d = blocks[:, ::2, ::2], blocks[:, ::2, 1::2], blocks[:, 1::2, ::2], blocks[:, 1::2, 1::2]
            if a.numel():
                found.append(((a - b - c + d) / 2).abs().double().mean().float())
    return sorted(found)[(len(found) - 1) // NOISE_QUARTER] if found else torch.tensor(0.0)


def _rounded_up(active: int, frames: int, places: int) -> int:
    """T for that many active places: few sizes, so that what was compiled for one is met again."""
    share, whole = NOTHING_REPEATS
    if active * whole > frames * places * share:
        return frames * places
    step = math.ceil((frames - 1) * places / SIZES)
    return min(places + math.ceil((active - places) / step) * step, frames * places)


def _smallest_threshold(views: _Views, budget: int) -> Tensor:
    """float32 []: bisection between 0 and the range of the pixels, at which no place ever changes."""

    def fits(threshold: Tensor) -> bool:
        return _active_places(_scan(views, threshold)[0]) <= budget

    low, high = torch.tensor(0.0), views.pixels.max() - views.pixels.min()
    if fits(low):
        return low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if fits(middle):
            high = middle
        else:
            low = middle
    return high


def _fill(source: list[list[int]], change: list[list[float]], total: int) -> None:
    """Make the most changed places active, in place, until there are ``total``.

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
        source[f][s] = f
        last.remove((f, s))
        if ends_a_run(f - 1, s):
            last.append((f - 1, s))


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
