import numpy as np
import plain_python
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import (
    DTYPES,
    counts_lists,
    laid_out,
    layouts,
    native_dtypes,
    operator_settings,
    ops,
    per_video,
    seeds,
)


@st.composite
def selections(draw):
    """features, importance (coarse, so that it ties), dynamic, counts."""
    counts = draw(counts_lists)
    tokens, channels = draw(st.integers(1, 20)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(seeds))
    levels = draw(st.sampled_from([1, 3, 1000]))
    features = torch.randn(sum(counts), tokens, channels, generator=generator).to(draw(native_dtypes))
    importance = torch.randint(-levels, levels + 1, (sum(counts), tokens), generator=generator) / levels
    dynamic = torch.rand(sum(counts), generator=generator) < 0.5
    return features, importance.to(draw(native_dtypes)), dynamic, counts


@operator_settings
@given(selection=selections(), share=st.floats(0, 1), layout=layouts)
def test_paper_keeps_exactly_the_budget_by_the_rules_read_literally(selection, share, layout):
    features, importance, dynamic, counts = selection
    budget = max(1, int(share * min(counts) * features.shape[1]))
    tokens, kept = ops.select_tokens(
        laid_out(features, layout), laid_out(importance, layout), dynamic, torch.tensor(counts), budget
    )
    assert tokens.shape == (len(counts), budget, features.shape[2]) and tokens.dtype == features.dtype
    for video, rows in enumerate(per_video(counts)):
        flags = dynamic[rows].tolist()
        quotas = plain_python.paper_quotas(flags, budget)
        assert kept[video].tolist() == plain_python.select(importance[rows].double().numpy(), flags, quotas)
        frame, token = kept[video].unbind(1)
        assert torch.equal(tokens[video], features[rows][frame, token])


@operator_settings
@given(selection=selections(), merged=st.integers(0, 9), ratio=st.floats(0.01, 1), layout=layouts)
def test_released_keeps_its_share_by_the_rules_read_literally(selection, merged, ratio, layout):
    features, importance, dynamic, counts = selection
    frames = max(counts) + merged
    tokens, kept, kept_counts = ops.select_tokens_released(
        laid_out(features, layout), laid_out(importance, layout), dynamic, torch.tensor(counts), frames, ratio
    )
    expected = []
    for video, rows in enumerate(per_video(counts)):
        flags = dynamic[rows].tolist()
        quotas = plain_python.released_quotas(flags, features.shape[1], frames, ratio)
        chosen = plain_python.select(importance[rows].double().numpy(), flags, quotas)
        assert kept_counts[video] == len(chosen)
        expected += [[video, *place] for place in chosen]
    assert kept.tolist() == expected
    first = torch.tensor([rows.start for rows in per_video(counts)])
    assert torch.equal(tokens, features[first[kept[:, 0]] + kept[:, 1], kept[:, 2]])


@operator_settings
@given(selection=selections(), share=st.floats(0, 1))
def test_a_video_keeps_the_same_alone_and_in_a_batch(selection, share):
    features, importance, dynamic, counts = selection
    budget = max(1, int(share * min(counts) * features.shape[1]))
    together = ops.select_tokens(features, importance, dynamic, torch.tensor(counts), budget)
    released = ops.select_tokens_released(features, importance, dynamic, torch.tensor(counts), 9, 0.3)
    per_count = per_video(released[2].tolist())
    for video, rows in enumerate(per_video(counts)):
        one = (features[rows], importance[rows], dynamic[rows], torch.tensor(counts[video : video + 1]))
        for alone, all_of_them in zip(ops.select_tokens(*one, budget), together, strict=True):
            assert torch.equal(alone[0], all_of_them[video])
        tokens, kept, _ = ops.select_tokens_released(*one, 9, 0.3)
        assert torch.equal(tokens, released[0][per_count[video]])
        assert torch.equal(kept[:, 1:], released[1][per_count[video], 1:])


def test_equal_importance_keeps_the_lower_index_and_the_head_of_each_run():
    importance, features = torch.zeros(3, 10), torch.randn(3, 10, 2)
    importance[:, ::2] = -0.0
    dynamic = torch.tensor([True, False, True])
    _, kept = ops.select_tokens(features, importance, dynamic, torch.tensor([3]), 10)
    # 10 tokens of 3 frames: 3 each, the one left over to the first dynamic frame.
    expected = [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0], [1, 4], [1, 7], [2, 0], [2, 1], [2, 2]]
    assert kept[0].tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_budget_of_everything_keeps_everything_in_order(dtype):
    features, importance = torch.randn(4, 6, 3).to(dtype), torch.rand(4, 6).to(dtype)
    dynamic = torch.tensor([True, False, False, True])
    tokens, _ = ops.select_tokens(features, importance, dynamic, torch.tensor([2, 2]), 12)
    assert torch.equal(tokens, features.view(2, 12, 3))


def test_a_budget_below_one_token_a_frame_goes_to_dynamic_frames_first():
    importance = torch.arange(12.0).view(6, 2)
    dynamic = torch.tensor([False, True, False, False, False, True])
    _, kept = ops.select_tokens(importance[..., None], importance, dynamic, torch.tensor([6]), 3)
    assert kept[0].tolist() == [[0, 1], [1, 1], [5, 1]]


def test_the_released_ceiling_sees_the_rounding_of_its_own_order_of_operations():
    importance = torch.rand(5, 49)
    dynamic, counts = torch.ones(5, dtype=torch.bool), torch.tensor([5])
    for frames in range(5, 65):
        for ratio in (0.1, 0.15, 0.2, 0.25, 0.3):
            _, _, kept = ops.select_tokens_released(importance[..., None], importance, dynamic, counts, frames, ratio)
            expected = int(np.ceil(49 * min(np.float64(ratio) / (np.float64(5) / frames), 1.0)))
            assert kept.item() == 5 * expected


def selection(**changes):
    parts = {
        "features": torch.randn(4, 3, 2),
        "importance": torch.rand(4, 3),
        "dynamic": torch.ones(4, dtype=torch.bool),
        "counts": torch.tensor([3, 1]),
    } | changes
    return parts["features"], parts["importance"], parts["dynamic"], parts["counts"]


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"importance": torch.tensor([[0, 1, float("nan")]] * 4)}, "NaN"),
        ({"importance": torch.rand(4, 2)}, r"importance \[4, 2\]"),
        ({"importance": torch.ones(4, 3, dtype=torch.int64)}, "int64"),
        ({"dynamic": torch.ones(3, dtype=torch.bool)}, r"dynamic \[3\]"),
        ({"dynamic": torch.ones(4)}, "float32"),
        ({"counts": torch.tensor([3, 2])}, r"counts=\[3, 2\] over 4 frames"),
        ({"counts": torch.tensor([4, 0])}, r"counts=\[4, 0\]"),
        ({"features": torch.randn(4, 3)}, "2 axes"),
    ],
)
def test_refuses_what_means_nothing(changes, says):
    with pytest.raises(ValueError, match=f"select_tokens:.*{says}"):
        ops.select_tokens(*selection(**changes), 1)
    with pytest.raises(ValueError, match=f"select_tokens_released:.*{says}"):
        ops.select_tokens_released(*selection(**changes), 4, 0.5)


@pytest.mark.parametrize("budget", [0, -1, 4])
def test_refuses_a_budget_that_a_video_cannot_fill(budget):
    with pytest.raises(ValueError, match=rf"budget={budget}, but a video has [13] frames of 3 tokens"):
        ops.select_tokens(*selection(), budget)


@pytest.mark.parametrize("frames, ratio", [(0, 0.5), (4, 0.0), (4, 1.5), (4, float("nan"))])
def test_released_refuses_a_ratio_without_meaning(frames, ratio):
    with pytest.raises(ValueError, match="select_tokens_released.*retain_ratio"):
        ops.select_tokens_released(*selection(), frames, ratio)
