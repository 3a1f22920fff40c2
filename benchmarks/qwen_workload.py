"""Prompts with a video for Qwen2.5-VL, Qwen3-VL and Qwen3.5, made for timing: sizes decide the time, not what is said.

    qwen_inputs(model, words, pictures [R, F, 3, H, W])
 -> input_ids, attention_mask, mm_token_type_ids int64 [R, S],
    pixel_values_videos [R·T·S, 3·2·p·p], video_grid_thw int64 [R, 3]

Two pictures make a frame, which is a temporal patch: T = ceil(F / 2). A prompt begins with three words; then comes the
video, in one run of placeholders between its marks, or, for Qwen3 and later, with a time stamp before each frame's own
run; the other words follow.
"""

from typing import Any

import torch
from torch import Tensor

from earlytom_compile.qwen_shape import STAMP_TOKENS

Inputs = dict[str, Tensor]

WORDS_BEFORE = 3
STAMP = (2,) * STAMP_TOKENS
"""A time stamp such as ``<12.5 seconds>``: no word of :func:`make_inputs` is 2."""


def patches_of(pictures: Tensor, *, patch: int, temporal: int = 2, merge: int = 2) -> Tensor:
    """[F, 3, H, W] -> [T, S, 3·temporal·patch²]: the S patches of a frame, those of a token next to each other, as the
    model's processor lays them out. A last frame that is not full repeats its last picture."""
    if missing := -len(pictures) % temporal:
        pictures = torch.cat([pictures, pictures[-1:].expand(missing, -1, -1, -1)])
    count, channels, height, width = pictures.shape
    rows, columns = height // patch, width // patch
    cut = pictures.reshape(
        count // temporal, temporal, channels, rows // merge, merge, patch, columns // merge, merge, patch
    )
    ordered = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return ordered.reshape(count // temporal, rows * columns, channels * temporal * patch**2)


def qwen_inputs(model: Any, words: Tensor, pictures: Tensor) -> Inputs:
    """The prompts for ``pictures`` [R, F, 3, H, W] whose other tokens are ``words`` [R, W]."""
    vision = model.config.vision_config
    sizes = {"patch": vision.patch_size, "temporal": vision.temporal_patch_size, "merge": vision.spatial_merge_size}
    frames = torch.stack([patches_of(video, **sizes) for video in pictures])
    return with_frames(model, words, frames, (pictures.shape[3] // sizes["patch"], pictures.shape[4] // sizes["patch"]))


def with_frames(model: Any, words: Tensor, frames: Tensor, grid: tuple[int, int]) -> Inputs:
    """The same for ``frames`` [R, T, S, V] whose S patches are a ``grid``."""
    config, (rows, count, places, values) = model.config, frames.shape
    tokens = places // config.vision_config.spatial_merge_size**2
    marks = config.vision_start_token_id, config.vision_end_token_id
    slot = _slot(config.video_token_id, marks, tokens)
    if config.model_type == "qwen2_5_vl":
        video = _slot(config.video_token_id, marks, tokens * count)
    else:
        video = [*STAMP, *slot] * count
    placed = torch.tensor(video).expand(rows, -1)
    before, after = words[:, :WORDS_BEFORE], words[:, WORDS_BEFORE:]
    ids = torch.cat([before, placed, after], dim=1).to(frames.device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.where(ids == config.video_token_id, 2, 0),
        "pixel_values_videos": frames.reshape(rows * count * places, values),
        "video_grid_thw": torch.tensor([[count, *grid]] * rows, device=frames.device),
    }


def _slot(video: int, marks: tuple[int, int], tokens: int) -> list[int]:
    return [marks[0], *[video] * tokens, marks[1]]


def frames_in(inputs: Inputs) -> Tensor:
    """[R, T, S, V] of inputs made here: a frame in the place of a picture."""
    count, height, width = (int(size) for size in inputs["video_grid_thw"][0])
    pixels = inputs["pixel_values_videos"]
    return pixels.reshape(-1, count, height * width, pixels.shape[-1])


def grid_of(inputs: Inputs) -> tuple[int, int]:
    """Patches of a picture, height x width."""
    _, height, width = inputs["video_grid_thw"][0].tolist()
    return height, width


def words_of(model: Any, inputs: Inputs) -> Tensor:
    """[R, W]: what in the prompts is neither video nor mark nor time stamp."""
    config, ids = model.config, inputs["input_ids"]
    video = [config.video_token_id, config.vision_start_token_id, config.vision_end_token_id, STAMP[0]]
    return ids[~torch.isin(ids, torch.tensor(video, device=ids.device))].view(len(ids), -1).cpu()
