"""Some frames of a video without decoding all of it, and exactly those that decoding all of it would give.

    packets in the file      I0 P3 B1 B2 | I6 B4 B5 P8 B7        key frames I0 and I6; the number is the time stamp
    frame 7 is wanted        seek to I6, decode I6 B4 B5 P8 B7   4 and 5 are out of date before I6 and thrown away

The list of all packets, which costs no decoding, says how many frames there are and where the key frames lie. That it
tells the truth is checked on the way: the file must land on the packet that was aimed at, every packet must be the one
in the list, what comes out first must call itself a key frame, and then frame by frame the next time stamp of the list.
Whatever differs raises :class:`NotExact`, and the caller decodes everything (:func:`decode_all`).
"""

import bisect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import av

Progress = Callable[[int, int], None]
"""Called with (frames decoded so far, frames to decode)."""

# Decoding on costs less than a seek to a key frame that is this many packets away.
_NEAR = 8

# Their headers say how long the whole file is, whatever is left of it.
DURATION_IN_HEADER = frozenset({"matroska,webm", "flv", "asf"})

_VP8_SHOWN = 0x10


class NotExact(Exception):
    """The list of packets does not say which frames come out, or seeking does not lead to them; says why."""


class Damaged(NotExact):
    """Packets cannot be decoded. What then comes out is only certain with one thread; see :func:`one_thread`."""


class OtherFrames(Exception):
    """Frames at one end of the file do not come out; ``order`` is what is left of the list."""

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__(f"{len(order)} frames come out")
        self.order = order


class Packet(NamedTuple):
    """What is kept of a packet; times in the stream's unit."""

    pts: int | None
    dts: int | None
    size: int
    pos: int | None
    key: bool
    shown: bool
    corrupt: bool

    @property
    def identity(self) -> tuple[int | None, int, int | None]:
        """The rest may differ after a seek."""
        return self.pts, self.size, self.pos


@dataclass(frozen=True)
class Packets:
    """Of the video, in the order of the file; ``end``: seconds, of the last time stamp of any stream that was read."""

    listed: list[Packet]
    end: float


class _Start(NamedTuple):
    """Decoding may begin at this packet, and what comes out first is the frame of this rank."""

    packet: int
    rank: int


def list_packets(container: av.container.InputContainer, stream: av.VideoStream) -> Packets:
    """All packets of ``stream``, without decoding one: an hour of 30 frames a second takes about one second."""
    listed: list[Packet] = []
    ends: dict[int, int] = {}
    timed = container.format.name in DURATION_IN_HEADER  # sound may go on where there are no more pictures
    for packet in _readable(container, container.streams if timed else [stream]):
        if packet.pts is not None:
            ends[packet.stream_index] = max(packet.pts + (packet.duration or 0), ends.get(packet.stream_index, 0))
        if packet.stream_index == stream.index:
            listed.append(_noted(packet, stream.codec_context.name))
    units = {each.index: each.time_base for each in container.streams}
    return Packets(listed, max((float(end * (units.get(index) or 0)) for index, end in ends.items()), default=0.0))


def presentation_order(stream: av.VideoStream, packets: Sequence[Packet]) -> list[int]:
    """The packets whose frames are shown, as numbers into ``packets``, in the order of their time stamps.

    Raises :class:`NotExact` where that order need not be the order in which frames come out.
    """
    shown = [number for number, packet in enumerate(packets) if packet.shown]
    stamps = {packets[number].pts for number in shown}
    if None in stamps:
        raise NotExact("packets without time stamps")
    if len(stamps) < len(shown):
        raise NotExact("packets with the same time stamp")
    order = sorted(shown, key=lambda number: packets[number].pts or 0)
    if order == shown and len(shown) > 1 and stream.codec_context.has_b_frames:
        raise NotExact("frames that change places and time stamps that do not say so, as in AVI")
    if any(packet.corrupt for packet in packets[:-1]):
        raise Damaged("damaged packets")
    return order


def one_thread(stream: av.VideoStream) -> None:
    """Decode in one thread: with several, PyAV gives up frames that wait behind a packet that cannot be decoded."""
    stream.thread_count = 1


def decode_all(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame | None]:
    """Every frame that comes out, and None for each packet that cannot be decoded, over which FFmpeg goes on too."""
    for packet in _then_none(_readable(container, [stream])):
        try:
            yield from stream.decode(packet)
        except av.error.FFmpegError:
            yield None


class Seeker:
    """Frames by their place in ``order`` (of :func:`presentation_order`)."""

    def __init__(
        self,
        container: av.container.InputContainer,
        stream: av.VideoStream,
        packets: Sequence[Packet],
        order: Sequence[int],
    ) -> None:
        self.container, self.stream, self.packets, self.order = container, stream, packets, order
        self.numbers = {packet.identity: number for number, packet in enumerate(packets)}
        self.ranks = {packets[number].pts: rank for rank, number in enumerate(order)}
        self._starts = _starts(packets, order)

    def frames(self, indices: Sequence[int], progress: Progress | None) -> Iterator[av.VideoFrame]:
        """The frames at ``indices`` (ascending); raises :class:`NotExact` and :class:`OtherFrames`."""
        starts = [self._start(index) for index in indices]
        costs = _costs(indices, starts)
        run, done, cost = None, 0, sum(costs)
        for index, start, more in zip(indices, starts, costs, strict=True):
            done += more
            if run is None or start.packet > run.fed + _NEAR:
                run = _Run(self, start)
            while run.rank <= index:
                frame = run.next_frame()
                if progress is not None:
                    progress(max(done - (index + 1 - run.rank), done - more), cost)
            yield frame
        self._prove_the_end(run)

    def _prove_the_end(self, run: "_Run | None") -> None:
        """The last frame of the list must come out, and none behind it."""
        start = self._start(len(self.order) - 1)
        if run is None or start.packet > run.fed + _NEAR:
            run = _Run(self, start)
        while run.rank < len(self.order):
            run.next_frame()
        run.finish()

    def packets_from(self, number: int) -> Iterator[av.Packet]:
        """Seek, read on to that packet, and give it and all that follow."""
        for target in self._targets(number):
            try:
                self.container.seek(target, stream=self.stream)
            except (av.error.FFmpegError, OverflowError):
                continue
            packets = _readable(self.container, [self.stream])
            for packet in packets:
                found = self.numbers.get((packet.pts, packet.size, packet.pos), -1)
                if found == number:
                    yield packet
                    yield from packets
                    return
                if found > number:
                    break
        raise NotExact(f"no seek leads to packet {number}")

    def _targets(self, number: int) -> Iterator[int]:
        """Time stamps to try. Containers go by one or the other stamp, and some land on later packets than asked."""
        place = bisect.bisect_right(self._starts, number, key=lambda start: start.packet) - 1
        for earlier in (0, 1, 2, 4, 8):
            packet = self.packets[self._starts[max(place - earlier, 0)].packet]
            yield from (stamp for stamp in (packet.pts, packet.dts) if stamp is not None)

    def _start(self, index: int) -> _Start:
        """The last one from which decoding leads to the frame."""
        place = bisect.bisect_right(self._starts, self.order[index], key=lambda start: start.packet) - 1
        while self._starts[place].rank > index:
            place -= 1
        return self._starts[place]


class _Run:
    """Decoding from one start on. ``fed``: the packet decoded last; ``rank``: of the frame that comes out next."""

    def __init__(self, seeker: Seeker, start: _Start) -> None:
        self.fed, self.rank = start.packet - 1, start.rank
        self._seeker, self._start, self._begun = seeker, start, False
        self._frames = self._decode()

    def next_frame(self) -> av.VideoFrame:
        for frame in self._frames:
            rank = self._seeker.ranks.get(frame.pts)
            if rank is None:
                raise NotExact(f"a frame at {frame.pts}, where no packet is")
            if not self._begun and rank < self._start.rank:
                continue  # needs frames from before the start; not among those that decoding from here is for
            if not self._begun and self._start.rank == 0 and rank > 0:
                raise OtherFrames(self._seeker.order[rank:])
            self._check(frame, rank)
            self._begun, self.rank = True, rank + 1
            return frame
        if not self._begun or self.fed < len(self._seeker.packets) - 1:
            raise NotExact(f"the file ends before frame {self.rank}")
        if self._seeker.stream.thread_count != 1:
            raise Damaged(f"no frame {self.rank}")
        raise OtherFrames(self._seeker.order[: self.rank])

    def finish(self) -> None:
        """To be called behind the last frame of all: nothing else may come."""
        if next(self._frames, None) is not None:
            raise NotExact("more frames than packets")

    def _check(self, frame: av.VideoFrame, rank: int) -> None:
        number = self._seeker.order[rank]
        if rank != self.rank:
            raise NotExact(f"frame {rank} where {self.rank} was due")
        if self._start.packet == 0:
            return  # this is what decoding everything does
        independent = frame.key_frame or self._seeker.stream.codec_context.codec.intra_only
        if number == self._start.packet and not independent:
            raise NotExact(f"packet {number} is no key frame, though it says so")
        if frame.is_corrupt and not self._seeker.packets[number].corrupt:
            raise NotExact(f"frame {rank} comes out damaged")

    def _decode(self) -> Iterator[av.VideoFrame]:
        packets = self._seeker.packets
        for packet in _then_none(self._seeker.packets_from(self._start.packet)):
            if packet is not None:
                self.fed += 1
                met = (packet.pts, packet.size, packet.pos)
                if self.fed >= len(packets) or met != packets[self.fed].identity:
                    raise NotExact(f"packet {self.fed} is another one after a seek")
            try:
                yield from self._seeker.stream.decode(packet)
            except av.error.FFmpegError as error:
                if self._seeker.stream.thread_count != 1:
                    raise Damaged(f"packet {self.fed} cannot be decoded") from error


def _starts(packets: Sequence[Packet], order: Sequence[int]) -> list[_Start]:
    """The first packet, and key frames later than all that is shown before them."""
    starts, stamps = [_Start(0, 0)], [packets[number].pts or 0 for number in order]
    latest: int | None = None
    for number, packet in enumerate(packets):
        if number and packet.key and packet.pts is not None and (latest is None or latest < packet.pts):
            starts.append(_Start(number, bisect.bisect_left(stamps, packet.pts)))
        if packet.shown and packet.pts is not None:
            latest = packet.pts if latest is None else max(latest, packet.pts)
    return starts


def _costs(indices: Sequence[int], starts: Sequence[_Start]) -> list[int]:
    """Frames to decode for each of ``indices``, from its start or from the one before, whichever is nearer."""
    before = (-1, *indices[:-1])
    return [index - max(start.rank - 1, last) for index, start, last in zip(indices, starts, before, strict=True)]


def _noted(packet: av.Packet, codec: str) -> Packet:
    # An alternate reference frame of VP8 is a packet of its own from which no frame comes out.
    hidden = packet.is_discard or (codec in ("vp8", "libvpx") and not memoryview(packet)[0] & _VP8_SHOWN)
    return Packet(packet.pts, packet.dts, packet.size, packet.pos, packet.is_keyframe, not hidden, packet.is_corrupt)


def _readable(container: av.container.InputContainer, streams: Iterable[av.stream.Stream]) -> Iterator[av.Packet]:
    """What can be read of the file. Where it breaks off it ends, as it does for FFmpeg's own programs."""
    try:
        for packet in container.demux(*streams):
            if packet.size:  # PyAV's last one is empty
                yield packet
    except av.error.ExitError:  # a server that does not answer any more
        raise
    except av.error.FFmpegError as error:
        logging.getLogger(__name__).debug("reading ends: %s", error)


def _then_none(packets: Iterable[av.Packet]) -> Iterator[av.Packet | None]:
    """None makes a decoder give what it still holds."""
    yield from packets
    yield None
