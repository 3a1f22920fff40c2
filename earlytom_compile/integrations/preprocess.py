"""The processor of a LLaVA-OneVision checkpoint, also where torchvision is missing.

transformers' own processor needs torchvision for videos, and torchvision's wheel from PyPI does not import
beside a torch without CUDA. Then this file stands in for it, for text and videos, with the same calls:

    processor = load_processor("path/to/checkpoint")
    prompt = processor.apply_chat_template(conversation("What happens?"), add_generation_prompt=True)
    inputs = processor(text=prompt, videos=frames, return_tensors="pt")      # frames: uint8 [F, H, W, 3]
    -> input_ids [1, S], attention_mask [1, S], pixel_values_videos float32 [1, F, 3, 384, 384]

Where each rule comes from, in transformers: ``processing_llava_onevision.py`` (placeholders),
``video_processing_utils.py`` (which file holds the settings; resize, then rescale and normalize at once) and
``processing_utils.py`` (where the chat template is).
"""

import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import AutoTokenizer, BatchFeature
from transformers.utils.hub import cached_file

from ..errors import EarlyTomConfigError

Video = np.ndarray | torch.Tensor
"""uint8 frames, [F, H, W, 3] or [F, 3, H, W]."""

# PIL's numbers for the filters, as checkpoints store them. The rest have no counterpart in torch.
_FILTERS = {2: "bilinear", 3: "bicubic"}


class Processor(Protocol):
    """What callers use of a processor, whoever made it."""

    def __call__(self, *, text: Any, videos: Any, return_tensors: str) -> Mapping[str, torch.Tensor]: ...
    def apply_chat_template(self, conversation: Any, *, add_generation_prompt: bool = False) -> str: ...
    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> str: ...


def conversation(question: str) -> list[dict[str, Any]]:
    """One user turn: a video, then ``question``."""
    return [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]


def load_processor(model: str) -> Processor:
    """The processor of a checkpoint folder or Hub id: transformers' own, or ours without torchvision.

    Raises :class:`EarlyTomConfigError` if torchvision is there but broken, or the checkpoint lacks a part.
    """
    if not torchvision_works():
        return VideoTextProcessor.from_pretrained(model)
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(model)


def torchvision_works() -> bool:
    """False without torchvision; raises if it is there but does not import, for then no model class does."""
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        raise EarlyTomConfigError(
            f"torchvision is installed but does not fit torch {torch.__version__} ({error}), which keeps "
            "transformers from loading the model. Uninstall torchvision (nothing here needs it), or install "
            "the one made for this torch."
        ) from error
    return True


def frame_resizer(processor: Any) -> Callable[[np.ndarray], np.ndarray]:
    """What ``processor`` does first to each frame of a video, for ``read_video(..., resize=)``.

    uint8 [H, W, 3] -> uint8 [h, w, 3]. The processor leaves frames of that size as they are, so its result is the same
    bit for bit, and no video need be in memory at its full size. ``processor``: of :func:`load_processor` or
    transformers' own.
    """
    if isinstance(processor, VideoTextProcessor):
        return lambda frame: _channels_last(processor.pixels.resized(frame[None])[0])
    resize = getattr(processor, "video_processor", processor)
    # A crop would be taken again from what it left.
    only = {"do_rescale": False, "do_normalize": False, "do_center_crop": False, "return_tensors": "pt"}
    return lambda frame: _channels_last(resize(videos=[frame[None]], **only)["pixel_values_videos"][0, 0])


def _channels_last(frame: torch.Tensor) -> np.ndarray:
    return frame.permute(1, 2, 0).contiguous().numpy()


@dataclass(frozen=True)
class PixelSettings:
    """The part of a checkpoint's video settings that decides the pixels, with transformers' defaults."""

    size: Mapping[str, int]
    resample: int = 3
    image_mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711)
    rescale_factor: float = 1 / 255
    do_resize: bool = True
    do_rescale: bool = True
    do_normalize: bool = True

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "PixelSettings":
        """Read a checkpoint's settings; raises :class:`EarlyTomConfigError` where it takes torchvision."""
        known = {field.name for field in fields(cls)}
        given = {key: value for key, value in settings.items() if key in known and value is not None}
        made = cls(**{"size": {"height": 384, "width": 384}, **given})
        crop = settings.get("do_center_crop")
        if {"height", "width"} - set(made.size) or made.resample not in _FILTERS or crop:
            raise EarlyTomConfigError(
                f"video settings size={dict(made.size)}, resample={made.resample}, do_center_crop={crop} "
                "need torchvision: without it there must be a height and a width, resample 2 or 3, and no "
                "center crop. Install torchvision."
            )
        return made

    def apply(self, frames: Video) -> torch.Tensor:
        """uint8 [F, H, W, 3] or [F, 3, H, W] -> float32 [F, 3, height, width], bit for bit as torchvision."""
        return self._normalized(self.resized(frames).float())

    def resized(self, frames: Video) -> torch.Tensor:
        """The first half of :meth:`apply`: uint8 [F, 3, height, width]. Frames of that size stay as they are."""
        pixels = torch.as_tensor(frames)
        if pixels.ndim != 4 or pixels.dtype != torch.uint8 or 3 not in (pixels.shape[1], pixels.shape[3]):
            raise EarlyTomConfigError(
                f"a video of shape {tuple(pixels.shape)} and dtype {pixels.dtype}: "
                "must be uint8 frames, [F, H, W, 3] or [F, 3, H, W]."
            )
        if pixels.shape[1] != 3:
            pixels = pixels.permute(0, 3, 1, 2).contiguous()
        size = (self.size["height"], self.size["width"])
        if self.do_resize and pixels.shape[-2:] != size:
            pixels = torch.nn.functional.interpolate(
                pixels, size, mode=_FILTERS[self.resample], align_corners=False, antialias=True
            )
        return pixels

    def _normalized(self, pixels: torch.Tensor) -> torch.Tensor:
        if not self.do_normalize:
            return pixels * self.rescale_factor if self.do_rescale else pixels
        # Rescaling is folded into mean and std, not done first: the last bit depends on it.
        scale = 1.0 / self.rescale_factor if self.do_rescale else 1.0
        mean, std = (torch.tensor(values) * scale for values in (self.image_mean, self.image_std))
        return pixels.sub(mean.view(-1, 1, 1)).div(std.view(-1, 1, 1))


@dataclass(frozen=True)
class VideoTextProcessor:
    """Text and videos to model inputs, without torchvision; see the module's docstring for the calls."""

    tokenizer: Any
    pixels: PixelSettings
    tokens_per_frame: int
    """P = ceil(h/2)·ceil(w/2) of the encoder's h×w grid: what 2×2 pooling leaves."""
    video_token: str
    chat_template: str | None

    @classmethod
    def from_pretrained(cls, model: str) -> "VideoTextProcessor":
        """Read tokenizer, chat template and video settings of a checkpoint folder or Hub id."""
        tokenizer = AutoTokenizer.from_pretrained(model)
        processor = _read_json(model, "processor_config.json")
        settings = (
            processor.get("video_processor")
            or _read_json(model, "video_preprocessor_config.json")
            or _read_json(model, "preprocessor_config.json")
        )
        if not settings:
            raise EarlyTomConfigError(
                f"{model!r} has no video settings: processor_config.json, video_preprocessor_config.json or "
                "preprocessor_config.json must be there."
            )
        return cls(
            tokenizer=tokenizer,
            pixels=PixelSettings.from_settings(settings),
            tokens_per_frame=_tokens_per_frame(model, processor),
            video_token=getattr(tokenizer, "video_token", None) or processor.get("video_token", "<video>"),
            chat_template=_chat_template(model, processor) or tokenizer.chat_template,
        )

    def __call__(
        self,
        *,
        text: str | Sequence[str],
        videos: Video | Sequence[Video],
        return_tensors: str = "pt",
        **options: Any,
    ) -> BatchFeature:
        """``text`` with one ``<video>`` for each of ``videos``, in order; ``options`` go to the tokenizer.

        Returns ``input_ids``, ``attention_mask`` int64 [R, S] and ``pixel_values_videos`` float32
        [V, F, 3, H, W]. Rows of different length need ``padding=True``. Raises :class:`EarlyTomConfigError`
        where text and videos do not match, and where videos differ in their number of frames.
        """
        if return_tensors != "pt":
            raise EarlyTomConfigError(f'return_tensors={return_tensors!r}: must be "pt".')
        texts = [text] if isinstance(text, str) else list(text)
        clips = [videos] if isinstance(videos, np.ndarray | torch.Tensor) and videos.ndim == 4 else list(videos)
        frames = sorted({len(clip) for clip in clips})
        if len(frames) > 1:
            raise EarlyTomConfigError(f"videos of {frames} frames: all videos of a call must have as many.")
        pixels = torch.stack([self.pixels.apply(clip) for clip in clips])
        encoded = self.tokenizer(self._expand(texts, clips), return_tensors="pt", **options)
        return BatchFeature({**encoded, "pixel_values_videos": pixels})

    def apply_chat_template(self, conversation: Any, *, add_generation_prompt: bool = False) -> str:
        """The conversation as the checkpoint's chat template writes it."""
        if self.chat_template is None:
            raise EarlyTomConfigError("the checkpoint has no chat template: write <video> into the text yourself.")
        return self.tokenizer.apply_chat_template(
            conversation,
            chat_template=self.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> str:
        """Tokens back to text."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def _expand(self, texts: list[str], clips: list[Video]) -> list[str]:
        """One placeholder a video -> one for each feature the model puts there: F·P, and the separator."""
        asked = sum(text.count(self.video_token) for text in texts)
        if asked != len(clips):
            raise EarlyTomConfigError(
                f"the text has {asked} {self.video_token} but {len(clips)} video(s) came: give one each."
            )
        counts = iter([len(clip) * self.tokens_per_frame + 1 for clip in clips])
        expanded = []
        for text in texts:
            first, *rest = text.split(self.video_token)
            expanded.append(first + "".join(self.video_token * next(counts) + part for part in rest))
        return expanded


def _tokens_per_frame(model: str, processor: Mapping[str, Any]) -> int:
    patches = processor.get("num_image_tokens")
    if patches is None:
        vision = _read_json(model, "config.json")["vision_config"]
        patches = (vision["image_size"] // vision["patch_size"]) ** 2
    return math.ceil(math.isqrt(patches) / 2) ** 2


def _chat_template(model: str, processor: Mapping[str, Any]) -> str | None:
    """The processor's template from wherever the checkpoint's age has put it, in transformers' order."""
    template = processor.get("chat_template") or _read_json(model, "chat_template.json").get("chat_template")
    return template or _read_text(model, "chat_template.jinja")


def _read_json(model: str, name: str) -> dict[str, Any]:
    """A JSON file of the checkpoint, empty if there is none."""
    return json.loads(_read_text(model, name) or "{}")


def _read_text(model: str, name: str) -> str | None:
    file = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
    return None if file is None else Path(file).read_text(encoding="utf-8")
