"""merge_frames on a GPU: gather and blend in one pass, all that rides along included, and the plan stays where it is.

::

    hidden [32, 729, 1152], importance [32, 729], plan, n = 20
        ->   for each output row a program for each 4096 elements of hidden, and one more for importance:
             one source is copied, or two are read, blended in float32 and written

The native body reads the plan on the host to check it. Here a row that no plan can mean is NaN, and no element
outside the tensors is touched whatever the plan says.
"""

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from earlytom_compile.kernels.merge_frames import check_shapes

_BLOCK = 4096  # with 128 threads four loads of 16 bytes each from 2-byte rows


def run(tensors: Sequence[Tensor], source: Tensor, weight: Tensor, n: int) -> list[Tensor]:
    """As ``merge_frames``, but a plan that it refuses for its values gives NaN. Never waits for the device.

    One launch for every two tensors. NaN are the rows whose sources lie outside the frames or whose weights are not
    finite or both 0, and all rows if the plan has more than ``n``.
    """
    check_shapes(tensors, source, weight, n)
    source, weight = source.contiguous(), weight.contiguous()
    merged: list[Tensor] = []
    for start in range(0, len(tensors), 2):
        merged += _launch(tensors[start : start + 2], source, weight, n)
    return merged


def _launch(tensors: Sequence[Tensor], source: Tensor, weight: Tensor, n: int) -> list[Tensor]:
    """Merge one or two tensors; without a second one its place holds the first, with no elements."""
    outputs = [x.new_empty((n, *x.shape[1:])) for x in tensors]
    flat = [_rows(x) for x in tensors]
    lengths = [x.shape[1] for x in flat] + [0] * (2 - len(flat))
    blocks = [min(_BLOCK, triton.next_power_of_2(max(1, length))) for length in lengths]
    programs = n * sum(map(triton.cdiv, lengths, blocks))
    if programs:
        _merge[(programs,)](
            flat[0], flat[-1], outputs[0], outputs[-1], flat[0].stride(0), flat[-1].stride(0), *lengths,
            source, weight, len(source), n, BLOCK=blocks[0], RIDER_BLOCK=blocks[1], enable_fp_fusion=False,
        )  # fmt: skip
    return outputs


def _rows(x: Tensor) -> Tensor:
    """[T, rest], each row one piece of memory."""
    flat = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


@triton.jit
def _pair(row, source, weight):
    """Sources and weights of one row of the plan."""
    at = 2 * row
    return tl.load(source + at), tl.load(source + at + 1), tl.load(weight + at), tl.load(weight + at + 1)


@triton.jit
def _is_source(frame, weight, frames):
    return (frame >= 0) & (frame < frames) & (tl.abs(weight) < float("inf"))


@triton.jit(do_not_specialize=["frames", "n"])
def _merge(
    x, rider, out, rider_out, stride, rider_stride, rest, rider_rest,
    source, weight, frames, n, BLOCK: tl.constexpr, RIDER_BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one output row, of ``x`` or of what rides along."""
    blocks = tl.cdiv(rest, BLOCK)
    programs = blocks + tl.cdiv(rider_rest, RIDER_BLOCK)
    row = (tl.program_id(0) // programs).to(tl.int64)
    block = tl.program_id(0) % programs
    first, second, first_weight, second_weight = _pair(row, source, weight)
    _, _, after, after_too = _pair(tl.minimum(n, frames - 1), source, weight)
    complete = (n == frames) | ((after == 0.0) & (after_too == 0.0))
    good = _is_source(first, first_weight, frames) & _is_source(second, second_weight, frames) & complete
    good = good & ((first_weight != 0.0) | (second_weight != 0.0))
    if block < blocks:
        _blend(x, out, stride, rest, row, block, first, second, first_weight, second_weight, good, BLOCK)
    else:
        _blend(
            rider, rider_out, rider_stride, rider_rest, row, block - blocks,
            first, second, first_weight, second_weight, good, RIDER_BLOCK,
        )  # fmt: skip


@triton.jit
def _blend(
    x, out, stride, rest, row, block, first, second, first_weight, second_weight, good, BLOCK: tl.constexpr
):  # fmt: skip
    column = block * BLOCK + tl.arange(0, BLOCK)
    copy = (first_weight == 1.0) & (second_weight == 0.0)
    # What must not be read, or need not, is masked: a copy reads half of what a blend does.
    one = tl.load(x + first * stride + column, mask=column < tl.where(good, rest, 0), other=0.0)
    two_rest = tl.where(copy, 0, tl.where(good, rest, 0))
    two = tl.load(x + second * stride + column, mask=column < two_rest, other=0.0)
    blend = one.to(tl.float32) * first_weight + two.to(tl.float32) * second_weight
    blend = tl.where(good, blend, float("nan")).to(one.dtype)
    tl.store(out + row * rest + column, tl.where(good & copy, one, blend), mask=column < rest)
