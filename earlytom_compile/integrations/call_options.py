"""Options of a processor's call, by what they are for, where transformers' own processor does not sort them.

padding=True, num_frames=8, do_normalize=False
->  text {"padding": True}    images {"do_normalize": False}    videos {"num_frames": 8, "do_normalize": False}
"""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..config import unknown_option
from ..errors import EarlyTomConfigError

KINDS = ("text_kwargs", "images_kwargs", "videos_kwargs")

# The names in transformers' TextKwargs, ImagesKwargs and VideosKwargs, written out: to import them takes seconds.
# Of those for text, what no tokenizer's signature has; the last two it takes out of its **kwargs.
_TEXT = frozenset(
    ("return_mm_token_type_ids", "return_text_replacement_offsets", "sanitize_control_tokens")
    + ("split_special_tokens", "max_target_length")
)
_PIXELS = frozenset(
    ("do_convert_rgb", "do_resize", "size", "default_to_square", "resample", "do_center_crop", "crop_size", "do_pad")
    + ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    + ("data_format", "input_data_format", "device", "return_tensors")
)
_IMAGES = _PIXELS | {"pad_size", "disable_grouping", "image_seq_length", "image_grid_pinpoints"}
_VIDEOS = _PIXELS | {"do_sample_frames", "num_frames", "fps", "video_metadata", "return_metadata"}

# What only transformers' own processor does, and values that ask for what is done anyway.
_ONLY_THEIRS: Mapping[str, tuple[Any, ...]] = {
    "fps": (),
    "return_metadata": (),
    "do_pad": (),
    "data_format": ("channels_first",),
    "device": ("cpu", torch.device("cpu")),
    "return_mm_token_type_ids": (),
    "return_text_replacement_offsets": (),
}


def option_names(tokenizer: Any) -> dict[str, frozenset[str]]:
    """The options that there are for each of ``KINDS``: transformers' own, and all that this tokenizer takes."""
    parameters = inspect.signature(tokenizer.__call__).parameters.values()
    own = {each.name for each in parameters if each.kind is not each.VAR_KEYWORD} - {"text"}
    return dict(zip(KINDS, (_TEXT | own, _IMAGES, _VIDEOS), strict=True))


def names_of_a_call(tokenizer: Any) -> frozenset[str]:
    """All options that ``apply_chat_template`` hands on; the rest are variables of the template."""
    names = frozenset[str]().union(*option_names(tokenizer).values(), KINDS, ("images", "videos", "common_kwargs"))
    return names - {"sanitize_control_tokens"}  # for text that was marked before, which the tokenizer would do


def options_by_kind(options: Mapping[str, Any], tokenizer: Any) -> list[dict[str, Any]]:
    """What ``options`` say for each of ``KINDS``; one by its own name goes to every kind that has it and wins.

    Raises :class:`EarlyTomConfigError` for a name that is unknown.
    """
    names, rest = option_names(tokenizer), dict(options)
    rest.pop("audio_kwargs", None)
    if rest.pop("audio", None) is not None:
        raise EarlyTomConfigError("audio: this processor takes text, images and videos. Leave it out.")
    common = rest.pop("common_kwargs", None) or {}
    own = {kind: rest.pop(kind, None) or {} for kind in KINDS}
    _require_known([*common, *rest], frozenset[str]().union(*names.values(), KINDS))
    for kind in KINDS:
        _require_known(own[kind], names[kind])
    merged = {kind: {**common, **own[kind], **rest} for kind in KINDS}
    return [{name: value for name, value in merged[kind].items() if name in names[kind]} for kind in KINDS]


def without_theirs(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` without those that take transformers' own processor; raises where they ask for something."""
    asked = [
        name
        for name, value in options.items()
        if name in _ONLY_THEIRS and value not in (None, False, *_ONLY_THEIRS[name])
    ]
    if asked:
        hint = " (num_frames says how many frames to take)" if "fps" in asked else ""
        raise EarlyTomConfigError(
            f"{', '.join(asked)}: only transformers' own processor does that, which needs torchvision and torchcodec. "
            f"Leave it out{hint}, or install both."
        )
    return {name: value for name, value in options.items() if name not in _ONLY_THEIRS}


def _require_known(given: Iterable[str], valid: frozenset[str]) -> None:
    for name in given:
        if name not in valid:
            raise unknown_option(name, sorted(valid))
