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

Tokens are compared within blocks of at most eight frames times sixteen tokens of each. Blocks know nothing of one
another, so they are all computed at once and each fits into the registers of a GPU's processor; but they compete for
the budget, by what each next token would add: where nothing changes few tokens stay, and where much does many.
"""

import functools

import torch
from torch import Tensor

from earlytom_compile.kernels.providers import Provider, provide

WINDOW = 8
"""Most frames of a block."""
STRIP = 16
"""Most tokens of a block in each of its frames."""
POWER = 0.75
"""Of a token's distance from the mean, with which it counts: with 1, what stands out leaves little of the background,
with 0, much of it (docs/accuracy.md)."""
FADING = 0.75
"""Of a token's likeness, what is left one frame further away."""
ROUNDING = 1e-5
"""A token this close to the mean, as a share of its own length, is the mean."""
TIE = 1e-3
"""Gains this close are equal, in units of one average token that is represented fully: among copies of a token,
rounding, which differs between devices and compilers, must not choose."""
MOST_OF_SHARE = 2
"""A block keeps at most so many times what it would keep of a budget spread evenly: a bound on the steps of a block."""


@torch.library.custom_op("earlytom::select_representatives", mutates_args=())
def select_representatives(features: Tensor, counts: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Every video keeps the ``budget`` tokens that represent it best, each video computed by itself.

    A video's n frames are cut into ceil(n / 8) windows and the P tokens of a frame into ceil(P / 16) strips of raster
    order, sizes differing by at most 1, larger first. A block is a window of a strip. With x_i less the mean of all
    tokens of the window, and |x| the mean length of these, token j of a block stands for token i of it by
    S_ij = (|x_i| / |x|)^0.75 * max(0, cos(x_i, x_j)) * 0.75^(frames between them).

    A block takes one token after another: of those left, the j with the largest gain sum_i max(0, S_ij - c_i), where
    c_i is the largest S_ik of the tokens k taken so far (0 at first); of gains within 0.001 of the largest the lowest
    index wins. It takes at most twice its even share, ceil(2 budget m / (n P)) of its m tokens. Of what all blocks
    take, the ``budget`` ones stay before which the largest gain was largest, in whole 0.001 (rounded, halves up); of
    equal ones the earlier taken of its block, then the one of the earlier block.

    Args:
        features: [N, P, D], any floating dtype and strides; the frames of all videos, in order, as they leave
            projector and pooling.
        counts: int64 [V], frames of each video, at least 1, N in total.
        budget: tokens each video keeps, at least 1.

    Returns:
        tokens: [V, budget, D], dtype of ``features``.
        kept: int64 [V, budget, 2], the (frame within its video, token) of each, in time order and then in
            raster order.

    Raises:
        ValueError: shapes or dtypes that do not match, NaN or inf in the features as float32, counts that do not
            add up, or a video with fewer than ``budget`` tokens. On CUDA, where nothing waits for the values, NaN or
            inf give tokens of NaN, and counts that mean nothing give kept places of -1.
    """
    check_shapes(features, counts)
    lengths = _read_lengths(features, counts)
    tokens = features.shape[1]
    for frames in lengths:
        check_budget(budget, frames, tokens)
    places = torch.stack([_representatives(video, budget) for video in features.split(lengths)])
    kept = torch.stack([places // tokens, places % tokens], dim=2)
    selected = [video[frame, token] for video, (frame, token) in zip(features.split(lengths), kept.mT, strict=True)]
    return torch.stack(selected), kept


@select_representatives.register_fake
def _(features: Tensor, counts: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    check_shapes(features, counts)
    videos = counts.shape[0]
    kept = counts.new_empty((videos, budget, 2), device=features.device)
    return features.new_empty((videos, budget, features.shape[2])), kept


def check_shapes(features: Tensor, counts: Tensor) -> None:
    """Raises ValueError for shapes and dtypes that do not match."""
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


def check_budget(budget: int, frames: int, tokens: int) -> None:
    """Raises ValueError where a video of so many frames and tokens cannot fill the budget."""
    if not 1 <= budget <= frames * tokens:
        raise ValueError(
            f"earlytom::select_representatives: budget={budget}, but a video has {frames} frames of {tokens} tokens; "
            f"the budget must be in [1, {frames * tokens}]: merge fewer frames or lower the retain ratio"
        )


def _representatives(video: Tensor, budget: int) -> Tensor:
    """int64 [budget]: places among the n P tokens of one video [n, P, D], ascending."""
    frames, tokens = video.shape[:2]
    place, there = _blocks(frames, tokens)
    limit = ((MOST_OF_SHARE * budget * there.sum(1) - 1) // (frames * tokens) + 1).clamp_max(budget)
    turns = int(limit.max())
    place, there, limit = (part.to(video.device) for part in (place, there, limit))
    gain, taken = _cover(_similarity(video, place, there), there, limit, turns)
    # In the order of turns, then blocks: what comes first wins where gains are equal.
    order = whole_ties(gain).flatten().sort(descending=True, stable=True).indices[:budget]
    chosen: Tensor = place.expand(len(gain), -1, -1).gather(2, taken[:, :, None]).flatten()[order].sort().values
    return chosen


def whole_ties(gain: Tensor) -> Tensor:
    """int64: gains in whole ``TIE``, by which blocks compete."""
    return (gain / TIE + 0.5).floor().long()


@functools.lru_cache(maxsize=64)
def _blocks(frames: int, tokens: int) -> tuple[Tensor, Tensor]:
    """int64 [B, M], bool [B, M]: the places among ``frames * tokens`` in each block, and whether there is one."""
    blocks = [
        [frame * tokens + token for frame in range(*window) for token in range(*strip)]
        for window in near_equal(frames, WINDOW)
        for strip in near_equal(tokens, STRIP)
    ]
    longest = max(map(len, blocks))
    place = torch.tensor([block + [0] * (longest - len(block)) for block in blocks])
    return place, torch.tensor([[True] * len(block) + [False] * (longest - len(block)) for block in blocks])


def near_equal(whole: int, most: int) -> list[tuple[int, int]]:
    """[begin, end) of as few parts of at most ``most`` as there can be, larger ones first."""
    number = -(-whole // most)
    size, larger = divmod(whole, number)
    ends = [size * (part + 1) + min(part + 1, larger) for part in range(number)]
    return list(zip([0, *ends], ends, strict=False))


def _similarity(video: Tensor, place: Tensor, there: Tensor) -> Tensor:
    """float32 [B, M, M]: how well each token of a block (row) stands for each (column); 0 where there is none.

    Without the mean, which all tokens share, every cosine is close to 1. Nothing stands for a token equal to the mean.
    """
    tokens = video.shape[1]
    directions, weights = zip(*(_apart(video[begin:end]) for begin, end in near_equal(len(video), WINDOW)), strict=True)
    direction, weight = torch.cat(directions)[place], torch.cat(weights)[place].masked_fill(~there, 0)
    with torch.autocast(video.device.type, enabled=False):  # it would make the product one of bfloat16
        cosine = (direction @ direction.mT).clamp_min_(0)
    frame = place // tokens
    fading = FADING ** (frame[:, :, None] - frame[:, None]).abs()
    return cosine * fading * weight[:, None]


def _apart(window: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [n, D], [n], from the n = m P tokens of m frames [m, P, D]: the direction in which each lies from the
    mean, and how much it counts."""
    x = window.flatten(0, 1).float()
    away = x - x.mean(0)
    length = torch.linalg.vector_norm(away, dim=1)
    length = torch.where(length > ROUNDING * torch.linalg.vector_norm(x, dim=1), length, 0.0)
    direction = torch.where(length[:, None] > 0, away / length[:, None], 0.0)
    return direction, torch.where(length > 0, (length / length.mean()) ** POWER, 0.0)


def _cover(similarity: Tensor, there: Tensor, limit: Tensor, turns: int) -> tuple[Tensor, Tensor]:
    """float32 [turns, B], int64 [turns, B]: the largest gain in each block before each turn, -1 behind its ``limit``
    [B], and the token that is taken then."""
    covered = torch.zeros_like(similarity[:, 0])
    gone, block = ~there, torch.arange(len(there), device=there.device)
    gains, taken, more = [], [], torch.empty_like(similarity)
    for turn in range(turns):
        gain = torch.sub(similarity, covered[:, None], out=more).clamp_min_(0).sum(2).masked_fill_(gone, -1)
        most = gain.amax(1)
        best = (gain >= most[:, None] - TIE).int().argmax(1)  # of flags: the first of those that tie
        covered = torch.maximum(covered, similarity[block, best])
        gone.scatter_(1, best[:, None], True)
        gains.append(most.masked_fill(turn >= limit, -1))
        taken.append(best)
    return torch.stack(gains), torch.stack(taken)


def _triton_supports(features: Tensor, counts: Tensor, budget: int) -> bool:
    return (
        features.dim() == 3
        and features.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and features.device == counts.device
    )


provide(select_representatives, Provider("triton", ".triton_select_representatives", supports=_triton_supports))
