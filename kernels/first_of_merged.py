"""Where a merged frame begins: the first of the frames that it is made of.

::

    source of one merge [[0, 0], [1, 2], [3, 3]]             ->  0 1 3
    source of the next  [[0, 1], [2, 2]], first = [0, 1, 3]  ->  0 3
"""

import torch
from torch import Tensor


@torch.library.custom_op("earlytom::first_of_merged", mutates_args=())
def first_of_merged(first: Tensor | None, source: Tensor, n: int) -> Tensor:
    """The first frame of each merged one, before any merge.

    Args:
        first: int64 [T], the same of the frames that went in; None where none had merged.
        source: int64 [T, 2], from ``plan_merge``.
        n: merged frames, ``int(merged_counts.sum())``.

    Returns:
        int64 [n], ascending within a video.

    Raises:
        ValueError: shapes or dtypes that do not match, or ``n`` beyond the plan.
    """
    _check(first, source)
    if not 0 <= n <= len(source):
        raise ValueError(f"earlytom::first_of_merged: n={n} of a plan for {len(source)} frames")
    rows = source[:n, 0]
    return rows.clone() if first is None else first.index_select(0, rows)


@first_of_merged.register_fake
def _(first: Tensor | None, source: Tensor, n: int) -> Tensor:
    _check(first, source)
    return source.new_empty((n,))


def _check(first: Tensor | None, source: Tensor) -> None:
    int64 = source.dtype == torch.int64 and (first is None or first.dtype == torch.int64)
    if source.dim() != 2 or not int64 or (first is not None and first.dim() != 1):
        given = "None" if first is None else f"{first.dtype} with {first.dim()} axes"
        raise ValueError(
            "earlytom::first_of_merged: first must be int64 [frames] or None and source int64 [frames, 2], got "
            f"{given} and {source.dtype} with {source.dim()} axes"
        )
