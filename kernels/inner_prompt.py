"""A prompt that is shorter in the later layers of a language model: where its videos are, and what is left along it.

::

    slots     0  1  2 -2 -2 -2  9       what each position of the shorter prompt holds: a position of the longer one,
                                        -2 - v the next token that video v keeps, -1 padding
    video_of -1 -1 -1  0  0  0  0  0  0 -1 -1        the video that each position of the longer prompt belongs to
    kept      0  1  2  4  5  8  9  10   once keep_inner_tokens knows which tokens video 0 keeps

How many tokens a video keeps is known before the language model runs, so that every size is: only which they are
depends on the attention they receive. Where text is between the tokens of a video, such as time stamps of its frames,
that also decides where it goes: slots say how many of each there are, and ``kept`` has all in the order of the longer
prompt. Every device computes the native bodies, for none of which the host waits.
"""

import torch
from torch import Tensor

NO_VIDEO = -1
FIRST_VIDEO = -2
"""Video v is -2 - v among slots."""


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
    video_of = torch.where(placeholder, (placeholder.cumsum(1) - 1) // before, NO_VIDEO)
    seen = place if mask is None else torch.where(mask != 0, place, -1)
    current, last, slots = video_of, [seen.expand(input_ids.shape).amax(1)], list[Tensor]()
    for left, length in zip(after, lengths, strict=True):
        slots.append(_slots(current, before, left, length))
        before, current = left, torch.where(slots[-1] <= FIRST_VIDEO, FIRST_VIDEO - slots[-1], NO_VIDEO)
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
    return torch.where(video >= 0, FIRST_VIDEO - video, position)


@torch.library.custom_op("earlytom::videos_of_slots", mutates_args=())
def videos_of_slots(slots: Tensor) -> Tensor:
    """int64 [R, S'] of ``slots``: the video that each position belongs to once they are filled; -1: to none."""
    return torch.where(slots <= FIRST_VIDEO, FIRST_VIDEO - slots, NO_VIDEO)


@videos_of_slots.register_fake
def _(slots: Tensor) -> Tensor:
    return torch.empty_like(slots)


@torch.library.custom_op("earlytom::take_inner_positions", mutates_args=())
def take_inner_positions(x: Tensor, kept: Tensor) -> Tensor:
    """What lies along a prompt, such as rotary tables, at the positions ``kept``.

    Args:
        x: [R or 1, S, ...], any dtype and strides.
        kept: int64 [R, S'], in [-1, S); -1: padding, which gets what is at 0.

    Returns:
        [R, S', ...], dtype of ``x``.

    Raises:
        ValueError: shapes or dtypes that do not match.
    """
    _check_take(x, kept)
    row = torch.arange(len(kept), device=kept.device)[:, None]
    return x.expand(len(kept), *x.shape[1:])[row, kept.clamp_min(0)]


@take_inner_positions.register_fake
def _(x: Tensor, kept: Tensor) -> Tensor:
    _check_take(x, kept)
    return x.new_empty((*kept.shape, *x.shape[2:]))


@torch.library.custom_op("earlytom::kept_of_kept", mutates_args=())
def kept_of_kept(before: Tensor, kept: Tensor) -> Tensor:
    """int64 [R, S'']: the positions ``kept``, [R, S''], of what was ``before``, [R, S'], kept of a whole prompt, as
    positions of that; -1 where either is padding."""
    taken = before.gather(1, kept.clamp_min(0))
    return taken.masked_fill_(kept < 0, NO_VIDEO)


@kept_of_kept.register_fake
def _(before: Tensor, kept: Tensor) -> Tensor:
    return torch.empty_like(kept)


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


def _check_take(x: Tensor, kept: Tensor) -> None:
    if x.dim() < 2 or kept.dim() != 2 or kept.dtype != torch.int64:
        raise ValueError(
            f"earlytom::take_inner_positions: x must be [rows, positions, ...] and kept int64 [rows, positions], got "
            f"{x.dim()} axes, and {kept.dtype} with {kept.dim()}"
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
