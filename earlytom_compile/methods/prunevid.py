"""PruneVid's first stage, spatial-temporal token merging; its second one, inside the language model, is not done here.

::

    F x P  ->  F / 4 segments  ->  static tokens become one each  ->  groups clustered to K in all

Segments. Frames, as the means of their tokens, are clustered by density peaks (k = 7) around B = max(1, floor(F / 4))
centers (gamma = 0.25). A segment consists of consecutive frames: between each two neighbouring centers lies one
border, where the sum of squared distances of the frames to the center on their side of it is least; of equal
ones the earlier border.
Static tokens. Place p is static in a segment of several frames where the cosines of its tokens, two by two, are at
least tau = 0.8 on average (Eq. 2 to 4); its tokens become their mean (Eq. 5), at the segment's first frame.
Clusters. Static tokens are clustered segment by segment, all others frame by frame, by density peaks (k = 7); a
cluster becomes the mean of its tokens, at the place of its center. The paper keeps the share beta = 0.5 of each group.
Exactly K tokens: ``static_tokens.py``; beta is K / M.

The paper does not say how clusters of frames become consecutive. The released code keeps the longest run of each
cluster and gives other frames to the longer of the runs beside them, which can remove clusters. It clusters no group of
14 tokens or fewer, breaks ties of density by random noise, and loses the places: static tokens of a segment come first.
"""

import torch
from torch import Tensor

from . import density_peaks
from .base import FrameTokens, Kept, Method, Sizes
from .density_peaks import cluster, peak_scores
from .exact import fixed_point, likeness, likenesses, squared_distances
from .selection import best, kept, on
from .static_tokens import Segments, merge_static, quotas

_TAU = 0.8
_NEIGHBOURS = 7
_FRAMES_A_SEGMENT = 4
_STEPS = 2.0**30
"""Of a mean cosine, in 1: a sum of roots is not rounded in the same way on every device."""


def keep(video: FrameTokens, budget: int) -> Kept:
    features = video.features
    segments = _segments(features)
    integers, _ = fixed_point(features, each=True)
    static = torch.cat([_static(integers[begin : last + 1]) for begin, last in segments])
    begins = on(features, [begin for begin, _ in segments])
    still, moving, undone = quotas(budget, features.shape[1], segments, static[begins].sum(1).tolist())
    merged = merge_static(features, likeness(integers[1:], integers[:-1]), segments, static, undone)
    if undone:
        return kept(merged.tokens.to(features.dtype), merged.left, budget)
    integers, unit = fixed_point(merged.tokens)
    means, chosen = cluster(merged.tokens, integers, ~static, unit, moving, _NEIGHBOURS)
    of_static, centers = cluster(merged.tokens[begins], integers[begins], static[begins], unit, still, _NEIGHBOURS)
    means[begins] = torch.where(centers[:, :, None], of_static, means[begins])
    chosen[begins] |= centers
    return kept(means.to(features.dtype), chosen, budget)


def operations(sizes: Sizes) -> float:
    """Distances of frames, cosines of pairs, and clusters. Pairs are most where all segments but one have one frame."""
    segments = _number_of_segments(sizes.frames)
    pairs = (sizes.frames - segments + 1) ** 2
    compared = 2 * sizes.channels * (sizes.frames**2 + pairs * sizes.tokens)
    return compared + density_peaks.operations(sizes.frames + segments, sizes)


def _number_of_segments(frames: int) -> int:
    return max(1, frames // _FRAMES_A_SEGMENT)


def _segments(features: Tensor) -> Segments:
    """Consecutive frames around the density peaks among them. The host waits for [F, F + 1] numbers."""
    frames = features.shape[0]
    integers, unit = fixed_point(features)
    means, coarser = fixed_point(integers.sum(1))  # in 1 / P, so that no rounding comes before theirs
    squared = squared_distances(means)[None]
    everyone = torch.ones(1, frames, dtype=torch.bool, device=features.device)
    scores = peak_scores(squared, everyone, coarser * unit / features.shape[1], features.shape[2], _NEIGHBOURS)
    centers = best(scores, [_number_of_segments(frames)])
    *distances, is_center = torch.cat([squared[0], centers.double()]).tolist()
    chosen = [frame for frame in range(frames) if is_center[frame]]
    borders = [_border(distances, *pair) for pair in zip(chosen, chosen[1:], strict=False)]
    return list(zip([0, *borders], [*(border - 1 for border in borders), frames - 1], strict=True))


def _border(distances: list[list[float]], center: int, following: int) -> int:
    """The first frame that belongs to the ``following`` center."""
    costs = {}
    for border in range(center + 1, following + 1):
        before = sum(int(distances[center][frame]) for frame in range(center, border))
        costs[border] = before + sum(int(distances[following][frame]) for frame in range(border, following))
    return min(costs, key=costs.__getitem__)


def _static(segment: Tensor) -> Tensor:
    """bool [n, P]: the places that are static in a segment of integer tokens [n, P, C], once for each of its frames."""
    frames = segment.shape[0]
    if frames == 1:
        return torch.zeros(segment.shape[:2], dtype=torch.bool, device=segment.device)
    place_by_place = segment.transpose(0, 1)
    pairs = likenesses(place_by_place, place_by_place).triu(1)
    cosines = pairs.abs().sqrt().copysign(pairs).sum((1, 2))
    average = (cosines / (frames * (frames - 1) / 2) * _STEPS).round_()
    return (average >= round(_TAU * _STEPS)).expand(frames, -1)


METHOD = Method(
    name="prunevid",
    paper="PruneVid: Visual Token Pruning for Efficient Video Large Language Models, ACL 2025, arXiv 2412.16117",
    keep=keep,
    operations=operations,
)
