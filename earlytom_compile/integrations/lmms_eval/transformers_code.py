"""Models of transformers: any checkpoint whose family the command line can load, through its own processor, if that
makes pictures of pictures.

[Turn("user", (Film("a.mp4"), "What happens?"))]
-> chat template -> "<|im_start|>user <video>\\nWhat happens?<|im_end|>..."
-> processor -> ids [S] with a placeholder for each token, pixels [F, 3, H, W]
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from ...cli.loading import Loaded
from ..preprocess import frame_resizer
from ..video import Resize, read_video
from .arguments import Arguments
from .processor_code import ProcessorSpeaker
from .prompts import Film, Turn
from .speaker import Sample


class TransformersSpeaker(ProcessorSpeaker):
    """See :class:`~earlytom_compile.integrations.lmms_eval.speaker.Speaker`."""

    mixes_lengths = False
    videos_kept = 8  # 32 frames of 384x384 are 14 MB

    def __init__(self, arguments: Arguments, loaded: Loaded) -> None:
        super().__init__(arguments, loaded)
        self._resize = cast(Resize, frame_resizer(loaded.processor))
        # Whatever stands between or behind frames is the same for one frame more.
        self.tokens_per_frame = self._placeholders(2) - self._placeholders(1)

    def video_tokens(self, sample: Sample) -> int:
        """As many of each frame."""
        return sum(sample.frames) * self.tokens_per_frame

    def inputs(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Ids padded on the left; videos as one tensor, or a list where their lengths differ."""
        device, dtype = self.model.device, self.model.dtype
        inputs: dict[str, Any] = {**self._prompts(samples)}
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

    def _content(self, turn: Turn) -> list[dict[str, str]]:
        """For the chat template, which puts pictures and videos first; where text comes between them they are written
        into it."""
        if turn.media_first():
            return super()._content(turn)
        words = (part if isinstance(part, str) else self._tokens[type(part)] for part in turn.parts)
        return [{"type": "text", "text": "".join(words)}]

    def _decoded(self, path: str) -> np.ndarray:
        """uint8 [F, H, W, 3]."""
        return read_video(path, default=self._frames, resize=self._resize).pixels

    def _drawn(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        return np.stack([self._resize(np.array(picture)) for picture in pictures])

    def _sample(self, text: str, pictures: list[Any], videos: list[np.ndarray]) -> Sample:
        # transformers' own processor makes a tensor of videos of equal length only, and a list where none is asked for.
        listed = not self._ours and len({len(video) for video in videos}) > 1
        made = self._processor(
            text=text,
            images=pictures or None,
            videos=videos or None,
            return_tensors=None if listed else "pt",
            **self._begun(text),
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
