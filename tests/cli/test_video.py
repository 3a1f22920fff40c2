"""Frames come out of a video file in order, evenly spread, and what cannot be read says why."""

import re

import av
import numpy as np
import pytest
from clip import FRAMES, HEIGHT, WIDTH, draw_frames
from hypothesis import given
from hypothesis import strategies as st

from earlytom_compile import EarlyTomConfigError
from earlytom_compile.integrations.video import read_video, sample_indices


@given(frames=st.integers(1, 200), extra=st.integers(0, 5000))
def test_indices_are_even_distinct_and_reach_both_ends(frames, extra):
    total = frames + extra
    indices = sample_indices(total, frames)

    steps = np.diff(indices)
    assert len(indices) == frames and indices[0] == 0
    assert frames == 1 or indices[-1] == total - 1
    assert all(step >= 1 for step in steps) and (len(steps) == 0 or np.ptp(steps) <= 1)


def test_indices_are_those_llava_next_takes():
    assert sample_indices(524, 8) == tuple(np.linspace(0, 523, 8, dtype=int).tolist())


def test_decoded_frames_are_the_drawn_ones_up_to_compression(clip):
    video = read_video(clip, 12)
    drawn = np.stack(list(draw_frames()))[list(video.indices)]

    assert video.total == FRAMES
    assert video.pixels.shape == (12, HEIGHT, WIDTH, 3) and video.pixels.dtype == np.uint8
    assert np.abs(video.pixels.astype(int) - drawn).mean() < 4


def test_all_frames_can_be_asked_for_and_progress_ends_at_the_last(clip):
    seen = []
    assert len(read_video(clip, FRAMES, progress=lambda done, of: seen.append((done, of))).pixels) == FRAMES
    assert seen[-1] == (FRAMES, FRAMES)


def test_the_clip_has_two_cuts_and_a_still_scene(clip):
    pixels = read_video(clip, FRAMES).pixels.astype(int)
    change = np.abs(np.diff(pixels, axis=0)).mean(axis=(1, 2, 3))

    assert sorted(np.argsort(change)[-2:]) == [FRAMES // 3 - 1, 2 * FRAMES // 3 - 1]
    still = change[FRAMES // 3 : 2 * FRAMES // 3 - 1]
    assert still.max() < 0.1 < np.median(change)


def test_a_file_that_was_cut_off_gives_the_frames_it_still_has(clip, tmp_path):
    stream = tmp_path / "whole.ts"
    with av.open(str(clip)) as source, av.open(str(stream), "w") as target:
        copied = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = copied
                target.mux(packet)
    cut = tmp_path / "cut.ts"
    cut.write_bytes(stream.read_bytes()[: stream.stat().st_size // 2])

    video = read_video(cut, 4)
    assert 4 <= video.total < FRAMES
    assert video.indices == sample_indices(video.total, 4)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("missing.mp4", None, "no video file at"),
        ("notes.txt", b"a text, and no film\n" * 50, "no video in it"),
        ("noise.mp4", bytes(range(256)) * 20, "no video file FFmpeg can read"),
        ("empty.mp4", b"", "no video file FFmpeg can read"),
    ],
)
def test_what_is_no_video_says_so(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EarlyTomConfigError, match=message):
        read_video(path, 2)


def test_sound_without_pictures_says_so(tmp_path):
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    with pytest.raises(EarlyTomConfigError, match="no video in it"):
        read_video(path, 2)


def test_fewer_frames_than_asked_names_both_numbers(clip):
    with pytest.raises(EarlyTomConfigError, match=rf"has {FRAMES} frame.* fewer than the {FRAMES + 1}"):
        read_video(clip, FRAMES + 1)


@pytest.mark.parametrize("frames", [0, -1, 2.5, 8.0, "8", True, np.float32(2)])
def test_what_is_no_number_of_frames_says_so(clip, frames):
    message = re.escape(f"={frames!r}: must be a whole number, at least 1.")
    with pytest.raises(EarlyTomConfigError, match=f"frames{message}"):
        read_video(clip, frames)
    with pytest.raises(EarlyTomConfigError, match=f"default{message}"):
        read_video(clip, default=frames)


def test_numbers_of_numpy_are_numbers(clip):
    expected = read_video(clip, 3)
    for video in (read_video(clip, np.int64(3)), read_video(clip, default=np.uint8(3))):
        assert video.indices == expected.indices and np.array_equal(video.pixels, expected.pixels)
