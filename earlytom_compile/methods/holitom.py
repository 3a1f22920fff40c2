"""HoliTom's stages before the language model; its stage inside is ``inner_layer``, which may be given as well.

::

    F x P  ->  segments in which most tokens repeat  ->  those become one token each  ->  groups thinned to K

Segments. Place p repeats from frame m to m + 1 where the cosine of its two tokens is above tau = 0.8. A segment of
frames s ... e can do without g(s, e) = (e - s) * #{p : p repeats from each frame of s ... e - 1 to the next} tokens. Of
all ways to cut the video into segments the one with the largest sum of g is found by dynamic programming; of equal
ones that whose last segment is shortest, and so on backwards.
Merging over time. In a segment the tokens of such a place become their mean, at its first frame.
Merging in space. What was merged is clustered by density peaks (k = 7), segment by segment, a cluster becoming
the mean of its tokens at the place of its center. Of all other tokens each frame keeps those that receive the most
attention in the encoder's last layer.
Exactly K tokens: ``static_tokens.py``. The paper thins all groups by one ratio, too, and rounds each by itself.

The released code counts a token among its own min(7, clusters) neighbours, breaks ties of density by random noise, can
thin a share of the other tokens by clustering, too, puts the merged tokens of a segment before its others unless rows
end in newlines, and passes the ratio that it computed for one video on to the next.
"""

import torch
from torch import Tensor

from . import density_peaks
from .base import FrameTokens, Kept, Method, Sizes
from .exact import fixed_point, likeness
from .selection import attention, kept, on
from .static_tokens import Segments, best_moving, merge_static, quotas

_TAU_SQUARED = 0.64
_NEIGHBOURS = 7


def keep(video: FrameTokens, budget: int) -> Kept:
    features = video.features
    integers, _ = fixed_point(features, each=True)
    alike = likeness(integers[1:], integers[:-1])
    run = _runs(alike)
    segments, places = _segments(run)
    begins, lasts = (on(features, ends) for ends in zip(*segments, strict=True))
    lengths = lasts - begins + 1
    repeats = (run[lasts] <= begins[:, None]) & (lengths > 1)[:, None]
    static = repeats.repeat_interleave(lengths, 0, output_size=features.shape[0])
    still, moving, undone = quotas(budget, features.shape[1], segments, places)
    merged = merge_static(features, alike, segments, static, undone)
    if undone:
        return kept(merged.tokens.to(features.dtype), merged.left, budget)
    chosen = best_moving(attention(video), static, moving)
    tokens = merged.tokens
    if any(places):
        integers, unit = fixed_point(tokens)
        with_static = [index for index, number in enumerate(places) if number]
        at, members = begins[with_static], repeats[with_static]
        numbers = [still[index] for index in with_static]
        means, centers = density_peaks.cluster(tokens[at], integers[at], members, unit, numbers, _NEIGHBOURS)
        tokens[at] = torch.where(centers[:, :, None], means, tokens[at])
        chosen[at] |= centers
    return kept(tokens.to(features.dtype), chosen, budget)


def operations(sizes: Sizes) -> float:
    """Of a video of which every second frame repeats: the most that there can be to cluster."""
    return density_peaks.operations(sizes.frames // 2, sizes)


def _runs(alike: Tensor) -> Tensor:
    """int64 [F, P]: the first frame since which each place has repeated."""
    frames = torch.arange(alike.shape[0] + 1, device=alike.device)
    breaks = torch.cat([alike.new_ones(1, alike.shape[1], dtype=torch.bool), alike <= _TAU_SQUARED])
    return torch.where(breaks, frames[:, None], 0).cummax(0).values


def _segments(run: Tensor) -> tuple[Segments, list[int]]:
    """The best segments, and how many places repeat throughout each (none in one of a single frame).

    The only thing the host waits for: [F, F] numbers.
    """
    frames = run.shape[0]
    repeating = torch.stack([(run <= begin).sum(1) for begin in range(frames)]).tolist()
    total, cut = [0], []
    for last in range(frames):
        gains = [total[begin] + (last - begin) * repeating[begin][last] for begin in range(last + 1)]
        total.append(max(gains))
        cut.append(max(begin for begin in range(last + 1) if gains[begin] == total[-1]))
    segments: Segments = []
    last = frames - 1
    while last >= 0:
        segments.insert(0, (cut[last], last))
        last = cut[last] - 1
    return segments, [repeating[begin][last] if last > begin else 0 for begin, last in segments]


METHOD = Method(
    name="holitom",
    paper="HoliTom: Holistic Token Merging for Fast Video Large Language Models, NeurIPS 2025, arXiv 2505.21334",
    keep=keep,
    importance=True,
    operations=operations,
)
