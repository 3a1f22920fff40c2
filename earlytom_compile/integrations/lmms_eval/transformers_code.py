"""Models of transformers: any checkpoint whose family the command line can load, through its own processor.

[Turn("user", (Film("a.mp4"), "What happens?"))]
-> chat template -> "<|im_start|>user <video>\\nWhat happens?<|im_end|>..."
-> processor -> ids [S] with a placeholder for each token, pixels [F, 3, H, W]
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch

from ...cli.loading import load_checkpoint
from ...errors import EarlyTomConfigError
from ..preprocess import VideoTextProcessor, frame_resizer, makes_patches
from ..video import Resize, read_video
from .arguments import Arguments
from .prompts import Film, Picture, Turn
from .speaker import Sample, padded_left

_VIDEOS_KEPT = 8  # questions about one video follow each other; 32 frames of 384x384 are 14 MB


def require_pictures(checkpoint: str, processor: Any) -> None:
    """Raise :class:`EarlyTomConfigError` for a checkpoint of Qwen, whose processor gives patches, not pictures."""
    if makes_patches(processor):
        raise EarlyTomConfigError(
            f"{checkpoint!r} is a checkpoint of Qwen, which cannot be evaluated in lmms-eval yet: try earlytom "
            "compare, with questions of your own."
        )


class TransformersSpeaker:
    """See :class:`~earlytom_compile.integrations.lmms_eval.speaker.Speaker`."""

    mixes_lengths = False
    longest_prompt: int | None = None

    def __init__(self, arguments: Arguments) -> None:
        loaded = load_checkpoint(
            arguments.pretrained, device=arguments.device, dtype=arguments.dtype, options=arguments.options
        )
        self.model = loaded.model
        self._processor = cast(Any, loaded.processor)  # more is asked of it than by the command line
        self.tokenizer: Any = self._processor.tokenizer
        require_pictures(arguments.pretrained, self._processor)
        self._frames = arguments.max_frames or loaded.frames
        self._resize = cast(Resize, frame_resizer(loaded.processor))
        self._read = functools.lru_cache(maxsize=_VIDEOS_KEPT)(self._decoded)
        self._ours = isinstance(self._processor, VideoTextProcessor)  # without torchvision
        self._tokens = {
            Picture: self._processor.images.token if self._ours else self._processor.image_token,
            Film: self._processor.video_token,
        }
        # Whatever stands between or behind frames is the same for one frame more.
        self.tokens_per_frame = self._placeholders(2) - self._placeholders(1)

    def prepare(self, turns: Sequence[Turn]) -> Sample:
        """Read the videos and make ids and pixels of a conversation."""
        media = [part for turn in turns for part in turn.media()]
        text = self._processor.apply_chat_template(
            [{"role": turn.role, "content": self._content(turn)} for turn in turns], add_generation_prompt=True
        )
        for kind, token in self._tokens.items():
            shown, named = sum(isinstance(part, kind) for part in media), text.count(token)
            if shown != named:
                raise EarlyTomConfigError(
                    f"the prompt has {named} {token} for {shown} of them: {token} in a question stands for what is "
                    "shown, and the checkpoint's chat template must write one for each."
                )
        return self._sample(
            text,
            pictures=[part.image for part in media if isinstance(part, Picture)],
            videos=[self._pixels(part) for part in media if isinstance(part, Film)],
        )

    def positions(self, sample: Sample) -> int:
        """There is a placeholder for each token."""
        return len(sample.ids)

    def inputs(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Ids padded on the left; videos as one tensor, or a list where their lengths differ."""
        device, dtype = self.model.device, self.model.dtype
        padding = self.tokenizer.pad_token_id
        ids, mask = padded_left([sample.ids for sample in samples], 0 if padding is None else padding)
        inputs: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        videos = [video.to(device, dtype) for sample in samples for video in sample.videos]
        if videos:
            alike = len({len(video) for video in videos}) == 1
            inputs["pixel_values_videos"] = torch.stack(videos) if alike else videos
        shown = [sample.others for sample in samples if sample.others]
        for name in shown[0] if shown else ():
            inputs[name] = _stacked([pictures[name] for pictures in shown]).to(device)
        if shown:
            inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        return inputs

    def new_tokens(self, output: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The prompt comes back in front of them."""
        return output[:, inputs["input_ids"].shape[1] :]

    def _content(self, turn: Turn) -> list[dict[str, str]]:
        """For the chat template, which puts pictures and videos first; where text comes between them they are written
        into it."""
        kinds = {Picture: "image", Film: "video"}
        if turn.media_first():
            return [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": kinds[type(part)]}
                for part in turn.parts
            ]
        words = (part if isinstance(part, str) else self._tokens[type(part)] for part in turn.parts)
        return [{"type": "text", "text": "".join(words)}]

    def _pixels(self, film: Film) -> np.ndarray:
        """uint8 [F, H, W, 3], as large as the model wants it."""
        if isinstance(film.source, str):
            return self._read(film.source)
        return np.stack([self._resize(np.array(picture)) for picture in film.source])

    def _decoded(self, path: str) -> np.ndarray:
        return read_video(path, default=self._frames, resize=self._resize).pixels

    def _sample(self, text: str, pictures: list[Any], videos: list[np.ndarray]) -> Sample:
        # transformers' own processor makes a tensor of videos of equal length only, and a list where none is asked for.
        listed = not self._ours and len({len(video) for video in videos}) > 1
        begin = self.tokenizer.bos_token
        twice = {"add_special_tokens": False} if begin is not None and text.startswith(begin) else {}
        made = self._processor(
            text=text,
            images=pictures or None,
            videos=videos or None,
            return_tensors=None if listed else "pt",
            **twice,
        )
        ids = torch.as_tensor(made["input_ids"], dtype=torch.int64).reshape(-1)
        shown = {name: made[name] for name in ("pixel_values", "image_sizes", "batch_num_images") if name in made}
        return Sample(
            ids,
            tuple(torch.as_tensor(video) for video in made["pixel_values_videos"]) if videos else (),
            {name: value if isinstance(value, torch.Tensor) else _stacked(value) for name, value in shown.items()},
        )

    def _placeholders(self, frames: int) -> int:
        blank = np.zeros((frames, 2, 2, 3), np.uint8)
        ids = self._processor(text=self._tokens[Film], videos=[blank], return_tensors="pt")["input_ids"]
        return int((ids == self.tokenizer.convert_tokens_to_ids(self._tokens[Film])).sum())


def _stacked(tensors: Sequence[Any]) -> torch.Tensor:
    """One behind the other; of images with fewer crops than others the rest is zeros, which the model cuts off."""
    rows = [torch.as_tensor(each) for each in tensors]
    crops = max((row.shape[1] for row in rows if row.dim() == 5), default=0)
    padded = [_with_crops(row, crops) if row.dim() == 5 else row for row in rows]
    return torch.cat([row.reshape(-1) if row.dim() == 0 else row for row in padded])


def _with_crops(images: torch.Tensor, crops: int) -> torch.Tensor:
    missing = images.new_zeros(len(images), crops - images.shape[1], *images.shape[2:])
    return torch.cat((images, missing), dim=1)
