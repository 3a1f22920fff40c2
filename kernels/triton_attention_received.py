"""attention_received on a GPU: queries times keys twice, in tiles; nothing larger than [T, H, S] is kept.

::

    softmax(q @ k.T * scale)  [T, H, S, S]   ->   each query's largest score, 1 / its sum     2 * [T, H, S]
      .mean(over heads and queries)               sum over queries of exp(score - largest) / sum  [T, H, S]
                                                  mean over heads                                 [T, S]

As many products as one forward of attention, which has probabilities times values for the second. The largest
score and the sum are kept apart: one float32 for both, the log-sum-exp, loses the sum beside a large score. A head
dimension that is no power of two is summed in two parts (72 = 64 + 8, the 8 padded to 16) and not padded to the
next one (128). Tile sizes decide the order of sums, so they depend on dtype and head dimension only.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from earlytom_compile.kernels.attention_received import check_shapes

_LEAST_DOT = 16  # elements tl.dot sums over
_LOAD_BYTES = 16  # of the widest load
_MEAN_BLOCK = 256


def run(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """As ``attention_received``: [T, H, S, d] twice -> float32 [T, S]. Never waits for the device."""
    check_shapes(query, key)
    if scale < 0.0:  # the kernels take the largest product for the largest score
        query, scale = -query, -scale
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    frames, heads, tokens, width = query.shape
    unit = _unit(query, key)
    options = launch_options(query.dtype, width, unit)
    blocks = triton.cdiv(tokens, options["FIXED"])
    largest = query.new_empty((frames, heads, blocks * options["FIXED"]), dtype=torch.float32)
    inverse = torch.empty_like(largest)
    received = query.new_empty((frames, heads, tokens), dtype=torch.float32)
    out = query.new_empty((frames, tokens), dtype=torch.float32)

    strides = [stride // unit for x in (query, key) for stride in x.stride()[:3]]
    numbers = (*strides, heads, tokens, scale * math.log2(math.e))
    programs = (frames * heads * blocks,)
    _row_statistics[programs](query, key, largest, inverse, *numbers, **options)
    _column_sums[programs](query, key, largest, inverse, received, *numbers, **options)
    slices = (frames, triton.cdiv(tokens, _MEAN_BLOCK))
    _mean_over_heads[slices](received, out, heads, tokens, BLOCK=_MEAN_BLOCK, enable_fp_fusion=False)
    return out


def launch_options(dtype: torch.dtype, width: int, unit: int) -> dict[str, int]:
    """Compile-time arguments of the first two kernels for heads of ``width`` channels.

    A program holds FIXED rows of one operand and goes through the other, STREAMED rows at a time; MAIN + REST
    channels cover the ``width``. Strides come in multiples of ``unit`` elements.
    """
    main = max(_LEAST_DOT, 1 << (width.bit_length() - 1))
    rest = max(_LEAST_DOT, triton.next_power_of_2(width - main)) if width > main else 0
    # What fits four programs of 16-bit tiles on a multiprocessor, or two of 32-bit tiles, without spilling.
    fixed, stages = (64, 2) if dtype == torch.float32 else (128, 3)
    upcast = dtype == torch.bfloat16 and triton.knobs.runtime.interpret  # its bfloat16 arithmetic is wrong
    return {
        "WIDTH": width, "MAIN": main, "REST": rest, "UNIT": unit, "UPCAST": upcast, "FIXED": fixed,
        "STREAMED": 64, "num_warps": 4, "num_stages": stages, "enable_fp_fusion": True,
    }  # fmt: skip


def _unit(query: Tensor, key: Tensor) -> int:
    """Elements of one load, at most 16 bytes, that every row starts at a multiple of.

    Triton would learn only from a stride that is a multiple of 16 that it may load more than one element at a
    time, and heads of 72 channels lie 72 elements apart.
    """
    return math.gcd(_LOAD_BYTES // query.element_size(), *query.stride()[:3], *key.stride()[:3])


@triton.jit
def _place(heads, tokens, FIXED: tl.constexpr):
    """Frame, head and first fixed row of this program; int64 because they are multiplied by strides."""
    blocks = tl.cdiv(tokens, FIXED)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    return pair // heads, pair % heads, (tl.program_id(0) % blocks) * FIXED


@triton.jit
def _tile(pointer, rows, stride, FIRST: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
          UPCAST: tl.constexpr):  # fmt: skip
    """Channels [FIRST, FIRST + COLUMNS) of some rows, zero from WIDTH on."""
    column = FIRST + tl.arange(0, COLUMNS)
    pointers = pointer + (rows.to(tl.int64) * stride * UNIT)[:, None] + column[None, :]
    if FIRST + COLUMNS > WIDTH:
        tile = tl.load(pointers, mask=(column < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def _products(rows, rows_rest, others, others_rest, REST: tl.constexpr):
    """float32 [rows, other rows] of dot products, 16-bit factors exact and float32 ones to about 22 bits."""
    products = tl.dot(rows, tl.trans(others), input_precision="tf32x3")
    if REST:
        products = tl.dot(rows_rest, tl.trans(others_rest), products, input_precision="tf32x3")
    return products


@triton.jit
def _fold(query, query_rest, key_start, start, stride, tokens, scale, largest, total, MASKED: tl.constexpr,
          WIDTH: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, UNIT: tl.constexpr, UPCAST: tl.constexpr,
          STREAMED: tl.constexpr):  # fmt: skip
    """Take the keys from ``start`` on into each query's largest score and its sum of exponentials."""
    keys = start + tl.arange(0, STREAMED)
    rows = tl.minimum(keys, tokens - 1) if MASKED else keys
    key = _tile(key_start, rows, stride, 0, MAIN, WIDTH, UNIT, UPCAST)
    key_rest = _tile(key_start, rows, stride, MAIN, REST, WIDTH, UNIT, UPCAST) if REST else key
    products = _products(query, query_rest, key, key_rest, REST)
    now = tl.maximum(largest, tl.max(products, 1) * scale)
    exponentials = tl.exp2(products * scale - now[:, None])
    if MASKED:  # the last key once more and more, which left the largest score as it was
        exponentials = tl.where((keys < tokens)[None, :], exponentials, 0.0)
    return now, total * tl.exp2(largest - now) + tl.sum(exponentials, 1)


@triton.jit
def _row_statistics(query, key, largest_out, inverse_out, query_frame, query_head, query_row, key_frame, key_head,
                    key_row, heads, tokens, scale, WIDTH: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
                    UNIT: tl.constexpr, UPCAST: tl.constexpr, FIXED: tl.constexpr, STREAMED: tl.constexpr):  # fmt: skip
    """Softmax statistics of FIXED queries of one head: largest score in base 2, 1 / sum of 2 ** (score - largest)."""
    frame, head, first = _place(heads, tokens, FIXED)
    query += (frame * query_frame + head * query_head) * UNIT
    key += (frame * key_frame + head * key_head) * UNIT
    queries = first + tl.arange(0, FIXED)
    rows = tl.minimum(queries, tokens - 1)
    held = _tile(query, rows, query_row, 0, MAIN, WIDTH, UNIT, UPCAST)
    held_rest = _tile(query, rows, query_row, MAIN, REST, WIDTH, UNIT, UPCAST) if REST else held

    # Finite, so that a first tile of scores -inf does not make NaN of the others.
    largest = tl.full([FIXED], -3.0e38, tl.float32)
    total = tl.zeros([FIXED], tl.float32)
    full = tokens - tokens % STREAMED
    for start in range(0, full, STREAMED):
        largest, total = _fold(held, held_rest, key, start, key_row, tokens, scale, largest, total, False,
                               WIDTH, MAIN, REST, UNIT, UPCAST, STREAMED)  # fmt: skip
    if full < tokens:
        largest, total = _fold(held, held_rest, key, full, key_row, tokens, scale, largest, total, True,
                               WIDTH, MAIN, REST, UNIT, UPCAST, STREAMED)  # fmt: skip
    # Past the end stands the last query once more, with weight 0: the next kernel needs no mask.
    at = (frame * heads + head) * (tl.cdiv(tokens, FIXED) * FIXED) + queries
    tl.store(largest_out + at, largest)
    tl.store(inverse_out + at, tl.where(queries < tokens, 1.0 / total, 0.0))


@triton.jit
def _column_sums(query, key, largest_in, inverse_in, received_out, query_frame, query_head, query_row, key_frame,
                 key_head, key_row, heads, tokens, scale, WIDTH: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
                 UNIT: tl.constexpr, UPCAST: tl.constexpr, FIXED: tl.constexpr, STREAMED: tl.constexpr):  # fmt: skip
    """Attention that FIXED keys of one head receive from all its queries."""
    frame, head, first = _place(heads, tokens, FIXED)
    query += (frame * query_frame + head * query_head) * UNIT
    key += (frame * key_frame + head * key_head) * UNIT
    pair = frame * heads + head
    keys = first + tl.arange(0, FIXED)
    rows = tl.minimum(keys, tokens - 1)
    held = _tile(key, rows, key_row, 0, MAIN, WIDTH, UNIT, UPCAST)
    held_rest = _tile(key, rows, key_row, MAIN, REST, WIDTH, UNIT, UPCAST) if REST else held

    # Keys are rows here, so that a thread adds up what it holds: summing down a column takes all warps.
    received = tl.zeros([FIXED], tl.float32)
    for start in range(0, tokens, STREAMED):
        queries = start + tl.arange(0, STREAMED)
        last = tl.minimum(queries, tokens - 1)
        moving = _tile(query, last, query_row, 0, MAIN, WIDTH, UNIT, UPCAST)
        moving_rest = _tile(query, last, query_row, MAIN, REST, WIDTH, UNIT, UPCAST) if REST else moving
        at = pair * (tl.cdiv(tokens, FIXED) * FIXED) + queries
        largest, inverse = tl.load(largest_in + at), tl.load(inverse_in + at)
        products = _products(held, held_rest, moving, moving_rest, REST)
        received += tl.sum(tl.exp2(products * scale - largest[None, :]) * inverse[None, :], 1)
    tl.store(received_out + pair * tokens + keys, received, mask=keys < tokens)


@triton.jit
def _mean_over_heads(received, out, heads, tokens, BLOCK: tl.constexpr):
    """[T, H, S] sums over queries -> [T, S]. Not torch.sum, whose order depends on the number of frames."""
    frame = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for head in range(heads):
        total += tl.load(received + (frame * heads + head) * tokens + column, mask=column < tokens, other=0.0)
    tl.store(out + frame * tokens + column, total / (heads * tokens), mask=column < tokens)
