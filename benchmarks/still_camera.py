"""A video as a camera on a stand takes one: a room that stays as it is, somebody who talks in it, noise of the sensor.

    python -m earlytom_compile.benchmarks.still_camera talk.mp4 --cuts 1     # 10 s of 1280x720, 25 a second, H.264
    write_clip("talk.mp4", Take(seconds=4, noise=0))                         # the same from Python

Of such a video most patches repeat from frame to frame while no two frames are equal. It is drawn, so that everybody
has it, and encoded for real, so that what is decoded again has the errors of compression.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from earlytom_compile.errors import EarlyTomConfigError

_DRAWN = 0.8  # of what moves in a second or two, what the speaker covers at any moment
_PARTS = 11.6  # area of head and shoulders, in squares of the head's radius
_ROOM = ((96, 104, 112), (150, 138, 120), (84, 98, 84), (120, 112, 136))  # walls, a shot each
_SKIN, _COAT, _MOUTH = (188, 142, 118), (52, 66, 104), (92, 30, 36)


@dataclass(frozen=True)
class Take:
    """What is filmed. Raises :class:`EarlyTomConfigError` for what cannot be."""

    width: int = 1280
    height: int = 720
    seconds: float = 10.0
    rate: int = 25
    """Frames a second."""
    moving: float = 0.2
    """About the share of the picture in which something changes from one second to another."""
    cuts: int = 0
    """Each begins another shot, of another room."""
    noise: float = 2.0
    """Standard deviation of the sensor's noise, in 255ths of the brightest value."""
    seed: int = 0

    def __post_init__(self) -> None:
        fits = self.width % 2 == 0 and self.height % 2 == 0 and min(self.width, self.height) >= 64
        if not fits or self.rate < 1 or self.frames <= self.cuts or self.cuts < 0:
            raise EarlyTomConfigError(
                f"a take of {self.width}x{self.height}, {self.seconds:g} s at {self.rate} frames a second, "
                f"{self.cuts} cuts: sides must be even and at least 64, and each shot needs a frame."
            )
        if not 0 < self.moving <= 0.5 or self.noise < 0:
            raise EarlyTomConfigError(
                f"moving={self.moving}, noise={self.noise}: must be in (0, 0.5], and not negative."
            )

    @property
    def frames(self) -> int:
        """In the whole video."""
        return round(self.seconds * self.rate)


def write_clip(path: str | Path, take: Take | None = None) -> Path:
    """Draw ``take`` (None: the default one) and encode it to ``path`` as H.264."""
    import av  # drawing needs no FFmpeg, and a lent machine may lack it

    take = take or Take()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=take.rate, options={"preset": "veryfast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = take.width, take.height, "yuv420p"
        for picture in draw_frames(take):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return Path(path)


def draw_frames(take: Take) -> Iterator[np.ndarray]:
    """The frames before encoding: uint8 RGB [height, width, 3] each."""
    random = np.random.default_rng(take.seed)
    sensor = _Sensor(take, random)
    starts = [round(shot * take.frames / (take.cuts + 1)) for shot in range(take.cuts + 2)]
    for shot, (start, end) in enumerate(itertools.pairwise(starts)):
        room, speaker = _room(take, shot, random), _Speaker(take, random)
        for frame in range(start, end):
            picture = room.copy()
            speaker.draw(picture, frame / take.rate)
            yield sensor.noisy(picture)


class _Sensor:
    """Adds noise that is new in every frame: a field that is moved, since drawing one takes longer than encoding."""

    def __init__(self, take: Take, random: np.random.Generator) -> None:
        self._random, self._size = random, (take.height, take.width)
        self._field = None
        if take.noise:
            values = random.normal(0, take.noise, (take.height + 64, take.width + 64, 3))
            self._field = values.round().astype(np.int16)

    def noisy(self, picture: np.ndarray) -> np.ndarray:
        if self._field is None:
            return picture
        (top, left), (height, width) = self._random.integers(0, 64, 2), self._size
        field = self._field[top : top + height, left : left + width]
        field = field[:: self._random.choice((-1, 1)), :: self._random.choice((-1, 1))]
        return (picture + field).clip(0, 255).astype(np.uint8)


class _Speaker:
    """Head and shoulders that sway, and a mouth that opens."""

    def __init__(self, take: Take, random: np.random.Generator) -> None:
        self._unit = unit = math.sqrt(_DRAWN * take.moving * take.width * take.height / _PARTS)
        self._foot: tuple[float, float] = take.width * random.uniform(0.4, 0.6), take.height
        self._coat = _sprite(2.1 * unit, 2.3 * unit, _COAT, random)
        self._head = _sprite(unit, 1.3 * unit, _SKIN, random)

    def draw(self, picture: np.ndarray, seconds: float) -> None:
        """Over ``picture``, as it is at that moment."""
        unit, (x, y) = self._unit, self._foot
        x += unit * (0.22 * _swing(seconds, 0.29) + 0.09 * _swing(seconds, 0.83))
        y += unit * 0.08 * _swing(seconds, 0.47)
        _paste(picture, self._coat, x, y)
        x, y = x + 0.2 * unit * _swing(seconds, 0.61), y - 3.1 * unit + 0.08 * unit * _swing(seconds, 1.13)
        _paste(picture, self._head, x, y)
        mouth = 0.32 * unit, unit * (0.05 + 0.14 * abs(_swing(seconds, 2.3)))
        _paste(picture, _sprite(*mouth, _MOUTH, None), x, y + 0.6 * unit)


def _swing(seconds: float, rate: float) -> float:
    return math.sin(2 * math.pi * rate * seconds)


_Sprite = tuple[np.ndarray, np.ndarray]
"""uint8 [h, w, 3] and bool [h, w]: which of it is shown."""


def _sprite(across: float, down: float, colour: Sequence[int], random: np.random.Generator | None) -> _Sprite:
    """An ellipse with these half axes; with ``random``, of cloth."""
    width, height = 2 * math.ceil(across) + 1, 2 * math.ceil(down) + 1
    y, x = np.mgrid[:height, :width]
    shown = ((x - width // 2) / across) ** 2 + ((y - height // 2) / down) ** 2 <= 1
    cloth = np.zeros((height, width, 1)) if random is None else _texture(height, width, (7, 19), 34.0, random)
    return (np.array(colour) + cloth).clip(0, 255).round().astype(np.uint8), shown


def _paste(picture: np.ndarray, sprite: _Sprite, x: float, y: float) -> None:
    """With its middle at (x, y); what lies outside the picture is left out."""
    pixels, shown = sprite
    height, width = shown.shape
    top, left = round(y) - height // 2, round(x) - width // 2
    rows = slice(max(0, -top), max(0, min(height, len(picture) - top)))
    columns = slice(max(0, -left), max(0, min(width, picture.shape[1] - left)))
    part = picture[top + rows.start : top + rows.stop, left + columns.start : left + columns.stop]
    part[shown[rows, columns]] = pixels[rows, columns][shown[rows, columns]]


def _room(take: Take, shot: int, random: np.random.Generator) -> np.ndarray:
    """A wall with paper on it, shelves and what stands on them: uint8 [height, width, 3]."""
    wall = np.array(_ROOM[shot % len(_ROOM)]) + _texture(take.height, take.width, (9, 40, 160), 22.0, random)
    for shelf in range(1, 4):
        level, left = take.height * (0.2 * shelf), 0.0
        while left < take.width:
            wide, tall = random.uniform(0.015, 0.05) * take.width, random.uniform(0.06, 0.15) * take.height
            box = slice(int(level - tall), int(level)), slice(int(left), int(left + wide))
            wall[box] = 0.6 * wall[box] + random.uniform(0, 110, 3)
            left += wide + random.choice((0.0, 0.02)) * take.width
        wall[int(level) : int(level + 0.012 * take.height)] = (70, 48, 32)
    return wall.clip(0, 255).round().astype(np.uint8)


def _texture(height: int, width: int, grains: Sequence[int], depth: float, random: np.random.Generator) -> np.ndarray:
    """[height, width, 1]: random blots of these sizes in pixels, about ``depth`` deep."""
    total = np.zeros((height, width))
    for grain in grains:
        coarse = random.uniform(-1, 1, (height // grain + 2, width // grain + 2))
        total += _stretched(_stretched(coarse, height, grain).T, width, grain).T
    return (depth * total / math.sqrt(len(grains)))[..., None]


def _stretched(coarse: np.ndarray, size: int, grain: int) -> np.ndarray:
    """Rows between the given ones, ``grain`` apart, as straight lines lead from one to the next."""
    at = np.arange(size) / grain
    first, share = at.astype(int), (at % 1)[:, None]
    return (1 - share) * coarse[first] + share * coarse[first + 1]


def main(argv: Sequence[str] | None = None) -> int:
    """Write one clip."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    usual = Take()
    for name in ("width", "height", "rate", "cuts", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(usual, name), help="(%(default)s)")
    for name in ("seconds", "moving", "noise"):
        parser.add_argument(f"--{name}", type=float, default=getattr(usual, name), help="(%(default)s)")
    asked = vars(parser.parse_args(argv))
    print(f"wrote {write_clip(asked.pop('file'), Take(**asked))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
