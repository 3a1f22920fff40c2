"""VisionZip against its rules read one by one, in Python's numbers."""

import pytest
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from plain_visionzip import keep_in_python
from torch_counter import counter

from earlytom_compile.methods.base import FrameTokens, Sizes
from earlytom_compile.methods.registry import method_named

METHOD = method_named("visionzip")


@st.composite
def videos(draw):
    """Small whole numbers, so that equal attention and equal keys are common."""
    frames, tokens, width = draw(st.integers(1, 5)), draw(st.integers(1, 40)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    features = torch.randint(-9, 10, (frames, tokens, 3), generator=generator).float()
    importance = torch.randint(0, draw(st.sampled_from([2, 9, 1000])), (frames, tokens), generator=generator).float()
    keys = torch.randint(-2, 3, (frames, tokens, width), generator=generator).float()
    return FrameTokens(features, importance, keys), draw(st.integers(1, frames * tokens))


@examples(200)
@given(drawn=videos())
def test_equals_its_rules(drawn):
    video, budget = drawn
    kept = METHOD.keep(video, budget)
    tokens, places = keep_in_python(*(x.tolist() for x in video), budget)
    assert kept.places.tolist() == places
    torch.testing.assert_close(kept.tokens, torch.tensor(tokens), atol=1e-5, rtol=1e-5)


@examples(40)
@given(drawn=videos(), dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float64]))
def test_averages_of_other_dtypes_are_those_of_float32(drawn, dtype):
    video, budget = drawn
    low = video._replace(features=video.features.to(dtype))
    kept, of_float32 = METHOD.keep(low, budget), METHOD.keep(video, budget)
    assert torch.equal(kept.places, of_float32.places)
    torch.testing.assert_close(kept.tokens.float(), of_float32.tokens, atol=1e-6, rtol=1e-6)


@examples(40)
@given(drawn=videos())
def test_with_every_token_nothing_changes(drawn):
    video, _ = drawn
    frames, tokens, _ = video.features.shape
    kept = METHOD.keep(video, frames * tokens)
    assert torch.equal(kept.tokens, video.features.flatten(0, 1))
    assert kept.places.tolist() == [[frame, place] for frame in range(frames) for place in range(tokens)]


@pytest.mark.parametrize(
    ("share", "dominant"),
    [(1, 1), (2, 2), (3, 3), (4, 3), (16, 14), (20, 17), (64, 54), (128, 108), (192, 162)],
)
def test_how_many_are_dominant(share, dominant):
    """54 of 64, as 108 of 128 and 162 of 192 in the paper. What is dominant is there as it was."""
    generator = torch.Generator().manual_seed(0)
    video = FrameTokens(*(torch.randn(*shape, generator=generator) for shape in ((1, 400, 2), (1, 400), (1, 400, 5))))
    kept = METHOD.keep(video, share)
    as_they_were = (kept.tokens == video.features[0, kept.places[:, 1]]).all(1)
    assert int(as_they_were.sum()) == dominant
    most = video.importance[0].topk(dominant).indices.sort().values
    assert torch.equal(kept.places[as_they_were, 1], most)


@pytest.mark.parametrize("frames", [1, 3, 8, 32])
@pytest.mark.parametrize("budget", [1, 7, 31, 96])
def test_frames_keep_as_many_as_each_other(frames, budget):
    video = FrameTokens(torch.zeros(frames, 96, 1), torch.zeros(frames, 96), torch.ones(frames, 96, 1))
    counts = METHOD.keep(video, budget).places[:, 0].bincount(minlength=frames)
    assert int(counts.sum()) == budget and int(counts.max() - counts.min()) <= 1


def test_of_equal_keys_and_equal_attention_the_first_in_order():
    """4 of 9: three dominant ones, the first; one target, which all others join, so that nothing is lost."""
    features = torch.arange(9.0).view(1, 9, 1)
    kept = METHOD.keep(FrameTokens(features, torch.ones(1, 9), torch.ones(1, 9, 2)), 4)
    assert kept.places.tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]]
    assert kept.tokens.flatten().tolist() == [0, 1, 2, (3 + 4 + 5 + 6 + 7 + 8) / 6]
    # 10 of 13: eight are dominant, the targets are the 9th and the 11th.
    kept = METHOD.keep(FrameTokens(torch.arange(13.0).view(1, 13, 1), torch.ones(1, 13), torch.ones(1, 13, 2)), 10)
    assert kept.places[:, 1].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10]
    assert kept.tokens.flatten().tolist() == [*range(8), (8 + 9 + 11 + 12) / 4, 10]


@examples(60)
@given(drawn=videos())
def test_its_operations_are_those_that_torch_counts(drawn):
    video, budget = drawn
    sizes = Sizes(*video.features.shape, video.keys.shape[2], budget)
    with counter() as counted:
        METHOD.keep(video, budget)
    assert METHOD.operations(sizes) == counted.get_total_flops()
