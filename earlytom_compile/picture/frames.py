"""The frames as the model saw them: what its processor made of a video, turned back into a picture."""

from typing import Any

import numpy as np
import torch


def frames_seen(processor: Any, pixels: torch.Tensor) -> np.ndarray:
    """``pixels`` [F, 3, H, W] of ``pixel_values_videos`` -> uint8 RGB [F, H, W, 3].

    ``processor`` is the one that made them, ours or transformers'. Exact where ``pixels`` are float32, as close as
    their dtype allows where they are not.
    """
    settings = _settings(processor)
    scale = 1 / settings.rescale_factor if settings.do_rescale else 1.0
    shown = pixels.detach().float().cpu()
    if settings.do_normalize:
        mean, std = (torch.tensor(list(v)).view(-1, 1, 1) for v in (settings.image_mean, settings.image_std))
        shown = shown * std + mean
    return (shown * scale).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def first_pictures(processor: Any, patches: torch.Tensor, grid: tuple[int, int, int]) -> np.ndarray:
    """The first picture of each temporal patch of a video of Qwen, uint8 RGB [T, H, W, 3].

    ``patches`` [T·h·w, C·2·p·p]: ``pixel_values_videos`` of that video, a token's next to each other; ``grid``: its
    (T, h, w) of ``video_grid_thw``.
    """
    settings = _settings(processor)
    (frames, height, width), block, side = grid, settings.merge_size, settings.patch_size
    rows, columns, pictures = height // block, width // block, settings.temporal_patch_size
    cut = patches.view(frames, rows, columns, block, block, -1, pictures, side, side)
    first = cut[:, :, :, :, :, :, 0].permute(0, 5, 1, 3, 6, 2, 4, 7)
    return frames_seen(processor, first.reshape(frames, -1, height * side, width * side))


def pictures_in_a_frame(processor: Any) -> int:
    """Of the video: one, or those of a temporal patch."""
    return getattr(_settings(processor), "temporal_patch_size", 1)


def _settings(processor: Any) -> Any:
    """transformers keeps those of videos in a processor of their own."""
    return processor.video_processor if hasattr(processor, "video_processor") else processor.pixels
