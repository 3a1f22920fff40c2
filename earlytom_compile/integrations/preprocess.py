"""The processor of a LLaVA-OneVision checkpoint, also where torchvision is missing.

transformers' own processor needs torchvision for videos, and torchvision's wheel from PyPI does not import
beside a torch without CUDA. Then this file stands in for it, for text, videos and images, with the same calls:

    processor = load_processor("path/to/checkpoint")
    prompt = processor.apply_chat_template(conversation("What happens?"), add_generation_prompt=True)
    inputs = processor(text=prompt, videos=frames, return_tensors="pt")      # frames: uint8 [F, H, W, 3]
    -> input_ids [1, S], attention_mask [1, S], pixel_values_videos float32 [1, F, 3, 384, 384]

    video = {"type": "video", "path": "talk.mp4"}                            # or "url", or frames as "video"
    turn = {"role": "user", "content": [video, {"type": "text", "text": "What happens?"}]}
    inputs = processor.apply_chat_template(
        [turn], num_frames=32, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )

Where it does otherwise: frames of a file are spread over all of it, the last one included, as for LLaVA-OneVision's
training (transformers leaves the end out); a file without ``num_frames`` gives 32 frames, or all if it has fewer; and
videos of different lengths in one call come back as a list, which ``earlytom_compile.compile(model)`` takes.

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

_DEFAULT_FRAMES = 32  # of a file, where nobody says how many

# PIL's numbers for the filters, as checkpoints store them. The rest have no counterpart in torch.
_FILTERS = {2: "bilinear", 3: "bicubic"}


class Processor(Protocol):
    """What callers use of a processor, whoever made it."""

    def __call__(self, *, text: Any, videos: Any, return_tensors: str) -> Mapping[str, torch.Tensor]: ...
    def apply_chat_template(self, conversation: Any, *, add_generation_prompt: bool = False) -> Any: ...
    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> Any: ...


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
class ImageProcessing:
    """Images to pixels and placeholders: transformers' own code, which needs Pillow and no torchvision."""

    checkpoint: str
    patches: int
    """Of the encoder's grid, as in ``num_image_tokens``."""
    token: str = "<image>"
    feature_strategy: str = "full"
    aspect_ratio: str = "anyres_max_9"

    def __call__(self, images: Any, **options: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
        """``images``: one, a list, or a list for each prompt; pictures of Pillow, arrays, paths or addresses.

        Returns the model's inputs, and for each image in reading order its placeholders."""
        try:
            from transformers.models.llava_onevision import image_processing_pil_llava_onevision as pillow
            from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

            processor: Any = pillow.LlavaOnevisionImageProcessorPil.from_pretrained(self.checkpoint)
        except ImportError as error:
            raise EarlyTomConfigError(f"images need Pillow: pip install pillow ({error}).") from error
        inputs = processor(processor.fetch_images(_without_paths(images)), return_tensors="pt", **options)
        # Its own constructor wants a video processor, which is what needs torchvision.
        counter: Any = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
        counter.image_processor, counter.image_token, counter.num_image_tokens = processor, self.token, self.patches
        counter.vision_feature_select_strategy, counter.vision_aspect_ratio = self.feature_strategy, self.aspect_ratio
        return inputs, [counter.replace_image_token(inputs, i) for i in range(len(inputs["image_sizes"]))]


# What apply_chat_template hands on; the rest are variables of the template.
_CALL_OPTIONS = frozenset(
    ("images", "videos", "images_kwargs", "videos_kwargs", "text_kwargs", "common_kwargs", "video_metadata")
    + ("num_frames", "fps", "do_sample_frames", "padding", "padding_side", "truncation", "max_length")
    + ("pad_to_multiple_of", "add_special_tokens", "return_token_type_ids", "return_attention_mask")
)


@dataclass(frozen=True)
class VideoTextProcessor:
    """Text, videos and images to model inputs, without torchvision; see the module's docstring for the calls."""

    tokenizer: Any
    pixels: PixelSettings
    tokens_per_frame: int
    """P = ceil(h/2)·ceil(w/2) of the encoder's h×w grid: what 2×2 pooling leaves."""
    video_token: str
    chat_template: str | None
    images: ImageProcessing | None = None

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
        patches = _patches_per_frame(model, processor)
        return cls(
            tokenizer=tokenizer,
            pixels=PixelSettings.from_settings(settings),
            tokens_per_frame=math.ceil(math.isqrt(patches) / 2) ** 2,
            video_token=getattr(tokenizer, "video_token", None) or processor.get("video_token", "<video>"),
            chat_template=_chat_template(model, processor) or tokenizer.chat_template,
            images=ImageProcessing(
                model,
                patches,
                getattr(tokenizer, "image_token", None) or processor.get("image_token", "<image>"),
                processor.get("vision_feature_select_strategy") or "full",
                processor.get("vision_aspect_ratio") or "anyres_max_9",
            ),
        )

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        return_tensors: str = "pt",
        **options: Any,
    ) -> BatchFeature:
        """``text`` with one ``<video>`` for each of ``videos`` and one ``<image>`` for each of ``images``, in order.

        A video is frames uint8 [F, H, W, 3] or [F, 3, H, W], a list of pictures, or the path or address of a file, of
        which ``num_frames`` frames are taken. Several videos: a list, or a list for each prompt. Other ``options`` go
        to the tokenizer; rows of different length need ``padding=True``.

        Returns ``input_ids``, ``attention_mask`` int64 [R, S] and ``pixel_values_videos`` float32 [V, F, 3, H, W], or
        a list of [F, 3, H, W] where the videos differ in their number of frames; with images ``pixel_values``,
        ``image_sizes`` and ``batch_num_images`` as transformers makes them. Raises :class:`EarlyTomConfigError` where
        text, videos and images do not match.
        """
        if return_tensors not in ("pt", "auto"):
            raise EarlyTomConfigError(f'return_tensors={return_tensors!r}: must be "pt".')
        if text is None:
            raise EarlyTomConfigError(f"no text came: give a prompt, with a {self.video_token} for each video.")
        for_videos = {**options.pop("videos_kwargs", {}), **_taken(options, "num_frames", "fps", "do_sample_frames")}
        for_images = options.pop("images_kwargs", {})
        options = {**options.pop("common_kwargs", {}), **options.pop("text_kwargs", {}), **options}
        options.pop("video_metadata", None)  # decoding reads it itself
        texts = [text] if isinstance(text, str) else list(text)
        found: dict[str, Any] = {}
        clips = _videos_of(videos, frame_resizer(self), **for_videos)
        counts = [len(clip) * self.tokens_per_frame + 1 for clip in clips]  # one more: the separator
        texts = _expand(texts, self.video_token, [self.video_token * count for count in counts])
        if images is not None and self.images is not None:
            found, placeholders = self.images(images, **for_images)
            texts = _expand(texts, self.images.token, placeholders)
        elif self.images is not None:
            texts = _expand(texts, self.images.token, [])
        if clips:
            pixels = [self.pixels.apply(clip) for clip in clips]
            found["pixel_values_videos"] = torch.stack(pixels) if len(set(counts)) == 1 else pixels
        return BatchFeature({**self.tokenizer(texts, return_tensors="pt", **options), **found})

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str = "pt",
        processor_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """The conversation (or each of several) as the checkpoint's chat template writes it.

        With ``tokenize`` its ``input_ids``, and with ``return_dict`` all inputs of the model: videos and images are
        those in the conversation (``"path"``, ``"url"``, or ``"video"`` and ``"image"``). ``processor_kwargs``, or the
        same as ``options``, are what :meth:`__call__` takes, such as ``num_frames`` and ``padding``.
        """
        template = chat_template or self.chat_template
        if template is None:
            raise EarlyTomConfigError("the checkpoint has no chat template: write <video> into the text yourself.")
        call = {**(processor_kwargs or {}), **_taken(options, *_CALL_OPTIONS)}
        prompt = self.tokenizer.apply_chat_template(
            conversation,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **options,
        )
        if not tokenize:
            return prompt
        conversations = [conversation] if isinstance(prompt, str) else conversation
        videos = [_sources(one, "video", ("video", "url", "path")) for one in conversations]
        pictures = [_sources(one, "image", ("image", "url", "path", "base64")) for one in conversations]
        given = {"videos": [v for of_one in videos for v in of_one], "images": pictures if any(pictures) else None}
        begin = self.tokenizer.bos_token
        if begin is not None and (prompt if isinstance(prompt, str) else prompt[0]).startswith(begin):
            call.setdefault("add_special_tokens", False)
        inputs = self(text=prompt, return_tensors=return_tensors, **{**given, **call})
        return inputs if return_dict else inputs["input_ids"]

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False, **options: Any) -> Any:
        """Tokens back to text."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, **options)

    def batch_decode(self, sequences: Any, *, skip_special_tokens: bool = False, **options: Any) -> list[str]:
        """Several rows of tokens back to text."""
        return self.tokenizer.batch_decode(sequences, skip_special_tokens=skip_special_tokens, **options)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **options: Any
    ) -> list[str]:
        """What ``generate`` returned, as text."""
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **options)


def _expand(texts: list[str], token: str, replacements: Sequence[str]) -> list[str]:
    """One placeholder -> one for each feature the model puts there."""
    asked = sum(text.count(token) for text in texts)
    if asked != len(replacements):
        kind = token.strip("<>")
        raise EarlyTomConfigError(
            f"the text has {asked} {token} but {len(replacements)} {kind}(s) came: give one each."
        )
    remaining = iter(replacements)
    expanded = []
    for text in texts:
        first, *rest = text.split(token)
        expanded.append(first + "".join(next(remaining) + part for part in rest))
    return expanded


def _taken(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """Those of ``options`` that have these names, which they lose."""
    return {name: options.pop(name) for name in names if name in options}


def _sources(conversation: Any, kind: str, keys: Sequence[str]) -> list[Any]:
    """Videos or images that stand in a conversation, in reading order."""
    found = []
    for turn in conversation:
        content = turn.get("content") or ()
        for part in () if isinstance(content, str) else content:
            if part.get("type") == kind:
                found += [part[key] for key in keys if key in part]
    return found


def _is_array(thing: Any) -> bool:
    return isinstance(thing, np.ndarray | torch.Tensor)


def _is_picture(thing: Any) -> bool:
    """A frame: an array, or a picture of Pillow, which need not be installed for this question."""
    return (_is_array(thing) and thing.ndim == 3) or hasattr(thing, "getbands")


def _videos_of(
    videos: Any,
    resize: Callable[[np.ndarray], np.ndarray],
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    do_sample_frames: bool | None = None,
    **unknown: Any,
) -> list[Video]:
    """Frames [F, H, W, 3] or [F, 3, H, W] of each video, in whatever way they came."""
    if fps is not None or unknown:
        names = ", ".join([*(["fps"] if fps is not None else []), *unknown])
        raise EarlyTomConfigError(
            f"videos_kwargs {names}: without torchvision there is num_frames only. Give that, or install torchvision "
            "and torchcodec for transformers' own processor."
        )
    wanted = None if do_sample_frames is False else num_frames
    if videos is None:
        return []
    from .video import read_video, sample_indices  # only here is PyAV needed

    if isinstance(videos, str | Path):
        return [read_video(videos, wanted, default=_DEFAULT_FRAMES, resize=resize).pixels]
    if _is_array(videos) and videos.ndim == 4:
        return [videos if wanted is None else videos[list(sample_indices(len(videos), wanted))]]
    if isinstance(videos, list | tuple) and videos and all(map(_is_picture, videos)):
        return _videos_of(_stacked(videos), resize, num_frames=wanted)
    if not isinstance(videos, list | tuple) and not (_is_array(videos) and videos.ndim == 5):
        shape = f"an array of shape {tuple(videos.shape)}" if _is_array(videos) else f"a {type(videos).__name__}"
        raise EarlyTomConfigError(
            f"videos: {shape}; must be uint8 frames [F, H, W, 3] or [F, 3, H, W], a list of pictures, the path or "
            "address of a file, or a list of such videos."
        )
    return [clip for video in videos for clip in _videos_of(_frames_from_files(video), resize, num_frames=wanted)]


def _frames_from_files(video: Any) -> Any:
    """A list of pictures in files is a video, frame by frame."""
    if isinstance(video, list | tuple) and video and all(isinstance(frame, str | Path) for frame in video):
        from transformers.image_utils import load_image

        return [load_image(str(frame)).convert("RGB") for frame in video]
    return video


def _without_paths(images: Any) -> Any:
    """The same with strings, which is all that transformers takes."""
    if isinstance(images, list | tuple):
        return [_without_paths(image) for image in images]
    return str(images) if isinstance(images, Path) else images


def _stacked(pictures: Sequence[Any]) -> Video:
    arrays = [picture if _is_array(picture) else np.asarray(picture.convert("RGB")) for picture in pictures]
    shapes = sorted({tuple(array.shape) for array in arrays})
    if len(shapes) > 1:
        raise EarlyTomConfigError(f"frames of shapes {shapes}: all frames of a video must have one size.")
    return np.stack([np.asarray(array) for array in arrays])


def _patches_per_frame(model: str, processor: Mapping[str, Any]) -> int:
    patches = processor.get("num_image_tokens")
    if patches is None:
        vision = _read_json(model, "config.json")["vision_config"]
        patches = (vision["image_size"] // vision["patch_size"]) ** 2
    return patches


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
