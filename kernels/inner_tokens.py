"""Fewer video tokens inside the language model (algorithm.md, stage 3): which stay, and what becomes of the others.

::

    slots     0  1  2 -2 -2 -2  9       what each position of the shorter prompt holds: a position of the longer one,
                                        -2 - v the next token that video v keeps, -1 padding
    video_of -1 -1 -1  0  0  0  0  0  0 -1 -1        the video that each position of the longer prompt belongs to
    kept      0  1  2  4  5  8  9  10   once the scores have told which tokens video 0 keeps

How many tokens a video keeps is known before the language model runs, so that every size is: only which they are
depends on the attention they receive. Every row is computed by itself, and every video competes with itself alone.
Every device computes the native bodies, for none of which the host waits.
"""

import torch
from torch import Tensor

MERGES = ("mean", "sequential", "drop")
_NO_VIDEO = -1
_FIRST_VIDEO = -2


@torch.library.custom_op("earlytom::mark_videos", mutates_args=())
def mark_videos(embeds: Tensor, video_of: Tensor, last: list[Tensor], slots: list[Tensor]) -> Tensor:
    """A copy of ``embeds``: a mark for passes/insert_inner_steps.py, which takes it out again.

    Args:
        embeds: [R, S, C], the prompt as it enters the language model.
        video_of: int64 [R, S], the video that each position belongs to, numbered from 0 in each row; -1: to none.
        last: int64 [R] before each step, the last position of each row that is attended to.
        slots: int64 [R, S'], [R, S''], ...: what is left after each step, in positions of the step before.
    """
    return embeds.clone()


@mark_videos.register_fake
def _(embeds: Tensor, video_of: Tensor, last: list[Tensor], slots: list[Tensor]) -> Tensor:
    return torch.empty_like(embeds)


@torch.library.custom_op("earlytom::plan_inner_tokens", mutates_args=())
def plan_inner_tokens(
    input_ids: Tensor, mask: Tensor | None, video_token: int, before: int, after: list[int], lengths: list[int]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Where videos of one size are in a prompt, and what is left of it after each step.

    Args:
        input_ids: int64 or int32 [R, S]; every ``before`` consecutive placeholders of a row are a video.
        mask: [R, S], 0 or False where nothing is attended to; None: nowhere.
        video_token: id of the placeholder.
        before: placeholders of each video.
        after: how many of them each video keeps in each step, never more than before.
        lengths: positions that are left of each row after each step, the same for all rows.

    Returns:
        video_of: int64 [R, S], the video of the row that each position belongs to; -1: none.
        last: int64 [R] before each step, the last position that is attended to.
        slots: int64 [R, lengths[i]] after each step.

    Raises:
        ValueError: shapes or dtypes that do not match.
    """
    _check_prompt(input_ids, mask, after, lengths)
    place = torch.arange(input_ids.shape[1], device=input_ids.device)
    placeholder = input_ids == video_token
    video_of = torch.where(placeholder, (placeholder.cumsum(1) - 1) // before, _NO_VIDEO)
    seen = place if mask is None else torch.where(mask != 0, place, -1)
    current, last, slots = video_of, [seen.expand(input_ids.shape).amax(1)], list[Tensor]()
    for left, length in zip(after, lengths, strict=True):
        slots.append(_slots(current, before, left, length))
        before, current = left, torch.where(slots[-1] <= _FIRST_VIDEO, _FIRST_VIDEO - slots[-1], _NO_VIDEO)
        # A prompt may end in a video, whose last slot it is then.
        ends = slots[-1] == last[-1][:, None]
        last.append(torch.where(ends.any(1), ends.int().argmax(1), length - 1))
    return video_of, last[:-1], slots


@plan_inner_tokens.register_fake
def _(
    input_ids: Tensor, mask: Tensor | None, video_token: int, before: int, after: list[int], lengths: list[int]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    _check_prompt(input_ids, mask, after, lengths)
    rows = input_ids.shape[0]
    slots = [input_ids.new_empty((rows, length), dtype=torch.int64) for length in lengths]
    last = [input_ids.new_empty((rows,), dtype=torch.int64) for _ in lengths]
    return torch.empty_like(input_ids, dtype=torch.int64), last, slots


def _slots(video_of: Tensor, before: int, after: int, length: int) -> Tensor:
    """int64 [R, length]: the first ``after`` places of each video are its slots, all else stays."""
    inside = video_of >= 0
    within = (inside.cumsum(1) - 1) % before
    stays = ~inside | (within < after)
    position = torch.sort(~stays, dim=1, stable=True).indices[:, :length]
    video = video_of.gather(1, position)
    return torch.where(video >= 0, _FIRST_VIDEO - video, position)


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
        video_of, slots: int64 [R, S] and [R, S'], see above. Slots of a video are at most its tokens.

    Returns:
        hidden: [R, S', C], dtype of ``hidden``; padding repeats position 0.
        kept: int64 [R, S'], the position that each came from; -1: padding.

    Raises:
        ValueError: shapes or dtypes that do not match, or an unknown ``merge``.
    """
    _check_tokens(hidden, scores, video_of, slots, merge)
    rank = _rank_within_videos(scores, video_of)
    keep = rank < _count(slots, video_of)
    kept = _fill(slots, video_of, keep)
    taken = _at(hidden, kept)
    if merge == "drop":
        return taken, kept
    joins = _most_similar(hidden, kept, slots, video_of, rank, first_by_rank=merge == "sequential")
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


@torch.library.custom_op("earlytom::videos_of_slots", mutates_args=())
def videos_of_slots(slots: Tensor) -> Tensor:
    """int64 [R, S'] of ``slots``: the video that each position belongs to once they are filled; -1: to none."""
    return torch.where(slots <= _FIRST_VIDEO, _FIRST_VIDEO - slots, _NO_VIDEO)


@videos_of_slots.register_fake
def _(slots: Tensor) -> Tensor:
    return torch.empty_like(slots)


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
    number = (_FIRST_VIDEO - slots).clamp(-1, videos - 1) + 1
    counts = slots.new_zeros((len(slots), videos + 1)).scatter_add_(1, number, torch.ones_like(slots))
    counts[:, 0] = 0
    return counts.gather(1, video_of.clamp_min(-1) + 1)


def _fill(slots: Tensor, video_of: Tensor, keep: Tensor) -> Tensor:
    """``slots`` with the positions that ``keep``, bool [R, S], names in the slots of their videos, in order."""
    none = video_of.shape[1] + 1
    of_slot = torch.where(slots <= _FIRST_VIDEO, _FIRST_VIDEO - slots, none)
    slot = torch.sort(of_slot, dim=1, stable=True).indices
    position = torch.sort(torch.where(keep, video_of, none), dim=1, stable=True).indices[:, : slots.shape[1]]
    fixed = slots.gather(1, slot)
    return torch.empty_like(slots).scatter_(1, slot, torch.where(fixed <= _FIRST_VIDEO, position, fixed))


def _at(hidden: Tensor, kept: Tensor) -> Tensor:
    """[R, S', C]: the entries at ``kept``."""
    index = kept.clamp_min(0)[..., None].expand(-1, -1, hidden.shape[2])
    return hidden.gather(1, index)


def _most_similar(
    hidden: Tensor, kept: Tensor, slots: Tensor, video_of: Tensor, rank: Tensor, first_by_rank: bool
) -> Tensor:
    """int64 [R, S]: the slot whose token each token would join."""
    wide = hidden.float()
    direction = wide / torch.linalg.vector_norm(wide, dim=2, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    with torch.autocast(hidden.device.type, enabled=False):
        cosine = direction @ _at(direction, kept).mT
    same_video = video_of[:, :, None] == (_FIRST_VIDEO - slots)[:, None, :]
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


@torch.library.custom_op("earlytom::shorten_mask", mutates_args=())
def shorten_mask(mask: Tensor | None, kept: Tensor) -> Tensor:
    """The mask of a prompt in which the positions ``kept`` are left.

    Args:
        mask: bool, or a float to be added, [R or 1, H or 1, S, S]. None: each position sees itself and all before it.
        kept: int64 [R, S'], ascending in each row; -1: padding, which sees itself alone, and nobody sees it.

    Returns:
        [R, H or 1, S', S'], dtype of ``mask``; bool where it is None.

    Raises:
        ValueError: shapes or dtypes that do not match.
    """
    _check_mask(mask, kept)
    rows, left = kept.shape
    padding, index = kept < 0, kept.clamp_min(0)
    if mask is None:
        place = torch.arange(left, device=kept.device)
        short = (place[:, None] >= place).expand(rows, 1, left, left)
        hidden: bool | float = False
    else:
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        short = mask.expand(rows, -1, -1, -1)
        short = short.gather(2, index[:, None, :, None].expand(-1, short.shape[1], -1, short.shape[3]))
        short = short.gather(3, index[:, None, None, :].expand(-1, short.shape[1], left, -1))
    shown: bool | float = True if short.dtype == torch.bool else 0.0
    alone = torch.eye(left, dtype=torch.bool, device=kept.device)
    unseen = padding[:, None, None, :] | padding[:, None, :, None]
    short = torch.where(unseen, hidden, short)
    short = torch.where(padding[:, None, :, None] & alone, shown, short)
    return short.contiguous()


@shorten_mask.register_fake
def _(mask: Tensor | None, kept: Tensor) -> Tensor:
    _check_mask(mask, kept)
    heads, dtype = (1, torch.bool) if mask is None else (mask.shape[1], mask.dtype)
    return kept.new_empty((kept.shape[0], heads, kept.shape[1], kept.shape[1]), dtype=dtype)


def _check_prompt(input_ids: Tensor, mask: Tensor | None, after: list[int], lengths: list[int]) -> None:
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"earlytom::plan_inner_tokens: input_ids must be int64 or int32 [rows, positions], got {input_ids.dtype} "
            f"with {input_ids.dim()} axes"
        )
    if (mask is not None and mask.dim() != 2) or len(after) != len(lengths):
        raise ValueError(
            f"earlytom::plan_inner_tokens: mask must be [rows, positions], and after={after} must be as many as lengths"
        )


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


def _check_mask(mask: Tensor | None, kept: Tensor) -> None:
    if mask is not None and (mask.dim() != 4 or not (mask.dtype == torch.bool or mask.is_floating_point())):
        raise ValueError(
            f"earlytom::shorten_mask: mask must be bool or float [rows, heads, positions, keys], got {mask.dtype} with "
            f"{mask.dim()} axes"
        )
    if kept.dim() != 2 or kept.dtype != torch.int64:
        raise ValueError(
            f"earlytom::shorten_mask: kept must be int64 [rows, positions], got {kept.dtype} with {kept.dim()} axes"
        )
