"""Videos follow from split and seed, are what their stories say, and survive their codec."""

import itertools

import av
import numpy as np
import pytest

from earlytom_compile.photoworld import film, world
from earlytom_compile.photoworld.drawing import SIZE, Shape, mask_of, sample_look
from earlytom_compile.photoworld.story import cells, story_of
from earlytom_compile.photoworld.world import FRAMES, sample_still_video, sample_video
from earlytom_compile.toyworld.world import COLORS, HELD_OUT, SHAPES

SEEDS = range(60)


@pytest.fixture(scope="module")
def videos():
    return [sample_video("validation", seed) for seed in SEEDS]


def test_a_video_follows_from_split_and_seed():
    assert sample_video("test", 5) == sample_video("test", 5)
    assert sample_video("test", 5) != sample_video("test", 6)
    assert sample_video("test", 5) != sample_video("train", 5)
    assert np.array_equal(sample_video("test", 5).draw(2.5), sample_video("test", 5).draw(2.5))


def test_training_never_shows_the_pairs_that_are_held_out(videos):
    def pairs(found):
        return {track.pair for video in found for shot in story_of(video).shots for track in shot.tracks}

    assert not pairs(sample_video("train", seed) for seed in SEEDS) & HELD_OUT
    assert pairs(videos) >= HELD_OUT


def test_what_is_seen_lies_in_the_picture_and_apart(videos):
    for video in videos:
        assert video.length == FRAMES
        for scene, time in (video.at(time) for time in range(FRAMES)):
            seen = scene.visible(time)
            assert all(t.radius <= value <= SIZE - t.radius for t, place, _ in seen for value in place)
            for (a, (ax, ay), _), (b, (bx, by), _) in itertools.combinations(seen, 2):
                assert np.hypot(ax - bx, ay - by) > a.radius + b.radius


def nearest_color(pixels):
    """By hue: light and shade change all channels alike."""
    names, known = list(COLORS), np.array(list(COLORS.values()), float)
    color = np.median(pixels.reshape(-1, 3), 0)
    away = [np.linalg.norm(color / np.linalg.norm(color) - k / np.linalg.norm(k)) for k in known]
    return names[int(np.argmin(away))]


@pytest.mark.parametrize("seed", [0, 1, 4])
def test_pixels_are_what_the_story_says(seed):
    video = sample_video("validation", seed)
    frames, story = video.frames(), story_of(video)
    assert frames.shape == (FRAMES, SIZE, SIZE, 3) and frames.dtype == np.uint8
    for start, shot in zip(story.starts, story.shots, strict=True):
        for track in shot.tracks:
            for frame in track.seen:
                mask = mask_of(Shape(*track.pair, track.radius - 4, track.places[frame]))
                assert nearest_color(frames[start + frame][mask]) == track.pair[0]


def test_a_cut_lies_half_way_between_two_frames(videos):
    video = next(video for video in videos if len(video.scenes) > 1)
    last = video.scenes[0].length - 1
    assert [video.at(time)[0] for time in (last + 0.25, last + 0.75)] == list(video.scenes[:2])


def test_a_file_holds_the_sampled_frames(tmp_path):
    video = sample_video("test", 1)
    film.write_mp4(video, tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(decoded) == (FRAMES - 1) * film.FRAMES_BETWEEN + 1
    assert np.array_equal(video.frames(), np.stack(decoded[:: film.FRAMES_BETWEEN]))


def test_what_another_rate_shows_is_seen_at_its_times():
    video = sample_video("validation", 1)
    assert video.frames(8).shape[0] == story_of(video, 8).length == 8
    assert story_of(video, FRAMES) == story_of(video)
    twice = film.sampled_times(FRAMES, 2 * FRAMES - 1)
    assert twice == [number / 2 for number in range(2 * FRAMES - 1)]


def test_a_still_video_changes_in_one_frame_or_none():
    flash, still = (sample_still_video("test", 2, flash=flash) for flash in (True, False))
    (one,), (other,) = story_of(flash).shots, story_of(still).shots
    assert [len(track.seen) for track in one.tracks if track.glows] == [1]
    assert not any(track.glows for track in other.tracks)
    assert all(len(set(track.places)) == 1 for track in other.tracks)
    assert other.tracks == tuple(track for track in one.tracks if not track.glows)


def test_cells_show_what_covers_them(videos):
    shot = story_of(videos[0]).shots[0]
    color, shape, glows, offset = cells(shot, 0)
    there = {(list(COLORS)[c - 1], SHAPES[s - 1]) for c, s in zip(color[color > 0], shape[color > 0], strict=True)}
    assert there == {track.pair for track in shot.tracks if track.places[0]}
    assert not glows[color == 0].any() and not offset[color == 0].any()
    first, (x, y) = shot.tracks[0].pair, shot.tracks[0].places[0]
    index = np.flatnonzero((color == 1 + list(COLORS).index(first[0])) & (shape == 1 + SHAPES.index(first[1])))[0]
    assert offset[index] == pytest.approx([x / 28 - index % 8 - 0.5, y / 28 - index // 8 - 0.5], abs=1e-5)


def test_looks_differ():
    rng = np.random.default_rng(0)
    looks = [sample_look(rng) for _ in range(50)]
    assert len({look.seed for look in looks}) == 50
    assert {look.shake > 0 for look in looks} == {look.lighting > 0 for look in looks} == {True, False}


def test_flashes_of_one_thing_do_not_touch():
    rng = np.random.default_rng(0)
    for _ in range(300):
        times = world.flash_times(rng, FRAMES)
        frames = [frame for frame, which in times if which == 0]
        assert all(0 <= frame < FRAMES for frame, _ in times) and len(set(times)) == len(times)
        assert len(frames) == 2 or all(np.diff(frames) > 1)
