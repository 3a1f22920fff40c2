"""spread_places on a GPU: one launch; with heads split from one projection, a row of all heads lies in one piece.

::

    packed [1, H, T, d], rows [N, S]   ->   [N, H, S, d], whose memory is [N, S, H, d]    N * S rows read and written
"""

from torch import Tensor

from earlytom_compile.kernels.pack_places import check_spread
from earlytom_compile.kernels.triton_take_places import copy_rows


def run(packed: Tensor, rows: Tensor) -> Tensor:
    """As ``spread_places``: [1, H, T, d], int64 [N, S] -> [N, H, S, d]."""
    check_spread(packed, rows)
    out = packed.new_empty((*rows.shape, packed.shape[1], packed.shape[3]))
    copy_rows(packed.transpose(1, 2).flatten(2), rows, out.flatten(2))
    return out.transpose(1, 2)
