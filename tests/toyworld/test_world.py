"""Videos are what their seed says, whatever is in them can be seen, and an mp4 shows the same."""

import math
from dataclasses import replace

import av
import numpy as np
import pytest
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from pixels import pixels_of, seen

from earlytom_compile.integrations.video import read_video
from earlytom_compile.toyworld import world
from earlytom_compile.toyworld.world import (
    COLORS,
    FRAMES,
    HELD_OUT,
    PAIRS,
    SHAPES,
    SIZE,
    SPLITS,
    Scene,
    Thing,
    Video,
    mask_of,
    sample_video,
    write_mp4,
)

any_video = st.builds(sample_video, st.sampled_from(SPLITS), st.integers(0, 10**6))
MEAN_ERROR = 4.0  # grey levels; 3.1 was the most of 320 frames
AREAS = {  # of radius 1
    "circle": math.pi,
    "ring": 0.7 * math.pi,
    "square": (2 * 0.88) ** 2,
    "triangle": 0.58 * 1.75**2,
    "cross": 4 * 0.66 - 0.66**2,
}


def videos_with(wanted, count, split="test"):
    """The first ``count`` videos for which ``wanted`` is true."""
    found = []
    for seed in range(10_000):
        video = sample_video(split, seed)
        if wanted(video):
            found.append(video)
        if len(found) == count:
            return found
    raise AssertionError("there are too few such videos")


def masks_at(video, time):
    """bool [things, 96, 96]: where each visible thing is drawn."""
    return np.stack([mask_of(thing, centre) for thing, centre in video.scene_at(time).visible(time)])


# --- Seeds and splits ---------------------------------------------------------------------------------


@given(st.sampled_from(SPLITS), st.integers(0, 10**6))
@examples(40)
def test_same_split_and_seed_same_video(split, seed):
    video, again = sample_video(split, seed), sample_video(split, seed)
    assert video.specks == again.specks
    np.testing.assert_array_equal(video.frames(), again.frames())


def test_no_two_videos_are_alike():
    frames = [sample_video(split, seed).frames().tobytes() for split in SPLITS for seed in range(60)]
    assert len(set(frames)) == len(frames)


def test_what_is_drawn_for_one_video_is_told_apart_by_its_stream():
    draws = [world.rng_of(split, seed, stream).random() for split in SPLITS for seed in range(5) for stream in range(4)]
    assert len(set(draws)) == len(draws)


def test_training_never_shows_the_held_out_pairs():
    shown = {thing.pair for seed in range(600) for thing in sample_video("train", seed).things}
    assert shown == set(PAIRS) - HELD_OUT
    assert (len(PAIRS), len(HELD_OUT)) == (30, 4)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_other_splits_show_all_pairs(split):
    assert {thing.pair for seed in range(300) for thing in sample_video(split, seed).things} == set(PAIRS)


def test_every_color_and_every_shape_is_trained():
    trained = set(PAIRS) - HELD_OUT
    assert {color for color, _ in trained} == set(COLORS)
    assert {shape for _, shape in trained} == set(SHAPES)


# --- Pictures ------------------------------------------------------------------------------------------


@given(any_video)
@examples(40)
def test_frames_are_eight_rgb_pictures(video):
    frames = video.frames()
    assert frames.shape == (FRAMES, SIZE, SIZE, 3) == (8, 96, 96, 3)
    assert frames.dtype == np.uint8


@given(any_video)
@examples(100)
def test_scenes_follow_one_another_without_a_gap(video):
    shown = [frame for scene in video.scenes for frame in range(scene.first, scene.last + 1)]
    assert shown == list(range(FRAMES))
    assert all(scene.last > scene.first for scene in video.scenes)
    assert [video.scene_at(time) for time in range(FRAMES)] == [
        scene for scene in video.scenes for _ in range(scene.first, scene.last + 1)
    ]


def test_a_cut_lies_half_way_between_two_frames():
    (video,) = videos_with(lambda video: len(video.scenes) == 2, 1)
    before, after = video.scenes
    assert video.scene_at(before.last + 0.49) is before
    assert video.scene_at(before.last + 0.5) is after


@given(any_video)
@examples(100)
def test_things_stay_inside_the_picture(video):
    for time in range(FRAMES):
        for thing, (x, y) in video.scene_at(time).visible(time):
            shown = mask_of(thing, (x, y)).sum()
            whole = mask_of(thing, (40 + x % 1, 40 + y % 1)).sum()
            assert shown >= 0.98 * whole, (thing, time)  # a pixel or two at a tip


@given(any_video)
@examples(100)
def test_nothing_is_hidden(video):
    for time in range(FRAMES):
        masks = masks_at(video, time)
        shared = (masks & (masks.sum(0) > 1)).sum((1, 2))
        assert (shared <= 0.05 * masks.sum((1, 2))).all(), time  # corners may meet


@pytest.mark.xfail(strict=True, reason="the corners of squares and triangles reach beyond the radius kept free")
def test_things_never_overlap():
    for seed in range(300):
        video = sample_video("test", seed)
        for time in range(FRAMES):
            assert masks_at(video, time).sum(0).max() <= 1, (seed, time)


@pytest.mark.parametrize("seed", range(25))
def test_frames_show_the_things_and_nothing_else(seed):
    video = replace(sample_video("validation", seed), specks={})
    found = seen(video.frames())
    for time in range(FRAMES):
        there = [thing.pair for thing, _ in video.scene_at(time).visible(time)]
        assert sorted((s.color, s.shape) for s in found if s.frame == time) == sorted(there)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [9.0, 10.7, 12.0])
def test_a_shape_is_as_large_as_its_radius_says(shape, radius):
    mask = mask_of(Thing("red", shape, radius, (0, 0)), (50.3, 41.8))
    assert mask.sum() == pytest.approx(AREAS[shape] * radius**2, rel=0.1)
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    for pixels, centre in ((rows, 41.8), (columns, 50.3)):
        assert centre - 1.02 * radius <= pixels[0] < pixels[-1] <= centre + 1.02 * radius
        assert 1.5 * radius < np.ptp(pixels) + 1


def test_colors_and_backgrounds_are_told_apart():
    pictured = np.array([*COLORS.values(), *world._BACKGROUNDS, (150, 150, 150)], int)
    distances = abs(pictured[:, None] - pictured[None]).sum(-1)
    assert distances[: len(COLORS)][distances[: len(COLORS)] > 0].min() > 90


@pytest.mark.parametrize("video", videos_with(lambda video: video.specks, 10))
def test_specks_are_grey_and_small_and_in_their_frames_only(video):
    with_specks, without = video.frames(), replace(video, specks={}).frames()
    changed = (with_specks != without).any(-1)
    assert {int(frame) for frame in changed.any((1, 2)).nonzero()[0]} == set(video.specks)
    assert (with_specks[changed] == 150).all()
    assert changed.sum((1, 2)).max() <= 3 * 4 * 4


@pytest.mark.parametrize("video", videos_with(lambda video: any(scene.pan for scene in video.scenes), 10))
def test_a_pan_moves_the_whole_picture(video):
    for scene in (scene for scene in video.scenes if scene.pan):
        for time in range(scene.first, scene.last):
            # The camera goes left: what was seen comes three pixels further right.
            ways = {"left": (0, 3), "right": (0, -3), "up": (3, 0), "down": (-3, 0)}
            moved = np.roll(scene.draw(time), ways[scene.pan], (0, 1))[3:-3, 3:-3]
            np.testing.assert_array_equal(scene.draw(time + 1)[3:-3, 3:-3], moved)


def flashes(video):
    return [scene for scene in video.scenes if scene.flash]


@pytest.mark.parametrize("video", videos_with(lambda video: len(flashes(video)) == 1, 15))
def test_a_flash_is_seen_in_one_frame(video):
    (scene,) = flashes(video)
    frames = replace(video, specks={}).frames()
    shown = [pixels_of(scene.flash.color, frame).sum() for frame in frames[scene.first : scene.last + 1]]
    larger = [scene.first + i for i, pixels in enumerate(shown) if pixels > min(shown)]
    assert larger == [scene.flash_frame]


def test_a_flash_lasts_from_half_a_frame_before_to_half_a_frame_after():
    flash = Thing("red", "circle", 10.0, (50.0, 50.0))
    video = Video((Scene(0, 7, (20, 24, 34), "plain", (), flash=flash, flash_frame=3),))
    shown = {time: bool(pixels_of("red", video.draw(time)).any()) for time in (2.49, 2.5, 3.0, 3.49, 3.5)}
    assert shown == {2.49: False, 2.5: True, 3.0: True, 3.49: True, 3.5: False}


def test_a_thing_goes_its_way_at_its_speed():
    for direction, speed, end in (("left", "fast", (42, 50)), ("down", "slow", (50, 53)), (None, None, (50, 50))):
        thing = Thing("red", "square", 10.0, (50.0, 50.0), direction, speed)
        assert thing.at(1.0) == end


# --- Files ---------------------------------------------------------------------------------------------


def read_back(video, path):
    """Eight frames of an mp4, int [8, 96, 96, 3], as the command line reads them."""
    write_mp4(video, path)
    read = read_video(path, FRAMES)
    assert read.total == 64
    return read.pixels.astype(int)


def distances(a, b):
    """Mean absolute difference of each frame to each, grey levels [8, 8]."""
    return abs(a[:, None] - b[None]).mean((2, 3, 4))


@pytest.mark.parametrize("seed", [0, 7])
def test_an_mp4_shows_the_frames(tmp_path, seed):
    video = sample_video("test", seed)
    frames = video.frames().astype(int)
    steps = distances(frames, frames).diagonal(1)
    assert steps[steps > 0].min() > MEAN_ERROR  # or else a wrong frame would do
    assert distances(read_back(video, tmp_path / "video.mp4"), frames).diagonal().max() < MEAN_ERROR


@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5, 6, 9])
def test_a_frame_of_an_mp4_is_nearest_to_its_own(tmp_path, seed):
    video = sample_video("test", seed)
    frames = video.frames().astype(int)
    error = distances(read_back(video, tmp_path / "video.mp4"), frames)
    assert error.diagonal().max() < MEAN_ERROR
    others = distances(frames, frames) > 0
    assert others.any()
    assert (error > error.diagonal()[:, None])[others].all()


def test_without_an_h264_encoder_an_mp4_still_shows_the_scenes(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    (video,) = videos_with(lambda video: len({scene.background for scene in video.scenes}) == 3, 1)
    frames = video.frames().astype(int)
    nearest = distances(read_back(video, tmp_path / "video.mp4"), frames).argmin(1)
    assert [video.scene_at(time) for time in nearest] == [video.scene_at(time) for time in range(FRAMES)]
    with av.open(str(tmp_path / "video.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"


def test_an_mp4_has_twelve_frames_a_second(tmp_path):
    write_mp4(sample_video("test", 0), tmp_path / "video.mp4")
    with av.open(str(tmp_path / "video.mp4")) as container:
        assert container.streams.video[0].average_rate == world.FPS == 12
