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

import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..errors import EarlyTomConfigError
from ..families.llava_onevision_images import ImageProcessing
from ..families.registry import family_of_checkpoint
from .call_options import names_of_a_call, options_by_kind, without_theirs
from .checkpoint_files import (
    FRAMES,
    chat_template_of,
    frames_in,
    frames_of,
    in_one_line,
    missing_files_named,
    patches_per_frame,
    read_json,
    settings_in,
    video_settings,
)
from .patch_sizes import PatchSizes
from .pixels import PixelSettings, Video, channels_last, videos_of

if TYPE_CHECKING:
    from transformers import BatchFeature

    from .video import Resize, ResizeByLength

__all__ = [
    "FRAMES",
    "ImageProcessing",
    "PixelSettings",
    "Processor",
    "Video",
    "VideoTextProcessor",
    "conversation",
    "frame_resizer",
    "frames_of",
    "in_one_line",
    "load_processor",
    "makes_patches",
    "torchvision_works",
    "video_settings",
]


class Processor(Protocol):
    """What callers use of a processor, whoever made it."""

    def __call__(self, *, text: Any, videos: Any, return_tensors: str, **options: Any) -> Mapping[str, Any]: ...
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
        return family_of_checkpoint(model, read_json(model, "config.json").get("model_type")).processor(model)
    from transformers import AutoProcessor

    with missing_files_named(model):
        processor = AutoProcessor.from_pretrained(model)
    if getattr(processor, "num_image_tokens", 0) is None:  # no processor_config.json, and it cannot count without
        processor.num_image_tokens = patches_per_frame(model, {})
    return processor


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


def frame_resizer(processor: Any) -> "Resize | ResizeByLength":
    """What ``processor`` does first to each frame of a video, for ``read_video(..., resize=)``.

    uint8 [H, W, 3] -> uint8 [h, w, 3]. The processor leaves frames of that size as they are, so its result is the same
    bit for bit, and no video need be in memory at its full size. The size that Qwen's processors choose depends on the
    number of frames, and they are told not to look for one again (``do_resize=False``). ``processor``: of
    :func:`load_processor` or transformers' own.
    """
    if isinstance(processor, VideoTextProcessor):
        return processor.pixels.resized_frame
    resize = getattr(processor, "video_processor", processor)
    if makes_patches(processor):
        return PatchSizes(resize)
    # A crop would be taken again from what it left.
    only = {"do_rescale": False, "do_normalize": False, "do_center_crop": False, "return_tensors": "pt"}
    return lambda frame: channels_last(resize(videos=[frame[None]], **only)["pixel_values_videos"][0, 0])


def makes_patches(processor: Any) -> bool:
    """Whether ``processor`` gives patches of temporal patches, as Qwen's do, in place of pictures."""
    return hasattr(getattr(processor, "video_processor", processor), "temporal_patch_size")


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
        from transformers import AutoTokenizer

        with missing_files_named(model):
            tokenizer = AutoTokenizer.from_pretrained(model)
        processor = read_json(model, "processor_config.json")
        settings = settings_in(model, processor)
        if not settings:
            raise EarlyTomConfigError(
                f"{model!r} has no video settings: processor_config.json, video_preprocessor_config.json or "
                "preprocessor_config.json must be there."
            )
        patches = patches_per_frame(model, processor)
        return cls(
            tokenizer=tokenizer,
            pixels=PixelSettings.from_settings(settings),
            tokens_per_frame=math.ceil(math.isqrt(patches) / 2) ** 2,
            video_token=getattr(tokenizer, "video_token", None) or processor.get("video_token", "<video>"),
            chat_template=chat_template_of(model, processor) or tokenizer.chat_template,
            images=ImageProcessing(
                model,
                patches,
                getattr(tokenizer, "image_token", None) or processor.get("image_token", "<image>"),
                processor.get("vision_feature_select_strategy") or "full",
                processor.get("vision_aspect_ratio") or "anyres_max_9",
            ),
            frames=frames_in(settings),
        )

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        return_tensors: str = "pt",
        **options: Any,
    ) -> "BatchFeature":
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
        from transformers import BatchFeature

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

        return settings, videos_of(videos, wanted, read)

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

    def post_process_multimodal_output(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **options: Any,
    ) -> list[str]:
        """The same under the name that ``pipeline("any-to-any")`` calls it by; text is all that can be generated."""
        if generation_mode not in (None, "text"):
            raise EarlyTomConfigError(f'generation_mode={generation_mode!r}: must be "text".')
        return self.post_process_image_text_to_text(generated_outputs, skip_special_tokens, **options)


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
