"""return_places on a GPU: one launch, a program for each row, or two of them if it is long.

::

    hidden [N, S, D], packed [1, T, D]   ->   of an active place, packed[row]: 1 row read
                                              of another one, hidden + (packed[row] - hidden[index[row]]): 3 rows read

Which makes T + 3 * (N * S - T) rows read and N * S written. Numbers outside are moved to the nearest row that exists,
so that nothing outside the tensors is touched.
"""

import triton
import triton.language as tl
from torch import Tensor

from earlytom_compile.kernels.pack_places import check_return
from earlytom_compile.kernels.triton_take_places import row_block, rows_in_one_piece


def run(hidden: Tensor, packed: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """As ``return_places``: [N, S, D], [1, T, D], int64 [T], int64 [N, S] -> [N, S, D]."""
    check_return(hidden, packed, index, rows)
    hidden, packed = rows_in_one_piece(hidden), rows_in_one_piece(packed)
    out = hidden.new_empty(hidden.shape)
    frames, places, width = hidden.shape
    block = row_block(width)
    _return[(frames * places, triton.cdiv(width, block))](
        hidden, packed, index.contiguous(), rows.contiguous(), out, *hidden.stride()[:2], packed.stride(1),
        frames * places, places, width, packed.shape[1], BLOCK=block, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["limit", "total"])
def _return(hidden, packed, index, rows, out, frame_stride, place_stride, packed_stride, limit, places, width, total,
            BLOCK: tl.constexpr):  # fmt: skip
    """One place: its packed row, or its own state changed as that row was."""
    own = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.minimum(tl.maximum(tl.load(rows + own), 0), total - 1)
    source = tl.minimum(tl.maximum(tl.load(index + row), 0), limit - 1)
    active = source == own
    new = tl.load(packed + row * packed_stride + column, mask=column < width, other=0.0)
    # Of an active place the state before is not read.
    needed = column < tl.where(active, 0, width)
    start = hidden + own // places * frame_stride + own % places * place_stride
    state = tl.load(start + column, mask=needed, other=0.0)
    start = hidden + source // places * frame_stride + source % places * place_stride
    before = tl.load(start + column, mask=needed, other=0.0)
    moved = state.to(tl.float32) + (new.to(tl.float32) - before.to(tl.float32))
    tl.store(out + own * width + column, tl.where(active, new, moved.to(new.dtype)), mask=column < width)
