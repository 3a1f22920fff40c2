"""Qwen-VL's vision towers, with frames as an axis of their own.

    as the model runs them   [T*S, D]     all frames of all videos of a call in one sequence, cut by cu_seqlens
    here                     [T, S, D]    one video of T frames, so that frames can merge

A frame is a temporal patch, two pictures, of S = h*w patches: no attention crosses it. Every module is the tower's own
and is called as often and in the same order; only what lies between them, the layout, is written here. Patches come
in blocks of 2x2, one token each behind the merger. A tower with windows gets the blocks sorted by window, and the
windows by size, those at the borders of the picture being smaller.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import all_ops  # noqa: F401  (registers torch.ops.earlytom)


def patch_positions(height: int, width: int, block: int) -> Tensor:
    """int64 [S, 2]: row and column of each of ``height`` x ``width`` patches, in blocks of ``block`` x ``block``."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    blocks = (height // block, block, width // block, block)
    return torch.stack([x.reshape(blocks).transpose(1, 2).flatten() for x in (rows, columns)], dim=-1)


def window_sizes(height: int, width: int, side: int) -> list[int]:
    """(number, blocks of each) of each size of windows of ``side`` x ``side`` in a grid of ``height`` x ``width``
    blocks: whole ones, those cut off on the right, below, and in the corner."""
    (down, rest_down), (across, rest_across) = divmod(height, side), divmod(width, side)
    sizes = (
        (down * across, side * side),
        (down * (rest_across > 0), side * rest_across),
        ((rest_down > 0) * across, rest_down * side),
        ((rest_down > 0) * (rest_across > 0), rest_down * rest_across),
    )
    return [number for number, length in sizes if number for number in (number, length)]


def window_order(height: int, width: int, side: int, device: torch.device) -> Tensor:
    """int64 [height * width]: the blocks in the order of :func:`window_sizes`, in raster order inside a window."""
    rows = torch.arange(height, device=device)[:, None] // side
    columns = torch.arange(width, device=device)[None, :] // side
    across = -(-width // side)
    kind = 2 * (rows >= height // side) + 1 * (columns >= width // side)
    return (kind * (height * width) + rows * across + columns).flatten().argsort(stable=True)


def through_blocks(
    visual: Any, hidden: Tensor, cos: Tensor, sin: Tensor, windows: list[int], full: tuple[int, ...]
) -> list[Tensor]:
    """What each block of the tower makes of ``hidden`` [T, S, D]: [T, S, D] of each, in order.

    ``cos`` and ``sin``: float32 [S, d], rotary angles of each place. Attention stays in ``windows``, pairs (number,
    places of each), in all blocks but ``full``; with no windows in none."""
    outputs = []
    for index, block in enumerate(visual.blocks):
        inside = windows if windows and index not in full else []
        hidden = hidden + _attend(block.attn, block.norm1(hidden), cos, sin, inside)
        hidden = hidden + block.mlp(block.norm2(hidden))
        outputs.append(hidden)
    return outputs


def _attend(attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor, windows: list[int]) -> Tensor:
    query, key, value = attention.qkv(hidden).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)  # [T, S, H, d]
    query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if windows:
        mixed = torch.ops.earlytom.window_attention(query, key, value, windows, attention.scaling)
    else:
        mixed = F.scaled_dot_product_attention(query, key, value, scale=attention.scaling)
    return attention.proj(mixed.transpose(1, 2).flatten(2))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[T, S, H, d] turned by the angles of its place, in float32 as the model does it."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    turned = wide * cos.unsqueeze(-2) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(-2)
    return turned.to(x.dtype)


def gated_merger(merger: Any, hidden: Tensor) -> Tensor:
    """Qwen2.5-VL's: [T, S, D] -> [T, P, C], one token of each block of patches."""
    return merger.mlp(_joined(merger.ln_q(hidden), merger.hidden_size))


def merger(module: Any, hidden: Tensor) -> Tensor:
    """Qwen3-VL's, whose norm comes before or behind the joining: [T, S, D] -> [T, P, C]."""
    if module.use_postshuffle_norm:
        joined = module.norm(_joined(hidden, module.hidden_size))
    else:
        joined = _joined(module.norm(hidden), module.hidden_size)
    return module.linear_fc2(module.act_fn(module.linear_fc1(joined)))


def _joined(hidden: Tensor, width: int) -> Tensor:
    """The patches of each block side by side: [T, S, D] -> [T, P, width]."""
    return hidden.unflatten(1, (-1, width // hidden.shape[-1])).flatten(2)


def embedded(visual: Any, pixels: Tensor) -> Tensor:
    """Patches [1, T, S, C, 2, p, p] -> [T, S, D]."""
    frames, places = pixels.shape[1:3]
    return visual.patch_embed(pixels.flatten(0, 2)).unflatten(0, (frames, places))


def bypassed(visual: Any) -> list[nn.Module]:
    """Modules of the tower whose own ``forward`` is not called, only what is in them: what hangs on them would not
    run."""
    mergers = [visual.merger, *getattr(visual, "deepstack_merger_list", ())]
    return [visual, *visual.blocks, *(block.attn for block in visual.blocks), *mergers]
