"""take_places on a GPU: one launch, a program for each row, or two of them if it is long.

::

    hidden [N, S, D], index [T]   ->   [1, T, D]    T rows read and T written

An index outside is moved to the nearest place that exists, so that nothing outside the tensors is touched.
"""

import triton
import triton.language as tl
from torch import Tensor

from earlytom_compile.kernels.pack_places import check_take

_ROW_BLOCK = 2048  # elements; with 128 threads two loads of 16 bytes each from 2-byte rows


def run(hidden: Tensor, index: Tensor) -> Tensor:
    """As ``take_places``: [N, S, D], int64 [T] -> [1, T, D]."""
    check_take(hidden, index)
    out = hidden.new_empty((1, index.shape[0], hidden.shape[2]))
    copy_rows(hidden, index, out)
    return out


def copy_rows(x: Tensor, numbers: Tensor, out: Tensor) -> None:
    """``out`` [..., width] becomes the rows ``numbers`` int64 [...] of ``x`` [N, S, width], which count n * S + s."""
    x = rows_in_one_piece(x)
    frames, places, width = x.shape
    block = row_block(width)
    if out.numel():
        _copy_rows[(numbers.numel(), triton.cdiv(width, block))](
            x, numbers.contiguous(), out, *x.stride()[:2], frames * places, places, width, BLOCK=block
        )


def rows_in_one_piece(x: Tensor) -> Tensor:
    """[N, S, width], its last axis dense."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def row_block(width: int) -> int:
    """Elements of a row that one program takes."""
    return min(_ROW_BLOCK, triton.next_power_of_2(width))


@triton.jit(do_not_specialize=["limit"])
def _copy_rows(x, numbers, out, frame_stride, place_stride, limit, places, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    number = tl.minimum(tl.maximum(tl.load(numbers + row), 0), limit - 1)
    start = x + number // places * frame_stride + number % places * place_stride
    tl.store(out + row * width + column, tl.load(start + column, mask=column < width), mask=column < width)
