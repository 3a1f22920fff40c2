"""How alike tokens are, with the same bits on every device: products and sums of integers that float64 holds exactly.

    fixed_point([[1.5, -0.5]])   ->   [[402653184, -134217728]], 2**-28

Methods compare cosines with thresholds and with each other. Where frames repeat, many are equal, and what rounding
makes of them depends on the device, the library and the size of a product. Integers are not rounded at all, and then
a product and a quotient once each, as IEEE 754 says. A root is not, in every library: so it is squares of cosines that
are compared.
"""

import torch
from torch import Tensor

MOST_NEIGHBOURS = 8
"""So many squared distances can be added without rounding."""


def fixed_point(x: Tensor, *, each: bool = False) -> tuple[Tensor, Tensor]:
    """Tokens as integers in a common unit, or ``each`` in one of its own (for cosines, to which it is all the same).

    The largest entry has b bits, where C entries of two tokens have squared distances of at most 2**50: b is 18 for
    3584 channels and 21 for 64, and what is smaller than the unit is zero.

    Args:
        x: [..., C], floating, finite.

    Returns:
        integers: float64 [..., C].
        unit: float64, a power of 2: a scalar, or [..., 1] with ``each``.
    """
    wide = x.double()
    bits = (48 - (x.shape[-1] - 1).bit_length()) // 2
    largest = wide.abs().amax(-1, keepdim=True) if each else wide.abs().amax()
    mantissa, _ = torch.frexp(largest)
    power = torch.where(mantissa > 0, largest / mantissa, 1.0)
    unit = power * 2.0**-bits
    return (wide / unit).round_(), unit


def likeness(a: Tensor, b: Tensor) -> Tensor:
    """float64 [...]: of integer tokens [..., C] pair by pair the square of the cosine, with the cosine's sign.

    0 where one of them is zero, exactly 1 for equal ones.
    """
    return _signed_square((a * b).sum(-1), a.square().sum(-1), b.square().sum(-1))


def likenesses(a: Tensor, b: Tensor) -> Tensor:
    """float64 [..., n, m]: the same of each of the integer tokens [..., n, C] with each of [..., m, C]."""
    return _signed_square(a @ b.mT, a.square().sum(-1)[..., :, None], b.square().sum(-1)[..., None, :])


def squared_distances(x: Tensor) -> Tensor:
    """float64 [..., n, n], integers: of integer tokens [..., n, C] from each other."""
    length = x.square().sum(-1)
    return length[..., :, None] + length[..., None, :] - 2 * (x @ x.mT)


def frame_tokens(tokens: Tensor) -> Tensor:
    """Integers [F, C], each frame in a unit of its own: the sums, and so the directions of the means, of integer tokens
    [F, P, C]."""
    return fixed_point(tokens.sum(1), each=True)[0]


def _signed_square(product: Tensor, a: Tensor, b: Tensor) -> Tensor:
    lengths = a * b
    return torch.where(lengths > 0, product * product.abs() / lengths, 0.0)
