"""One separator row after each video's tokens (LLaVA-OneVision's newline; algorithm.md, stage 2, point 6).

::

    tokens a a a b b, kept_counts [3, 2], separator |   ->   a a a | b b |
"""

import torch
from torch import Tensor


@torch.library.custom_op("earlytom::append_separators", mutates_args=())
def append_separators(tokens: Tensor, kept_counts: Tensor, separator: Tensor) -> Tensor:
    """Put ``separator`` after the tokens of each video.

    Args:
        tokens: [M, D], the videos one after another.
        kept_counts: int64 [V], tokens of each video, M in total.
        separator: [D], cast to the dtype of ``tokens``.

    Returns:
        [M + V, D], dtype of ``tokens``.

    Raises:
        ValueError: shapes that do not match, or counts that do not add up to M.
    """
    _check(tokens, kept_counts, separator)
    counts = kept_counts.tolist()
    if sum(counts) != tokens.shape[0] or min(counts, default=0) < 0 or tokens.shape[1] != separator.shape[0]:
        raise ValueError(
            f"earlytom::append_separators: kept_counts={counts} for tokens {list(tokens.shape)} and a "
            f"separator of {separator.shape[0]} channels; the counts must be >= 0 and add up to the tokens, "
            f"the channels agree"
        )
    row = separator.to(tokens.dtype)[None]
    return torch.cat([piece for part in tokens.split(counts) for piece in (part, row)])


@append_separators.register_fake
def _(tokens: Tensor, kept_counts: Tensor, separator: Tensor) -> Tensor:
    _check(tokens, kept_counts, separator)
    return tokens.new_empty((tokens.shape[0] + kept_counts.shape[0], tokens.shape[1]))


def _check(tokens: Tensor, kept_counts: Tensor, separator: Tensor) -> None:
    if tokens.dim() != 2 or separator.dim() != 1 or kept_counts.dim() != 1 or kept_counts.dtype != torch.int64:
        raise ValueError(
            f"earlytom::append_separators: tokens must be [tokens, channels], kept_counts int64 [videos], "
            f"separator [channels]; got {tokens.dim()} axes, {kept_counts.dtype} with {kept_counts.dim()}, "
            f"{separator.dim()}"
        )
