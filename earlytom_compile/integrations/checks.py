"""What is asked of a call with videos before anything is encoded: errors for what cannot be right, reasons to run it
uncompressed for what can.

Arguments go by our names (``families/base.py``); messages have the model's.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex, get_args

import torch

from ..errors import EarlyTomConfigError
from ..families.base import Call, Family, Generation, Reason
from .caches import given_cache

_NAMES = ("input_ids", "pixel_values_videos", "inputs_embeds", "attention_mask", "position_ids", "labels")

_BELONG_TOGETHER = {"prompt_method": ("prompt", "prompt_length"), "separators": ("separator",)}
"""What a family says -> what it must define then."""


def _defines(family: Family, name: str) -> bool:
    return getattr(type(family), name) is not getattr(Family, name)


def check_family(model: Any, family: Family) -> None:
    """Raise where what ``family`` says cannot be true of ``model``."""
    kind, whose = type(model), f"the family {family.name}"
    if not _defines(family, "rows"):
        raise EarlyTomConfigError(f"{whose} does not define rows(model, pixels), which every family must.")
    for said, names in _BELONG_TOGETHER.items():
        for name in names:
            if getattr(type(family), said) != getattr(Family, said) and not _defines(family, name):
                raise EarlyTomConfigError(f"{whose} has {said}, and does not define {name}(), which belongs to it.")
    if unknown := [name for name in family.names if name not in _NAMES]:
        raise EarlyTomConfigError(f"{whose} has {unknown[0]!r} in `names`; its keys can be {', '.join(_NAMES)}.")
    if family.generation not in (None, *get_args(Generation)):
        known = ", ".join(map(repr, get_args(Generation)))
        raise EarlyTomConfigError(f"{whose} says generation={family.generation!r}; it can be {known} or None.")
    taken, generating = named_by(kind, "forward"), named_by(kind, "generate")
    for name in dict.fromkeys((*_NAMES[2::-1], *family.names)):
        theirs = family.spelled(name)
        if taken and theirs not in (taken if name in _NAMES[:3] else taken | generating):
            what = ", which is how compressed videos reach the language model" if name == "inputs_embeds" else ""
            raise EarlyTomConfigError(
                f"{kind.__name__}.forward() takes no {theirs}{what}. Its family ({family.name}) must say in `names` "
                f"what the model calls {name}; it takes {', '.join(sorted(taken))}."
            )
    for method, needed in (("embedding", torch.nn.Module), ("video_token", SupportsIndex)):
        try:
            got = getattr(family, method)(model)
        except Exception as error:  # whatever a method of another package meets
            raise EarlyTomConfigError(
                f"{method}() of {whose} fails for {kind.__name__}: {type(error).__name__}: {error}. "
                f"It must say where this model has its {method.replace('_', ' ')}."
            ) from error
        if not isinstance(got, needed):
            wanted = "a module" if method == "embedding" else "a number"
            raise EarlyTomConfigError(f"{method}() of {whose} returned a {type(got).__name__}; must be {wanted}.")


def generation_of(model: Any, family: Family) -> Generation | None:
    """How ``model`` generates, as :attr:`Family.generation` has it; None where no compressed video can reach it."""
    kind, name = type(model), family.spelled("inputs_embeds")
    if family.generation is not None or not hasattr(kind, "generate"):
        return family.generation or "forward"
    mixed_in = any(each.__name__ == "GenerationMixin" for each in kind.__mro__)
    if mixed_in and takes(kind.generate, name):
        return "transformers"
    return "embeddings" if name in first_named_by(kind, "generate") else None


def named_by(kind: type, method: str) -> set[str]:
    """The arguments that a method of a class names, and where it hands on others, those of the classes above it."""
    names: set[str] = set()
    for parameters in _signatures(kind, method):
        names.update(each.name for each in parameters if each.kind not in _REST)
        if not any(each.kind in _REST for each in parameters):
            break
    return names


def first_named_by(kind: type, method: str) -> set[str]:
    """The same of the first class whose method names any: what another would do with ``**kwargs``, nobody knows."""
    found = ({each.name for each in parameters if each.kind not in _REST} for parameters in _signatures(kind, method))
    return next(filter(None, found), set())


def by_place(kind: type, method: str) -> list[str]:
    """The arguments of a method by their place, self left out; of the first class that names them."""
    for parameters in _signatures(kind, method):
        if names := [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]:
            return names
        if not any(each.kind is each.VAR_POSITIONAL for each in parameters):
            break
    return []


_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _signatures(kind: type, method: str) -> Iterator[list[inspect.Parameter]]:
    for each in kind.__mro__:
        if inspect.isfunction(own := vars(each).get(method)):
            parameters = list(inspect.signature(own).parameters.values())
            yield parameters[1:] if parameters and parameters[0].kind not in _REST else parameters


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


def refuse_mixture(family: Family, videos: Any) -> None:
    """Raise where some videos are encoded and others are not."""
    given = list(videos) if isinstance(videos, list | tuple) else []
    if any(video.dim() == 2 for video in given) and not is_encoded(given):
        raise EarlyTomConfigError(
            f"{family.spelled('pixel_values_videos')}: some videos are rows of encode_videos(), others pixels; encode "
            "all of them, or none."
        )


def is_encoded(videos: Any) -> bool:
    """Whether these are rows [K, C] that ``encode_videos`` made."""
    listed = isinstance(videos, list | tuple) and len(videos) > 0
    return listed and all(isinstance(video, torch.Tensor) and video.dim() == 2 for video in videos)


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


def reason_against_generate(model: torch.nn.Module, family: Family) -> Reason:
    """(reason, cure) for ``generate()`` that compressed videos cannot reach."""
    return (
        f"{type(model).__name__}.generate() names no argument {family.spelled('inputs_embeds')}, which is how "
        "compressed videos reach the language model, and its own cache, mask or positions would have the uncut length",
        f"Let it take them, or say in the family ({family.name}) by `generation` how it generates",
    )


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
