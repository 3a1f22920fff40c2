"""The forms that are exported decide as the operators do, for one video of any length up to ``most``."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import SEGMENT, laid_out, layouts, operator_settings, ops, seeds, video
from plain_loops import looping

from earlytom_compile.kernels import exportable

FORMS = exportable.FORMS
lengths = st.integers(1, 12)


@pytest.fixture(scope="module", autouse=True)
def plain_loops():
    with looping(exportable):
        yield


@st.composite
def plans(draw):
    """float32 [n, band], coarse so that it ties, or of frames; options of plan_merge."""
    frames = draw(lengths)
    band = draw(st.integers(max(1, frames - 1), 12))
    generator = torch.Generator().manual_seed(draw(seeds))
    if draw(st.booleans()):
        similarity = torch.randint(-4, 17, (frames, band), generator=generator) / 16
    else:
        similarity = ops.frame_similarity(video(draw(seeds), frames, 3, 4), band)
    options = {
        "variant": "paper",
        "tau_seg": draw(st.sampled_from([-2.0, 0.3, 0.6])),
        "alpha": draw(st.sampled_from([1.0, 0.9, 0.5])),
        "max_window": draw(st.integers(0, 7)),
    }
    return similarity.float(), options


@operator_settings
@given(
    plan=plans(), tau_merge=st.sampled_from([SEGMENT, 0.0, 0.5]), min_frames=st.integers(1, 9), more=st.integers(0, 5)
)
def test_the_same_frames_merge_with_the_same_weights(plan, tau_merge, min_frames, more):
    similarity, options = plan
    frames, counts = len(similarity), torch.tensor([len(similarity)])
    options = {**options, "tau_merge": tau_merge, "min_frames": min_frames}
    source, weight, merged = ops.plan_merge(similarity, counts, **options)
    found = FORMS["plan_merge"](similarity, counts, **options, most=frames + more)
    assert torch.equal(found[2], merged)
    n = int(merged)
    assert torch.equal(found[0][:n], source[:n]) and torch.equal(found[1][:n], weight[:n])
    hidden = video(frames, frames, 3, 4)
    expected = ops.merge_frames([hidden, hidden[:, 0, 0]], source, weight, n)
    made = FORMS["merge_frames"]([hidden, hidden[:, 0, 0]], *found[:2], n, most=frames + more)
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    first = torch.arange(frames) * 2
    for known in (None, first):
        expected = ops.first_of_merged(known, source, n)
        assert torch.equal(FORMS["first_of_merged"](known, found[0], n, most=frames + more), expected)


@operator_settings
@given(plan=plans(), more=st.integers(0, 5))
def test_the_same_frames_begin_and_end_segments(plan, more):
    similarity, options = plan
    counts = torch.tensor([len(similarity)])
    found = FORMS["dynamic_frames"](similarity, counts, **options, most=len(similarity) + more)
    assert torch.equal(found, ops.dynamic_frames(similarity, counts, **options))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_the_plan_refuses_is_a_count_that_the_check_of_n_refuses(value):
    similarity = torch.full((4, 3), 0.5)
    similarity[3, 2] = value
    options = {"variant": "paper", "tau_seg": 0.6, "alpha": 0.9, "max_window": 0, "tau_merge": SEGMENT, "min_frames": 1}
    *_, merged = FORMS["plan_merge"](similarity, torch.tensor([4]), **options, most=6)
    assert merged.tolist() == [-1]
    similarity[3, 2], similarity[1, 1] = 0.5, value  # reaches into the video before
    *_, merged = FORMS["plan_merge"](similarity, torch.tensor([4]), **options, most=6)
    assert merged.item() > 0


@operator_settings
@given(
    seed=seeds,
    frames=lengths,
    tokens=st.integers(1, 9),
    channels=st.integers(1, 6),
    layout=layouts,
    chunk=st.integers(1, 200),
)
def test_similarity_has_the_same_bits_however_it_is_cut(seed, frames, tokens, channels, layout, chunk):
    hidden = laid_out(video(seed, frames, tokens, channels), layout)
    hidden[0, 0] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exportable, "_CHUNK_ELEMENTS", chunk)
        found = FORMS["frame_similarity"](hidden, 7, most=12)
    assert torch.equal(found, ops.frame_similarity(hidden, 7))


@operator_settings
@given(seed=seeds, frames=lengths, heads=st.integers(1, 3), tokens=st.integers(1, 9), chunk=st.integers(1, 2000))
def test_attention_received_is_the_same_however_it_is_cut(seed, frames, heads, tokens, chunk):
    query, key = torch.randn(2, frames, heads, tokens, 4, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exportable, "_CHUNK_ELEMENTS", chunk)
        found = FORMS["attention_received"](query, key, 0.7, most=12)
    torch.testing.assert_close(found, ops.attention_received(query, key, 0.7))


@operator_settings
@given(seed=seeds, frames=lengths, tokens=st.integers(1, 20), levels=st.sampled_from([1, 1000]), share=st.floats(0, 1))
def test_the_same_tokens_stay(seed, frames, tokens, levels, share):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(frames, tokens, 3, generator=generator)
    importance = torch.randint(-levels, levels + 1, (frames, tokens), generator=generator) / levels
    dynamic = torch.rand(frames, generator=generator) < 0.5
    budget, counts = max(1, int(share * frames * tokens)), torch.tensor([frames])
    found = FORMS["select_tokens"](features, importance, dynamic, counts, budget, most=12)
    expected = ops.select_tokens(features, importance, dynamic, counts, budget)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@operator_settings
@given(seed=seeds, frames=st.integers(1, 30), tokens=st.integers(1, 8), share=st.floats(0, 1))
def test_the_same_tokens_represent_the_others(seed, frames, tokens, share):
    features, counts = video(seed, frames, tokens, 5), torch.tensor([frames])
    budget = max(1, int(share * frames * tokens))
    found = FORMS["select_representatives"](features, counts, budget, most=30)
    expected = ops.select_representatives(features, counts, budget)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_features_that_are_refused_give_no_numbers():
    features = video(0, 4, 3, 5)
    features[2, 1, 0] = float("inf")
    tokens, _ = FORMS["select_representatives"](features, torch.tensor([4]), 5, most=4)
    assert tokens.isnan().all()
    importance = torch.zeros(4, 3)
    importance[1, 1] = float("nan")
    tokens, _ = FORMS["select_tokens"](
        features, importance, torch.ones(4, dtype=torch.bool), torch.tensor([4]), 5, most=4
    )
    assert tokens.isnan().all()


@operator_settings
@given(seed=seeds, frames=lengths, windows=st.sampled_from([[1, 6], [2, 4, 1, 3], [3, 1, 1, 5]]))
def test_windows_attend_to_themselves(seed, frames, windows):
    places = sum(n * length for n, length in zip(windows[::2], windows[1::2], strict=True))
    query, key, value = torch.randn(3, frames, 2, places, 4, generator=torch.Generator().manual_seed(seed))
    found = FORMS["window_attention"](query, key, value, windows, 0.7, most=12)
    torch.testing.assert_close(found, ops.window_attention(query, key, value, windows, 0.7))
    found = FORMS["window_attention_received"](query, key, windows, 0.7, most=12)
    torch.testing.assert_close(found, ops.window_attention_received(query, key, windows, 0.7))
