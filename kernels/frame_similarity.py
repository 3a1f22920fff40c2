"""How alike two frames are, for every pair of frames that segmentation and merging can ask about.

A video merges frames only inside a segment, so only pairs at most ``band`` frames apart matter::

    hidden [T, S, D]                     frame_similarity(hidden, band=3)
    frames a b c d          ->           a  0        0        0
                                         b  s(b,a)   0        0
                                         c  s(c,b)   s(c,a)   0
                                         d  s(d,c)   s(d,b)   s(d,a)

Exact ties decide merges (a still scene merges everywhere), and a video must get the same bits alone and in a
batch. Floating-point sums depend on their order, which a matrix product picks by shape. So tokens are scaled
to unit length in *fixed point*: integers whose products and sums float64 holds exactly. Then any order and any
blocking sums the same integers to the same result. The Triton provider keeps both promises by one order for every
pair of frames; its float32 sums differ from these by about 1e-6, so that a near tie may fall the other way.
"""

import torch
from torch import Tensor

from earlytom_compile.kernels.providers import Provider, provide

NORM_FLOOR = 1e-15  # a shorter token counts as zero, cosine 0 with every other: its float32 squares vanish
_CHUNK_ELEMENTS_CPU = 1 << 20  # 8 MB of float64: stays in the cache
_CHUNK_ELEMENTS = 1 << 25
_LEAST_BLOCK_FRAMES = 16  # for a narrow band a few products too many cost less than many small ones


@torch.library.custom_op("earlytom::frame_similarity", mutates_args=())
def frame_similarity(hidden: Tensor, band: int) -> Tensor:
    """Similarity of every frame to each of the ``band`` frames before it.

    s(a, b) = mean over token positions of the cosine of the two tokens there (algorithm.md, stage 1; the s_t
    of Eq. 1). Accurate to about 1e-7 whatever the dtype of ``hidden``.

    Args:
        hidden: [T, S, D], any float dtype and strides; frames of consecutive videos, in time order.
        band: largest distance in frames that will be asked for, at least 1.

    Returns:
        float32 [T, band]; ``out[t, j] = s(t, t-1-j)``, and 0 where ``t-1-j < 0``. Equal frames have the same
        similarity to any third one, and 1 to each other unless they hold zero tokens. Pairs that reach into
        the video before are computed too and mean nothing. A frame with NaN, infinity or a token whose norm
        overflows float32 has NaN similarities, which ``plan_merge`` refuses.

    Raises:
        ValueError: wrong rank or dtype, an empty axis, or ``band < 1``.
    """
    check_shape(hidden, band)
    frames = hidden.shape[0]
    reach = min(band, frames - 1)
    out = hidden.new_zeros((frames, band), dtype=torch.float32)
    if reach == 0:
        return out
    blocks = _frame_blocks(frames, reach)
    products, own = _products(hidden, blocks)
    for product, (start, stop, low) in zip(products, blocks, strict=True):
        frame = torch.arange(start, stop, device=hidden.device)[:, None]
        other = frame - 1 - torch.arange(reach, device=hidden.device)
        column = (other - low).clamp_min_(0)
        # The root of the product, not the product of the roots: sqrt(x * x) == x, so equal frames come to 1.
        cosine = product.gather(1, column) / (own[frame] * own[low + column]).sqrt_()
        out[start:stop, :reach] = cosine.clamp_(-1.0, 1.0).masked_fill_(other < 0, 0.0)
    return out


@frame_similarity.register_fake
def _(hidden: Tensor, band: int) -> Tensor:
    _check(hidden)
    return hidden.new_empty((hidden.shape[0], band), dtype=torch.float32)


def _check(hidden: Tensor) -> None:
    if hidden.dim() != 3 or not hidden.is_floating_point():
        raise ValueError(
            f"earlytom::frame_similarity: hidden must be a float tensor [frames, tokens, channels], "
            f"got {hidden.dtype} with {hidden.dim()} axes"
        )


def check_shape(hidden: Tensor, band: int) -> None:
    """What a provider has to refuse, all of it known without a look at the values."""
    _check(hidden)
    if 0 in hidden.shape or band < 1:
        raise ValueError(
            f"earlytom::frame_similarity: hidden {list(hidden.shape)}, band={band}; no axis may be empty, "
            f"and the band, the largest frame distance that will be asked for, must be at least 1"
        )


def _frame_blocks(frames: int, reach: int) -> list[tuple[int, int, int]]:
    """Row blocks (start, stop, first frame compared with): a band as a few small matrix products."""
    height = max(reach + 1, _LEAST_BLOCK_FRAMES)
    starts = range(0, frames, height)
    return [(start, min(start + height, frames), max(0, start - reach)) for start in starts]


def _products(hidden: Tensor, blocks: list[tuple[int, int, int]]) -> tuple[list[Tensor], Tensor]:
    """Dot products of whole frames of unit tokens, exact: float64 [stop - start, stop - low] a block, and
    float64 [T] for each frame with itself, as if its zero tokens had length 1 like the others.

    The mean cosine is product / tokens; dividing by the frames' own products takes out what rounding to fixed
    point did to the lengths.
    """
    frames, tokens, channels = hidden.shape
    limit = _CHUNK_ELEMENTS_CPU if hidden.device.type == "cpu" else _CHUNK_ELEMENTS
    step = max(1, limit // (frames * channels))
    bits = _fixed_point_bits(tokens)
    products = [hidden.new_zeros((stop - start, stop - low), dtype=torch.float64) for start, stop, low in blocks]
    nonzero = hidden.new_zeros(frames, dtype=torch.int64)
    for first in range(0, tokens, step):
        unit, present = _fixed_point_tokens(hidden[:, first : first + step], bits)
        nonzero += present.sum(1)
        for product, (start, stop, low) in zip(products, blocks, strict=True):
            product.addmm_(unit[start:stop], unit[low:stop].t())
    own = torch.cat([p[:, start - low :].diagonal() for p, (start, _, low) in zip(products, blocks, strict=True)])
    return products, torch.where(nonzero > 0, own * tokens / nonzero, 1.0)


def _fixed_point_bits(tokens: int) -> int:
    """Fraction bits b such that a sum over all tokens, at most about tokens * 4**b, stays below 2**53."""
    return (52 - (tokens - 1).bit_length()) // 2


def _fixed_point_tokens(hidden: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Tokens scaled to length 2**bits and rounded to integers, float64 [T, s * D]; and bool [T, s], False for
    zero tokens. A norm that is not finite gives NaN."""
    wide = hidden.float()
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    present = norm >= NORM_FLOOR
    scale = norm.reciprocal().mul_(2.0**bits).masked_fill_(norm < NORM_FLOOR, 0.0)
    scale.masked_fill_(~norm.isfinite(), float("nan"))
    return (wide * scale).round_().double().flatten(1), present.squeeze(-1)


def _triton_supports(hidden: Tensor, band: int) -> bool:
    return hidden.dtype in (torch.float32, torch.float16, torch.bfloat16) and hidden.dim() == 3


provide(frame_similarity, Provider("triton", ".triton_frame_similarity", supports=_triton_supports))
