"""VisionZip: in each frame, the tokens that receive most attention, and a few that the others are averaged into.

    k = 20 of the 196 tokens of a frame   ->   17 dominant ones, and 3 contextual ones made of the other 179

What the paper says of one image is done for every frame by itself. A token is *dominant* if it is among those that
receive most attention in the last layer that the encoder runs; SigLIP has no class token, so that is the mean over all
queries. Of the others, every so-manyth is a *target*; each that is none joins the target whose key is most like its
own, and the average of a target and of those that joined it is a *contextual* token.

What the paper leaves open, and what is done here:

- the split of K over frames: as evenly as possible, floor(K (f + 1) / F) - floor(K f / F) for frame f;
- how many of a frame's k are dominant: round(54 k / 64), half up, the share of its setting with 64 tokens;
- what "most like" is: the cosine of keys, mean over heads; of equal ones, and of equal attention, the first in order;
- where the targets are: at floor(i R / c), i = 0, ..., c - 1, of the R others in raster order;
- which stage's tokens these are: those behind projector and pooling, which the language model would get; attention and
  keys are pooled as they are;
- the order: raster order in a frame, a contextual token at its target's place.

The authors' code, which is for images and CLIP, ranks by the attention of the class token, in the layer whose states
LLaVA takes (the last that runs, as here), and keeps that token too; it works in front of the projector, takes every
floor(R / c)-th of the others as a target, adds to a target the average of those that join it, where the paper averages
all of them, and puts the contextual tokens behind all dominant ones.
"""

import torch
from torch import Tensor

from .base import FrameTokens, Kept, Method, Sizes

_DOMINANT, _ALL = 54, 64
"""Tokens of an image in the paper's smallest setting, of which the dominant ones."""
_TIE = 1e-6
"""Cosines this close are equal."""


def keep(video: FrameTokens, budget: int) -> Kept:
    """See above; computed in float32, frames with equally many tokens at once."""
    frames, size = video.features.shape[:2]
    shares = _shares(frames, budget)
    tokens, places = [], []
    for share in sorted(set(shares) - {0}):
        chosen = torch.tensor([f for f in range(frames) if shares[f] == share], device=video.features.device)
        kept, at = _of_frames(FrameTokens(*(x[chosen] for x in video)), share)  # type: ignore[index]
        tokens.append(kept.flatten(0, 1))
        places.append((chosen[:, None] * size + at).flatten())
    order = torch.cat(places).argsort()
    place = torch.cat(places)[order]
    return Kept(torch.cat(tokens)[order], torch.stack([place // size, place % size], dim=1))


def operations(sizes: Sizes) -> float:
    """Similarities of what is not dominant in a frame with its targets, and the sums that averages are made of."""
    found = 0
    for share in _shares(sizes.frames, sizes.kept):
        dominant = _dominant(share)
        found += 2 * (sizes.tokens - dominant) * (share - dominant) * (sizes.key_width + sizes.channels)
    return found


def _shares(frames: int, budget: int) -> list[int]:
    """Tokens that each frame keeps."""
    return [budget * (frame + 1) // frames - budget * frame // frames for frame in range(frames)]


def _dominant(share: int) -> int:
    """How many of the tokens of a frame are dominant."""
    return (2 * _DOMINANT * share + _ALL) // (2 * _ALL)


def _of_frames(frames: FrameTokens, share: int) -> tuple[Tensor, Tensor]:
    """(tokens [m, k, C], their places int64 [m, k]) of m frames, ``share`` = k of each."""
    features, importance, keys = frames
    assert importance is not None and keys is not None
    dominant = _dominant(share)
    ranked = importance.sort(dim=1, descending=True, stable=True).indices
    first, others = ranked[:, :dominant], ranked[:, dominant:].sort(dim=1).values
    kept = _taken(features, first)
    if dominant == share:
        return kept, first
    rest, contextual = others.shape[1], share - dominant
    targets = [number * rest // contextual for number in range(contextual)]
    averages = _averages(_taken(features, others), _taken(keys, others), targets)
    return torch.cat([kept.to(averages.dtype), averages], dim=1), torch.cat([first, others[:, targets]], dim=1)


def _averages(features: Tensor, keys: Tensor, targets: list[int]) -> Tensor:
    """[m, c, C], in float32 at least: of R tokens [m, R, C] with keys [m, R, d], each of the c ``targets`` with those
    that join it."""
    direction = torch.nn.functional.normalize(keys, dim=2)
    alike = direction @ direction[:, targets].mT  # [m, R, c]
    # argmax over flags: the first of those that tie.
    joins = (alike >= alike.amax(2, keepdim=True) - _TIE).int().argmax(2)
    joins[:, targets] = torch.arange(len(targets), device=joins.device)
    x = features.to(torch.promote_types(features.dtype, torch.float32))
    member = torch.nn.functional.one_hot(joins, len(targets)).to(x.dtype)
    return member.mT @ x / member.sum(1)[..., None]


def _taken(x: Tensor, places: Tensor) -> Tensor:
    """[m, P, D] at int64 [m, n]: [m, n, D]."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))


METHOD = Method(
    name="visionzip",
    paper="VisionZip: Longer is Better but Not Necessary in Vision Language Models, CVPR 2025, arXiv 2412.04467",
    keep=keep,
    importance=True,
    keys=True,
    operations=operations,
)
