"""Which tokens of a video stay, by the rule of another method (``method="visionzip"``, in the place of
``select_tokens``).

::

    features [N, P, D], importance [N, P], keys [N, P, d]   ->   tokens [V, budget, D]
    counts [V]                                                   kept: where each stands, in order

A method is a function from one video to its tokens (methods/base.py). What holds for all of them is here: videos are
given to it one by one, its products are never of bfloat16 that it did not ask for, and what it returns is looked at,
since a token too many, or one in the wrong order, would come out as a wrong answer and not as an error.

Every device computes the native body.
"""

from typing import Any

import torch
from torch import Tensor

from earlytom_compile.methods.base import FrameTokens, Kept, Method
from earlytom_compile.methods.registry import method_named


@torch.library.custom_op("earlytom::keep_by_method", mutates_args=())
def keep_by_method(
    features: Tensor, importance: Tensor | None, keys: Tensor | None, counts: Tensor, budget: int, method: str
) -> tuple[Tensor, Tensor]:
    """Every video keeps the ``budget`` tokens that ``method`` keeps of it, each video computed by itself.

    Args:
        features: [N, P, D], any floating dtype and strides; the frames of all videos, in order, as they leave projector
            and pooling.
        importance: [N, P], any floating dtype; the attention that each token receives. The method gets it as float32.
            None if it does not ask for it.
        keys: [N, P, d], likewise.
        counts: int64 [V], frames of each video, at least 1, N in total.
        budget: K, tokens each video keeps, at least 1.
        method: a name that ``method_named`` knows; of a method without ``keep``, every token stays.

    Returns:
        tokens: [V, budget, D], dtype of ``features``.
        kept: int64 [V, budget, 2], the (frame within its video, token) of each, in time order and then in raster order.

    Raises:
        ValueError: shapes or dtypes that do not match, NaN or inf in what is given, counts that do not add up, a video
            with fewer than ``budget`` tokens, something that the method asks for and nobody gives, or a method that
            returns something else than that many finite tokens in order. EarlyTomConfigError: no such method.
    """
    _check(features, importance, keys, counts)
    chosen = _method(method)
    for name, given, wanted in (("importance", importance, chosen.importance), ("keys", keys, chosen.keys)):
        if wanted and given is None:
            raise ValueError(f"earlytom::keep_by_method: method {method!r} asks for {name}, and none is given")
    lengths = _read_lengths(features, importance, keys, counts)
    for frames in lengths:
        _check_budget(budget, frames, features.shape[1])
    parts = (_split(x, lengths) for x in (features, importance, keys))
    kept = [_kept_of(chosen, FrameTokens(*video), budget) for video in zip(*parts, strict=True)]
    tokens, places = torch.stack([each.tokens for each in kept]), torch.stack([each.places for each in kept])
    if chosen.keep is not None:
        _check_values(chosen, tokens, places, lengths, features.shape[1])
    return tokens, places


@keep_by_method.register_fake
def _(
    features: Tensor, importance: Tensor | None, keys: Tensor | None, counts: Tensor, budget: int, method: str
) -> tuple[Tensor, Tensor]:
    _check(features, importance, keys, counts)
    videos = counts.shape[0]
    kept = counts.new_empty((videos, budget, 2), device=features.device)
    return features.new_empty((videos, budget, features.shape[2])), kept


def _check(features: Tensor, importance: Tensor | None, keys: Tensor | None, counts: Tensor) -> None:
    each, channels = ("frames", "tokens"), ("channels",)
    wanted = {"features": (*each, *channels), "importance": each, "keys": (*each, *channels)}
    for given, (name, axes) in zip((features, importance, keys), wanted.items(), strict=True):
        if given is not None and (given.dim() != len(axes) or not given.is_floating_point()):
            raise ValueError(
                f"earlytom::keep_by_method: {name} must be a float tensor [{', '.join(axes)}], got {given.dim()} axes "
                f"of {given.dtype}"
            )
    if counts.dim() != 1 or counts.dtype != torch.int64:
        raise ValueError(
            f"earlytom::keep_by_method: counts must be int64 [videos], got {counts.dtype} with {counts.dim()} axes"
        )


def _method(name: str) -> Method:
    method = method_named(name)
    if method is None:
        raise ValueError(f"earlytom::keep_by_method: {name!r} has operators of its own; give another method")
    return method


def _read_lengths(features: Tensor, importance: Tensor | None, keys: Tensor | None, counts: Tensor) -> list[int]:
    """The frames of each video, after checking shapes and values; one small copy to the host."""
    given = {"features": features, "importance": importance, "keys": keys}
    there = {name: x for name, x in given.items() if x is not None}
    for name, x in there.items():
        if x.shape[:2] != features.shape[:2]:
            raise ValueError(
                f"earlytom::keep_by_method: {name} {list(x.shape)} beside features {list(features.shape)}; both must "
                "have the same frames and tokens"
            )
    finite = [x.float().isfinite().all().view(1).long() for x in there.values()]
    numbers = torch.cat([*finite, counts.to(features.device)]).tolist()
    for name, all_finite in zip(there, numbers, strict=False):
        if not all_finite:
            raise ValueError(
                f"earlytom::keep_by_method: {name} {'holds' if name == 'importance' else 'hold'} NaN or inf; check the "
                "vision encoder for overflow"
            )
    lengths: list[int] = numbers[len(there) :]
    if sum(lengths) != features.shape[0] or min(lengths, default=0) < 1:
        raise ValueError(
            f"earlytom::keep_by_method: counts={lengths} over {features.shape[0]} frames; every video needs at least "
            "one frame and the counts must add up to the frames given"
        )
    return lengths


def _check_budget(budget: int, frames: int, tokens: int) -> None:
    if not 1 <= budget <= frames * tokens:
        raise ValueError(
            f"earlytom::keep_by_method: budget={budget}, but a video has {frames} frames of {tokens} tokens; the "
            f"budget must be in [1, {frames * tokens}]: change the retain ratio"
        )


def _split(x: Tensor | None, lengths: list[int]) -> tuple[Tensor | None, ...]:
    return (None,) * len(lengths) if x is None else x.split(lengths)


def _kept_of(method: Method, video: FrameTokens, budget: int) -> Kept:
    """What the method keeps of one video, of the right shapes, in the dtype of its features."""
    if method.keep is None:
        return _all_of(method, video, budget)
    importance, keys = (None if x is None else x.float() for x in (video.importance, video.keys))
    asked = FrameTokens(video.features, importance if method.importance else None, keys if method.keys else None)
    try:
        with torch.autocast(video.features.device.type, enabled=False):
            returned = method.keep(asked, budget)
    except Exception as error:
        error.add_note(f"in keep() of method {method.name!r}, for {list(video.features.shape)} and K = {budget}")
        raise
    tokens, places = _checked_shapes(method, video.features, returned, budget)
    return Kept(tokens.to(video.features.dtype), places)


def _all_of(method: Method, video: FrameTokens, budget: int) -> Kept:
    frames, tokens = video.features.shape[:2]
    if budget != frames * tokens:
        raise ValueError(
            f"earlytom::keep_by_method: budget={budget} of {frames * tokens} tokens, but method {method.name!r} leaves "
            "none out behind the encoder; give it the budget of all"
        )
    index = torch.arange(budget, device=video.features.device)
    return Kept(video.features.flatten(0, 1), torch.stack([index // tokens, index % tokens], dim=1))


def _checked_shapes(method: Method, features: Tensor, returned: Any, budget: int) -> Kept:
    """``returned`` as it must be, on the device of ``features``."""
    tensors = isinstance(returned, tuple) and len(returned) == 2 and all(isinstance(x, Tensor) for x in returned)
    if not tensors:
        raise _wrong(method, f"a {type(returned).__name__}", "a Kept of two tensors")
    tokens, places = returned
    if tuple(tokens.shape) != (budget, features.shape[2]) or not tokens.is_floating_point():
        wanted = f"float [{budget}, {features.shape[2]}], K tokens"
        raise _wrong(method, f"tokens {list(tokens.shape)} of {tokens.dtype}", wanted)
    if tuple(places.shape) != (budget, 2) or places.dtype != torch.int64:
        raise _wrong(
            method, f"places {list(places.shape)} of {places.dtype}", f"int64 [{budget}, 2], one for each token"
        )
    if tokens.device != features.device or places.device != features.device:
        raise _wrong(method, f"tensors on {tokens.device} and {places.device}", f"tensors on {features.device}")
    return Kept(tokens, places)


def _check_values(method: Method, tokens: Tensor, places: Tensor, lengths: list[int], size: int) -> None:
    """Raise for values that are wrong in any video of [V, K, ...]; one small copy to the host."""
    frame, token = places.unbind(2)
    inside = ((places >= 0).all() & (token < size).all()) & (frame < places.new_tensor(lengths)[:, None]).all()
    index = frame * size + token
    ascending = (index[:, 1:] > index[:, :-1]).all()
    checks = torch.stack([inside, ascending, tokens.isfinite().all()]).tolist()
    if not checks[0]:
        most = ", ".join(map(str, sorted(set(lengths))))
        raise _wrong(method, "places outside the video", f"frames below {most} and tokens below {size}")
    if not checks[1]:
        raise _wrong(method, "places out of order, or one twice", "ascending ones, by frame and then by token")
    if not checks[2]:
        raise _wrong(method, "tokens with NaN or inf", "finite ones, as those it was given")


def _wrong(method: Method, returned: str, wanted: str) -> ValueError:
    return ValueError(f"earlytom::keep_by_method: method {method.name!r} returned {returned}; it must return {wanted}")
