"""FastVID: dynamic temporal segmentation, then density spatiotemporal pruning.

::

    segment of 6 frames    frame 0   1   2   3   4   5        DTM: tokens of anchor frames that others are merged into
    DTM                    anchors               anchors      ATS: tokens that receive the most attention
    ATS                    some    some  ...         some

Segmentation (DySeg). A border lies where the cosine of neighbouring frames, as the means of their tokens, is below
tau = 0.9, and at the c - 1 = 7 lowest cosines in any case.
Budget. A segment of n frames keeps its share n / F of K, by largest remainder: q tokens, of which floor(d q), d = 0.4,
are anchors. Anchor frames are every p-th one of the segment, p = 4, from the first on; they have even shares of the
anchors, earlier ones one more, and at most floor(P / 2) each. The rest of q is taken by attention, in even shares of
the segment's frames as far as these have tokens left, earlier ones one more.
ATS. Each frame keeps its share of salient tokens, those that receive the most attention in the encoder's last layer.
DTM. Of what ATS leaves of an anchor frame the density peaks (k = 4) are its anchors. Each token of the segment that is
neither salient nor an anchor of any frame is assigned, in every anchor frame, to the anchor of the highest cosine, and
anchor a with b_1 ... b_n becomes beta a + (1 - beta) / n sum b_i, beta = 0.6; one without tokens stays a.
So K tokens are left whatever the video shows.

The paper takes the attention of SigLIP's pooling head, which a Video-LLM does not have, and of encoders without
one that of the mean query of the last layer; it does not say what a frame's global feature is, nor which stage
goes first. The released code has the head and takes its pooled output as the frame's feature, rounds a frame's tokens
and a segment's anchors down, counts a token among its own neighbours, breaks ties of density by random noise,
takes ATS first as here, and merges the anchors of other anchor frames, too.
"""

import torch
from torch import Tensor

from .base import FrameTokens, Kept, Method, Sizes
from .density_peaks import peak_scores
from .exact import fixed_point, frame_tokens, likeness, likenesses, squared_distances
from .selection import attention, best, even_shares, first_of, kept, proportional_shares

_SEGMENTS = 8
_TAU_SQUARED = 0.81
_EVERY = 4
_NEIGHBOURS = 4
_ANCHOR_SHARE = (2, 5)
"""d, as a fraction: 0.4 q in floating point can be less than the whole number that it is."""
_BETA = 0.6


def keep(video: FrameTokens, budget: int) -> Kept:
    features = video.features
    frames, tokens, channels = features.shape
    integers, unit = fixed_point(features)
    segments = _segments(integers)
    salient_numbers, anchor_numbers = _shares(budget, tokens, segments)
    salient = best(attention(video), salient_numbers)
    anchors = torch.zeros_like(salient)
    anchor_frames = [frame for frame in range(frames) if anchor_numbers[frame]]
    if anchor_frames:
        squared = squared_distances(integers[anchor_frames])
        scores = peak_scores(squared, ~salient[anchor_frames], unit, channels, _NEIGHBOURS)
        anchors[anchor_frames] = best(scores, [anchor_numbers[frame] for frame in anchor_frames])
    out = features.clone()
    for begin, last in segments:
        inside = slice(begin, last + 1)
        of_segment = features[inside].flatten(0, 1).double()
        directions, _ = fixed_point(of_segment, each=True)
        free = ~(salient[inside] | anchors[inside]).flatten()
        for frame in range(begin, last + 1, _EVERY):
            if anchor_numbers[frame]:
                at = first_of(anchors[frame], anchor_numbers[frame])
                among = (frame - begin) * tokens + at
                out[frame, at] = _aggregated(of_segment, directions, among, free).to(out.dtype)
    return kept(out, salient | anchors, budget)


def operations(sizes: Sizes) -> float:
    """The most that distances in anchor frames can be, where every frame is one, and the most that cosines with anchors
    and sums of tokens can be, where one segment has all frames that it can have."""
    frames, tokens, channels = sizes.frames, sizes.tokens, sizes.channels
    others = min(_SEGMENTS, frames) - 1
    squares = (frames - others) ** 2 + others
    anchors_by_frames = (sizes.kept * squares / frames + frames) * _ANCHOR_SHARE[0] / _ANCHOR_SHARE[1]
    return 2 * frames * tokens**2 * channels + 4 * anchors_by_frames * tokens * channels


def _segments(integers: Tensor) -> list[tuple[int, int]]:
    """First and last frame of each segment; the host waits for F - 1 truth values."""
    frames = frame_tokens(integers)
    alike = likeness(frames[1:], frames[:-1])
    lowest = best(-alike[None], [_SEGMENTS - 1])[0]
    borders = [frame + 1 for frame, border in enumerate((lowest | (alike < _TAU_SQUARED)).tolist()) if border]
    return list(zip([0, *borders], [*(border - 1 for border in borders), len(frames) - 1], strict=True))


def _shares(budget: int, tokens: int, segments: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """How many salient tokens, and how many anchors, each frame has."""
    salient, anchors = [], []
    lengths = [last - begin + 1 for begin, last in segments]
    shares = proportional_shares(budget, [length * tokens for length in lengths])
    for length, share in zip(lengths, shares, strict=True):
        room = [tokens // 2 if frame % _EVERY == 0 else 0 for frame in range(length)]
        of_anchors = even_shares(min(share * _ANCHOR_SHARE[0] // _ANCHOR_SHARE[1], sum(room)), room)
        anchors += of_anchors
        salient += even_shares(share - sum(of_anchors), [tokens - number for number in of_anchors])
    return salient, anchors


def _aggregated(tokens: Tensor, directions: Tensor, anchors: Tensor, free: Tensor) -> Tensor:
    """float64 [k, C]: of a segment's tokens [m, C] the ``anchors``, int64 [k], with those that are ``free`` [m] merged
    into them; ``directions`` are the tokens as integers."""
    assigned = likenesses(directions, directions[anchors]).argmax(1)
    belongs = (assigned[:, None] == torch.arange(len(anchors), device=anchors.device)) & free[:, None]
    number = belongs.sum(0)[:, None]
    mean = (belongs.double().T @ tokens) / number.clamp(min=1)
    return torch.where(number > 0, _BETA * tokens[anchors] + (1 - _BETA) * mean, tokens[anchors])


METHOD = Method(
    name="fastvid",
    paper="FastVID: Dynamic Density Pruning for Fast Video Large Language Models, NeurIPS 2025, arXiv 2503.11187",
    keep=keep,
    importance=True,
    operations=operations,
)
