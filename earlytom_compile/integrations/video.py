"""Frames out of a video file with PyAV, so that torchvision, torchcodec or decord need not be there.

read_video("jobs.mp4", 32)      # 524 frames in the file
-> VideoFrames: uint8 [32, 1024, 576, 3], indices (0, 16, 33, ..., 523)
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import av
import numpy as np

from ..config import bad_option, is_whole_number
from ..errors import EarlyTomConfigError, EarlyTomVideoWarning
from . import addresses
from .addresses import is_url, readable, refuse_endless, unreadable
from .orientation import display_matrix, upright
from .seeking import (
    DURATION_IN_HEADER,
    Damaged,
    NotExact,
    OtherFrames,
    Packets,
    Progress,
    Seeker,
    decode_all,
    list_packets,
    one_thread,
    presentation_order,
)

Resize = Callable[[np.ndarray], np.ndarray]
"""uint8 [H, W, 3] -> uint8 [h, w, 3], of the same size for every frame."""


class ResizeByLength(Protocol):
    """What makes frames the smaller the more of them there are."""

    def of(self, frames: int) -> Resize:
        """For a video of so many."""
        ...


# FFmpeg reads any text file as the drawing of a terminal.
_NO_VIDEO_FORMATS = frozenset({"tty"})

# AV_DISPOSITION_ATTACHED_PIC
_ATTACHED_PICTURE = 1 << 10


@dataclass(frozen=True)
class VideoFrames:
    """``pixels``: uint8 RGB [F, H, W, 3]; ``indices``: their places in the file; ``total``: frames there; ``rate``: of
    them a second, on average; None where the file does not tell."""

    pixels: np.ndarray
    indices: tuple[int, ...]
    total: int
    rate: float | None = None


def sample_indices(total: int, frames: int) -> tuple[int, ...]:
    """``frames`` indices spread evenly over 0 .. total-1, first and last included, rounded down.

    This is what LLaVA-OneVision was trained and is evaluated with (LLaVA-NeXT's ``load_video``).
    """
    return tuple(int(index) for index in np.linspace(0, total - 1, frames, dtype=np.int64))


def require_frames(name: str, number: Any) -> None:
    """Raise :class:`EarlyTomConfigError` for what is no number of frames; numpy's integers are some."""
    if not is_whole_number(number) or number < 1:
        raise bad_option(name, number, "a whole number, at least 1")


def read_video(
    path: str | Path,
    frames: int | None = None,
    *,
    default: int = 32,
    resize: Resize | ResizeByLength | None = None,
    progress: Progress | None = None,
) -> VideoFrames:
    """Decode ``frames`` frames of a video, spread evenly over it, upright as a player shows them.

    ``path``: a video, an animation or a picture (one frame), anything that FFmpeg reads; an address such as
    ``https://...`` is read where FFmpeg can, from a copy if the server sends nothing but whole files. Several video
    streams: the first that is no cover picture.
    ``frames``: None takes ``default`` frames, or all of a video that has fewer.
    ``resize``: makes each frame smaller as soon as it is decoded (uint8 [H, W, 3] -> uint8 [h, w, 3]), so that the
    large ones are never in memory together: 32 frames of 3840x2160 are 800 MB. ``frame_resizer(processor)`` in
    ``preprocess`` is what the model's processor would do to them later, bit for bit; where the size depends on how many
    frames there are, ``resize.of(frames)`` is asked for it.
    ``progress``: called with (frames decoded so far, frames to decode); of a long video only what leads from key
    frames to the frames wanted is decoded.

    The frames are those that decoding the whole file gives at ``sample_indices(total, frames)``, in their own
    resolution; a video that changes its resolution on the way has that of its first frame. Where seeking does not
    prove to lead to exactly these frames, everything is decoded. Damage in parts that need not be decoded is not seen.

    Warns (:class:`EarlyTomVideoWarning`) where the file breaks off before its end or cannot be decoded in places; the
    frames are then spread over what there is. Raises :class:`EarlyTomConfigError` for a missing file, a file without
    video, an address that cannot be read, and fewer frames than ``frames``.
    """
    if frames is not None:
        require_frames("frames", frames)
    require_frames("default", default)
    with readable(path) as address:
        video, lost = _read(_Film(address, str(path), frames, default, resize, progress))
    if lost is not None:
        warnings.warn(lost, EarlyTomVideoWarning, stacklevel=2)
    return video


class _TooFew(EarlyTomConfigError):
    """A file has only ``total`` frames."""

    def __init__(self, message: str, total: int) -> None:
        super().__init__(message)
        self.total = total


@dataclass(frozen=True)
class _Film:
    """What is to be read: ``address`` for FFmpeg, ``name`` for people, and the arguments of :func:`read_video`."""

    address: str
    name: str
    frames: int | None
    default: int
    resize: Resize | ResizeByLength | None
    progress: Progress | None

    def choose(self, total: int) -> tuple[int, ...]:
        """The frames to take of ``total``; raises if there are too few."""
        if not total:
            raise _TooFew(
                f"{self.name!r}: no frame of it can be decoded: damaged, or of a kind this FFmpeg does not know.",
                total,
            )
        if self.frames is not None and total < self.frames:
            raise _TooFew(
                f"{self.name!r} has {total} frame(s), fewer than the {self.frames} asked for: "
                f"ask for at most {total}, or take a longer video.",
                total,
            )
        return sample_indices(total, self.frames or min(self.default, total))

    def collector(self, count: int) -> "_Pixels":
        """For so many frames."""
        resize = self.resize
        return _Pixels(count, resize if resize is None or callable(resize) else resize.of(count))


class _Claim(NamedTuple):
    """What a file's headers say there is, before anybody has looked; 0 where they say nothing."""

    frames: int
    seconds: float
    gif: bool = False


@dataclass
class _Pixels:
    """Collects frames in one array, made when the first comes: a list would need its memory twice."""

    count: int
    resize: Resize | None
    taken: int = 0
    rate: float | None = None
    pixels: np.ndarray | None = field(default=None, repr=False)
    size: tuple[int, int] | None = None
    rotation: int | None = None
    matrix: tuple[int, ...] | None = None

    def add(self, frame: av.VideoFrame) -> None:
        # A frame that was asked for its matrix refers to itself and stays in memory until Python looks for such cycles.
        rotation = getattr(frame, "rotation", 0)  # unknown to the first PyAV 14
        if rotation != self.rotation:
            self.rotation, self.matrix = rotation, display_matrix(frame)
        if self.size is None or self.resize is not None:
            self.size = frame.width, frame.height
        width, height = self.size
        picture = upright(frame.to_ndarray(format="rgb24", width=width, height=height), self.matrix)
        if self.resize is not None:
            picture = self.resize(picture)
        if self.pixels is None:
            self.pixels = np.empty((self.count, *picture.shape), np.uint8)
        self.pixels[self.taken] = picture
        self.taken += 1


def _read(film: _Film) -> tuple[VideoFrames, str | None]:
    """The frames, and what to warn of."""
    damaged = False
    while True:
        with _open(film) as (container, stream):
            claim = _claim(container, stream)
            packets = list_packets(container, stream)
            shown = sum(packet.shown for packet in packets.listed)
            if any(packet.corrupt for packet in packets.listed):
                damaged = True
            if damaged:
                one_thread(stream)
            try:
                video = _by_seeking(film, container, stream, packets)
                return video, _lost(film, claim, packets, video.total, shown if damaged else 0)
            except NotExact as reason:
                logging.getLogger(__name__).debug("%s is not read by seeking: %s", film.name, reason)
                if damaged or not isinstance(reason, Damaged):
                    break
                damaged = True
    try:
        video, damaged = _from_start(film, shown, damaged)
    except _TooFew as error:
        lost = _lost(film, claim, packets, error.total, shown if error.total else 0)
        raise EarlyTomConfigError(f"{error} {lost}" if lost else str(error)) from None
    return video, _lost(film, claim, packets, video.total, shown if damaged else 0)


def _by_seeking(
    film: _Film, container: av.container.InputContainer, stream: av.VideoStream, packets: Packets
) -> VideoFrames:
    order: Sequence[int] = presentation_order(stream, packets.listed)
    while True:
        if len(order) < (film.frames or 1):
            raise NotExact(f"{len(order)} packets, too few; perhaps more frames come out")
        indices = film.choose(len(order))
        kept = film.collector(len(indices))
        try:
            for frame in Seeker(container, stream, packets.listed, order).frames(indices, film.progress):
                kept.add(frame)
            assert kept.pixels is not None
            return VideoFrames(kept.pixels, indices, len(order), _rate(stream))
        except OtherFrames as others:  # always fewer, so this comes to an end
            order = others.order


def _from_start(film: _Film, expected: int, damaged: bool) -> tuple[VideoFrames, bool]:
    """Decode everything; again where another number of frames comes out, or damage shows. Also says if there is any."""
    indices = sample_indices(expected, min(film.frames or film.default, expected)) if expected else ()
    kept, total, failed = _decode_once(film, indices, expected, damaged)
    if failed and not damaged:
        return _from_start(film, total, True)
    chosen = film.choose(total)
    if chosen != indices:
        kept, seen, _ = _decode_once(film, chosen, total, damaged)
        if seen != total:
            raise EarlyTomConfigError(f"{film.name!r} gave {total} frames, and {seen} when it was read again.")
    assert kept.pixels is not None
    return VideoFrames(kept.pixels, chosen, total, kept.rate), damaged


def _rate(stream: av.VideoStream) -> float | None:
    """Frames a second, on average."""
    rate = stream.average_rate or getattr(stream, "guessed_rate", None)
    return float(rate) if rate else None


def _decode_once(film: _Film, indices: Sequence[int], expected: int, damaged: bool) -> tuple[_Pixels, int, int]:
    """The frames at ``indices``, how many there are in all, and how many packets could not be decoded."""
    wanted, kept, seen, failed = set(indices), film.collector(len(indices)), 0, 0
    with _open(film) as (container, stream):
        kept.rate = _rate(stream)
        if damaged:
            one_thread(stream)
        for frame in decode_all(container, stream):
            if frame is None:
                failed += 1
                continue
            if seen in wanted:
                kept.add(frame)
            seen += 1
            if film.progress is not None:
                film.progress(seen, max(seen, expected))
    return kept, seen, failed


def _claim(container: av.container.InputContainer, stream: av.VideoStream) -> _Claim:
    # An index lacks what an edit list leaves out, the number in the header does not.
    indexed = len(getattr(stream, "index_entries", ())) if container.format.name.startswith("mov") else 0
    if container.format.name == "avi":  # counts the places for frames, not all of which need be taken
        return _Claim(0, float(stream.frames * (stream.time_base or 0)))
    timed = container.format.name in DURATION_IN_HEADER
    seconds = (container.duration or 0) / av.time_base if timed else 0.0
    return _Claim(indexed or stream.frames, seconds, container.format.name == "gif")


def _lost(film: _Film, claim: _Claim, packets: Packets, total: int, damaged: int) -> str | None:
    """What to tell about frames that should be there; ``damaged``: how many should come out of what can be read."""
    about, claimed = "", claim.frames
    if 0 < packets.end < 0.95 * claim.seconds - 1:
        about, claimed = "about ", round(total * claim.seconds / packets.end)
    if claim.gif and len(packets.listed) < claimed:  # counted in the file itself, however short it is
        return (
            f"{film.name!r}: FFmpeg takes {claimed} pictures of this GIF for {total}, since they have no delays. "
            "Download it if it is on a server and give the file's path, or save it with delays."
        )
    if len(packets.listed) < claimed:
        return (
            f"{film.name!r} breaks off: {total} of {about}{claimed} frames can be read, and the video is taken to end "
            "there. Fetch or copy the file again for the rest."
        )
    if total < damaged:
        return f"{film.name!r} is damaged: {total} of {damaged} frames can be decoded, and the others are left out."
    return None


@contextmanager
def _open(film: _Film) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    try:
        container = av.open(film.address, timeout=addresses.SECONDS_TO_ANSWER if is_url(film.address) else None)
    except av.error.FFmpegError as error:
        raise unreadable(film.name, error, film.address) from error
    with container:
        refuse_endless(film.name, container)
        pictures = [each for each in container.streams.video if not _is_cover(each)]
        kind = container.format.name
        if not pictures or kind in _NO_VIDEO_FORMATS:
            raise EarlyTomConfigError(f"{film.name!r} has no video in it (FFmpeg reads it as {kind}).")
        if pictures[0].codec_context is None:
            raise EarlyTomConfigError(f"{film.name!r}: this FFmpeg has no decoder for its video.")
        pictures[0].thread_type = "AUTO"
        try:
            yield container, pictures[0]
        except av.error.ExitError as error:
            raise unreadable(film.name, error, film.address) from error
        except av.error.FFmpegError as error:
            message = f"{film.name!r} cannot be decoded: {error.strerror}. Is the file damaged?"
            raise EarlyTomConfigError(message) from error


def _is_cover(stream: av.VideoStream) -> bool:
    """The picture of a song. PyAV 14 does not tell, and what others give is not always a number."""
    disposition = getattr(stream, "disposition", 0)
    return bool(getattr(disposition, "value", disposition) & _ATTACHED_PICTURE)
