"""The algorithm as an executable specification: one function a rule, plain PyTorch, written to be read.

Everything fast in this package is tested against this file, so it shares no code with it and may be slow.
Every function sees **one** video (or one prompt row): isolation between videos is calling it once for each.

    32 frames --plan_frame_merge--> 20 frames --select_tokens--> K tokens --merge_inner_tokens--> fewer still

In the place of the first, patches that did not change are not computed again: ``plan_reuse`` and ``encode_with_reuse``,
which stand in :mod:`earlytom_compile.reference_reuse` and are part of this module.

Two variants, everywhere the keyword ``variant``:

* ``"paper"``: EarlyTom, Eq. 1-7 and Algorithms 1-2, with the gaps closed as each function says.
* ``"released"``: what the authors' code (commit b909322) computes, quirks included.

``variant="plus"`` of the package is ``"paper"`` with :func:`select_representatives` in the place of
:func:`select_tokens`, and with reuse in the place of merging unless asked otherwise.

Similarities, the running average and the thresholds are float32 whatever the dtype of the features, and are
compared as such. Ties go to the lower index. Bad input raises EarlyTomConfigError.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from earlytom_compile.errors import EarlyTomConfigError
from earlytom_compile.reference_reuse import (
    ReusePlan,
    encode_with_reuse,
    importance_with_reuse,
    plan_reuse,
    read_sources,
    reuse_budget,
    share_updates,
)

__all__ = [
    "FrameMergePlan",
    "ReusePlan",
    "encode_with_reuse",
    "frame_similarity",
    "importance_with_reuse",
    "merge_inner_tokens",
    "plan_frame_merge",
    "plan_reuse",
    "read_sources",
    "reuse_budget",
    "segment_frames",
    "select_representatives",
    "select_tokens",
    "share_updates",
]

VARIANTS = ("paper", "released")
DEFAULT_MAX_WINDOW = 128  # the paper names none; with it, no frame is compared with more than 127 others
RELEASED_MAX_WINDOW = 8  # the released code's default of its environment variable M
WINDOW, STRIP = 8, 16  # most frames, and tokens of each, among which representatives are looked for together
POWER = 0.75  # of a token's distance from the mean, with which it counts
FADING = 0.75  # of a token's likeness, what is left one merged frame further away
TIE = 1e-3  # gains this close are equal: rounding must not choose among copies of a token


Segment = tuple[int, int]  # first and last frame, both inclusive


# --- Stage 1: frame merging inside the vision encoder ---------------------------------------------


@dataclass(frozen=True)
class FrameMergePlan:
    """Which frames become one, and with which weights.

    weights: float32 ``[T', T]``; merged frame ``o`` is ``sum_t weights[o, t] * frame[t]``, in time order. The
        row of an untouched frame is a single 1. ``paper``: every row sums to 1, no weight leaves [0, 1].
    segments: int64 ``[n, 2]``, first and last **input** frame of each segment, inclusive.
    """

    weights: Tensor
    segments: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Merge ``x [T, ...]`` (features, importance, timestamps) to ``[T', ...]``; a floating dtype, kept.

        Untouched frames are exact copies; merged ones are blended in float32 (float64 for float64 input).
        Raises EarlyTomConfigError when ``x`` has another number of frames or no floating dtype.
        """
        frames = self.weights.shape[1]
        if x.dim() == 0 or x.shape[0] != frames:
            raise EarlyTomConfigError(
                f"x has shape {tuple(x.shape)}; its first dimension must be the {frames} frames of this plan"
            )
        if not x.is_floating_point():
            raise EarlyTomConfigError(f"x has dtype {x.dtype}; only floating dtypes can be blended, convert it first")
        wide = torch.promote_types(x.dtype, torch.float32)
        merged = [_blend(row, x, wide) for row in self.weights.to(x.device)]
        return torch.stack(merged).to(x.dtype)


def _blend(row: Tensor, x: Tensor, wide: torch.dtype) -> Tensor:
    """One merged frame; frames of weight 0 are left out, so that an inf in them cannot leak in as NaN."""
    sources = row.nonzero().flatten().tolist()
    blended = row[sources[0]].to(wide) * x[sources[0]].to(wide)
    for t in sources[1:]:
        blended = blended + row[t].to(wide) * x[t].to(wide)
    return blended


def frame_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Mean over token positions of the cosine of the two tokens there: ``[S, D], [S, D] -> float32 []``.

    Symmetric, and exactly 1 for equal frames without zero tokens: the pairs of a static video tie exactly.
    """
    return _cosine(a, b).mean().float()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine over the last dimension, float64; 0 with a zero vector.

    Float64, because rounded to float32 it then hardly ever depends on the order of the channels. The root of
    the product, not the product of the roots: sqrt(x * x) == x in IEEE arithmetic, so equal vectors give 1.
    """
    a, b = a.double().contiguous(), b.double().contiguous()
    dot = (a * b).sum(-1)
    norms = ((a * a).sum(-1) * (b * b).sum(-1)).sqrt()
    return torch.where(norms > 0, dot / norms, torch.zeros_like(dot))


def segment_frames(
    hidden: Tensor,
    *,
    variant: Literal["paper", "released"] | str,
    tau_seg: float,
    alpha: float = 0.9,
    max_window: int | None = None,
) -> Tensor:
    """Cut a video where it changes (Eq. 1): ``hidden [T, S, D]`` -> int64 ``[n, 2]``, first and last frame.

    The segments follow one another and cover all frames. A running average starts at 1 on a segment's first
    frame and follows ``alpha * s_t + (1 - alpha) * average``; the video is cut before frame t when it falls
    below ``tau_seg``, or when the open segment is full.

    ===============  ==================================  ==================================================
    ..               ``paper``                           ``released``
    ===============  ==================================  ==================================================
    s_t              s(t, t - 1)                         s(t, first frame of the open segment)
    full             it has ``max_window`` frames;       t - first + 1 >= ``max_window`` (so segments have
                     ``None``: 128                       max_window - 1 frames); ``None``: 8
    ===============  ==================================  ==================================================

    Raises EarlyTomConfigError for a wrong shape or dtype, non-finite features, or an option out of range.
    """
    _check_variant(variant)
    _check_hidden(hidden)
    _check_segment_options(tau_seg, alpha, max_window)
    segments = _segments(hidden, variant, tau_seg, alpha, max_window)
    return torch.tensor(segments, dtype=torch.int64, device=hidden.device)


def _segments(hidden: Tensor, variant: str, tau_seg: float, alpha: float, max_window: int | None) -> list[Segment]:
    threshold = torch.tensor(tau_seg, dtype=torch.float32)
    segments: list[Segment] = []
    first, average = 0, torch.tensor(1.0)
    for t in range(1, hidden.shape[0]):
        reference = t - 1 if variant == "paper" else first
        s_t = frame_similarity(hidden[t], hidden[reference]).cpu()
        average = alpha * s_t + (1 - alpha) * average
        if average < threshold or _segment_is_full(t - first, variant, max_window):
            segments.append((first, t - 1))
            first, average = t, torch.tensor(1.0)
    segments.append((first, hidden.shape[0] - 1))
    return segments


def _segment_is_full(frames: int, variant: str, max_window: int | None) -> bool:
    if variant == "released":
        return frames + 1 >= (RELEASED_MAX_WINDOW if max_window is None else max_window)
    return frames >= (DEFAULT_MAX_WINDOW if max_window is None else max_window)


def plan_frame_merge(
    hidden: Tensor,
    *,
    variant: Literal["paper", "released"] | str,
    tau_seg: float,
    alpha: float = 0.9,
    max_window: int | None = None,
    tau_merge: float | Literal["segment"] | str = "segment",
    min_frames: int = 1,
) -> FrameMergePlan:
    """Which neighbouring frames of one video to merge (Eq. 1-3, Algorithm 1), for ``hidden [T, S, D]``.

    Head and tail of each segment stay. The frames between them are walked from the left; a pair that merges
    is skipped as a whole, otherwise the walk advances by one frame. The two variants differ in the test
    (:func:`_paper_merges`, :func:`_released_rows`) and in the weights (:func:`_paper_weight`,
    :func:`_released_weight`).

    tau_merge: the similarity a pair needs, or ``"segment"``: s(head, tail) of its segment.
    min_frames: ``paper`` only: no fewer frames may remain; ceil(retain_ratio * frames of the video) lets
        Stage 2 fill its budget. Merges are undone, the least similar first (ties: the later pair first). The
        released code has no such floor, so ``released`` ignores it.

    Raises EarlyTomConfigError for a wrong shape or dtype, non-finite features, or an option out of range.
    """
    _check_variant(variant)
    _check_hidden(hidden)
    _check_segment_options(tau_seg, alpha, max_window)
    _check_merge_options(tau_merge, min_frames)
    segments = _segments(hidden, variant, tau_seg, alpha, max_window)
    rows: list[dict[int, Tensor]] = []
    if variant == "released":
        for segment in segments:
            rows += _released_rows(hidden, segment, tau_merge)
    else:
        merges = [m for segment in segments for m in _paper_merges(hidden, segment, tau_merge)]
        rows = _paper_rows(hidden.shape[0], _undo_below_floor(merges, hidden.shape[0], min_frames))
    weights = torch.zeros(len(rows), hidden.shape[0])
    for o, row in enumerate(rows):
        for t, weight in row.items():
            weights[o, t] = weight
    return FrameMergePlan(weights.to(hidden.device), torch.tensor(segments, dtype=torch.int64, device=hidden.device))


def _merge_threshold(hidden: Tensor, segment: Segment, tau_merge: float | str) -> Tensor:
    if isinstance(tau_merge, str):
        head, tail = segment
        return frame_similarity(hidden[head], hidden[tail]).cpu()
    return torch.tensor(tau_merge, dtype=torch.float32)


def _following_similarity(hidden: Tensor, t: int) -> Tensor:
    """s_t = s(t, t + 1), the weight of frame t in Eq. 3."""
    return frame_similarity(hidden[t], hidden[t + 1]).cpu()


@dataclass(frozen=True)
class _Merge:
    """Frames ``first`` and ``first + 1`` become one; ``weight`` is the share of ``first``."""

    first: int
    similarity: float
    weight: Tensor


def _paper_merges(hidden: Tensor, segment: Segment, tau_merge: float | str) -> list[_Merge]:
    """Eq. 2 with ties let in: (i, i+1) merges iff s_i >= tau_merge and s_i >= s_{i+1}.

    Both are middle frames, so s_{i+1} always exists: for the last pair it is that of its second frame to the
    tail. Ties merge, and the first pair wins, so that a static video merges most.
    """
    head, tail = segment
    merges: list[_Merge] = []
    if tail - head + 1 < 4:
        return merges
    threshold = _merge_threshold(hidden, segment, tau_merge)
    i = head + 1
    while i + 1 < tail:
        s_i, s_next = _following_similarity(hidden, i), _following_similarity(hidden, i + 1)
        if s_i >= threshold and s_i >= s_next:
            merges.append(_Merge(i, s_i.item(), _paper_weight(s_i, s_next)))
            i += 2
        else:
            i += 1
    return merges


def _paper_weight(s_i: Tensor, s_next: Tensor) -> Tensor:
    """Eq. 3: the share s_i / (s_i + s_{i+1}) of the first frame; the second has the rest.

    A similarity acts as a weight in [0, 1], so a negative one counts as 0; both 0 is half and half.
    """
    s_i, s_next = s_i.clamp(0, 1), s_next.clamp(0, 1)
    total = s_i + s_next
    return s_i / total if total > 0 else torch.tensor(0.5)


def _undo_below_floor(merges: list[_Merge], frames: int, min_frames: int) -> list[_Merge]:
    """Drop merges until ``min_frames`` frames remain: least similar first, of equal ones the later."""
    excess = len(merges) - max(0, frames - min_frames)
    undone = sorted(merges, key=lambda m: (m.similarity, -m.first))[: max(0, excess)]
    return [m for m in merges if m not in undone]


def _paper_rows(frames: int, merges: list[_Merge]) -> list[dict[int, Tensor]]:
    """One ``{source frame: weight}`` for every remaining frame, in time order."""
    by_first = {m.first: m for m in merges}
    rows: list[dict[int, Tensor]] = []
    t = 0
    while t < frames:
        if t in by_first:
            weight = by_first[t].weight
            rows.append({t: weight, t + 1: 1 - weight})
            t += 2
        else:
            rows.append({t: torch.tensor(1.0)})
            t += 1
    return rows


def _released_rows(hidden: Tensor, segment: Segment, tau_merge: float | str) -> list[dict[int, Tensor]]:
    """What the released code makes of one segment, head and tail included.

    Its walk over two or more middle frames ends at the last one without ever emitting it on its own: unless a
    pair takes it in (with weight 0, see :func:`_released_weight`), it is gone.
    """
    head, tail = segment
    whole = torch.tensor(1.0)
    middle = range(head + 1, tail)
    if len(middle) < 2:
        return [{t: whole} for t in range(head, tail + 1)]
    rows = [{head: whole}]
    threshold = _merge_threshold(hidden, segment, tau_merge)
    i, last = middle[0], middle[-1]
    while i < last:
        s_i = _following_similarity(hidden, i)
        s_next = _following_similarity(hidden, i + 1) if i + 1 < last else torch.tensor(0.0)
        # Strict tests; the last pair has nothing after it to be compared with.
        if s_i > threshold and (i + 1 == last or s_i > s_next):
            weight = _released_weight(s_i, s_next)
            rows.append({i: weight, i + 1: 1 - weight})
            i += 2
        else:
            rows.append({i: whole})
            i += 1
    return [*rows, {tail: whole}]


def _released_weight(s_i: Tensor, s_next: Tensor) -> Tensor:
    """Eq. 3 unclamped (negative s_{i+1}: weights outside [0, 1]); 1 if s_{i+1} == 0, as in a last pair."""
    return s_i / (s_i + s_next) if s_next != 0 else torch.tensor(1.0)


# --- Stage 2: token selection after projector and pooling -----------------------------------------


def select_tokens(
    importance: Tensor,
    segments: Tensor | Sequence[Sequence[int]],
    *,
    frames_in: int,
    retain_ratio: float,
    variant: Literal["paper", "released"] | str,
) -> Tensor:
    """The tokens of one video that reach the LLM (Eq. 4-7): int64 ``[K, 2]``, rows of (frame, token).

    Rows are in time order, and in raster order within a frame.

    importance: ``[N, P]``, attention each pooled token of the N merged frames receives; any floating dtype.
    segments: int ``[n, 2]``, the segmentation of the merged frames. Head and tail of each are dynamic frames,
        which keep their most important tokens; the others are static: their raster order is cut into as many
        near-equal runs (longer ones first) as they may keep tokens, and each run keeps its best one.
    frames_in: B, frames of the video before any merging.
    retain_ratio: r, the share of the B * P tokens to keep, in (0, 1].

    Budget: ``paper`` keeps exactly K = max(1, round(r * B * P)) (what the misprinted Eq. 5 is for), see
    :func:`_paper_budget`. ``released`` keeps a number a frame, see :func:`_released_budget`.

    Raises EarlyTomConfigError for wrong shapes, NaN importance, segments that are no partition of the frames,
    options out of range, or (``paper``) K > N * P.
    """
    _check_variant(variant)
    _check_importance(importance)
    frames, tokens = importance.shape
    _check_budget_options(frames_in, retain_ratio)
    dynamic = _dynamic_frames(_checked_segments(segments, frames), frames)
    if variant == "paper":
        budget = _paper_budget(dynamic, tokens, frames_in, retain_ratio)
    else:
        budget = _released_budget(dynamic, tokens, frames_in, retain_ratio)
    kept: list[tuple[int, int]] = []
    for frame, scores in enumerate(importance.tolist()):
        select = _most_important if dynamic[frame] else _best_of_each_run
        kept += [(frame, token) for token in select(scores, budget[frame])]
    return torch.tensor(kept, dtype=torch.int64, device=importance.device).reshape(-1, 2)


def _dynamic_frames(segments: list[Segment], frames: int) -> list[bool]:
    ends = {t for segment in segments for t in segment}
    return [t in ends for t in range(frames)]


def _paper_budget(dynamic: list[bool], tokens: int, frames_in: int, retain_ratio: float) -> list[int]:
    """K // N tokens a frame; the K % N left over go one each to dynamic frames in order, then to static."""
    frames = len(dynamic)
    total = _checked_total(frames, tokens, frames_in, retain_ratio)
    base, spare = divmod(total, frames)
    budget = [base] * frames
    dynamic_first = sorted(range(frames), key=lambda t: (not dynamic[t], t))
    for t in dynamic_first[:spare]:
        budget[t] += 1
    return budget


def _checked_total(frames: int, tokens: int, frames_in: int, retain_ratio: float) -> int:
    """K = max(1, round(r * B * P)), which the frames that are left must have."""
    total = max(1, round(retain_ratio * frames_in * tokens))
    if total > frames * tokens:
        raise EarlyTomConfigError(
            f"retain_ratio={retain_ratio} of frames_in={frames_in} x {tokens} tokens asks for {total}; "
            f"the {frames} merged frames have only {frames * tokens}: lower retain_ratio, or "
            "merge fewer frames (min_frames=ceil(retain_ratio * frames_in))"
        )
    return total


def _released_budget(dynamic: list[bool], tokens: int, frames_in: int, retain_ratio: float) -> list[int]:
    """ceil(P * r') for a dynamic frame, max(1, round(P * r')) for a static one; r' = r / (N / B), at most 1.

    Written with the released code's own order of operations: the ceiling sees its rounding.
    """
    rescaled = min(retain_ratio / (len(dynamic) / frames_in), 1.0)
    of_dynamic, of_static = math.ceil(tokens * rescaled), max(1, round(tokens * rescaled))
    return [of_dynamic if is_dynamic else of_static for is_dynamic in dynamic]


def _most_important(scores: list[float], count: int) -> list[int]:
    """Eq. 4: the ``count`` tokens of highest score in raster order; of equal ones the lower index."""
    return sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:count])


def _best_of_each_run(scores: list[float], count: int) -> list[int]:
    """Eq. 6: the raster order in ``count`` runs, sizes differing by at most 1, longer first; best of each."""
    kept = []
    start = 0
    for run in range(count):
        size = len(scores) // count + (run < len(scores) % count)
        kept.append(max(range(start, start + size), key=lambda j: (scores[j], -j)))
        start += size
    return kept


def select_representatives(features: Tensor, *, frames_in: int, retain_ratio: float) -> Tensor:
    """The tokens of one video that represent all others: int64 ``[K, 2]``, rows of (frame, token).

    As many as ``paper`` keeps, K = max(1, round(r * B * P)), in time order, and in raster order within a frame.
    They do not depend on the attention that tokens receive.

    features: ``[N, P, D]``, the N merged frames after projector and pooling; any floating dtype, read as float32.
    frames_in: B, frames of the video before any merging.
    retain_ratio: r, the share of the B * P tokens to keep, in (0, 1].

    The frames are cut into ceil(N / 8) windows and the tokens of a frame into ceil(P / 16) strips, sizes differing by
    at most 1, longer first; a window of a strip is a block. In a block, the next token is always the one that raises
    the sum over its tokens of their likeness (:func:`_likeness`) to the nearest taken one most; gains within ``TIE`` of
    the largest are as good, and of these the lower index wins. A block of m tokens takes at most ceil(2 K m / (N P)).
    Of all that were taken, those K stay whose turn had the largest gain, counted in whole ``TIE`` (halves up); of equal
    ones those of earlier turns, then of earlier blocks.

    Raises EarlyTomConfigError for a wrong shape or dtype, non-finite features, options out of range, or K > N * P.
    """
    _check_features(features)
    _check_budget_options(frames_in, retain_ratio)
    frames, tokens = features.shape[:2]
    total = _checked_total(frames, tokens, frames_in, retain_ratio)
    turns = []
    for number, (window, strip) in enumerate(itertools.product(_runs(frames, WINDOW), _runs(tokens, STRIP))):
        block = [(frame, token) for frame in window for token in strip]
        inside = [(frame - window.start) * tokens + token for frame, token in block]
        likeness = _likeness(features[window.start : window.stop])[inside][:, inside]
        limit = math.ceil(Fraction(2 * total * len(block), frames * tokens))
        for turn, (gain, taken) in enumerate(_greedy_cover(likeness, limit)):
            turns.append((-math.floor(gain / TIE + 0.5), turn, number, block[taken]))
    kept = sorted(place for _, _, _, place in sorted(turns)[:total])
    return torch.tensor(kept, dtype=torch.int64, device=features.device)


def _likeness(window: Tensor) -> Tensor:
    """``[m, P, D]`` -> float64 ``[m P, m P]``: how well the token of the column stands for that of the row.

    The cosine of their differences from the mean token, negative ones 0; times FADING for every frame between them;
    times the length of the row's difference, as a multiple of the average one, to the power of POWER. A difference
    below 1e-5 of the token itself is rounding and counts as none.
    """
    tokens = window.flatten(0, 1).float().double()
    apart = tokens - tokens.mean(0)
    apart[apart.norm(dim=1) <= 1e-5 * tokens.norm(dim=1)] = 0
    lengths = apart.norm(dim=1)
    frame = torch.arange(len(apart), device=window.device) // window.shape[1]
    rows = []
    for i, row in enumerate(apart):
        cosines = _cosine(row.expand_as(apart), apart).clamp(min=0)
        faded = cosines * FADING ** (frame - frame[i]).abs()
        rows.append(faded * (lengths[i] / lengths.mean()) ** POWER if lengths[i] > 0 else torch.zeros_like(faded))
    return torch.stack(rows).cpu()


def _greedy_cover(likeness: Tensor, limit: int) -> list[tuple[float, int]]:
    """At most ``limit`` of n tokens, each adding most to what those before it cover: the largest gain before each turn,
    and the token that is taken."""
    turns: list[tuple[float, int]] = []
    nearest = torch.zeros(len(likeness), dtype=likeness.dtype)
    open_places = list(range(len(likeness)))
    while open_places and len(turns) < limit:
        gains = (likeness - nearest[:, None]).clamp(min=0).sum(0).tolist()
        best = max(gains[j] for j in open_places)
        chosen = min(j for j in open_places if gains[j] >= best - TIE)
        turns.append((best, chosen))
        open_places.remove(chosen)
        nearest = torch.maximum(nearest, likeness[:, chosen])
    return turns


def _runs(whole: int, most: int) -> list[range]:
    """As few consecutive parts of at most ``most`` as there can be, sizes differing by at most 1, larger first."""
    number = math.ceil(whole / most)
    sizes = [whole // number + (part < whole % number) for part in range(number)]
    return [range(begin, end) for begin, end in itertools.pairwise(itertools.accumulate(sizes, initial=0))]


# --- Stage 3: merging inside the LLM --------------------------------------------------------------


def merge_inner_tokens(
    hidden: Tensor,
    scores: Tensor,
    *,
    image_start: int,
    image_length: int,
    drop_ratio: float,
    variant: Literal["paper", "released"] | str,
) -> tuple[Tensor, Tensor]:
    """Thin the visual tokens of one prompt inside the LLM: ``-> (hidden [1, L', D], kept int64 [L'])``.

    hidden: ``[1, L, D]``, what enters layer k; any floating dtype.
    scores: ``[L]``, attention the last prompt token pays each position in layer k - 1, averaged over heads.
    image_start, image_length: first position and number n of the visual tokens.
    drop_ratio: r in [0, 1). The max(1, round(n * (1 - r))) visual tokens of highest score stay (ties: lower
        index); every other one is averaged into the kept one of highest cosine and goes.

    ``paper``: true mean of a kept token and all that join it; of equal cosines the lower index wins.
    ``released``: (kept + dropped) / 2 again and again in index order; of equal cosines the higher score wins.
    ``kept`` ascends and holds the tokens' position ids, which do not change. Text is never touched.

    Raises EarlyTomConfigError for wrong shapes, NaN, a span outside the prompt, or an option out of range.
    """
    _check_variant(variant)
    _check_inner(hidden, scores, image_start, image_length, drop_ratio)
    image = list(range(image_start, image_start + image_length))
    score = scores.tolist()
    keep_count = min(len(image), max(1, round(image_length * (1 - drop_ratio))))
    ranked = sorted(image, key=lambda p: (-score[p], p))[:keep_count]
    candidates = sorted(ranked) if variant == "paper" else ranked
    dropped = [p for p in image if p not in set(ranked)]
    merged = hidden[0].to(torch.promote_types(hidden.dtype, torch.float32)).clone()
    target = {p: _most_similar(hidden[0], p, candidates) for p in dropped}
    if variant == "paper":
        for q in sorted(set(target.values())):
            members = [q, *(p for p in dropped if target[p] == q)]
            merged[q] = merged[members].mean(0)
    else:
        for p in dropped:
            merged[target[p]] = (merged[target[p]] + merged[p]) / 2
    gone = set(dropped)
    stay = [p for p in range(hidden.shape[1]) if p not in gone]
    kept = torch.tensor(stay, dtype=torch.int64, device=hidden.device)
    return merged[kept].to(hidden.dtype)[None], kept


def _most_similar(tokens: Tensor, position: int, candidates: list[int]) -> int:
    """The candidate of highest cosine with ``tokens[position]``; of equal ones the first in the list."""
    cosines = _cosine(tokens[position], tokens[candidates]).float().tolist()
    return candidates[cosines.index(max(cosines))]


# --- What input means something -------------------------------------------------------------------


def _check_variant(variant: str) -> None:
    if variant not in VARIANTS:
        raise EarlyTomConfigError(f"variant={variant!r}: must be one of {', '.join(map(repr, VARIANTS))}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_hidden(hidden: Tensor) -> None:
    if hidden.dim() != 3 or 0 in hidden.shape or not hidden.is_floating_point():
        raise EarlyTomConfigError(
            f"hidden has shape {tuple(hidden.shape)} and dtype {hidden.dtype}; "
            "it must be [frames, tokens, channels], none of them 0, of a floating dtype"
        )
    if not torch.isfinite(hidden).all():
        raise EarlyTomConfigError("hidden holds NaN or inf; frames cannot be compared, check the encoder's precision")


def _check_segment_options(tau_seg: float, alpha: float, max_window: int | None) -> None:
    if not _is_number(tau_seg):
        raise EarlyTomConfigError(f"tau_seg={tau_seg!r}: must be a number (a similarity; useful ones are 0 to 1)")
    if not _is_number(alpha) or not 0 <= alpha <= 1:
        raise EarlyTomConfigError(f"alpha={alpha!r}: must be a number from 0 to 1")
    if max_window is not None and not _is_count(max_window, 1):
        raise EarlyTomConfigError(f"max_window={max_window!r}: must be None or an integer of at least 1")


def _check_merge_options(tau_merge: float | str, min_frames: int) -> None:
    if tau_merge != "segment" and not _is_number(tau_merge):
        raise EarlyTomConfigError(f"tau_merge={tau_merge!r}: must be a number or 'segment'")
    if not _is_count(min_frames, 1):
        raise EarlyTomConfigError(f"min_frames={min_frames!r}: must be an integer of at least 1")


def _check_importance(importance: Tensor) -> None:
    if importance.dim() != 2 or 0 in importance.shape or not importance.is_floating_point():
        raise EarlyTomConfigError(
            f"importance has shape {tuple(importance.shape)} and dtype {importance.dtype}; "
            "it must be [frames, tokens], neither of them 0, of a floating dtype"
        )
    if torch.isnan(importance).any():
        raise EarlyTomConfigError("importance holds NaN; tokens cannot be ranked, check the encoder's precision")


def _check_features(features: Tensor) -> None:
    if features.dim() != 3 or 0 in features.shape or not features.is_floating_point():
        raise EarlyTomConfigError(
            f"features has shape {tuple(features.shape)} and dtype {features.dtype}; "
            "it must be [frames, tokens, channels], none of them 0, of a floating dtype"
        )
    if not torch.isfinite(features.float()).all():
        raise EarlyTomConfigError("features holds NaN or inf; tokens cannot be compared, check the encoder's precision")


def _check_budget_options(frames_in: int, retain_ratio: float) -> None:
    if not _is_count(frames_in, 1):
        raise EarlyTomConfigError(f"frames_in={frames_in!r}: must be an integer of at least 1")
    if not _is_number(retain_ratio) or not 0 < retain_ratio <= 1:
        raise EarlyTomConfigError(f"retain_ratio={retain_ratio!r}: must be a number in (0, 1]")


def _checked_segments(segments: Tensor | Sequence[Sequence[int]], frames: int) -> list[Segment]:
    rows = torch.as_tensor(segments).tolist()
    expected = 0
    for row in rows:
        if not isinstance(row, list) or len(row) != 2 or row[0] != expected or row[1] < row[0]:
            break
        expected = row[1] + 1
    else:
        if expected == frames:
            return [(first, last) for first, last in rows]
    raise EarlyTomConfigError(
        f"segments={rows}: must be [n, 2] inclusive (first, last) that follow one another "
        f"from 0 to {frames - 1}, as segment_frames returns for {frames} frames"
    )


def _check_inner(hidden: Tensor, scores: Tensor, image_start: int, image_length: int, drop_ratio: float) -> None:
    if hidden.dim() != 3 or hidden.shape[0] != 1 or not hidden.is_floating_point():
        raise EarlyTomConfigError(
            f"hidden has shape {tuple(hidden.shape)} and dtype {hidden.dtype}; "
            "it must be [1, positions, channels] of a floating dtype: call once for every row of a batch"
        )
    length = hidden.shape[1]
    if scores.shape != (length,):
        raise EarlyTomConfigError(f"scores has shape {tuple(scores.shape)}; it must be ({length},), one a position")
    if not (_is_count(image_start, 0) and _is_count(image_length, 0) and image_start + image_length <= length):
        raise EarlyTomConfigError(
            f"image_start={image_start!r}, image_length={image_length!r}: "
            f"must be integers of at least 0 whose sum is at most the {length} positions of hidden"
        )
    if not _is_number(drop_ratio) or not 0 <= drop_ratio < 1:
        raise EarlyTomConfigError(f"drop_ratio={drop_ratio!r}: must be a number in [0, 1)")
    image = slice(image_start, image_start + image_length)
    if torch.isnan(scores[image]).any() or not torch.isfinite(hidden[:, image]).all():
        raise EarlyTomConfigError(
            "scores or hidden holds NaN or inf in the visual tokens: check the precision the model runs in"
        )
