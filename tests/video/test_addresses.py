"""Videos on a server: read where FFmpeg can, refused by name where it cannot, and never with a slash less."""

import contextlib
import errno
import http.server
import re
import socket
import threading
from pathlib import Path

import av
import numpy as np
import pytest
from films import write_film, write_gif

from earlytom_compile import EarlyTomConfigError, EarlyTomVideoWarning
from earlytom_compile.integrations import addresses
from earlytom_compile.integrations.video import read_video


class Whole(http.server.SimpleHTTPRequestHandler):
    """Sends files from their start only, as Python's own server does."""

    def log_message(self, *arguments):
        pass

    def handle(self):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # FFmpeg hangs up when it has seen enough
            super().handle()


class Parts(Whole):
    """Sends the part that is asked for, as most servers do."""

    def do_GET(self):
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if asked is None or not path.is_file():
            return super().do_GET()
        content = path.read_bytes()
        first, last = int(asked[1]), int(asked[2] or len(content) - 1)
        self.send_response(206)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        self.wfile.write(content[first : last + 1])


@contextlib.contextmanager
def served(kind, folder):
    def handler(*arguments):
        return kind(*arguments, directory=folder)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture(params=[Whole, Parts], ids=["whole files", "parts"])
def server(request, tmp_path):
    with served(request.param, tmp_path) as address:
        yield address


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv"])
def test_a_video_on_a_server_is_the_one_on_the_disk(server, tmp_path, name):
    """Its header at the end, and larger than what FFmpeg reads at once: nothing for a server that sends whole files."""
    path = write_film(tmp_path / name, 60, size=(320, 240), options={"preset": "ultrafast", "crf": "5"})
    assert path.stat().st_size > 300_000
    here, there = read_video(path, 5), read_video(f"{server}/{name}", 5)
    assert there.total == here.total and np.array_equal(there.pixels, here.pixels)


def test_an_animation_without_delays(tmp_path):
    write_gif(tmp_path / "x.gif", [None] * 4)
    with served(Whole, tmp_path) as server:
        assert read_video(f"{server}/x.gif").total == 4
    with served(Parts, tmp_path) as server, pytest.warns(EarlyTomVideoWarning) as caught:
        assert read_video(f"{server}/x.gif").total == 1
    (said,) = (str(warning.message) for warning in caught)
    assert "x.gif': FFmpeg takes 4 pictures of this GIF for 1, since they have no delays. Download it" in said


def test_what_is_not_there_keeps_its_slashes(server):
    with pytest.raises(EarlyTomConfigError, match=f"'{server}/a//b.mp4'.*404 Not Found"):
        read_video(f"{server}/a//b.mp4", 5)


def test_addresses_that_ffmpeg_does_not_read_are_refused_by_name():
    with pytest.raises(EarlyTomConfigError, match="'s3://bucket//talk.mp4': FFmpeg here reads no s3"):
        read_video("s3://bucket//talk.mp4", 5)


def test_a_server_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(addresses, "SECONDS_TO_ANSWER", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/x.mp4"
        with pytest.raises(EarlyTomConfigError, match="has not answered for"):
            read_video(address, 5)


def test_a_server_that_stops_in_the_middle(tmp_path, monkeypatch):
    monkeypatch.setattr(addresses, "SECONDS_TO_ANSWER", 0.5)
    film = write_film(tmp_path / "x.mp4", 60, size=(320, 240), container={"movflags": "faststart"})
    content, done = film.read_bytes(), threading.Event()

    class Stops(Whole):
        def do_GET(self):
            self.send_response(206)
            self.send_header("Content-Range", f"bytes 0-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            done.wait(20)

    with served(Stops, tmp_path) as server:
        try:
            with pytest.raises(EarlyTomConfigError, match="x.mp4' has not answered for"):
                read_video(f"{server}/x.mp4", 5)
        finally:
            done.set()


@pytest.mark.parametrize(
    "scheme, instead",
    [
        ("http", "Check the address, or download the video"),
        ("rtsp", "rtsp is for live streams, which have no end: save a part of it"),
    ],
)
def test_a_server_that_refuses(scheme, instead):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    address = f"{scheme}://127.0.0.1:{port}/a//b.mp4"
    with pytest.raises(EarlyTomConfigError) as refused:
        read_video(address, 5)
    assert f"'{address}' cannot be reached (127.0.0.1: Connection refused). {instead}" in str(refused.value)


def test_a_host_that_nobody_knows(monkeypatch):
    """FFmpeg calls it an input/output error."""

    def unknown(host, *others):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    error, address = av.error.OSError(errno.EIO, "Input/output error"), "https://nowhere.invalid/a/b//c.mp4"
    said = str(addresses.unreadable(address, error, address))
    assert said.startswith(f"'{address}' cannot be reached (nowhere.invalid: Name or service not known). Check")
    assert "no video file FFmpeg can read" in str(addresses.unreadable("x.mp4", error, "file:x.mp4"))


@pytest.mark.parametrize("address", ["http://127.0.0.1:port/x.mp4", "http://[::1/x.mp4"])
def test_what_is_no_address(address):
    with pytest.raises(EarlyTomConfigError, match=re.escape(repr(address))):
        read_video(address, 5)


@pytest.mark.parametrize("address", ["http://", "https:///x.mp4", "rtsp://"])
def test_an_address_without_a_host(address):
    with pytest.raises(EarlyTomConfigError, match=f"'{address}' names no host: give a whole address"):
        read_video(address, 5)


@pytest.mark.parametrize(
    "target, said", [("/x.mp4", "redirected in a circle"), ("file:///x.mp4", "redirected to file:///x.mp4")]
)
def test_redirections_that_lead_nowhere(tmp_path, target, said):
    class Elsewhere(Whole):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", target)
            self.send_header("Content-Length", "0")
            self.end_headers()

    with served(Elsewhere, tmp_path) as server, pytest.raises(EarlyTomConfigError) as refused:
        read_video(f"{server}/x.mp4", 5)
    assert f"/x.mp4' cannot be reached ({said}). Check the address" in str(refused.value)


def test_a_broadcast_over_http_has_no_end_either(tmp_path):
    content = write_film(tmp_path / "x.ts", 20).read_bytes()

    class Endless(Whole):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            while True:
                self.wfile.write(content)

    message = "live' does not say where it ends, as a live stream does not"
    with served(Endless, tmp_path) as server, pytest.raises(EarlyTomConfigError, match=message):
        read_video(f"{server}/live", 5)


def test_a_live_stream_has_no_end_to_spread_frames_over(server, tmp_path, monkeypatch):
    monkeypatch.setattr(addresses, "SECONDS_TO_ANSWER", 1.0)
    write_film(tmp_path / "part.ts", 20)
    playlist = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.8,\npart.ts\n"
    (tmp_path / "live.m3u8").write_text(playlist)
    (tmp_path / "ended.m3u8").write_text(playlist + "#EXT-X-ENDLIST\n")
    with pytest.raises(EarlyTomConfigError, match="live.m3u8' does not say where it ends"):
        read_video(f"{server}/live.m3u8", 5)
    assert read_video(f"{server}/ended.m3u8", 5).total == 20


def test_an_address_of_a_file_is_the_file(tmp_path):
    path = write_film(tmp_path / "x.mp4", 20)
    assert np.array_equal(read_video(path.as_uri(), 5).pixels, read_video(path, 5).pixels)


def test_a_folder_is_no_video(tmp_path):
    with pytest.raises(EarlyTomConfigError, match="is a folder"):
        read_video(tmp_path)
