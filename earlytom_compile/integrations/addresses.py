"""From what a user calls a video to what FFmpeg opens: files by their path, addresses as they are.

"12:30.mp4"                   ->  "file:12:30.mp4", which FFmpeg would otherwise take for an address
"https://host/talk.mp4"       ->  itself, where the server sends any part that is asked for
                              ->  "file:/tmp/....mp4", a copy, where it sends files only from their start
"anim.gif"                    ->  a copy too, where FFmpeg would take all pictures for one
"""

import contextlib
import errno
import http.client
import re
import shutil
import socket
import struct
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import av

from ..errors import EarlyTomConfigError

SECONDS_TO_ANSWER = 30.0

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

# What cameras and broadcasts send by.
_LIVE = frozenset({"rtsp", "rtsps", "rtmp", "rtmps", "rtp", "srtp", "udp"})

# FFmpeg's word for a host that nobody knows, among other things; refused, reset, no way there, no answer.
_UNREACHED = frozenset(
    {errno.EIO, errno.ECONNREFUSED, errno.ECONNRESET, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ETIMEDOUT}
)

# FFmpeg's words for redirections in a circle, and to what it does not follow.
_LED_ASTRAY = frozenset({errno.EIO, errno.EINVAL})

# A GIF's graphic control extension that says nothing: no delay, no transparency.
_DELAY_OF_0 = bytes((0x21, 0xF9, 4, 0, 0, 0, 0, 0))

# Lists of parts; FFmpeg fetches those.
_PLAYLIST = re.compile(r"\.(m3u8?|mpd)($|\?)|mpegurl|dash\+xml", re.IGNORECASE)


def is_url(path: str | Path) -> bool:
    """Whether to leave it to FFmpeg; a :class:`Path` never is one, for it has lost a slash."""
    return isinstance(path, str) and _URL.match(path) is not None


def require_file(path: str | Path) -> None:
    """Raise :class:`EarlyTomConfigError` unless this is a file or an address, about which only a server can tell."""
    if is_url(path):
        return
    local = Path(path).expanduser()
    if not str(path):
        raise EarlyTomConfigError("video='': give the path of a video file.")
    if local.is_dir():
        raise EarlyTomConfigError(f"{str(path)!r} is a folder: give the path of a video file.")
    if not local.is_file():
        raise EarlyTomConfigError(f"no video file at {str(path)!r}: give the path of an existing file.")


@contextlib.contextmanager
def readable(path: str | Path) -> Iterator[str]:
    """What to hand to FFmpeg; a copy lasts as long as the context."""
    if not is_url(path):
        require_file(path)
        with _with_delay(Path(path).expanduser()) as local:
            yield f"file:{local}"
        return
    with tempfile.TemporaryDirectory(prefix="earlytom-") as folder:
        copy = Path(folder) / "video"
        if not _copied(str(path), copy):
            yield str(path)
            return
        with _with_delay(copy) as local:
            yield f"file:{local}"


def unreadable(name: str, error: av.error.FFmpegError, address: str) -> EarlyTomConfigError:
    """Why FFmpeg cannot open ``address``, which people call ``name``."""
    if isinstance(error, av.error.ProtocolNotFoundError):
        scheme = name.partition(":")[0]
        return EarlyTomConfigError(
            f"{name!r}: FFmpeg here reads no {scheme} addresses. Download the video and give the file's path."
        )
    if isinstance(error, av.error.ExitError):
        return _silent(name)
    astray = _astray(name) if error.errno in _LED_ASTRAY else None
    if astray is not None:
        return EarlyTomConfigError(f"{name!r} cannot be reached ({astray}). {_instead(name)}")
    host = _host(name) if error.errno in _UNREACHED else None
    if host is None and error.errno in _UNREACHED and is_url(name):
        return EarlyTomConfigError(f"{name!r} names no host: give a whole address, such as https://host/talk.mp4.")
    if host is not None:
        return EarlyTomConfigError(f"{name!r} cannot be reached ({host}: {_reason(host, error)}). {_instead(name)}")
    if _lacks_index(address):
        return EarlyTomConfigError(
            f"{name!r} has no whole index (the moov box, which says where its frames are), as when a recording or a "
            "download breaks off. Fetch or copy the file again."
        )
    return EarlyTomConfigError(f"{name!r} is no video file FFmpeg can read: {error.strerror}.")


def refuse_endless(name: str, container: av.container.InputContainer) -> None:
    """Frames cannot be spread over a live stream."""
    of_parts = container.format.name in ("hls", "dash")  # the size is that of the list
    if is_url(name) and container.duration is None and (of_parts or container.size <= 0):
        raise EarlyTomConfigError(
            f"{name!r} does not say where it ends, as a live stream does not: save a part of it and give the file's "
            "path."
        )


def _copied(address: str, copy: Path) -> bool:
    """Fetch a whole file from a server that sends nothing but whole files, in which FFmpeg cannot seek."""
    if not _over_http(address) or _PLAYLIST.search(address):
        return False
    try:
        request = urllib.request.Request(address, headers={"Range": "bytes=0-"})
        response = urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER)
    except TimeoutError as error:
        raise _silent(address) from error
    except (OSError, ValueError, http.client.HTTPException):
        return False  # FFmpeg says why
    with response:
        kind, length = response.headers.get("Content-Type", ""), response.headers.get("Content-Length")
        if response.status != 200 or length is None or _PLAYLIST.search(kind):
            return False
        try:
            with copy.open("wb") as file:
                shutil.copyfileobj(response, file, 1 << 20)
        except OSError as error:
            raise EarlyTomConfigError(f"{address!r} cannot be copied to {copy.parent}: {error}.") from error
    return True


@contextlib.contextmanager
def _with_delay(file: Path) -> Iterator[Path]:
    """The file itself or, of a GIF whose first picture has no delay, a copy in which it has.

    FFmpeg tells the pictures of a GIF apart only behind its first extension. Some writers put none into the file, or
    none before the first picture, if nobody asks them for delays; the delay 0 says the same as none.
    """
    place = _first_picture(file)
    if place is None:
        yield file
        return
    with tempfile.TemporaryDirectory(prefix="earlytom-") as folder:
        copy = Path(folder) / "video"
        try:
            with file.open("rb") as given, copy.open("wb") as changed:
                changed.write(given.read(place) + _DELAY_OF_0)
                shutil.copyfileobj(given, changed, 1 << 20)
        except OSError as error:
            raise EarlyTomConfigError(f"{str(file)!r} cannot be copied to {folder}: {error}.") from error
        yield copy


def _first_picture(file: Path) -> int | None:
    """Where a GIF begins with a picture, right behind its header and its colours; None if it does not, or is none."""
    try:
        with file.open("rb") as opened:
            header = opened.read(13)
            if len(header) < 13 or not header.startswith((b"GIF87a", b"GIF89a")):
                return None
            flags = header[10]
            place = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
            opened.seek(place)
            return place if opened.read(1) == b"," else None
    except OSError:
        return None  # FFmpeg says why


def _silent(name: str) -> EarlyTomConfigError:
    return EarlyTomConfigError(f"{name!r} has not answered for {SECONDS_TO_ANSWER:.0f} s. {_instead(name)}")


def _over_http(address: str) -> bool:
    return address.lower().startswith(("http://", "https://"))


def _astray(name: str) -> str | None:
    """Where a server's redirections lead, if not to an answer."""
    if not _over_http(name):
        return None
    try:
        urllib.request.urlopen(name, timeout=SECONDS_TO_ANSWER).close()
    except urllib.error.HTTPError as error:
        with error:
            target = error.headers.get("Location")
            if not 300 <= error.code < 400 or target is None:
                return None
            return "redirected in a circle" if "infinite loop" in error.reason else f"redirected to {target}"
    except (OSError, ValueError, http.client.HTTPException):
        pass
    return None


def _host(name: str) -> str | None:
    """Whom an address asks for it, if anybody."""
    try:
        return urlsplit(name).hostname if is_url(name) else None
    except ValueError:
        return None


def _reason(host: str, error: av.error.FFmpegError) -> str:
    """What FFmpeg says, or that nobody knows the host, which it does not say."""
    try:
        socket.getaddrinfo(host, None)
    except OSError as unknown:
        return unknown.strerror or str(unknown)
    except ValueError:  # no name that a host can have
        return "no such name"
    return error.strerror or str(error)


def _instead(name: str) -> str:
    scheme = name.partition(":")[0].lower()
    if scheme in _LIVE:
        return f"{scheme} is for live streams, which have no end: save a part of it and give the file's path."
    return "Check the address, or download the video and give the file's path."


def _lacks_index(address: str) -> bool:
    """Whether a file is an MP4 or MOV without a whole moov box, which most recorders write last.

    Boxes follow each other: 4 bytes of size, 4 of kind; size 1 means that it comes in 8 bytes more, 0 all the rest.
    """
    if not address.startswith("file:"):
        return False
    path = Path(address.removeprefix("file:"))
    try:
        with path.open("rb") as file:
            end, at = path.stat().st_size, 0
            while at + 8 <= end:
                file.seek(at)
                size, kind = struct.unpack(">I4s", file.read(8))
                if size == 1:
                    size = int.from_bytes(file.read(8))
                if at == 0 and kind != b"ftyp":
                    return False
                if kind == b"moov" and at + size <= end:
                    return False
                if size < 8:
                    break
                at += size
    except OSError:
        return False
    return at > 0
