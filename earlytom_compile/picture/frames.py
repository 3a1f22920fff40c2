"""The frames as the model saw them: what its processor made of a video, turned back into a picture."""

from typing import Any

import numpy as np
import torch


def frames_seen(processor: Any, pixels: torch.Tensor) -> np.ndarray:
    """``pixels`` [F, 3, H, W] of ``pixel_values_videos`` -> uint8 RGB [F, H, W, 3].

    ``processor`` is the one that made them, ours or transformers'. Exact where ``pixels`` are float32, as close as
    their dtype allows where they are not.
    """
    # transformers keeps the settings of videos in a processor of their own.
    settings = processor.video_processor if hasattr(processor, "video_processor") else processor.pixels
    scale = 1 / settings.rescale_factor if settings.do_rescale else 1.0
    shown = pixels.detach().float().cpu()
    if settings.do_normalize:
        mean, std = (torch.tensor(list(v)).view(-1, 1, 1) for v in (settings.image_mean, settings.image_std))
        shown = shown * std + mean
    return (shown * scale).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
