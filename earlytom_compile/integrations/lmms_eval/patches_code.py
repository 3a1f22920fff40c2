"""Models whose processor makes patches of videos and pictures of any size: Qwen2.5-VL, Qwen3-VL, Qwen3.5.

[Turn("user", (Film("a.mp4"), "What happens?"))]
-> processor -> ids [S] with a placeholder for each token, their kinds [S], patches [T*h*w, C] and (T, h, w) of a video

A frame is a temporal patch, which is made of two pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from ...cli.loading import Clip, Loaded
from ..preprocess import frame_resizer
from ..video import ResizeByLength, VideoFrames, read_video
from .arguments import Arguments
from .processor_code import ProcessorSpeaker
from .prompts import Film
from .speaker import Sample, padded_left

_RATE = 2.0
"""Pictures a second where neither the task nor the checkpoint says when they were taken; Qwen's own tools assume it."""
_OF_PICTURES = ("pixel_values", "image_grid_thw")


@dataclass(frozen=True)
class PatchSample(Sample):
    """A question about ``videos`` [T, h*w, C] each, with ``kinds`` int64 [S] of its ids (0 text, 1 picture, 2 video),
    ``grids`` int64 [V, 3] of its videos, and of each the ``seconds`` [V] of a temporal patch, where the model asks for
    them."""

    kinds: torch.Tensor = torch.empty(0, dtype=torch.int64)
    grids: torch.Tensor | None = None
    seconds: torch.Tensor | None = None


class PatchSpeaker(ProcessorSpeaker):
    """See :class:`~earlytom_compile.integrations.lmms_eval.speaker.Speaker`."""

    mixes_lengths = True
    videos_kept = 2  # 32 frames of 768 tokens of 28x28 are 58 MB

    def __init__(self, arguments: Arguments, loaded: Loaded) -> None:
        super().__init__(arguments, loaded)
        self._sizes = cast(ResizeByLength, frame_resizer(loaded.processor))
        self._placeholder = self.tokenizer.convert_tokens_to_ids(self._tokens[Film])

    def video_tokens(self, sample: Sample) -> int:
        """One for each placeholder: as many as the size of the video makes."""
        return int((sample.ids == self._placeholder).sum())

    def inputs(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Ids and their kinds padded on the left; patches and grids of all videos, and of all pictures, one behind the
        other."""
        device, dtype = self.model.device, self.model.dtype
        asked = cast(Sequence[PatchSample], samples)
        found: dict[str, Any] = {**self._prompts(samples)}
        found["mm_token_type_ids"], _ = padded_left([sample.kinds for sample in asked], 0)
        videos = [video.flatten(0, 1) for sample in asked for video in sample.videos]
        if videos:
            found["pixel_values_videos"] = torch.cat(videos)
        for name, rows in (
            ("video_grid_thw", [sample.grids for sample in asked if sample.grids is not None]),
            ("second_per_grid_ts", [sample.seconds for sample in asked if sample.seconds is not None]),
            *((name, [sample.others[name] for sample in asked if sample.others]) for name in _OF_PICTURES),
        ):
            if rows:
                found[name] = torch.cat(rows)
        pixels = ("pixel_values", "pixel_values_videos")
        return {name: value.to(device, dtype if name in pixels else None) for name, value in found.items()}

    def _decoded(self, path: str) -> VideoFrames:
        return read_video(path, default=self._frames, resize=self._sizes)

    def _drawn(self, pictures: Sequence[Image.Image]) -> VideoFrames:
        """All as large as the first, as a video that changes its resolution on the way; nobody says when they were
        taken, so that is what the checkpoint's own sampling would give."""
        count, size = len(pictures), pictures[0].size
        resize = self._sizes.of(count)
        alike = (picture if picture.size == size else picture.resize(size) for picture in pictures)
        pixels = np.stack([resize(np.array(picture)) for picture in alike])
        rate = getattr(self._processor.video_processor, "fps", None) or _RATE
        return VideoFrames(pixels, tuple(range(count)), count, float(rate))

    def _sample(self, text: str, pictures: list[Any], videos: list[VideoFrames]) -> Sample:
        told = [Clip(video.pixels.shape, video.indices, video.total, video.rate).told for video in videos]
        # The processor would take other frames, and look for another size; of pictures it is to find one.
        as_they_are = {"do_sample_frames": False, "do_resize": False, "video_metadata": told}
        made = self._processor(
            text=text,
            images=pictures or None,
            videos=[video.pixels for video in videos] or None,
            return_tensors="pt",
            **({"videos_kwargs": as_they_are} if videos else {}),
            **self._begun(text),
        )
        grids, seconds = made.get("video_grid_thw"), made.get("second_per_grid_ts")
        return PatchSample(
            torch.as_tensor(made["input_ids"], dtype=torch.int64).reshape(-1),
            _by_frame(made["pixel_values_videos"], grids) if videos else (),
            {name: made[name] for name in _OF_PICTURES if name in made},
            torch.as_tensor(made["mm_token_type_ids"], dtype=torch.int64).reshape(-1),
            grids,
            None if seconds is None else torch.as_tensor(seconds),
        )


def _by_frame(patches: torch.Tensor, grids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[T*h*w of all, C] -> [T, h*w, C] each."""
    sizes = grids.tolist()
    videos = patches.split([frames * height * width for frames, height, width in sizes])
    return tuple(video.unflatten(0, (size[0], -1)) for video, size in zip(videos, sizes, strict=True))
