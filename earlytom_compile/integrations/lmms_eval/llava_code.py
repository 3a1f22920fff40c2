"""LLaVA's own models (package ``llava``, repository LLaVA-NeXT): LLaVA-OneVision and LLaVA-Video with Qwen2.

    [Turn("user", (Film("a.mp4"), "What happens?"))]
    -> "<|im_start|>user\\n<image>\\nWhat happens?<|im_end|>..."     conversation template qwen_1_5
    -> ids [S] with one -200 for each picture and video, images=[[F, 3, 384, 384]], modalities=["video"]

Loaded by the model's own classes rather than ``llava.model.builder.load_pretrained_model``, which takes a checkpoint
for what its name says, puts the tower on "cuda" and knows two dtypes.
"""

import copy
import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import av
import numpy as np
import torch

from ...cli.loading import resolve_device, resolve_dtype
from ...config import bad_option
from ...errors import EarlyTomConfigError
from ...families.llava import ARCHITECTURE, PLACEHOLDER, Llava, like, tokens_a_row
from ..checkpoint_files import FRAMES, read_json
from ..video import read_video
from .arguments import Arguments
from .prompts import Film, Picture, Turn
from .speaker import Sample, padded_left

ARGUMENTS = ("conv_template", "add_time_instruction", "mm_spatial_pool_mode", "mm_newline_position")
"""Of ``--model_args``, beside those of every model, by the names that lmms-eval's own models of LLaVA have."""
_MARK = "<image>"
_VIDEOS_KEPT = 4  # questions about one video follow each other; 32 frames are 57 MB
_POOL = "bilinear"  # where a checkpoint does not say, as for LLaVA-OneVision


class _Clip(NamedTuple):
    """A video as the model takes it, [F, 3, H, W], how long it is, and when its frames come; seconds, None if nobody
    says."""

    pixels: torch.Tensor
    seconds: float | None
    times: tuple[float, ...]


class LlavaSpeaker:
    """See :class:`~earlytom_compile.integrations.lmms_eval.speaker.Speaker`."""

    mixes_lengths = True

    def __init__(self, arguments: Arguments) -> None:
        own = arguments.own
        self._timed = own.get("add_time_instruction", False)
        if not isinstance(self._timed, bool):
            raise bad_option("add_time_instruction", self._timed, "True or False")
        self.model, self.tokenizer = _load(arguments)
        templates = importlib.import_module("llava.conversation").conv_templates
        name = own.get("conv_template", "qwen_1_5")
        if name not in templates:
            raise bad_option("conv_template", name, "one of " + ", ".join(map(repr, templates)))
        self._template = templates[name]
        self._tools = importlib.import_module("llava.mm_utils")
        self._frames = arguments.max_frames or FRAMES
        self._read = functools.lru_cache(maxsize=_VIDEOS_KEPT)(self._clip_of_file)
        self._images = self.model.get_vision_tower().image_processor
        self.tokens_per_frame = tokens_a_row(self.model) ** 2

    @property
    def longest_prompt(self) -> int | None:
        """As the checkpoint says."""
        return getattr(self.model.config, "tokenizer_model_max_length", None)

    def prepare(self, turns: Sequence[Turn]) -> Sample:
        """Read the videos and make ids of a conversation."""
        media = [part for turn in turns for part in turn.media()]
        clips = [self._clip(part) for part in media if isinstance(part, Film)]
        prompt = self._prompt(turns, clips)
        if prompt.count(_MARK) != len(media):
            raise EarlyTomConfigError(
                f"the prompt has {prompt.count(_MARK)} {_MARK} for {len(media)} pictures and videos: {_MARK} in a "
                "question stands for what is shown."
            )
        ids = self._tools.tokenizer_image_token(prompt, self.tokenizer, PLACEHOLDER, return_tensors="pt")
        videos = tuple(clip.pixels for clip in clips)
        left = iter(videos)
        images = [next(left) if isinstance(part, Film) else self._picture(part, len(media) == 1) for part in media]
        if not media:
            return Sample(ids)
        shown = {
            "images": images,
            "modalities": ["video" if isinstance(part, Film) else "image" for part in media],
            "image_sizes": [_size(part, image) for part, image in zip(media, images, strict=True)],
        }
        return Sample(ids, videos, shown)

    def video_tokens(self, sample: Sample) -> int:
        """As many of each frame."""
        return sum(sample.frames) * self.tokens_per_frame

    def positions(self, sample: Sample) -> int:
        """One for each word, each token of a video or picture, and each newline."""
        text = int((sample.ids != PLACEHOLDER).sum())
        return text + sum(map(self._of_video, sample.frames)) + self._of_pictures(sample)

    def inputs(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Ids padded on the left, and all pictures and videos in the order of their placeholders."""
        device, dtype = self.model.device, self.model.dtype
        ids, mask = padded_left([sample.ids for sample in samples], self.tokenizer.pad_token_id or 0)
        inputs: dict[str, Any] = {"inputs": ids.to(device), "attention_mask": mask.to(device)}
        for sample in samples:
            for name, values in sample.others.items():
                inputs.setdefault(name, []).extend(values)
        if "images" in inputs:
            inputs["images"] = [image.to(device, dtype) for image in inputs["images"]]
        return inputs

    def new_tokens(self, output: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Nothing else comes back."""
        return output

    def _of_video(self, frames: int) -> int:
        """Positions of a video that keeps all its tokens."""
        tokens = torch.cartesian_prod(torch.arange(frames), torch.arange(self.tokens_per_frame))
        newlines = Llava().separators(self.model, tokens)
        return len(tokens) + (0 if newlines is None else len(newlines))

    @torch.no_grad()
    def _of_pictures(self, sample: Sample) -> int:
        """As the model's own code lays out their crops, with nothing encoded for it."""
        if len(sample.others.get("images", ())) == len(sample.videos):
            return 0
        patches, width = self.model.get_vision_tower().num_patches, self.model.config.hidden_size
        call = self.inputs([sample])
        blank = like(self.model, encode_images=lambda images: images.new_zeros(len(images), patches, width))
        return sum(len(rows) for _, rows in Llava().other_rows(blank, call["inputs"], call))

    def _prompt(self, turns: Sequence[Turn], clips: Sequence[_Clip]) -> str:
        talk, left = self._template.copy(), iter(clips)
        for turn in turns:
            if turn.role not in ("user", "assistant"):
                raise EarlyTomConfigError(
                    f"the task's message has the role {turn.role!r}: the conversation template has a system text of "
                    "its own; choose one with conv_template."
                )
            films = [next(left) for part in turn.parts if isinstance(part, Film)]
            talk.append_message(talk.roles[turn.role == "assistant"], self._words(turn, films))
        talk.append_message(talk.roles[1], None)
        return talk.get_prompt()

    def _words(self, turn: Turn, films: Sequence[_Clip]) -> str:
        """As LLaVA was trained: all placeholders in a line of their own, or each where the text has it."""
        media, times = turn.media(), [_times(film) for film in films] if self._timed else []
        if not turn.media_first() or not media:
            words = "".join(part if isinstance(part, str) else _MARK for part in turn.parts)
            return "\n".join([*times, words])
        texts = [part for part in turn.parts if isinstance(part, str)]
        return "\n".join([" ".join([_MARK] * len(media)), *times, "".join(texts)])

    def _clip(self, film: Film) -> _Clip:
        if isinstance(film.source, str):
            return self._read(film.source)
        return _Clip(self._pixels([np.array(picture) for picture in film.source]), None, ())

    def _clip_of_file(self, path: str) -> _Clip:
        video = read_video(path, default=self._frames)
        rate = _frames_a_second(path) if self._timed else None
        if rate is None:
            return _Clip(self._pixels(list(video.pixels)), None, ())
        times = tuple(index / rate for index in video.indices)
        return _Clip(self._pixels(list(video.pixels)), video.total / rate, times)

    def _pixels(self, frames: list[np.ndarray]) -> torch.Tensor:
        return torch.as_tensor(self._images.preprocess(frames, return_tensors="pt")["pixel_values"])

    def _picture(self, picture: Picture, alone: bool) -> torch.Tensor:
        """[n, 3, H, W] in crops, or one square of several pictures, as lmms-eval does."""
        config = self.model.config
        if not alone:
            config = copy.copy(config)
            config.image_aspect_ratio = "pad"
        return self._tools.process_images([picture.image], self._images, config)[0]


def _load(arguments: Arguments) -> tuple[Any, Any]:
    """The model on its device in evaluation mode, and its tokenizer."""
    Llava().require_versions()
    name, architectures = arguments.pretrained, read_json(arguments.pretrained, "config.json").get("architectures")
    if architectures != [ARCHITECTURE]:
        raise EarlyTomConfigError(
            f"{name!r} is a checkpoint of {architectures!r}, and LLaVA's own code is known for {ARCHITECTURE!r}, such "
            "as lmms-lab/llava-onevision-qwen2-7b-ov: take --model earlytom for one of transformers."
        )
    try:
        code = importlib.import_module("llava.model.language_model.llava_qwen")
    except ImportError as error:
        raise EarlyTomConfigError(
            f"LLaVA's own code cannot be imported ({error}): clone LLaVA-VL/LLaVA-NeXT and put it on PYTHONPATH."
        ) from error
    from transformers import AutoTokenizer

    config = code.LlavaQwenConfig.from_pretrained(name)
    if getattr(config, "mm_use_im_start_end", False):
        raise EarlyTomConfigError(f"{name!r} has mm_use_im_start_end: prompts with such marks are not known.")
    config.tokenizer_padding_side = "left"  # of prompts of different length, whose answers go on behind them
    if getattr(config, "mm_spatial_pool_mode", None) is None:
        config.mm_spatial_pool_mode = _POOL
    for option in ("mm_spatial_pool_mode", "mm_newline_position"):
        if option in arguments.own:
            setattr(config, option, arguments.own[option])
    place = resolve_device(arguments.device)
    dtype = resolve_dtype(arguments.dtype, place, torch.float16)  # what LLaVA's own loader takes
    kind = getattr(code, ARCHITECTURE)
    model = kind.from_pretrained(name, config=config, torch_dtype=dtype, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(name)
    model.resize_token_embeddings(len(tokenizer))
    if not model.get_vision_tower().is_loaded:
        model.get_vision_tower().load_model()
    return model.to(place, dtype).eval(), tokenizer


def _size(part: Film | Picture, image: torch.Tensor) -> tuple[int, int]:
    """Width and height of a picture before it was cut; of a video nobody asks."""
    return part.image.size if isinstance(part, Picture) else (image.shape[-1], image.shape[-2])


def _times(clip: _Clip) -> str:
    """What LLaVA-Video was trained to read about a video; its words are part of the model."""
    if clip.seconds is None:
        raise EarlyTomConfigError("add_time_instruction: nobody says how long this video is; leave the option out.")
    places = ",".join(f"{time:.2f}s" for time in clip.times)
    return (
        f"The video lasts for {clip.seconds:.2f} seconds, and {len(clip.times)} frames are uniformly sampled from it. "
        f"These frames are located at {places}.Please answer the following questions related to this video."
    )


def _frames_a_second(path: str) -> float | None:
    with av.open(path) as container:
        rate = container.streams.video[0].average_rate
        return None if rate is None else float(rate)
