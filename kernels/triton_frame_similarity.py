"""frame_similarity on a GPU: hidden states are read once, token position by token position.

::

    hidden [32, 729, 1152]        one program, two positions    ->   x [32, 1152], one matrix product x @ x.T each
    products [32, 32]             times inverse lengths         ->   cosines, summed in registers
    sums [365, 32, 31]            a second, tiny launch         ->   mean over positions [32, 31]

Frames further apart than one tile meet in a program that holds both tiles. The length of a token comes out of the
same matrix product, from its product with itself summed in the same order: cosines of equal tokens are exactly 1.
Tile sizes and the positions of a program decide the order of sums; they depend on the band and the number of
positions only, so that a video's bits do not depend on the batch around it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from earlytom_compile.kernels.frame_similarity import NORM_FLOOR, check_shape

_MOST_GROUPS = 512  # of positions; as many partial sums are added by one program of the second launch
_TILE_ELEMENTS = 4096
_SQUARE_FLOOR = tl.constexpr(NORM_FLOOR**2)
_MEAN_BLOCK = 8  # outputs of one program: the 32 bytes that memory gives at least


def run(hidden: Tensor, band: int) -> Tensor:
    """As ``frame_similarity``: [T, S, D] -> float32 [T, band]; accurate to about 1e-6. Never waits for the device."""
    check_shape(hidden, band)
    hidden = hidden if hidden.stride(2) == 1 else hidden.contiguous()
    frames, tokens, channels = hidden.shape
    reach = min(band, frames - 1)
    if reach == 0:
        return hidden.new_zeros((frames, band), dtype=torch.float32)
    out = hidden.new_empty((frames, band), dtype=torch.float32)

    options = launch_options(hidden.dtype, frames, band)
    tiles = triton.cdiv(frames, options["FRAMES"])
    spans = triton.cdiv(band, options["FRAMES"])
    each = triton.cdiv(tokens, _MOST_GROUPS) * spans
    groups = triton.cdiv(tokens, each)
    sums = hidden.new_empty((groups, frames, reach), dtype=torch.float32)
    # Tiles before groups: programs that read the same frames run together and find them in the cache.
    _sum_cosines[(tiles * max(1, min(spans, tiles - 1)), groups)](
        hidden, sums, *hidden.stride()[:2], frames, tokens, channels, reach, each, **options
    )
    programs = (triton.cdiv(frames * band, _MEAN_BLOCK),)
    _mean[programs](
        sums, out, frames, band, reach, groups, tokens, GROUPS=_MOST_GROUPS, BLOCK=_MEAN_BLOCK, enable_fp_fusion=False
    )
    return out


def launch_options(dtype: torch.dtype, frames: int, band: int) -> dict[str, Any]:
    """Compile-time arguments of the first kernel: a program takes a tile of FRAMES, CHANNELS at a time, and if
    there are SEVERAL tiles a second one before it."""
    size = 32 if band < 32 else 64
    several = frames > size
    # float32 goes without tensor cores: a thread holds all channels of a block and adds them up one by one, which is
    # why their number may differ.
    few = 16 if several else 32
    channels = few if dtype == torch.float32 else _TILE_ELEMENTS // size
    return {
        "FRAMES": size, "CHANNELS": channels, "SEVERAL": several,
        "UPCAST": dtype == torch.bfloat16 and triton.knobs.runtime.interpret,  # whose bfloat16 arithmetic is wrong
        "num_warps": 8 if size == 64 else 4, "num_stages": 4, "enable_fp_fusion": True,
    }  # fmt: skip


@triton.jit
def _load(frame, present, start, channels, CHANNELS: tl.constexpr, UPCAST: tl.constexpr):
    """Channels from ``start`` on of a token in some frames, zero where there are none."""
    channel = start + tl.arange(0, CHANNELS)
    mask = present[:, None] & (channel < channels)[None, :]
    tile = tl.load(frame[:, None] + channel[None, :], mask=mask, other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def _inverse_length(square, FRAMES: tl.constexpr):
    """float64 [FRAMES], 1 / the length of each token, out of their products with each other: 0 for a token of zeros,
    NaN for one that is not finite, which one product with it would not always tell."""
    line = tl.arange(0, FRAMES)
    square = tl.sum(tl.where(line[:, None] == line[None, :], square, 0.0), 1).to(tl.float64)
    inverse = tl.where(square < float("inf"), 1.0 / tl.sqrt(tl.maximum(square, _SQUARE_FLOOR)), float("nan"))
    return tl.where(square < _SQUARE_FLOOR, 0.0, inverse)


@triton.jit
def _cosine(product, row, column):
    """[FRAMES, FRAMES] from products and inverse lengths; float64 until it is rounded, so that equal tokens give 1."""
    return (product.to(tl.float64) * (row[:, None] * column[None, :])).to(tl.float32)


@triton.jit
def _store(sums, total, row, column, frames, reach):
    """Put pairs of frames into [frames, reach]; int64 rows because they are multiplied by strides."""
    back = row[:, None] - 1 - column[None, :]
    mask = (row < frames)[:, None] & (column >= 0)[None, :] & (back >= 0) & (back < reach)
    tl.store(sums + row[:, None] * reach + back, total, mask=mask)


@triton.jit(do_not_specialize=["frames", "reach"])
def _sum_cosines(hidden, sums, frame_stride, token_stride, frames, tokens, channels, reach, each,
                 FRAMES: tl.constexpr, CHANNELS: tl.constexpr, SEVERAL: tl.constexpr,
                 UPCAST: tl.constexpr):  # fmt: skip
    """Cosines of the pairs in one tile of frames, and between it and a tile before it, summed over ``each`` tokens."""
    tiles = tl.cdiv(frames, FRAMES)
    tile = tl.program_id(0) % tiles
    before = tl.program_id(0) // tiles + 1
    group = tl.program_id(1).to(tl.int64)
    row = (tile * FRAMES + tl.arange(0, FRAMES)).to(tl.int64)
    column = row - before * FRAMES
    row_start, column_start = hidden + row * frame_stride, hidden + column * frame_stride

    inside = tl.zeros([FRAMES, FRAMES], tl.float32)
    across = tl.zeros([FRAMES, FRAMES], tl.float32)
    first = group * each
    last = tl.minimum(first + each, tokens)
    if SEVERAL:  # pairs inside a tile are the work of the program that looks one tile back
        last = tl.where((before == 1) | (tile >= before), last, first)
    for token in range(first, last):
        own = tl.zeros([FRAMES, FRAMES], tl.float32)
        other = tl.zeros([FRAMES, FRAMES], tl.float32)
        product = tl.zeros([FRAMES, FRAMES], tl.float32)
        for start in range(0, channels, CHANNELS):
            x = _load(row_start + token * token_stride, row < frames, start, channels, CHANNELS, UPCAST)
            own = tl.dot(x, tl.trans(x), own, input_precision="ieee")
            if SEVERAL:
                y = _load(column_start + token * token_stride, column >= 0, start, channels, CHANNELS, UPCAST)
                product = tl.dot(x, tl.trans(y), product, input_precision="ieee")
                other = tl.dot(y, tl.trans(y), other, input_precision="ieee")
        inverse = _inverse_length(own, FRAMES)
        inside += _cosine(own, inverse, inverse)
        if SEVERAL:
            across += _cosine(product, inverse, _inverse_length(other, FRAMES))
    sums += group * frames * reach
    if before == 1:
        _store(sums, inside, row, row, frames, reach)
    if SEVERAL:
        _store(sums, across, row, column, frames, reach)


@triton.jit(do_not_specialize=["frames", "reach", "groups"])
def _mean(sums, out, frames, band, reach, groups, tokens, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Add up [groups, frames, reach] over the groups, always in the same order -> [frames, band]."""
    output = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    frame, back = output // band, output % band
    group = tl.arange(0, GROUPS).to(tl.int64)
    pair = ((back < frame) & (frame < frames))[None, :]
    pointers = sums + (group[:, None] * frames + frame[None, :]) * reach + back[None, :]
    parts = tl.load(pointers, mask=(group < groups)[:, None] & pair, other=0.0)
    mean = tl.sum(parts.to(tl.float64), 0) / tokens
    mean = tl.where(mean > 1.0, 1.0, tl.where(mean < -1.0, -1.0, mean))  # NaN stays
    tl.store(out + output, mean.to(tl.float32), mask=frame < frames)
