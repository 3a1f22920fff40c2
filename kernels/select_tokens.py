"""Which tokens of the merged frames reach the language model (algorithm.md, stage 2, points 3 to 5).

::

    features [N, P, D]             tokens [V, budget, D]   (paper: every video the same budget)
    importance [N, P]        ->    tokens [M, D]           (released: M depends on the content)
    dynamic [N], counts [V]        kept: where each came from, in time order, then raster order

A dynamic frame keeps its most important tokens wherever they are. A static frame is cut in raster order into
as many near-equal runs as it keeps tokens, and the best of each run stays, so that its tokens keep their
spread. Both come from one order: of equal importance the lower index wins, on every device.
"""

import math

import torch
from torch import Tensor

from earlytom_compile.kernels.providers import Provider, provide

_PLACES = ("device", "host", "auto")
_MOST_TOKENS = 1024  # of a frame, in the Triton kernels, which compare every token with every other


@torch.library.custom_op("earlytom::select_tokens", mutates_args=())
def select_tokens(
    features: Tensor,
    importance: Tensor,
    dynamic: Tensor,
    counts: Tensor,
    budget: int,
    *,
    static_selection: str = "device",
) -> tuple[Tensor, Tensor]:
    """Paper variant: every video keeps exactly ``budget`` tokens.

    Each of a video's n frames keeps budget // n tokens; the rest goes one each to its dynamic frames in
    order, then to its static ones.

    Args:
        features: [N, P, D], any dtype and strides; the merged frames of all videos, in order.
        importance: float [N, P], no NaN.
        dynamic: bool [N], from ``dynamic_frames``.
        counts: int64 [V], frames of each video, at least 1, N in total.
        budget: tokens each video keeps, at least 1.
        static_selection: where a GPU's static frames are selected, with the same result: "device", "host" (the
            CPU, meanwhile; host_selection.py), or "auto", what a measurement at the first call says.

    Returns:
        tokens: [V, budget, D], dtype of ``features``.
        kept: int64 [V, budget, 2], the (frame within its video, token) of each, in time order and then in
            raster order.

    Raises:
        ValueError: shapes that do not match, NaN in the importance, or a video with fewer than ``budget``
            tokens. A provider that does not read values takes NaN for the least importance, and fills a row
            that gets no token, for want of tokens or of counts that add up, with 0 and its ``kept`` with -1.
    """
    check_shapes(features, importance, dynamic, counts, "select_tokens")
    check_place(static_selection, "select_tokens")
    videos = read_videos(importance, dynamic, counts, "select_tokens")
    quotas = paper_quotas(videos, budget, features.shape[1])
    frame, token = keep_tokens(importance, dynamic, sum(quotas, []))
    first = _first_frames(videos, importance.device)
    kept = torch.stack([frame - first[frame], token], dim=1)
    shape = (len(videos), budget)
    return features[frame, token].unflatten(0, shape), kept.unflatten(0, shape)


@select_tokens.register_fake
def _(
    features: Tensor,
    importance: Tensor,
    dynamic: Tensor,
    counts: Tensor,
    budget: int,
    *,
    static_selection: str = "device",
) -> tuple[Tensor, Tensor]:
    check_place(static_selection, "select_tokens")
    _check(features, importance, dynamic, counts, "select_tokens")
    videos = counts.shape[0]
    kept = counts.new_empty((videos, budget, 2), device=features.device)
    return features.new_empty((videos, budget, features.shape[2])), kept


@torch.library.custom_op("earlytom::select_tokens_released", mutates_args=())
def select_tokens_released(
    features: Tensor,
    importance: Tensor,
    dynamic: Tensor,
    counts: Tensor,
    frames: int,
    retain_ratio: float,
    *,
    static_selection: str = "device",
) -> tuple[Tensor, Tensor, Tensor]:
    """Released variant: the ratio of each frame depends on how many frames its video has left.

    With n frames left of ``frames``, r' = min(retain_ratio / (n / frames), 1) in float64, in this order, as
    the released code computes it; a dynamic frame keeps ceil(P r') tokens, a static one max(1,
    round-half-even(P r')).

    Args:
        features, importance, dynamic, counts: as in ``select_tokens``.
        frames: frames each video had before any merge, at least 1.
        retain_ratio: share of the tokens to keep, in (0, 1].
        static_selection: as in ``select_tokens``.

    Returns:
        tokens: [M, D], dtype of ``features``.
        kept: int64 [M, 3], the (video, frame within the video, token) of each, in that order.
        kept_counts: int64 [V], the tokens of each video, M in total.

    Raises:
        ValueError: as ``select_tokens``; or ``frames`` or ``retain_ratio`` out of range.
    """
    check_shapes(features, importance, dynamic, counts, "select_tokens_released")
    check_place(static_selection, "select_tokens_released")
    check_ratio(frames, retain_ratio)
    videos = read_videos(importance, dynamic, counts, "select_tokens_released")
    per_video = released_quotas(videos, frames, retain_ratio, features.shape[1])
    frame, token = keep_tokens(importance, dynamic, sum(per_video, []))
    first = _first_frames(videos, importance.device)
    video_of = torch.tensor([index for index, video in enumerate(videos) for _ in video]).to(frame.device)
    kept = torch.stack([video_of[frame], frame - first[frame], token], dim=1)
    kept_counts = torch.tensor([sum(quotas) for quotas in per_video]).to(counts.device)
    return features[frame, token], kept, kept_counts


@select_tokens_released.register_fake
def _(
    features: Tensor,
    importance: Tensor,
    dynamic: Tensor,
    counts: Tensor,
    frames: int,
    retain_ratio: float,
    *,
    static_selection: str = "device",
) -> tuple[Tensor, Tensor, Tensor]:
    check_place(static_selection, "select_tokens_released")
    _check(features, importance, dynamic, counts, "select_tokens_released")
    rows = torch.library.get_ctx().new_dynamic_size(min=1)
    kept = counts.new_empty((rows, 3), device=features.device)
    return features.new_empty((rows, features.shape[2])), kept, counts.new_empty(counts.shape)


def _check(features: Tensor, importance: Tensor, dynamic: Tensor, counts: Tensor, op: str) -> None:
    if features.dim() != 3 or importance.dim() != 2 or not importance.is_floating_point():
        raise ValueError(
            f"earlytom::{op}: features must be [frames, tokens, channels] and importance a float tensor "
            f"[frames, tokens], got {features.dim()} axes, and {importance.dim()} axes of {importance.dtype}"
        )
    if dynamic.dim() != 1 or dynamic.dtype != torch.bool or counts.dim() != 1 or counts.dtype != torch.int64:
        raise ValueError(
            f"earlytom::{op}: dynamic must be bool [frames] and counts int64 [videos], got {dynamic.dtype} "
            f"with {dynamic.dim()} axes and {counts.dtype} with {counts.dim()}"
        )


def check_shapes(features: Tensor, importance: Tensor, dynamic: Tensor, counts: Tensor, op: str) -> None:
    """What a provider has to refuse, all of it known without a look at the values."""
    _check(features, importance, dynamic, counts, op)
    agree = importance.shape == features.shape[:2] and dynamic.shape[0] == features.shape[0]
    if not agree or features.shape[1] == 0:
        raise ValueError(
            f"earlytom::{op}: features {list(features.shape)}, importance {list(importance.shape)} and "
            f"dynamic {list(dynamic.shape)} must agree on frames and tokens, with at least one token"
        )


def check_budget(budget: int, frames: int, tokens: int) -> None:
    if not 1 <= budget <= frames * tokens:
        raise ValueError(
            f"earlytom::select_tokens: budget={budget}, but a video has {frames} frames of {tokens} tokens; the "
            f"budget must be in [1, {frames * tokens}]: merge fewer frames or lower the retain ratio"
        )


def check_place(static_selection: str, op: str) -> None:
    if static_selection not in _PLACES:
        raise ValueError(
            f"earlytom::{op}: static_selection={static_selection!r}; use one of {', '.join(map(repr, _PLACES))}"
        )


def check_ratio(frames: int, retain_ratio: float) -> None:
    if frames < 1 or not 0.0 < retain_ratio <= 1.0:
        raise ValueError(
            f"earlytom::select_tokens_released: frames={frames}, retain_ratio={retain_ratio}; frames must be "
            f"at least 1 and retain_ratio in (0, 1]"
        )


def read_videos(importance: Tensor, dynamic: Tensor, counts: Tensor, op: str) -> list[list[bool]]:
    """The dynamic flags of each video's frames, after checking the values; one small copy to the host."""
    total = importance.shape[0]
    device = importance.device
    nan = importance.isnan().any()
    packed = torch.cat([nan.view(1).long(), dynamic.to(device).long(), counts.to(device)]).tolist()
    flags, lengths = [bool(flag) for flag in packed[1 : total + 1]], packed[total + 1 :]
    if packed[0]:
        raise ValueError(f"earlytom::{op}: importance holds NaN; check queries and keys of the encoder for overflow")
    if sum(lengths) != total or min(lengths, default=0) < 1:
        raise ValueError(
            f"earlytom::{op}: counts={lengths} over {total} frames; every video needs at least one frame and "
            f"the counts must add up to the frames given"
        )
    ends = [sum(lengths[: video + 1]) for video in range(len(lengths))]
    return [flags[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def paper_quotas(videos: list[list[bool]], budget: int, tokens: int) -> list[list[int]]:
    """How many of its ``tokens`` each frame of each video keeps, from the frames' dynamic flags."""
    for video in videos:
        check_budget(budget, len(video), tokens)
    return [_share_out(video, budget) for video in videos]


def _share_out(video: list[bool], budget: int) -> list[int]:
    base, left = divmod(budget, len(video))
    order = sorted(range(len(video)), key=lambda frame: not video[frame])
    favoured = set(order[:left])
    return [base + (frame in favoured) for frame in range(len(video))]


def released_quotas(videos: list[list[bool]], frames: int, retain_ratio: float, tokens: int) -> list[list[int]]:
    """As ``paper_quotas``, by the released code's arithmetic."""
    quotas = []
    for video in videos:
        ratio = min(retain_ratio / (len(video) / frames), 1.0)
        dynamic, static = math.ceil(tokens * ratio), max(1, round(tokens * ratio))
        quotas.append([dynamic if flag else static for flag in video])
    return quotas


def _first_frames(videos: list[list[bool]], device: torch.device) -> Tensor:
    """int64 [N]: for every frame the row at which its video begins."""
    lengths = [len(video) for video in videos]
    firsts = [sum(lengths[:video]) for video, length in enumerate(lengths) for _ in range(length)]
    return torch.tensor(firsts).to(device)


def keep_tokens(importance: Tensor, dynamic: Tensor, quotas: list[int]) -> tuple[Tensor, Tensor]:
    """(frame, token) int64 of every kept token; frame t keeps ``quotas[t]``."""
    quota = torch.tensor(quotas).to(importance.device)
    return keep_quota(importance, dynamic, quota, sum(quotas))


def keep_quota(importance: Tensor, dynamic: Tensor, quota: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The same with ``quota`` int64 [N] on the device, ``total`` in all; the host waits for nothing."""
    frames, tokens = importance.shape
    device, quota = importance.device, quota[:, None]
    position = torch.arange(tokens, device=device)
    # Adding 0 turns -0.0 into 0.0, which some device sorts order below it.
    order = torch.sort(importance.contiguous() + 0.0, dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(1, order, position.expand(frames, tokens))
    keep = torch.where(dynamic.to(device)[:, None], rank < quota, _best_of_run(rank, quota))
    # Not nonzero(): it would make the host wait for the device once more. The last place is for the rest.
    flat = keep.view(-1)
    place = torch.where(flat, flat.cumsum(0) - 1, total)
    kept = place.new_empty(total + 1).scatter_(0, place, torch.arange(frames * tokens, device=device))[:total]
    return kept // tokens, kept % tokens


def _best_of_run(rank: Tensor, quota: Tensor) -> Tensor:
    """bool [N, P]: the best token of each of a frame's ``quota`` near-equal runs, larger runs first."""
    frames, tokens = rank.shape
    position = torch.arange(tokens, device=rank.device)
    # A frame that keeps nothing gets one run here; the comparison with its quota below empties it again.
    runs = quota.clamp_min(1)
    small, larger = tokens // runs, tokens % runs
    in_larger = position < larger * (small + 1)
    run = torch.where(in_larger, position // (small + 1), larger + (position - larger * (small + 1)) // small)
    best = rank.new_full((frames, tokens), tokens).scatter_reduce_(1, run, rank, "amin")
    return (rank == best.gather(1, run)) & (quota > 0)


def _triton_supports(
    features: Tensor, importance: Tensor, dynamic: Tensor, counts: Tensor, *options: object, **places: object
) -> bool:
    return (
        importance.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and features.dim() == 3
        and features.dtype.itemsize <= 8
        and features.shape[1] <= _MOST_TOKENS
        and features.device == importance.device == dynamic.device == counts.device
    )


provide(select_tokens, Provider("triton", ".triton_select_tokens", supports=_triton_supports))
provide(select_tokens_released, Provider("triton", ".triton_select_tokens_released", supports=_triton_supports))
