"""Attention in which only the active places of a frame ask, and all its places answer.

::

    packed rows        0 1 2 3 | 4 5       4 active places in frame 0, 2 in frame 1     offsets 0 4 6
    keys of frame 1    0 4 2 5             those of its places, wherever they were computed: rows[1]
    queries            4 5

No query is padded to the frame with the most; keys and values are gathered one frame at a time, and not at all where
a frame computed everything.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from earlytom_compile.kernels.providers import Provider, provide

_WIDEST_HEAD_BYTES = 320  # of the Triton kernel, whose tiles must fit into shared memory


@torch.library.custom_op("earlytom::reuse_attention", mutates_args=())
def reuse_attention(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale) v of each frame: its own packed queries, keys and values of all its places.

    Args:
        query, key, value: [1, H, T, d], one float dtype, any strides.
        rows: int64 [N, S], the packed row of each place of each frame; offsets: int64 [N + 1], the first packed
            row of each frame; both from ``pack_places``.
        scale: factor on the scores before the softmax.

    Returns:
        [1, H, T, d], whose memory is [1, T, H, d], softmax in float32 (float64 stays float64). With every place
        active, on a CPU, bit for bit what ``scaled_dot_product_attention`` gives on [N, H, S, d].

    Raises:
        ValueError: wrong ranks or dtypes, shapes that do not match, an empty axis, offsets that do not ascend from
            0 to T, or rows outside. A provider that does not read values stays inside the T rows instead.
    """
    check_shapes(query, key, value, rows, offsets)
    # Of any other strides another kernel would compute it.
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    _, heads, total, width = query.shape
    out = query.new_empty((1, total, heads, width))
    key, value = key[0].transpose(0, 1), value[0].transpose(0, 1)  # [T, H, d]
    keys, values = (query.new_empty((rows.shape[1], heads, width)) for _ in range(2))
    borders = _borders(rows, offsets, total)
    for frame, (start, stop) in enumerate(zip(borders, borders[1:], strict=False)):
        if start == stop:
            continue
        if torch.equal(rows[frame], torch.arange(start, stop, device=rows.device)):
            own = key[start:stop], value[start:stop]
        else:
            torch.index_select(key, 0, rows[frame], out=keys)
            torch.index_select(value, 0, rows[frame], out=values)
            own = keys, values
        k, v = (x.transpose(0, 1).unsqueeze(0) for x in own)
        attended = F.scaled_dot_product_attention(query[:, :, start:stop], k, v, scale=scale)
        out[:, start:stop] = attended.transpose(1, 2)
    return out.transpose(1, 2)


@reuse_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, offsets: Tensor, scale: float) -> Tensor:
    _check(query, key, value, rows, offsets)
    _, heads, total, width = query.shape
    return query.new_empty((1, total, heads, width)).transpose(1, 2)


def _check(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, offsets: Tensor) -> None:
    three = (query, key, value)
    if any(x.dim() != 4 or x.dtype != query.dtype for x in three) or not query.is_floating_point():
        raise ValueError(
            f"earlytom::reuse_attention: query, key and value must be [1, heads, rows, head_dim] of one float dtype, "
            f"got {', '.join(f'{x.dtype} with {x.dim()} axes' for x in three)}"
        )
    if rows.dim() != 2 or offsets.dim() != 1 or rows.dtype != torch.int64 or offsets.dtype != torch.int64:
        raise ValueError(
            f"earlytom::reuse_attention: rows must be int64 [frames, places] and offsets int64 [frames + 1] as "
            f"pack_places returns them, got {rows.dtype} with {rows.dim()} axes and {offsets.dtype} with "
            f"{offsets.dim()}"
        )


def check_shapes(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, offsets: Tensor) -> None:
    """What a provider has to refuse, all of it known without a look at the values."""
    _check(query, key, value, rows, offsets)
    if query.shape != key.shape or query.shape != value.shape or query.shape[0] != 1 or 0 in query.shape:
        raise ValueError(
            f"earlytom::reuse_attention: query {list(query.shape)}, key {list(key.shape)} and value "
            f"{list(value.shape)} must have the same shape [1, heads, rows, head_dim] without empty axes; repeat "
            f"grouped heads to the query's heads first"
        )
    if 0 in rows.shape or offsets.shape[0] != rows.shape[0] + 1:
        raise ValueError(
            f"earlytom::reuse_attention: rows {list(rows.shape)} and {offsets.shape[0]} offsets; frames and places "
            f"must not be 0, and offsets one more than frames"
        )


def _borders(rows: Tensor, offsets: Tensor, total: int) -> list[int]:
    """The offsets, after checking the values of both."""
    borders = offsets.tolist()
    if borders[0] != 0 or borders[-1] != total or borders != sorted(borders):
        raise ValueError(
            f"earlytom::reuse_attention: offsets {borders} do not ascend from 0 to the {total} packed rows; pass what "
            f"pack_places returned with these rows"
        )
    low, high = torch.stack(rows.aminmax()).tolist()
    if low < 0 or high >= total:
        raise ValueError(
            f"earlytom::reuse_attention: rows run from {low} to {high}, but {total} rows are packed; pass what "
            f"pack_places returned"
        )
    return borders


def _triton_supports(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, offsets: Tensor, scale: float) -> bool:
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16) or query.dim() != 4:
        return False
    if query.is_cuda and torch.cuda.is_available() and torch.cuda.get_device_capability(query.device) < (8, 0):
        return False  # too little shared memory for the tiles
    return query.shape[3] * query.element_size() <= _WIDEST_HEAD_BYTES


provide(reuse_attention, Provider("triton", ".triton_reuse_attention", supports=_triton_supports))
