"""What is asked of a call with videos before anything is encoded: errors for what cannot be right, reasons to run it
uncompressed for what can.

Arguments go by our names (``families/base.py``); messages have the model's.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..errors import EarlyTomConfigError
from ..families.base import Call, Family, Reason
from .caches import given_cache


def require_tensors(family: Family, videos: Any) -> None:
    """Raise for anything but None, a tensor, or a list of tensors."""
    if videos is None or isinstance(videos, torch.Tensor):
        return
    given = f"a {type(videos).__name__}"
    if isinstance(videos, list | tuple):
        others = [type(video).__name__ for video in videos if not isinstance(video, torch.Tensor)]
        if videos and not others:
            return
        given += f" of {others[0]}" if others else " of nothing"
    raise EarlyTomConfigError(
        f"{family.spelled('pixel_values_videos')}: {given}; must be a tensor [videos, frames, channels, height, width] "
        "or a list of tensors, as the model's processor makes them. Leave it out where there is no video."
    )


def is_encoded(videos: Any) -> bool:
    """Whether these are rows [K, C] that ``encode_videos`` made."""
    return not isinstance(videos, torch.Tensor) and len(videos) > 0 and all(video.dim() == 2 for video in videos)


def check_rows(videos: Sequence[torch.Tensor], width: int) -> None:
    """Raise for rows that the language model, ``width`` channels wide, cannot take."""
    for video in videos:
        if video.shape[1] != width or not len(video):
            raise EarlyTomConfigError(
                f"an encoded video has shape {tuple(video.shape)}; it must be [rows, {width}], as "
                "earlytom_compile.encode_videos(model, ...) returns it for this model."
            )


def check_prompt(family: Family, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Raise for shapes that do not fit."""
    name = family.spelled("input_ids")
    if ids.dim() != 2:
        raise EarlyTomConfigError(f"{name} have shape {tuple(ids.shape)}; they must be [rows, prompt length].")
    if mask is not None and mask.shape != ids.shape:
        raise EarlyTomConfigError(
            f"{family.spelled('attention_mask')} has shape {tuple(mask.shape)} and {name} {tuple(ids.shape)}; they "
            "must be equal."
        )


def reason_against_prompt(family: Family, ids: Any, call: Call) -> Reason | None:
    """(reason, cure) for a call with videos that is not a prompt with placeholders."""
    if not isinstance(ids, torch.Tensor) or call.get("inputs_embeds") is not None:
        name, other = family.spelled("input_ids"), family.spelled("inputs_embeds")
        return f"the prompt is not given as {name}", f"Pass {name}, not {other}"
    cache = given_cache(call)
    if cache is not None and (not hasattr(cache, "get_seq_length") or cache.get_seq_length() > 0):
        return "the call continues a cache that is already filled", "Start with an empty cache"
    mask = call.get("attention_mask")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
        return "the attention mask is not [rows, prompt length]", "Pass the attention_mask of the processor"
    return None


def reason_against_forward(model: torch.nn.Module, call: Call) -> Reason | None:
    """(reason, cure) for a call of ``forward()`` that cannot be compressed."""
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters()):
        return (
            "gradients are enabled and the model's parameters require them; compression is for inference only",
            "Wrap the call in torch.inference_mode() or torch.no_grad()",
        )
    if isinstance(call.get("logits_to_keep"), torch.Tensor):
        return "logits_to_keep names positions of the uncut prompt", "Give logits_to_keep as a number"
    return None


def continues(call: Call) -> bool:
    """Whether a call goes on behind a prompt that is in the cache already."""
    cache = given_cache(call)
    return hasattr(cache, "get_seq_length") and cache.get_seq_length() > 0


def for_own_code(call: Mapping[str, Any], reason: str) -> Mapping[str, Any]:
    """The arguments of a call that runs the model's own code, which takes videos as one tensor only."""
    videos = call.get("pixel_values_videos")
    if videos is None or isinstance(videos, torch.Tensor) or not len(videos):
        return call
    if len({video.shape for video in videos}) > 1:
        raise EarlyTomConfigError(
            f"videos of shapes {[tuple(video.shape) for video in videos]} can only run compressed, but {reason}. Cure "
            "that, or give videos of different lengths in calls of their own."
        )
    return {**call, "pixel_values_videos": torch.stack(list(videos))}


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether ``function`` has an argument of this name, or takes all that there are."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())
