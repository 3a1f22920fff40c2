"""Frames of a video as large as the processors of Qwen make them, one by one, while the video is decoded.

    resize = PatchSizes(processor.video_processor).of(768)      # the more frames, the smaller Qwen3-VL makes them
    resize(frame)                                               # uint8 [720, 1280, 3] -> uint8 [96, 160, 3]

transformers chooses height and width for the video as a whole, as multiples of a token's side within a budget of
pixels. Here its own code chooses them for a video without pixels, and resizes each frame by itself: the result is the
same, and 768 frames of a film need not be in memory at once at their full size.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch


class PatchSizes:
    """``video_processor``: of transformers, for a model whose tokens are blocks of patches."""

    def __init__(self, video_processor: Any) -> None:
        self._processor = video_processor

    def of(self, frames: int) -> Callable[[np.ndarray], np.ndarray]:
        """uint8 [H, W, 3] -> uint8 [h, w, 3], for each frame of a video of so many."""
        chosen: dict[tuple[int, int], tuple[int, int]] = {}

        def resize(frame: np.ndarray) -> np.ndarray:
            size = frame.shape[:2]
            if size not in chosen:
                chosen[size] = self._chosen(frames, *size)
            return self._resized(frame, *chosen[size])

        return resize

    def _chosen(self, frames: int, height: int, width: int) -> tuple[int, int]:
        settings = self._processor
        if not settings.do_resize:
            return height, width
        capped = {"cap_pixels_per_frame": settings.cap_pixels_per_frame} if _knows_a_cap(settings) else {}
        # Of a single frame the processor makes two.
        video = torch.empty((1, max(frames, settings.temporal_patch_size), 3, height, width), device="meta")
        resized = settings.resize(
            video,
            size=_size(settings),
            resample=settings.resample,
            factor=settings.patch_size * settings.merge_size,
            temporal_factor=settings.temporal_patch_size,
            **capped,
        )
        return resized.shape[-2], resized.shape[-1]

    def _resized(self, frame: np.ndarray, height: int, width: int) -> np.ndarray:
        from transformers.image_utils import SizeDict
        from transformers.video_processing_utils import BaseVideoProcessor

        if frame.shape[:2] == (height, width):
            return frame
        picture = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None]
        size, resample = SizeDict(height=height, width=width), self._processor.resample
        resized = BaseVideoProcessor.resize(self._processor, picture, size=size, resample=resample)
        return resized[0].permute(1, 2, 0).contiguous().numpy()


def _knows_a_cap(settings: Any) -> bool:
    return hasattr(settings, "cap_pixels_per_frame")


def _size(settings: Any) -> Any:
    from transformers.image_utils import SizeDict

    return settings.size if isinstance(settings.size, SizeDict) else SizeDict(**dict(settings.size))
