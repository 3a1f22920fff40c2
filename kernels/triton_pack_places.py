"""pack_places on a GPU: places are counted and numbered in three small kernels, and the host waits for none.

::

    source [V, F, S]   ->   rank          active places of its frame before each one; how many   a program a frame
                            offsets       a running sum over the frames                          one program
                            rows, index   offsets[source] + rank                                 256 places a program

Numbers that no plan has are moved to the nearest row that exists, so that nothing outside the tensors is touched.
"""

import triton
import triton.language as tl
from torch import Tensor

from earlytom_compile.kernels.pack_places import check_pack

_BLOCK = 256  # places, or frames


def run(source: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """As ``pack_places``: int64 [V, F, S] -> int64 [total], [N, S], [N + 1]."""
    check_pack(source, total)
    source = source.contiguous()
    videos, frames, places = source.shape
    every = videos * frames
    rank = source.new_empty((every, places))
    counts = source.new_empty((every,))
    offsets = source.new_empty((every + 1,))
    rows = source.new_empty((every, places))
    index = source.new_zeros((total,))
    _rank[(every,)](source, rank, counts, frames, places, BLOCK=_BLOCK)
    _sum_up[(1,)](counts, offsets, every, total, BLOCK=_BLOCK)
    _number[(triton.cdiv(places, _BLOCK), every)](
        source, rank, offsets, index, rows, frames, places, total, BLOCK=_BLOCK
    )
    return index, rows, offsets


@triton.jit(do_not_specialize=["frames"])
def _rank(source, rank_out, counts_out, frames, places, BLOCK: tl.constexpr):
    """Of each place of one frame, the number of active places before it; and of all."""
    frame = tl.program_id(0).to(tl.int64)
    total = tl.zeros([], tl.int64)
    for start in range(0, places, BLOCK):
        place = start + tl.arange(0, BLOCK)
        at = frame * places + place
        active = (tl.load(source + at, mask=place < places, other=-1) == frame % frames).to(tl.int64)
        tl.store(rank_out + at, total + tl.cumsum(active, 0) - active, mask=place < places)
        total += tl.sum(active)
    tl.store(counts_out + frame, total)


@triton.jit(do_not_specialize=["frames", "total"])
def _sum_up(counts, offsets_out, frames, total, BLOCK: tl.constexpr):
    """[N] -> [N + 1], at most ``total``."""
    tl.store(offsets_out, tl.zeros([], tl.int64))
    before = tl.zeros([], tl.int64)
    for start in range(0, frames, BLOCK):
        frame = start + tl.arange(0, BLOCK)
        count = tl.load(counts + frame, mask=frame < frames, other=0)
        tl.store(offsets_out + 1 + frame, tl.minimum(before + tl.cumsum(count, 0), total), mask=frame < frames)
        before += tl.sum(count)


@triton.jit(do_not_specialize=["frames", "total"])
def _number(source, rank, offsets, index_out, rows_out, frames, places, total, BLOCK: tl.constexpr):
    """The packed row that each place reads, and of an active one where the row comes from."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    frame = tl.program_id(1).to(tl.int64)
    inside = place < places
    first = frame - frame % frames  # of its video
    at = frame * places + place
    computed = tl.load(source + at, mask=inside, other=0)
    computed = tl.minimum(tl.maximum(computed, 0), frames - 1) + first
    row = tl.load(offsets + computed) + tl.load(rank + computed * places + place, mask=inside, other=0)
    tl.store(index_out + row, at, mask=inside & (computed == frame) & (row < total))
    tl.store(rows_out + at, tl.minimum(row, total - 1), mask=inside)
