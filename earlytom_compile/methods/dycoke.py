"""DyCoke's first stage, token temporal merging (TTM).

::

    window    frame 0    frame 1     frame 2     frame 3
    keeps     all        those that differ most
    from                 frame 0     frame 0     frame 2

The video is cut into windows of 4 frames. Frames 1 and 3 of a window are compared with the frame before them, frame 2
with frame 0, each token with the one at the same place, by the cosine (Eq. 3); the most similar ones go. What goes is
left out, not averaged into what stays: that is what the paper's merging does. Every rate leaves the first frame of a
window whole, so that a quarter of the tokens is the least that the paper's rule can leave.

Exactly K tokens: the other frames keep what the first frames leave of K, in even shares, earlier frames one more.
Where the first frames alone have more than K tokens (below 25 %, where the paper has no rule), the video becomes its
first frames, every fourth one, and the same is done to these, again and again. Where one window is left and its first
frame is too large still, K < P, that one keeps an even share as well: tokens that lie evenly in raster order.

The released code keeps as many tokens in each compared frame, ties as ``topk`` likes, and does not put them back in
raster order; it reads the similarities of another pair of frames than those it prunes, and the last window keeps the
whole of its third frame, an odd number of frames loses the last.
"""

import torch

from .base import FrameTokens, Kept, Method
from .exact import fixed_point, likeness
from .selection import best, even_shares, kept

_WINDOW = 4


def keep(video: FrameTokens, budget: int) -> Kept:
    features = video.features
    tokens = features.shape[1]
    frames = list(range(features.shape[0]))
    while len(frames) > _WINDOW and len(frames[::_WINDOW]) * tokens > budget:
        frames = frames[::_WINDOW]
    chosen = torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device)
    firsts = len(frames[::_WINDOW]) * tokens
    compared = [index for index in range(len(frames)) if index % _WINDOW]
    if firsts <= budget:
        chosen[frames[::_WINDOW]] = True
        numbers = even_shares(budget - firsts, [tokens] * len(compared))
    else:
        share, *numbers = even_shares(budget, [tokens] * len(frames))
        chosen[0, [place * tokens // share for place in range(share)]] = True
    if compared:
        integers, _ = fixed_point(features[frames], each=True)
        alike = likeness(integers[compared], integers[[_reference(index) for index in compared]])
        chosen[[frames[index] for index in compared]] = best(-alike, numbers)
    return kept(features, chosen, budget)


def _reference(index: int) -> int:
    """The frame that this one, which is not the first of its window, is compared with."""
    return index - 2 if index % _WINDOW == 2 else index - 1


METHOD = Method(
    name="dycoke",
    paper="DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models, CVPR 2025, arXiv 2411.15024",
    keep=keep,
)
