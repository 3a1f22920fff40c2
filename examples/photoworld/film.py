"""Through a real H.264 file and back: what a codec leaves of drawn pictures.

sampled(video.draw, 16, 16)    # uint8 [16, 224, 224, 3], decoded
write_mp4(video, "a.mp4")      # the same file on disk
"""

import io
import typing
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np

FRAMES_BETWEEN = 4
"""Frames of a file from one sampled frame to the next."""
FPS = 8
QUALITY = 28
"""H.264's constant rate factor: somewhat worse than the 23 that x264 takes unless told otherwise."""

# One thread, and none of x264's instructions for AVX-512, with which the same frames make another file every few times
# (x264 of PyAV 18.1, on an AMD EPYC): a video is to follow from its seed.
_OPTIONS = {"crf": str(QUALITY), "preset": "veryfast", "threads": "1", "x264-params": "asm=SSE4.2"}

Draw = Callable[[float], np.ndarray]


class Film(typing.Protocol):
    """What can be drawn at any time from 0 to its last sampled frame."""

    @property
    def length(self) -> int:
        """Sampled frames."""

    def draw(self, time: float) -> np.ndarray:
        """uint8 RGB."""


def write_mp4(video: Film, path: str | Path) -> None:
    """Encode ``(length - 1) * 4 + 1`` frames, 8 a second."""
    _encode(video.draw, video.length, str(path))


def sampled(draw: Draw, length: int, count: int) -> np.ndarray:
    """Evenly spaced frames of the film of ``length`` sampled ones, encoded and decoded, uint8 RGB [count, H, W, 3].

    As many as the sampled ones are these; more or fewer are what another frame rate shows.
    """
    file = io.BytesIO()
    _encode(draw, length, file)
    file.seek(0)
    with av.open(file, "r") as container:
        decoded = list(container.decode(video=0))
    chosen = np.linspace(0, len(decoded) - 1, count).round().astype(int)
    return np.stack([decoded[index].to_ndarray(format="rgb24") for index in chosen])


def sampled_times(length: int, count: int) -> list[float]:
    """When the frames of :func:`sampled` are seen, in sampled frames."""
    last = (length - 1) * FRAMES_BETWEEN
    return [float(time) for time in np.linspace(0, last, count).round() / FRAMES_BETWEEN]


def _encode(draw: Draw, length: int, file: typing.Any) -> None:
    with av.open(file, "w", format="mp4") as container:
        stream = typing.cast(av.VideoStream, container.add_stream("libx264", rate=FPS, options=_OPTIONS))
        for index in range((length - 1) * FRAMES_BETWEEN + 1):
            picture = draw(index / FRAMES_BETWEEN)
            if index == 0:
                stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
