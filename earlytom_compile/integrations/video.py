"""Frames out of a video file with PyAV, so that torchvision, torchcodec or decord need not be there.

read_video("jobs.mp4", 32)      # 524 frames in the file
-> VideoFrames: uint8 [32, 1024, 576, 3], indices (0, 16, 33, ..., 523)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from ..errors import EarlyTomConfigError

Progress = Callable[[int, int], None]
"""Called with (frames decoded so far, frames to decode)."""

# FFmpeg reads any text file as the drawing of a terminal.
_NO_VIDEO_FORMATS = frozenset({"tty"})


@dataclass(frozen=True)
class VideoFrames:
    """``pixels``: uint8 RGB [F, H, W, 3]; ``indices``: their places in the file; ``total``: frames there."""

    pixels: np.ndarray
    indices: tuple[int, ...]
    total: int


def sample_indices(total: int, frames: int) -> tuple[int, ...]:
    """``frames`` indices spread evenly over 0 .. total-1, first and last included, rounded down.

    This is what LLaVA-OneVision was trained and is evaluated with (LLaVA-NeXT's ``load_video``).
    """
    return tuple(int(index) for index in np.linspace(0, total - 1, frames, dtype=np.int64))


def read_video(path: str | Path, frames: int, *, progress: Progress | None = None) -> VideoFrames:
    """Decode ``frames`` frames of the file's first video stream, spread evenly over it.

    Raises :class:`EarlyTomConfigError` for a missing file, a file without video, and fewer frames than asked.
    """
    path = Path(path)
    if frames < 1:
        raise EarlyTomConfigError(f"frames={frames}: must be at least 1.")
    if not path.is_file():
        raise EarlyTomConfigError(f"no video file at {str(path)!r}: give the path of an existing file.")
    total = _count_packets(path)
    indices = _sample_or_raise(path, total, frames)
    pixels, seen = _decode(path, indices, progress)
    if len(pixels) < frames:  # Fewer frames come out than packets went in, as in a file that was cut off.
        total, indices = seen, _sample_or_raise(path, seen, frames)
        pixels, _ = _decode(path, indices, progress)
    return VideoFrames(np.stack(pixels), indices, total)


def _sample_or_raise(path: Path, total: int, frames: int) -> tuple[int, ...]:
    if total < frames:
        raise EarlyTomConfigError(
            f"{str(path)!r} has {total} frame(s), fewer than the {frames} asked for: "
            f"ask for at most {total}, or take a longer video."
        )
    return sample_indices(total, frames)


def _count_packets(path: Path) -> int:
    """Frames in the file, without decoding; headers often carry 0 or a guess."""
    with _open(path) as container, _damage_explained(path):
        return sum(packet.size > 0 for packet in container.demux(container.streams.video[0]))


def _decode(path: Path, indices: tuple[int, ...], progress: Progress | None) -> tuple[list[np.ndarray], int]:
    """The frames at ``indices`` (ascending), and how many frames came out up to the last of them."""
    wanted, pixels, seen = set(indices), [], 0
    with _open(path) as container, _damage_explained(path):
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for seen, frame in enumerate(container.decode(stream), start=1):
            if seen - 1 in wanted:
                pixels.append(frame.to_ndarray(format="rgb24"))
            if progress is not None:
                progress(seen, indices[-1] + 1)
            if seen > indices[-1]:
                break
    return pixels, seen


@contextmanager
def _damage_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except av.error.FFmpegError as error:
        message = f"{str(path)!r} cannot be decoded: {error.strerror}. Is the file damaged?"
        raise EarlyTomConfigError(message) from error


def _open(path: Path) -> av.container.InputContainer:
    try:
        container = av.open(str(path))
    except av.error.FFmpegError as error:
        message = f"{str(path)!r} is no video file FFmpeg can read: {error.strerror}."
        raise EarlyTomConfigError(message) from error
    if not container.streams.video or container.format.name in _NO_VIDEO_FORMATS:
        container.close()
        kind = container.format.name
        raise EarlyTomConfigError(f"{str(path)!r} has no video in it (FFmpeg reads it as {kind}).")
    return container
