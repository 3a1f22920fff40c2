"""How a video's budget is divided, and how tokens are taken: exactly as many as were asked for.

even_shares(7, [3, 1, 9])           ->   [3, 1, 3]
proportional_shares(5, [4, 4, 2])   ->   [2, 2, 1]
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import FrameTokens, Kept


def even_shares(budget: int, room: Sequence[int]) -> list[int]:
    """One token at a time to each in turn, as long as it has room for more; ``budget`` in all, at most sum(room)."""
    low, high = 0, max(room, default=0)
    while low < high:
        level = (low + high + 1) // 2
        if sum(min(level, most) for most in room) <= budget:
            low = level
        else:
            high = level - 1
    shares = [min(low, most) for most in room]
    left = budget - sum(shares)
    for index, most in enumerate(room):
        if left > 0 and most > low:
            shares[index] += 1
            left -= 1
    return shares


def proportional_shares(budget: int, sizes: Sequence[int]) -> list[int]:
    """Shares of ``budget`` in proportion to ``sizes``, none above its size for a budget of at most sum(sizes).

    Rounded down; what is left goes, one each, to those with the largest remainders. Of equal ones the first wins.
    """
    total = sum(sizes)
    shares = [budget * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda index: -(budget * sizes[index] % total))
    for index in by_remainder[: budget - sum(shares)]:
        shares[index] += 1
    return shares


def best(scores: Tensor, numbers: Sequence[int]) -> Tensor:
    """bool [G, P]: in each row of [G, P] so many of the highest scores. Of equal ones the lower index wins."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    taken = torch.arange(scores.shape[1], device=scores.device) < on(scores, numbers)[:, None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, taken)


def kept(tokens: Tensor, chosen: Tensor, budget: int) -> Kept:
    """The ``budget`` tokens of [F, P, C] that ``chosen`` [F, P] has; the host does not wait to count them."""
    places = first_of(chosen, budget)
    return Kept(tokens.flatten(0, 1)[places], torch.stack([places // tokens.shape[1], places % tokens.shape[1]], 1))


def first_of(chosen: Tensor, number: int) -> Tensor:
    """int64 [number]: the indices, in a flattened ``chosen``, of its first so many that are true."""
    return (~chosen.flatten()).byte().sort(stable=True).indices[:number]


def attention(video: FrameTokens) -> Tensor:
    """``video.importance``, which a method with ``importance=True`` always gets."""
    assert video.importance is not None
    return video.importance


def on(like: Tensor, numbers: Sequence[int]) -> Tensor:
    """int64 [n], on the device of ``like``."""
    return torch.tensor(list(numbers), dtype=torch.int64, device=like.device)
