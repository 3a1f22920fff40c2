"""What differs from place to place, such as a rotary table, in the order in which places are packed.

::

    table [1, 729, 72], index [T] of pack_places, axis 1   ->   [1, T, 72]
"""

import torch
from torch import Tensor


@torch.library.custom_op("earlytom::at_places", mutates_args=())
def at_places(table: Tensor, index: Tensor, axis: int) -> Tensor:
    """The part of ``table`` that belongs to each packed place.

    Args:
        table: any tensor with an axis of S places, the same for all frames.
        index: int64 [T] of ``pack_places``: place n S + s is place s of frame n.
        axis: that of the places.

    Returns:
        A copy with T along ``axis``.

    Raises:
        ValueError: an axis that does not exist, or an index of another shape.
    """
    _check(table, index, axis)
    return table.index_select(axis, index % table.shape[axis])


@at_places.register_fake
def _(table: Tensor, index: Tensor, axis: int) -> Tensor:
    _check(table, index, axis)
    return table.new_empty((*table.shape[:axis], index.shape[0], *table.shape[axis + 1 :]))


def _check(table: Tensor, index: Tensor, axis: int) -> None:
    if not 0 <= axis < table.dim() or index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(
            f"earlytom::at_places: axis={axis} of a table with {table.dim()} axes and an index of {index.dtype} with "
            f"{index.dim()} axes; the axis must be one of the table's, and the index int64 [places] as pack_places "
            "returns it"
        )
