"""Frames to pixels as transformers' video processors make them, without torchvision.

settings = PixelSettings.from_settings(video_settings(checkpoint))
settings.apply(frames)           # uint8 [F, H, W, 3] -> float32 [F, 3, height, width]
videos_of(given, None, read)     # the frames of each video, in whatever way they came
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import EarlyTomConfigError

Video = np.ndarray | torch.Tensor
"""uint8 frames, [F, H, W, 3] or [F, 3, H, W]."""

# PIL's numbers for the filters, as checkpoints store them. The rest have no counterpart in torch.
_FILTERS = {2: "bilinear", 3: "bicubic"}


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
        return channels_last(self.resized(frame[None])[0])

    def _normalized(self, pixels: torch.Tensor) -> torch.Tensor:
        if not self.do_normalize:
            return pixels * self.rescale_factor if self.do_rescale else pixels
        # Rescaling is folded into mean and std, not done first: the last bit depends on it.
        scale = 1.0 / self.rescale_factor if self.do_rescale else 1.0
        mean, std = (torch.tensor(values) * scale for values in (self.image_mean, self.image_std))
        return pixels.sub(mean.view(-1, 1, 1)).div(std.view(-1, 1, 1))


def channels_last(frame: torch.Tensor) -> np.ndarray:
    return frame.permute(1, 2, 0).contiguous().numpy()


def _is_array(thing: Any) -> bool:
    return isinstance(thing, np.ndarray | torch.Tensor)


def _is_picture(thing: Any) -> bool:
    """A frame: an array, or a picture of Pillow, which need not be installed for this question."""
    return (_is_array(thing) and thing.ndim == 3) or hasattr(thing, "getbands")


def videos_of(videos: Any, wanted: int | None, read: Callable[[str | Path], Video]) -> list[Video]:
    """Frames [F, H, W, 3] or [F, 3, H, W] of each video, in whatever way they came."""
    from .video import sample_indices

    if isinstance(videos, str | Path):
        return [read(videos)]
    if _is_array(videos) and videos.ndim == 4:
        return [videos if wanted is None else videos[list(sample_indices(len(videos), wanted))]]
    if isinstance(videos, list | tuple) and videos and all(map(_is_picture, videos)):
        return videos_of(_stacked(videos), wanted, read)
    if not isinstance(videos, list | tuple) and not (_is_array(videos) and videos.ndim == 5):
        shape = f"an array of shape {tuple(videos.shape)}" if _is_array(videos) else f"a {type(videos).__name__}"
        raise EarlyTomConfigError(
            f"videos: {shape}; must be uint8 frames [F, H, W, 3] or [F, 3, H, W], a list of pictures, the path or "
            "address of a file, or a list of such videos."
        )
    return [clip for video in videos for clip in videos_of(_frames_from_files(video), wanted, read)]


def _frames_from_files(video: Any) -> Any:
    """A list of pictures in files is a video, frame by frame."""
    if isinstance(video, list | tuple) and video and all(isinstance(frame, str | Path) for frame in video):
        from transformers.image_utils import load_image

        return [load_image(str(frame)).convert("RGB") for frame in video]
    return video


def _stacked(pictures: Sequence[Any]) -> Video:
    arrays = [picture if _is_array(picture) else np.asarray(picture.convert("RGB")) for picture in pictures]
    shapes = sorted({tuple(array.shape) for array in arrays})
    if len(shapes) > 1:
        raise EarlyTomConfigError(f"frames of shapes {shapes}: all frames of a video must have one size.")
    return np.stack([np.asarray(array) for array in arrays])
