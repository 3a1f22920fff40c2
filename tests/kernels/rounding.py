"""How far rounding can take an operator from its definition: bounds of first order, from the inputs, in float64.

    bound = rounding.attention_received(query, key, scale)       # of one float32 computation, an absolute error each
    assert_within(actual, defined, bound)
    assert_within(actual, another, 2 * bound)                    # two computations, each with an error of its own

A float32 sum of n terms, in whatever order, is off by at most gamma(n) times the sum of their sizes (Higham,
Accuracy and Stability of Numerical Algorithms, 2002, section 4.2). With other inputs, the bounds are others: a
tolerance that is one number is either too small for some of them or proves nothing of most.
"""

import torch
from op_inputs import DEVICE
from torch import Tensor

from earlytom_compile.kernels.frame_similarity import _fixed_point_bits

UNIT = 2.0**-24
"""Of float32: the relative error of one rounding."""


def unit_of_products(dtype: torch.dtype) -> float:
    """The relative error of a step of a matrix product, where Triton's providers are tested.

    On a GPU, tensor cores add products of 16 bits in float32 but cut off what they would have to round, and take
    float32 apart for three products of 11 bits each (tf32x3), which keep 22 of its 24 bits. Elsewhere it is float32.
    """
    if DEVICE == "cpu":
        return UNIT
    return 4 * UNIT if dtype == torch.float32 else 2 * UNIT


def gamma(steps: int, unit: float = UNIT) -> float:
    """What ``steps`` roundings can come to."""
    return steps * unit / (1 - steps * unit)


def attention_received(
    query: Tensor, key: Tensor, scale: float, unit: float = UNIT, scores_twice: bool = False
) -> Tensor:
    """float64 [T, S], of one computation from [T, H, S, d].

    score s_ij      d products and their sum, inputs cast to float32, times scale and log2(e): gamma(d + 6) times
                    |scale| sum_k |q_ik k_jk|, of which the largest of a row stands for all
    e^(s - max)     the difference of two scores, and an exponential good to 4 units
    p_ij            twice that, and a sum of S exponentials; only 1 - p_ij of it where p_ij stands in its own
                    denominator, and not where the scores of numerator and denominator are computed each for itself
    mean            a sum of H S probabilities, and a division
    """
    query, key = query.double(), key.double()
    _, heads, tokens, width = query.shape
    scores = query @ key.transpose(-1, -2) * scale
    sizes = (query.abs() @ key.abs().transpose(-1, -2) * abs(scale)).amax(-1, keepdim=True)
    exponent = gamma(width + 6, unit) * sizes + UNIT * (scores.amax(-1, keepdim=True) - scores) + 4 * UNIT
    probability = torch.softmax(scores, -1)
    share = 1.0 if scores_twice else 1 - probability
    error = probability * (share * torch.expm1(2 * exponent.amax(-1, keepdim=True)) + gamma(tokens + 4))
    error = error + torch.finfo(torch.float32).tiny  # below it an exponential may be 0
    return error.mean((1, 2)) + gamma(heads * tokens + 2) * probability.mean((1, 2))


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, unit: float = UNIT) -> Tensor:
    """float64 [H, Q, d], of one computation of softmax(q k^T scale) v from [H, Q, d], [H, S, d] and [H, S, d].

    score           as in attention_received
    e^(s - max)     likewise, of an exponential good to 20 units (what vectorised ones on a CPU promise)
    p_ij            and a sum of S of them, rescaled as the largest score grows; rounded, or cut off, to 16 bits where
                    the values have no more
    output          a sum of S products, and rounded, or cut off, to the dtype
    """
    dtype = query.dtype
    step = torch.finfo(dtype).eps
    small = unit if dtype != torch.float64 else step / 2
    query, key, value = query.double(), key.double(), value.double()
    tokens, width = key.shape[1:]
    scores = query @ key.transpose(-1, -2) * scale
    sizes = (query.abs() @ key.abs().transpose(-1, -2) * abs(scale)).amax(-1, keepdim=True)
    exponent = gamma(width + 6, small) * sizes + small * (scores.amax(-1, keepdim=True) - scores) + 20 * small
    share = torch.softmax(scores, -1)
    wrong = share * (torch.expm1(2 * exponent.amax(-1, keepdim=True)) + gamma(2 * tokens + 4, small) + step)
    # Below the smallest normal number a rounding is a fixed step.
    wrong = wrong + torch.finfo(dtype).smallest_normal * step + torch.finfo(torch.float32).tiny
    attended = share @ value.abs()
    error = wrong @ value.abs() + gamma(2 * tokens + 2, small) * attended
    return error + step * (attended + error) + torch.finfo(dtype).smallest_normal * step


def return_places(hidden: Tensor, packed: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """float64 [N, S, D], of one computation: a difference and a sum in float32, rounded, or cut off, to the dtype."""
    info = torch.finfo(hidden.dtype)
    wide, after = hidden.double(), packed[0].double()[rows]
    before = wide.flatten(0, 1)[index[rows]]
    error = gamma(2, UNIT if hidden.dtype != torch.float64 else info.eps) * (wide.abs() + after.abs() + before.abs())
    return error + info.eps * ((wide + (after - before)).abs() + error) + info.smallest_normal * info.eps


def frame_similarity(hidden: Tensor) -> float:
    """Of one native computation from [T, S, D], for every pair of frames.

    The lengths of both tokens are float32 sums of D squares, good to half of gamma(D + 4), scaling a coordinate
    rounds twice, and one of fixed point is off by half a step: of a token of length 2**bits, by sqrt(D) / 2 steps.
    Products and sums are exact, and the result is rounded once.
    """
    _, tokens, channels = hidden.shape
    fixed_point = channels**0.5 / 2 * 2.0 ** -_fixed_point_bits(tokens)
    return 2 * (gamma(channels + 4) / 2 + gamma(2) + fixed_point) + UNIT


def triton_frame_similarity(hidden: Tensor, tokens_of_a_sum: int = 1) -> float:
    """Of one computation by the Triton provider, which adds ``tokens_of_a_sum`` cosines in float32.

    The product of two tokens is a sum of D products, relative to their lengths, which are roots of such sums; the rest
    is float64 but for a rounding of each cosine, of each sum, and of the result.
    """
    unit = UNIT if hidden.dtype == torch.float32 else unit_of_products(hidden.dtype)  # float32: no tensor cores
    return 2 * gamma(hidden.shape[2] + 1, unit) + gamma(tokens_of_a_sum + 2)


def merge_frames(x: Tensor, source: Tensor, weight: Tensor, n: int) -> Tensor:
    """float64 [n, ...], of one computation: two products and their sum in float32, rounded to the dtype of ``x``."""
    source, weight, wide = source[:n], weight[:n].double(), x.double()
    weights = weight.reshape(n, 2, *[1] * (x.dim() - 1))
    sizes = (wide[source[:, 0]] * weights[:, 0]).abs() + (wide[source[:, 1]] * weights[:, 1]).abs()
    if x.dtype == torch.float64:
        return 2 * torch.finfo(torch.float64).eps * sizes
    # Below the smallest normal number a rounding is half of a fixed step.
    info = torch.finfo(x.dtype)
    return gamma(3) * sizes + info.eps / 2 * (1 + gamma(3)) * sizes + info.smallest_normal * info.eps


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """Every difference is at most ``bound``; NaN where NaN is expected, and nowhere else."""
    actual, expected = torch.as_tensor(actual).double().cpu(), torch.as_tensor(expected).double().cpu()
    assert actual.shape == expected.shape and torch.equal(actual.isnan(), expected.isnan())
    equal = (actual == expected) | actual.isnan()  # infinities too
    excess = torch.where(equal, 0.0, (actual - expected).abs() / torch.as_tensor(bound).double().cpu())
    worst = excess.amax().item() if excess.numel() else 0.0
    assert worst <= 1, f"{worst:.3g} times what rounding can do"
