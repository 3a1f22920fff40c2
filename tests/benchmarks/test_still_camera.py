"""The drawn clip is what it says: a picture that stands still but for a part of it, and a video like any other."""

import av
import numpy as np
import pytest
import torch
from films import decode_everything

from earlytom_compile import EarlyTomConfigError
from earlytom_compile.benchmarks.still_camera import Take, draw_frames, main, write_clip
from earlytom_compile.integrations.preprocess import PixelSettings
from earlytom_compile.integrations.video import read_video

SIGLIP = PixelSettings({"height": 384, "width": 384}, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)


def changed_patches(pixels, threshold):
    """bool [F - 1, 729]: mean absolute difference of each patch of 14 x 14 from one frame to the next."""
    patches = pixels[:, :, :378, :378].unfold(2, 14, 14).unfold(3, 14, 14)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    return (patches[1:] - patches[:-1]).abs().mean(-1) > threshold


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """Its frames as a model gets them, 8 of 3 s, compressed and read as a user's."""
    path = write_clip(tmp_path_factory.mktemp("talk") / "talk.mp4", Take(seconds=3, rate=12))
    return path, SIGLIP.apply(read_video(path, 8, resize=SIGLIP.resized_frame).pixels)


def test_it_is_h264_of_a_real_size(talk):
    with av.open(str(talk[0])) as container:
        (stream,) = container.streams.video
        assert (stream.codec_context.name, stream.width, stream.height) == ("h264", 1280, 720)
        assert stream.average_rate == 12
    assert len(decode_everything(talk[0])) == 36


def test_about_a_fifth_of_it_changes_from_frame_to_frame_and_no_frame_repeats(talk):
    changed = changed_patches(talk[1], 0.03)
    shares = changed.float().mean(1)
    assert shares.min() > 0.14 and shares.max() < 0.26, shares
    assert changed.any(0).float().mean() < 0.35, "the same part of the picture"


@pytest.mark.parametrize("moving", [0.05, 0.35])
def test_how_much_changes_can_be_asked_for(moving, tmp_path):
    path = write_clip(tmp_path / "a.mp4", Take(width=640, height=360, seconds=2, rate=8, moving=moving))
    pixels = SIGLIP.apply(read_video(path, 6, resize=SIGLIP.resized_frame).pixels)
    assert 0.7 * moving < changed_patches(pixels, 0.03).float().mean() < 1.3 * moving


def test_without_noise_the_room_stays_as_it_is():
    take = Take(width=320, height=180, seconds=2, rate=12, noise=0.0)
    frames = np.stack(list(draw_frames(take)))
    assert frames.shape == (24, 180, 320, 3) and frames.dtype == np.uint8
    still = (frames == frames[:1]).all(axis=(0, 3))
    assert 0.6 < still.mean() < 0.9
    assert all((a != b).any() for a, b in zip(frames, frames[1:], strict=False))


def test_noise_is_new_in_every_frame_and_as_strong_as_asked():
    take = Take(width=320, height=180, seconds=1, rate=12, noise=3.0)
    frames, clean = (np.stack(list(draw_frames(t))).astype(int) for t in (take, Take(**{**vars(take), "noise": 0.0})))
    corner = slice(0, 40), slice(0, 60)  # the room alone, and no colour near black or white
    noise = (frames[0] - frames[5])[corner] / 2**0.5
    assert noise.std() == pytest.approx(3.0, rel=0.1) and abs(noise.mean()) < 0.1
    assert (frames[3] != frames[4])[corner].mean() > 0.8
    assert not (clean[3] != clean[4])[corner].any()


def test_a_cut_changes_nearly_everything_and_nothing_else_does():
    take = Take(width=320, height=180, seconds=3, rate=4, noise=0.0, cuts=2)
    frames = torch.from_numpy(np.stack(list(draw_frames(take)))).float()
    moved = ((frames[1:] - frames[:-1]).abs().amax(-1) > 8).float().mean((1, 2))
    assert [share > 0.8 for share in moved] == [frame in (3, 7) for frame in range(11)]
    assert all(share < 0.35 or share > 0.8 for share in moved)


def test_the_same_take_is_the_same_and_another_seed_is_another():
    first, again, other = (next(draw_frames(Take(width=64, height=64, seconds=1, seed=seed))) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"width": 321}, "321x720"),
        ({"height": 32}, "1280x32"),
        ({"seconds": 0}, "0 s at 25"),
        ({"seconds": 0.1, "cuts": 2}, "2 cuts"),
        ({"moving": 0.0}, "moving=0.0"),
        ({"noise": -1.0}, "noise=-1.0"),
    ],
)
def test_what_cannot_be_filmed_is_refused(given, said):
    with pytest.raises(EarlyTomConfigError, match=said):
        Take(**given)


def test_as_a_program_it_writes_the_file(tmp_path, capsys):
    path = tmp_path / "small.mp4"
    assert main([str(path), "--width", "128", "--height", "64", "--seconds", "1", "--rate", "5", "--cuts", "1"]) == 0
    assert str(path) in capsys.readouterr().out and len(decode_everything(path)) == 5
