"""Small videos of every kind, and what is in them according to decoding all of it.

write_film("x.mkv", 40, gop=12, b_frames=2)    ->    40 frames of 64x48, no two alike
decode_everything("x.mkv")                     ->    what FFmpeg's decoder gives, in order
"""

import struct
import typing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT = 64, 48


def draw(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """uint8 [height, width, 3]: a gradient that moves, and blocks that spell ``number``."""
    y, x = np.mgrid[:height, :width]
    picture = np.stack([(3 * x + 2 * number) % 256, (4 * y + 5 * number) % 256, (x + y) % 256], 2).astype(np.uint8)
    for bit in range(8):
        picture[8:24, 8 * bit : 8 * bit + 8] = 235 if number >> bit & 1 else 20
    return picture


def write_film(
    path: Path,
    frames: int,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    gop: int = 12,
    b_frames: int = 2,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    times: Callable[[int], int] | None = None,
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> Path:
    """Encode ``frames`` pictures; ``times``: number of a frame -> its time stamp in 25ths of a second."""
    with av.open(str(path), "w", options=container or {}) as target:
        stream = typing.cast(av.VideoStream, target.add_stream(codec, rate=25, options=options or {}))
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.gop_size, stream.max_b_frames = gop, b_frames
        for number in range(frames):
            picture = av.VideoFrame.from_ndarray(draw(number, *size), format="rgb24")
            picture.pts = number if times is None else times(number)
            target.mux(stream.encode(picture))
        target.mux(stream.encode(None))
    return path


COLORS = np.array([(250, 0, 0), (0, 250, 0), (0, 0, 250), (9, 9, 9)], np.uint8)


def write_gif(path: Path, delays: Sequence[int | None]) -> Path:
    """8x8 pictures, each of the next of COLORS; ``delays``: in hundredths of a second, None without an extension."""
    content = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x81, 0, 0) + COLORS.tobytes()
    for number, delay in enumerate(delays):
        if delay is not None:
            content += struct.pack("<BBBBHBB", 0x21, 0xF9, 4, 0, delay, 0, 0)
        color = number % len(COLORS)
        codes = [4, color, color] * 32 + [5]  # 3 bits each; 4 begins anew, so that they stay 3
        packed = sum(code << 3 * place for place, code in enumerate(codes)).to_bytes(37, "little")
        content += b"," + struct.pack("<HHHHBBB", 0, 0, 8, 8, 0, 2, len(packed)) + packed + b"\0"
    path.write_bytes(content + b";")
    return path


def rewrite(
    source: Path,
    target: Path,
    change: Callable[[int, bytes], bytes] | None = None,
    key: Callable[[int], bool] | None = None,
    faster: int = 1,
) -> Path:
    """Copy the packets to another container; ``change``: number and content of a packet -> its new content.

    ``key``: number of a packet -> whether it claims to be a key frame.
    """
    with av.open(str(source)) as read, av.open(str(target), "w") as written:
        copied = written.add_stream_from_template(read.streams.video[0])
        for number, packet in enumerate(packet for packet in read.demux(video=0) if packet.size):
            made = av.Packet(bytes(packet) if change is None else change(number, bytes(packet)))
            made.pts, made.dts, made.duration = packet.pts, packet.dts, packet.duration
            made.time_base, made.stream = packet.time_base / faster, copied
            made.is_keyframe = packet.is_keyframe if key is None else key(number)
            written.mux(made)
    return target


def decode_everything(path: Path) -> list[np.ndarray | None]:
    """All frames as uint8 RGB, in one thread; as for the ffmpeg program, what cannot be decoded does not end it.

    None for frames that the decoder itself calls damaged: what it puts there differs with the number of threads.
    """
    frames: list[np.ndarray | None] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
            except (StopIteration, av.error.FFmpegError):
                packet = None
            ends = packet is None or not packet.size
            try:
                decoded = stream.decode(None if ends else packet)
            except av.error.InvalidDataError:
                decoded = []
            frames += [None if frame.is_corrupt else frame.to_ndarray(format="rgb24") for frame in decoded]
            if ends:
                return frames


def turn(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Write a display matrix (a, b, c, d) into the track's header of an MP4 file, as a phone does."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd")
    start = at + 4 + 4 + (32 if data[at + 4] == 1 else 20) + 16  # version, flags, times, ids, duration | layer, volume
    a, b, c, d = (number << 16 for number in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def edit(path: Path, cuts: list[tuple[int, int]]) -> Path:
    """Give an MP4 file with its header at the end an edit list: (milliseconds to show, from which time stamp on)."""
    data = path.read_bytes()
    entries = b"".join(struct.pack(">Iihh", shown, begin, 1, 0) for shown, begin in cuts)
    elst = _box(b"elst", struct.pack(">II", 0, len(cuts)) + entries)
    moov = data.index(b"moov") - 4
    assert data.index(b"mdat") < moov, "the header must come last, or places in the file would change"
    header = data[moov:]
    track = header.index(b"trak") - 4
    (size,) = struct.unpack(">I", header[track : track + 4])
    inside = header[track + 8 : track + size]
    if b"edts" in inside:
        old = inside.index(b"edts") - 4
        (length,) = struct.unpack(">I", inside[old : old + 4])
        inside = inside[:old] + inside[old + length :]
    (tkhd,) = struct.unpack(">I", inside[:4])
    edited = _box(b"trak", inside[:tkhd] + _box(b"edts", elst) + inside[tkhd:])
    path.write_bytes(data[:moov] + _box(b"moov", header[8:track] + edited + header[track + size :]))
    return path


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


def quietly(call: Callable, *arguments, **options):
    """The result of a call whose warnings are not what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return call(*arguments, **options)
