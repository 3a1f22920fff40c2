"""Importance of a patch token: the attention it receives, without keeping any attention map.

::

    softmax(q @ k.T * scale)  [T, H, S, S]   ->   attention_received(q, k, scale)  [T, S]
      .mean(over heads and queries)               one frame's map at a time, never all T of them
"""

import torch
from torch import Tensor

from earlytom_compile.kernels.providers import Provider, provide

_WIDEST_HEAD_BYTES = 320  # of the Triton kernels, whose tiles must fit into shared memory


@torch.library.custom_op("earlytom::attention_received", mutates_args=())
def attention_received(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Mean over heads and query positions of softmax(q k^T * scale)[..., j] (algorithm.md, token importance).

    Args:
        query, key: [T, H, S, d], one float dtype, any strides, the same number of heads.
        scale: factor on the scores before the softmax, as the attention itself uses it.

    Returns:
        float32 [T, S]; each row sums to 1. Scores, softmax and mean are float32 whatever the dtype given. A
        frame's row does not depend on the other frames of the call.

    Raises:
        ValueError: wrong rank or dtype, shapes that differ, or an empty axis.
    """
    check_shapes(query, key)
    frames, heads, tokens, _ = query.shape
    out = query.new_empty((frames, tokens), dtype=torch.float32)
    scores = query.new_empty((heads, tokens, tokens), dtype=torch.float32)
    for frame in range(frames):
        q, k = query[frame].float(), key[frame].float()
        torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=scale, out=scores)
        torch.softmax(scores, dim=-1, out=scores)
        torch.sum(scores.view(heads * tokens, tokens), dim=0, out=out[frame])
    return out.div_(heads * tokens)


@attention_received.register_fake
def _(query: Tensor, key: Tensor, scale: float) -> Tensor:
    _check(query, key)
    return query.new_empty((query.shape[0], query.shape[2]), dtype=torch.float32)


def _check(query: Tensor, key: Tensor) -> None:
    if query.dim() != 4 or key.dim() != 4 or not query.is_floating_point() or query.dtype != key.dtype:
        raise ValueError(
            f"earlytom::attention_received: query and key must be [frames, heads, tokens, head_dim] of one "
            f"float dtype, got {query.dtype} with {query.dim()} axes and {key.dtype} with {key.dim()}"
        )


def check_shapes(query: Tensor, key: Tensor) -> None:
    """What a provider has to refuse, all of it known without a look at the values."""
    _check(query, key)
    if query.shape != key.shape or 0 in query.shape:
        raise ValueError(
            f"earlytom::attention_received: query {list(query.shape)} and key {list(key.shape)} must have "
            f"the same shape without empty axes; repeat grouped key heads to the query's heads first"
        )


def _triton_supports(query: Tensor, key: Tensor, scale: float) -> bool:
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    if query.dtype not in dtypes or query.dim() != 4:
        return False
    if query.is_cuda and torch.cuda.is_available() and torch.cuda.get_device_capability(query.device) < (8, 0):
        return False  # too little shared memory for the tiles
    return query.shape[3] * query.element_size() <= _WIDEST_HEAD_BYTES


provide(attention_received, Provider("triton", ".triton_attention_received", supports=_triton_supports))
