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
training (transformers leaves the end out); a file without ``num_frames`` gives as many as the checkpoint says
(:func:`frames_of`), or all if it has fewer; videos of different lengths in one call come back as a list, which
``earlytom_compile.compile(model)`` takes; and an option that nobody knows is an error.

Where each rule comes from, in transformers: ``processing_llava_onevision.py`` (placeholders),
``video_processing_utils.py`` (which file holds the settings; resize, then rescale and normalize at once) and
``processing_utils.py`` (where the chat template is).
"""

import contextlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import AutoTokenizer, BatchFeature
from transformers.utils.hub import cached_file

from ..errors import EarlyTomConfigError
from .call_options import names_of_a_call, options_by_kind, without_theirs

Video = np.ndarray | torch.Tensor
"""uint8 frames, [F, H, W, 3] or [F, 3, H, W]."""

FRAMES = 32
"""Frames of a file where neither the caller nor the checkpoint says how many: the paper's, and LLaVA-OneVision's."""

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

    with _missing_files_named(model):
        processor = AutoProcessor.from_pretrained(model)
    if getattr(processor, "num_image_tokens", 0) is None:  # no processor_config.json, and it cannot count without
        processor.num_image_tokens = _patches_per_frame(model, {})
    return processor


def video_settings(checkpoint: str) -> dict[str, Any]:
    """What a checkpoint says about videos, from the file in which transformers looks for it; empty if there is none."""
    return _video_settings(checkpoint, _read_json(checkpoint, "processor_config.json"))


def frames_of(checkpoint: str) -> int:
    """How many frames of a video a checkpoint folder or Hub id was made for: its ``num_frames``, else 32.

    >>> read_video("talk.mp4", default=frames_of("path/to/checkpoint"))
    """
    return _frames_in(video_settings(checkpoint))


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
        return processor.pixels.resized_frame
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
        sides = set(made.size) if isinstance(made.size, Mapping) else set()
        if {"height", "width"} - sides or made.resample not in _FILTERS or crop:
            raise EarlyTomConfigError(
                f"video settings size={made.size}, resample={made.resample}, do_center_crop={crop} "
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

    def resized_frame(self, frame: np.ndarray) -> np.ndarray:
        """The same for one frame, for ``read_video(..., resize=)``: uint8 [H, W, 3] -> uint8 [height, width, 3]."""
        return _channels_last(self.resized(frame[None])[0])

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
    frames: int = FRAMES
    """Of a video in a file, where a call does not say how many."""

    @classmethod
    def from_pretrained(cls, model: str) -> "VideoTextProcessor":
        """Read tokenizer, chat template and video settings of a checkpoint folder or Hub id."""
        with _missing_files_named(model):
            tokenizer = AutoTokenizer.from_pretrained(model)
        processor = _read_json(model, "processor_config.json")
        settings = _video_settings(model, processor)
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
            frames=_frames_in(settings),
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
        which ``num_frames`` frames are taken. Several videos: a list, or a list for each prompt. ``options`` are the
        tokenizer's and those that transformers has for images and videos, such as ``do_normalize``, also as
        ``text_kwargs``, ``images_kwargs`` and ``videos_kwargs``; rows of different length need ``padding=True``.

        Returns ``input_ids``, ``attention_mask`` int64 [R, S] and ``pixel_values_videos`` float32 [V, F, 3, H, W], or
        a list of [F, 3, H, W] where the videos differ in their number of frames; with images ``pixel_values``,
        ``image_sizes`` and ``batch_num_images`` as transformers makes them. Raises :class:`EarlyTomConfigError` where
        text, videos and images do not match, and for options that nobody knows or that take torchvision.
        """
        if text is None:
            raise EarlyTomConfigError(f"no text came: give a prompt, with a {self.video_token} for each video.")
        by_kind = options_by_kind(options, self.tokenizer)
        for tensors in (return_tensors, *(each.pop("return_tensors", "pt") for each in by_kind)):
            if tensors not in ("pt", "auto"):
                raise EarlyTomConfigError(f'return_tensors={tensors!r}: must be "pt".')
        for_text, for_images, for_videos = by_kind
        for_text = without_theirs(for_text)
        texts = [text] if isinstance(text, str) else list(text)
        found: dict[str, Any] = {}
        given = without_theirs(for_videos) if videos is not None else {}
        settings, clips = self._read(videos, **given)
        counts = [len(clip) * self.tokens_per_frame + 1 for clip in clips]  # one more: the separator
        texts = _expand(texts, self.video_token, [self.video_token * count for count in counts])
        if images is not None and self.images is not None:
            found, placeholders = self.images(images, **for_images)
            texts = _expand(texts, self.images.token, placeholders)
        elif self.images is not None:
            texts = _expand(texts, self.images.token, [])
        if clips:
            pixels = [settings.apply(clip) for clip in clips]
            found["pixel_values_videos"] = torch.stack(pixels) if len(set(counts)) == 1 else pixels
        return BatchFeature({**self.tokenizer(texts, return_tensors="pt", **for_text), **found})

    def _read(
        self, videos: Any, num_frames: int | None = None, do_sample_frames: bool | None = None, **options: Any
    ) -> tuple[PixelSettings, list[Video]]:
        """What is to become of pixels, and the frames of each video."""
        if videos is None:
            return self.pixels, []
        from .video import read_video, require_frames  # only here is PyAV needed

        settings = PixelSettings.from_settings({**vars(self.pixels), **options})
        if num_frames is not None:
            require_frames("num_frames", num_frames)
        wanted = None if do_sample_frames is False else num_frames

        def read(path: str | Path) -> Video:
            return read_video(path, wanted, default=self.frames, resize=settings.resized_frame).pixels

        return settings, _videos_of(videos, wanted, read)

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
        call = {**(processor_kwargs or {}), **_taken(options, names_of_a_call(self.tokenizer))}
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
        inputs = self(**{"text": prompt, "return_tensors": return_tensors, **given, **call})
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


def _taken(options: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
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


def _videos_of(videos: Any, wanted: int | None, read: Callable[[str | Path], Video]) -> list[Video]:
    """Frames [F, H, W, 3] or [F, 3, H, W] of each video, in whatever way they came."""
    from .video import sample_indices

    if isinstance(videos, str | Path):
        return [read(videos)]
    if _is_array(videos) and videos.ndim == 4:
        return [videos if wanted is None else videos[list(sample_indices(len(videos), wanted))]]
    if isinstance(videos, list | tuple) and videos and all(map(_is_picture, videos)):
        return _videos_of(_stacked(videos), wanted, read)
    if not isinstance(videos, list | tuple) and not (_is_array(videos) and videos.ndim == 5):
        shape = f"an array of shape {tuple(videos.shape)}" if _is_array(videos) else f"a {type(videos).__name__}"
        raise EarlyTomConfigError(
            f"videos: {shape}; must be uint8 frames [F, H, W, 3] or [F, 3, H, W], a list of pictures, the path or "
            "address of a file, or a list of such videos."
        )
    return [clip for video in videos for clip in _videos_of(_frames_from_files(video), wanted, read)]


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


def _video_settings(model: str, processor: Mapping[str, Any]) -> dict[str, Any]:
    return (
        processor.get("video_processor")
        or _read_json(model, "video_preprocessor_config.json")
        or _read_json(model, "preprocessor_config.json")
    )


def _frames_in(settings: Mapping[str, Any]) -> int:
    frames = settings.get("num_frames")
    return frames if isinstance(frames, int) and frames > 0 else FRAMES


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


@contextlib.contextmanager
def _missing_files_named(model: str) -> Iterator[None]:
    """Where a folder cannot be loaded, say which of its files are missing; transformers speaks in riddles then."""
    try:
        yield
    except Exception as error:
        missing = _missing_files(model) if Path(model).is_dir() else []
        if not missing:
            raise
        raise EarlyTomConfigError(
            f"the processor of {model!r} cannot be loaded: {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing there. Copy all files of the checkpoint."
        ) from error


def _missing_files(folder: str) -> list[str]:
    missing = []
    if not any((Path(folder) / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        missing.append("tokenizer.json")
    nested = "image_processor" in _read_json(folder, "processor_config.json")
    if not nested and not (Path(folder) / "preprocessor_config.json").is_file():
        missing.append("preprocessor_config.json")
    return missing


def in_one_line(error: Exception) -> str:
    """All that an error says."""
    return " ".join(str(error).split()) or type(error).__name__


def _read_json(model: str, name: str) -> dict[str, Any]:
    """A JSON object of the checkpoint, empty if there is none."""
    try:
        content = json.loads(_read_text(model, name) or "{}")
    except (OSError, ValueError) as error:
        raise EarlyTomConfigError(f"{name} of {model!r} cannot be read: {in_one_line(error)}") from error
    return content if isinstance(content, dict) else {}


def _read_text(model: str, name: str) -> str | None:
    file = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
    return None if file is None else Path(file).read_text(encoding="utf-8")
