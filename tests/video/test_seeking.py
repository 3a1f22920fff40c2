"""Whatever the file: the frames read are those at the same places among all that FFmpeg's decoder gives."""

import warnings
from types import SimpleNamespace

import av
import numpy as np
import pytest
from effort import examples
from films import COLORS, HEIGHT, WIDTH, decode_everything, draw, edit, rewrite, write_film, write_gif
from hypothesis import example, given
from hypothesis import strategies as st

from earlytom_compile import EarlyTomConfigError
from earlytom_compile.integrations import video as video_module
from earlytom_compile.integrations.seeking import NotExact, Packet, presentation_order
from earlytom_compile.integrations.video import read_video, sample_indices

OPEN_GOPS = {"x264-params": "open-gop=1:keyint=12:min-keyint=12"}
HEVC = {"x265-params": "keyint=12:min-keyint=12:open-gop=1:log-level=none"}

SOUGHT = {
    "plain.mp4": {},
    "plain.mkv": {},
    "plain.ts": {},
    "plain.flv": {},
    "fragments.mp4": {"container": {"movflags": "frag_keyframe+empty_moov"}},
    "open.mp4": {"options": OPEN_GOPS},
    "open.ts": {"options": OPEN_GOPS},
    "hevc.mp4": {"codec": "libx265", "options": HEVC},
    "mpeg4.avi": {"codec": "mpeg4", "b_frames": 0},
    "mpeg2.mpg": {"codec": "mpeg2video"},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"flags": "+ildct+ilme"}},
    "vp8.webm": {"codec": "libvpx", "options": {"cpu-used": "8"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "12"}, "b_frames": 0},
    "wmv.asf": {"codec": "wmv2", "b_frames": 0},
    "intra.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "b_frames": 0},
    "animation.apng": {"codec": "apng", "pix_fmt": "rgb24", "b_frames": 0},
    "animation.gif": {"codec": "gif", "pix_fmt": "bgr8", "b_frames": 0},
    "ten_bits.mp4": {"pix_fmt": "yuv420p10le"},
    "interlaced.mp4": {"options": {"flags": "+ildct+ilme", "x264-params": "tff=1"}},
    "alpha.mov": {"codec": "prores_ks", "pix_fmt": "yuva444p10le"},
    "negative.mkv": {"times": lambda number: number - 20},
    "cut_in.mp4": {"times": lambda number: number - 20},
    "huge.mp4": {"times": lambda number: number + 2**40},
    "huge.mkv": {"times": lambda number: number + 10**8},
    "around.ts": {"times": lambda number: number + 2**33 // 3600 - 25},  # 33 bits of 90000ths of a second run over
    "irregular.mp4": {"times": lambda number: number * number + number},
    "irregular.mkv": {"times": lambda number: number * number + number},
    "irregular.ts": {"times": lambda number: number * number + number},
}
"""Read by seeking, all of them."""

DECODED = {
    "raw.h264": {},  # no time stamps
    "frames_change_places.avi": {"options": OPEN_GOPS},  # time stamps in the order of decoding
}
"""Decoded from their start, whatever is asked for."""


def available(kind):
    codec = kind.get("codec", "libx264")
    return codec in av.codecs_available or pytest.skip(f"this FFmpeg has no {codec}")


def same_as_everything(path, *numbers):
    everything = decode_everything(path)
    for frames in numbers:
        video = read_video(path, frames)
        assert video.total == len(everything)
        assert video.indices == sample_indices(len(everything), frames)
        assert all(np.array_equal(got, everything[at]) for got, at in zip(video.pixels, video.indices, strict=True))


@pytest.fixture
def only_seeking(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("was decoded from its start")

    monkeypatch.setattr(video_module, "_from_start", refuse)


@pytest.mark.parametrize("name", SOUGHT)
def test_seeking_gives_what_decoding_everything_gives(tmp_path, name, only_seeking):
    available(SOUGHT[name])
    path = write_film(tmp_path / name, 50, **SOUGHT[name])
    same_as_everything(path, 1, 2, 7, 20)


@pytest.mark.parametrize("name", DECODED)
def test_files_that_do_not_say_where_frames_are_are_decoded_from_their_start(tmp_path, name):
    available(DECODED[name])
    path = write_film(tmp_path / name, 50, **DECODED[name])
    same_as_everything(path, 1, 3, 5, 8, 20)


@examples(30)
@given(data=st.data())
def test_any_structure_and_any_number_of_frames(tmp_path_factory, data):
    """Lengths of groups, frames that change places, gaps between frames, containers."""
    name = data.draw(st.sampled_from(["x.mp4", "x.mkv", "x.ts", "x.flv", "x.avi"]), label="container")
    total = data.draw(st.integers(1, 40), label="frames in the file")
    gaps = data.draw(st.lists(st.integers(1, 9), min_size=total, max_size=total), label="gaps")
    open_gop = data.draw(st.booleans(), label="open groups")
    times = np.cumsum(gaps) + data.draw(st.integers(-60, 60), label="first time stamp")
    path = write_film(
        tmp_path_factory.mktemp("film") / name,
        total,
        gop=data.draw(st.integers(1, 15), label="group"),
        b_frames=data.draw(st.integers(0, 4), label="B frames"),
        options={"preset": "ultrafast", "x264-params": f"b-adapt=0:open-gop={int(open_gop)}:scenecut=0:ref=3"},
        times=None if name.endswith("avi") else lambda number: int(times[number]),
    )
    try:
        come_out = len(decode_everything(path))
    except av.error.EOFError:  # MPEG-TS of two or three frames is too short for FFmpeg to recognize
        come_out = 0
    if come_out:
        same_as_everything(path, data.draw(st.integers(1, come_out), label="frames wanted"))
    else:
        with pytest.raises(EarlyTomConfigError):
            read_video(path)


def test_a_file_without_an_index_is_sought_in(tmp_path, only_seeking):
    path = write_film(tmp_path / "x.mkv", 60)
    data = path.read_bytes()
    cues = bytes.fromhex("1c53bb6b")
    assert cues in data
    path.write_bytes(data.replace(cues, bytes.fromhex("1c53bb6a")))
    same_as_everything(path, 5)


@pytest.mark.parametrize("codec, pix_fmt", [("libx264", "yuv420p"), ("mpeg4", "yuv420p"), ("qtrle", "rgb24")])
def test_key_frames_that_are_none_are_found_out(tmp_path, codec, pix_fmt):
    whole = write_film(tmp_path / "whole.mov", 60, codec=codec, pix_fmt=pix_fmt, gop=30, b_frames=0)
    path = rewrite(whole, tmp_path / "x.mov", key=lambda number: number % 7 == 0)
    same_as_everything(path, 2, 5)


def test_frames_at_the_same_time(tmp_path):
    """Matroska counts milliseconds."""
    whole = write_film(tmp_path / "whole.mp4", 60, b_frames=0)
    path = rewrite(whole, tmp_path / "x.mkv", faster=100)
    with av.open(str(path)) as container:
        assert len({packet.pts for packet in container.demux(video=0) if packet.size}) < 30
    same_as_everything(path, 2, 5, 20)


@pytest.mark.parametrize("name", ["x.mp4", "x.ts"])
def test_a_picture_that_is_refreshed_bit_by_bit_has_no_key_frames(tmp_path, name):
    path = write_film(tmp_path / name, 60, b_frames=0, options={"x264-params": "intra-refresh=1:keyint=20:scenecut=0"})
    same_as_everything(path, 2, 3, 7)


@examples(20)
@given(
    cuts=st.lists(st.tuples(st.integers(100, 1500), st.integers(0, 45 * 512)), min_size=1, max_size=4),
    b_frames=st.integers(0, 3),
    frames=st.integers(1, 12),
)
def test_edit_lists_of_all_kinds(tmp_path_factory, cuts, b_frames, frames):
    """Parts left out, shown twice, in another order, and beginning between key frames."""
    path = edit(write_film(tmp_path_factory.mktemp("film") / "x.mp4", 50, b_frames=b_frames), cuts)
    come_out = len(decode_everything(path))
    if come_out:
        same_as_everything(path, min(frames, come_out))


def test_a_recording_that_begins_between_key_frames(tmp_path, only_seeking):
    whole = write_film(tmp_path / "whole.ts", 60, codec="mpeg2video").read_bytes()
    path = tmp_path / "recording.ts"
    path.write_bytes(whole[:564] + whole[len(whole) // 3 // 188 * 188 :])  # tables, and then from the middle on
    assert 20 < len(decode_everything(path)) < 60
    same_as_everything(path, 1, 5)


def test_frames_of_vp8_that_are_not_shown_do_not_count(tmp_path, only_seeking):
    whole = write_film(tmp_path / "whole.webm", 40, codec="libvpx", options={"cpu-used": "8"})

    def hide(number, content):
        return content if number % 12 != 7 else bytes([content[0] & ~0x10]) + content[1:]

    path = rewrite(whole, tmp_path / "hidden.webm", hide)
    assert len(decode_everything(path)) == 37
    same_as_everything(path, 1, 5, 20)


def test_only_what_leads_to_the_wanted_frames_is_decoded(tmp_path):
    path = write_film(tmp_path / "long.mp4", 1000, gop=20, options={"preset": "ultrafast"})
    seen = []
    video = read_video(path, 8, progress=lambda done, of: seen.append((done, of)))

    assert video.total == 1000
    assert seen == [(done + 1, len(seen)) for done in range(len(seen))]
    assert 8 <= len(seen) <= 8 * 20


def test_progress_never_goes_back_and_ends_where_it_said(tmp_path):
    for name in ("x.mp4", "x.h264"):
        path, seen = write_film(tmp_path / name, 50), []
        read_video(path, 9, progress=lambda done, of, seen=seen: seen.append((done, of)))
        done, of = zip(*seen, strict=True)
        assert list(done) == sorted(done) and len(set(of)) == 1 and done[-1] == of[-1]


@pytest.mark.parametrize(
    "name, codec, pix_fmt",
    [("x.png", "png", "rgb24"), ("x.jpg", "mjpeg", "yuvj420p"), ("x.webp", "libwebp", "yuva420p")],
)
def test_a_picture_is_a_video_of_one_frame(tmp_path, name, codec, pix_fmt):
    available({"codec": codec})
    container = {} if name == "x.webp" else {"update": "1"}
    path = write_film(tmp_path / name, 1, codec=codec, pix_fmt=pix_fmt, b_frames=0, container=container)
    video = read_video(path)
    assert video.total == 1 and video.pixels.shape == (1, HEIGHT, WIDTH, 3)
    same_as_everything(path, 1)


@examples(40)
@given(delays=st.lists(st.sampled_from([None, 0, 1, 2, 10]), min_size=1, max_size=9))
@example(delays=[None] * 5)
@example(delays=[None, None, None, 10, None])
def test_an_animation_needs_no_delays(tmp_path_factory, delays):
    """FFmpeg would take all pictures before the second extension for one."""
    path = write_gif(tmp_path_factory.mktemp("gif") / "x.gif", delays)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        video = read_video(path)
    assert video.total == len(delays) and video.pixels.shape == (len(delays), 8, 8, 3)
    for number, picture in enumerate(video.pixels):
        assert (picture == COLORS[number % len(COLORS)]).all()


def test_names_that_look_like_addresses_or_patterns(tmp_path):
    for name in ("12:30.mp4", "100%.mp4", "%03d.mp4", "a b'c.mp4"):
        same_as_everything(write_film(tmp_path / "plain.mp4", 9).rename(tmp_path / name), 2)


def test_a_video_that_changes_its_size_keeps_that_of_its_first_frame(tmp_path):
    small = write_film(tmp_path / "small.ts", 20, size=(64, 48), options={"preset": "ultrafast"})
    large = write_film(tmp_path / "large.ts", 20, size=(96, 80), options={"preset": "ultrafast"})
    path = tmp_path / "both.h264"
    parts = [rewrite(part, tmp_path / f"{part.stem}.h264").read_bytes() for part in (small, large)]
    path.write_bytes(b"".join(parts))

    video = read_video(path, 8)
    assert video.total == 40 and video.pixels.shape == (8, 48, 64, 3)
    sizes = []
    read_video(path, 8, resize=lambda frame: sizes.append(frame.shape) or frame[:40, :40])
    assert sizes == [(48, 64, 3)] * 4 + [(80, 96, 3)] * 4


@pytest.mark.parametrize("total", [1, 5, 40])
def test_without_a_number_there_are_at_most_as_many_as_there_are(tmp_path, total):
    path = write_film(tmp_path / "x.mp4", total)
    assert read_video(path).indices == sample_indices(total, min(total, 32))
    assert read_video(path, default=3).indices == sample_indices(total, min(total, 3))
    with pytest.raises(EarlyTomConfigError, match=f"has {total} frame.* fewer than the {total + 1} asked for"):
        read_video(path, total + 1)


def a_list(*stamps, **fields):
    return [
        Packet(pts, dts, size=100, pos=None, key=dts == 0, shown=True, corrupt=False)._replace(**fields)
        for dts, pts in enumerate(stamps)
    ]


@pytest.mark.parametrize(
    "packets, reason",
    [
        (a_list(0, None, 2), "without time stamps"),
        (a_list(0, 3, 3, 5), "the same time stamp"),  # as the two fields of one frame
        (a_list(0, 1, 2, 3), "do not say so"),  # where frames change places
        (a_list(0, 2, 1, corrupt=True), "damaged"),
    ],
)
def test_lists_that_prove_nothing(packets, reason):
    stream = SimpleNamespace(codec_context=SimpleNamespace(has_b_frames=True))
    with pytest.raises(NotExact, match=reason):
        presentation_order(stream, packets)
    assert presentation_order(stream, a_list(0, 3, 1, 2)) == [0, 2, 3, 1]


def test_the_cover_of_a_song_is_no_video(tmp_path):
    available({"codec": "libmp3lame"})
    path = tmp_path / "song.mp3"
    with av.open(str(path), "w") as song:
        sound = song.add_stream("libmp3lame", rate=44100, layout="mono")
        cover = song.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = WIDTH, HEIGHT, "rgb24"
        if not hasattr(cover, "disposition"):
            pytest.skip("this PyAV does not tell a cover from a video")
        cover.disposition = av.stream.Disposition.attached_pic
        song.mux(cover.encode(av.VideoFrame.from_ndarray(draw(0), format="rgb24")))
        song.mux(cover.encode(None))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.int16), format="s16p", layout="mono")
        silence.sample_rate = 44100
        song.mux(sound.encode(silence))
        song.mux(sound.encode(None))
    with av.open(str(path)) as song:
        assert song.streams.video
    with pytest.raises(EarlyTomConfigError, match="no video in it"):
        read_video(path)
