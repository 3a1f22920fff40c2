"""Places that stay alike in a segment of frames become one token over time; then each group of tokens is thinned.

::

    place     0  1  2  3                              place     0  1  2  3
    frame 0   a  b  c  d     0 and 2 are static:      frame 0   A  b  C  d     A = mean(a, e, i), C = mean(c, g, k)
    frame 1   e  f  g  h                        ->    frame 1      f     h     groups: {A, C}, {b, d}, {f, h}, {j, l}
    frame 2   i  j  k  l                              frame 2      j     l

Two methods (``holitom``, ``prunevid``) do this; they differ in what the segments are, in what is static, and in how a
group is thinned. Both leave as many tokens as the video makes them leave. Here it is K: the M tokens that are left
above, where there are more, are thinned by the same rate in every group, K / M, by largest remainder. Where there are
fewer, as many tokens as are missing are not merged over time: those least similar to the token at their place in the
frame before.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .selection import best, proportional_shares

Segments = list[tuple[int, int]]
"""First and last frame of each, in time order; all frames are in one."""


class Merged(NamedTuple):
    """A video whose static tokens are merged over time."""

    tokens: Tensor
    """float64 [F, P, C]: the merged tokens at the first frame of their segment, all others as they were."""
    static: Tensor
    """bool [F, P]: where static tokens are or were merged away from."""
    left: Tensor
    """bool [F, P]: the places that still have a token."""


def merge_static(features: Tensor, alike: Tensor, segments: Segments, static: Tensor, undone: int) -> Merged:
    """Merge [F, P, C] over time where ``static`` is true, but for ``undone`` tokens.

    ``static`` [F, P] is the same in all frames of a segment, and false in a segment of one frame; ``alike``, float64
    [F - 1, P], is the ``exact.likeness`` of each token with the one at its place in the frame before.
    """
    first = torch.zeros(features.shape[0], dtype=torch.bool)
    first[[begin for begin, _ in segments]] = True
    away = static & ~first.to(features.device)[:, None]
    if undone:
        alike = torch.cat([torch.zeros_like(static[:1], dtype=alike.dtype), alike])
        order = alike.masked_fill(~away, torch.inf).flatten().sort(stable=True).indices
        away = away.flatten().index_fill_(0, order[:undone], False).view_as(away)
    tokens = features.to(torch.float64, copy=True)
    averaged = static & (away | first.to(features.device)[:, None])
    for begin, last in segments:
        if last > begin:
            weight = averaged[begin : last + 1].double()
            mean = (tokens[begin : last + 1] * weight[:, :, None]).sum(0) / weight.sum(0).clamp(min=1)[:, None]
            tokens[begin] = torch.where(static[begin, :, None], mean, tokens[begin])
    return Merged(tokens, static, ~away)


def quotas(budget: int, tokens: int, segments: Segments, places: list[int]) -> tuple[list[int], list[int], int]:
    """How many tokens each group keeps, of ``tokens`` places a frame of which ``places[i]`` are static in segment i.

    Returns:
        static: of each segment.
        moving: of each frame.
        undone: static tokens that must not be merged over time, else fewer than ``budget`` were left; then the groups
            keep all they have.
    """
    sizes = []
    for (begin, last), still in zip(segments, places, strict=True):
        sizes += [still] + [tokens - still] * (last - begin + 1)
    left = sum(sizes)
    shares = iter(proportional_shares(min(budget, left), sizes))
    static, moving = [], []
    for begin, last in segments:
        static.append(next(shares))
        moving += [next(shares) for _ in range(begin, last + 1)]
    return static, moving, max(0, budget - left)


def best_moving(scores: Tensor, static: Tensor, numbers: list[int]) -> Tensor:
    """bool [F, P]: in each frame so many of the places that are not static, by the highest scores."""
    return best(scores.masked_fill(static, -torch.inf), numbers)
