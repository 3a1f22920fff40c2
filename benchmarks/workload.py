"""A model and a prompt with a video, made for timing: sizes decide the time, not what weights and pixels mean.

model = random_model(config_of("cpu-medium"), device="cpu", dtype=torch.float32)
inputs = make_inputs(model, frames=16, batch=2, prompt_length=32, scene_frames=4, redundancy=1.0)
"""

from typing import Any

import torch
from torch import Tensor

from earlytom_compile.benchmarks.qwen_workload import frames_in, grid_of, qwen_inputs, with_frames, words_of
from earlytom_compile.errors import EarlyTomConfigError
from earlytom_compile.qwen_shape import QwenShape, is_qwen

SCENE_FRAMES = 4
"""EarlyTom keeps first and last frame of a segment and merges pairs between them: 3 of 4 alike stay, once and for all.
That is 75 %, whatever the threshold; the paper's average is 73.9 %."""
Inputs = dict[str, Tensor]
"""``input_ids``, ``attention_mask`` int64 [R, S] and ``pixel_values_videos`` [R, F, 3, H, W]; models of Qwen have what
:mod:`.qwen_workload` says."""


def random_model(config: Any, *, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Any:
    """The model of a configuration with random weights, made where and as it is used: nothing is copied or cast."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return _random(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)], config, device, dtype, seed)


def random_tower(config: Any, *, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Any:
    """The SigLIP tower of a LLaVA-OneVision alone; ``config`` is that of the whole model."""
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
    frames: int,
    size: int | tuple[int, int],
    generator: torch.Generator,
    *,
    scene_frames: int = SCENE_FRAMES,
    redundancy: float = 1.0,
) -> Tensor:
    """[F, 3, H, W], square where ``size`` is one number: scenes of ``scene_frames``, each frame ``redundancy`` of its
    scene and the rest of its own.

    1: scenes stand still; 0: no two frames have anything in common. In between, it does not say how many frames
    merge: by default a pair is compared with the ends of its own segment, which move apart just as it does.
    """
    if not 0.0 <= redundancy <= 1.0:
        raise EarlyTomConfigError(f"redundancy={redundancy}: must be in [0, 1].")
    if scene_frames < 1:
        raise EarlyTomConfigError(f"scene_frames={scene_frames}: must be at least 1.")
    picture = (3, size, size) if isinstance(size, int) else (3, *size)
    scenes = torch.randn(-(-frames // scene_frames), *picture, generator=generator)
    own = torch.randn(frames, *picture, generator=generator)
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
    picture_size: tuple[int, int] | None = None,
) -> Inputs:
    """``batch`` prompts of one video and ``prompt_length`` words each, on the model's device.

    ``frames``: pictures of the video; ``scene_frames``: what a model takes for a frame, two pictures of Qwen.
    ``video``: its pixels as the model takes them, [frames, 3, H, W], in every row instead of one made up for each.
    ``picture_size``: height and width of made-up pictures, where the model does not say it.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)
    if is_qwen(config):
        size = picture_size or QwenShape.of_config(config).picture_size
    else:
        size = config.vision_config.image_size
    scene = scene_frames * pictures_of_a_frame(config)
    made = [
        make_video(frames, size, generator, scene_frames=scene, redundancy=redundancy) if video is None else video
        for _ in range(batch)
    ]
    videos = torch.stack(made).to(model.device, model.dtype)
    words = torch.randint(3, config.text_config.vocab_size, (batch, prompt_length), generator=generator)
    words = words.masked_fill(torch.isin(words, torch.tensor(_special(config))), 3)
    return qwen_inputs(model, words, videos) if is_qwen(config) else with_video(model, words, videos)


def pictures_of_a_frame(config: Any) -> int:
    """What the encoder sees as one: a picture, or a temporal patch of Qwen."""
    return config.vision_config.temporal_patch_size if is_qwen(config) else 1


def frames_of_inputs(model: Any, inputs: Inputs) -> Tensor:
    """The videos by frames, [R, F, ...]."""
    return frames_in(inputs) if is_qwen(model.config) else inputs["pixel_values_videos"]


def tokens_beside(model: Any, inputs: Inputs) -> int:
    """Positions of a prompt that are no tokens of its video's frames: words, and what comes with a video."""
    ids = inputs["input_ids"][0]
    newlines = 0 if is_qwen(model.config) else 1
    return int((ids != model.config.video_token_id).sum()) + newlines


def with_other_frames(model: Any, inputs: Inputs, videos: Tensor) -> Inputs:
    """The same prompts with other frames, as :func:`frames_of_inputs` gives them, in the place of theirs."""
    if is_qwen(model.config):
        return with_frames(model, words_of(model, inputs), videos, grid_of(inputs))
    ids = inputs["input_ids"]
    return with_video(model, ids[ids != model.config.video_token_id].view(len(ids), -1).cpu(), videos)


def with_video(model: Any, words: Tensor, videos: Tensor) -> Inputs:
    """The prompt for ``videos`` [R, F, 3, H, W] whose other tokens are ``words`` [R, W]; the video comes first."""
    placeholders = torch.full(
        (len(words), videos.shape[1] * pooled_tokens(model.config) + 1), model.config.video_token_id
    )
    ids = torch.cat([words[:, :3], placeholders, words[:, 3:]], dim=1).to(videos.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": videos}


def _special(config: Any) -> list[int]:
    names = ("video_token_id", "image_token_id", "vision_start_token_id", "vision_end_token_id")
    return [getattr(config, name) for name in names if getattr(config, name, None) is not None]


def pooled_tokens(config: Any) -> int:
    """Tokens of a frame that reach the language model of the full model."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return (-(-side // 2)) ** 2
