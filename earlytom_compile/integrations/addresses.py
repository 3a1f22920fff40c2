"""From what a user calls a video to what FFmpeg opens: files by their path, addresses as they are.

"12:30.mp4"                   ->  "file:12:30.mp4", which FFmpeg would otherwise take for an address
"https://host/talk.mp4"       ->  itself, where the server sends any part that is asked for
                              ->  "file:/tmp/....mp4", a copy, where it sends files only from their start
"""

import contextlib
import re
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import av

from ..errors import EarlyTomConfigError

SECONDS_TO_ANSWER = 30.0

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

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
    """What to hand to FFmpeg; a copy of a file on a server lasts as long as the context."""
    if not is_url(path):
        require_file(path)
        local = Path(path).expanduser()
        yield f"file:{local}"
        return
    with tempfile.TemporaryDirectory(prefix="earlytom-") as folder:
        copy = Path(folder) / "video"
        yield f"file:{copy}" if _copied(str(path), copy) else str(path)


def unreadable(name: str, error: av.error.FFmpegError) -> EarlyTomConfigError:
    """Why FFmpeg cannot open it."""
    if isinstance(error, av.error.ProtocolNotFoundError):
        scheme = name.partition(":")[0]
        return EarlyTomConfigError(
            f"{name!r}: FFmpeg here reads no {scheme} addresses. Download the video and give the file's path."
        )
    if isinstance(error, av.error.ExitError):
        return _silent(name)
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
    if not address.lower().startswith(("http://", "https://")) or _PLAYLIST.search(address):
        return False
    request = urllib.request.Request(address, headers={"Range": "bytes=0-"})
    try:
        response = urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER)
    except TimeoutError as error:
        raise _silent(address) from error
    except (OSError, ValueError):
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


def _silent(name: str) -> EarlyTomConfigError:
    return EarlyTomConfigError(
        f"{name!r} has not answered for {SECONDS_TO_ANSWER:.0f} s. Download the video, or try again."
    )
