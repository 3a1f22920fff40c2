"""What a broken file still holds is read, and what is missing is said with both numbers."""

import struct

import numpy as np
import pytest
from effort import examples
from films import decode_everything, edit, quietly, rewrite, write_film
from hypothesis import given
from hypothesis import strategies as st

from earlytom_compile import EarlyTomConfigError, EarlyTomVideoWarning
from earlytom_compile.integrations.video import read_video, sample_indices

HEADER_FIRST = {"movflags": "faststart"}


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    return path


def same_as_everything(path, *numbers):
    everything = decode_everything(path)
    for frames in numbers:
        video = quietly(read_video, path, frames)
        assert video.total == len(everything)
        assert video.indices == sample_indices(len(everything), frames)
        for got, at in zip(video.pixels, video.indices, strict=True):
            assert everything[at] is None or np.array_equal(got, everything[at])


@pytest.mark.parametrize(
    "name, options, share, claimed",
    [
        ("x.mp4", {"container": HEADER_FIRST}, 0.4, "of 100 frames"),
        ("x.avi", {"codec": "mpeg4", "b_frames": 0}, 0.6, "of about (9[0-9]|1[0-9][0-9]) frames"),
        ("x.mkv", {"times": lambda number: 10 * number}, 0.4, "of about (9[0-9]|1[0-9][0-9]) frames"),
        ("x.flv", {"times": lambda number: 10 * number}, 0.4, "of about (9[0-9]|1[0-9][0-9]) frames"),
    ],
)
def test_a_file_that_breaks_off_says_how_much_of_it_there_is(tmp_path, name, options, share, claimed):
    path = cut(write_film(tmp_path / name, 100, **options), share)
    with pytest.warns(EarlyTomVideoWarning, match=claimed) as caught:
        video = read_video(path, 7)
    assert 10 < video.total < 80 and f"breaks off: {video.total} of" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_too_few_frames_because_a_file_breaks_off(tmp_path):
    path = cut(write_film(tmp_path / "x.mp4", 100, container=HEADER_FIRST), 0.4)
    with pytest.raises(EarlyTomConfigError, match="fewer than the 90 asked for.* breaks off: .* of 100 frames"):
        read_video(path, 90)


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv", "x.ts", "x.flv", "x.mpg"])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_what_is_left_of_it_is_what_the_decoder_gives(tmp_path, name, share):
    codec = "mpeg2video" if name == "x.mpg" else "libx264"
    path = cut(write_film(tmp_path / name, 60, codec=codec, container=HEADER_FIRST if name == "x.mp4" else {}), share)
    same_as_everything(path, 1, 2, 5, 9)


def test_whole_files_are_read_without_a_word(tmp_path, recwarn):
    for name in ("x.mp4", "x.mkv", "x.ts", "x.flv", "x.avi", "x.gif", "x.h264"):
        gif = {"codec": "gif", "pix_fmt": "bgr8", "b_frames": 0} if name == "x.gif" else {}
        read_video(write_film(tmp_path / name, 30, **gif), 4)
    read_video(write_film(tmp_path / "cut_in.mp4", 30, times=lambda number: number - 10), 4)
    read_video(edit(write_film(tmp_path / "edited.mp4", 50), [(400, 9000), (300, 2000)]), 4)
    gaps = write_film(tmp_path / "gaps.avi", 30, codec="mpeg4", b_frames=0, times=lambda number: number * number)
    read_video(gaps, 4)
    assert not recwarn.list


def test_frames_that_cannot_be_decoded_are_counted(tmp_path):
    whole = write_film(tmp_path / "whole.avi", 40, codec="mjpeg", pix_fmt="yuvj420p", b_frames=0)
    path = rewrite(whole, tmp_path / "x.avi", lambda number, content: bytes(99) if number in (10, 39) else content)
    assert len(decode_everything(path)) == 38
    with pytest.warns(EarlyTomVideoWarning, match="is damaged: 38 of 40 frames"):
        assert read_video(path, 38).total == 38
    same_as_everything(path, 20)


@examples(20)
@given(where=st.floats(0.2, 0.95), frames=st.integers(1, 20), name=st.sampled_from(["x.ts", "x.mkv", "x.mp4"]))
def test_noise_where_frames_should_be(tmp_path_factory, where, frames, name):
    """All frames that are looked at are right; where too few come out it is an error that says so."""
    path = write_film(tmp_path_factory.mktemp("film") / name, 40, gop=6)
    data = bytearray(path.read_bytes())
    at = int(where * len(data))
    data[at : at + 40] = bytes(range(40))
    path.write_bytes(data)
    try:
        video = quietly(read_video, path, frames)
    except EarlyTomConfigError:
        return
    assert len(video.pixels) == frames and video.indices == sample_indices(video.total, frames)


def test_a_file_with_nothing_left_in_it(tmp_path):
    path = cut(write_film(tmp_path / "x.mp4", 60, container=HEADER_FIRST), 1.0)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"mdat") + 4])
    with pytest.raises(EarlyTomConfigError, match="no frame of it can be decoded|cannot be decoded"):
        read_video(path)


@pytest.mark.parametrize("name", ["x.mp4", "x.mov"])
@pytest.mark.parametrize("share", [0.3, 0.97])  # before the index, and within
def test_a_recording_that_lost_its_index(tmp_path, name, share):
    path = write_film(tmp_path / name, 60)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * (data.index(b"moov") if share < 0.5 else len(data)))])
    with pytest.raises(EarlyTomConfigError, match=f"{name}' has no whole index .*Fetch or copy the file again"):
        read_video(path)


def test_boxes_of_more_than_four_gigabytes_are_walked_over(tmp_path):
    """Their size is in 8 bytes more: a file that has an index behind one of them is broken in some other way."""
    large = struct.pack(">I4sQ", 1, b"mdat", 16 + 100) + bytes(100)
    for rest, message in ((b"", "has no whole index"), (struct.pack(">I4s", 8, b"moov"), "x.mp4' (is|has) no video")):
        (tmp_path / "x.mp4").write_bytes(struct.pack(">I4s4sI", 16, b"ftyp", b"isom", 0) + large + rest)
        with pytest.raises(EarlyTomConfigError, match=message):
            read_video(tmp_path / "x.mp4")


def test_a_picture_of_an_animation_that_ffmpeg_cannot_decode(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(write_film(tmp_path / "whole.png", 1, codec="png", pix_fmt="rgb24", b_frames=0).read_bytes()[:60])
    with pytest.raises(EarlyTomConfigError, match="x.png"):
        read_video(path)
