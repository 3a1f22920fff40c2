"""Blend frames by a merge plan: hidden states, importance, timestamps, whatever rides along, in one pass.

::

    [hidden [5, S, D], importance [5, S]], plan of plan_merge, n = 4
        ->   of each   x[0], w0*x[1] + w1*x[2], x[3], x[4]
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from earlytom_compile.kernels.providers import Provider, provide


@torch.library.custom_op("earlytom::merge_frames", mutates_args=())
def merge_frames(tensors: Sequence[Tensor], source: Tensor, weight: Tensor, n: int) -> list[Tensor]:
    """Rows of all ``tensors`` merged as ``plan_merge`` says (Eq. 3).

    Args:
        tensors: at least one [T, ...], any float dtypes and strides: hidden states, and what rides along with them.
        source: int64 [T, 2]; weight: float32 [T, 2]; both from ``plan_merge``.
        n: merged frames, ``int(merged_counts.sum())``.

    Returns:
        An [n, ...] for each, of its dtype; blended in float32 (float64 stays float64). A row of weight (1, 0), an
        untouched frame, is an exact copy.

    Raises:
        ValueError: no tensors, shapes that do not match, ``n`` that is not the plan's, empty rows among the others,
            sources outside the frames, or weights that are not finite.
    """
    check_shapes(tensors, source, weight, n)
    frames, device = len(source), source.device
    rows = torch.tensor(_merged_rows(frames, source, weight, n), dtype=torch.int64, device=device)
    return [_merged(x, source, weight, n, rows) for x in tensors]


def _merged(x: Tensor, source: Tensor, weight: Tensor, n: int, rows: Tensor) -> Tensor:
    """``rows`` int64 are those that blend two frames; the others copy one."""
    out = x.index_select(0, source[:n, 0])
    if len(rows):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        first, second = source[rows].unbind(1)
        weights = weight[rows].to(wide).reshape(-1, 2, *[1] * (x.dim() - 1))
        blend = x.index_select(0, first).to(wide) * weights[:, 0]
        blend.addcmul_(x.index_select(0, second).to(wide), weights[:, 1])
        out.index_copy_(0, rows, blend.to(x.dtype))
    return out


@merge_frames.register_fake
def _(tensors: Sequence[Tensor], source: Tensor, weight: Tensor, n: int) -> list[Tensor]:
    _check(tensors, source, weight)
    return [x.new_empty((n, *x.shape[1:])) for x in tensors]


def _check(tensors: Sequence[Tensor], source: Tensor, weight: Tensor) -> None:
    if not tensors:
        raise ValueError("earlytom::merge_frames: no tensors; pass the hidden states, [frames, ...], in a list")
    for x in tensors:
        if x.dim() < 1 or not x.is_floating_point():
            raise ValueError(
                f"earlytom::merge_frames: every tensor must be float [frames, ...], got {x.dtype} with {x.dim()} axes"
            )
    if source.dtype != torch.int64 or weight.dtype != torch.float32 or source.dim() != 2 or weight.dim() != 2:
        raise ValueError(
            f"earlytom::merge_frames: source must be int64 [frames, 2] and weight float32 [frames, 2] as "
            f"plan_merge returns them, got {source.dtype} with {source.dim()} axes and {weight.dtype} with "
            f"{weight.dim()}"
        )


def check_shapes(tensors: Sequence[Tensor], source: Tensor, weight: Tensor, n: int) -> None:
    """What a provider has to refuse, all of it known without a look at the values."""
    _check(tensors, source, weight)
    for x in tensors:
        frames = x.shape[0]
        if source.shape != (frames, 2) or weight.shape != (frames, 2):
            raise ValueError(
                f"earlytom::merge_frames: a plan over {source.shape[0]} frames cannot merge a tensor with {frames} "
                f"frames; pass the source and weight planned for these frames"
            )
    frames = source.shape[0]
    if not 0 <= n <= frames:
        raise ValueError(
            f"earlytom::merge_frames: n={n} of {frames} frames; pass n=int(merged_counts.sum()) of the same plan. "
            f"It is negative where plan_merge could not plan: hidden states with NaN, infinity or values whose "
            f"norm overflows float32, counts that do not add up, or a band that is too narrow"
        )


def _merged_rows(frames: int, source: Tensor, weight: Tensor, n: int) -> list[int]:
    """Rows of the plan that blend two frames, after checking the whole plan; one small copy to the host."""
    plan = torch.cat([source.double(), weight.double()], dim=1).tolist()
    used = [any(weights) for _, _, *weights in plan]
    if used != [row < n for row in range(frames)]:
        raise ValueError(
            f"earlytom::merge_frames: n={n}, but the rows of the plan with any weight are "
            f"{[row for row in range(frames) if used[row]]}; pass n=int(merged_counts.sum()) of the same plan"
        )
    for row, (first, second, *weights) in enumerate(plan):
        if not (0 <= first < frames and 0 <= second < frames and all(map(math.isfinite, weights))):
            raise ValueError(
                f"earlytom::merge_frames: row {row} of the plan is source ({first:.0f}, {second:.0f}), "
                f"weight {tuple(weights)}; sources must be in [0, {frames}) and weights finite"
            )
    return [row for row, (_, _, *weights) in enumerate(plan[:n]) if weights != [1.0, 0.0]]


def _triton_supports(tensors: Sequence[Tensor], source: Tensor, weight: Tensor, n: int) -> bool:
    return all(x.dtype in (torch.float32, torch.float16, torch.bfloat16) for x in tensors)


provide(merge_frames, Provider("triton", ".triton_merge_frames", supports=_triton_supports))
