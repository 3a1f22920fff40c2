"""Clips become videos whose stories, tokens and labels belong together; the pool is what the model itself computes."""

import numpy as np
import pytest
import torch
from pools import EACH, tiny_model

from earlytom_compile.photoworld import pool
from earlytom_compile.photoworld.answers import normalized
from earlytom_compile.photoworld.batches import Kept, kept_places, question_batch, token_batch
from earlytom_compile.photoworld.clips import KINDS, compose, sample_clip
from earlytom_compile.photoworld.model import VIDEO_TOKENS, fold
from earlytom_compile.photoworld.pool import TOKENS, Pool, grouped
from earlytom_compile.photoworld.questions import CATEGORIES
from earlytom_compile.photoworld.story import cells
from earlytom_compile.photoworld.train import Scale, projected
from earlytom_compile.photoworld.world import FRAMES
from earlytom_compile.toyworld.world import HELD_OUT


def test_clips_are_of_all_kinds_and_without_pairs_that_are_held_out():
    clips = [sample_clip(seed) for seed in range(40)]
    assert {clip.kind for clip in clips} == set(KINDS)
    assert not {track.pair for clip in clips for track in clip.shot.tracks} & HELD_OUT
    assert sample_clip(3) == clips[3]


def test_a_composed_story_is_that_of_the_frames_it_names():
    clips = [sample_clip(seed) for seed in range(12)]
    rng = np.random.default_rng(0)
    for _ in range(40):
        story, shown = compose(rng, clips)
        assert story.length == len(shown) == FRAMES
        for start, shot in zip(story.starts, story.shots, strict=True):
            for frame in range(shot.length):
                number, of_clip = shown[start + frame]
                for said, known in zip(cells(shot, frame), cells(clips[number].shot, of_clip), strict=True):
                    assert np.array_equal(said, known)


def test_four_patches_of_a_token_stand_together():
    patches = torch.arange(256.0).reshape(1, 256, 1)
    assert grouped(patches)[0, 0, :, 0].tolist() == [0, 1, 16, 17]
    assert grouped(patches)[0, 9, :, 0].tolist() == [34, 35, 50, 51]


def test_labels_are_those_of_the_frames(pools):
    clips, _ = pools
    for number, clip in enumerate(clips.clips):
        for frame in range(clip.shot.length):
            at = clips.first[number] + frame
            assert np.array_equal(clips.labels["color"][at], cells(clip.shot, frame)[0])


def test_tokens_are_those_of_the_places(pools):
    clips, _ = pools
    frames = np.arange(FRAMES)
    every = clips.tokens(frames, None)
    places = np.array([0, 5, 64, 700, VIDEO_TOKENS - 1])
    assert every.shape == (VIDEO_TOKENS, 4, 384)
    assert np.array_equal(clips.tokens(frames, places), every[places])


@torch.no_grad()
def test_the_pool_is_what_the_model_computes(pools):
    model = tiny_model()
    clips, _ = pools
    scale = Scale(*clips.scale())
    pixels = normalized(torch.from_numpy(clips.clips[0].frames()))
    projector = model.model.multi_modal_projector
    features = torch.from_numpy(clips.tokens(np.arange(clips.first[1]), None))
    expected = projected(projector, scale, features)
    fold(projector, scale.mean, scale.deviation)
    found = model.model.get_video_features(pixels[None], return_dict=True).pooler_output[0]
    torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-2, atol=1e-2)


def test_what_shows_a_thing_stays_more_often_if_it_is_favoured():
    shows, rng = np.arange(VIDEO_TOKENS) < 100, np.random.default_rng(0)
    shares = []
    for favour in (1.0, 8.0):
        places = [kept_places(rng, shows, Kept(100, favour)) for _ in range(50)]
        assert all(len(p) == 100 and (np.diff(p) > 0).all() for p in places)
        shares.append(np.mean([shows[p].mean() for p in places]))
    assert shares[0] == pytest.approx(100 / VIDEO_TOKENS, abs=0.02) and 3 * shares[0] < shares[1]


def test_a_batch_follows_from_its_random_numbers(pools):
    clips, _ = pools
    one, same, other = (
        question_batch(clips, np.random.default_rng(seed), 3, dict.fromkeys(CATEGORIES, 1.0), Kept(50), 4)
        for seed in (1, 1, 2)
    )
    assert one.features.shape == (3, 50, 4, 384) and one.places.shape == (3, 50)
    assert torch.equal(one.features, same.features) and torch.equal(one.rows.ids, same.rows.ids)
    assert not torch.equal(one.places, other.places)
    assert token_batch(clips, np.random.default_rng(0), 5).features.shape == (5, TOKENS, 4, 384)


def test_a_pool_takes_what_is_there_and_says_what_is_missing(pools, tmp_path):
    clips, videos = pools
    assert (len(clips.clips), len(videos.clips)) == (4, EACH)
    with pytest.raises(SystemExit, match="has 0 clips or videos, not any: python -m"):
        Pool(tmp_path, "train")


def test_filling_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "EACH", 1)
    seen = []

    def encoded(tower, frames):
        seen.append(len(frames))
        return np.zeros((len(frames), TOKENS, 4, 2), np.float16)

    monkeypatch.setattr(pool, "encoded", encoded)
    monkeypatch.setattr(pool, "_sampled", lambda split, seed: sample_clip(seed))
    pool.fill(tmp_path, None, 1, "train")
    pool.fill(tmp_path, None, 2, "train")
    assert seen == [sample_clip(seed).scene.length for seed in range(2)]
    assert len(Pool(tmp_path, "train").clips) == 2
