"""Density peaks clustering with k nearest neighbours (DPC-KNN: Du et al., Knowledge-Based Systems 99, 2016).

    x_0 x_1 x_2        x_3           two peaks: the densest token, x_1, and x_3, which is far from all that are denser
     .   .   .          .            x_0, x_1, x_2 -> x_1;   x_3 -> x_3

A token's density is rho_i = exp(-mean of d_ij^2 / C over its k nearest neighbours j); delta_i is its distance,
d_ij / sqrt(C), to the nearest token that is denser, and for the densest one that to the farthest token of all. Peaks
are the tokens with the highest rho_i * delta_i.

What papers leave open: itself is no neighbour of a token; with fewer than k others, all of them are. Distances are
divided by sqrt(C), as in the code of those who use it for tokens: else rho would be 0 for all. Of tokens of equal
density the lower index is the denser one, where that code adds random noise.
"""

import torch
from torch import Tensor

from .base import Sizes
from .exact import MOST_NEIGHBOURS, squared_distances
from .selection import best

_STEPS = 2.0**20
"""Of the logarithm of a score, in one unit: a logarithm is not rounded in the same way on every device."""


def peak_scores(squared: Tensor, members: Tensor, unit: Tensor, channels: int, neighbours: int) -> Tensor:
    """How much of a peak each token is: log(rho_i * delta_i), but for a constant.

    Args:
        squared: [G, P, P], squared distances as ``exact.squared_distances`` gives them.
        members: bool [G, P], the tokens of each group; the others do not exist.
        unit: what the integers were in.
        neighbours: k, at most ``exact.MOST_NEIGHBOURS``.

    Returns:
        float64 [G, P]: -inf for what is no member, and the lowest finite number for a member that equals a denser one.
    """
    assert neighbours <= MOST_NEIGHBOURS
    places = torch.arange(squared.shape[1], device=squared.device)
    pairs = members[:, :, None] & members[:, None, :]
    others = pairs & (places[:, None] != places)
    nearest = squared.masked_fill(~others, torch.inf).sort(dim=2).values[:, :, :neighbours]
    number = (members.sum(1) - 1).clamp(1, neighbours)
    spread = torch.where(nearest.isfinite(), nearest, 0.0).sum(2)
    denser = pairs & (
        (spread[:, None, :] < spread[:, :, None])
        | ((spread[:, None, :] == spread[:, :, None]) & (places < places[:, None]))
    )
    to_denser = squared.masked_fill(~denser, torch.inf).amin(2)
    farthest = squared.masked_fill(~pairs, 0.0).amax(2)
    distance = torch.where(denser.any(2), to_denser, farthest)
    density = -(spread / number[:, None]) * (unit * unit / channels)
    score = ((density + 0.5 * distance.log()) * _STEPS).round_()
    return torch.where(distance > 0, score, torch.finfo(score.dtype).min).masked_fill_(~members, -torch.inf)


def cluster_means(tokens: Tensor, squared: Tensor, members: Tensor, centers: Tensor) -> Tensor:
    """float64 [G, P, C]: at each center the mean of the members nearest to it, itself among them.

    Args:
        tokens: float64 [G, P, C].
        squared: [G, P, P], distances as above; of equal ones the lower center wins, and a center belongs to itself.
        members, centers: bool [G, P].
    """
    places = torch.arange(squared.shape[1], device=squared.device)
    nearest = squared.masked_fill(~centers[:, None, :], torch.inf).argmin(2)
    nearest = torch.where(centers, places, nearest)
    belongs = ((nearest[:, :, None] == places) & members[:, :, None]).double()
    return (belongs.mT @ tokens) / belongs.sum(1).clamp(min=1)[:, :, None]


def operations(groups: int, sizes: Sizes) -> int:
    """Of the matrix products of ``cluster``: distances, and the sums that means are made of."""
    return groups * 4 * sizes.tokens**2 * sizes.channels


def cluster(
    tokens: Tensor, integers: Tensor, members: Tensor, unit: Tensor, numbers: list[int], neighbours: int
) -> tuple[Tensor, Tensor]:
    """The members of each group as ``numbers[g]`` means, at the places of the centers: float64 [G, P, C], bool [G, P].

    ``integers`` are the ``tokens``, float64 [G, P, C], in fixed point, in ``unit``.
    """
    squared = squared_distances(integers)
    centers = best(peak_scores(squared, members, unit, tokens.shape[2], neighbours), numbers)
    return cluster_means(tokens, squared, members, centers), centers
