"""A short video with something in it: three scenes, hard cuts, moving shapes, a stretch where nothing moves.

    write_clip("clip.mp4")      # 96 frames of 320x240, 12 a second: circle moves | still life | bar falls

It is encoded for real (H.264, or MPEG-4 where FFmpeg lacks an H.264 encoder), so what is decoded again
carries the noise of compression.
"""

import typing
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT, FPS = 320, 240, 12
FRAMES = 96

_Y, _X = np.mgrid[:HEIGHT, :WIDTH]
_DARK, _BRIGHT, _WARM = (24, 28, 48), (226, 222, 208), (120, 62, 40)
_RED, _GREEN, _BLUE = (214, 40, 57), (46, 160, 67), (38, 84, 200)


def write_clip(path: str | Path) -> str:
    """Draw the clip, encode it to ``path`` and return the name of the codec."""
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w") as container:
        stream = typing.cast(av.VideoStream, container.add_stream(codec, rate=FPS))
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for picture in draw_frames():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return stream.codec_context.name


def draw_frames() -> Iterator[np.ndarray]:
    """The frames before encoding: uint8 RGB [240, 320, 3] each."""
    scene = FRAMES // 3
    for frame in range(FRAMES):
        step = frame % scene / scene
        yield (_circle_passes, _still_life, _bar_falls)[frame // scene](step)


def _circle_passes(step: float) -> np.ndarray:
    picture = _canvas(_DARK)
    _fill(picture, _disc(40 + 240 * step, 120, 34), _RED)
    return picture


def _still_life(step: float) -> np.ndarray:
    picture = _canvas(_BRIGHT)
    _fill(picture, _box(40, 60, 120, 180), _BLUE)
    _fill(picture, _disc(220, 130, 50), _GREEN)
    return picture


def _bar_falls(step: float) -> np.ndarray:
    picture = _canvas(_WARM)
    top = 200 * step
    _fill(picture, _box(60, top, 260, top + 30), _GREEN)
    _fill(picture, _disc(160, 200, 18 + 20 * step), _BLUE)
    return picture


def _canvas(colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((HEIGHT, WIDTH, 3), colour, np.uint8)


def _fill(picture: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> None:
    picture[mask] = colour


def _disc(x: float, y: float, radius: float) -> np.ndarray:
    return (_X - x) ** 2 + (_Y - y) ** 2 <= radius**2


def _box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return (left <= _X) & (right > _X) & (top <= _Y) & (bottom > _Y)
