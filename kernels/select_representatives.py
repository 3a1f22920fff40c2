"""Which tokens stand for all others of a video (``variant="plus"``, in the place of ``select_tokens``).

::

    features [N, P, D]        ->   tokens [V, budget, D]
    counts [V]                     kept: where each came from, in time order, then raster order

Attention received ranks every token by itself. Those of highest rank often show the same thing, in frame after frame,
while another one that a question asks about goes (docs/accuracy.md). Here nothing is ranked by itself: tokens are taken
one after another, each time the one that adds most to what those taken before stand for (greedy facility location), so
that whatever differs from the rest gets a token of its own, and what repeats gets few. A token far from the mean counts
more than one near it, and a token stands less for another the more frames lie between them: what moves keeps tokens at
several times.

Every device computes the native body; there is no Triton provider yet.
"""

import torch
from torch import Tensor

_WINDOW = 8
"""Most frames compared with one another: the work grows with the frames, and not with their square."""
_FADING = 0.75
"""Of a token's likeness, what is left one merged frame further away."""
_ROUNDING = 1e-5
"""A token this close to the mean, as a share of its own length, is the mean."""
_TIE = 1e-3
"""Gains this close are equal, in units of one average token that is represented fully: among copies of a token,
rounding, which differs between devices and compilers, must not choose."""


@torch.library.custom_op("earlytom::select_representatives", mutates_args=())
def select_representatives(features: Tensor, counts: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Every video keeps the ``budget`` tokens that represent it best, each video computed by itself.

    A video's n frames are cut into ceil(n / 8) windows, their sizes differing by at most 1, larger first. The window
    of frames [b, e) keeps floor(budget e / n) - floor(budget b / n) tokens: again and again the token j not kept yet
    with the largest gain sum_i max(0, S_ij - c_i), where c_i is the largest S_ik of the tokens k kept so far (0 at
    first) and S_ij says how well j stands for i: with x_i less the mean of the window's tokens, |x_i| / mean |x| *
    max(0, cos(x_i, x_j)) * 0.75^(frames between them). Of gains within 0.001 of the largest, the lower index wins.

    Args:
        features: [N, P, D], any floating dtype and strides; the merged frames of all videos, in order, as they
            leave projector and pooling.
        counts: int64 [V], frames of each video, at least 1, N in total.
        budget: tokens each video keeps, at least 1.

    Returns:
        tokens: [V, budget, D], dtype of ``features``.
        kept: int64 [V, budget, 2], the (frame within its video, token) of each, in time order and then in
            raster order.

    Raises:
        ValueError: shapes or dtypes that do not match, NaN or inf in the features as float32, counts that do not
            add up, or a video with fewer than ``budget`` tokens.
    """
    _check(features, counts)
    lengths = _read_lengths(features, counts)
    tokens = features.shape[1]
    for frames in lengths:
        _check_budget(budget, frames, tokens)
    places = torch.stack([_representatives(video, budget) for video in features.split(lengths)])
    kept = torch.stack([places // tokens, places % tokens], dim=2)
    selected = [video[frame, token] for video, (frame, token) in zip(features.split(lengths), kept.mT, strict=True)]
    return torch.stack(selected), kept


@select_representatives.register_fake
def _(features: Tensor, counts: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    _check(features, counts)
    videos = counts.shape[0]
    kept = counts.new_empty((videos, budget, 2), device=features.device)
    return features.new_empty((videos, budget, features.shape[2])), kept


def _check(features: Tensor, counts: Tensor) -> None:
    if features.dim() != 3 or not features.is_floating_point():
        raise ValueError(
            f"earlytom::select_representatives: features must be a float tensor [frames, tokens, channels], got "
            f"{features.dim()} axes of {features.dtype}"
        )
    if counts.dim() != 1 or counts.dtype != torch.int64:
        raise ValueError(
            f"earlytom::select_representatives: counts must be int64 [videos], got {counts.dtype} with "
            f"{counts.dim()} axes"
        )


def _read_lengths(features: Tensor, counts: Tensor) -> list[int]:
    """The frames of each video, after checking the values; one small copy to the host."""
    finite = features.float().isfinite().all()
    all_finite, *lengths = torch.cat([finite.view(1).long(), counts.to(features.device)]).tolist()
    if not all_finite:
        raise ValueError(
            "earlytom::select_representatives: features hold NaN or inf; check the vision encoder for overflow"
        )
    if sum(lengths) != features.shape[0] or min(lengths, default=0) < 1:
        raise ValueError(
            f"earlytom::select_representatives: counts={lengths} over {features.shape[0]} frames; every video needs "
            f"at least one frame and the counts must add up to the frames given"
        )
    return lengths


def _check_budget(budget: int, frames: int, tokens: int) -> None:
    if not 1 <= budget <= frames * tokens:
        raise ValueError(
            f"earlytom::select_representatives: budget={budget}, but a video has {frames} frames of {tokens} tokens; "
            f"the budget must be in [1, {frames * tokens}]: merge fewer frames or lower the retain ratio"
        )


def _representatives(video: Tensor, budget: int) -> Tensor:
    """int64 [budget]: places among the n P tokens of one video [n, P, D], ascending."""
    frames, tokens = video.shape[:2]
    kept = []
    for begin, end in _windows(frames):
        quota = budget * end // frames - budget * begin // frames
        if quota > 0:
            similarity = _similarity(video[begin:end])
            kept.append(begin * tokens + _cover(similarity, quota))
    return torch.cat(kept)


def _windows(frames: int) -> list[tuple[int, int]]:
    """[begin, end) of each window."""
    number = -(-frames // _WINDOW)
    size, larger = divmod(frames, number)
    ends = [size * (window + 1) + min(window + 1, larger) for window in range(number)]
    return list(zip([0, *ends], ends, strict=False))


def _similarity(window: Tensor) -> Tensor:
    """float32 [n, n], from the n = m P tokens of m frames [m, P, D]: how well each (row) stands for each (column).

    Without the mean, which all tokens share, every cosine is close to 1. Nothing stands for a token equal to the mean.
    """
    x = window.flatten(0, 1).float()
    away = x - x.mean(0)
    length = torch.linalg.vector_norm(away, dim=1)
    length = torch.where(length > _ROUNDING * torch.linalg.vector_norm(x, dim=1), length, 0.0)
    direction = torch.where(length[:, None] > 0, away / length[:, None], 0.0)
    with torch.autocast(window.device.type, enabled=False):  # it would make the product one of bfloat16
        cosine = (direction @ direction.T).clamp_min_(0)
    frame = torch.arange(window.shape[0], device=window.device).repeat_interleave(window.shape[1])
    fading = _FADING ** (frame[:, None] - frame).abs()
    weight = torch.where(length > 0, length / length.mean(), 0.0)
    return cosine * fading * weight


def _cover(similarity: Tensor, quota: int) -> Tensor:
    """int64 [quota], ascending: the tokens taken from [n, n]; the host waits for none of them."""
    covered = similarity.new_zeros(similarity.shape[0])
    taken = torch.zeros_like(covered, dtype=torch.bool)
    order = []
    for _ in range(quota):
        gain = (similarity - covered).clamp_min_(0).sum(1).masked_fill_(taken, -1)
        # argmax over flags: the first of those that tie. Its result stays a tensor, since a number would be waited for.
        best = (gain >= gain.max() - _TIE).int().argmax(0, keepdim=True)
        covered = torch.maximum(covered, similarity.index_select(0, best)[0])
        taken.index_fill_(0, best, True)
        order.append(best)
    return torch.cat(order).sort().values
