"""Which frames of a video become one: segmentation, pairing, weights and the floor (algorithm.md, stage 1).

The plan is a table, so that whatever rides along with the frames merges by the same weights::

    similarity [5, band]         source   weight         merged_counts
    counts [5]            ->     0 0      1    0         [4]
    (frames 1 and 2 merge)       1 2      0.5  0.5
                                 3 3      1    0
                                 4 4      1    0
                                 0 0      0    0         (rows after the last merged frame are zero)

The decisions are sequential and tiny, so the native body takes one small copy to the host. The moving average
and every comparison are float32, in the order written here; a provider on a device has to do the same. Values
that the native body reads and refuses, such a provider must not read: it marks the plan by merged_counts of -1,
which the reader of N refuses.
"""

import ctypes
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from earlytom_compile.kernels.providers import Provider, provide

_VARIANTS = ("paper", "released")

Similarity = Callable[[int, int], float]
"""(later frame, earlier frame) -> s, both counted within one video."""
Row = tuple[int, int, float, float]
"""One merged frame: its two sources and their weights."""


@torch.library.custom_op("earlytom::plan_merge", mutates_args=())
def plan_merge(
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
    """Plan the merge of each video's frames; nothing is decided across videos.

    Eq. 1 (segments), Eq. 2 (pairs) and Eq. 3 (weights) of the paper as closed by algorithm.md.

    Args:
        similarity: float32 [T, band], from ``frame_similarity``. The band must hold every pair a segment can
            ask for: the longest segment minus 1 when ``tau_merge`` is "segment" or ``variant`` is "released",
            else 1. More than the longest video minus 1 is never needed.
        counts: int64 [V], frames of each video, each at least 1, T in total.
        variant: "paper" or "released".
        tau_seg: a segment ends before a frame whose smoothed similarity is below this.
        alpha: weight of the newest similarity in the moving average, in [0, 1].
        max_window: paper: most frames a segment may have; released: one more than that; 0 = no limit.
        tau_merge: least similarity of a pair that merges; NaN = "segment", s(head, tail) of each segment.
            The released code always uses "segment".
        min_frames: paper: a video keeps at least so many frames if it has them, undoing the least similar
            merges first, of equals the later; released has no floor and ignores it.

    Returns:
        source: int64 [T, 2], rows of the T frames; weight: float32 [T, 2]; merged_counts: int64 [V].
        Each of the first ``merged_counts.sum()`` rows o describes one merged frame, weight[o, 0] *
        x[source[o, 0]] + weight[o, 1] * x[source[o, 1]]; an untouched frame t is (t, t) with weights (1, 0).
        The rows after are 0.

    Raises:
        ValueError: shapes that do not match, counts that do not add up to T, NaN or infinite similarities, a
            band that is too narrow, or an option without meaning. A provider that does not read values puts
            -1 into all merged_counts and 0 into all rows instead, where the reason is a value.
    """
    check(similarity, counts, variant, tau_seg, alpha, max_window, "plan_merge")
    farthest = plan_distance(variant, max_window, tau_merge)
    rows: list[Row] = []
    merged_counts: list[int] = []
    for first, frames, s in _videos(similarity, counts, farthest, "plan_merge"):
        segments = _segments(s, frames, variant, tau_seg, alpha, max_window)
        if variant == "paper":
            merged = _merge_paper(s, segments, tau_merge, frames, min_frames)
        else:
            merged = _merge_released(s, segments, tau_merge)
        rows += [(first + a, first + b, wa, wb) for a, b, wa, wb in merged]
        merged_counts.append(len(merged))

    padding = similarity.shape[0] - len(rows)
    source = torch.tensor([row[:2] for row in rows] + [(0, 0)] * padding, dtype=torch.int64)
    weight = torch.tensor([row[2:] for row in rows] + [(0.0, 0.0)] * padding, dtype=torch.float32)
    kept = torch.tensor(merged_counts, dtype=torch.int64)
    return source.to(similarity.device), weight.to(similarity.device), kept.to(counts.device)


@plan_merge.register_fake
def _(
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
    check(similarity, counts, variant, tau_seg, alpha, max_window, "plan_merge")
    rows = (similarity.shape[0], 2)
    source = similarity.new_empty(rows, dtype=torch.int64)
    return source, similarity.new_empty(rows, dtype=torch.float32), counts.new_empty(counts.shape)


@torch.library.custom_op("earlytom::dynamic_frames", mutates_args=())
def dynamic_frames(
    similarity: Tensor, counts: Tensor, *, variant: str, tau_seg: float, alpha: float, max_window: int
) -> Tensor:
    """Head and tail frames of the segments of the merged frames (algorithm.md, stage 2, points 1 and 2).

    Args:
        similarity: float32 [N, band] of the merged frames. Paper asks for neighbours only (band 1); released
            for the distance to a segment's head, max_window - 2 at most.
        counts: int64 [V], merged frames of each video, N in total.
        variant, tau_seg, alpha, max_window: as in ``plan_merge``.

    Returns:
        bool [N], on the device of ``similarity``; True for a dynamic frame, False for a static one.

    Raises:
        ValueError: as ``plan_merge``; a provider that does not read values calls every frame static instead.
    """
    check(similarity, counts, variant, tau_seg, alpha, max_window, "dynamic_frames")
    farthest = segment_distance(variant, max_window)
    dynamic = [False] * similarity.shape[0]
    for first, frames, s in _videos(similarity, counts, farthest, "dynamic_frames"):
        for head, tail in _segments(s, frames, variant, tau_seg, alpha, max_window):
            dynamic[first + head] = dynamic[first + tail] = True
    return torch.tensor(dynamic, dtype=torch.bool).to(similarity.device)


@dynamic_frames.register_fake
def _(similarity: Tensor, counts: Tensor, *, variant: str, tau_seg: float, alpha: float, max_window: int) -> Tensor:
    check(similarity, counts, variant, tau_seg, alpha, max_window, "dynamic_frames")
    return similarity.new_empty((similarity.shape[0],), dtype=torch.bool)


@dataclass(frozen=True)
class Segmentation:
    """Why one video of T frames was cut where it was, for people to see."""

    compared: tuple[float, ...]
    """[T - 1]: the similarity that Eq. 1 takes, of each frame from the second on; NaN where none was asked for."""
    smoothed: tuple[float, ...]
    """[T - 1]: its moving average, which ends a segment below tau_seg; NaN where a full window ended it."""
    segments: tuple[tuple[int, int], ...]
    """First and last frame of each, both inclusive."""
    thresholds: tuple[float, ...]
    """Of each segment, the similarity that two of its frames need to merge."""


def explain_segments(
    similarity: Tensor,
    counts: Tensor,
    *,
    variant: str,
    tau_seg: float,
    alpha: float,
    max_window: int,
    tau_merge: float,
    min_frames: int = 1,
) -> list[Segmentation]:
    """What ``plan_merge`` found on its way to the plan for the same arguments, one for each video.

    Raises ValueError as ``plan_merge`` does.
    """
    check(similarity, counts, variant, tau_seg, alpha, max_window, "plan_merge")
    farthest = plan_distance(variant, max_window, tau_merge)
    explained = []
    for _, frames, s in _videos(similarity, counts, farthest, "plan_merge"):
        steps = list(_walk(s, frames, variant, tau_seg, alpha, max_window))
        segments = _between([frame for frame, (_, _, begins) in enumerate(steps, start=1) if begins], frames)
        thresholds = tuple(_threshold(s, head, tail, tau_merge) for head, tail in segments)
        compared, smoothed = tuple(now for now, _, _ in steps), tuple(average for _, average, _ in steps)
        explained.append(Segmentation(compared, smoothed, tuple(segments), thresholds))
    return explained


def check(
    similarity: Tensor,
    counts: Tensor,
    variant: str,
    tau_seg: float,
    alpha: float,
    max_window: int,
    op: str,
) -> None:
    if similarity.dim() != 2 or similarity.dtype != torch.float32:
        raise ValueError(
            f"earlytom::{op}: similarity must be float32 [frames, band] as frame_similarity returns it, "
            f"got {similarity.dtype} with {similarity.dim()} axes"
        )
    if counts.dim() != 1 or counts.dtype != torch.int64:
        raise ValueError(f"earlytom::{op}: counts must be int64 [videos], got {counts.dtype} with {counts.dim()} axes")
    if variant not in _VARIANTS:
        raise ValueError(f"earlytom::{op}: variant={variant!r}; use one of {', '.join(map(repr, _VARIANTS))}")
    if math.isnan(tau_seg) or not 0.0 <= alpha <= 1.0 or max_window < 0:
        raise ValueError(
            f"earlytom::{op}: tau_seg={tau_seg}, alpha={alpha}, max_window={max_window}; tau_seg must be a "
            f"number, alpha in [0, 1], max_window 0 (no limit) or more"
        )


def longest_segment(variant: str, max_window: int) -> float:
    if max_window == 0:
        return math.inf
    return max_window if variant == "paper" else max(1, max_window - 1)


def segment_distance(variant: str, max_window: int) -> float:
    """Distance in frames over which segmentation alone compares."""
    return 1 if variant == "paper" else longest_segment(variant, max_window) - 1


def plan_distance(variant: str, max_window: int, tau_merge: float) -> float:
    """Distance in frames over which a plan compares: with the threshold "segment", a segment's tail with its head."""
    farthest = segment_distance(variant, max_window)
    return max(farthest, longest_segment(variant, max_window) - 1) if math.isnan(tau_merge) else farthest


def check_band(band: int, farthest: float, longest_video: int, op: str) -> None:
    """Refuse a band that lacks pairs a video of ``longest_video`` frames can ask for."""
    needed = min(farthest, longest_video - 1)
    if band < needed:
        raise ValueError(
            f"earlytom::{op}: similarity has a band of {band} frames, these options need {int(needed)}; "
            f"call frame_similarity with band={int(needed)} or lower max_window"
        )


def check_batch(similarity: Tensor, counts: Tensor, farthest: float, op: str) -> None:
    """What is known to be wrong with counts and band without a look at the values."""
    total, band = similarity.shape
    videos = counts.shape[0]
    if not 0 < videos <= total:
        raise ValueError(f"earlytom::{op}: counts of {videos} videos over {total} frames; every video needs a frame")
    average = -(-total // videos)
    check_band(band, farthest, average, op)  # some video is at least so long


def float32(value: float) -> float:
    return ctypes.c_float(value).value


def _videos(similarity: Tensor, counts: Tensor, farthest: float, op: str) -> list[tuple[int, int, Similarity]]:
    """(first row, frames, similarity within the video) of each video, from one copy to the host."""
    total, band = similarity.shape
    flat = torch.cat([similarity.reshape(-1).double(), counts.to(similarity.device).double()]).tolist()
    lengths = [int(count) for count in flat[total * band :]]
    if sum(lengths) != total or min(lengths, default=0) < 1:
        raise ValueError(
            f"earlytom::{op}: counts={lengths} over {total} frames; every video needs at least one frame and "
            f"the counts must add up to the rows of similarity"
        )
    check_band(band, farthest, max(lengths), op)
    firsts = [sum(lengths[:video]) for video in range(len(lengths))]
    return [(first, frames, _lookup(flat, first, band, op)) for first, frames in zip(firsts, lengths, strict=True)]


def _lookup(flat: list[float], first: int, band: int, op: str) -> Similarity:
    def similarity_of(later: int, earlier: int) -> float:
        value = 1.0 if later == earlier else flat[(first + later) * band + later - earlier - 1]
        if not math.isfinite(value):
            raise ValueError(
                f"earlytom::{op}: similarity of frames {first + later} and {first + earlier} is {value}; the "
                f"hidden states of one of them hold NaN, infinity or values whose norm overflows float32"
            )
        return value

    return similarity_of


def _segments(
    s: Similarity, frames: int, variant: str, tau_seg: float, alpha: float, max_window: int
) -> list[tuple[int, int]]:
    """Inclusive (head, tail) of each segment."""
    steps = enumerate(_walk(s, frames, variant, tau_seg, alpha, max_window), start=1)
    return _between([frame for frame, (_, _, begins) in steps if begins], frames)


def _between(later_heads: list[int], frames: int) -> list[tuple[int, int]]:
    return list(zip([0, *later_heads], [head - 1 for head in later_heads] + [frames - 1], strict=True))


def _walk(
    s: Similarity, frames: int, variant: str, tau_seg: float, alpha: float, max_window: int
) -> Iterator[tuple[float, float, bool]]:
    """Of each frame behind the first: the similarity that Eq. 1 takes, its moving average, and whether a segment
    begins there; NaN twice where one does because the one before is full. released compares with the segment's
    head, paper with t - 1."""
    longest = longest_segment(variant, max_window)
    newest, older, threshold = float32(alpha), float32(1.0 - alpha), float32(tau_seg)
    head, average = 0, 1.0
    for frame in range(1, frames):
        full = frame - head >= longest
        now = math.nan if full else s(frame, frame - 1 if variant == "paper" else head)
        average = float32(float32(newest * now) + float32(older * average))
        begins = full or average < threshold
        yield now, average, begins
        if begins:
            head, average = frame, 1.0


def _threshold(s: Similarity, head: int, tail: int, tau_merge: float) -> float:
    return s(tail, head) if math.isnan(tau_merge) else float32(tau_merge)


def _merge_paper(
    s: Similarity, segments: list[tuple[int, int]], tau_merge: float, frames: int, min_frames: int
) -> list[Row]:
    pairs: list[tuple[float, int]] = []
    for head, tail in segments:
        threshold = _threshold(s, head, tail, tau_merge)
        frame = head + 1
        while frame + 1 < tail:
            alike = s(frame + 1, frame)
            merges = alike >= threshold and alike >= s(frame + 2, frame + 1)
            if merges:
                pairs.append((alike, frame))
            frame += 2 if merges else 1

    most = max(0, frames - min_frames)
    pairs.sort(key=lambda pair: (-pair[0], pair[1]))
    merged = {frame for _, frame in pairs[:most]}
    rows: list[Row] = []
    for frame in range(frames):
        if frame in merged:
            rows.append((frame, frame + 1, *_paper_weights(s(frame + 1, frame), s(frame + 2, frame + 1))))
        elif frame - 1 not in merged:
            rows.append((frame, frame, 1.0, 0.0))
    return rows


def _paper_weights(alike: float, following: float) -> tuple[float, float]:
    """Eq. 3 with negative similarities counted as 0, so that weights stay in [0, 1]; halves when both are."""
    alike, following = max(alike, 0.0), max(following, 0.0)
    if alike + following == 0.0:
        return 0.5, 0.5
    return alike / (alike + following), following / (alike + following)


def _merge_released(s: Similarity, segments: list[tuple[int, int]], tau_merge: float) -> list[Row]:
    """As the released code does it: of two or more middle frames the last one never gets any weight."""
    rows: list[Row] = []
    for head, tail in segments:
        rows.append((head, head, 1.0, 0.0))
        last = tail - 1
        threshold = _threshold(s, head, tail, tau_merge)
        if last == head + 1:
            rows.append((last, last, 1.0, 0.0))
        frame = head + 1
        while frame < last:
            alike = s(frame + 1, frame)
            following = s(frame + 2, frame + 1) if frame + 1 < last else 0.0
            merges = alike > threshold and alike > following
            if merges:
                rows.append((frame, frame + 1, *_released_weights(alike, following)))
            else:
                rows.append((frame, frame, 1.0, 0.0))
            frame += 2 if merges else 1
        if tail > head:
            rows.append((tail, tail, 1.0, 0.0))
    return rows


def _released_weights(alike: float, following: float) -> tuple[float, float]:
    total = alike + following
    if total == 0.0:  # the released code divides by zero here and fills the frame with NaN
        return 0.5, 0.5
    return alike / total, following / total


def _triton_supports(similarity: Tensor, counts: Tensor, **options: object) -> bool:
    return similarity.dtype == torch.float32 and counts.device == similarity.device


provide(plan_merge, Provider("triton", ".triton_plan_merge", supports=_triton_supports))
provide(dynamic_frames, Provider("triton", ".triton_dynamic_frames", supports=_triton_supports))
