"""What a picture shows, whoever draws it: videos, what became of them, questions and answers."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import EarlyTomConfigError
from ..integrations.observe import Observation


@dataclass(frozen=True)
class Asked:
    """A question about a video; None where nobody answered, or where nobody knows."""

    question: str
    full: str | None = None
    """The answer with all video tokens."""
    compressed: str | None = None
    """The answer with those that were kept."""
    truth: str | None = None

    @property
    def agree(self) -> bool | None:
        """Whether both answers are the same; None if there is one only."""
        return None if self.full is None or self.compressed is None else self.full == self.compressed


@dataclass(frozen=True)
class Clip:
    """One video. Raises :class:`EarlyTomConfigError` where frames and observation are not of the same video."""

    name: str
    frames: np.ndarray
    """uint8 RGB [F, H, W, 3]: the sampled frames, as the model saw them; of each temporal patch one of its pictures."""
    observation: Observation
    asked: tuple[Asked, ...] = ()
    aspect: float | None = None
    """Width by height of the video itself: the model's frames are squares. None: that of ``frames``."""
    pictures: int = 1
    """Of the video in a frame of the encoder; more than one are a temporal patch."""

    def __post_init__(self) -> None:
        shape, wanted = self.frames.shape, self.observation.frames
        if len(shape) != 4 or shape[0] != wanted or shape[3] != 3 or self.frames.dtype != np.uint8:
            raise EarlyTomConfigError(
                f"frames have shape {tuple(shape)} and dtype {self.frames.dtype}; the observation is one of {wanted} "
                f"frames: they must be uint8 [{wanted}, height, width, 3]."
            )

    @property
    def width_by_height(self) -> float:
        """How the frames are shown."""
        return self.aspect or self.frames.shape[2] / self.frames.shape[1]


class Fact(NamedTuple):
    """A number worth a tile of its own, such as ("time to first token", "203 ms", "1012 ms with all tokens")."""

    name: str
    value: str
    note: str = ""
