"""The forms that are exported decide as the operators do, for one video of any length up to ``most``."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import SEGMENT, laid_out, layouts, operator_settings, ops, seeds, video

from earlytom_compile.kernels import exportable

FORMS = exportable.FORMS
lengths = st.integers(1, 12)


@pytest.fixture(scope="module", autouse=True)
def plain_loops():
    """Outside of a trace torch would compile each loop."""

    def loop(goes_on, step, state):
        while goes_on(*state):
            state = step(*state)
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exportable, "while_loop", loop)
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
