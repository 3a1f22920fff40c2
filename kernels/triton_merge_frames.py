"""merge_frames on a GPU: gather and blend in one pass, and the plan stays where it is.

::

    x [32, 729, 1152], plan, n = 20   ->   a program for each 4096 elements of an output row: one source is copied,
                                           or two are read, blended in float32 and written

The native body reads the plan on the host to check it. Here a row that no plan can mean is NaN, and no element
outside ``x`` is touched whatever the plan says.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from .merge_frames import check_shapes

_BLOCK = 4096  # with 128 threads four loads of 16 bytes each from 2-byte rows


def run(x: Tensor, source: Tensor, weight: Tensor, n: int) -> Tensor:
    """As ``merge_frames``, but a plan that it refuses for its values gives NaN. Never waits for the device.

    NaN are the rows whose sources lie outside ``x`` or whose weights are not finite or both 0, and all rows if the
    plan has more than ``n``.
    """
    check_shapes(x, source, weight, n)
    frames, rest = x.shape[0], math.prod(x.shape[1:])
    out = x.new_empty((n, *x.shape[1:]))
    if out.numel():
        flat = x.reshape(frames, rest)
        flat = flat if flat.stride(1) == 1 or rest == 1 else flat.contiguous()
        block = min(_BLOCK, triton.next_power_of_2(rest))
        _blend[(n * triton.cdiv(rest, block),)](
            flat, source.contiguous(), weight.contiguous(), out, flat.stride(0), frames, rest, n, BLOCK=block,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


@triton.jit
def _pair(row, source, weight):
    """Sources and weights of one row of the plan."""
    at = 2 * row
    return tl.load(source + at), tl.load(source + at + 1), tl.load(weight + at), tl.load(weight + at + 1)


@triton.jit
def _is_source(frame, weight, frames):
    return (frame >= 0) & (frame < frames) & (tl.abs(weight) < float("inf"))


@triton.jit(do_not_specialize=["frames", "n"])
def _blend(x, source, weight, out, stride, frames, rest, n, BLOCK: tl.constexpr):
    """One block of one output row."""
    blocks = tl.cdiv(rest, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    first, second, first_weight, second_weight = _pair(row, source, weight)
    _, _, after, after_too = _pair(tl.minimum(n, frames - 1), source, weight)
    complete = (n == frames) | ((after == 0.0) & (after_too == 0.0))
    good = _is_source(first, first_weight, frames) & _is_source(second, second_weight, frames) & complete
    good = good & ((first_weight != 0.0) | (second_weight != 0.0))
    copy = (first_weight == 1.0) & (second_weight == 0.0)

    # What must not be read, or need not, is masked: a copy reads half of what a blend does.
    one = tl.load(x + first * stride + column, mask=column < tl.where(good, rest, 0), other=0.0)
    two_rest = tl.where(copy, 0, tl.where(good, rest, 0))
    two = tl.load(x + second * stride + column, mask=column < two_rest, other=0.0)
    blend = one.to(tl.float32) * first_weight + two.to(tl.float32) * second_weight
    blend = tl.where(good, blend, float("nan")).to(one.dtype)
    tl.store(out + row * rest + column, tl.where(good & copy, one, blend), mask=column < rest)
