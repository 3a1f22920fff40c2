"""A model and a prompt with a video, made for timing: sizes decide the time, not what weights and pixels mean.

model = random_model(config_of("cpu-medium"), device="cpu", dtype=torch.float32)
inputs = make_inputs(model, frames=16, batch=2, prompt_length=32, scene_frames=4, redundancy=1.0)
"""

from typing import Any

import torch
from torch import Tensor

from earlytom_compile.errors import EarlyTomConfigError

SCENE_FRAMES = 4
"""EarlyTom keeps first and last frame of a segment and merges pairs between them: 3 of 4 alike stay, once and for all.
That is 75 %, whatever the threshold; the paper's average is 73.9 %."""
Inputs = dict[str, Tensor]
"""``input_ids``, ``attention_mask`` int64 [R, S] and ``pixel_values_videos`` [R, F, 3, H, W]."""


def random_model(config: Any, *, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Any:
    """A LLaVA-OneVision with random weights, made where and as it is used: nothing is copied or cast."""
    from transformers import LlavaOnevisionForConditionalGeneration

    return _random(LlavaOnevisionForConditionalGeneration, config, device, dtype, seed)


def random_tower(config: Any, *, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Any:
    """The same of its vision tower alone; ``config`` is that of the whole model."""
    from transformers import SiglipVisionModel

    return _random(SiglipVisionModel, config.vision_config, device, dtype, seed)


def _random(kind: Any, config: Any, device: torch.device | str, dtype: torch.dtype, seed: int) -> Any:
    default = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = kind(config)
    finally:
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


def make_video(
    frames: int, size: int, generator: torch.Generator, *, scene_frames: int = SCENE_FRAMES, redundancy: float = 1.0
) -> Tensor:
    """[F, 3, size, size]: scenes of ``scene_frames``, each frame ``redundancy`` of its scene and the rest of its own.

    1: scenes stand still; 0: no two frames have anything in common. In between, it does not say how many frames
    merge: by default a pair is compared with the ends of its own segment, which move apart just as it does.
    """
    if not 0.0 <= redundancy <= 1.0:
        raise EarlyTomConfigError(f"redundancy={redundancy}: must be in [0, 1].")
    if scene_frames < 1:
        raise EarlyTomConfigError(f"scene_frames={scene_frames}: must be at least 1.")
    scenes = torch.randn(-(-frames // scene_frames), 3, size, size, generator=generator)
    own = torch.randn(frames, 3, size, size, generator=generator)
    return redundancy * scenes.repeat_interleave(scene_frames, 0)[:frames] + (1 - redundancy) * own


def make_inputs(
    model: Any,
    *,
    frames: int,
    batch: int = 1,
    prompt_length: int = 32,
    scene_frames: int = SCENE_FRAMES,
    redundancy: float = 1.0,
    seed: int = 0,
    video: Tensor | None = None,
) -> Inputs:
    """``batch`` prompts of one video and ``prompt_length`` words each, on the model's device.

    ``video``: its pixels as the model takes them, [frames, 3, H, W], in every row instead of one made up for each.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)
    size = config.vision_config.image_size
    look: dict[str, Any] = {"scene_frames": scene_frames, "redundancy": redundancy}
    made = [make_video(frames, size, generator, **look) if video is None else video for _ in range(batch)]
    videos = torch.stack(made)
    high = config.text_config.vocab_size
    words = torch.randint(3, high, (batch, prompt_length), generator=generator)
    special = (words == config.video_token_id) | (words == config.image_token_id)
    return with_video(model, words.masked_fill(special, 3), videos.to(model.device, model.dtype))


def with_video(model: Any, words: Tensor, videos: Tensor) -> Inputs:
    """The prompt for ``videos`` [R, F, 3, H, W] whose other tokens are ``words`` [R, W]; the video comes first."""
    placeholders = torch.full(
        (len(words), videos.shape[1] * pooled_tokens(model.config) + 1), model.config.video_token_id
    )
    ids = torch.cat([words[:, :3], placeholders, words[:, 3:]], dim=1).to(videos.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": videos}


def pooled_tokens(config: Any) -> int:
    """Tokens of a frame that reach the language model of the full model."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return (-(-side // 2)) ** 2
