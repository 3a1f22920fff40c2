"""Ways to fewer tokens that look at nothing in a video: fewer frames, means of neighbouring frames, means of tokens.

    baseline("frame subsampling", model, frames=4)                    # four frames, each whole
    baseline("frame averaging", model, frames=4)                      # four means of two neighbouring frames' pixels
    baseline("average pooling", model, grid=(4, 2, 2))                # of all frames, means over blocks of tokens
    baseline("frame subsampling", model, frames=4, grid=(4, 2, 2))    # both

    pixels [8, 3, 96, 96] --frames--> [n, 3, 96, 96] --encoder--> tokens [n, 4, 4, C] --grid--> [t * h * w, C]

(numbers of the toy world; another model has others)

With a ratio in their place, each comes as near to its number of tokens as whole frames and blocks allow.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch.nn import functional as F

from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.shapes import ModelShape
from earlytom_compile.toyworld import cost
from earlytom_compile.toyworld.installed import Compressed, Model

SUBSAMPLING = "frame subsampling"
AVERAGING = "frame averaging"
POOLING = "average pooling"
BASELINES = (SUBSAMPLING, AVERAGING, POOLING)
OPTIONS = ("frames", "grid")
Grid = tuple[int, int, int]
"""Time, height, width."""


class Plain(ABC):
    """A row of plain PyTorch whose time to the first token says something: :meth:`tokens` is all that is computed of a
    video before the language model, for the row's answers and for its time alike."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.shape = ModelShape.from_config(model.config)

    @abstractmethod
    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """[K, C] of the pixels of one video."""

    @abstractmethod
    def __call__(self, pixels: torch.Tensor) -> Compressed:
        """The same, and what they cost."""


class Baseline(Plain):
    """That of a name: ``frames`` of a video, averaged or taken, and means over blocks of their tokens, of which there
    are as many as ``grid`` says. What is None, the ratio decides, if it means something to that name."""

    def __init__(
        self, name: str, model: Model, retain_ratio: float | None, frames: int | None, grid: Grid | None
    ) -> None:
        super().__init__(model)
        self._name, self._ratio, self._frames, self._grid = name, retain_ratio or 1.0, frames, grid

    def sizes(self, frames_in: int) -> tuple[int, Grid | None]:
        """How many frames of so many and which blocks; None: every token stays."""
        of_frame, frames, grid = self.shape.pooled_tokens, self._frames, self._grid
        budget = EarlyTomConfig(retain_ratio=self._ratio).token_budget(frames_in, of_frame)
        if self._name == POOLING and grid is None:
            side = math.isqrt(of_frame) // 2
            grid = (max(1, round(budget / side**2)), side, side)
        if frames is None:
            frames = frames_in if self._name == POOLING else max(1, round(budget / of_frame))
        return frames, grid

    @torch.no_grad()
    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        frames, grid = self.sizes(len(pixels))
        fewer = averaged_frames if self._name == AVERAGING else middle_frames
        rows = all_tokens(self.model, fewer(pixels, frames))
        return rows.flatten(0, 1) if grid is None else pooled(rows, grid)

    def __call__(self, pixels: torch.Tensor) -> Compressed:
        frames, _ = self.sizes(len(pixels))
        return Compressed(self.tokens(pixels), frames / len(pixels), cost.of_frames(self.shape, (frames,), ()))


def baseline(
    name: str,
    model: Model,
    retain_ratio: float | None = None,
    frames: int | None = None,
    grid: Grid | None = None,
) -> Baseline:
    """The baseline of that name; what is not given, ``retain_ratio`` decides."""
    return Baseline(name, model, retain_ratio, frames, grid)


def all_tokens(model: Model, pixels: torch.Tensor) -> torch.Tensor:
    """Tokens [n, P, C] of the pixels of n frames, by the model's own code."""
    features: Any = model.model.get_video_features(
        pixels[None],
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        return_dict=True,
    )
    rows: torch.Tensor = features.pooler_output[0]
    return rows[:-1].unflatten(0, (len(pixels), -1))  # without the newline behind the video


def middle_frames(pixels: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` evenly spaced frames: the middle one of each of so many equal parts."""
    middle = (torch.arange(count) + 0.5) * len(pixels) / count
    return pixels[middle.long()]


def averaged_frames(pixels: torch.Tensor, count: int) -> torch.Tensor:
    """Means of ``count`` parts, as equal as they can be, the longer ones first."""
    return torch.stack([part.mean(0) for part in pixels.tensor_split(count)])


def pooled(tokens: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Means over blocks of the tokens [n, P, C], row by row [t * h * w, C]; blocks that do not divide them overlap."""
    side = math.isqrt(tokens.shape[1])
    volume = tokens.unflatten(1, (side, side)).permute(3, 0, 1, 2)
    return F.adaptive_avg_pool3d(volume, grid).flatten(1).T
