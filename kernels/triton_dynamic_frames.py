"""dynamic_frames on a GPU: one warp cuts every video of the batch into segments, and nothing waits for the host.

::

    similarity [5, band]   ->   segments (0, 2), (3, 3), (4, 4)   ->   dynamic [True, False, True, True, True]

The segmentation is that of triton_plan_merge.py; its decisions follow one after another, so they stay scalars.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from earlytom_compile.kernels.plan_merge import check, check_batch, segment_distance
from earlytom_compile.kernels.triton_plan_merge import end_of_segment, frames_of, segmentation_arguments

_BLOCK = 128


def run(similarity: Tensor, counts: Tensor, *, variant: str, tau_seg: float, alpha: float, max_window: int) -> Tensor:
    """As ``dynamic_frames``: float32 [N, band], int64 [V] -> bool [N]; all False where values mean nothing."""
    check(similarity, counts, variant, tau_seg, alpha, max_window, "dynamic_frames")
    segmentation = segmentation_arguments(similarity, variant, tau_seg, alpha, max_window)
    total, band = similarity.shape
    farthest = segment_distance(variant, max_window)
    check_batch(similarity, counts, farthest, "dynamic_frames")
    dynamic = similarity.new_empty((total,), dtype=torch.bool)
    _flag_ends[(1,)](
        similarity.contiguous(), counts.contiguous(), dynamic,
        total, counts.shape[0], band, int(min(farthest, total)), *segmentation,
        PAPER=variant == "paper", BLOCK=_BLOCK, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return dynamic


@triton.jit(do_not_specialize=["total", "videos", "band", "farthest", "longest"])
def _flag_ends(
    similarity, counts, dynamic,
    total, videos, band, farthest, newest, older, tau_seg, longest,
    PAPER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _clear(dynamic, total, BLOCK)
    tl.debug_barrier()
    first = 0
    video = 0
    fine = True
    while fine & (video < videos):
        frames, fine = frames_of(counts, video, first, total, band, farthest)
        of_video = similarity + tl.cast(first, tl.int64) * band
        head = 0
        while fine & (head < frames):
            end, fine = end_of_segment(of_video, band, head, frames, newest, older, tau_seg, longest, PAPER)
            tl.store(dynamic + first + head, 1)
            tl.store(dynamic + first + end - 1, 1)
            head = end
        first += frames
        video += 1
    if not (fine & (first == total)):
        tl.debug_barrier()
        _clear(dynamic, total, BLOCK)


@triton.jit
def _clear(flags, total, BLOCK: tl.constexpr):
    start = 0
    while start < total:
        place = start + tl.arange(0, BLOCK)
        tl.store(flags + place, tl.zeros([BLOCK], tl.int1), mask=place < total)
        start += BLOCK
