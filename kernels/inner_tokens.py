"""Fewer video tokens inside the language model (algorithm.md, stage 3): which stay, and what becomes of the others.

::

    attention_paid(q, k)                    [R, S]           what the prompt's last position looks at, or all of them
    keep_inner_tokens(hidden, scores, ...)  [R, S', C]       the tokens of each video that are looked at most, and into
                                                             which of them the others merge

Where the videos are and how many tokens each keeps is told by inner_prompt.py. Every row is computed by itself, and
every video competes with itself alone. Every device computes the native bodies, for none of which the host waits.
"""

import torch
from torch import Tensor

from earlytom_compile.kernels.inner_prompt import FIRST_VIDEO, NO_VIDEO

MERGES = ("mean", "sequential", "drop")


@torch.library.custom_op("earlytom::attention_paid", mutates_args=())
def attention_paid(
    query: Tensor, key: Tensor, mask: Tensor | None, last: Tensor, scale: float, causal: bool, everyone: bool
) -> Tensor:
    """Attention that each position of a prompt is paid: by its last position, or by all.

    Args:
        query: [R, H, S, d], any float dtype and strides.
        key: [R, G, S, d], of which each serves H / G heads of the query.
        mask: bool, or a float to be added, [R or 1, H or 1, S, S]; None: every key is seen, or with ``causal`` those
            up to the query's own position.
        last: int64 [R], the position of each row that pays attention.
        scale: factor on the scores before the softmax.
        everyone: the mean over all positions that can see a key instead, each with its own softmax; a position that
            sees nothing, such as padding, does not count.

    Returns:
        float32 [R, S], the mean over heads; 0 for a position that nobody sees. Computed in float32.

    Raises:
        ValueError: shapes or dtypes that do not match.
    """
    _check_attention(query, key, mask, last)
    rows, heads, positions, _ = query.shape
    if key.shape[2] != positions or heads % key.shape[1]:
        raise ValueError(
            f"earlytom::attention_paid: {heads} heads of {positions} queries and {key.shape[1]} of {key.shape[2]} "
            "keys; heads must be a multiple of the keys', and there must be a key for each query"
        )
    paid = query.new_empty((rows, positions), dtype=torch.float32)
    for row in range(rows):  # all heads of one row at a time: with everyone, S x S for each
        own, hidden = slice(None) if everyone else last[row : row + 1], None if mask is None else mask[row % len(mask)]
        weights, seen = _weights(query[row], key[row], hidden, own, scale, causal)
        paid[row] = weights.sum(0) / seen.sum(0).clamp_min(1)
    return paid


@attention_paid.register_fake
def _(
    query: Tensor, key: Tensor, mask: Tensor | None, last: Tensor, scale: float, causal: bool, everyone: bool
) -> Tensor:
    _check_attention(query, key, mask, last)
    return query.new_empty((query.shape[0], query.shape[2]), dtype=torch.float32)


def _weights(
    query: Tensor, key: Tensor, mask: Tensor | None, own: slice | Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """(mean over heads of the softmax, float32 [Q, S]; who sees whom, bool [Q, S]) for the queries ``own``."""
    positions = torch.arange(query.shape[1], device=query.device)[own]
    query = query[:, own].float()
    groups = query.unflatten(0, (key.shape[0], -1)).flatten(1, 2)  # [G, H/G * Q, d]
    with torch.autocast(query.device.type, enabled=False):  # it would make the product one of bfloat16
        scores = (groups @ key.float().mT * scale).view(query.shape[0], -1, key.shape[1])
    if causal:
        hidden = positions[:, None] < torch.arange(key.shape[1], device=key.device)
        scores = scores.masked_fill(hidden, -torch.inf)
    if mask is not None:
        mask = mask[:, own]
        hide = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2
        scores = scores if mask.dtype == torch.bool else scores + mask.float()
        scores = scores.masked_fill(hide, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)  # a query that sees nothing
    return weights.mean(0), (scores > -torch.inf).any(0)


@torch.library.custom_op("earlytom::keep_inner_tokens", mutates_args=())
def keep_inner_tokens(
    hidden: Tensor, scores: Tensor, video_of: Tensor, slots: Tensor, merge: str
) -> tuple[Tensor, Tensor]:
    """The shorter prompt: of each video the tokens of highest score, as many as it has slots.

    Of equal scores the lower position stays. The others merge into the kept token of the same video that is most like
    them, by the cosine of float32 (``merge="mean"``: the mean of a kept token and all that join it, of equal cosines
    the lower position; ``"sequential"``: (kept + dropped) / 2 again and again in their order, of equal cosines the
    higher score), or go without a trace (``"drop"``). What joins nothing, and all that belongs to no video, stays as it
    is to the bit.

    Args:
        hidden: [R, S, C], any float dtype and strides.
        scores: float [R, S].
        video_of, slots: int64 [R, S] and [R, S'], as in inner_prompt.py. Slots of a video are at most its tokens.

    Returns:
        hidden: [R, S', C], dtype of ``hidden``; padding repeats position 0.
        kept: int64 [R, S'], the position that each came from; -1: padding.

    Raises:
        ValueError: shapes or dtypes that do not match, or an unknown ``merge``.
    """
    _check_tokens(hidden, scores, video_of, slots, merge)
    rank = _rank_within_videos(scores, video_of)
    keep = rank < _count(slots, video_of)
    kept = _kept(keep | (video_of < 0), slots.shape[1])
    taken = _at(hidden, kept)
    if merge == "drop":
        return taken, kept
    joins = _most_similar(hidden, kept, video_of, rank, first_by_rank=merge == "sequential")
    weights = _weights_of_joined(joins, (video_of >= 0) & ~keep, slots.shape[1], sequential=merge == "sequential")
    with torch.autocast(hidden.device.type, enabled=False):
        added = weights @ hidden.float()
    if merge == "mean":
        joined = weights.sum(2, keepdim=True)
        merged = (taken.float() + added) / (1 + joined)
    else:
        joined = (weights > 0).sum(2, keepdim=True)
        merged = taken.float() * 0.5**joined + added
    return torch.where(joined > 0, merged.to(hidden.dtype), taken), kept


@keep_inner_tokens.register_fake
def _(hidden: Tensor, scores: Tensor, video_of: Tensor, slots: Tensor, merge: str) -> tuple[Tensor, Tensor]:
    _check_tokens(hidden, scores, video_of, slots, merge)
    return hidden.new_empty((slots.shape[0], slots.shape[1], hidden.shape[2])), torch.empty_like(slots)


def _rank_within_videos(scores: Tensor, video_of: Tensor) -> Tensor:
    """int64 [R, S]: how many tokens of its video go before each; large for what belongs to none."""
    # Two stable sorts: by score, then by video. Adding 0 turns -0.0 into 0.0, which some devices sort below it.
    by_score = torch.sort(scores + 0.0, dim=1, descending=True, stable=True).indices
    videos, by_video = torch.sort(video_of.gather(1, by_score), dim=1, stable=True)
    order = by_score.gather(1, by_video)
    place = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    first = torch.searchsorted(videos, videos, right=False)  # where the run of each one's video begins
    rank = torch.empty_like(order).scatter_(1, order, place - first)
    return rank.masked_fill_(video_of < 0, scores.shape[1])


def _count(slots: Tensor, video_of: Tensor) -> Tensor:
    """int64 [R, S]: how many slots there are for the video of each position; 0 for what belongs to none."""
    videos = video_of.shape[1]
    number = (FIRST_VIDEO - slots).clamp(-1, videos - 1) + 1
    counts = slots.new_zeros((len(slots), videos + 1)).scatter_add_(1, number, torch.ones_like(slots))
    counts[:, 0] = 0
    return counts.gather(1, video_of.clamp_min(-1) + 1)


def _kept(stays: Tensor, length: int) -> Tensor:
    """int64 [R, length]: the positions that ``stays``, bool [R, S], names, in order, behind what pads a row. Text may
    be between the tokens of a video, so that only now it is known where it goes."""
    place = torch.arange(stays.shape[1], device=stays.device)
    kept = torch.where(stays, place, NO_VIDEO).sort(1).values[:, stays.shape[1] - length :]
    return kept.clone(memory_format=torch.contiguous_format)


def _at(hidden: Tensor, kept: Tensor) -> Tensor:
    """[R, S', C]: the entries at ``kept``."""
    index = kept.clamp_min(0)[..., None].expand(-1, -1, hidden.shape[2])
    return hidden.gather(1, index)


def _most_similar(hidden: Tensor, kept: Tensor, video_of: Tensor, rank: Tensor, first_by_rank: bool) -> Tensor:
    """int64 [R, S]: the place in ``kept`` of the token that each token of a video would join."""
    wide = hidden.float()
    direction = wide / torch.linalg.vector_norm(wide, dim=2, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    with torch.autocast(hidden.device.type, enabled=False):
        cosine = direction @ _at(direction, kept).mT
    of_kept = video_of.gather(1, kept.clamp_min(0)).masked_fill(kept < 0, NO_VIDEO)
    same_video = video_of[:, :, None] == of_kept[:, None, :]
    cosine = cosine.masked_fill_(~same_video, -torch.inf)
    best = cosine == cosine.amax(2, keepdim=True)
    if first_by_rank:
        before = rank.gather(1, kept.clamp_min(0))[:, None, :].expand_as(best)
        return torch.where(best, before, rank.shape[1] + 1).argmin(2)
    return best.int().argmax(2)  # the first of those that tie


def _weights_of_joined(joins: Tensor, dropped: Tensor, slots: int, sequential: bool) -> Tensor:
    """float32 [R, S', S]: with what weight each dropped token is part of the one that it joins."""
    target = torch.where(dropped, joins, slots)
    weight = torch.ones_like(target, dtype=torch.float32)
    if sequential:  # of m that join in turn, the last has weight 1/2, and each one before it half as much
        ordered, order = torch.sort(target, dim=1, stable=True)
        place = torch.arange(target.shape[1], device=target.device).expand_as(order)
        behind = torch.searchsorted(ordered, ordered, right=True) - place  # 1 for the last of a run
        weight.scatter_(1, order, 0.5 ** behind.float())
    weights = weight.new_zeros((len(target), slots + 1, target.shape[1]))
    return weights.scatter_(1, target[:, None], weight[:, None])[:, :slots]


def _check_attention(query: Tensor, key: Tensor, mask: Tensor | None, last: Tensor) -> None:
    if query.dim() != 4 or key.dim() != 4 or not query.is_floating_point() or query.dtype != key.dtype:
        raise ValueError(
            f"earlytom::attention_paid: query and key must be [rows, heads, positions, head_dim] of one float dtype, "
            f"got {query.dtype} with {query.dim()} axes and {key.dtype} with {key.dim()}"
        )
    if mask is not None and (mask.dim() != 4 or not (mask.dtype == torch.bool or mask.is_floating_point())):
        raise ValueError(
            f"earlytom::attention_paid: mask must be bool or float [rows, heads, positions, keys], got {mask.dtype} "
            f"with {mask.dim()} axes"
        )
    if last.dim() != 1 or last.dtype != torch.int64:
        raise ValueError(f"earlytom::attention_paid: last must be int64 [rows], got {last.dtype} {list(last.shape)}")


def _check_tokens(hidden: Tensor, scores: Tensor, video_of: Tensor, slots: Tensor, merge: str) -> None:
    if merge not in MERGES:
        raise ValueError(f"earlytom::keep_inner_tokens: merge={merge!r}; use one of {', '.join(map(repr, MERGES))}")
    if hidden.dim() != 3 or not hidden.is_floating_point() or scores.dim() != 2 or not scores.is_floating_point():
        raise ValueError(
            f"earlytom::keep_inner_tokens: hidden must be float [rows, positions, channels] and scores float [rows, "
            f"positions], got {hidden.dtype} with {hidden.dim()} axes and {scores.dtype} with {scores.dim()}"
        )
    for name, x in (("video_of", video_of), ("slots", slots)):
        if x.dim() != 2 or x.dtype != torch.int64:
            raise ValueError(
                f"earlytom::keep_inner_tokens: {name} must be int64 [rows, positions], got {x.dtype} {list(x.shape)}"
            )
