"""How much of a video stays, where one graph serves videos of every length.

The numbers are those of ``EarlyTomConfig``, rounded in Python and not by what a compiler makes of the formula: half a
token more or less would be another result. They depend on the number of frames alone, so the host knows them without
waiting for the device.
"""

import torch
from torch import Tensor

from earlytom_compile.config import EarlyTomConfig


@torch.library.custom_op("earlytom::video_budget", mutates_args=())
def video_budget(frames: int, tokens: int, retain_ratio: float) -> Tensor:
    """What is kept of a video of ``frames`` frames with ``tokens`` tokens each, in any variant that keeps exactly K.

    Args:
        frames: F, frames of the video, at least 1.
        tokens: P, tokens of a frame after pooling, at least 1.
        retain_ratio: r in (0, 1].

    Returns:
        int64 [2] on the CPU: K = max(1, round(r F P)), half to even (Eq. 5), and ceil(r F), the frames that merging
        leaves at least (algorithm.md, stage 1).

    Raises:
        ValueError: no frames or no tokens. EarlyTomConfigError: a ratio out of its range.
    """
    if frames < 1 or tokens < 1:
        raise ValueError(
            f"earlytom::video_budget: frames={frames}, tokens={tokens}; a video has at least 1 frame of 1 token"
        )
    config = EarlyTomConfig(retain_ratio=retain_ratio)
    return torch.tensor([config.token_budget(frames, tokens), config.min_frames(frames)])


@video_budget.register_fake
def _(frames: int, tokens: int, retain_ratio: float) -> Tensor:
    return torch.empty(2, dtype=torch.int64, device="cpu")


@torch.library.custom_op("earlytom::place_budget", mutates_args=())
def place_budget(frames: int, places: int, prefix: int, encode_ratio: float) -> Tensor:
    """How many places of a video of ``frames`` frames with ``places`` places each are computed (docs/reuse.md).

    Args:
        frames: F, at least 1.
        places: S, at least 1.
        prefix: those of the S that are computed in every frame, at least 0.
        encode_ratio: in (0, 1].

    Returns:
        int64 [] on the CPU: T = max(S + (F - 1) prefix, round(encode_ratio F S)), half to even.

    Raises:
        ValueError: no frames, no places, or a prefix that is no part of them. EarlyTomConfigError: a ratio out of its
            range.
    """
    if frames < 1 or places < 1 or not 0 <= prefix <= places:
        raise ValueError(
            f"earlytom::place_budget: frames={frames}, places={places}, prefix={prefix}; a video has at least 1 frame "
            "of 1 place, and a prefix is a part of its places"
        )
    config = EarlyTomConfig(reuse=True, encode_ratio=encode_ratio)
    return torch.tensor(config.place_budget(frames, places, prefix))


@place_budget.register_fake
def _(frames: int, places: int, prefix: int, encode_ratio: float) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")
