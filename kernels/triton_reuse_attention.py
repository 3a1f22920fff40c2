"""reuse_attention on a GPU: one launch, which reads keys and values where they lie, through the rows of a frame.

::

    program (i, frame and head)   queries offsets[frame] + 128 i ... , none past the frame's last: most programs of a
                                  frame that computed little end at once
                                  keys and values of 64 places at a time, rows[frame, ...], never gathered in memory

Softmax is folded in as the keys pass by: largest score, sum and weighted values so far, all float32. A head dimension
that is no power of two goes in two parts, as in attention_received (72 = 64 + 8, the 8 padded to 16). Each query has
the same tiles whatever the frames around it, so its bits depend on its frame only, and on its place in it.

Products are 4 * T * S * H * d operations. Read and written are at least 4 * T * H * d elements; keys and values of a
frame are read by each of its programs of a head, from the cache.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from earlytom_compile.kernels.reuse_attention import check_shapes

_LEAST_DOT = 16  # elements tl.dot sums over
_LOAD_BYTES = 16  # of the widest load
_WIDE_BYTES = 160  # of a head, above which tiles are smaller: they must fit into shared memory


def run(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """As ``reuse_attention``: [1, H, T, d] three times -> [1, H, T, d]. Never waits for the device."""
    check_shapes(query, key, value, rows, offsets)
    if scale < 0.0:  # the kernel takes the largest product for the largest score
        query, scale = -query, -scale
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    _, heads, total, width = query.shape
    frames, places = rows.shape
    out = query.new_empty((1, total, heads, width))
    unit = _unit(query, key, value)
    options = launch_options(query.dtype, width, unit)
    strides = [stride // unit for x in (query, key, value) for stride in x.stride()[1:3]]
    _attend[(triton.cdiv(places, options["FIXED"]), frames * heads)](
        query, key, value, rows.contiguous(), offsets.contiguous(), out, *strides, heads, total, places,
        scale * math.log2(math.e), **options,
    )  # fmt: skip
    return out.transpose(1, 2)


def launch_options(dtype: torch.dtype, width: int, unit: int) -> dict[str, int]:
    """Compile-time arguments for heads of ``width`` channels, which MAIN + REST cover.

    A program holds FIXED queries and goes through the keys, STREAMED at a time. Strides come in multiples of
    ``unit`` elements.
    """
    main = max(_LEAST_DOT, 1 << (width.bit_length() - 1))
    rest = max(_LEAST_DOT, triton.next_power_of_2(width - main)) if width > main else 0
    # What does not spill: products of float32 take three of their parts each, which all lie in registers.
    if dtype == torch.float32:
        fixed, streamed, stages = 64, 16, 2
    else:
        fixed, streamed, stages = (64, 32, 3) if (main + rest) * dtype.itemsize > _WIDE_BYTES else (128, 64, 3)
    upcast = dtype == torch.bfloat16 and triton.knobs.runtime.interpret  # its bfloat16 arithmetic is wrong
    return {
        "WIDTH": width, "MAIN": main, "REST": rest, "UNIT": unit, "UPCAST": upcast, "FIXED": fixed,
        "STREAMED": streamed, "num_warps": 4, "num_stages": stages, "enable_fp_fusion": True,
    }  # fmt: skip


def _unit(*tensors: Tensor) -> int:
    """Elements of one load, at most 16 bytes, that every row of the tensors starts at a multiple of."""
    strides = [stride for x in tensors for stride in x.stride()[1:3]]
    return math.gcd(_LOAD_BYTES // tensors[0].element_size(), *strides)


@triton.jit
def _tile(pointer, rows, stride, FIRST: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
          UPCAST: tl.constexpr):  # fmt: skip
    """Channels [FIRST, FIRST + COLUMNS) of some rows, zero from WIDTH on."""
    column = FIRST + tl.arange(0, COLUMNS)
    pointers = pointer + (rows * stride * UNIT)[:, None] + column[None, :]
    if FIRST + COLUMNS > WIDTH:
        tile = tl.load(pointers, mask=(column < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def _fold(query, query_rest, key, value, rows, start, key_row, value_row, total, places, scale, largest, norm, sums,
          sums_rest, MASKED: tl.constexpr, WIDTH: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
          UNIT: tl.constexpr, UPCAST: tl.constexpr, STREAMED: tl.constexpr):  # fmt: skip
    """Take the places from ``start`` on into the largest score, the sum of exponentials and the weighted values."""
    place = start + tl.arange(0, STREAMED)
    last = tl.minimum(place, places - 1) if MASKED else place
    row = tl.minimum(tl.maximum(tl.load(rows + last), 0), total - 1)
    keys = _tile(key, row, key_row, 0, MAIN, WIDTH, UNIT, UPCAST)
    products = tl.dot(query, tl.trans(keys), input_precision="tf32x3")
    if REST:
        keys_rest = _tile(key, row, key_row, MAIN, REST, WIDTH, UNIT, UPCAST)
        products = tl.dot(query_rest, tl.trans(keys_rest), products, input_precision="tf32x3")
    now = tl.maximum(largest, tl.max(products, 1) * scale)
    weights = tl.exp2(products * scale - now[:, None])
    if MASKED:  # the last place once more and more, which left the largest score as it was
        weights = tl.where((place < places)[None, :], weights, 0.0)
    shrink = tl.exp2(largest - now)
    norm = norm * shrink + tl.sum(weights, 1)
    values = _tile(value, row, value_row, 0, MAIN, WIDTH, UNIT, UPCAST)
    weights = weights.to(values.dtype)
    sums = tl.dot(weights, values, sums * shrink[:, None], input_precision="tf32x3")
    if REST:
        values_rest = _tile(value, row, value_row, MAIN, REST, WIDTH, UNIT, UPCAST)
        sums_rest = tl.dot(weights, values_rest, sums_rest * shrink[:, None], input_precision="tf32x3")
    return now, norm, sums, sums_rest


@triton.jit
def _store(out, sums, norm, rows, present, heads, FIRST: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    column = FIRST + tl.arange(0, COLUMNS)
    pointers = out + (rows * heads * WIDTH)[:, None] + column[None, :]
    attended = (sums / norm[:, None]).to(out.dtype.element_ty)
    tl.store(pointers, attended, mask=present[:, None] & (column < WIDTH)[None, :])


@triton.jit(do_not_specialize=["total"])
def _attend(query, key, value, rows, offsets, out, query_head, query_row, key_head, key_row, value_head, value_row,
            heads, total, places, scale, WIDTH: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
            UNIT: tl.constexpr, UPCAST: tl.constexpr, FIXED: tl.constexpr, STREAMED: tl.constexpr):  # fmt: skip
    """Up to FIXED queries of one frame and head."""
    frame, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    end = tl.minimum(tl.load(offsets + frame + 1), total)
    first = tl.maximum(tl.load(offsets + frame), 0) + tl.program_id(0) * FIXED
    if first < end:
        query += head * query_head * UNIT
        key += head * key_head * UNIT
        value += head * value_head * UNIT
        rows += frame * places
        own = first + tl.arange(0, FIXED)
        asking = tl.minimum(own, end - 1)
        held = _tile(query, asking, query_row, 0, MAIN, WIDTH, UNIT, UPCAST)
        held_rest = _tile(query, asking, query_row, MAIN, REST, WIDTH, UNIT, UPCAST) if REST else held

        # Finite, so that a first tile of scores -inf does not make NaN of the others.
        largest = tl.full([FIXED], -3.0e38, tl.float32)
        norm = tl.zeros([FIXED], tl.float32)
        sums = tl.zeros([FIXED, MAIN], tl.float32)
        sums_rest = tl.zeros([FIXED, REST if REST else 1], tl.float32)
        full = places - places % STREAMED
        for start in range(0, full, STREAMED):
            largest, norm, sums, sums_rest = _fold(
                held, held_rest, key, value, rows, start, key_row, value_row, total, places, scale, largest, norm,
                sums, sums_rest, False, WIDTH, MAIN, REST, UNIT, UPCAST, STREAMED,
            )  # fmt: skip
        if full < places:
            largest, norm, sums, sums_rest = _fold(
                held, held_rest, key, value, rows, full, key_row, value_row, total, places, scale, largest, norm,
                sums, sums_rest, True, WIDTH, MAIN, REST, UNIT, UPCAST, STREAMED,
            )  # fmt: skip
        out += head * WIDTH
        _store(out, sums, norm, own, own < end, heads, 0, MAIN, WIDTH)
        if REST:
            _store(out, sums_rest, norm, own, own < end, heads, MAIN, REST, WIDTH)
